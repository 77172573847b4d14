// Rows [begin, end) of rotation_trick_backward; see rotation_trick.cpp. Included once per SIMD level, which
// defines STREAM4(float* to, v4f), a store past the caches, and STREAM_DONE(), which makes them visible.
#include "estimator_kernel.h"

template <bool stream, class T>
static void rotation_rows_of(const RotationTrickBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t D = p.D, line = 64 / sizeof(T);
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
      if (d % line == 0) {  // the next row, while this one is computed
        __builtin_prefetch(z + D + d);
        __builtin_prefetch(q + D + d);
        __builtin_prefetch(g + D + d);
      }
      const v4d v = w.a * load4(g + d) + w.b * load4(z + d) + w.c * load4(q + d);
      if constexpr (stream) STREAM4(dz + d, narrow(v));
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
