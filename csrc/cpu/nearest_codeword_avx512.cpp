// The search kernel for AVX-512 (F, BW, DQ, VL). Register tile: 12 rows x 32 codewords = 24 accumulators,
// 2 codeword vectors, broadcasts folded into the multiply-adds, of 32 registers.
//
//   per d and tile   24 vfmadd231ps     2 per cycle (p0, p5; Zen 4: 1)      12 cycles
//                     2 + 12 loads      2 per cycle                          7 cycles
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
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define VQK_SPLAT(x) _mm512_set1_ps(x)
#define VQK_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define VQK_MIN(a, b) _mm512_min_ps(a, b)
#define VQK_NONZERO(x) static_cast<unsigned>(_mm512_test_epi32_mask((__m512i)(x), (__m512i)(x)))
#endif

namespace vqk::cpu {
namespace {
#if defined(VQK_EMULATE_AVX512)
template <class Mask>
inline unsigned nonzero(const Mask& m) {
  unsigned bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<unsigned>(m[i] != 0) << i;
  return bits;
}
#endif
#include "nearest_codeword_kernel.h"
}  // namespace

extern const SearchKernel avx512_kernel = {kLanes, kTileRows, false, convert, normalize, pack, search, scan, scratch_bytes};
}  // namespace vqk::cpu

#pragma GCC pop_options
#endif
