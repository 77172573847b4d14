// The additions of codeword_sums; see codeword_sums.cpp. Included once per SIMD level.
#include "vector_kernel.h"

// Asks for memory that is needed soon, into L2: the first-level cache has too few requests in flight for data that come from
// memory beside the sums that go to and fro between L1 and L2, and they would wait for each other.
static inline void prefetch(const char* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
}

template <class T>
static inline void add_row(const T* row, double* sum, int64_t width) {
  int64_t d = 0;
#pragma GCC unroll 4
  for (; d + 4 <= width; d += 4) store4(sum + d, load4(sum + d) + load4(row + d));
  for (; d < width; ++d) sum[d] += static_cast<double>(to_float(row[d]));
}

template <class T, class Out>
static void add_piece(const CodewordSumsParams& p, const SumPiece& piece, double* sum) {
  const int64_t width = piece.end - piece.begin, last = piece.offsets[piece.last], bytes = width * sizeof(T);
  const T* z = static_cast<const T*>(p.z) + piece.h * p.N * p.D + piece.begin;
  for (int64_t k = piece.first; k < piece.last; ++k) {
    for (int64_t d = 0; d < width; ++d) sum[d] = 0;
    for (int64_t i = piece.offsets[k]; i < piece.offsets[k + 1]; ++i) {
      if (i + 8 < last)  // rows of one codeword lie anywhere: no hardware prefetcher guesses the next
        prefetch(reinterpret_cast<const char*>(z + piece.rows[i + 8] * p.D), bytes);
      add_row(z + piece.rows[i] * p.D, sum, width);
    }
    Out* out = static_cast<Out*>(p.sums) + (piece.h * p.K + k) * p.D + piece.begin;
    for (int64_t d = 0; d < width; ++d) round_to(sum[d], out + d);
  }
}

static void add_piece_here(const CodewordSumsParams& p, const SumPiece& piece, double* sum) {
  switch (p.dtype) {
    case DType::f64: return add_piece<double, double>(p, piece, sum);
    case DType::bf16: return add_piece<bf16, float>(p, piece, sum);
    case DType::f16: return add_piece<f16, float>(p, piece, sum);
    default: return add_piece<float, float>(p, piece, sum);
  }
}

template <class T>
static void add_slice(const CodewordSumsParams& p, const SumSlice& slice) {
  const int64_t width = slice.end - slice.begin, bytes = width * sizeof(T), rows_ahead = (8191 + bytes) / bytes;
  const int64_t* index = p.indices + slice.h * p.N;
  const T* z = static_cast<const T*>(p.z) + slice.h * p.N * p.D + slice.begin;
  for (int64_t i = 0; i < p.K * width; ++i) slice.sums[i] = 0;
  for (int64_t n = slice.first; n < slice.last; ++n) {
    prefetch(reinterpret_cast<const char*>(z + (n + rows_ahead) * p.D), bytes);
    const int64_t k = index[n];
    if (static_cast<uint64_t>(k) < static_cast<uint64_t>(p.K)) {
      add_row(z + n * p.D, slice.sums + k * width, width);
      if (slice.counts) ++slice.counts[k];
    } else if (slice.counts && k >= 0 && *slice.bad < 0) {
      *slice.bad = k;
    }
  }
}

static void add_slice_here(const CodewordSumsParams& p, const SumSlice& slice) {
  switch (p.dtype) {
    case DType::f64: return add_slice<double>(p, slice);
    case DType::bf16: return add_slice<bf16>(p, slice);
    case DType::f16: return add_slice<f16>(p, slice);
    default: return add_slice<float>(p, slice);
  }
}
