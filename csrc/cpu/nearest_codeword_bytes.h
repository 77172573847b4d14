// The coarse pass in 8-bit integers, before the ones in 16 bits and floats. Part of nearest_codeword_kernel.h at
// levels that define VQK_BYTES. Scores are ticks: int16 in a vector of 2 * VQK_LANES,
//   VQK_PAIR(p)               the 4 bytes at p in every 32-bit lane
//   VQK_MADD_BYTES(x, c)      x.lo * c.lo + x.hi * c.hi of unsigned x and signed c in every int16, saturated
//   VQK_MULHRS(a, b)          a * b / 2^15, rounded          VQK_SUBS(a, b)   a - b, saturated
// or, with VQK_QUADS, int32 in a vector of VQK_LANES,
//   VQK_DOT_BYTES(x, c, sum)  sum + the 4 products of unsigned x and signed c in every 32-bit lane
// and either way
//   VQK_STORE_BYTES(p, x)     the low bytes of the 32-bit lanes, side by side
//   VQK_STORE_WORDS(p, x)     with VQK_QUADS: their low 16 bits
//   VQK_MIN_TICKS, VQK_MAX_TICKS      of lanes     VQK_LOWEST_TICKS  over lanes
//   VQK_WITHIN(x, limit)              bit i = lane i <= limit
//   VQK_WIDEN_HALF(p)                 VQK_LANES / 2 floats as fp64
//   VQK_FMA_WIDE(a, b, c)             a * b + c of such
//   VQK_LOAD_FIRST(p, n)      n < VQK_LANES floats, then zeros
//
// A vector of bytes takes four times as many features as one of floats. In pairs (no VNNI) sums stay in 16 bits: a
// multiply-add and an addition per 4 * VQK_LANES products, up to three times the fp32 peak. In quads (VNNI) it is one
// instruction per 4 * VQK_LANES products: four times.
//
// Rows and codewords are moved to the codebook's mean (l2: both, dot and cosine: the codewords), which changes no
// comparison, then rounded to multiples of a row's unit a and the codebook's unit b: z = a n + e, c = b m + f, with
// |n_d| <= 127, stored as n_d + 128. The units are as small as their range allows. What rounding lost, |e| and |f|, is
// measured, not assumed.
//
// In pairs, for every chunk of kChunkFeatures features:
//   |m_d| <= 63: no pair of products saturates: 2 * 255 * 63 < 2^15
//   |n| |m| < 2^15 - 8: a chunk's sum of products fits 16 bits (Cauchy-Schwarz), whatever its partial sums wrapped to
// Chunks add up after a shift that keeps their sum in 16 bits, and |c|^2 / 2 joins in the same unit.
// In quads, |m_d| <= 127, codewords are stored negated, and a sum begins with |c|^2 / 2: the score is what comes out. So
// that the beginning serves a whole tile, its rows share the unit of the largest; rows of like size share a tile.
//
//        panel of codewords [D/2][4 * VQK_LANES][2]     rows of a tile [D/2][VQK_ROWS][2][2]
//          | c0 c0 | c1 c1 | ... |  features d, d+1       | z0 z0 z0 z0 | z1 z1 z1 z1 | ...
//        quads: [D/4][2 * VQK_LANES][4]                 [VQK_ROWS][D/4][4]
//
// With AMX (nearest_codeword_tiles.h) panels are the same; steps are filled up to what its instructions take, and rows lie as
// in its tiles: [instructions][16 rows][bytes of an instruction].
//
// cb.byte_group vectors of scores are folded into one: the codewords behind one of its lanes are neighbours in the
// codebook, so that scoring them again reads one piece of memory.
//
// With few features (quads, D <= kWordFeatures) codewords are close to each other and bytes would leave too many: a step
// holds 2 features in 16 bits instead (VQK_MADD, "words"). A row's or codeword's integers have length kWordLength at most,
// which is ten to twenty-three times as exact, and leaves the scores small enough for everything else to be the same.
//
// The bound is about 3 % of |z||c|. Once one fp32 score is known nothing further than a bound above it can win: a few
// codewords a row are scored in fp32 one by one, and where that leaves more than one, they are compared canonically.
// Rows with too many candidates take the next coarse pass.

constexpr int64_t kMostByteFeatures = 1024;
#ifdef VQK_QUADS
constexpr int kStepFeatures = 4, kTickLanes = kLanes, kLargestByte = 127;
constexpr int64_t kChunkFeatures = kMostByteFeatures;  // one chunk
constexpr double kMostHalfNorm = 0x1.fcp21;            // ticks; below 2^22, so that adding 1.5 * 2^23 rounds to integers
typedef int32_t Tick;  // also what sums start with
typedef uint32_t CodeBytes;  // a codeword's share of a step
typedef float HalfNorm;
constexpr int kWordFeatures = 5;
#else
constexpr int kWordFeatures = 0;
constexpr int kStepFeatures = 2, kTickLanes = 2 * kLanes, kLargestByte = 63;
constexpr int64_t kChunkFeatures = 64;
constexpr double kMostHalfNorm = 32766;
typedef int16_t Tick;
typedef uint16_t CodeBytes;
typedef int16_t HalfNorm;  // in half_norm_unit
#endif
constexpr int kByteWidth = 2 * kTickLanes;
#ifdef VQK_TILES
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
constexpr double kWordLength = 2900;  // its square and a half norm are below 2^24: that leaves more than 6 bits for tags
constexpr ByteFormat kByteFormat = {kByteWidth,     kStepFeatures, kLargestByte, kChunkFeatures,
                                    kMostHalfNorm, kWordFeatures, kWordLength, kHasTiles};
constexpr int64_t kFarFloats = 1 << 20;        // tiles: a codebook that L2 does not hold
constexpr int kCellGroups = 8;                 // tiles: whose two lowest scores are kept
constexpr int kMostByteGroup = 16;             // vectors folded into one
constexpr int kByteCandidates = 12288;         // lanes of minima that a task has room for
constexpr int kTies = 16 * kMaxRows;           // of fp32 scores, among all rows of a task
constexpr int64_t kTileBlockBytes = 1 << 20;   // processors with AMX have 2 MiB of L2
constexpr int64_t kBatchVectors = 32;          // of minima, of as many tiles as are filtered together: most of L1
constexpr double kChunkSum = 32760;            // of products, at most
constexpr Tick kMostTicks = kStepFeatures == 4 ? 0x7fffffff : 32767;
constexpr Tick kNoTicks = -kMostTicks - 1;

typedef double WideDoubles __attribute__((vector_size(4 * VQK_LANES)));
typedef Tick Ticks __attribute__((vector_size(4 * VQK_LANES)));
typedef Tick TicksAtAny __attribute__((vector_size(4 * VQK_LANES), aligned(sizeof(Tick)), may_alias));

VQK_INLINE bool in_tiles(const Codebook& cb) { return kHasTiles && cb.byte_tiles; }
// Rows whose sums begin alike: of a register tile or one of AMX's; rows that the coarse pass takes at once.
VQK_INLINE int tile_rows_of(const Codebook& cb) { return in_tiles(cb) ? kTileOfRows : kTileRows; }
VQK_INLINE int rows_at_once(const Codebook& cb) { return in_tiles(cb) ? kMostTileRows : kTileRows; }

VQK_INLINE Ticks load_ticks(const Tick* p) { return *reinterpret_cast<const TicksAtAny*>(p); }

// Minima with a number in their low bits: below the score in 32 bits, in place of what it has there in 16.
VQK_INLINE Ticks with_tag(Ticks x, int bits, Ticks tag) {
#ifdef VQK_QUADS
  return (x << bits) | tag;
#else
  const Tick kept = static_cast<Tick>(-(1 << bits));
  return (x & (Ticks{} + kept)) | tag;
#endif
}

#ifdef VQK_QUADS
// Scores of a tile of rows against one panel, lo and hi of its vectors. `ticks`: what half norms are multiplied by.
VQK_INLINE void score_panel_bytes(const uint8_t* z, int64_t steps, float ticks, const int8_t* panel, const Tick* start,
                                  const HalfNorm* half_norms, Ticks* lo, Ticks* hi) {
  const Vec round = VQK_SPLAT(0x1.8p23f), t = VQK_SPLAT(ticks);  // pack_bytes took the bits of 1.5 * 2^23 from start
  const IntVec s0 = (IntVec)load_ticks(start) + (IntVec)VQK_FMA(load(half_norms), t, round);
  const IntVec s1 = (IntVec)load_ticks(start + kLanes) + (IntVec)VQK_FMA(load(half_norms + kLanes), t, round);
  const int64_t stride = 4 * steps;
  const uint8_t* thirds[kThirds];
  every_third_row(z, stride, thirds);
  IntVec sum0[kTileRows], sum1[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sum0[r] = s0, sum1[r] = s1;
  for (int64_t d = 0; d < steps; ++d) {
    const IntVec c0 = *reinterpret_cast<const IntVecAtAny*>(panel);
    const IntVec c1 = *reinterpret_cast<const IntVecAtAny*>(panel + 4 * kLanes);
    panel += 4 * kByteWidth;
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const IntVec x = VQK_PAIR(thirds[r / 3] + r % 3 * stride + 4 * d);
      sum0[r] = VQK_DOT_BYTES(x, c0, sum0[r]);
      sum1[r] = VQK_DOT_BYTES(x, c1, sum1[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) lo[r] = (Ticks)sum0[r], hi[r] = (Ticks)sum1[r];
}

// The lowest scores of a tile of rows over the first `vectors` of its panels. Where features are few, what is not a
// product counts: codewords stay in registers for all rows of the tile, and so do the minima.
template <int Steps, bool Words>
VQK_INLINE void lowest_in_group_bytes(const uint8_t* z, float ticks, const int8_t* panel, const Tick* start,
                                      const HalfNorm* half_norms, int64_t vectors, int tag_bits, Ticks tag, Tick* out) {
  constexpr int kHeld = Steps <= 2 && kLanes == 16 ? 4 : 2;  // 16 registers have room for no more
  const Vec round = VQK_SPLAT(0x1.8p23f), t = VQK_SPLAT(ticks);
  Ticks lowest[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) lowest[r] = Ticks{} + kMostTicks;
  for (int64_t v = 0; v < vectors; v += kHeld, start += kHeld * kLanes, half_norms += kHeld * kLanes) {
    asm("" : "+r"(z));  // or GCC keeps the rows in registers, which are for the minima
    IntVec first[kHeld], c[kHeld][Steps];
#pragma GCC unroll 4
    for (int i = 0; i < kHeld; ++i) {
      first[i] = (IntVec)load_ticks(start + i * kLanes) + (IntVec)VQK_FMA(load(half_norms + i * kLanes), t, round);
      if (i % 2 == 0)
#pragma GCC unroll 4
        for (int d = 0; d < Steps; ++d, panel += 8 * kLanes) {
          c[i][d] = *reinterpret_cast<const IntVecAtAny*>(panel);
          c[i + 1][d] = *reinterpret_cast<const IntVecAtAny*>(panel + 4 * kLanes);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      IntVec sum[kHeld];
#pragma GCC unroll 4
      for (int i = 0; i < kHeld; ++i) sum[i] = first[i];
#pragma GCC unroll 4
      for (int d = 0; d < Steps; ++d) {
        const IntVec x = VQK_PAIR(z + 4 * (r * Steps + d));
#pragma GCC unroll 4
        for (int i = 0; i < kHeld; ++i)
          sum[i] = Words ? VQK_MADD(x, c[i][d], sum[i]) : VQK_DOT_BYTES(x, c[i][d], sum[i]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kHeld; ++i) lowest[r] = VQK_MIN_TICKS(lowest[r], (Ticks)sum[i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
    *reinterpret_cast<TicksAtAny*>(out + r * kTickLanes) = with_tag(lowest[r], tag_bits, tag);
}
#else
typedef uint16_t Sums __attribute__((vector_size(4 * VQK_LANES)));  // wrap around

// Sums of products over `steps` steps of a chunk, and what they start with.
VQK_INLINE void sum_chunk_bytes(const uint8_t* z, int64_t steps, const int8_t* panel, const Tick* start, Sums* sum0,
                                Sums* sum1) {
  const Sums s0 = (Sums)load_ticks(start), s1 = (Sums)load_ticks(start + kTickLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sum0[r] = s0, sum1[r] = s1;
#pragma GCC unroll 2
  for (int64_t d = 0; d < steps; ++d) {
    const IntVec c0 = *reinterpret_cast<const IntVecAtAny*>(panel);
    const IntVec c1 = *reinterpret_cast<const IntVecAtAny*>(panel + 4 * kLanes);
    panel += 2 * kByteWidth;
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const IntVec x = VQK_PAIR(z + 4 * r);
      sum0[r] += (Sums)VQK_MADD_BYTES(x, c0);
      sum1[r] += (Sums)VQK_MADD_BYTES(x, c1);
    }
    z += 4 * kTileRows;
  }
}

// Scores of a tile of rows against one panel, lo and hi of its vectors. start: [chunks][kByteWidth]; factors: of each
// row, for half norms, twice.
template <bool OneChunk>
VQK_INLINE void score_panel_bytes(const uint8_t* z, int64_t steps, const int16_t* factors, const int8_t* panel,
                                  const Tick* start, int shift, const HalfNorm* half_norms, Ticks* lo, Ticks* hi) {
  constexpr int64_t kChunkSteps = kChunkFeatures / kStepFeatures;
  Sums sum0[kTileRows], sum1[kTileRows];
  if constexpr (OneChunk) {  // unshifted, and the sums stay in registers
    sum_chunk_bytes(z, steps, panel, start, sum0, sum1);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) lo[r] = (Ticks)sum0[r], hi[r] = (Ticks)sum1[r];
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) lo[r] = hi[r] = Ticks{};
    for (int64_t first = 0; first < steps; first += kChunkSteps, start += kByteWidth) {
      const int64_t count = steps - first < kChunkSteps ? steps - first : kChunkSteps;
      sum_chunk_bytes(z + first * 4 * kTileRows, count, panel + first * 2 * kByteWidth, start, sum0, sum1);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        lo[r] += (Ticks)sum0[r] >> shift;
        hi[r] += (Ticks)sum1[r] >> shift;
      }
    }
  }
  const Ticks h0 = load_ticks(half_norms), h1 = load_ticks(half_norms + kTickLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    const IntVec factor = VQK_PAIR(factors + 2 * r);
    lo[r] = VQK_SUBS(VQK_MULHRS(h0, factor), lo[r]);
    hi[r] = VQK_SUBS(VQK_MULHRS(h1, factor), hi[r]);
  }
}
#endif

#include "nearest_codeword_byte_rows.h"
#include "nearest_codeword_byte_candidates.h"
#include "nearest_codeword_byte_coarse.h"
