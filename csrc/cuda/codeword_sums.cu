// codeword_sums: sums[h,k] = sum of z[h,n] over indices[h,n] == k, counts[h,k] = number of those n.
//
//   in   z [H,N,D] float, double, bf16 or f16; indices int64 [H,N]; negative ones and those >= K are skipped
//   out  sums [H,K,D] float (double for double), counts int64 [H,K]
//
//   1. stable radix sort of (h K + index, row), 8 bits a pass, skipped rows left out by the first pass:
//        count    block = 2048 rows --> how often each digit                                    [256, tiles]
//        scan     warp = one digit  --> the same from earlier tiles
//        scatter  block = 2048 rows --> key and row to their places; a warp ranks 32 keys by ballots
//   2. where the rows of every codeword begin: a binary search each
//   3. add      block (piece, columns) = up to 256 rows of one codeword x 16 threads of 16 bytes
//
//                         columns -->
//                  row 0  | thread 0 | thread 1 | ... | thread 15 |    lane 0: rows 0, 16, 32, ...
//                  row 1  | thread 16 ...                         |    lane 1: rows 1, 17, 33, ...
//                    :                                                 lanes 8..15 onto 0..7, 4..7 onto 0..3, ...
//
//   4. combine  block (piece, columns): the pieces of a codeword with more than 256 rows, in 16 lanes likewise
//
// Work and bytes: z once, N D element sizes; the sort moves 28 bytes a row in its first pass (K up to 256) and 24 in
// each further one, little beside a row of z. N D additions in double: memory bound on GPUs with half or full rate
// double; at a 1/64 rate double arithmetic is the roof from bf16 rows on. A collapsed codebook costs what a uniform one
// does: the pieces of a codeword belong to blocks of their own.
// Numerics: added in double, rounded once. Row i of a piece goes to lane i mod 16, lanes are added by halves, pieces
// likewise: the order, and so the bits, of the Triton kernel.
// Determinism: atomics only count; the order of additions depends on the indices alone.
// Shared memory: scatter 8 KB; add 2 (double), 4 (float), 8 KB (16-bit). Registers: scatter 64 at most; add 56, 64 and 80
// at most: 4, 4 and 3 blocks a multiprocessor.
// Limits: H N and H K below 2^31. Memory: codeword_sums_workspace, at most 16 bytes a row, 4 a codeword, D / 16 a row.
// Run on emulators only: timings and tuning are open.
#include "pieces.cuh"
#include "vqk/launch.h"

namespace vqk::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kItems = 8;  // keys a thread ranks
constexpr int kTile = kThreads * kItems;
constexpr int kBits = 8, kBins = 1 << kBits;
constexpr int kPiece = 256, kLanes = 16, kColumns = 16;  // rows of a piece; rows and threads side by side
constexpr uint32_t kSkipped = 0xffffffffu;               // above every key
static_assert(kBins == kThreads, "a thread for each digit");

// What lies where in the workspace.
struct Plan {
  int64_t rows, codes, tiles, places;  // H N, H K, tiles of rows, pieces of rows
  int passes;
  double* partials;         // [2 places, D]: sums of pieces
  uint32_t *keys[2];        // [rows]
  uint32_t *order[2];       // [rows]: row numbers
  uint32_t* counts;         // [kBins, tiles]
  uint32_t *totals, *kept;  // [kBins], [1]: rows that are not skipped
  uint32_t* offsets;        // [codes + 1]
  int64_t bytes;
};

Plan make_plan(const CodewordSumsParams& p, void* workspace) {
  Plan plan{};
  plan.rows = p.H * p.N, plan.codes = p.H * p.K;
  plan.tiles = (plan.rows + kTile - 1) / kTile, plan.places = (plan.rows + kPiece - 1) / kPiece;
  for (plan.passes = 1; plan.codes > int64_t{1} << kBits * plan.passes; ++plan.passes) {}
  char* const begin = static_cast<char*>(workspace);
  auto take = [&](int64_t bytes) {
    char* const at = begin ? begin + plan.bytes : nullptr;
    plan.bytes += (bytes + 15) / 16 * 16;
    return static_cast<void*>(at);
  };
  auto numbers = [&](int64_t count) { return static_cast<uint32_t*>(take(4 * count)); };
  plan.partials = static_cast<double*>(take(plan.rows > kPiece ? 16 * plan.places * p.D : 0));
  for (int i = 0; i < (plan.passes > 1 ? 2 : 1); ++i) plan.keys[i] = numbers(plan.rows), plan.order[i] = numbers(plan.rows);
  plan.counts = numbers(kBins * plan.tiles);
  plan.totals = numbers(kBins);
  plan.kept = numbers(1);
  plan.offsets = numbers(plan.codes + 1);
  return plan;
}

// Sum over the lanes up to this one.
__device__ inline uint32_t sum_up_to(uint32_t value) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, value, offset);
    if (static_cast<int>(threadIdx.x % 32) >= offset) value += other;
  }
  return value;
}

// Sum over the threads before this one, and over all of them.
__device__ inline uint32_t sum_before(uint32_t value, uint32_t (&sums)[kWarps], uint32_t* all) {
  const int warp = threadIdx.x / 32;
  const uint32_t sum = sum_up_to(value);
  if (threadIdx.x % 32 == 31) sums[warp] = sum;
  __syncthreads();
  uint32_t before = sum - value, total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before += total;
    total += sums[w];
  }
  *all = total;
  return before;
}

// The keys of one pass: from the indices in the first, else what the pass before has written.
template <bool kFirst>
struct Source {
  const int64_t* indices;
  const uint32_t *keys, *order, *kept;
  uint32_t N, K, rows;

  __device__ uint32_t size() const { return kFirst ? rows : *kept; }
  __device__ uint32_t key(uint32_t i, uint32_t size) const {
    if (i >= size) return kSkipped;
    if (!kFirst) return keys[i];
    const int64_t k = indices[i];
    return k < 0 || k >= K ? kSkipped : i / N * K + static_cast<uint32_t>(k);
  }
  __device__ uint32_t row(uint32_t i) const { return kFirst ? i : order[i]; }
};

__device__ inline uint32_t digit_of(uint32_t key, int shift) { return key >> shift & (kBins - 1); }

template <bool kFirst>
__global__ void __launch_bounds__(kThreads)
    count_kernel(Source<kFirst> source, uint32_t* __restrict__ counts, uint32_t tiles, int shift) {
  VQK_SHARED(unsigned, bins, [kBins]);
  const uint32_t size = source.size();
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    bins[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const uint32_t key = source.key(tile * kTile + j * kThreads + threadIdx.x, size);
      if (key != kSkipped) atomicAdd(&bins[digit_of(key, shift)], 1u);
    }
    __syncthreads();
    counts[threadIdx.x * tiles + tile] = bins[threadIdx.x];  // and this thread alone clears it
  }
}

__global__ void __launch_bounds__(kThreads) scan_kernel(uint32_t* counts, uint32_t* totals, uint32_t tiles) {
  const int lane = threadIdx.x % 32;
  for (uint32_t digit = blockIdx.x * kWarps + threadIdx.x / 32; digit < kBins; digit += gridDim.x * kWarps) {
    uint32_t* const row = counts + digit * tiles;
    uint32_t before = 0;
#pragma unroll 4
    for (uint32_t start = 0; start < tiles; start += 32) {
      const uint32_t tile = start + lane, own = tile < tiles ? row[tile] : 0, sum = sum_up_to(own);
      if (tile < tiles) row[tile] = before + sum - own;
      before += __shfl_sync(kFullWarp, sum, 31);
    }
    if (lane == 0) totals[digit] = before;
  }
}

template <bool kFirst>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Source<kFirst> source, const uint32_t* __restrict__ counts, const uint32_t* __restrict__ totals,
                   uint32_t* __restrict__ keys, uint32_t* __restrict__ order, uint32_t* kept, uint32_t tiles,
                   int shift) {
  VQK_SHARED(uint32_t, sums, [kWarps]);
  VQK_SHARED(uint32_t, seen, [kWarps][kBins]);  // of each digit by each warp; later: where the warp's first one goes
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t all;
  const uint32_t lower = sum_before(totals[threadIdx.x], sums, &all);  // keys with a digit below threadIdx.x
  const uint32_t size = source.size();
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int w = 0; w < kWarps; ++w) seen[w][threadIdx.x] = 0;
    __syncthreads();
    const uint32_t first = tile * kTile + warp * (32 * kItems) + lane;
    uint32_t key[kItems], rank[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) key[j] = source.key(first + 32 * j, size);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const bool valid = key[j] != kSkipped;
      const uint32_t digit = digit_of(key[j], shift);
      unsigned peers = __ballot_sync(kFullWarp, valid);  // lanes with this digit
#pragma unroll
      for (int bit = 0; bit < kBits; ++bit) {
        const bool set = digit >> bit & 1;
        const unsigned with = __ballot_sync(kFullWarp, set);
        peers &= set ? with : ~with;
      }
      const unsigned below = __popc(peers & ((1u << lane) - 1));
      rank[j] = seen[warp][digit] + below;
      __syncwarp();
      if (valid && below == 0) seen[warp][digit] += __popc(peers);
      __syncwarp();
    }
    __syncthreads();
    uint32_t at = lower + counts[threadIdx.x * tiles + tile];
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t own = seen[w][threadIdx.x];
      seen[w][threadIdx.x] = at;
      at += own;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (key[j] == kSkipped) continue;
      const uint32_t place = seen[warp][digit_of(key[j], shift)] + rank[j];
      keys[place] = key[j];
      order[place] = source.row(first + 32 * j);
    }
    __syncthreads();
  }
  if (kFirst && blockIdx.x == 0 && threadIdx.x == 0) *kept = all;
}

// offsets[k]: the first place with a key of k or more.
__global__ void __launch_bounds__(kThreads) offsets_kernel(const uint32_t* __restrict__ keys,
                                                           const uint32_t* __restrict__ kept,
                                                           uint32_t* __restrict__ offsets, uint32_t codes) {
  for (uint32_t k = blockIdx.x * kThreads + threadIdx.x; k <= codes; k += gridDim.x * kThreads) {
    uint32_t low = 0, high = *kept;
    while (low < high) {
      const uint32_t middle = (low + high) / 2;
      if (keys[middle] < k) low = middle + 1;
      else high = middle;
    }
    offsets[k] = low;
  }
}

// Adds lanes 8..15 onto 0..7, 4..7 onto 0..3, ...: lane 0 has the sum. Every thread brings kWidth columns; lanes from
// `used` on are zero, which changes no sum.
template <int kWidth>
__device__ inline void add_lanes(double (&sum)[kWidth], double (&shared)[kLanes / 2][kColumns * kWidth], uint32_t used,
                                 int lane, int column) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    if (static_cast<uint32_t>(half) >= used) continue;
    if (lane >= half && lane < 2 * half)
      for (int i = 0; i < kWidth; ++i) shared[lane - half][column * kWidth + i] = sum[i];
    __syncthreads();
    if (lane < half)
      for (int i = 0; i < kWidth; ++i) sum[i] += shared[lane][column * kWidth + i];
    __syncthreads();
  }
}

// A codeword's pieces begin every kPiece places from its first row. Its first piece is task k. Of all later ones at
// most one begins in the kPiece places from j kPiece on, and it belongs to the codeword at j kPiece: task codes + j.
template <class T>
__global__ void __launch_bounds__(kLanes* kColumns, 3)
    add_kernel(const T* __restrict__ z, const uint32_t* __restrict__ keys, const uint32_t* __restrict__ order,
               const uint32_t* __restrict__ kept, const uint32_t* __restrict__ offsets, wide_t<T>* __restrict__ sums,
               int64_t* __restrict__ counts, double* __restrict__ partials, int64_t codes, int64_t tasks, int64_t D,
               bool aligned) {
  constexpr int kWidth = Piece<T>::kWidth;
  VQK_SHARED(double, shared, [kLanes / 2][kColumns * kWidth]);
  const int columns = blockDim.x / kLanes, lane = threadIdx.x / columns, column = threadIdx.x % columns;
  const int64_t d = (static_cast<int64_t>(blockIdx.y) * columns + column) * kWidth;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    uint32_t k = static_cast<uint32_t>(task), piece = 0;
    if (task >= codes) {
      const uint32_t place = static_cast<uint32_t>(task - codes) * kPiece;
      if (place >= *kept) break;
      k = keys[place];
      piece = (place - offsets[k] + kPiece - 1) / kPiece;
      if (piece == 0) continue;
    }
    const uint32_t first = offsets[k], last = offsets[k + 1], begin = first + piece * kPiece;
    if (piece > 0 && begin >= last) continue;
    const uint32_t end = begin + kPiece < last ? begin + kPiece : last;
    double sum[kWidth] = {};
    if (d < D) {
#pragma unroll 4
      for (uint32_t i = begin + lane; i < end; i += kLanes) {
        const Piece<T> x = load_piece(z + order[i] * D, d, D, aligned);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sum[c] += to_double(x.x[c]);
      }
    }
    add_lanes(sum, shared, end - begin, lane, column);
    if (lane == 0) {
      const int64_t partial = (2 * (begin / kPiece) + (piece > 0)) * D + d;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        if (d + c >= D) break;
        if (last - first <= kPiece) round_to(sum[c], sums + k * D + d + c);
        else partials[partial + c] = sum[c];
      }
    }
    if (piece == 0 && blockIdx.y == 0 && threadIdx.x == 0) counts[k] = last - first;
  }
}

// A codeword with more than kPiece rows has one at a multiple of kPiece: the first such place is its task.
template <class R>
__global__ void __launch_bounds__(kLanes* kColumns)
    combine_kernel(const uint32_t* __restrict__ keys, const uint32_t* __restrict__ kept,
                   const uint32_t* __restrict__ offsets, const double* __restrict__ partials, R* __restrict__ sums,
                   int64_t D) {
  VQK_SHARED(double, shared, [kLanes / 2][kColumns]);
  const int lane = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  const int64_t d = static_cast<int64_t>(blockIdx.y) * kColumns + column;
  for (int64_t task = blockIdx.x; task * kPiece < *kept; task += gridDim.x) {
    const int64_t k = keys[task * kPiece], first = offsets[k], count = offsets[k + 1] - first;
    if (count <= kPiece || (first + kPiece - 1) / kPiece != task) continue;
    double sum[1] = {};
    for (int64_t piece = lane; d < D && piece * kPiece < count; piece += kLanes)
      sum[0] += partials[(2 * ((first + piece * kPiece) / kPiece) + (piece > 0)) * D + d];
    add_lanes(sum, shared, static_cast<uint32_t>((count + kPiece - 1) / kPiece), lane, column);
    if (lane == 0 && d < D) round_to(sum[0], sums + k * D + d);
  }
}

template <bool kFirst>
void sort_pass(const CodewordSumsParams& p, const Plan& plan, int pass, cudaStream_t stream) {
  const int from = (pass + 1) % 2, to = pass % 2, shift = kBits * pass;
  const uint32_t tiles = static_cast<uint32_t>(plan.tiles);
  const Source<kFirst> source{p.indices,
                              plan.keys[from],
                              plan.order[from],
                              plan.kept,
                              static_cast<uint32_t>(p.N),
                              static_cast<uint32_t>(p.K),
                              static_cast<uint32_t>(plan.rows)};
  VQK_LAUNCH_TASKS(count_kernel<kFirst>, tiles, kThreads, 0, stream, source, plan.counts, tiles, shift);
  VQK_LAUNCH_TASKS(scan_kernel, kBins / kWarps, kThreads, 0, stream, plan.counts, plan.totals, tiles);
  VQK_LAUNCH_TASKS(scatter_kernel<kFirst>, tiles, kThreads, 0, stream, source, plan.counts, plan.totals,
             plan.keys[to], plan.order[to], plan.kept, tiles, shift);
}

template <class T>
void add(const CodewordSumsParams& p, const Plan& plan, cudaStream_t stream) {
  constexpr int kWidth = Piece<T>::kWidth;
  const int last = (plan.passes - 1) % 2;
  const uint32_t *keys = plan.keys[last], *order = plan.order[last];
  const T* z = static_cast<const T*>(p.z);
  auto* sums = static_cast<wide_t<T>*>(p.sums);
  int columns = 2;
  while (columns < kColumns && columns * kWidth < p.D) columns *= 2;
  const int64_t tasks = plan.codes + plan.places, wide = p.D ? (p.D + columns * kWidth - 1) / (columns * kWidth) : 1;
  const dim3 grid(grid_of(add_kernel<T>, kLanes * columns, 0, tasks, wide), static_cast<unsigned>(wide));
  VQK_LAUNCH(add_kernel<T>, grid, kLanes * columns, 0, stream, z, keys, order, plan.kept, plan.offsets, sums, p.counts,
             plan.partials, plan.codes, tasks, p.D, rows_aligned(p.D, z));
  if (plan.rows <= kPiece || p.D == 0) return;
  const int64_t narrow = (p.D + kColumns - 1) / kColumns;
  const dim3 few(grid_of(combine_kernel<wide_t<T>>, kLanes * kColumns, 0, plan.places, narrow),
                 static_cast<unsigned>(narrow));
  VQK_LAUNCH(combine_kernel<wide_t<T>>, few, kLanes * kColumns, 0, stream, keys, plan.kept, plan.offsets, plan.partials,
             sums, p.D);
}

}  // namespace

int64_t codeword_sums_workspace(const CodewordSumsParams& p) { return make_plan(p, nullptr).bytes; }

const char* codeword_sums(const CodewordSumsParams& p, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Plan plan = make_plan(p, workspace);
  if (plan.rows >= int64_t{1} << 31 || plan.codes >= int64_t{1} << 31)
    return "H N and H K must be below 2^31 on CUDA; call it for some of the heads or rows at a time and add the sums";
  if (plan.rows == 0) {
    const int64_t size = p.dtype == DType::f64 ? 8 : 4;
    cudaMemsetAsync(p.sums, 0, plan.codes * p.D * size, stream);
    cudaMemsetAsync(p.counts, 0, plan.codes * sizeof(int64_t), stream);
    return launch_error();
  }
  sort_pass<true>(p, plan, 0, stream);
  for (int pass = 1; pass < plan.passes; ++pass) sort_pass<false>(p, plan, pass, stream);
  const uint32_t codes = static_cast<uint32_t>(plan.codes);
  VQK_LAUNCH_TASKS(offsets_kernel, codes / kThreads + 1, kThreads, 0, stream,
                   plan.keys[(plan.passes - 1) % 2], plan.kept, plan.offsets, codes);
  for_dtype(p.dtype, [&](auto type) { add<decltype(type)>(p, plan, stream); });
  return launch_error();
}

}  // namespace vqk::cuda
