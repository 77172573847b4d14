// Rows [begin, end) of residual_quantize_backward; see residual_quantize_backward.cpp. Included once per SIMD level.
#include "estimator_kernel.h"

// out[d] += w.a g[d] + w.b z[d] + w.c q[d], the three terms in double: they cancel where z is close to -q.
template <class R>
static inline void add_weighted(const Weights& w, const R* g, const R* z, const R* q, R* out, int64_t D) {
  if (w.b == 0 && w.c == 0) {
    const R a = static_cast<R>(w.a);
    for (int64_t d = 0; d < D; ++d) out[d] += a * g[d];
    return;
  }
  for (int64_t d = 0; d < D; ++d) out[d] += static_cast<R>(w.a * g[d] + w.b * z[d] + w.c * q[d]);
}

// R: the arithmetic, float or double. scratch: 5 D values of R.
template <class T, class R>
static void backward_rows_of(const ResidualQuantizeBackwardParams& p, void* scratch, int64_t begin, int64_t end) {
  const int64_t D = p.D, Q = p.Q;
  R* __restrict z = static_cast<R*>(scratch);
  R* __restrict g = z + D;
  R* __restrict r = g + D;
  R* __restrict c = r + D;
  R* __restrict q = c + D;
  const R* scale = static_cast<const R*>(p.commitment_scale);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* index = p.indices + row * Q;
    T* dz = static_cast<T*>(p.dz) + row * D;
    bool skipped = false;
    for (int64_t l = 0; l < Q; ++l) skipped |= index[l] < 0;
    if (skipped) {
      __builtin_memset(dz, 0, D * sizeof(T));
      continue;
    }
    const T* z_row = static_cast<const T*>(p.z) + row * D;
    const T* g_row = static_cast<const T*>(p.grad) + row * D;
    R* __restrict out = p.per_level ? q : z;  // q is not needed per level; z is not needed after the dots
    for (int64_t d = 0; d < D; ++d) {
      r[d] = z[d] = to_float(z_row[d]);
      g[d] = to_float(g_row[d]);
      q[d] = 0;
    }
    if (!p.per_level) {
      for (int64_t l = 0; l < Q; ++l) {
        const T* code = static_cast<const T*>(p.codebooks[l]) + (row / p.N * p.K[l] + index[l]) * D;
        if (l == 0) for (int64_t d = 0; d < D; ++d) q[d] = to_float(code[d]);
        else for (int64_t d = 0; d < D; ++d) q[d] += to_float(code[d]);
      }
      const Weights w = weights(dots(z, q, g, D), p.estimator);
      for (int64_t d = 0; d < D; ++d) c[d] = 0;
      add_weighted(w, g, z, q, c, D);
      for (int64_t d = 0; d < D; ++d) out[d] = c[d];
    }
    for (int64_t l = 0; l < Q; ++l) {
      const T* code = static_cast<const T*>(p.codebooks[l]) + (row / p.N * p.K[l] + index[l]) * D;
      const R s = scale[l];
      if (p.per_level) {
        for (int64_t d = 0; d < D; ++d) c[d] = to_float(code[d]);
        add_weighted(weights(dots(r, c, g, D), p.estimator), g, r, c, out, D);
      }
      for (int64_t d = 0; d < D; ++d) {
        r[d] -= to_float(code[d]);
        out[d] += s * r[d];
      }
    }
    for (int64_t d = 0; d < D; ++d) round_to(out[d], dz + d);
  }
}

static void backward_rows_here(const ResidualQuantizeBackwardParams& p, void* scratch, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f64: return backward_rows_of<double, double>(p, scratch, begin, end);
    case DType::bf16: return backward_rows_of<bf16, float>(p, scratch, begin, end);
    case DType::f16: return backward_rows_of<f16, float>(p, scratch, begin, end);
    default: return backward_rows_of<float, float>(p, scratch, begin, end);
  }
}
