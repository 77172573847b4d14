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

VQK_HOST_DEVICE static constexpr inline double score_magnitude(double z_norm, double c_norm, bool l2) {
  return z_norm * c_norm + (l2 ? 0.5 * c_norm * c_norm : 0.0);
}

// How far the canonical fp64 score is from the true one, with what subnormal inputs and results may cost either;
// +inf where fp32 scores might overflow.
VQK_HOST_DEVICE static constexpr inline double canonical_error_bound(int64_t D, double z_norm, double c_norm, bool l2,
                                                                     double underflow) {
  const double n64 = static_cast<double>(D + 6) * 0x1p-53, magnitude = score_magnitude(z_norm, c_norm, l2);
  const double canonical = n64 * (1 + 2 * n64) * (l2 ? 0.5 * (z_norm + c_norm) * (z_norm + c_norm) : magnitude);
  const double subnormal = static_cast<double>(D) * (z_norm + c_norm + 4) * 0x1p-126;
  const double bound = (canonical + subnormal + static_cast<double>(D) * underflow) * (1 + 0x1p-10);
  const bool fits = (magnitude < 0x1p120) & (z_norm < 0x1p120) & (c_norm < 0x1p120);
  return fits ? bound : __builtin_huge_val();  // a selection, so that loops over rows become vectors
}

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
  const double n32 = static_cast<double>(D + 6) * 0x1p-24;
  const double coarse = n32 * (1 + 2 * n32) * score_magnitude(z_norm, c_norm, l2);  // n / (1 - n) up to n = 1/2
  const double bound = coarse * (1 + 0x1p-10) + canonical_error_bound(D, z_norm, c_norm, l2, underflow);
  return n32 < 0.5 ? bound : __builtin_huge_val();
}

// The same for scores made from integers: row and codeword are integers times a scale, short of the scaled row by
// a vector of length z_error at most, of the codeword by one of c_error. The integer sums are exact; their way to the
// score takes three fp32 roundings, and |c|^2 / 2 brings one.
VQK_HOST_DEVICE static constexpr inline double integer_error_bound(int64_t D, double z_norm, double z_error,
                                                                   double c_norm, double c_error, bool l2,
                                                                   double underflow) {
  const double lost = z_error * c_norm + (z_norm + z_error) * c_error;
  const double rounded = 8 * 0x1p-24 * score_magnitude(z_norm + z_error, c_norm + c_error, l2);
  return (lost + rounded) * (1 + 0x1p-10) + canonical_error_bound(D, z_norm, c_norm, l2, underflow);
}

// The same for scores made from bytes, before their own rounding: z_row and c_row bound the lengths after centring,
// short of which the bytes times their units are by z_error and c_error at most.
VQK_HOST_DEVICE static constexpr inline double byte_error_bound(int64_t D, double z_norm, double z_row, double z_error,
                                                                double c_norm, double c_row, double c_error, bool l2) {
  const double lost = z_error * c_row + (z_row + z_error) * c_error;
  return lost * (1 + 0x1p-10) + canonical_error_bound(D, z_norm, c_norm, l2, 0.0);
}

// The same for scores made on copies of row and codebook, each scaled by a power of two and rounded to what the
// arithmetic multiplies exactly: score = |c|^2 / 2 - ratio (z.c). z_error, c_error: the lengths that rounding took away
// at most. tensor_cores: an instruction adds up to 32 products cut at 2^-23 of the largest; else fp32, term by term.
VQK_HOST_DEVICE static constexpr inline double copied_error_bound(int64_t D, double z_norm, double z_error,
                                                                  double c_norm, double c_error, double ratio, bool l2,
                                                                  bool tensor_cores) {
  const double n32 = static_cast<double>(tensor_cores ? 4 * D + 88 : D + 8) * 0x1p-24;
  const double n64 = static_cast<double>(D + 6) * 0x1p-53, sum = ratio * z_norm + c_norm;
  const double lost = ratio * (z_error * c_norm + (z_norm + z_error) * c_error);
  const double rounded = n32 * (1 + 2 * n32) * ratio * (z_norm + z_error) * (c_norm + c_error);
  const double half = l2 ? 8 * 0x1p-24 * 0.5 * c_norm * c_norm : 0;
  const double canonical = n64 * (1 + 2 * n64) * (l2 ? 0.5 * sum * sum : ratio * z_norm * c_norm);
  const double subnormal = static_cast<double>(D + 2) * (1 + ratio) * 0x1p-126;
  return n32 < 0.25 ? (lost + rounded + half + canonical + subnormal) * (1 + 0x1p-10) : __builtin_huge_val();
}

}  // namespace vqk
