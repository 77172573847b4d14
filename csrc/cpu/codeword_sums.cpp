// codeword_sums: sums[h,k] = sum of z[h,n] over indices[h,n] == k, and the counts.
//
//   in   z [H,N,D] float, double, bf16, f16; indices int64 [H,N], negative ones are skipped
//   out  sums [H,K,D] float (double for double), counts int64 [H,K]; bad: the first index >= K, or -1
//
//   1. count per chunk of rows   2. prefix sums   3. stable scatter of row numbers   4. add
//      indices --> bins[chunk,k] --> offsets     --> rows of codeword 0 | 1 | 2 ...  --> sums
//
//   Where the sums of all codewords fit into L2 a few columns at a time, 2 to 4 give way to slices: one task reads
//   its columns of z from first row to last and adds each row to its codeword's sum.
//
//   4 is split into tasks of about equal numbers of rows; a codeword with more rows than a task
//   should have is split by columns.
//
// Work and bytes: z read once, N D element sizes; the row numbers cost 16 to 24 bytes a row.
// Measured (`make cpp-bench`, 2 threads of a 2-core AMD EPYC (Zen 3), memcpy 26 GB/s in the same run):
//   262144x256 float, K=1024, random indices: 27 ms = 10 GB/s. The rows of a codeword lie anywhere in memory, and
//   only prefetching rows by hand hides some of that.
// Numerics: each codeword's rows are added in row order in double and rounded once.
// Determinism: an element of a sum is added by one task in row order, so threads, chunks and SIMD
// level change nothing.
#include <algorithm>
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
void add_slice_portable(const CodewordSumsParams& p, const SumPiece& piece, double* sum) {
  add_slice_here(p, piece, sum);
}

namespace {

constexpr int64_t kSliceBytes = 256 << 10;
constexpr int64_t kColumns = 64;  // columns of a split codeword: whole cache lines, accumulators stay in L1

struct Job {
  const CodewordSumsParams& p;
  int64_t h, chunks, chunk;
  std::vector<int64_t> bins;     // [chunks,K]: counts, then where the chunk's rows of k go
  std::vector<int64_t> offsets;  // [K+1]: rows of codeword k are rows[offsets[k]:offsets[k+1]]
  std::vector<int64_t> rows;     // row numbers by codeword, in row order
  std::vector<int64_t> bad;      // [chunks]
  std::vector<SumPiece> pieces;
  bool avx2;
  int64_t width;                 // of a slice, or 0
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
  std::vector<double> sum(piece.end - piece.begin);
#if defined(__x86_64__)
  if (job.avx2) return add_piece_avx2(job.p, piece, sum.data());
#endif
  add_piece_portable(job.p, piece, sum.data());
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

// Columns of a slice: whole cache lines of z, sums of all K codewords within half of the smallest common L2, and as many
// slices as there are threads; 0 where there are too few columns for that, or so many that each slice would read only
// a small part of every row (measured: 8 slices of 32 of 256 columns are slower than going by codeword).
int64_t slice_width(const CodewordSumsParams& p, int threads) {
  const int64_t line = 64 / (p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2);
  const int64_t fit = kSliceBytes / (8 * p.K), wanted = (threads + p.H - 1) / p.H;
  const int64_t width = std::min(fit, p.D / wanted) / line * line;
  if (wanted == 1 && p.D <= fit) return p.D;
  return width * std::max<int64_t>(4, wanted) < p.D ? 0 : width;
}

void slice(void* ctx, int64_t task) {
  const Job& job = *static_cast<Job*>(ctx);
  const int64_t slices = (job.p.D + job.width - 1) / job.width, begin = task % slices * job.width;
  const SumPiece piece{task / slices, 0, job.p.K, begin, std::min(job.p.D, begin + job.width), nullptr, nullptr};
  std::vector<double> sum(job.p.K * (piece.end - piece.begin));
#if defined(__x86_64__)
  if (job.avx2) return add_slice_avx2(job.p, piece, sum.data());
#endif
  add_slice_portable(job.p, piece, sum.data());
}

}  // namespace

void codeword_sums(const CodewordSumsParams& p, const Parallel& caller) {
  *p.bad = -1;
  const Parallel parallel = threads_for(static_cast<double>(p.N) * (p.D + 8), caller);
  const int64_t N = p.N, K = p.K;
  const int64_t chunks = std::clamp<int64_t>(N / std::max<int64_t>(4096, K), 1, parallel.threads);
  Job job{p, 0, chunks, (N + chunks - 1) / chunks, {}, {}, {}, {}, {}, simd_level() >= Simd::avx2, slice_width(p, parallel.threads)};
  for (job.h = 0; job.h < p.H; ++job.h) {
    job.bins.assign(chunks * K, 0);
    job.bad.assign(chunks, -1);
    job.offsets.assign(K + 1, 0);
    parallel.run(chunks, count, &job);
    for (int64_t bad : job.bad)
      if (bad >= 0 && *p.bad < 0) *p.bad = bad;
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
    if (job.width) continue;
    job.rows.resize(at);
    parallel.run(chunks, scatter, &job);
    make_pieces(job, std::max<int64_t>(256, (at + K) / (8 * parallel.threads)));
    parallel.run(static_cast<int64_t>(job.pieces.size()), add, &job);
  }
  if (job.width) parallel.run(p.H * ((p.D + job.width - 1) / job.width), slice, &job);
}

}  // namespace vqk::cpu
