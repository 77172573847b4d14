// Rows [begin, end) of residual_quantize_backward; see residual_quantize_backward.cpp. Included once per SIMD level.
#include "estimator_kernel.h"

typedef float v8f __attribute__((vector_size(32)));
typedef double v8d __attribute__((vector_size(64)));
static inline void load8(const float* p, v8f& v) { __builtin_memcpy(&v, p, 32); }
static inline void load8(const double* p, v8d& v) { __builtin_memcpy(&v, p, 64); }
template <class T>
static inline void load8(const T* p, v8f& v) {  // bf16, f16: exact in float
  const v4d low = load4(p), high = load4(p + 4);
  v = v8f{float(low[0]),  float(low[1]),  float(low[2]),  float(low[3]),
          float(high[0]), float(high[1]), float(high[2]), float(high[3])};
}
template <class R>
struct Eight;
template <>
struct Eight<float> {
  typedef v8f type;
};
template <>
struct Eight<double> {
  typedef v8d type;
};

template <class T>
static inline const T* codeword(const ResidualQuantizeBackwardParams& p, int64_t row, int64_t l) {
  return static_cast<const T*>(p.codebooks[l]) + (row / p.N * p.K[l] + p.indices[row * p.Q + l]) * p.D;
}

// q = c_1 + ... + c_Q and acc = sum_l scale_l r_l, eight features at a time.
template <class T, class R>
static inline void residuals(const ResidualQuantizeBackwardParams& p, const T* z, const T* const* code, R* q, R* acc) {
  const R* scale = static_cast<const R*>(p.commitment_scale);
  int64_t d = 0;
  for (; d + 8 <= p.D; d += 8) {
    typename Eight<R>::type r, c, sum, weighted;
    load8(z + d, r);
    load8(code[0] + d, sum);
    r -= sum;
    weighted = scale[0] * r;
    for (int64_t l = 1; l < p.Q; ++l) {
      load8(code[l] + d, c);
      r -= c;
      sum += c;
      weighted += scale[l] * r;
    }
    __builtin_memcpy(q + d, &sum, sizeof sum);
    __builtin_memcpy(acc + d, &weighted, sizeof weighted);
  }
  for (; d < p.D; ++d) {
    R sum = to_float(code[0][d]), r = to_float(z[d]) - sum, weighted = scale[0] * r;
    for (int64_t l = 1; l < p.Q; ++l) {
      const R c = to_float(code[l][d]);
      r -= c;
      sum += c;
      weighted += scale[l] * r;
    }
    q[d] = sum;
    acc[d] = weighted;
  }
}

// R: the arithmetic, float or double. scratch: 2 D values of R, then Q pointers.
template <class T, class R>
static void backward_rows_of(const ResidualQuantizeBackwardParams& p, void* scratch, int64_t begin, int64_t end) {
  const int64_t D = p.D, Q = p.Q;
  R* q = static_cast<R*>(scratch);  // per_level: the residual r_{l-1}
  R* acc = q + D;
  const T** code = reinterpret_cast<const T**>(static_cast<double*>(scratch) + 2 * D);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* index = p.indices + row * Q;
    const T* z = static_cast<const T*>(p.z) + row * D;
    const T* g = static_cast<const T*>(p.grad) + row * D;
    T* dz = static_cast<T*>(p.dz) + row * D;
    bool skipped = false;
    for (int64_t l = 0; l < Q; ++l) skipped |= index[l] < 0;
    if (skipped) {
      __builtin_memset(dz, 0, D * sizeof(T));
      continue;
    }
    for (int64_t l = 0; l < Q; ++l) code[l] = codeword<T>(p, row, l);
    if (p.per_level) {
      const R* scale = static_cast<const R*>(p.commitment_scale);
      R* r = q;
      for (int64_t d = 0; d < D; ++d) r[d] = to_float(z[d]), acc[d] = 0;
      for (int64_t l = 0; l < Q; ++l) {
        const Weights w =
            p.estimator == Estimator::ste ? Weights{1, 0, 0} : weights(dots(r, code[l], g, D), p.estimator);
        int64_t d = 0;
        for (; d + 4 <= D; d += 4) {
          const v4d rv = load4(r + d), cv = load4(code[l] + d);
          v4d next = rv - cv;  // rounded to R below: the residual of the forward pass
          store4(r + d, next);
          next = load4(r + d);
          store4(acc + d, load4(acc + d) + (w.a * load4(g + d) + w.b * rv + w.c * cv) + scale[l] * next);
        }
        for (; d < D; ++d) {
          const double rv = r[d], cv = to_float(code[l][d]);
          r[d] = static_cast<R>(rv - cv);
          acc[d] = static_cast<R>(acc[d] + (w.a * to_float(g[d]) + w.b * rv + w.c * cv) + scale[l] * double(r[d]));
        }
      }
      for (int64_t d = 0; d < D; ++d) round_to(acc[d], dz + d);
      continue;
    }
    residuals(p, z, code, q, acc);
    const Weights w = p.estimator == Estimator::ste ? Weights{1, 0, 0} : weights(dots(z, q, g, D), p.estimator);
    int64_t d = 0;
    for (; d + 4 <= D; d += 4)
      store4(dz + d, (w.a * load4(g + d) + w.b * load4(z + d) + w.c * load4(q + d)) + load4(acc + d));
    for (; d < D; ++d) {
      const double v = (w.a * to_float(g[d]) + w.b * to_float(z[d]) + w.c * q[d]) + acc[d];
      if constexpr (sizeof(T) == 2) round_to(static_cast<float>(v), dz + d);
      else round_to(v, dz + d);
    }
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
