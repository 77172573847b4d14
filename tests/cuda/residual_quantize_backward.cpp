#include "calls.h"

VQK_CALL(residual_quantize_backward) {
  const Array& z = call.in(0);
  std::vector<const void*> codebooks;
  std::vector<int64_t> K;
  for (const Array& codebook : call.list(1)) codebooks.push_back(codebook.data), K.push_back(codebook.size(1));
  return vqk::cuda::residual_quantize_backward({.z = z.data,
                                                .codebooks = codebooks.data(),
                                                .K = K.data(),
                                                .indices = call.in(2).as<int64_t>(),
                                                .grad = call.in(3).data,
                                                .commitment_scale = call.in(4).data,
                                                .dz = call.out(0).data,
                                                .H = z.size(0),
                                                .N = z.size(1),
                                                .Q = static_cast<int64_t>(K.size()),
                                                .D = z.size(2),
                                                .dtype = z.dtype(),
                                                .estimator = static_cast<vqk::Estimator>(call.integer(5)),
                                                .per_level = call.integer(6) != 0},
                                               nullptr);
}
