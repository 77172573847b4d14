// rotation_trick_backward: dz from z, q, grad; the formulas are in estimator_kernel.h.
//
//   in   z, q, grad [N,D]; out dz [N,D]; float, double, bf16 or f16
//
//   task = 16 to 4096 rows;  a row:  z, q, g --five dots--> a, b, c --> dz = a g + b z + c q
//                                    from memory                        z, q, g again, from L1
//
// Work and bytes: 16 flops an element against 4 element sizes of traffic: memory bound. Results larger
// than the caches are stored past them, which saves reading the lines that are overwritten.
// Measured (`make cpp-bench`, 2 threads of a 2-core AMD EPYC (Zen 3), memcpy 26 GB/s in the same run):
//   262144x256  float 31 ms = 35 GB/s, f16 25 GB/s, bf16 14 GB/s; portable float 10 GB/s
//   2097152x32  float 58 ms = 18 GB/s: two square roots and three divisions a row begin to show
// Determinism: rows are independent; bits do not depend on threads or SIMD level.
// AVX-512 hosts run the AVX2 code: it already waits for memory.
#include <algorithm>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "half.h"
#include "rotation_trick.h"
#include "vqk/launch.h"
#include "vqk/simd.h"

namespace vqk::cpu {
namespace {
#if defined(__SSE2__)
#define STREAM4(p, v) _mm_stream_ps(p, v)
#define STREAM_DONE() _mm_sfence()
#else
#define STREAM4(p, v) *reinterpret_cast<v4f*>(p) = v
#define STREAM_DONE() (void)0
#endif
#include "rotation_trick_kernel.h"
}  // namespace

void rotation_rows_portable(const RotationTrickBackwardParams& p, bool stream, int64_t begin, int64_t end) {
  rotation_rows_here(p, stream, begin, end);
}

namespace {

constexpr int64_t kTaskBytes = 1 << 18;    // of each array
constexpr int64_t kCacheBytes = 32 << 20;  // larger results do not stay in a cache anyway

struct Job {
  const RotationTrickBackwardParams& p;
  int64_t rows;
  bool stream, avx2;
};

void task(void* ctx, int64_t i) {
  const Job& job = *static_cast<Job*>(ctx);
  const int64_t begin = i * job.rows, end = std::min(job.p.N, begin + job.rows);
#if defined(__x86_64__)
  if (job.avx2) return rotation_rows_avx2(job.p, job.stream, begin, end);
#endif
  rotation_rows_portable(job.p, job.stream, begin, end);
}

}  // namespace

void rotation_trick_backward(const RotationTrickBackwardParams& p, const Parallel& parallel) {
  if (p.N == 0 || p.D == 0) return;
  if (p.estimator == Estimator::ste) {
    const int64_t size = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
    std::memcpy(p.dz, p.grad, p.N * p.D * size);
    return;
  }
  const bool stream = p.dtype == DType::f32 && p.N * p.D * 4 > kCacheBytes && p.D % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(p.dz) % 16 == 0;
  Job job{p, std::clamp<int64_t>(kTaskBytes / (p.D * 4), 16, 4096), stream, simd_level() >= Simd::avx2};
  parallel.run((p.N + job.rows - 1) / job.rows, task, &job);
}

}  // namespace vqk::cpu
