// codeword_sums: sums[h,k] = sum of z[h,n] over indices[h,n] == k, and the counts.
//
//   in   z [H,N,D] float, double, bf16, f16; indices int64 [H,N], negative ones are skipped
//   out  sums [H,K,D] float (double for double), counts int64 [H,K]; bad: the first index >= K, or -1
//
//   1. count per chunk of rows   2. prefix sums   3. stable scatter of row numbers   4. add
//      indices --> bins[chunk,k] --> offsets     --> rows of codeword 0 | 1 | 2 ...  --> sums
//
//   Codebooks of up to half a megafeature with many rows a codeword: z is cut into up to eight runs of rows instead of 1 to
//   4. A task reads a run from first row to last, adds each row to its codeword's sum of that run and counts it; then the
//   runs' sums are added. With few rows a codeword it is one run, cut into columns where its sums then fit into L2.
//
//   4 is split into tasks of about equal numbers of rows; a codeword with more rows than a task
//   should have is split by columns.
//
// Work and bytes: z and the indices read once, N (D element sizes + 8); by codeword the indices twice and the row numbers of
// 2 to 4, 24 to 32 bytes a row. The runs' sums are at most an eighth of z in float32.
// Measured (`make cpp-bench`, 2 threads of an AMD EPYC (Zen 4), 256 MiB of float, K = 1024, reading alone 36 to 49 GB/s): 24
// to 32 GB/s with 32, 64 and 256 columns, 60 to 84 % of reading alone. Asking for rows into L1 instead of L2 gives 17 to 23
// GB/s, slices of 64 of the 256 columns 12, for they use a quarter of the sets of the caches.
// Numerics: the rows of a codeword are added in double, in row order within a run and then run by run, and rounded once.
// Determinism: runs depend on N, K and D alone and an element of a run's sum is added by one task in row order, so threads,
// chunks and SIMD level change nothing.
#include <algorithm>
#include <memory>
#include <vector>

#include "codeword_sums.h"
#include "half.h"
#include "vqk/launch.h"
#include "vqk/simd.h"

namespace vqk::cpu {
namespace {
#include "codeword_sums_kernel.h"
}  // namespace

void add_piece_portable(const CodewordSumsParams& p, const SumPiece& piece, double* sum) {
  add_piece_here(p, piece, sum);
}
void add_slice_portable(const CodewordSumsParams& p, const SumSlice& slice) { add_slice_here(p, slice); }

namespace {

constexpr int64_t kSliceBytes = 256 << 10;
constexpr int64_t kRunBytes = 4 << 20;  // of one run's sums: a third-level cache holds those of two threads
constexpr int64_t kMostRuns = 8, kRowsPerCodeword = 16;  // a run has at least so many on average
constexpr int64_t kLeastElements = 1 << 18;               // fewer lie in a cache, where runs gain nothing
constexpr int64_t kColumns = 64;  // columns of a split codeword: whole cache lines, accumulators stay in L1

// Uninitialised doubles on cache lines of their own: four of them that straddle two lines cost twice.
struct alignas(64) Line {
  double v[8];
};
struct Sums {
  Sums(int64_t n = 0) : lines(n ? new Line[(n + 7) / 8] : nullptr) {}
  double* get() const { return reinterpret_cast<double*>(lines.get()); }
  std::unique_ptr<Line[]> lines;
};

struct Job {
  const CodewordSumsParams& p;
  int64_t h, chunks, chunk;      // chunks are the runs, if there are several
  std::vector<int64_t> bins;     // [chunks,K]: counts, then where the chunk's rows of k go
  std::vector<int64_t> offsets;  // [K+1]: rows of codeword k are rows[offsets[k]:offsets[k+1]]
  std::vector<int64_t> rows;     // row numbers by codeword, in row order
  std::vector<int64_t> bad;      // [chunks], or [H] if there is one run
  std::vector<SumPiece> pieces;
  bool avx2;
  int64_t runs;
  int64_t width;                 // columns of a slice of a run, or 0
  Sums sums;                     // [runs] of [slices,K,columns] of one head, if there are several runs
};

void count(void* ctx, int64_t c) {
  Job& job = *static_cast<Job*>(ctx);
  const int64_t *index = job.p.indices + job.h * job.p.N, K = job.p.K;
  int64_t* bins = job.bins.data() + c * K;
  const int64_t end = std::min(job.p.N, (c + 1) * job.chunk);
  for (int64_t n = c * job.chunk; n < end; ++n) {
    if (static_cast<uint64_t>(index[n]) < static_cast<uint64_t>(K)) ++bins[index[n]];
    else if (index[n] >= 0 && job.bad[c] < 0) job.bad[c] = index[n];
  }
}

void scatter(void* ctx, int64_t c) {
  Job& job = *static_cast<Job*>(ctx);
  const int64_t *index = job.p.indices + job.h * job.p.N, K = job.p.K;
  int64_t* next = job.bins.data() + c * K;
  const int64_t end = std::min(job.p.N, (c + 1) * job.chunk);
  for (int64_t n = c * job.chunk; n < end; ++n)
    if (static_cast<uint64_t>(index[n]) < static_cast<uint64_t>(K)) job.rows[next[index[n]]++] = n;
}

void add(void* ctx, int64_t task) {
  const Job& job = *static_cast<Job*>(ctx);
  const SumPiece& piece = job.pieces[task];
  const Sums sum(piece.end - piece.begin);
#if defined(__x86_64__)
  if (job.avx2) return add_piece_avx2(job.p, piece, sum.get());
#endif
  add_piece_portable(job.p, piece, sum.get());
}

// Groups of neighbouring codewords with about `share` rows; the K codewords alone count as a row each.
void make_pieces(Job& job, int64_t share) {
  const int64_t D = job.p.D, K = job.p.K;
  job.pieces.clear();
  for (int64_t k = 0; k < K;) {
    int64_t last = k, load = 0;
    while (last < K && (last == k || load < share)) load += job.offsets[last + 1] - job.offsets[last] + 1, ++last;
    const int64_t step = load > 2 * share && last == k + 1 ? kColumns : D;
    for (int64_t begin = 0; begin < D; begin += step)
      job.pieces.push_back({job.h, k, last, begin, std::min(D, begin + step), job.offsets.data(), job.rows.data()});
    k = last;
  }
}

// Of the shape alone: the order of additions must not depend on the machine.
int64_t runs_of(const CodewordSumsParams& p) {
  if (p.N * p.D < kLeastElements || p.K * p.D * int64_t(sizeof(double)) > kRunBytes) return 1;
  return std::clamp<int64_t>(p.N / (kRowsPerCodeword * p.K), 1, kMostRuns);
}

// Columns of a slice, whole cache lines of z: as many slices as there are threads for each run. Of a single run: sums of all
// K codewords within half of the smallest common L2, and 0 where there are too few columns for that, or so many that each
// slice would read only a small part of every row (measured: 8 slices of 32 of 256 columns are slower than going by codeword).
int64_t slice_width(const CodewordSumsParams& p, int64_t runs, int threads) {
  const int64_t line = 64 / (p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2);
  const int64_t tasks = runs > 1 ? runs : p.H, wanted = (threads + tasks - 1) / tasks;
  if (runs > 1) return wanted == 1 ? p.D : std::min(p.D, std::max(kColumns, (p.D / wanted + line - 1) / line * line));
  const int64_t fit = kSliceBytes / (8 * p.K), width = std::min(fit, p.D / wanted) / line * line;
  if (wanted == 1 && p.D <= fit) return p.D;
  return width * std::max<int64_t>(4, wanted) < p.D ? 0 : width;
}

// Rounds the sums of codewords [first, last) and the slice's columns; those of each run lie runs_apart doubles on.
template <class Out>
void round_sums(const Job& job, const SumSlice& slice, int64_t first, int64_t last, int64_t runs_apart) {
  const int64_t width = slice.end - slice.begin, D = job.p.D;
  for (int64_t k = first; k < last; ++k) {
    Out* out = static_cast<Out*>(job.p.sums) + (slice.h * job.p.K + k) * D + slice.begin;
    for (int64_t d = 0; d < width; ++d) {
      const double* sums = slice.sums + k * width + d;
      double sum = sums[0];
      for (int64_t run = 1; run < job.runs; ++run) sum += sums[run * runs_apart];
      round_to(sum, out + d);
    }
  }
}

void round_sums_here(const Job& job, const SumSlice& slice, int64_t first, int64_t last) {
  if (job.p.dtype == DType::f64) round_sums<double>(job, slice, first, last, job.p.K * job.p.D);
  else round_sums<float>(job, slice, first, last, job.p.K * job.p.D);
}

int64_t slices(const Job& job) { return (job.p.D + job.width - 1) / job.width; }

// The first slice of a run counts its rows.
SumSlice slice_of(Job& job, int64_t h, int64_t run, int64_t s, double* sums, int64_t* counts, int64_t* bad) {
  const int64_t begin = s * job.width, N = job.p.N, R = job.runs;
  return {h, N * run / R, N * (run + 1) / R, begin, std::min(job.p.D, begin + job.width), sums, s ? nullptr : counts, bad};
}

void add_slice(const Job& job, const SumSlice& slice) {
#if defined(__x86_64__)
  if (job.avx2) return add_slice_avx2(job.p, slice);
#endif
  add_slice_portable(job.p, slice);
}

// A slice of the only run of a head, from rows to sums.
void only_run(void* ctx, int64_t task) {
  Job& job = *static_cast<Job*>(ctx);
  const int64_t h = task / slices(job), s = task % slices(job), K = job.p.K;
  const Sums sums(K * std::min(job.width, job.p.D));
  const SumSlice slice = slice_of(job, h, 0, s, sums.get(), job.p.counts + h * K, &job.bad[h]);
  add_slice(job, slice);
  round_sums_here(job, slice, 0, K);
}

// A slice of one of the runs of head job.h; then a share of its codewords.
void one_of_runs(void* ctx, int64_t task) {
  Job& job = *static_cast<Job*>(ctx);
  const int64_t run = task / slices(job), s = task % slices(job), K = job.p.K;
  double* sums = job.sums.get() + run * K * job.p.D + s * job.width * K;
  add_slice(job, slice_of(job, job.h, run, s, sums, job.bins.data() + run * K, &job.bad[run]));
}

void join_runs(void* ctx, int64_t task) {
  Job& job = *static_cast<Job*>(ctx);
  const int64_t K = job.p.K, first = K * task / job.runs, last = K * (task + 1) / job.runs;
  for (int64_t s = 0; s < slices(job); ++s)
    round_sums_here(job, slice_of(job, job.h, 0, s, job.sums.get() + s * job.width * K, nullptr, nullptr), first, last);
}

}  // namespace

void codeword_sums(const CodewordSumsParams& p, const Parallel& caller) {
  const Parallel parallel = threads_for(static_cast<double>(p.N) * (p.D + 8), caller);
  const int64_t N = p.N, K = p.K, runs = runs_of(p), width = slice_width(p, runs, parallel.threads);
  const int64_t chunks = runs > 1 ? runs : std::clamp<int64_t>(N / std::max<int64_t>(4096, K), 1, parallel.threads);
  Job job{p, 0, chunks, (N + chunks - 1) / chunks, {}, {}, {}, {}, {}, simd_level() >= Simd::avx2, runs, width, {}};
  *p.bad = -1;
  auto first_bad = [&] {
    for (int64_t bad : job.bad)
      if (bad >= 0 && *p.bad < 0) *p.bad = bad;
  };
  if (runs == 1 && width) {  // not by codeword
    std::fill(p.counts, p.counts + p.H * K, 0);
    job.bad.assign(p.H, -1);
    parallel.run(p.H * slices(job), only_run, &job);
    return first_bad();
  }
  if (runs > 1) job.sums = Sums(runs * K * p.D);
  for (job.h = 0; job.h < p.H; ++job.h) {
    job.bins.assign(chunks * K, 0);
    job.bad.assign(chunks, -1);
    job.offsets.assign(K + 1, 0);
    if (runs > 1) parallel.run(runs * slices(job), one_of_runs, &job);
    else parallel.run(chunks, count, &job);
    first_bad();
    int64_t at = 0;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t rows = job.bins[c * K + k];
        job.bins[c * K + k] = at;
        at += rows;
      }
      job.offsets[k + 1] = at;
      p.counts[job.h * K + k] = at - job.offsets[k];
    }
    if (runs > 1) {
      parallel.run(runs, join_runs, &job);
      continue;
    }
    job.rows.resize(at);
    parallel.run(chunks, scatter, &job);
    make_pieces(job, std::max<int64_t>(256, (at + K) / (8 * parallel.threads)));
    parallel.run(static_cast<int64_t>(job.pieces.size()), add, &job);
  }
}

}  // namespace vqk::cpu
