#include "torch_util.h"

namespace vqk::bind {
namespace {

void check(const char* op, const Tensor& indices, int64_t K) {
  check_dim(op, "indices", indices, 2, "[S, N]");
  if (K < 1) fail(op, "codebook_size is ", K, ", expected at least 1");
}

Tensor codebook_usage_cpu(const Tensor& indices, int64_t K) {
  const char* op = "codebook_usage";
  check(op, indices, K);
  int64_t S = indices.size(0), N = indices.size(1), bad = -1;
  Tensor ic = input(op, "indices", indices, {S, N}, ScalarType::Long, indices);
  Tensor counts = empty(indices, {S, K}, ScalarType::Long);
  cpu::codebook_usage({.indices = static_cast<const int64_t*>(ic.const_data_ptr()),
                       .counts = static_cast<int64_t*>(counts.mutable_data_ptr()),
                       .bad = &bad,
                       .S = S,
                       .N = N,
                       .K = K},
                      torch_threads(op));
  check_range(op, bad, K);
  return counts;
}

#ifdef VQK_WITH_CUDA
Tensor codebook_usage_cuda(const Tensor& indices, int64_t K) {
  const char* op = "codebook_usage";
  check(op, indices, K);
  torch::stable::accelerator::DeviceGuard guard(indices.get_device_index());
  int64_t S = indices.size(0), N = indices.size(1);
  Tensor ic = input(op, "indices", indices, {S, N}, ScalarType::Long, indices);
  Tensor counts = empty(indices, {S, K}, ScalarType::Long);
  check_cuda(op, cuda::codebook_usage({.indices = static_cast<const int64_t*>(ic.const_data_ptr()),
                                       .counts = static_cast<int64_t*>(counts.mutable_data_ptr()),
                                       .bad = nullptr,
                                       .S = S,
                                       .N = N,
                                       .K = K},
                                      cuda_stream(op, indices)));
  return counts;
}
#endif

}  // namespace
}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("codebook_usage", TORCH_BOX(&vqk::bind::codebook_usage_cpu)); }

#ifdef VQK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) { m.impl("codebook_usage", TORCH_BOX(&vqk::bind::codebook_usage_cuda)); }
#endif
