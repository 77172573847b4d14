// Transposed Jacobians of the gradient estimators on one row, for every SIMD level: each including file
// compiles this source in its own namespace under its own `#pragma GCC target`.
//
// With zh = z/|z|, qh = q/|q|, gamma = |q|/|z|:
//   rotation    s = zh + qh   dz = gamma (g - 2 s (s.g)/|s|^2 + 2 zh (qh.g))
//   reflection  s = zh - qh   dz = gamma (g - 2 s (s.g)/|s|^2)
//   ste                       dz = g
// All are a g + b z + c q with three numbers a row, made from five dot products.
//
// Numerics: the dots are added in double in 8 lanes (lane = d mod 8), combined in one fixed order; products
// of two floats are exact in double. Levels differ only in how many lanes an instruction holds, so every
// level and thread count returns the same bits. Degenerate rows are straight-through (docs/numerics.md).

typedef double v4d __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));

static inline v4d load4(const double* p) { v4d v; __builtin_memcpy(&v, p, 32); return v; }
static inline v4d load4(const float* p) {
  v4f v;
  __builtin_memcpy(&v, p, 16);
  return __builtin_convertvector(v, v4d);
}
template <class T>
static inline v4d load4(const T* p) {  // bf16, f16
  return v4d{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

struct Dots { double zz, qq, zq, zg, qg; };
struct Weights { double a, b, c; };  // dz = a g + b z + c q

static inline double sum8(const v4d* half) {
  const v4d s = half[0] + half[1];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

template <class T>
static inline Dots dots(const T* z, const T* q, const T* g, int64_t D) {
  v4d zz[2] = {}, qq[2] = {}, zq[2] = {}, zg[2] = {}, qg[2] = {};
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    for (int half = 0; half < 2; ++half) {
      const v4d zv = load4(z + d + 4 * half), qv = load4(q + d + 4 * half), gv = load4(g + d + 4 * half);
      zz[half] += zv * zv;
      qq[half] += qv * qv;
      zq[half] += zv * qv;
      zg[half] += zv * gv;
      qg[half] += qv * gv;
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
  const double nz = __builtin_sqrt(t.zz), nq = __builtin_sqrt(t.qq), gamma = nq / nz;
  if (!(nz > 0 && nq > 0 && gamma >= 1e-6 && gamma <= 1e6)) return straight;  // also NaN and infinity
  const double cosine = t.zq / (nz * nq), zg = t.zg / nz, qg = t.qg / nq;
  if (estimator == Estimator::rotation) {
    const double length2 = 2 + 2 * cosine;
    if (!(length2 >= 1e-6)) return straight;
    const double along = 2 * (zg + qg) / length2;
    return {gamma, gamma * (2 * qg - along) / nz, -gamma * along / nq};
  }
  const double length2 = 2 - 2 * cosine;
  if (!(length2 >= 1e-6)) return straight;
  const double along = 2 * (zg - qg) / length2;
  return {gamma, -gamma * along / nz, gamma * along / nq};
}
