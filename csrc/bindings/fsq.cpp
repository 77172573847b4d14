#include "torch_util.h"

namespace vqk::bind {
namespace {

void check_levels(const char* op, const std::vector<int64_t>& levels, int64_t d) {
  double codes = 1;
  for (int64_t count : levels) {
    if (count < 2) fail(op, "a level count is ", count, ", expected at least 2");
    codes *= static_cast<double>(count);
  }
  if (levels.empty() || static_cast<int64_t>(levels.size()) != d)
    fail(op, "z has ", d, " features, levels has ", levels.size(), " numbers; expected one per feature, at least one");
  if (codes >= 0x1p31) fail(op, "levels multiply to ", codes, " codes, more than an int32 index holds (2147483647)");
}

template <class Launch>
std::tuple<Tensor, Tensor> fsq(const Tensor& z, const std::vector<int64_t>& levels, Launch launch) {
  const char* op = "fsq";
  check_dim(op, "z", z, 2, "[N, d]");
  const int64_t N = z.size(0), d = z.size(1);
  check_levels(op, levels, d);
  const DType type = dtype(op, z);
  Tensor zc = torch::stable::contiguous(z);
  Tensor quantized = empty(z, {N, d}, z.scalar_type());
  Tensor indices = empty(z, {N}, ScalarType::Int);
  launch(op, FsqParams{.z = zc.const_data_ptr(),
                       .levels = levels.data(),
                       .quantized = quantized.mutable_data_ptr(),
                       .indices = static_cast<int32_t*>(indices.mutable_data_ptr()),
                       .N = N,
                       .d = d,
                       .dtype = type});
  return {quantized, indices};
}

template <class Launch>
Tensor fsq_backward(const Tensor& z, const Tensor& grad, const std::vector<int64_t>& levels, Launch launch) {
  const char* op = "fsq_backward";
  check_dim(op, "z", z, 2, "[N, d]");
  const int64_t N = z.size(0), d = z.size(1);
  check_levels(op, levels, d);
  const DType type = dtype(op, z);
  Tensor zc = torch::stable::contiguous(z);
  Tensor gc = input(op, "grad", grad, {N, d}, z.scalar_type(), z);
  Tensor dz = empty(z, {N, d}, z.scalar_type());
  launch(op, FsqBackwardParams{.z = zc.const_data_ptr(),
                               .grad = gc.const_data_ptr(),
                               .levels = levels.data(),
                               .dz = dz.mutable_data_ptr(),
                               .N = N,
                               .d = d,
                               .dtype = type});
  return dz;
}

std::tuple<Tensor, Tensor> fsq_cpu(const Tensor& z, std::vector<int64_t> levels) {
  return fsq(z, levels, [](const char* op, const FsqParams& p) { cpu::fsq(p, torch_threads(op)); });
}

Tensor fsq_backward_cpu(const Tensor& z, const Tensor& grad, std::vector<int64_t> levels) {
  return fsq_backward(z, grad, levels, [](const char* op, const FsqBackwardParams& p) {
    cpu::fsq_backward(p, torch_threads(op));
  });
}

#ifdef VQK_WITH_CUDA
std::tuple<Tensor, Tensor> fsq_cuda(const Tensor& z, std::vector<int64_t> levels) {
  torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  return fsq(z, levels, [&](const char* op, const FsqParams& p) { check_cuda(op, cuda::fsq(p, cuda_stream(op, z))); });
}

Tensor fsq_backward_cuda(const Tensor& z, const Tensor& grad, std::vector<int64_t> levels) {
  torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  return fsq_backward(z, grad, levels, [&](const char* op, const FsqBackwardParams& p) {
    check_cuda(op, cuda::fsq_backward(p, cuda_stream(op, z)));
  });
}
#endif

}  // namespace
}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("fsq", TORCH_BOX(&vqk::bind::fsq_cpu));
  m.impl("fsq_backward", TORCH_BOX(&vqk::bind::fsq_backward_cpu));
}

#ifdef VQK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) {
  m.impl("fsq", TORCH_BOX(&vqk::bind::fsq_cuda));
  m.impl("fsq_backward", TORCH_BOX(&vqk::bind::fsq_backward_cuda));
}
#endif
