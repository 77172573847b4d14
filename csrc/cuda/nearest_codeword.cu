// nearest_codeword: indices[h,n] = argmin_k d(z[h,n], codebook[h,k]), ties to the lowest k; distances: its value.
#include "coarse.cuh"
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
      margins[to] = row_margin<T>(bytes / Arithmetic::kBytes, magnitude, lengths, largest[h], l2);
    }
}

// Block (128 rows, split): the lowest scores of the rows among the codewords of `share` tiles -> scores
// [splits,H,padded_N].
template <class Arithmetic>
__global__ void __launch_bounds__(kTileThreads, 2)
    coarse_kernel(const char* __restrict__ rows, CoarseCodebook codebook, const Margin* __restrict__ margins,
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
      shared, rows + first * bytes, codebook.copy + h * codebook.padded_K * bytes, bytes, tile, min(tile + share, tiles),
      [](int i) { return static_cast<int64_t>(i); },
      [&](int at, const Accumulators& acc) { keep_lowest(acc, half_norms, at, ratio, lowest); });
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
    compare_kernel(const T* __restrict__ z, const T* __restrict__ codewords, const char* __restrict__ rows,
                   CoarseCodebook codebook, const Margin* __restrict__ margins, const int* __restrict__ counts,
                   const int64_t* __restrict__ listed, const float* __restrict__ limits, int64_t* __restrict__ indices,
                   wide_t<T>* __restrict__ distances, int64_t H, int64_t N, int64_t padded_N, int64_t K, int64_t D,
                   int64_t bytes, Metric metric) {
  VQK_DYNAMIC_SHARED(char, shared);
  VQK_SHARED(Survivors, survivors, );
  VQK_SHARED(int64_t, row_of, [kTile]);
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
      __syncthreads();
      float ratio[8], limit[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int i = place.first_row + 8 * r;
        ratio[r] = margins[h * padded_N + row_of[i]].ratio;
        limit[r] = first + i < count ? limits[h * N + first + i] : -HUGE_VALF;
      }
      const T* x = z + (h * N + row_of[threadIdx.x]) * D;
      Choice choice;
      coarse_pass<Arithmetic>(
          shared, rows + h * padded_N * bytes, codebook.copy + h * codebook.padded_K * bytes, bytes, 0, tiles,
          [&](int i) { return row_of[i]; },
          [&](int tile, const Accumulators& acc) {
            mark_survivors(acc, half_norms, tile, ratio, limit, survivors);
            __syncthreads();
            compare_survivors(survivors, tile, x, codewords + h * K * D, D, metric == Metric::l2, choice);
            __syncthreads();
          });
      if (n < 0) continue;
      store_row(indices, distances, h * N + n, false, {choice.value, choice.hopeless ? -1 : choice.index}, metric);
    }
  }
}

template <class T>
struct ArithmeticOf {
  using type = Fp16;  // 11 significant bits of scaled values, as many as tf32 has, at twice the speed
};
template <>
struct ArithmeticOf<__nv_bfloat16> {
  using type = Bf16;
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
  int share;  // tiles of codewords a block
  unsigned splits;
  int64_t bytes;

  template <class Arithmetic>
  void take(const NearestCodewordParams& p, Scratch& scratch) {
    padded_N = round_up(p.N, kTile), copy = copy_bytes<Arithmetic>(p.D);
    const int64_t tiles = (p.K + kTile - 1) / kTile, blocks = p.H * (padded_N / kTile);
    const int64_t wanted = (2 * multiprocessors() + blocks - 1) / blocks;  // splits, to have two blocks each
    share = static_cast<int>((tiles + wanted - 1) / wanted);
    splits = static_cast<unsigned>((tiles + share - 1) / share);
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
      if (p.dtype == DType::bf16 && !cosine) take<Bf16>(p, scratch);
      else take<Fp16>(p, scratch);
    }
    bytes = scratch.bytes();
  }
};

// z and codebook as they are compared: as they came, or normalised.
template <class T>
void search(const NearestCodewordParams& p, const void* z_, const void* codebook_, const Workspace& w,
            cudaStream_t stream) {
  using Arithmetic = typename ArithmeticOf<T>::type;
  const T *z = static_cast<const T*>(z_), *codebook = static_cast<const T*>(codebook_);
  wide_t<T>* distances = static_cast<wide_t<T>*>(p.distances);
  const int64_t rows = p.H * p.N, padded_rows = p.H * w.padded_N;
  const bool l2 = p.metric == Metric::l2;
  if (scans(p)) {
    VQK_LAUNCH(scan_kernel<T>, grid_size((rows + 3) / 4, 16), kScanThreads, 0, stream, z, codebook, p.mask, p.indices,
               distances, rows, p.N, p.K, p.D, p.metric);
    return;
  }
  copy_codebook<Arithmetic, T>(codebook, w.codebook, p.H, p.K, p.D, l2, stream);
  VQK_LAUNCH((copy_rows_kernel<Arithmetic, T>), copy_grid(p.H, w.padded_N), kCopyThreads, 0, stream, z, p.mask,
             w.codebook.largest, w.rows, w.margins, p.H, p.N, w.padded_N, p.D, l2);
  const int shared = pass_shared_bytes(w.copy);
  allow_shared(coarse_kernel<Arithmetic>, shared);
  VQK_LAUNCH(coarse_kernel<Arithmetic>, dim3(static_cast<unsigned>(padded_rows / kTile), w.splits), kTileThreads, shared,
             stream, w.rows, w.codebook, w.margins, w.scores, p.H, w.padded_N, w.copy, w.share);
  cudaMemsetAsync(w.counts, 0, p.H * sizeof(int), stream);
  VQK_LAUNCH(select_kernel<T>, grid_size(padded_rows / kSelectThreads, 16), kSelectThreads, 0, stream, z, codebook,
             p.mask, w.margins, w.scores, static_cast<int>(w.splits), w.counts, w.listed, w.limits, p.indices, distances,
             p.H, p.N, w.padded_N, p.K, p.D, p.metric, p.certified);
  allow_shared((compare_kernel<Arithmetic, T>), shared);
  const unsigned heads = static_cast<unsigned>(p.H < 65535 ? p.H : 65535);
  const int64_t per_head = 2 * multiprocessors() / heads + 1, steps = w.padded_N / kTile;
  VQK_LAUNCH((compare_kernel<Arithmetic, T>), dim3(static_cast<unsigned>(steps < per_head ? steps : per_head), heads),
             kTileThreads, shared, stream, z, codebook, w.rows, w.codebook, w.margins, w.counts, w.listed, w.limits,
             p.indices, distances, p.H, p.N, w.padded_N, p.K, p.D, w.copy, p.metric);
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
