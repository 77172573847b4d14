// How far a coarse fp32 score can be from the canonical one: proved in docs/numerics.md.
// `static`, so that no SIMD-level translation unit exports its own machine code for everybody.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define VQK_HOST_DEVICE __host__ __device__
#else
#define VQK_HOST_DEVICE
#endif

namespace vqk {

// A number eps with |coarse - canonical| <= eps, both as scores that the nearest codeword minimises:
//   l2:  |c|^2 / 2 - z.c, the canonical distance being 2 * score + |z|^2      dot, cosine:  -z.c
// for every codeword with |c| <= c_norm, or +inf where no such promise can be made (the fp32
// arithmetic might overflow, or D is beyond what 24 bits can add up): such rows are compared with
// every codeword canonically. It holds for D multiply-adds in any order, fused or not, in fp32 with or
// without subnormals, on inputs rounded to fp32 once; |c|^2 / 2 is computed in fp64 and rounded once.
// The norms are those of the scaled row and codeword and may be off by a relative 2^-20. `underflow`
// is 0, or, for fp64 inputs, 2^-1074 times the row's and the codebook's scale.
VQK_HOST_DEVICE static constexpr inline double score_error_bound(int64_t D, double z_norm, double c_norm, bool l2,
                                                                 double underflow) {
  const double infinity = __builtin_huge_val();
  const double n32 = static_cast<double>(D + 6) * 0x1p-24, n64 = static_cast<double>(D + 6) * 0x1p-53;
  const double magnitude = z_norm * c_norm + (l2 ? 0.5 * c_norm * c_norm : 0.0);
  if (!(n32 < 0.5 && magnitude < 0x1p120 && z_norm < 0x1p120 && c_norm < 0x1p120)) return infinity;
  const double coarse = n32 * (1 + 2 * n32) * magnitude;  // n / (1 - n) <= n (1 + 2n) up to n = 1/2
  const double canonical = n64 * (1 + 2 * n64) * (l2 ? 0.5 * (z_norm + c_norm) * (z_norm + c_norm) : magnitude);
  const double subnormal = static_cast<double>(D) * (z_norm + c_norm + 4) * 0x1p-126;
  return (coarse + canonical + subnormal + static_cast<double>(D) * underflow) * (1 + 0x1p-10);
}

}  // namespace vqk
