#include <cstring>

#include "calls.h"

VQK_CALL(residual_quantize) {
  const Array& z = call.in(0);
  std::vector<const void*> codebooks;
  std::vector<int64_t> K;
  const Array* before = nullptr;
  for (const Array& codebook : call.list(1)) {
    // Equal codebooks, and the beginning of one, lie in the same place, as those of a shared codebook and its view do.
    const bool shared = before && codebook.bytes() <= before->bytes() &&
                        (codebook.shape == before->shape || codebook.size(0) == 1) &&
                        !std::memcmp(codebook.data, before->data, codebook.bytes());
    if (!shared) before = &codebook;
    codebooks.push_back(before->data), K.push_back(codebook.size(1));
  }
  const vqk::ResidualQuantizeParams p{.z = z.data,
                                      .codebooks = codebooks.data(),
                                      .K = K.data(),
                                      .mask = call.in(2).as<bool>(),
                                      .indices = call.out(0).as<int64_t>(),
                                      .quantized = call.out(1).data,
                                      .losses = call.out(2).data,
                                      .valid = call.out(3).as<int64_t>(),
                                      .H = z.size(0),
                                      .N = z.size(1),
                                      .Q = static_cast<int64_t>(K.size()),
                                      .D = z.size(2),
                                      .dtype = z.dtype(),
                                      .metric = static_cast<vqk::Metric>(call.integer(3))};
  return vqk::cuda::residual_quantize(p, call.workspace(vqk::cuda::residual_quantize_workspace(p)), nullptr);
}
