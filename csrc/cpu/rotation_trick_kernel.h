// Rows [begin, end) of rotation_trick_backward; see rotation_trick.cpp. Included once per SIMD level, which
// defines STREAM4(float* to, v4f), a store past the caches, and STREAM_DONE(), which makes them visible.
#include "estimator_kernel.h"

static inline void store4(double* p, const v4d& v) { __builtin_memcpy(p, &v, 32); }
static inline void store4(float* p, const v4d& v) {
  const v4f f = __builtin_convertvector(v, v4f);
  __builtin_memcpy(p, &f, 16);
}
template <class T>
static inline void store4(T* p, const v4d& v) {  // bf16, f16
  for (int i = 0; i < 4; ++i) round_to(static_cast<float>(v[i]), p + i);
}
static inline void stream4(float* p, const v4d& v) { STREAM4(p, __builtin_convertvector(v, v4f)); }
template <class T>
static inline void stream4(T* p, const v4d& v) { store4(p, v); }

template <bool stream, class T>
static void rotation_rows_of(const RotationTrickBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t D = p.D;
  for (int64_t n = begin; n < end; ++n) {
    const T* z = static_cast<const T*>(p.z) + n * D;
    const T* q = static_cast<const T*>(p.q) + n * D;
    const T* g = static_cast<const T*>(p.grad) + n * D;
    T* dz = static_cast<T*>(p.dz) + n * D;
    const Weights w = weights(dots(z, q, g, D), p.estimator);
    if (w.b == 0 && w.c == 0 && w.a == 1) {  // straight-through: g bit for bit, even beside a NaN
      __builtin_memcpy(dz, g, D * sizeof(T));
      continue;
    }
    int64_t d = 0;
    for (; d + 4 <= D; d += 4) {
      const v4d v = w.a * load4(g + d) + w.b * load4(z + d) + w.c * load4(q + d);
      if (stream) stream4(dz + d, v);
      else store4(dz + d, v);
    }
    for (; d < D; ++d) {
      const double v = w.a * to_float(g[d]) + w.b * to_float(z[d]) + w.c * to_float(q[d]);
      if constexpr (sizeof(T) == 2) round_to(static_cast<float>(v), dz + d);
      else round_to(v, dz + d);
    }
  }
}

static void rotation_rows_here(const RotationTrickBackwardParams& p, bool stream, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f64: return rotation_rows_of<false, double>(p, begin, end);
    case DType::bf16: return rotation_rows_of<false, bf16>(p, begin, end);
    case DType::f16: return rotation_rows_of<false, f16>(p, begin, end);
    default: break;
  }
  if (!stream) return rotation_rows_of<false, float>(p, begin, end);
  rotation_rows_of<true, float>(p, begin, end);
  STREAM_DONE();
}
