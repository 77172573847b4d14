// The machine's measured fp32 peak: what `vqkernels bench` holds the kernels against.
//
// What: per task, 12 independent accumulators (6 on portable code) updated by multiply-add in registers; no memory traffic.
// Work: 2 flops x lanes x accumulators per round. Roof: the FMA units themselves; this loop defines 100 %.
// Numerics: values decay towards a fixed point, so no subnormals or infinities slow the units down.
#include "vqk/launch.h"
#include "vqk/simd.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vqk::cpu {
namespace {

constexpr int64_t kRounds = 1 << 21;
constexpr int kAccumulators = 12;

struct Work {
  Simd level;
  float sink[1024];  // the result of each task, so that the loop is not removed
};

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
float fma_avx2() {
  __m256 a[kAccumulators], m = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
  for (int i = 0; i < kAccumulators; ++i) a[i] = _mm256_set1_ps(1.0f + i);
  for (int64_t r = 0; r < kRounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) a[i] = _mm256_fmadd_ps(a[i], m, b);
  __m256 s = a[0];
  for (int i = 1; i < kAccumulators; ++i) s = _mm256_add_ps(s, a[i]);
  return _mm256_cvtss_f32(s);
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f")
float fma_avx512() {
  __m512 a[kAccumulators], m = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
  for (int i = 0; i < kAccumulators; ++i) a[i] = _mm512_set1_ps(1.0f + i);
  for (int64_t r = 0; r < kRounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) a[i] = _mm512_fmadd_ps(a[i], m, b);
  __m512 s = a[0];
  for (int i = 1; i < kAccumulators; ++i) s = _mm512_add_ps(s, a[i]);
  return _mm512_cvtss_f32(s);
}
#pragma GCC pop_options
#endif

float fma_portable() {
  typedef float v4 __attribute__((vector_size(16)));
  v4 a[6], m = {0.999f, 0.999f, 0.999f, 0.999f}, b = {0.001f, 0.001f, 0.001f, 0.001f};
  for (int i = 0; i < 6; ++i) a[i] = m * static_cast<float>(i);
  for (int64_t r = 0; r < 2 * kRounds; ++r)
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) a[i] = a[i] * m + b;
  v4 s = a[0] + a[1] + a[2] + a[3] + a[4] + a[5];
  return s[0];
}

void body(void* ctx, int64_t task) {
  Work& work = *static_cast<Work*>(ctx);
  float value;
#if defined(__x86_64__)
  value = work.level >= Simd::avx512 ? fma_avx512() : work.level >= Simd::avx2 ? fma_avx2() : fma_portable();
#else
  value = fma_portable();
#endif
  work.sink[task % 1024] = value;
}

}  // namespace

double fma_peak_gflops(const Parallel& parallel) {
  Work work{simd_level(), {}};
  const double lanes = work.level >= Simd::avx512 ? 16 : work.level >= Simd::avx2 ? 8 : 4;
  double best = 0;
  // half a second: a core that is busy elsewhere for a moment must not lower the peak
  for (int repeat = 0; repeat < 100; ++repeat) {
    auto start = std::chrono::steady_clock::now();
    parallel.run(parallel.threads, body, &work);
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    double gflops = 2.0 * lanes * kAccumulators * kRounds * parallel.threads / seconds * 1e-9;
    if (gflops > best) best = gflops;
  }
  return best;
}

}  // namespace vqk::cpu
