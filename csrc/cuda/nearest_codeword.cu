// nearest_codeword: indices[h,n] = argmin_k d(z[h,n], codebook[h,k]), ties to the lowest k; distances: its value.
//
//   in   z [H,N,D], codebook [H,K,D], mask [H,N] or null; float, double, bf16 or f16
//   out  indices int64 [H,N], distances float [H,N] (double for double)
//
//   normalize   cosine only: z and codebook divided by their lengths
//   copy        codebook and z scaled by powers of two and rounded to fp16 (bf16, double: to bf16, tf32); bounds
//   coarse      (128 rows, split)  tiles of 128 codewords stream by, coarse.cuh; each thread keeps the lowest score of
//                                  its 8 rows, its index and the second lowest; a row's 8 threads join at the end
//   select      joins the splits. second - best > 2 eps: decided; the winner's canonical distance. Else: listed
//   compare     a fixed grid walks the list, 128 rows a step: coarse scores again, codewords within 2 eps of the best
//               compared canonically
//   few         below 16 features in the place of coarse: float32 multiply-adds, few.cuh
//   scan        or, alone, one warp a row, every codeword canonically: little work, or more features than the bound has
//
// Work: 2 N K D flops on tensor cores, and 6 instructions a score beside them (fused multiply-add, two minima, a
// maximum, a comparison, a selection). A multiprocessor of sm_80 multiplies 1024 pairs a clock and issues 128 such
// instructions: below D = 48 the instructions are the roof, above it the tensor cores. Bytes: z and codebook read once,
// their 2-byte copies written and read, 12 N of scores, 12 N of results; never N x K. With float32 and D = 64 that is
// 600 bytes a row against 131072 flops a row at K = 1024: 220 flops a byte, more than memory needs (A100: 153, from
// 312 TFLOP/s and 2 TB/s). The codebook comes from the second-level cache, once a block of 128 rows: 128 flops a byte.
// K is split where rows alone do not make two blocks a multiprocessor.
// Numerics: docs/numerics.md. A coarse score chooses a winner only where the bound (vqk/error_bound.h) proves it:
// results are bit equal to the reference whatever the arithmetic. certified = false takes the lowest coarse score.
// Determinism: a list's order depends on the order of blocks; rows are decided one by one, so results do not.
// Shared memory and registers planned: 48 to 96 KB by D and architecture, tiles.cuh; 255 registers at most, no spills: two blocks
// a multiprocessor, one where it has 100 KB and rows more than 128 bytes. Grids of loops, and the splits, fill the
// device once, as cudaOccupancyMaxActiveBlocksPerMultiprocessor counts. No more than 2^31 blocks of 128 rows.
// Limits: codebooks of equal codewords, and clusters much farther from the origin than they are wide, send every row
// to compare, and there every codeword to float64: right, and slow. GeForce cards have 1/64 of the float64 rate: there
// the canonical distances of the winners, 3 N D operations, may take longer than the coarse pass.
// Run on emulators only: timings and tuning are open.
#include "few.cuh"
#include "vqk/launch.h"

namespace vqk::cuda {
namespace {

constexpr int kScanThreads = 128;

// Index and distance of one row, as the op's contract has them.
template <class T>
__device__ void store_row(int64_t* indices, T* distances, int64_t row, bool masked, Found found, Metric metric) {
  const double value = metric == Metric::cosine ? found.value + 1 : found.value;
  indices[row] = masked ? -1 : found.index;
  distances[row] = static_cast<T>(masked ? 0.0 : found.index < 0 ? NAN : value);
}

template <class T>
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const T* __restrict__ z, const T* __restrict__ codebook, const bool* __restrict__ mask,
                int64_t* __restrict__ indices, wide_t<T>* __restrict__ distances, int64_t rows, int64_t N, int64_t K,
                int64_t D, Metric metric) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kScanThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kScanThreads / 32) + threadIdx.x / 32; row < rows;
       row += step) {
    const bool masked = mask && !mask[row];
    Found found = {0, -1};
    if (!masked) found = scan_row(z + row * D, codebook + row / N * K * D, K, D, metric == Metric::l2);
    if (threadIdx.x % 32 == 0) store_row(indices, distances, row, masked, found, metric);
  }
}

// Copies of z [H,padded_N,copy_bytes] with what their scores need; 32 rows a block.
template <class Arithmetic, class T>
__global__ void __launch_bounds__(kCopyThreads, 1)
    copy_rows_kernel(const T* __restrict__ z, const bool* __restrict__ mask, const Largest* __restrict__ largest,
                     char* __restrict__ copy, Margin* __restrict__ margins, int64_t H, int64_t N, int64_t padded_N,
                     int64_t D, bool l2) {
  const int64_t bytes = copy_bytes<Arithmetic>(D);
  for (int64_t h = blockIdx.y; h < H; h += gridDim.y)
    for (int64_t first = blockIdx.x * kCopyRows; first < padded_N; first += gridDim.x * kCopyRows) {
      const int64_t n = first + threadIdx.x / 8, row = h * N + n, to = h * padded_N + n;
      const double magnitude = largest_magnitude(z + row * D, D, n < N && !(mask && !mask[row]));
      uint32_t* words = reinterpret_cast<uint32_t*>(copy + to * bytes);
      const Lengths lengths = copy_row<Arithmetic>(z + row * D, D, magnitude >= 0, exponent(magnitude),
                                                   [&](int i, uint32_t word) { words[i] = word; });
      if (threadIdx.x % 8) continue;
      margins[to] = row_margin<Arithmetic, T>(bytes / Arithmetic::kBytes, magnitude, lengths, largest[h], l2);
    }
}

// Block (128 rows, split): the lowest scores of the rows among the codewords of `share` tiles -> scores
// [splits,H,padded_N].
template <class Arithmetic>
__global__ void __launch_bounds__(kTileThreads, 2)
    coarse_kernel(const Tiles pass, const char* __restrict__ rows, CoarseCodebook codebook, const Margin* __restrict__ margins,
                  Lowest* __restrict__ scores, int64_t H, int64_t padded_N, int64_t bytes, int share) {
  VQK_DYNAMIC_SHARED(char, shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t h = blockIdx.x / static_cast<unsigned>(padded_N / kTile);
  const Place place;
  float ratio[8];
  Lowest lowest[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) ratio[r] = margins[first + place.first_row + 8 * r].ratio, lowest[r] = kNothing;
  const float* half_norms = codebook.half_norms + h * codebook.padded_K;
  const int tiles = static_cast<int>(codebook.padded_K / kTile), tile = blockIdx.y * share;
  coarse_pass<Arithmetic>(
      pass, shared, rows + first * bytes, codebook.copy + h * codebook.padded_K * bytes, bytes, tile,
      min(tile + share, tiles), [](int i) { return static_cast<int64_t>(i); },
      [&](int at, const Accumulators& acc) { keep_lowest(acc, half_norms, at, [&](int r) { return ratio[r]; }, lowest); });
  Lowest* other = reinterpret_cast<Lowest*>(shared);  // of the other half of the codewords
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    lowest[r].join(lowest[r].from_lane(1));
    lowest[r].join(lowest[r].from_lane(2));
    if (place.first_code == 64) other[place.first_row + 8 * r] = lowest[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    if (place.first_code) continue;
    lowest[r].join(other[place.first_row + 8 * r]);
    scores[blockIdx.y * H * padded_N + first + place.first_row + 8 * r] = lowest[r];
  }
}

// A warp takes 32 rows: joins the splits and decides where the bound does; else the row is listed.
constexpr int kSelectThreads = 128;
constexpr int kSelectFeatures = 16;

template <class T>
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const T* __restrict__ z, const T* __restrict__ codebook, const bool* __restrict__ mask,
                  const Margin* __restrict__ margins, const Lowest* __restrict__ scores, int splits, int* counts,
                  int64_t* __restrict__ listed, float* __restrict__ limits, int64_t* __restrict__ indices,
                  wide_t<T>* __restrict__ distances, int64_t H, int64_t N, int64_t padded_N, int64_t K, int64_t D,
                  Metric metric, bool certified) {
  VQK_SHARED(T, row_part, [kSelectThreads][kSelectFeatures + 1]);
  VQK_SHARED(T, code_part, [kSelectThreads][kSelectFeatures + 1]);
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; at - lane < H * padded_N;
       at += step) {
    const int64_t h = at / padded_N, n = at % padded_N, row = h * N + n;
    Lowest lowest = scores[at];
    for (int split = 1; split < splits; ++split) lowest.join(scores[split * H * padded_N + at]);
    const float margin = margins[at].margin;
    const bool usable = n < N && margin >= 0, found = lowest.best < HUGE_VALF;
    const bool clear = certified ? lowest.second - lowest.best > margin : margin < HUGE_VALF;
    const bool decided = usable && found && clear;
    double total = 0;
    for (int64_t start = 0; start < D && __any_sync(kFullWarp, decided); start += kSelectFeatures) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 32; i += 32 / kSelectFeatures) {
        const int of = i + lane / kSelectFeatures, j = lane % kSelectFeatures;
        const int64_t their_row = __shfl_sync(kFullWarp, row, of), their_h = __shfl_sync(kFullWarp, h, of);
        const int code = __shfl_sync(kFullWarp, decided ? lowest.index : -1, of);
        if (code < 0 || start + j >= D) continue;
        row_part[warp_row + of][j] = z[their_row * D + start + j];
        code_part[warp_row + of][j] = codebook[(their_h * K + code) * D + start + j];
      }
      __syncwarp();
      for (int j = 0; j < kSelectFeatures && start + j < D && decided; ++j)
        total = canonical_step(total, to_double(row_part[threadIdx.x][j]), to_double(code_part[threadIdx.x][j]),
                               metric == Metric::l2);
    }
    if (usable && !decided) {
      const int64_t slot = h * N + atomicAdd(counts + h, 1);  // in any order: rows are compared one by one
      listed[slot] = n;
      limits[slot] = found ? lowest.best + margin : HUGE_VALF;
    } else if (n < N) {
      const Found result = {metric == Metric::l2 ? total : -total, decided ? lowest.index : -1};
      store_row(indices, distances, row, mask && !mask[row], result, metric);
    }
  }
}

// Listed rows, 128 a step: scores again, and every codeword within the row's limit is compared canonically.
template <class Arithmetic, class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    compare_kernel(const Tiles pass, const T* __restrict__ z, const T* __restrict__ codewords, const char* __restrict__ rows,
                   CoarseCodebook codebook, const Margin* __restrict__ margins, const int* __restrict__ counts,
                   const int64_t* __restrict__ listed, const float* __restrict__ limits, int64_t* __restrict__ indices,
                   wide_t<T>* __restrict__ distances, int64_t H, int64_t N, int64_t padded_N, int64_t K, int64_t D,
                   int64_t bytes, Metric metric) {
  VQK_DYNAMIC_SHARED(char, shared);
  VQK_SHARED(Survivors, survivors, );
  VQK_SHARED(int64_t, row_of, [kTile]);
  VQK_SHARED(float, row_limits, [kTile]);
  const Place place;
  const int tiles = static_cast<int>(codebook.padded_K / kTile);
  for (int w = 0; w < kTile / 32; ++w) survivors[threadIdx.x][w] = 0;
  for (int64_t h = blockIdx.y; h < H; h += gridDim.y) {
    const float* half_norms = codebook.half_norms + h * codebook.padded_K;
    const int64_t count = counts[h];
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTile; first < count;
         first += static_cast<int64_t>(gridDim.x) * kTile) {
      const int64_t n = first + threadIdx.x < count ? listed[h * N + first + threadIdx.x] : -1;
      row_of[threadIdx.x] = n < 0 ? 0 : n;
      row_limits[threadIdx.x] = n < 0 ? -HUGE_VALF : limits[h * N + first + threadIdx.x];
      __syncthreads();
      float ratio[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) ratio[r] = margins[h * padded_N + row_of[place.first_row + 8 * r]].ratio;
      const T* x = z + (h * N + row_of[threadIdx.x]) * D;
      Choice choice;
      coarse_pass<Arithmetic>(
          pass, shared, rows + h * padded_N * bytes, codebook.copy + h * codebook.padded_K * bytes, bytes, 0, tiles,
          [&](int i) { return row_of[i]; },
          [&](int tile, const Accumulators& acc) {
            mark_survivors(acc, half_norms, tile, [&](int r) { return ratio[r]; }, row_limits, survivors);
            __syncthreads();
            compare_survivors(survivors, tile, x, codewords + h * K * D, D, metric == Metric::l2, choice);
            // marked again after coarse_pass's next barrier
          });
      if (n < 0) continue;
      store_row(indices, distances, h * N + n, false, {choice.value, choice.hopeless ? -1 : choice.index}, metric);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kFewThreads, 4)
    few_compare_kernel(const T* __restrict__ z, const T* __restrict__ codewords, const float* __restrict__ rows,
                       CoarseCodebook codebook, const Margin* __restrict__ margins, const int* __restrict__ counts,
                       const int64_t* __restrict__ listed, const float* __restrict__ limits,
                       int64_t* __restrict__ indices, wide_t<T>* __restrict__ distances, int64_t H, int64_t N,
                       int64_t padded_N, int64_t K, int64_t D, int features, Metric metric) {
  constexpr int kWarps = kFewThreads / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t h = blockIdx.y; h < H; h += gridDim.y)
    for (int64_t i = first; i < counts[h]; i += static_cast<int64_t>(gridDim.x) * kWarps) {
      const int64_t n = listed[h * N + i], at = h * padded_N + n;
      const Found found = few_compare(z + (h * N + n) * D, codewords + h * K * D, rows + at * features, codebook, h,
                                      margins[at].ratio, limits[h * N + i], D, features, metric == Metric::l2);
      if (threadIdx.x % 32 == 0) store_row(indices, distances, h * N + n, false, found, metric);
    }
}

template <class T>
struct ArithmeticOf {
  using type = Fp16;  // 11 significant bits of scaled values, as many as tf32 has, at twice the speed
};
template <>
struct ArithmeticOf<__nv_bfloat16> {
  using type = Bf16;  // exact
};
template <>
struct ArithmeticOf<double> {
  using type = Tf32;  // no value is too small beside the row's largest
};

// Which kernels: a scan where there is little work or no bound, or the coarse pass.
bool scans(const NearestCodewordParams& p) { return p.N * p.K * p.D <= kScanWork || p.D > kMaxFeatures; }

struct Workspace {
  void *unit_z, *unit_codebook;  // cosine: normalised, float (double for f64)
  CoarseCodebook codebook;
  char* rows;
  Margin* margins;
  Lowest* scores;
  int* counts;      // [H] of
  int64_t* listed;  // [H,N] rows that are not decided, and
  float* limits;    // [H,N] how high a score may be
  int64_t padded_N, copy;
  Tiles tiles;
  int shared;  // bytes of a block
  int share;  // tiles of codewords a block
  unsigned splits;
  int64_t bytes;

  // Blocks of the first pass that the device holds.
  template <class Arithmetic>
  int64_t held(int64_t D) const {
    if constexpr (Arithmetic::kTensorCores) {
      allow_shared(coarse_kernel<Arithmetic>, shared);
      return blocks_held(coarse_kernel<Arithmetic>, kTileThreads, shared);
    } else {
      return D <= 8 ? blocks_held(few_kernel<8>, kFewThreads, 0) : blocks_held(few_kernel<16>, kFewThreads, 0);
    }
  }

  template <class Arithmetic>
  void take(const NearestCodewordParams& p, Scratch& scratch) {
    constexpr int64_t kRows = Arithmetic::kTensorCores ? kTile : kFewRows * kFewThreads;  // of a block
    padded_N = round_up(p.N, kTile), copy = copy_bytes<Arithmetic>(p.D);
    tiles = device_tiles(), shared = tiles.chunks(chunks_of(copy)) * kChunkBytes;
    const int64_t code_tiles = (p.K + kTile - 1) / kTile, blocks = p.H * ((padded_N + kRows - 1) / kRows);
    const int64_t wanted = (held<Arithmetic>(p.D) + blocks - 1) / blocks;  // splits, to fill the device
    share = static_cast<int>((code_tiles + wanted - 1) / wanted);
    splits = static_cast<unsigned>((code_tiles + share - 1) / share);
    codebook = take_codebook<Arithmetic>(scratch, p.H, p.K, p.D);
    rows = scratch.take<char>(p.H * padded_N * copy);
    margins = scratch.take<Margin>(p.H * padded_N);
    scores = scratch.take<Lowest>(splits * p.H * padded_N);
    counts = scratch.take<int>(p.H);
    listed = scratch.take<int64_t>(p.H * p.N);
    limits = scratch.take<float>(p.H * p.N);
  }

  Workspace(const NearestCodewordParams& p, void* base) {
    Scratch scratch(base);
    const int64_t size = p.dtype == DType::f64 ? 8 : 4, cosine = p.metric == Metric::cosine;
    unit_z = scratch.take<char>(cosine * size * p.H * p.N * p.D);
    unit_codebook = scratch.take<char>(cosine * size * p.H * p.K * p.D);
    if (!scans(p) && p.H * p.N > 0) {
      if (p.D < kFewFeatures) take<Fp32>(p, scratch);
      else if (p.dtype == DType::f64) take<Tf32>(p, scratch);
      else if (p.dtype == DType::bf16 && !cosine) take<Bf16>(p, scratch);
      else take<Fp16>(p, scratch);
    }
    bytes = scratch.bytes();
  }
};

// z and codebook as they are compared: as they came, or normalised.
template <class T>
struct Search {
  const NearestCodewordParams& p;
  const Workspace& w;
  const T *z, *codebook;
  cudaStream_t stream;
  wide_t<T>* distances = static_cast<wide_t<T>*>(p.distances);

  void scan() const {
    const int64_t rows = p.H * p.N;
    VQK_LAUNCH_TASKS(scan_kernel<T>, (rows + 3) / 4, kScanThreads, 0, stream, z, codebook, p.mask, p.indices, distances,
                     rows, p.N, p.K, p.D, p.metric);
  }

  template <class Arithmetic>
  void copy() const {
    const bool l2 = p.metric == Metric::l2;
    copy_codebook<Arithmetic, T>(codebook, w.codebook, p.H, p.K, p.D, l2, stream);
    VQK_LAUNCH((copy_rows_kernel<Arithmetic, T>), copy_grid(copy_rows_kernel<Arithmetic, T>, p.H, w.padded_N),
               kCopyThreads, 0, stream, z, p.mask, w.codebook.largest, w.rows, w.margins, p.H, p.N, w.padded_N, p.D,
               l2);
  }

  void select() const {
    cudaMemsetAsync(w.counts, 0, p.H * sizeof(int), stream);
    VQK_LAUNCH_TASKS(select_kernel<T>, p.H * w.padded_N / kSelectThreads, kSelectThreads, 0, stream, z, codebook, p.mask,
                     w.margins, w.scores, static_cast<int>(w.splits), w.counts, w.listed, w.limits,
               p.indices, distances, p.H, p.N, w.padded_N, p.K, p.D, p.metric, p.certified);
  }

  void on_tensor_cores() const {
    using Arithmetic = typename ArithmeticOf<T>::type;
    copy<Arithmetic>();
    const dim3 grid(static_cast<unsigned>(p.H * w.padded_N / kTile), w.splits);
    VQK_LAUNCH(coarse_kernel<Arithmetic>, grid, kTileThreads, w.shared, stream, w.tiles, w.rows, w.codebook, w.margins,
               w.scores, p.H, w.padded_N, w.copy, w.share);
    select();
    const auto compare = compare_kernel<Arithmetic, T>;
    allow_shared(compare, w.shared);
    // the lengths of the lists are not known here
    VQK_LAUNCH((compare_kernel<Arithmetic, T>), grid_of_columns(compare, kTileThreads, w.shared, w.padded_N / kTile, p.H),
               kTileThreads, w.shared, stream, w.tiles, z, codebook, w.rows, w.codebook, w.margins, w.counts, w.listed,
               w.limits, p.indices, distances, p.H, p.N, w.padded_N, p.K, p.D, w.copy, p.metric);
  }

  template <int kFeatures>
  void of_few_features() const {
    constexpr int64_t kRows = kFewRows * kFewThreads;
    copy<Fp32>();
    const float* rows = reinterpret_cast<const float*>(w.rows);
    const dim3 grid(static_cast<unsigned>(p.H * ((w.padded_N + kRows - 1) / kRows)), w.splits);
    VQK_LAUNCH(few_kernel<kFeatures>, grid, kFewThreads, 0, stream, rows, w.codebook, w.margins, w.scores, p.H,
               w.padded_N, w.share);
    select();
    VQK_LAUNCH(few_compare_kernel<T>, grid_of_columns(few_compare_kernel<T>, kFewThreads, 0, (p.N + 3) / 4, p.H),
               kFewThreads, 0, stream, z, codebook, rows, w.codebook, w.margins, w.counts, w.listed, w.limits,
               p.indices, distances, p.H, p.N, w.padded_N, p.K, p.D, kFeatures, p.metric);
  }

  void run() const {
    if (scans(p)) scan();
    else if (p.D <= 8) of_few_features<8>();
    else if (p.D < kFewFeatures) of_few_features<16>();
    else on_tensor_cores();
  }
};

template <class T>
void search(const NearestCodewordParams& p, const void* z, const void* codebook, const Workspace& w,
            cudaStream_t stream) {
  Search<T>{p, w, static_cast<const T*>(z), static_cast<const T*>(codebook), stream}.run();
}

}  // namespace

int64_t nearest_codeword_workspace(const NearestCodewordParams& p) { return Workspace(p, nullptr).bytes; }

const char* nearest_codeword(const NearestCodewordParams& p, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (p.H == 0 || p.N == 0) return nullptr;
  const Workspace w(p, workspace);
  for_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.metric != Metric::cosine) return search<T>(p, p.z, p.codebook, w, stream);
    normalize<T>(p.z, w.unit_z, p.H * p.N, p.D, stream);
    normalize<T>(p.codebook, w.unit_codebook, p.H * p.K, p.D, stream);
    search<wide_t<T>>(p, w.unit_z, w.unit_codebook, w, stream);
  });
  return launch_error();
}

}  // namespace vqk::cuda
