// The search kernel for AVX2 and FMA (Intel Haswell, AMD Zen and later). Register tile: 6 rows x 16
// codewords = 12 accumulators, 2 codeword vectors and 1 broadcast of the 16 registers.
//
//   per d and tile   12 vfmadd231ps     2 per cycle (Zen 3: ports FP0, FP1; Intel: p0, p1)      6 cycles
//                     2 + 6 loads       2 per cycle                                             4 cycles
//
// so the multiply-adds are the limit: 32 flop per cycle and core.
//
// With VQK_VNNI (nearest_codeword_avxvnni.cpp) the same tile takes vpdpbusd, four features at a time, and vpdpwssd, two.
// VQK_EMULATE_AVXVNNI writes these two as AVX-512 spells them and changes nothing else: the tests run it on processors
// that have VNNI in that spelling alone.
#include "nearest_codeword.h"
#include "vqk/error_bound.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define VQK_LANES 8
#define VQK_ROWS 6
#define VQK_SPLAT(x) _mm256_set1_ps(x)
#define VQK_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define VQK_WIDEN(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
#define VQK_MIN(a, b) _mm256_min_ps(a, b)
#define VQK_NONZERO(x) static_cast<unsigned>(_mm256_movemask_ps((__m256)((x) != 0)))

#define VQK_INTEGER
#define VQK_PAIR(p) ((IntVec)_mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const FloatAtAny*>(p))))
#define VQK_TO_FLOAT(x) _mm256_cvtepi32_ps((__m256i)(x))

#define VQK_BYTES
#define VQK_WIDEN_HALF(p) VQK_WIDEN(p)
#define VQK_FMA_WIDE(a, b, c) _mm256_fmadd_pd(a, b, c)
#define VQK_STORE_BYTES(p, x) store_low_bytes(p, (__m256i)(x))
#define VQK_LOAD_FIRST(p, n) load_first(p, n)
#ifdef VQK_VNNI
#define VQK_MADD(x, c, sum) dot_pairs(x, c, sum)
#define VQK_QUADS
#define VQK_DOT_BYTES(x, c, sum) dot_bytes(x, c, sum)
#define VQK_STORE_WORDS(p, x) store_low_words(p, (__m256i)(x))
#define VQK_MIN_TICKS(a, b) ((Ticks)_mm256_min_epi32((__m256i)(a), (__m256i)(b)))
#define VQK_MAX_TICKS(a, b) ((Ticks)_mm256_max_epi32((__m256i)(a), (__m256i)(b)))
#define VQK_LOWEST_TICKS(x) lowest32((__m256i)(x))
#define VQK_WITHIN(x, limit) static_cast<unsigned>(_mm256_movemask_ps((__m256)((x) <= (limit))))
#ifdef VQK_EMULATE_AVXVNNI
#define VQK_VEX ""
#else
#define VQK_VEX "%{vex%} "
#endif
#else
#define VQK_MADD(x, c, sum) ((sum) + (IntVec)_mm256_madd_epi16((__m256i)(x), (__m256i)(c)))
#define VQK_MADD_BYTES(x, c) ((Ticks)_mm256_maddubs_epi16((__m256i)(x), (__m256i)(c)))
#define VQK_MULHRS(a, b) ((Ticks)_mm256_mulhrs_epi16((__m256i)(a), (__m256i)(b)))
#define VQK_SUBS(a, b) ((Ticks)_mm256_subs_epi16((__m256i)(a), (__m256i)(b)))
#define VQK_MIN_TICKS(a, b) ((Ticks)_mm256_min_epi16((__m256i)(a), (__m256i)(b)))
#define VQK_MAX_TICKS(a, b) ((Ticks)_mm256_max_epi16((__m256i)(a), (__m256i)(b)))
#define VQK_LOWEST_TICKS(x) lowest16((__m256i)(x))
#define VQK_WITHIN(x, limit) nonzero16((__m256i)((x) <= (limit)))
#endif

namespace vqk::cpu {
namespace {
inline void store_low_bytes(void* p, __m256i x) {
  const __m256i gathered = _mm256_shuffle_epi8(x, _mm256_set1_epi32(0x0c080400));  // of each half, in every lane of it
  const __m128i low = _mm256_castsi256_si128(gathered), high = _mm256_extracti128_si256(gathered, 1);
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_unpacklo_epi32(low, high));
}
inline __m256 load_first(const float* p, int n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
}
#ifdef VQK_VNNI
inline void store_low_words(void* p, __m256i x) {
  const __m256i gathered = _mm256_shuffle_epi8(x, _mm256_set1_epi64x(0x0d0c090805040100));  // of each half, in both of its
  const __m128i low = _mm256_castsi256_si128(gathered), high = _mm256_extracti128_si256(gathered, 1);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_unpacklo_epi64(low, high));
}
inline int32_t lowest32(__m256i x) {
  __m128i half = _mm_min_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_min_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_min_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
// In assembly, so that any compiler has them, and in this spelling.
template <class Bits>
inline Bits dot_bytes(const Bits& x, const Bits& c, Bits sum) {
  asm(VQK_VEX "vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(c));
  return sum;
}
template <class Bits>
inline Bits dot_pairs(const Bits& x, const Bits& c, Bits sum) {
  asm(VQK_VEX "vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(c));
  return sum;
}
#else
inline int16_t lowest16(__m256i x) {
  const __m128i flip = _mm_set1_epi16(-0x8000);  // the instruction compares unsigned
  const __m128i half = _mm_min_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  return static_cast<int16_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, flip))) ^ 0x8000);
}
inline unsigned nonzero16(__m256i x) {
  return static_cast<unsigned>(
      _mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1))));
}
#endif
typedef float FloatAtAny __attribute__((aligned(2), may_alias));
#include "nearest_codeword_kernel.h"
}  // namespace

#ifdef VQK_VNNI
#define VQK_KERNEL avxvnni_kernel
#else
#define VQK_KERNEL avx2_kernel
#endif
extern const SearchKernel VQK_KERNEL = {kLanes, kTileRows, true, kByteFormat, convert, normalize, survey, half_norms, pack, search,
                                        scan, scratch_bytes, byte_lengths, pack_bytes};
}  // namespace vqk::cpu

#pragma GCC pop_options
#endif
