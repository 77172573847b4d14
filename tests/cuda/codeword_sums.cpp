#include "calls.h"

VQK_CALL(codeword_sums) {
  const Array &z = call.in(0), &indices = call.in(1);
  const vqk::CodewordSumsParams p{.z = z.data,
                                  .indices = indices.as<int64_t>(),
                                  .sums = call.out(0).data,
                                  .counts = call.out(1).as<int64_t>(),
                                  .bad = nullptr,
                                  .H = z.size(0),
                                  .N = z.size(1),
                                  .K = call.integer(2),
                                  .D = z.size(2),
                                  .dtype = z.dtype()};
  return vqk::cuda::codeword_sums(p, call.workspace(vqk::cuda::codeword_sums_workspace(p)), nullptr);
}
