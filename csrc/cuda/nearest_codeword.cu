// nearest_codeword: indices[h,n] = argmin_k d(z[h,n], codebook[h,k]), ties to the lowest k; distances: its value.
#include "search.cuh"
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

struct Workspace {
  void *unit_z, *unit_codebook;  // cosine: normalised, float (double for f64)
  int64_t bytes;

  Workspace(const NearestCodewordParams& p, void* base) {
    Scratch scratch(base);
    const int64_t size = p.dtype == DType::f64 ? 8 : 4, cosine = p.metric == Metric::cosine;
    unit_z = scratch.take<char>(cosine * size * p.H * p.N * p.D);
    unit_codebook = scratch.take<char>(cosine * size * p.H * p.K * p.D);
    bytes = scratch.bytes();
  }
};

// z and codebook as they are compared: as they came, or normalised.
template <class T>
void search(const NearestCodewordParams& p, const void* z, const void* codebook, const Workspace& w,
            cudaStream_t stream) {
  const int64_t rows = p.H * p.N;
  VQK_LAUNCH(scan_kernel<T>, grid_size((rows + 3) / 4, 16), kScanThreads, 0, stream, static_cast<const T*>(z),
             static_cast<const T*>(codebook), p.mask, p.indices, static_cast<wide_t<T>*>(p.distances), rows, p.N, p.K,
             p.D, p.metric);
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
