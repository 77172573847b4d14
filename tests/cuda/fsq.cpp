#include "calls.h"

VQK_CALL(fsq) {
  const Array& z = call.in(0);
  return vqk::cuda::fsq({.z = z.data,
                         .levels = call.integers(1).data(),
                         .quantized = call.out(0).data,
                         .indices = call.out(1).as<int32_t>(),
                         .N = z.size(0),
                         .d = z.size(1),
                         .dtype = z.dtype()},
                        nullptr);
}

VQK_CALL(fsq_backward) {
  const Array& z = call.in(0);
  return vqk::cuda::fsq_backward({.z = z.data,
                                  .grad = call.in(1).data,
                                  .levels = call.integers(2).data(),
                                  .dz = call.out(0).data,
                                  .N = z.size(0),
                                  .d = z.size(1),
                                  .dtype = z.dtype()},
                                 nullptr);
}
