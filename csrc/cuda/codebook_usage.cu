// codebook_usage: counts[s,k] = number of n with indices[s,n] == k.
//
//   in   indices int64 [S,N]; negative ones and those >= K are skipped
//   out  counts  int64 [S,K]; `bad` is not written: the host would have to wait for the device to read it
//
//   block (x, s):  row s  | 256 indices | 256 of other blocks | ... | 256 indices | ...
//                              | atomicAdd, int32 in shared memory
//                  histograms [copies, K], warp w counts in copy w mod copies
//                              | added up, one atomicAdd a bin, int64
//                  counts[s,:]
//   K above 12288, too large for shared memory:  --> atomicAdd to counts[s,:] at once
//
// Work and bytes: one read of the indices, 8 S N bytes, in coalesced 64-bit loads, four under way a thread: memory bound.
// Expected limit: atomics on one bin when the codebook has collapsed; several histograms a block spread them. A block
// counts at least K indices, so clearing and adding up its bins stays the smaller part.
// Numerics: a block counts fewer than 2^32 indices in 32 bits; 64 bits across blocks.
// Determinism: integer sums: any order gives the same result.
// Shared memory: min(8, 12288 / K) histograms of 4 K bytes, at most 48 KB. Registers: 32 to 40: 6 blocks of 256 threads a
// multiprocessor where shared memory allows.
// Limits: none in S, N and K.
// Run on emulators only: timings and tuning are open.
#include "common.cuh"
#include "vqk/launch.h"

namespace vqk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSharedBytes = 48 << 10;  // what a kernel may use without asking

// copies: histograms in shared memory; 0: count in global memory.
__global__ void __launch_bounds__(kThreads) count_kernel(const int64_t* __restrict__ indices,
                                                         unsigned long long* counts, int64_t S, int64_t N, int64_t K,
                                                         int copies) {
  VQK_DYNAMIC_SHARED(unsigned, bins);
  for (int64_t s = blockIdx.y; s < S; s += gridDim.y) {
    for (int64_t i = threadIdx.x; i < copies * K; i += kThreads) bins[i] = 0;
    __syncthreads();
    unsigned* mine = bins + (copies ? (threadIdx.x / 32) % copies * K : 0);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 4
    for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < N; n += step) {
      const int64_t k = indices[s * N + n];
      if (k < 0 || k >= K) continue;
      if (copies) atomicAdd(mine + k, 1u);
      else atomicAdd(counts + s * K + k, 1ull);
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; copies && k < K; k += kThreads) {
      unsigned long long sum = 0;
      for (int c = 0; c < copies; ++c) sum += bins[c * K + k];
      if (sum) atomicAdd(counts + s * K + k, sum);
    }
    __syncthreads();
  }
}

}  // namespace

const char* codebook_usage(const CodebookUsageParams& p, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  cudaMemsetAsync(p.counts, 0, p.S * p.K * sizeof(int64_t), stream);
  if (p.S == 0 || p.N == 0) return launch_error();
  const int64_t row = p.K * static_cast<int64_t>(sizeof(unsigned));
  const int64_t fit = kSharedBytes / row;
  const int copies = static_cast<int>(fit < kThreads / 32 ? fit : kThreads / 32);
  // A block counts at least as many indices as it has bins to add up, and fewer than 2^32.
  const int64_t least = p.K > 16 * kThreads ? p.K : 16 * kThreads;
  const dim3 grid = grid_of_columns(count_kernel, kThreads, copies * row, (p.N + least - 1) / least, p.S);
  VQK_LAUNCH(count_kernel, grid, kThreads, copies * row, stream, p.indices,
             reinterpret_cast<unsigned long long*>(p.counts), p.S, p.N, p.K, copies);
  return launch_error();
}

}  // namespace vqk::cuda
