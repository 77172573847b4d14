#include "torch_util.h"

namespace vqk::bind {
namespace {

template <class Launch>
std::tuple<Tensor, Tensor> codeword_sums(const char* op, const Tensor& z, const Tensor& indices, int64_t K,
                                         Launch launch) {
  check_dim(op, "z", z, 3, "[H, N, D]");
  if (K < 1) fail(op, "codebook_size is ", K, ", expected at least 1");
  int64_t H = z.size(0), N = z.size(1), D = z.size(2), bad = -1;
  DType type = dtype(op, z);
  Tensor zc = torch::stable::contiguous(z);
  Tensor ic = input(op, "indices", indices, {H, N}, ScalarType::Long, z);
  Tensor sums = empty(z, {H, K, D}, accumulate_dtype(z));
  Tensor counts = empty(z, {H, K}, ScalarType::Long);
  launch(CodewordSumsParams{.z = zc.const_data_ptr(),
                            .indices = static_cast<const int64_t*>(ic.const_data_ptr()),
                            .sums = sums.mutable_data_ptr(),
                            .counts = static_cast<int64_t*>(counts.mutable_data_ptr()),
                            .bad = &bad,
                            .H = H,
                            .N = N,
                            .K = K,
                            .D = D,
                            .dtype = type});
  check_range(op, bad, K);
  return {sums, counts};
}

std::tuple<Tensor, Tensor> codeword_sums_cpu(const Tensor& z, const Tensor& indices, int64_t K) {
  const char* op = "codeword_sums";
  return codeword_sums(op, z, indices, K, [&](const CodewordSumsParams& p) {
    cpu::codeword_sums(p, torch_threads(op));
  });
}

#ifdef VQK_WITH_CUDA
std::tuple<Tensor, Tensor> codeword_sums_cuda(const Tensor& z, const Tensor& indices, int64_t K) {
  const char* op = "codeword_sums";
  torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  return codeword_sums(op, z, indices, K, [&](const CodewordSumsParams& p) {
    Tensor workspace = empty(z, {cuda::codeword_sums_workspace(p)}, ScalarType::Byte);
    check_cuda(op, cuda::codeword_sums(p, workspace.mutable_data_ptr(), cuda_stream(op, z)));
  });
}
#endif

}  // namespace
}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("codeword_sums", TORCH_BOX(&vqk::bind::codeword_sums_cpu)); }

#ifdef VQK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) { m.impl("codeword_sums", TORCH_BOX(&vqk::bind::codeword_sums_cuda)); }
#endif
