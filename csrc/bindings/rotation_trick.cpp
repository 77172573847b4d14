#include "torch_util.h"

namespace vqk::bind {
namespace {

template <class Launch>
Tensor rotation_trick_backward(const Tensor& z, const Tensor& q, const Tensor& grad, int64_t estimator_,
                               Launch launch) {
  const char* op = "rotation_trick_backward";
  check_dim(op, "z", z, 2, "[N, D]");
  int64_t N = z.size(0), D = z.size(1);
  DType type = dtype(op, z);
  Tensor zc = torch::stable::contiguous(z);
  Tensor qc = input(op, "q", q, {N, D}, z.scalar_type(), z);
  Tensor gc = input(op, "grad", grad, {N, D}, z.scalar_type(), z);
  Tensor dz = empty(z, {N, D}, z.scalar_type());
  launch(op, RotationTrickBackwardParams{.z = zc.const_data_ptr(),
                                         .q = qc.const_data_ptr(),
                                         .grad = gc.const_data_ptr(),
                                         .dz = dz.mutable_data_ptr(),
                                         .N = N,
                                         .D = D,
                                         .dtype = type,
                                         .estimator = estimator(op, estimator_)});
  return dz;
}

Tensor rotation_trick_backward_cpu(const Tensor& z, const Tensor& q, const Tensor& grad, int64_t estimator_) {
  return rotation_trick_backward(z, q, grad, estimator_, [](const char* op, const RotationTrickBackwardParams& p) {
    cpu::rotation_trick_backward(p, torch_threads(op));
  });
}

#ifdef VQK_WITH_CUDA
Tensor rotation_trick_backward_cuda(const Tensor& z, const Tensor& q, const Tensor& grad, int64_t estimator_) {
  torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  return rotation_trick_backward(z, q, grad, estimator_, [&](const char* op, const RotationTrickBackwardParams& p) {
    check_cuda(op, cuda::rotation_trick_backward(p, cuda_stream(op, z)));
  });
}
#endif

}  // namespace
}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("rotation_trick_backward", TORCH_BOX(&vqk::bind::rotation_trick_backward_cpu));
}

#ifdef VQK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) {
  m.impl("rotation_trick_backward", TORCH_BOX(&vqk::bind::rotation_trick_backward_cuda));
}
#endif
