// The search kernel for AVX-512 (F, BW, DQ, VL). Register tile: 12 rows x 32 codewords = 24 accumulators,
// 2 codeword vectors, broadcasts folded into the multiply-adds, of 32 registers.
//
//   per d and tile   24 vfmadd231ps     2 per cycle (p0, p5; Zen 4: 1)      12 cycles
//                     2 + 12 loads      2 per cycle                          7 cycles
//
// The coarse pass in bytes takes 24 vpmaddubsw and 24 vpaddw for two features of twice as many codewords. With VQK_VNNI
// (nearest_codeword_vnni.cpp) 24 vpdpbusd take four features where 24 vfmadd231ps take one, 24 vpdpwssd two; with VQK_TILES
// (nearest_codeword_amx.cpp) bytes are multiplied in AMX's tiles, nearest_codeword_tiles.h. Without VNNI,
// 16-bit integers would take a vpmaddwd and a vpaddd on the same two ports: no gain, so fp32 follows the bytes.
//
// VQK_EMULATE_AVX512 compiles the same logic as 64-byte vectors that the compiler lowers to AVX2: the
// tests run it on machines without AVX-512.
#include "nearest_codeword.h"
#include "vqk/error_bound.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own intrinsics

#define VQK_LANES 16
#define VQK_ROWS 12
#define VQK_WIDEN(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
#if defined(VQK_EMULATE_AVX512)
#pragma GCC target("avx2,fma")
#define VQK_SPLAT(x) (Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x})
#define VQK_FMA(a, b, c) ((a) * (b) + (c))
#define VQK_MIN(a, b) ((a) < (b) ? (a) : (b))
#define VQK_NONZERO(x) nonzero(x)
#else
#ifdef VQK_VNNI
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma")
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define VQK_SPLAT(x) _mm512_set1_ps(x)
#define VQK_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define VQK_MIN(a, b) _mm512_min_ps(a, b)
#define VQK_NONZERO(x) static_cast<unsigned>(_mm512_test_epi32_mask((__m512i)(x), (__m512i)(x)))
#endif

#define VQK_BYTES
#define VQK_STORE_BYTES(p, x) store_low_bytes(p, x)
#define VQK_LOWEST_TICKS(x) lowest_lane(x)
#if defined(VQK_EMULATE_AVX512)
#define VQK_PAIR(p) (IntVec{} + load_pair(p))
#define VQK_MIN_TICKS(a, b) ((a) < (b) ? (a) : (b))
#define VQK_MAX_TICKS(a, b) ((a) < (b) ? (b) : (a))
#define VQK_WITHIN(x, limit) nonzero((x) <= (limit))
#define VQK_LOAD_FIRST(p, n) load_first(p, n)
#define VQK_WIDEN_HALF(p) __builtin_shufflevector(VQK_WIDEN(p), VQK_WIDEN((p) + 4), 0, 1, 2, 3, 4, 5, 6, 7)
#define VQK_FMA_WIDE(a, b, c) ((a) * (b) + (c))
#else
#define VQK_PAIR(p) ((IntVec)_mm512_set1_epi32(static_cast<int>(load_pair(p))))
#define VQK_LOAD_FIRST(p, n) _mm512_maskz_loadu_ps((1u << (n)) - 1, p)
#define VQK_WIDEN_HALF(p) _mm512_cvtps_pd(_mm256_loadu_ps(p))
#define VQK_FMA_WIDE(a, b, c) _mm512_fmadd_pd(a, b, c)
#endif

#ifdef VQK_VNNI
#define VQK_INTEGER
#define VQK_QUADS
#define VQK_DOT_BYTES(x, c, sum) dot_bytes(x, c, sum)
#define VQK_STORE_WORDS(p, x) store_low_words(p, x)
#if defined(VQK_EMULATE_AVX512)
#define VQK_MADD(x, c, sum) ((sum) + (IntVec)(low16(x) * low16(c)) + (IntVec)(high16(x) * high16(c)))
#define VQK_TO_FLOAT(x) __builtin_convertvector((SignedVec)(x), Vec)
#else
#define VQK_MADD(x, c, sum) dot_pairs(x, c, sum)
#define VQK_TO_FLOAT(x) _mm512_cvtepi32_ps((__m512i)(x))
#define VQK_MIN_TICKS(a, b) ((Ticks)_mm512_min_epi32((__m512i)(a), (__m512i)(b)))
#define VQK_MAX_TICKS(a, b) ((Ticks)_mm512_max_epi32((__m512i)(a), (__m512i)(b)))
#define VQK_WITHIN(x, limit) static_cast<unsigned>(_mm512_cmple_epi32_mask((__m512i)(x), (__m512i)(limit)))
#endif
#elif defined(VQK_EMULATE_AVX512)
#define VQK_MADD_BYTES(x, c) madd_bytes(x, c)
#define VQK_MULHRS(a, b) mulhrs((Shorts)(a), (Shorts)(b))
#define VQK_SUBS(a, b) subs((Shorts)(a), (Shorts)(b))
#else
#define VQK_MADD_BYTES(x, c) ((Ticks)_mm512_maddubs_epi16((__m512i)(x), (__m512i)(c)))
#define VQK_MULHRS(a, b) ((Ticks)_mm512_mulhrs_epi16((__m512i)(a), (__m512i)(b)))
#define VQK_SUBS(a, b) ((Ticks)_mm512_subs_epi16((__m512i)(a), (__m512i)(b)))
#define VQK_MIN_TICKS(a, b) ((Ticks)_mm512_min_epi16((__m512i)(a), (__m512i)(b)))
#define VQK_MAX_TICKS(a, b) ((Ticks)_mm512_max_epi16((__m512i)(a), (__m512i)(b)))
#define VQK_WITHIN(x, limit) static_cast<unsigned>(_mm512_cmple_epi16_mask((__m512i)(x), (__m512i)(limit)))
#endif

namespace vqk::cpu {
namespace {
inline uint32_t load_pair(const void* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return pair;
}
#if defined(VQK_EMULATE_AVX512)
typedef int32_t SignedVec __attribute__((vector_size(64)));
typedef int16_t Shorts __attribute__((vector_size(64)));
template <class Mask>
inline unsigned nonzero(const Mask& m) {
  unsigned bits = 0;
  for (unsigned i = 0; i < sizeof m / sizeof m[0]; ++i) bits |= static_cast<unsigned>(m[i] != 0) << i;
  return bits;
}
inline __m512 load_first(const float* p, int n) {
  __m512 x = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
template <class Bits>
inline void store_low_bytes(uint8_t* p, const Bits& x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(x[i]);
}
template <class Bits>
inline void store_low_words(uint8_t* p, const Bits& x) {
  for (int i = 0; i < 16; ++i) p[2 * i] = static_cast<uint8_t>(x[i]), p[2 * i + 1] = static_cast<uint8_t>(x[i] >> 8);
}
template <class Lanes>
inline int32_t lowest_lane(const Lanes& x) {
  int32_t lowest = x[0];
  for (unsigned i = 1; i < sizeof x / sizeof x[0]; ++i) lowest = x[i] < lowest ? x[i] : lowest;
  return lowest;
}
template <class Bits>
inline SignedVec low16(const Bits& x) {
  return (SignedVec)(x << 16) >> 16;
}
template <class Bits>
inline SignedVec high16(const Bits& x) {
  return (SignedVec)x >> 16;
}
template <class Bits>
inline Bits dot_bytes(const Bits& x, const Bits& c, Bits sum) {
  for (int f = 0; f < 4; ++f) sum += (Bits)((SignedVec)(x >> 8 * f & 255) * ((SignedVec)(c << (24 - 8 * f)) >> 24));
  return sum;
}
template <class Bits>
inline Shorts madd_bytes(const Bits& x, const Bits& c) {
  const Shorts a = (Shorts)x, b = (Shorts)c;
  return (a & 255) * (b << 8 >> 8) + (a >> 8 & 255) * (b >> 8);
}
inline Shorts mulhrs(const Shorts& a, const Shorts& b) {
  Shorts x = {};
  for (int i = 0; i < 32; ++i) x[i] = static_cast<int16_t>((a[i] * b[i] + (1 << 14)) >> 15);
  return x;
}
inline Shorts subs(const Shorts& a, const Shorts& b) {
  Shorts x = {};
  for (int i = 0; i < 32; ++i) {
    const int y = a[i] - b[i];
    x[i] = static_cast<int16_t>(y < -32768 ? -32768 : y > 32767 ? 32767 : y);
  }
  return x;
}
#else
template <class Bits>
inline void store_low_bytes(uint8_t* p, const Bits& x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
}
#ifdef VQK_VNNI
template <class Bits>
inline void store_low_words(uint8_t* p, const Bits& x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x));
}
template <class Lanes>
inline int32_t lowest_lane(const Lanes& x) {
  return _mm512_reduce_min_epi32((__m512i)x);
}
// In assembly because GCC keeps a copy of every sum in memory beside its intrinsics: half the speed.
template <class Bits>
inline Bits dot_bytes(const Bits& x, const Bits& c, Bits sum) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
  return sum;
}
template <class Bits>
inline Bits dot_pairs(const Bits& x, const Bits& c, Bits sum) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
  return sum;
}
#else
template <class Lanes>
inline int16_t lowest_lane(const Lanes& x) {
  const __m128i flip = _mm_set1_epi16(-0x8000);  // the instruction compares unsigned
  const __m256i half = _mm256_min_epi16(_mm512_castsi512_si256((__m512i)x), _mm512_extracti64x4_epi64((__m512i)x, 1));
  const __m128i quarter = _mm_min_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return static_cast<int16_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(quarter, flip))) ^ 0x8000);
}
#endif
#endif
#include "nearest_codeword_kernel.h"
}  // namespace

#ifdef VQK_VNNI
constexpr bool kIntegers = true;
#else
constexpr bool kIntegers = false;
#endif
#if defined(VQK_TILES)
#define VQK_KERNEL amx_kernel
#elif defined(VQK_VNNI)
#define VQK_KERNEL vnni_kernel
#else
#define VQK_KERNEL avx512_kernel
#endif
extern const SearchKernel VQK_KERNEL = {kLanes, kTileRows, kIntegers, kByteFormat, convert, normalize, survey, half_norms, pack,
                                        search, scan, scratch_bytes, byte_lengths, pack_bytes};
}  // namespace vqk::cpu

#pragma GCC pop_options
#endif
