// What every CUDA kernel shares: 16-bit floats, warp sums, grids, launch checks.
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

// Of the current device.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// Blocks that the current device holds at a time.
template <class Kernel>
int64_t blocks_held(Kernel kernel, int threads, int64_t shared_bytes) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), threads, shared_bytes);
  return static_cast<int64_t>(blocks > 1 ? blocks : 1) * attribute(cudaDevAttrMultiProcessorCount);
}

// Blocks of a kernel that loops over its tasks: one a task, but no more than the device holds, divided by `columns`, the
// blocks of the grid's other dimension.
template <class Kernel>
unsigned grid_of(Kernel kernel, int threads, int64_t shared_bytes, int64_t tasks, int64_t columns = 1) {
  const int64_t most = (blocks_held(kernel, threads, shared_bytes) + columns - 1) / columns;
  return static_cast<unsigned>(tasks < 1 ? 1 : tasks < most ? tasks : most);
}

// The grid (x, y) of a kernel that loops over columns and, within, over tasks.
template <class Kernel>
dim3 grid_of_columns(Kernel kernel, int threads, int64_t shared_bytes, int64_t tasks, int64_t columns) {
  const int64_t held = blocks_held(kernel, threads, shared_bytes), most = held < 65535 ? held : 65535;
  const unsigned y = static_cast<unsigned>(columns < most ? columns : most);
  return {grid_of(kernel, threads, shared_bytes, tasks, y), y};
}

// Null, or why the last launch was refused.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vqk::cuda

// Launches a kernel that loops over `tasks`: VQK_LAUNCH_TASKS((kernel<T, 4>), tasks, block, shared_bytes, stream, ...)
#define VQK_LAUNCH_TASKS(kernel, tasks, block, shared_bytes, stream, ...) \
  VQK_LAUNCH(kernel, grid_of(kernel, block, shared_bytes, tasks), block, shared_bytes, stream, __VA_ARGS__)
