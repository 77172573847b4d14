#include "torch_util.h"

namespace vqk::bind {

static std::tuple<Tensor, Tensor> codeword_sums_cpu(const Tensor& z, const Tensor& indices, int64_t K) {
  const char* op = "codeword_sums";
  check_dim(op, "z", z, 3, "[H, N, D]");
  if (K < 1) fail(op, "codebook_size is ", K, ", expected at least 1");
  int64_t H = z.size(0), N = z.size(1), D = z.size(2), bad = -1;
  DType type = dtype(op, z);
  Tensor zc = torch::stable::contiguous(z);
  Tensor ic = input(op, "indices", indices, {H, N}, ScalarType::Long, z);
  Tensor sums = empty(z, {H, K, D}, accumulate_dtype(z));
  Tensor counts = empty(z, {H, K}, ScalarType::Long);
  cpu::codeword_sums({.z = zc.const_data_ptr(),
                      .indices = static_cast<const int64_t*>(ic.const_data_ptr()),
                      .sums = sums.mutable_data_ptr(),
                      .counts = static_cast<int64_t*>(counts.mutable_data_ptr()),
                      .bad = &bad,
                      .H = H,
                      .N = N,
                      .K = K,
                      .D = D,
                      .dtype = type},
                     torch_threads(op));
  check_range(op, bad, K);
  return {sums, counts};
}

}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("codeword_sums", TORCH_BOX(&vqk::bind::codeword_sums_cpu)); }
