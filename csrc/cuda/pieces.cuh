// 16 bytes of a row at a time: one 128-bit access where rows are aligned, else element by element.
#pragma once
#include "common.cuh"
#include "ptx.cuh"
#include "vqk/params.h"

namespace vqk::cuda {

template <class T>
struct alignas(16) Piece {
  static constexpr int kWidth = 16 / sizeof(T);
  T x[kWidth];
};

// The arithmetic of a dtype: float, or double for double.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

// Whether every row of D elements begins at a multiple of 16 bytes and ends with a whole piece.
template <class T, class... More>
bool rows_aligned(int64_t D, const T* first, const More*... more) {
  const uintptr_t pointers = (reinterpret_cast<uintptr_t>(first) | ... | reinterpret_cast<uintptr_t>(more));
  return D % Piece<T>::kWidth == 0 && pointers % 16 == 0;
}

// Elements [at, at + kWidth) of a row of D; zeros from D on. Index: int where it is enough, which saves registers.
template <class T, class Index>
__device__ __forceinline__ Piece<T> load_piece(const T* row, Index at, Index D, bool aligned) {
  Piece<T> piece;
  if (aligned && at < D) {
    piece = *reinterpret_cast<const Piece<T>*>(row + at);
  } else {
#pragma unroll
    for (int i = 0; i < Piece<T>::kWidth; ++i) piece.x[i] = at + i < D ? row[at + i] : T(0.0f);
  }
  return piece;
}

template <class T, class Index>
__device__ __forceinline__ void store_piece(T* row, Index at, Index D, bool aligned, const Piece<T>& piece) {
  if (aligned && at < D) {
    *reinterpret_cast<Piece<T>*>(row + at) = piece;
  } else {
#pragma unroll
    for (int i = 0; i < Piece<T>::kWidth; ++i)
      if (at + i < D) row[at + i] = piece.x[i];
  }
}

// Calls run with a value of the dtype's type.
template <class Run>
void for_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f64: return run(double{});
    case DType::bf16: return run(__nv_bfloat16{});
    case DType::f16: return run(__half{});
    default: return run(float{});
  }
}

}  // namespace vqk::cuda
