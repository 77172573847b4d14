// The gradient estimators as weights of three vectors: docs/numerics.md, csrc/cpu/estimator_kernel.h.
#pragma once
#include "common.cuh"
#include "vqk/params.h"

namespace vqk::cuda {

struct Dots {
  double zz, qq, zq, zg, qg;

  __device__ void add(double z, double q, double g) {
    zz += z * z;
    qq += q * q;
    zq += z * q;
    zg += z * g;
    qg += q * g;
  }
};

// dz = a g + b z + c q
struct Weights {
  double a, b, c;

  __device__ bool straight() const { return a == 1 && b == 0 && c == 0; }  // then g bit for bit, even beside a NaN
  __device__ double apply(double z, double q, double g) const { return straight() ? g : a * g + b * z + c * q; }
};

__device__ inline Weights weights(const Dots& t, Estimator estimator) {
  const Weights straight = {1, 0, 0};
  const double nz = sqrt(t.zz), nq = sqrt(t.qq), gamma = nq / nz;
  if (!(nz > 0 && nq > 0 && gamma >= 1e-6 && gamma <= 1e6)) return straight;  // also NaN and infinity
  const double sign = estimator == Estimator::rotation ? 1 : -1;
  const double length2 = 2 + sign * 2 * (t.zq / (nz * nq));
  if (!(length2 >= 1e-6)) return straight;
  const double zgn = t.zg / nz, qgn = t.qg / nq, along = 2 * (zgn + sign * qgn) / length2;
  const double b = estimator == Estimator::rotation ? 2 * qgn - along : -along;
  return {gamma, gamma * b / nz, -sign * gamma * along / nq};
}

}  // namespace vqk::cuda
