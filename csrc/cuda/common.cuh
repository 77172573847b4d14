// What every CUDA kernel shares: 16-bit floats, warp sums, launch checks.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace vqk::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline double to_double(float x) { return x; }
__device__ inline double to_double(double x) { return x; }
__device__ inline double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline double to_double(__half x) { return __half2float(x); }

__device__ inline void round_to(double x, float* out) { *out = static_cast<float>(x); }
__device__ inline void round_to(double x, double* out) { *out = x; }
__device__ inline void round_to(double x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(static_cast<float>(x)); }
__device__ inline void round_to(double x, __half* out) { *out = __float2half_rn(static_cast<float>(x)); }

// Every lane gets the same sum, added in one fixed order.
__device__ inline double warp_sum(double x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Blocks of a kernel that loops over its tasks: one a task, but no more than that many a multiprocessor.
inline unsigned grid_size(int64_t tasks, int64_t per_multiprocessor) {
  const int64_t limit = per_multiprocessor * multiprocessors();
  return static_cast<unsigned>(tasks < 1 ? 1 : tasks < limit ? tasks : limit);
}

// Null, or why the last launch was refused.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vqk::cuda
