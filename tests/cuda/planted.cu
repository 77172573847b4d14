// Three small kernels, right as they stand, and each with one bug: does every build report what it should?
#include "common.cuh"

namespace vqk::cuda {

enum Bug : int {
  kNone,
  kRefillTooEarly,     // no barrier before the tile is filled again
  kOutOfBounds,        // the rows of the last tile are read beyond the end
  kPastTheRow,         // an index beyond a row of shared memory
  kEarlyReturn,        // some lanes leave before a shuffle of all
  kStageTooEarly,      // no barrier between the products and the next copy into their stage
  kMisaligned,         // rows of a stage are no multiple of 16 bytes
  kLaxWait,            // one group of copies may be under way too many
  kNoBarrierAfterZero, // counting starts before the bins are zero
  kSharedNotAtomic,
  kGlobalNotAtomic,
  kDivergentBarrier,
  kTooMuchShared,      // static and dynamic shared memory together are more than a block may have
  kBugs
};

namespace {

// out[n] = sum_d x[n,d]: 32 rows a block, tiles of 32 columns, 4 lanes a row.
template <int bug>
__global__ void __launch_bounds__(128) row_sums(const float* x, float* out, int N, int D) {
  VQK_SHARED(float, tile, [32][33]);
  const int n0 = blockIdx.x * 32, row = threadIdx.x / 4, part = threadIdx.x % 4;
  float sum = 0;
  for (int d0 = 0; d0 < D; d0 += 32) {
    if (bug != kRefillTooEarly) __syncthreads();
    for (int i = threadIdx.x; i < 32 * 32; i += 128) {
      const int r = i / 32, d = i % 32;
      const bool inside = bug == kOutOfBounds ? d0 + d < D : n0 + r < N && d0 + d < D;
      tile[r][d] = inside ? x[static_cast<int64_t>(n0 + r) * D + d0 + d] : 0.0f;
    }
    if (bug == kPastTheRow && threadIdx.x == 127) tile[31][33 + d0 / 32 % 2] = 0;
    __syncthreads();
    for (int d = 0; d < 8; ++d) sum += tile[row][4 * d + part];
  }
  if (bug == kEarlyReturn && n0 + row >= N) return;
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  sum += __shfl_xor_sync(kFullWarp, sum, 2);
  if (part == 0 && n0 + row < N) out[n0 + row] = sum;
}

// out[n,j] = x[n,:] . w[j,:] for 8 rows of w: 32 rows a block, two stages of 16 features; D is a multiple of 16.
template <int bug>
__global__ void __launch_bounds__(64) products(const __nv_bfloat16* x, const __nv_bfloat16* w, float* out, int N, int D) {
  constexpr int kRow = bug == kMisaligned ? 20 : 24;  // 16 features and padding: no bank conflicts
  VQK_DYNAMIC_SHARED(__nv_bfloat16, stages);
  const int n0 = blockIdx.x * 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto copy = [&](int step) {
    __nv_bfloat16* const stage = stages + step % 2 * 40 * kRow;
    for (int i = threadIdx.x; i < 80; i += 64) {
      const int r = i / 2, d = step * 16 + i % 2 * 8;
      const bool valid = r >= 32 || n0 + r < N;
      const __nv_bfloat16* from = r >= 32 ? w + (r - 32) * D + d : x + static_cast<int64_t>(valid ? n0 + r : 0) * D + d;
      cp_async16(stage + r * kRow + i % 2 * 8, from, valid);
    }
  };
  float c[4] = {0, 0, 0, 0};
  copy(0);
  cp_async_commit();
  for (int step = 0; step < D / 16; ++step) {
    if (step + 1 < D / 16) copy(step + 1);
    cp_async_commit();
    cp_async_wait<bug == kLaxWait ? 2 : 1>();
    __syncthreads();
    const __nv_bfloat16* const stage = stages + step % 2 * 40 * kRow;
    uint32_t a[4];
    ldmatrix_x4(a, stage + (warp * 16 + lane % 16) * kRow + lane / 16 * 8);
    const uint32_t* b = reinterpret_cast<const uint32_t*>(stage + (32 + lane / 4) * kRow + lane % 4 * 2);
    mma_bf16_16816(c, a, b[0], b[4]);
    if (bug != kStageTooEarly) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    const int n = n0 + warp * 16 + lane / 4 + i / 2 * 8;
    if (n < N) out[n * 8 + lane % 4 * 2 + i % 2] = c[i];
  }
}

// counts[k] += how many of the codes are k; there are four times as many as rows
template <int bug>
__global__ void __launch_bounds__(128) count(const int* codes, int* counts, int N, int K) {
  VQK_DYNAMIC_SHARED(int, dynamic);
  VQK_SHARED(int, more, [bug == kTooMuchShared ? 12288 : 1]);
  int* const bins = bug == kTooMuchShared ? more : dynamic;
  for (int k = threadIdx.x; k < K; k += 128) bins[k] = 0;
  if (bug == kDivergentBarrier) {
    if (threadIdx.x < 64) __syncthreads();
    else __syncthreads();
  } else if (bug != kNoBarrierAfterZero) {
    __syncthreads();
  }
  for (int n = blockIdx.x * 128 + threadIdx.x; n < N; n += gridDim.x * 128) {
    if (bug == kSharedNotAtomic) bins[codes[n]] += 1;
    else atomicAdd(bins + codes[n], 1);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += 128) {
    if (bug == kGlobalNotAtomic) counts[k] += bins[k];
    else atomicAdd(counts + k, bins[k]);
  }
}

template <int bug>
void launch(const float* x, const __nv_bfloat16* half, const int* codes, float* sums, float* out, int* counts, int N,
            int D, int K, cudaStream_t stream) {
  constexpr int first = bug < kStageTooEarly ? bug : 0, third = bug < kNoBarrierAfterZero ? 0 : bug;
  constexpr int second = bug == first || bug == third ? 0 : bug;
  cudaMemsetAsync(counts, 0, K * sizeof(int), stream);
  VQK_LAUNCH(row_sums<first>, (N + 31) / 32, 128, 0, stream, x, sums, N, D);
  VQK_LAUNCH(products<second>, (N + 31) / 32, 64, 2 * 40 * 24 * 2, stream, half, half, out, N, D);
  VQK_LAUNCH(count<third>, 3, 128, K * sizeof(int), stream, codes, counts, 4 * N, K);
}

template <int bug, class... Arguments>
void launch_one(int wanted, Arguments... arguments) {
  if (bug == wanted) return launch<bug>(arguments...);
  if constexpr (bug + 1 < kBugs) launch_one<bug + 1>(wanted, arguments...);
}

}  // namespace

const char* planted(int bug, const float* x, const void* half, const int* codes, float* sums, float* out, int* counts,
                    int N, int D, int K, cudaStream_t stream) {
  launch_one<0>(bug, x, static_cast<const __nv_bfloat16*>(half), codes, sums, out, counts, N, D, K, stream);
  return launch_error();
}

}  // namespace vqk::cuda
