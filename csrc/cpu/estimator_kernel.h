// Transposed Jacobians of the gradient estimators on one row, for every SIMD level: each including file
// compiles this source in an unnamed namespace under its own `#pragma GCC target`.
//
// With zh = z/|z|, qh = q/|q|, gamma = |q|/|z|:
//   rotation    s = zh + qh   dz = gamma (g - 2 s (s.g)/|s|^2 + 2 zh (qh.g))
//   reflection  s = zh - qh   dz = gamma (g - 2 s (s.g)/|s|^2)
//   ste                       dz = g
// All are a g + b z + c q with three numbers a row, made from five dot products.
//
// Numerics: the dots are added in double in 8 lanes (lane = d mod 8), combined in one fixed order. Products of
// two floats are exact in double, so a fused multiply-add, where the level has one, rounds to the same bits as
// a product and a sum. Levels and thread counts therefore return the same bits. Degenerate rows are
// straight-through (docs/numerics.md, "Rotation").

#include "vector_kernel.h"

// sum + a b. `exact`: the product is exact in double, so fusing changes nothing.
template <bool exact>
static inline void add_product(v4d& sum, const v4d& a, const v4d& b) {
#if defined(VQK_AVX2)
  if constexpr (exact) {
    sum = (v4d)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
    return;
  }
#endif
  sum += a * b;
}

static inline double sum8(const v4d* half) {
  const v4d s = half[0] + half[1];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

struct Dots {
  double zz, qq, zq, zg, qg;
};
struct Weights {
  double a, b, c;
};  // dz = a g + b z + c q

template <class Z, class Q, class G>
static inline Dots dots(const Z* z, const Q* q, const G* g, int64_t D) {
  constexpr bool exact = sizeof(Z) < 8 && sizeof(Q) < 8 && sizeof(G) < 8;
  v4d zz[2] = {}, qq[2] = {}, zq[2] = {}, zg[2] = {}, qg[2] = {};
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    for (int half = 0; half < 2; ++half) {
      const v4d zv = load4(z + d + 4 * half), qv = load4(q + d + 4 * half), gv = load4(g + d + 4 * half);
      add_product<exact>(zz[half], zv, zv);
      add_product<exact>(qq[half], qv, qv);
      add_product<exact>(zq[half], zv, qv);
      add_product<exact>(zg[half], zv, gv);
      add_product<exact>(qg[half], qv, gv);
    }
  }
  for (; d < D; ++d) {
    const int half = (d & 7) >> 2, lane = d & 3;
    const double zv = to_float(z[d]), qv = to_float(q[d]), gv = to_float(g[d]);
    zz[half][lane] += zv * zv;
    qq[half][lane] += qv * qv;
    zq[half][lane] += zv * qv;
    zg[half][lane] += zv * gv;
    qg[half][lane] += qv * gv;
  }
  return {sum8(zz), sum8(qq), sum8(zq), sum8(zg), sum8(qg)};
}

static inline Weights weights(const Dots& t, Estimator estimator) {
  const Weights straight = {1, 0, 0};
  if (estimator == Estimator::ste) return straight;
  const double nz = __builtin_sqrt(t.zz), nq = __builtin_sqrt(t.qq), iz = 1 / nz, iq = 1 / nq, gamma = nq * iz;
  if (!(nz > 0 && nq > 0 && gamma >= 1e-6 && gamma <= 1e6)) return straight;  // also NaN and infinity
  const double cosine = t.zq * iz * iq, zg = t.zg * iz, qg = t.qg * iq;
  const double sign = estimator == Estimator::rotation ? 1 : -1;
  const double length2 = 2 + sign * 2 * cosine;
  if (!(length2 >= 1e-6)) return straight;
  const double along = 2 * (zg + sign * qg) / length2, back = estimator == Estimator::rotation ? 2 * qg : 0;
  return {gamma, gamma * (back - along) * iz, -sign * gamma * along * iq};
}
