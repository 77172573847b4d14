#include "calls.h"

VQK_CALL(rotation_trick_backward) {
  const Array& z = call.in(0);
  return vqk::cuda::rotation_trick_backward({.z = z.data,
                                             .q = call.in(1).data,
                                             .grad = call.in(2).data,
                                             .dz = call.out(0).data,
                                             .N = z.size(0),
                                             .D = z.size(1),
                                             .dtype = z.dtype(),
                                             .estimator = static_cast<vqk::Estimator>(call.integer(3))},
                                            nullptr);
}
