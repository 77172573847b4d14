// Eight floats from and to every dtype, and their exponential, for every SIMD level: each including file compiles this
// source in an unnamed namespace under its own `#pragma GCC target`, after half.h; VQK_AVX2 selects the instructions.
#pragma once
#include "vector_kernel.h"

typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));

struct v4f2 {
  v4f lo, hi;
};
static inline v8f join(const v4f& lo, const v4f& hi) { return __builtin_shufflevector(lo, hi, 0, 1, 2, 3, 4, 5, 6, 7); }
static inline v4f2 halves(const v8f& v) {
  return {__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)};
}
static inline v8f load8(const float* p) {
  v8f v;
  __builtin_memcpy(&v, p, 32);
  return v;
}
template <class T>
static inline v8f load8(const T* p) {
  return join(narrow(load4(p)), narrow(load4(p + 4)));  // 16-bit values are exact in every step
}
static inline void store8(float* p, const v8f& v) { __builtin_memcpy(p, &v, 32); }
template <class T>
static inline void store8(T* p, const v8f& v) {
  const v4f2 h = halves(v);
  store4(p, widen(h.lo));
  store4(p + 4, widen(h.hi));
}

// e^x for x <= 0, to about 2 units in the last place: x = n ln 2 + r, a polynomial of degree 6 in r, times 2^n.
static inline v8f exp_negative(v8f x) {
  const v8i low = x < -87.0f;
  x = (v8f)(((v8i)(v8f{} - 87.0f) & low) | ((v8i)x & ~low));
  const v8f magic = v8f{} + 0x1.8p23f, shifted = x * 0x1.715476p0f + magic, n = shifted - magic;
  const v8f r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  v8f y = v8f{} + 0x1.6c16c2p-10f;
  y = y * r + 0x1.111112p-7f;
  y = y * r + 0x1.555556p-5f;
  y = y * r + 0x1.555556p-3f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const v8i scale = ((v8i)shifted << 23) + 0x3f800000;  // the low bits of `shifted` are n
  return y * (v8f)scale;
}
