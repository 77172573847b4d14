// 16-bit floats as the kernels meet them: plain integers, converted by hand, round to nearest even.
// Everything here has internal linkage, so that each file compiles it for its own SIMD level.
#pragma once
#include <cstdint>

namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float as_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, body = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t normal = body + (112u << 23) + (body >= (31u << 23) ? 112u << 23 : 0);  // rebias; infinities twice
  const float small = as_float((113u << 23) + body) - as_float(113u << 23);              // subnormals: exact
  return as_float(sign | (body < (1u << 23) ? as_bits(small) : normal));
}

inline void round_to(float x, float* out) { *out = x; }
inline void round_to(double x, double* out) { *out = x; }
inline void round_to(double x, float* out) { *out = static_cast<float>(x); }
inline void round_to(float x, bf16* out) {
  const uint32_t u = as_bits(x);
  out->bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void round_to(float x, f16* out) {
  const uint32_t u = as_bits(x), sign = u >> 16 & 0x8000, body = u & 0x7fffffff;
  uint32_t half;
  if (body > 0x7f800000) half = 0x7e00;        // NaN
  else if (body >= 0x477ff000) half = 0x7c00;  // rounds to infinity: 65520 and above
  else if (body >= 0x38800000) half = (body - (112u << 23) + 0xfff + (body >> 13 & 1)) >> 13;
  else half = as_bits(as_float(body) + 0.5f) - as_bits(0.5f);  // subnormal: the addition rounds to units of 2^-24
  out->bits = uint16_t(sign | half);
}

}  // namespace
