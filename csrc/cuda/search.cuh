// What the searches share: canonical values, scanning a codebook with them, scratch memory (proofs: docs/numerics.md).
#pragma once
#include <cmath>

#include "pieces.cuh"
#include "vqk/error_bound.h"
#include "vqk/params.h"

namespace vqk::cuda {

constexpr int64_t kScanWork = 1 << 16;  // N K D of one head, up to which one launch is better than five

inline int64_t dtype_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

__device__ inline bool finite(double x) { return fabs(x) < HUGE_VAL; }

// A launcher's workspace, cut into arrays; with a null base only counted.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* at = base_ + bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return base_ ? reinterpret_cast<T*>(at) : nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

// Canonical values: float64, feature after feature, every operation rounded by itself.
__device__ inline double canonical_step(double total, double a, double b, bool l2) {
  const double difference = __dsub_rn(a, b);
  return l2 ? __dadd_rn(total, __dmul_rn(difference, difference)) : __dadd_rn(total, __dmul_rn(a, b));
}

// Of two candidates the lower value, on ties the lower index; index -1 is no candidate.
__device__ inline void keep_lower(double value, int64_t index, double& best, int64_t& best_index) {
  const bool better = index >= 0 && (best_index < 0 || value < best || (value == best && index < best_index));
  if (better) best = value, best_index = index;
}

struct Found {
  double value;   // canonical, the lowest
  int64_t index;  // -1: the row has no nearest codeword
};

// One warp compares one row with every codeword. All lanes get the result.
template <class Row, class Code>
__device__ Found scan_row(const Row* x, const Code* codebook, int64_t K, int64_t D, bool l2) {
  const int lane = threadIdx.x % 32;
  bool hopeless = false;  // the row, or a sum of overflowing products, is not a number
  for (int64_t d = lane; d < D; d += 32) hopeless = hopeless || !finite(to_double(x[d]));
  Found found = {HUGE_VAL, -1};
  for (int64_t k = lane; k < K; k += 32) {
    bool usable = true;
    double total = 0;
    for (int64_t d = 0; d < D; ++d) {
      const double c = to_double(codebook[k * D + d]);
      usable = usable && finite(c);
      total = canonical_step(total, to_double(x[d]), c, l2);
    }
    if (!usable) continue;
    hopeless = hopeless || total != total;
    keep_lower(l2 ? total : -total, k, found.value, found.index);
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    const double value = __shfl_xor_sync(kFullWarp, found.value, offset);
    const int64_t index = __shfl_xor_sync(kFullWarp, found.index, offset);
    keep_lower(value, index, found.value, found.index);
  }
  if (__any_sync(kFullWarp, hopeless)) found.index = -1;
  return found;
}

// x / length, rounded as IEEE 754 has it. Of numbers that were float32 two corrections of x * (1 / length) give just
// that, because nothing on the way is subnormal or overflows; division in general calls a function, which costs
// registers that a kernel's other values are in.
template <class T>
__device__ double quotient(T x, double length, double reciprocal) {
  const double a = to_double(x);
  if (std::is_same_v<T, double>) return __ddiv_rn(a, length);
  double q = a * reciprocal;
  q = __fma_rn(__fma_rn(-q, length, a), reciprocal, q);
  return __fma_rn(__fma_rn(-q, length, a), reciprocal, q);
}

// 32 rows of x divided by their lengths, each value rounded once: a warp's part of l2-normalising rows [0, rows). The
// length is added as canonical values are; a row of zeros stays so, and NaN or infinity leaves a NaN.
template <class T>
__device__ void normalize_rows(const T* x, wide_t<T>* out, int64_t first, int64_t rows, int64_t D) {
  const int lane = threadIdx.x % 32;
  double total = 0;
  if (first + lane < rows)
    for (int64_t d = 0; d < D; ++d) {
      const double v = to_double(x[(first + lane) * D + d]);
      total = canonical_step(total, v, v, false);
    }
  const double length = __dsqrt_rn(total), inverse = 1 / length;
  for (int i = 0; i < 32 && first + i < rows; ++i) {
    const double divisor = __shfl_sync(kFullWarp, length, i), reciprocal = __shfl_sync(kFullWarp, inverse, i);
    for (int64_t d = lane; d < D; d += 32) {
      const int64_t at = (first + i) * D + d;
      round_to(divisor == 0 ? 0.0 : quotient(x[at], divisor, reciprocal), out + at);
    }
  }
}

constexpr int kNormalizeThreads = 128;

namespace {  // each file has kernels of its own

template <class T>
__global__ void __launch_bounds__(kNormalizeThreads)
    normalize_kernel(const T* __restrict__ x, wide_t<T>* __restrict__ out, int64_t rows, int64_t D) {
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kNormalizeThreads + threadIdx.x / 32 * 32; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kNormalizeThreads)
    normalize_rows(x, out, first, rows, D);
}

}  // namespace

template <class T>
void normalize(const void* x, void* out, int64_t rows, int64_t D, cudaStream_t stream) {
  VQK_LAUNCH_TASKS(normalize_kernel<T>, (rows + kNormalizeThreads - 1) / kNormalizeThreads, kNormalizeThreads, 0,
                   stream, static_cast<const T*>(x), static_cast<wide_t<T>*>(out), rows, D);
}

}  // namespace vqk::cuda
