#include "torch_util.h"

namespace vqk::bind {
namespace {

// Checks and allocates; launch(params) fills in the results.
template <class Launch>
std::tuple<Tensor, Tensor> nearest_codeword(const Tensor& z, const Tensor& codebook, const std::optional<Tensor>& mask,
                                            int64_t metric_, bool certified, Launch launch) {
  const char* op = "nearest_codeword";
  check_dim(op, "z", z, 3, "[H, N, D]");
  check_dim(op, "codebook", codebook, 3, "[H, K, D]");
  int64_t H = z.size(0), N = z.size(1), D = z.size(2), K = codebook.size(1);
  if (K == 0) fail(op, "codebook is empty: shape ", shape(codebook));
  DType type = dtype(op, z);
  Tensor zc = torch::stable::contiguous(z);
  Tensor cc = input(op, "codebook", codebook, {H, K, D}, z.scalar_type(), z);
  std::optional<Tensor> mc;
  if (mask) mc = input(op, "mask", *mask, {H, N}, ScalarType::Bool, z);
  Tensor indices = empty(z, {H, N}, ScalarType::Long);
  Tensor distances = empty(z, {H, N}, accumulate_dtype(z));
  launch(op, NearestCodewordParams{.z = zc.const_data_ptr(),
                                   .codebook = cc.const_data_ptr(),
                                   .mask = mc ? static_cast<const bool*>(mc->const_data_ptr()) : nullptr,
                                   .indices = static_cast<int64_t*>(indices.mutable_data_ptr()),
                                   .distances = distances.mutable_data_ptr(),
                                   .H = H,
                                   .N = N,
                                   .K = K,
                                   .D = D,
                                   .dtype = type,
                                   .metric = metric(op, metric_),
                                   .certified = certified});
  return {indices, distances};
}

std::tuple<Tensor, Tensor> nearest_codeword_cpu(const Tensor& z, const Tensor& codebook,
                                                const std::optional<Tensor>& mask, int64_t metric, bool certified) {
  return nearest_codeword(z, codebook, mask, metric, certified, [](const char* op, const NearestCodewordParams& p) {
    cpu::nearest_codeword(p, torch_threads(op));
  });
}

#ifdef VQK_WITH_CUDA
std::tuple<Tensor, Tensor> nearest_codeword_cuda(const Tensor& z, const Tensor& codebook,
                                                 const std::optional<Tensor>& mask, int64_t metric, bool certified) {
  torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  return nearest_codeword(z, codebook, mask, metric, certified, [&](const char* op, const NearestCodewordParams& p) {
    Tensor workspace = empty(z, {cuda::nearest_codeword_workspace(p)}, ScalarType::Byte);
    check_cuda(op, cuda::nearest_codeword(p, workspace.mutable_data_ptr(), cuda_stream(op, z)));
  });
}
#endif

}  // namespace
}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("nearest_codeword", TORCH_BOX(&vqk::bind::nearest_codeword_cpu));
}

#ifdef VQK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) {
  m.impl("nearest_codeword", TORCH_BOX(&vqk::bind::nearest_codeword_cuda));
}
#endif
