// The search kernel for any CPU that GCC or Clang has 16-byte vectors for (SSE2 on x86-64, NEON on
// AArch64): 4 lanes, multiply then add. The bound of docs/numerics.md covers unfused arithmetic, so the
// results are those of the wider levels, bit for bit.
#include "nearest_codeword.h"
#include "vqk/error_bound.h"

#pragma GCC diagnostic ignored "-Wpsabi"

#define VQK_LANES 4
#define VQK_ROWS 4
#define VQK_SPLAT(x) (Vec{x, x, x, x})
#define VQK_FMA(a, b, c) ((a) * (b) + (c))
#define VQK_WIDEN(p) (Doubles{(p)[0], (p)[1]})
#if defined(__SSE2__)
#define VQK_MIN(a, b) _mm_min_ps(a, b)
#define VQK_NONZERO(x) static_cast<unsigned>(_mm_movemask_ps((__m128)((x) != 0)))
#else
#define VQK_MIN(a, b) ((a) < (b) ? (a) : (b))
#define VQK_NONZERO(x) nonzero(x)
#endif

namespace vqk::cpu {
namespace {
#if !defined(__SSE2__)
template <class Mask>
inline unsigned nonzero(const Mask& m) {
  return (m[0] != 0) | (m[1] != 0) << 1 | (m[2] != 0) << 2 | (m[3] != 0) << 3;
}
#endif
#include "nearest_codeword_kernel.h"
}  // namespace

extern const SearchKernel portable_kernel = {kLanes, kTileRows, false, {}, convert, normalize, survey, half_norms, pack, search, scan,
                                             scratch_bytes, nullptr, nullptr};
}  // namespace vqk::cpu
