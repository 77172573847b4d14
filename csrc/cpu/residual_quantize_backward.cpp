// residual_quantize_backward: dz = J^T grad + sum_l commitment_scale[l] r_l, with r_l = r_{l-1} - c_l, r_0 = z.
//
//   in   z, grad [H,N,D]; Q codebooks [H,K_l,D]; indices int64 [H,N,Q], -1: the row gets dz = 0
//   out  dz [H,N,D]; float, double, bf16 or f16
//
//   per row, in L1:  z, g from memory; c_l from the codebooks (L2)
//     1. every level:  r -= c_l;  q += c_l;  acc += scale_l r
//     2. five dots of z, q, g --> a, b, c              (estimator_kernel.h)
//     3. dz = a g + b z + c q + acc
//   per_level: the estimator of every level goes from r_{l-1} to c_l instead, and the Jacobians add up.
//
// The residuals are recomputed, which costs Q additions an element and saves keeping Q N D values from the
// forward pass. Work and bytes: about 4 Q + 16 flops an element (18 Q per level), 3 N D element sizes of
// traffic: memory bound for small Q.
// Measured (`make cpp-bench`, 2 threads of a 2-core AMD EPYC (Zen 3), memcpy 26 GB/s in the same run):
//   262144x256 float, Q=4, K=256, rotation: sum 52 ms = 16 GB/s, per level 163 ms = 5 GB/s: bound by arithmetic
// Numerics: residuals in float (double for double), one rounding a level as in the forward pass; dots in double.
// Determinism: rows are independent; bits do not depend on threads or SIMD level.
#include <algorithm>
#include <memory>

#include "half.h"
#include "residual_quantize_backward.h"
#include "vqk/launch.h"
#include "vqk/simd.h"

namespace vqk::cpu {
namespace {
#include "residual_quantize_backward_kernel.h"
}  // namespace

void backward_rows_portable(const ResidualQuantizeBackwardParams& p, void* scratch, int64_t begin, int64_t end) {
  backward_rows_here(p, scratch, begin, end);
}

namespace {

struct Job {
  const ResidualQuantizeBackwardParams& p;
  int64_t rows;
  bool avx2;
};

void task(void* ctx, int64_t i) {
  const Job& job = *static_cast<Job*>(ctx);
  const int64_t begin = i * job.rows, end = std::min(job.p.H * job.p.N, begin + job.rows);
  std::unique_ptr<double[]> scratch(new double[2 * job.p.D + job.p.Q]);
#if defined(__x86_64__)
  if (job.avx2) return backward_rows_avx2(job.p, scratch.get(), begin, end);
#endif
  backward_rows_portable(job.p, scratch.get(), begin, end);
}

}  // namespace

void residual_quantize_backward(const ResidualQuantizeBackwardParams& p, const Parallel& parallel) {
  const int64_t N = p.H * p.N;
  if (N == 0 || p.D == 0) return;
  Job job{p, std::clamp<int64_t>((1 << 16) / p.D, 16, 4096), simd_level() >= Simd::avx2};
  parallel.run((N + job.rows - 1) / job.rows, task, &job);
}

}  // namespace vqk::cpu
