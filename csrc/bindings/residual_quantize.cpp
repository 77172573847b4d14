// Forward and backward of residual_quantize.
#include "torch_util.h"

namespace vqk::bind {
namespace {

// The Q codebooks as the kernels want them: contiguous, with a table of pointers and sizes.
struct Codebooks {
  std::vector<Tensor> tensors;
  std::vector<const void*> data;
  std::vector<int64_t> K;

  Codebooks(const char* op, const Tensor& z, const std::vector<Tensor>& codebooks) {
    check_dim(op, "z", z, 3, "[H, N, D]");
    if (codebooks.empty()) fail(op, "needs at least one codebook");
    for (const Tensor& c : codebooks) {
      check_dim(op, "a codebook", c, 3, "[H, K, D]");
      if (c.size(1) == 0) fail(op, "a codebook is empty: shape ", shape(c));
      K.push_back(c.size(1));
      tensors.push_back(input(op, "a codebook", c, {z.size(0), c.size(1), z.size(2)}, z.scalar_type(), z));
      data.push_back(tensors.back().const_data_ptr());
    }
  }
};

// Checks and allocates; launch(params) fills in the results.
template <class Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_quantize(const Tensor& z, const std::vector<Tensor>& codebooks,
                                                             const std::optional<Tensor>& mask, int64_t metric_,
                                                             Launch launch) {
  const char* op = "residual_quantize";
  DType type = dtype(op, z);
  Codebooks books(op, z, codebooks);
  int64_t H = z.size(0), N = z.size(1), D = z.size(2), Q = books.K.size();
  Tensor zc = torch::stable::contiguous(z);
  std::optional<Tensor> mc;
  if (mask) mc = input(op, "mask", *mask, {H, N}, ScalarType::Bool, z);
  Tensor indices = empty(z, {H, N, Q}, ScalarType::Long);
  Tensor quantized = empty(z, {H, N, D}, z.scalar_type());
  Tensor losses = empty(z, {Q}, accumulate_dtype(z));
  Tensor valid = empty(z, {}, ScalarType::Long);
  launch(op, ResidualQuantizeParams{.z = zc.const_data_ptr(),
                                    .codebooks = books.data.data(),
                                    .K = books.K.data(),
                                    .mask = mc ? static_cast<const bool*>(mc->const_data_ptr()) : nullptr,
                                    .indices = static_cast<int64_t*>(indices.mutable_data_ptr()),
                                    .quantized = quantized.mutable_data_ptr(),
                                    .losses = losses.mutable_data_ptr(),
                                    .valid = static_cast<int64_t*>(valid.mutable_data_ptr()),
                                    .H = H,
                                    .N = N,
                                    .Q = Q,
                                    .D = D,
                                    .dtype = type,
                                    .metric = metric(op, metric_)});
  return {indices, quantized, losses, valid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_quantize_cpu(const Tensor& z, std::vector<Tensor> codebooks,
                                                                 const std::optional<Tensor>& mask, int64_t metric) {
  return residual_quantize(z, codebooks, mask, metric, [](const char* op, const ResidualQuantizeParams& p) {
    cpu::residual_quantize(p, torch_threads(op));
  });
}

#ifdef VQK_WITH_CUDA
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_quantize_cuda(const Tensor& z, std::vector<Tensor> codebooks,
                                                                  const std::optional<Tensor>& mask, int64_t metric) {
  torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  return residual_quantize(z, codebooks, mask, metric, [&](const char* op, const ResidualQuantizeParams& p) {
    Tensor workspace = empty(z, {cuda::residual_quantize_workspace(p)}, ScalarType::Byte);
    check_cuda(op, cuda::residual_quantize(p, workspace.mutable_data_ptr(), cuda_stream(op, z)));
  });
}
#endif

template <class Launch>
Tensor residual_quantize_backward(const char* op, const Tensor& z, const Codebooks& books, const Tensor& indices,
                                  const Tensor& grad, const Tensor& commitment_scale, int64_t estimator_,
                                  bool per_level, Launch launch) {
  DType type = dtype(op, z);
  int64_t H = z.size(0), N = z.size(1), D = z.size(2), Q = books.K.size();
  Tensor zc = torch::stable::contiguous(z);
  Tensor ic = input(op, "indices", indices, {H, N, Q}, ScalarType::Long, z);
  Tensor gc = input(op, "grad", grad, {H, N, D}, z.scalar_type(), z);
  Tensor sc = input(op, "commitment_scale", commitment_scale, {Q}, accumulate_dtype(z), z);
  Tensor dz = empty(z, {H, N, D}, z.scalar_type());
  launch(ResidualQuantizeBackwardParams{.z = zc.const_data_ptr(),
                                        .codebooks = books.data.data(),
                                        .K = books.K.data(),
                                        .indices = static_cast<const int64_t*>(ic.const_data_ptr()),
                                        .grad = gc.const_data_ptr(),
                                        .commitment_scale = sc.const_data_ptr(),
                                        .dz = dz.mutable_data_ptr(),
                                        .H = H,
                                        .N = N,
                                        .Q = Q,
                                        .D = D,
                                        .dtype = type,
                                        .estimator = estimator(op, estimator_),
                                        .per_level = per_level});
  return dz;
}

Tensor residual_quantize_backward_cpu(const Tensor& z, std::vector<Tensor> codebooks, const Tensor& indices,
                                      const Tensor& grad, const Tensor& commitment_scale, int64_t estimator_,
                                      bool per_level) {
  const char* op = "residual_quantize_backward";
  const Codebooks books(op, z, codebooks);
  auto launch = [&](const ResidualQuantizeBackwardParams& p) {
    for (int64_t i = 0; i < p.H * p.N; ++i)
      for (int64_t l = 0; l < p.Q; ++l)
        if (p.indices[i * p.Q + l] >= p.K[l]) check_range(op, p.indices[i * p.Q + l], p.K[l]);
    cpu::residual_quantize_backward(p, torch_threads(op));
  };
  return residual_quantize_backward(op, z, books, indices, grad, commitment_scale, estimator_, per_level, launch);
}

#ifdef VQK_WITH_CUDA
Tensor residual_quantize_backward_cuda(const Tensor& z, std::vector<Tensor> codebooks, const Tensor& indices,
                                       const Tensor& grad, const Tensor& commitment_scale, int64_t estimator_,
                                       bool per_level) {
  const char* op = "residual_quantize_backward";
  torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  const Codebooks books(op, z, codebooks);
  auto launch = [&](const ResidualQuantizeBackwardParams& p) {
    check_cuda(op, cuda::residual_quantize_backward(p, cuda_stream(op, z)));
  };
  return residual_quantize_backward(op, z, books, indices, grad, commitment_scale, estimator_, per_level, launch);
}
#endif

}  // namespace
}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("residual_quantize", TORCH_BOX(&vqk::bind::residual_quantize_cpu));
  m.impl("residual_quantize_backward", TORCH_BOX(&vqk::bind::residual_quantize_backward_cpu));
}

#ifdef VQK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) {
  m.impl("residual_quantize_backward", TORCH_BOX(&vqk::bind::residual_quantize_backward_cuda));
  m.impl("residual_quantize", TORCH_BOX(&vqk::bind::residual_quantize_cuda));
}
#endif
