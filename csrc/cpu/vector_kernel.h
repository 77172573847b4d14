// Four doubles from and to every dtype, for every SIMD level: each including file compiles this source in an
// unnamed namespace under its own `#pragma GCC target`, after half.h; VQK_AVX2 selects the instructions.
#pragma once

typedef double v4d __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));
typedef uint32_t v4u __attribute__((vector_size(16)));

// GCC lowers __builtin_convertvector between vectors of unlike width to single elements, hence the intrinsics.
#if defined(VQK_AVX2)
static inline v4d widen(const v4f& v) { return (v4d)_mm256_cvtps_pd((__m128)v); }
static inline v4f narrow(const v4d& v) { return (v4f)_mm256_cvtpd_ps((__m256d)v); }
static inline v4u load4_bits(const uint16_t* p) { return (v4u)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline void store4_bits(uint16_t* p, const v4u& v) {
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi32((__m128i)v, (__m128i)v));
}
#else
static inline v4d widen(const v4f& v) { return __builtin_convertvector(v, v4d); }
static inline v4f narrow(const v4d& v) { return __builtin_convertvector(v, v4f); }
static inline v4u load4_bits(const uint16_t* p) { return v4u{p[0], p[1], p[2], p[3]}; }
static inline void store4_bits(uint16_t* p, const v4u& v) {
  for (int i = 0; i < 4; ++i) p[i] = uint16_t(v[i]);
}
#endif

static inline v4d load4(const double* p) {
  v4d v;
  __builtin_memcpy(&v, p, 32);
  return v;
}
static inline v4d load4(const float* p) {
  v4f v;
  __builtin_memcpy(&v, p, 16);
  return widen(v);
}
static inline v4d load4(const bf16* p) { return widen((v4f)(load4_bits(&p->bits) << 16)); }
static inline v4d load4(const f16* p) {
#if defined(VQK_AVX2)
  return widen((v4f)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
#else
  return v4d{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}

static inline void store4(double* p, const v4d& v) { __builtin_memcpy(p, &v, 32); }
static inline void store4(float* p, const v4d& v) {
  const v4f f = narrow(v);
  __builtin_memcpy(p, &f, 16);
}
static inline void store4(bf16* p, const v4d& v) {
  const v4u u = (v4u)narrow(v), nan = (v4u)((u & 0x7fffffff) > 0x7f800000);
  store4_bits(&p->bits, (nan & (u >> 16 | 0x40)) | (~nan & (u + 0x7fff + (u >> 16 & 1)) >> 16));
}
static inline void store4(f16* p, const v4d& v) {
#if defined(VQK_AVX2)
  _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph((__m128)narrow(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 4; ++i) round_to(static_cast<float>(v[i]), p + i);
#endif
}
