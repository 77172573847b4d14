#include "calls.h"

VQK_CALL(nearest_codeword) {
  const Array &z = call.in(0), &codebook = call.in(1);
  const vqk::NearestCodewordParams p{.z = z.data,
                                     .codebook = codebook.data,
                                     .mask = call.in(2).as<bool>(),
                                     .indices = call.out(0).as<int64_t>(),
                                     .distances = call.out(1).data,
                                     .H = z.size(0),
                                     .N = z.size(1),
                                     .K = codebook.size(1),
                                     .D = z.size(2),
                                     .dtype = z.dtype(),
                                     .metric = static_cast<vqk::Metric>(call.integer(3)),
                                     .certified = call.integer(4) != 0};
  return vqk::cuda::nearest_codeword(p, call.workspace(vqk::cuda::nearest_codeword_workspace(p)), nullptr);
}
