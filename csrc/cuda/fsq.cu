// fsq: finite scalar quantization (Mentzer et al. 2023), forward with indices, and its straight-through backward.
//
//   in z [N,d], levels [d] -> quantized [N,d] in [-1, 1], indices [N] int32;   in z, grad [N,d] -> dz [N,d]
//
//   value = round(half tanh(z + shift) - offset) / width,  half = (L-1)(1 + 1/1000)/2, width = L/2 rounded down,
//   offset = 1/2 for even L, else 0,  shift = atanh(offset / half)
//   dz = grad half / width / cosh^2(z + shift)
//
//   block = 256 rows, contiguous in memory; thread = 16 bytes of them, then one row:
//     z  --binary search among the thresholds of its feature-->  digit  --> (digit - width) / width
//                                                                 +--> digit basis  --shared memory, sum of a row-->  index
//
// tanh is monotonic, so the level is the number of thresholds atanh((v - 1/2 + offset) / half) - shift that z has
// passed: no tanh, and a threshold in double, rounded up to the next float, decides exactly as the double would: all
// backends agree on every bit. Only beyond 1024 levels is tanh evaluated, in double. The host computes the thresholds
// and hands them over as kernel arguments, so a CUDA graph keeps them.
// Work and bytes: log2 L comparisons and 10 operations a value (backward: about 30) against 2 element sizes (3): memory
// bound. Tiles begin and end with whole rows and are a multiple of 16 bytes, so every access is of 128 bits where the
// tensors are aligned.
// Numerics: forward exact; backward in float (double for double) with 1/cosh = 2h / (1 + h^2), h = exp(-|z + shift|),
// which keeps its digits where 1 - tanh^2 cancels: within about 10 + |z| units in the last place.
// Determinism: rows are independent.
// Shared memory: 1032 d bytes and the thresholds, at most 25 KB; addresses are spread so that neither the pieces nor the
// rows of a warp meet in a bank. Registers: 28 to 44: 5 to 8 blocks a multiprocessor.
// Limits: d up to 30, levels from 2 on with a product below 2^31. Above 256 thresholds the arguments take up to 26 KB,
// which CUDA 12.1 allows.
// Run on emulators only: timings and tuning are open.
#include <cmath>
#include <limits>

#include "pieces.cuh"
#include "vqk/launch.h"

namespace vqk::cuda {
namespace {

constexpr int kThreads = 256, kRows = kThreads;
constexpr int kFew = 256, kMost = 3072;  // thresholds: 3 * 1023 is the most of levels with a product below 2^31
constexpr int kLargest = 1024;           // levels up to which there are thresholds

struct Feature {
  int first, levels, basis;  // first: of its thresholds
};

template <class R, int kCapacity>
struct Table {
  int d, total;
  Feature feature[kFsqMaxFeatures];
  double half[kFsqMaxFeatures], offset[kFsqMaxFeatures], shift[kFsqMaxFeatures];
  R threshold[kCapacity];
};

template <class R>
struct SlopeTable {
  int d;
  R slope[kFsqMaxFeatures], shift[kFsqMaxFeatures];
};

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// Where element e of a tile lies in shared memory.
__device__ inline int spread(int e) { return e + e / 32; }

template <class T, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    fsq_kernel(const T* __restrict__ z, T* __restrict__ quantized, int32_t* __restrict__ indices, int64_t N,
               bool aligned, const Table<wide_t<T>, kCapacity> table) {
  using R = wide_t<T>;
  constexpr int kWidth = Piece<T>::kWidth;
  VQK_DYNAMIC_SHARED(R, thresholds);
  VQK_SHARED(Feature, features, [kFsqMaxFeatures]);
  int32_t* const parts = reinterpret_cast<int32_t*>(thresholds + table.total);
  const int d = table.d;
  for (int i = threadIdx.x; i < table.total; i += kThreads) thresholds[i] = table.threshold[i];
  for (int j = threadIdx.x; j < d; j += kThreads) features[j] = table.feature[j];
  __syncthreads();
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows; row < N; row += static_cast<int64_t>(gridDim.x) * kRows) {
    const int rows = static_cast<int>(N - row < kRows ? N - row : kRows), count = rows * d;
    for (int at = threadIdx.x * kWidth; at < count; at += kThreads * kWidth) {
      const bool whole = aligned && at + kWidth <= count;
      const Piece<T> x = load_piece(z + row * d, at, count, whole);
      Piece<T> y;
      int j = at % d;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Feature f = features[j];
        const R value = static_cast<R>(to_double(x.x[i]));
        const bool large = kCapacity == kMost && f.levels > kLargest, nan = value != value;
        int low = 0, high = large ? 0 : f.levels - 1;  // thresholds below low are passed, from high on are not
        while (low < high) {
          const int middle = (low + high) / 2;
          if (value >= thresholds[f.first + middle]) low = middle + 1;
          else high = middle;
        }
        if (kCapacity == kMost && large && !nan) {
          const double level = rint(table.half[j] * tanh(value + table.shift[j]) - table.offset[j]) + f.levels / 2;
          low = level < 0 ? 0 : level < f.levels ? static_cast<int>(level) : f.levels - 1;
        }
        const int width = f.levels / 2;
        round_to(nan ? value : static_cast<R>(low - width) / static_cast<R>(width), &y.x[i]);
        if (at + i < count) parts[spread(at + i)] = nan ? -1 : low * f.basis;
        j = j + 1 == d ? 0 : j + 1;
      }
      store_piece(quantized + row * d, at, count, whole, y);
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < rows) {
      int index = 0, bad = 0;
      for (int j = 0; j < d; ++j) {
        const int part = parts[spread(threadIdx.x * d + j)];
        index += part;
        bad |= part;
      }
      indices[row + threadIdx.x] = bad < 0 ? -1 : index;
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* __restrict__ z, const T* __restrict__ grad, T* __restrict__ dz, int64_t N, bool aligned,
                    const SlopeTable<wide_t<T>> table) {
  using R = wide_t<T>;
  constexpr int kWidth = Piece<T>::kWidth;
  VQK_SHARED(R, slopes, [kFsqMaxFeatures]);
  VQK_SHARED(R, shifts, [kFsqMaxFeatures]);
  const int d = table.d;
  for (int j = threadIdx.x; j < d; j += kThreads) slopes[j] = table.slope[j], shifts[j] = table.shift[j];
  __syncthreads();
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows; row < N; row += static_cast<int64_t>(gridDim.x) * kRows) {
    const int count = static_cast<int>(N - row < kRows ? N - row : kRows) * d;
    for (int at = threadIdx.x * kWidth; at < count; at += kThreads * kWidth) {
      const bool whole = aligned && at + kWidth <= count;
      const Piece<T> x = load_piece(z + row * d, at, count, whole), g = load_piece(grad + row * d, at, count, whole);
      Piece<T> y;
      int j = at % d;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const R u = static_cast<R>(to_double(x.x[i])) + shifts[j], h = exponential(u < 0 ? u : -u);
        const R sech = 2 * h / (1 + h * h);
        round_to(static_cast<R>(to_double(g.x[i])) * slopes[j] * sech * sech, &y.x[i]);
        j = j + 1 == d ? 0 : j + 1;
      }
      store_piece(dz + row * d, at, count, whole, y);
    }
  }
}

// Half range, offset and shift of a feature.
struct Bounds {
  double half, offset, shift;
};

Bounds bounds(int64_t levels) {
  const double half = static_cast<double>(levels - 1) * (1 + 1e-3) / 2, offset = levels % 2 ? 0.0 : 0.5;
  return {half, offset, std::atanh(offset / half)};
}

// The smallest value of the type that is not below x.
void round_up(double x, double* out) { *out = x; }
void round_up(double x, float* out) {
  const float f = static_cast<float>(x);
  *out = f < x ? std::nextafterf(f, std::numeric_limits<float>::infinity()) : f;
}

template <class T, int kCapacity>
void launch(const FsqParams& p, cudaStream_t stream) {
  using R = wide_t<T>;
  Table<R, kCapacity> table{};
  table.d = static_cast<int>(p.d);
  int64_t basis = 1;
  for (int j = 0; j < p.d; ++j) {
    const int64_t levels = p.levels[j];
    const Bounds b = bounds(levels);
    table.feature[j] = {table.total, static_cast<int>(levels), static_cast<int>(basis)};
    table.half[j] = b.half, table.offset[j] = b.offset, table.shift[j] = b.shift;
    for (int64_t v = 1; v < levels && levels <= kLargest; ++v)
      round_up(std::atanh((static_cast<double>(v - levels / 2) - 0.5 + b.offset) / b.half) - b.shift,
               &table.threshold[table.total++]);
    basis *= levels;
  }
  const T* z = static_cast<const T*>(p.z);
  T* quantized = static_cast<T*>(p.quantized);
  const int64_t elements = kRows * p.d;
  const size_t shared = table.total * sizeof(R) + (elements + elements / 32) * sizeof(int32_t);
  VQK_LAUNCH_TASKS((fsq_kernel<T, kCapacity>), (p.N + kRows - 1) / kRows, kThreads, shared, stream, z,
             quantized, p.indices, p.N, rows_aligned(elements, z, quantized), table);
}

template <class T>
void launch_backward(const FsqBackwardParams& p, cudaStream_t stream) {
  using R = wide_t<T>;
  SlopeTable<R> table{};
  table.d = static_cast<int>(p.d);
  for (int j = 0; j < p.d; ++j) {
    const Bounds b = bounds(p.levels[j]);
    table.slope[j] = static_cast<R>(b.half / static_cast<double>(p.levels[j] / 2));
    table.shift[j] = static_cast<R>(b.shift);
  }
  const T *z = static_cast<const T*>(p.z), *grad = static_cast<const T*>(p.grad);
  T* dz = static_cast<T*>(p.dz);
  VQK_LAUNCH_TASKS(backward_kernel<T>, (p.N + kRows - 1) / kRows, kThreads, 0, stream, z, grad, dz, p.N,
             rows_aligned(kRows * p.d, z, grad, dz), table);
}

}  // namespace

const char* fsq(const FsqParams& p, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (p.N == 0) return nullptr;
  int64_t total = 0;
  bool large = false;
  for (int j = 0; j < p.d; ++j) {
    large |= p.levels[j] > kLargest;
    total += p.levels[j] - 1;
  }
  for_dtype(p.dtype, [&](auto type) {
    if (large || total > kFew) launch<decltype(type), kMost>(p, stream);
    else launch<decltype(type), kFew>(p, stream);
  });
  return launch_error();
}

const char* fsq_backward(const FsqBackwardParams& p, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (p.N == 0) return nullptr;
  for_dtype(p.dtype, [&](auto type) { launch_backward<decltype(type)>(p, stream); });
  return launch_error();
}

}  // namespace vqk::cuda
