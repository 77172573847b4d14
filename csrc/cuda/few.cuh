// The coarse pass of nearest_codeword for few features: float32 multiply-adds, no tensor cores, whose steps of 16
// features would be mostly padding, and whose 11 bits would not tell close codewords apart (few features leave many).
//
//     thread = 4 rows, in registers; block = 512 rows x one split of the codewords, 128 at a time in shared memory:
//
//         rows (4 a thread)   x[4][16]  --+
//                                         +--> scores --> best, second, index of each row
//         codewords, shared   [128][16] --+    every thread reads the same one: a broadcast
//
// D multiply-adds and 5 instructions a score: the roof is the issue rate, at D = 16 three quarters of it are
// multiply-adds. Shared memory: 8.5 KB. A copied row has 8 or 16 features: kFeatures.
#pragma once
#include "coarse.cuh"

namespace vqk::cuda {

constexpr int kFewFeatures = 16;  // below it, float32 takes the place of tensor cores
constexpr int kFewRows = 4;       // a thread
constexpr int kFewThreads = 128;

template <int kFeatures>
__device__ inline float few_score(const float (&x)[kFeatures], const float* code, float half, float ratio) {
  float dot = 0;
#pragma unroll
  for (int d = 0; d < kFeatures; d += 4) {
    const float4 c = *reinterpret_cast<const float4*>(code + d);
    dot = __fmaf_rn(x[d], c.x, dot);
    dot = __fmaf_rn(x[d + 1], c.y, dot);
    dot = __fmaf_rn(x[d + 2], c.z, dot);
    dot = __fmaf_rn(x[d + 3], c.w, dot);
  }
  return __fmaf_rn(-ratio, dot, half);
}

namespace {

// Block (512 rows of a head, split) -> scores [splits,H,padded_N], as coarse_kernel's.
template <int kFeatures>
__global__ void __launch_bounds__(kFewThreads)
    few_kernel(const float* __restrict__ rows, CoarseCodebook codebook, const Margin* __restrict__ margins,
               Lowest* __restrict__ scores, int64_t H, int64_t padded_N, int share) {
  VQK_SHARED(float, codes, [kTile][kFeatures]);
  VQK_SHARED(float, halves, [kTile]);
  constexpr int kBlockRows = kFewRows * kFewThreads;
  const unsigned blocks = static_cast<unsigned>((padded_N + kBlockRows - 1) / kBlockRows);
  const int64_t h = blockIdx.x / blocks, first = static_cast<int64_t>(blockIdx.x % blocks) * kBlockRows;
  const int tiles = static_cast<int>(codebook.padded_K / kTile), begin = static_cast<int>(blockIdx.y) * share;
  float x[kFewRows][kFeatures], ratio[kFewRows];
  Lowest lowest[kFewRows];
#pragma unroll
  for (int r = 0; r < kFewRows; ++r) {
    const int64_t n = first + r * kFewThreads + threadIdx.x, row = h * padded_N + (n < padded_N ? n : 0);
    ratio[r] = margins[row].ratio;
    lowest[r] = kNothing;
#pragma unroll
    for (int d = 0; d < kFeatures; ++d) x[r][d] = rows[row * kFeatures + d];
  }
  for (int tile = begin; tile < min(begin + share, tiles); ++tile) {
    const int64_t code = h * codebook.padded_K + static_cast<int64_t>(tile) * kTile;
    const float* from = reinterpret_cast<const float*>(codebook.copy) + code * kFeatures;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kFeatures; i += 4)
      *reinterpret_cast<float4*>(&codes[0][0] + i * kTile + threadIdx.x * 4) =
          *reinterpret_cast<const float4*>(from + i * kTile + threadIdx.x * 4);
    halves[threadIdx.x] = codebook.half_norms[code + threadIdx.x];
    __syncthreads();
    for (int c = 0; c < kTile; ++c) {
#pragma unroll
      for (int r = 0; r < kFewRows; ++r) {
        const float score = few_score(x[r], codes[c], halves[c], ratio[r]);
        lowest[r].second = fminf(lowest[r].second, fmaxf(lowest[r].best, score));
        if (score < lowest[r].best) lowest[r].index = tile * kTile + c;
        lowest[r].best = fminf(lowest[r].best, score);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kFewRows; ++r) {
    const int64_t n = first + r * kFewThreads + threadIdx.x;
    if (n < padded_N) scores[(blockIdx.y * H + h) * padded_N + n] = lowest[r];
  }
}

}  // namespace

// One warp a listed row: scores again, and what is within the row's limit compared canonically. All lanes get it.
template <class T>
__device__ Found few_compare(const T* z, const T* codewords, const float* row, CoarseCodebook codebook, int64_t h,
                             float ratio, float limit, int64_t D, int features, bool l2) {
  Choice choice;
  for (int64_t k = threadIdx.x % 32; k < codebook.padded_K; k += 32) {
    const int64_t code = h * codebook.padded_K + k;
    const float* c = reinterpret_cast<const float*>(codebook.copy) + code * features;
    float dot = 0;
    for (int d = 0; d < features; ++d) dot = __fmaf_rn(row[d], c[d], dot);
    const float half = codebook.half_norms[code];
    if (__fmaf_rn(-ratio, dot, half) <= limit && half < HUGE_VALF) choice.compare(z, codewords, k, D, l2);
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    const double value = __shfl_xor_sync(kFullWarp, choice.value, offset);
    const int64_t index = __shfl_xor_sync(kFullWarp, choice.index, offset);
    keep_lower(value, index, choice.value, choice.index);
  }
  const bool hopeless = __any_sync(kFullWarp, choice.hopeless);
  return {choice.value, hopeless ? -1 : choice.index};
}

}  // namespace vqk::cuda
