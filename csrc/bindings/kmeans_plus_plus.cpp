#include "torch_util.h"

namespace vqk::bind {

static Tensor kmeans_plus_plus_cpu(const Tensor& x, const Tensor& draws) {
  const char* op = "kmeans_plus_plus";
  check_dim(op, "x", x, 2, "[N, D]");
  check_dim(op, "draws", draws, 2, "[K, L]");
  const int64_t N = x.size(0), D = x.size(1), K = draws.size(0), L = draws.size(1);
  const DType type = dtype(op, x);
  if (type != DType::f32 && type != DType::f64)
    fail(op, "x is ", dtype_name(x.scalar_type()), ", expected float32 or float64");
  if (N < 1 || L < 1 || L > kSeedCandidates)
    fail(op, "x has ", N, " rows and draws ", L, " columns; expected at least one row and 1 to ", kSeedCandidates,
         " columns");
  Tensor xc = torch::stable::contiguous(x);
  Tensor dc = input(op, "draws", draws, {K, L}, ScalarType::Double, x);
  Tensor rows = empty(x, {K}, ScalarType::Long);
  cpu::kmeans_plus_plus({.x = xc.const_data_ptr(),
                         .draws = static_cast<const double*>(dc.const_data_ptr()),
                         .rows = static_cast<int64_t*>(rows.mutable_data_ptr()),
                         .N = N,
                         .D = D,
                         .K = K,
                         .L = L,
                         .dtype = type},
                        torch_threads(op));
  return rows;
}

}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("kmeans_plus_plus", TORCH_BOX(&vqk::bind::kmeans_plus_plus_cpu));
}
