// fsq: finite scalar quantization (Mentzer et al. 2023), forward with indices, and its straight-through backward.
//
//   in z [N,d], levels [d] -> quantized [N,d] in [-1, 1], indices [N] int32;   in z, grad [N,d] -> dz [N,d]
//
//   value = round(half tanh(z + shift) - offset) / width,  half = (L-1)(1 + 1/1000)/2, width = L/2 rounded down,
//   offset = 1/2 for even L, else 0,  shift = atanh(offset / half)
//
// tanh is monotonic, so the level is the number of thresholds atanh((v - 1/2 + offset) / half) - shift that z has
// passed: L-1 comparisons and no tanh. A threshold in double, rounded up to the next float, decides exactly as the
// double would, so all SIMD levels, threads and backends agree on every bit; only beyond 1024 levels is tanh
// evaluated (in double).
//
//   64 rows:  z --8 values x thresholds of their features--> digits (L1) --> y = (digit - width) / width
//                                                                        --> index = sum digit * basis
//
// Work and bytes: 2 (L-1) + 8 operations a value against 2 element sizes (backward: about 25 against 3): memory
// bound up to about 16 levels. AVX-512 hosts run the AVX2 code: it already waits for memory.
// Backward: dz = grad half / width / cosh^2(z + shift), 1/cosh^2 = 4e/(1+e)^2 with e = exp(-2|z + shift|), which
// keeps its digits where 1 - tanh^2 cancels; float within about 8 units in the last place, double within 4.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "fsq.h"
#include "half.h"
#include "vqk/launch.h"
#include "vqk/simd.h"

namespace vqk::cpu {
namespace {
#include "fsq_kernel.h"

constexpr int64_t kTaskBytes = 1 << 18;

float rounded_up(double x) {
  const float f = static_cast<float>(x);
  return f < x ? std::nextafterf(f, std::numeric_limits<float>::infinity()) : f;
}

FsqTable make_table(const int64_t* levels, int64_t d) {
  FsqTable t;
  t.d = d;
  t.phases = d / std::gcd(d, static_cast<int64_t>(kFsqLanes));
  const int64_t most = *std::max_element(levels, levels + d);
  t.steps = most <= kFsqLinear ? most - 1 : 0;
  t.exact.resize(d);
  int64_t basis = 1;
  for (int64_t j = 0; j < d; ++j) {
    const int64_t L = levels[j], width = L / 2;
    const double half = static_cast<double>(L - 1) * (1 + 1e-3) / 2, offset = L % 2 ? 0.0 : 0.5;
    t.half.push_back(half);
    t.offset.push_back(offset);
    t.shift64.push_back(std::atanh(offset / half));
    t.basis.push_back(static_cast<int32_t>(basis));
    basis *= L;
    for (int64_t v = 1; v < L && L <= kFsqLargest; ++v)
      t.exact[j].push_back(std::atanh((static_cast<double>(v - width) - 0.5 + offset) / half) - t.shift64[j]);
  }
  for (int64_t i = 0; i < t.phases * kFsqLanes; ++i) {
    const int64_t j = i % d, width = levels[j] / 2;
    t.width.push_back(static_cast<float>(width));
    t.shift.push_back(static_cast<float>(t.shift64[j]));
    t.slope.push_back(static_cast<float>(t.half[j] / static_cast<double>(width)));
  }
  for (int64_t p = 0; p < t.phases; ++p)
    for (int64_t s = 0; s < t.steps; ++s)
      for (int64_t lane = 0; lane < kFsqLanes; ++lane) {
        const std::vector<double>& exact = t.exact[(p * kFsqLanes + lane) % d];
        t.threshold.push_back(s < static_cast<int64_t>(exact.size()) ? rounded_up(exact[s])
                                                                     : std::numeric_limits<float>::infinity());
      }
  return t;
}

template <class Params>
using Rows = void (*)(const Params&, const FsqTable&, int64_t, int64_t);

template <class Params>
struct Job {
  const Params& p;
  const FsqTable table;
  Rows<Params> rows;
  int64_t chunk;
};

// Tasks of whole multiples of kFsqRows rows, so that each begins in phase 0.
template <class Params>
void run(const Params& p, Rows<Params> portable, [[maybe_unused]] Rows<Params> avx2, const Parallel& parallel) {
  if (p.N == 0) return;
  Rows<Params> rows = portable;
#if defined(__x86_64__)
  if (simd_level() >= Simd::avx2) rows = avx2;
#endif
  const int64_t chunk = std::max<int64_t>(1, kTaskBytes / (p.d * 4 * kFsqRows)) * kFsqRows;
  Job<Params> job{p, make_table(p.levels, p.d), rows, chunk};
  parallel.run(
      (p.N + chunk - 1) / chunk,
      [](void* ctx, int64_t i) {
        const Job<Params>& job = *static_cast<Job<Params>*>(ctx);
        job.rows(job.p, job.table, i * job.chunk, std::min(job.p.N, (i + 1) * job.chunk));
      },
      &job);
}

}  // namespace

void fsq_rows_portable(const FsqParams& p, const FsqTable& t, int64_t begin, int64_t end) {
  fsq_rows_here(p, t, begin, end);
}
void fsq_backward_rows_portable(const FsqBackwardParams& p, const FsqTable& t, int64_t begin, int64_t end) {
  fsq_backward_rows_here(p, t, begin, end);
}

#if defined(__x86_64__)
void fsq(const FsqParams& p, const Parallel& parallel) { run(p, fsq_rows_portable, fsq_rows_avx2, parallel); }
void fsq_backward(const FsqBackwardParams& p, const Parallel& parallel) {
  run(p, fsq_backward_rows_portable, fsq_backward_rows_avx2, parallel);
}
#else
void fsq(const FsqParams& p, const Parallel& parallel) { run<FsqParams>(p, fsq_rows_portable, nullptr, parallel); }
void fsq_backward(const FsqBackwardParams& p, const Parallel& parallel) {
  run<FsqBackwardParams>(p, fsq_backward_rows_portable, nullptr, parallel);
}
#endif

}  // namespace vqk::cpu
