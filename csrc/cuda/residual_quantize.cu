// residual_quantize: r_0 = z; k_l = nearest(r_{l-1}); r_l = r_{l-1} - c_l; quantized = (c_1 + c_2) + ...
#include "search.cuh"
#include "vqk/launch.h"

namespace vqk::cuda {
namespace {

constexpr int kScanThreads = 128;
constexpr int kLossThreads = 256;

// One level, where kernels find it: in device memory, because Q has no limit.
struct Level {
  const void* codebook;  // [H,K,D] dtype
  const void* unit;      // cosine: normalised, float (double for f64)
  int64_t K;
};

__global__ void set_level_kernel(Level* to, Level level) { *to = level; }

// One warp takes one row through all levels. residual [rows,D]; sums [Q,rows]; counts [rows].
template <class T>
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const T* z, const Level* __restrict__ levels, const bool* __restrict__ mask, wide_t<T>* residual,
                wide_t<T>* unit, int64_t* indices, T* quantized, double* __restrict__ sums, int64_t* __restrict__ counts, int64_t rows,
                int64_t N, int64_t Q, int64_t D, Metric metric) {
  using A = wide_t<T>;
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kScanThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kScanThreads / 32) + threadIdx.x / 32; row < rows;
       row += step) {
    const bool masked = mask && !mask[row];
    bool alive = !masked;
    A* r = residual + row * D;
    for (int64_t d = lane; d < D; d += 32) r[d] = static_cast<A>(to_double(z[row * D + d]));
    for (int64_t l = 0; l < Q && alive; ++l) {
      __syncwarp();
      const int64_t K = levels[l].K;
      const T* codebook = static_cast<const T*>(levels[l].codebook) + row / N * K * D;
      int64_t index;
      if (metric == Metric::cosine) {
        normalize_rows(residual, unit, row, row + 1, D);
        __syncwarp();
        index = scan_row(unit + row * D, static_cast<const A*>(levels[l].unit) + row / N * K * D, K, D, false).index;
      } else {
        index = scan_row(r, codebook, K, D, metric == Metric::l2).index;
      }
      alive = index >= 0;
      if (!alive) break;
      __syncwarp();
      double square = 0;
      for (int64_t d = lane; d < D; d += 32) {
        const A x = r[d] - static_cast<A>(to_double(codebook[index * D + d]));
        r[d] = x;
        square += static_cast<double>(x) * x;
      }
      square = warp_sum(square);
      if (lane == 0) indices[row * Q + l] = index, sums[l * rows + row] = square;
    }
    bool finite = true;
    for (int64_t d = lane; d < D; d += 32) finite = finite && fabs(static_cast<double>(r[d])) < HUGE_VAL;
    alive = __all_sync(kFullWarp, finite) && alive;
    if (!alive)
      for (int64_t l = lane; l < Q; l += 32) indices[row * Q + l] = -1, sums[l * rows + row] = 0;
    __syncwarp();
    if (lane == 0) counts[row] = alive;
    for (int64_t d = lane; d < D; d += 32) {
      A total = masked ? 0 : NAN;
      for (int64_t l = 0; l < Q && alive; ++l) {
        const int64_t at = (row / N * levels[l].K + indices[row * Q + l]) * D + d;
        const A c = static_cast<A>(to_double(static_cast<const T*>(levels[l].codebook)[at]));
        total = l == 0 ? c : total + c;
      }
      round_to(total, quantized + row * D + d);
    }
  }
}

// Block l: losses[l] = sum of sums[l,:] / (valid rows x D); valid = sum of counts. In one fixed order.
template <class A>
__global__ void __launch_bounds__(kLossThreads)
    losses_kernel(const double* __restrict__ sums, const int64_t* __restrict__ counts, A* losses, int64_t* valid,
                  int64_t parts, int64_t D) {
  VQK_SHARED(double, total, [kLossThreads]);
  VQK_SHARED(int64_t, count, [kLossThreads]);
  double t = 0;
  int64_t c = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kLossThreads) {
    t += sums[blockIdx.x * parts + i];
    c += counts[i];
  }
  total[threadIdx.x] = t;
  count[threadIdx.x] = c;
  for (int half = kLossThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      total[threadIdx.x] += total[threadIdx.x + half];
      count[threadIdx.x] += count[threadIdx.x + half];
    }
  }
  if (threadIdx.x) return;
  const int64_t rows = count[0];
  losses[blockIdx.x] = static_cast<A>(total[0] / (static_cast<double>(rows > 1 ? rows : 1) * D));
  if (blockIdx.x == 0) *valid = rows;
}

struct Workspace {
  Level* levels;
  void* residual;  // [H,N,D] float (double for f64), as are
  void* unit;      // [H,N,D] for cosine, and
  void* units;     // the normalised codebooks, one after the other
  double* sums;    // [Q,parts]
  int64_t* counts;  // [parts]
  int64_t parts, bytes;

  Workspace(const ResidualQuantizeParams& p, void* base) : parts(p.H * p.N) {
    Scratch scratch(base);
    levels = scratch.take<Level>(p.Q);
    residual = dtype_size(p.dtype) > 2 ? p.quantized : scratch.take<float>(p.H * p.N * p.D);
    const int64_t size = p.metric != Metric::cosine ? 0 : p.dtype == DType::f64 ? 8 : 4;
    int64_t codes = 0;
    for (int64_t l = 0; l < p.Q; ++l) codes += p.K[l];
    unit = scratch.take<char>(size * p.H * p.N * p.D);
    units = scratch.take<char>(size * p.H * codes * p.D);
    sums = scratch.take<double>(p.Q * parts);
    counts = scratch.take<int64_t>(parts);
    bytes = scratch.bytes();
  }
};

template <class T>
void run(const ResidualQuantizeParams& p, void* workspace, cudaStream_t stream) {
  using A = wide_t<T>;
  const Workspace w(p, workspace);
  const int64_t rows = p.H * p.N;
  A* unit = static_cast<A*>(w.units);
  for (int64_t l = 0; l < p.Q; ++l) {
    VQK_LAUNCH(set_level_kernel, 1, 1, 0, stream, w.levels + l, (Level{p.codebooks[l], unit, p.K[l]}));
    if (p.metric != Metric::cosine) continue;
    normalize<T>(p.codebooks[l], unit, p.H * p.K[l], p.D, stream);
    unit += p.H * p.K[l] * p.D;
  }
  if (rows > 0)
    VQK_LAUNCH(scan_kernel<T>, grid_size((rows + 3) / 4, 16), kScanThreads, 0, stream, static_cast<const T*>(p.z),
               w.levels, p.mask, static_cast<A*>(w.residual), static_cast<A*>(w.unit), p.indices, static_cast<T*>(p.quantized), w.sums, w.counts,
               rows, p.N, p.Q, p.D, p.metric);
  VQK_LAUNCH(losses_kernel<A>, static_cast<unsigned>(p.Q), kLossThreads, 0, stream, w.sums, w.counts,
             static_cast<A*>(p.losses), p.valid, w.parts, p.D);
}

}  // namespace

int64_t residual_quantize_workspace(const ResidualQuantizeParams& p) { return Workspace(p, nullptr).bytes; }

const char* residual_quantize(const ResidualQuantizeParams& p, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  for_dtype(p.dtype, [&](auto type) { run<decltype(type)>(p, workspace, stream); });
  return launch_error();
}

}  // namespace vqk::cuda
