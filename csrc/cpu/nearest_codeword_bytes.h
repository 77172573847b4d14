// The coarse pass in 8-bit integers, before the ones in 16 bits and floats. Part of nearest_codeword_kernel.h at
// levels that define VQK_BYTES. Scores are ticks: int16 in a vector of 2 * VQK_LANES,
//   VQK_PAIR(p)               the 4 bytes at p in every 32-bit lane
//   VQK_MADD_BYTES(x, c)      x.lo * c.lo + x.hi * c.hi of unsigned x and signed c in every int16, saturated
//   VQK_MULHRS(a, b)          a * b / 2^15, rounded          VQK_SUBS(a, b)   a - b, saturated
// or, with VQK_QUADS, int32 in a vector of VQK_LANES,
//   VQK_DOT_BYTES(x, c, sum)  sum + the 4 products of unsigned x and signed c in every 32-bit lane
// and either way
//   VQK_STORE_BYTES(p, x)     the low bytes of the 32-bit lanes, side by side
//   VQK_MIN_TICKS, VQK_LOWEST_TICKS   minimum of lanes, over lanes     VQK_NONZERO_TICKS(x)  bit i = lane i is not 0
//
// A vector of bytes takes four times as many features as one of floats. In pairs (AVX2) sums stay in 16 bits: a
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
//        quads: [D/4][2 * VQK_LANES][4]                 [D/4][VQK_ROWS][4]
//
// The bound is about 3 % of |z||c|. Once one fp32 score is known nothing further than a bound above it can win: a few
// to a few tens of codewords a row are scored in fp32 one by one, and what is left within that bound is compared
// canonically. Rows with too many candidates take the next coarse pass.

constexpr int64_t kMostByteFeatures = 1024;
#ifdef VQK_QUADS
constexpr int kStepFeatures = 4, kTickLanes = kLanes, kLargestByte = 127, kPaysKD = 16384;
constexpr int64_t kChunkFeatures = kMostByteFeatures;  // one chunk
constexpr double kMostHalfNorm = 0x1.fcp21;            // ticks; below 2^22, so that adding 1.5 * 2^23 rounds to integers
typedef int32_t Tick;  // also what sums start with
typedef uint32_t TickWord;
typedef uint32_t CodeBytes;  // a codeword's share of a step
typedef float HalfNorm;
#else
constexpr int kStepFeatures = 2, kTickLanes = 2 * kLanes, kLargestByte = 63, kPaysKD = 32768;
constexpr int64_t kChunkFeatures = 64;
constexpr double kMostHalfNorm = 32766;
typedef int16_t Tick;
typedef uint16_t TickWord;
typedef uint16_t CodeBytes;
typedef int16_t HalfNorm;  // in half_norm_unit
#endif
constexpr int kByteWidth = 2 * kTickLanes;
constexpr ByteFormat kByteFormat = {kByteWidth,     kStepFeatures, kLargestByte,
                                    kChunkFeatures, kMostHalfNorm, kPaysKD};
constexpr int kMostByteGroup = 8;              // panels folded into one vector
constexpr int kByteCandidates = 64;            // lanes of minima per row; more than that: the next coarse pass
constexpr double kChunkSum = 32760;            // of products, at most
constexpr Tick kMostTicks = kStepFeatures == 4 ? 0x7fffffff : 32767;

typedef Tick Ticks __attribute__((vector_size(4 * VQK_LANES)));
typedef TickWord TickBits __attribute__((vector_size(4 * VQK_LANES)));
typedef Tick TicksAtAny __attribute__((vector_size(4 * VQK_LANES), aligned(sizeof(Tick)), may_alias));

VQK_INLINE Ticks load_ticks(const Tick* p) { return *reinterpret_cast<const TicksAtAny*>(p); }

#ifdef VQK_QUADS
// Scores of a tile of rows against one panel, lo and hi of its vectors. `ticks`: what half norms are multiplied by.
VQK_INLINE void score_panel_bytes(const uint8_t* z, int64_t steps, float ticks, const int8_t* panel, const Tick* start,
                                  const HalfNorm* half_norms, Ticks* lo, Ticks* hi) {
  const Vec round = VQK_SPLAT(0x1.8p23f), t = VQK_SPLAT(ticks);  // pack_bytes took the bits of 1.5 * 2^23 from start
  const IntVec s0 = (IntVec)load_ticks(start) + (IntVec)VQK_FMA(load(half_norms), t, round);
  const IntVec s1 = (IntVec)load_ticks(start + kLanes) + (IntVec)VQK_FMA(load(half_norms + kLanes), t, round);
  IntVec sum0[kTileRows], sum1[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sum0[r] = s0, sum1[r] = s1;
  for (int64_t d = 0; d < steps; ++d) {
    const IntVec c0 = *reinterpret_cast<const IntVecAtAny*>(panel);
    const IntVec c1 = *reinterpret_cast<const IntVecAtAny*>(panel + 4 * kLanes);
    panel += 4 * kByteWidth;
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const IntVec x = VQK_PAIR(z + 4 * r);
      sum0[r] = VQK_DOT_BYTES(x, c0, sum0[r]);
      sum1[r] = VQK_DOT_BYTES(x, c1, sum1[r]);
    }
    z += 4 * kTileRows;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) lo[r] = (Ticks)sum0[r], hi[r] = (Ticks)sum1[r];
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

struct ByteRow {
  Tick best, limit, slack;     // as Row's, in ticks: units of the row's scores
  int count;                   // of candidates; kEveryCodeword: for the next pass; kNone: takes no part
  const float* z;
  double norm, length;         // |z|; |z - mean|, or up to 2^-15 more
  float unit;                  // a
  double shift, ticks, eps;    // (fp32 score + shift) * ticks is within eps of the score in ticks
  Tick score[kByteCandidates];
  uint32_t lane[kByteCandidates];  // group * kTickLanes + lane
};

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
VQK_INLINE Eight sum_to_eight(Vec x) {
#if VQK_LANES == 16
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return x;
#endif
}
VQK_INLINE Four sum_to_four(Eight x) {
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
}
VQK_INLINE float sum_of_four(Four x) {
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1);
  return x[0] + x[1];
}
VQK_INLINE float sum_of_lanes(Vec x) { return sum_of_four(sum_to_four(sum_to_eight(x))); }
template <class Part>
VQK_INLINE Part load_part(const float* p) {
  Part x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// |c|^2 / 2 - z.c in fp32.
VQK_INLINE float score_float(const float* z, const float* c, float half_norm, int64_t D) {
  Vec a = {}, b = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
    a = VQK_FMA(load(z + d), load(c + d), a);
    b = VQK_FMA(load(z + d + kLanes), load(c + d + kLanes), b);
  }
  if (d + kLanes <= D) {
    a = VQK_FMA(load(z + d), load(c + d), a);
    d += kLanes;
  }
  Eight eight = sum_to_eight(a + b);
  if (kLanes > 8 && d + 8 <= D) {
    eight += load_part<Eight>(z + d) * load_part<Eight>(c + d);
    d += 8;
  }
  Four four = sum_to_four(eight);
  if (d + 4 <= D) {
    four += load_part<Four>(z + d) * load_part<Four>(c + d);
    d += 4;
  }
  float sum = sum_of_four(four);
  for (; d < D; ++d) sum += z[d] * c[d];
  return half_norm - sum;
}

// The codewords behind a candidate: call(k) for each.
template <class Call>
VQK_INLINE void for_each_codeword(const Codebook& cb, uint32_t lane, const Call& call) {
  const int64_t step = static_cast<int64_t>(cb.byte_group) * kByteWidth;
  const int64_t first = lane / kTickLanes * step + lane % kTickLanes;
  for (int64_t k = first; k < first + step && k < cb.K; k += kTickLanes) call(k);
}

// A codeword with this fp32 score exists: those that can still win have a score in ticks of no more than limit.
VQK_INLINE void tighten(ByteRow& row, float score) {
  const double limit = (score + row.shift) * row.ticks + row.eps;
  if (limit < row.limit) row.limit = limit < -kMostTicks ? -kMostTicks : static_cast<Tick>(__builtin_floor(limit));
}

static __attribute__((noinline)) bool prune_bytes(const Codebook& cb, ByteRow& row) {
  int kept = 0, lowest = 0;
  for (int i = 1; i < kByteCandidates; ++i)
    if (row.score[i] < row.score[lowest]) lowest = i;
  const float* codewords = static_cast<const float*>(cb.rows);
  for_each_codeword(cb, row.lane[lowest], [&](int64_t k) {
    tighten(row, score_float(row.z, codewords + k * cb.D, cb.half_norms[k], cb.D));
  });
  for (int i = 0; i < kByteCandidates; ++i)
    if (row.score[i] <= row.limit) row.score[kept] = row.score[i], row.lane[kept] = row.lane[i], ++kept;
  row.count = kept;
  if (kept < kByteCandidates) return true;
  row.count = kEveryCodeword;
  return false;
}

// minima: `groups` vectors, kTileRows * kTickLanes apart, of lanes that start at `lane`.
VQK_INLINE void filter_bytes(const Codebook& cb, ByteRow& row, const Tick* minima, int64_t groups, uint32_t lane) {
  constexpr int64_t kStep = kTileRows * kTickLanes, kBits = 8 * sizeof(Tick);
  Ticks lowest0 = load_ticks(minima), lowest1 = lowest0;
  int64_t g = 1;
  for (; g + 1 < groups; g += 2) {
    lowest0 = VQK_MIN_TICKS(lowest0, load_ticks(minima + g * kStep));
    lowest1 = VQK_MIN_TICKS(lowest1, load_ticks(minima + (g + 1) * kStep));
  }
  if (g < groups) lowest0 = VQK_MIN_TICKS(lowest0, load_ticks(minima + g * kStep));
  const Tick best = VQK_LOWEST_TICKS(VQK_MIN_TICKS(lowest0, lowest1));
  if (best > row.limit) return;
  if (best < row.best) {
    row.best = best;
    const int64_t limit = static_cast<int64_t>(best) + row.slack;
    if (limit < row.limit) row.limit = static_cast<Tick>(limit);
  }
  const Ticks limit = Ticks{} + row.limit;
  for (int64_t first = 0; first < groups; first += kBits) {  // as in filter: a lane's bits say which groups
    const int64_t last = first + kBits < groups ? first + kBits : groups;
    TickBits bits = {};
    for (g = last - 1; g >= first; --g) bits = bits + bits - (TickBits)(load_ticks(minima + g * kStep) <= limit);
    TickWord words[kTickLanes];
    __builtin_memcpy(words, &bits, sizeof words);
    for (unsigned lanes = VQK_NONZERO_TICKS(bits); lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      for (uint32_t word = words[i]; word; word &= word - 1) {
        g = first + __builtin_ctz(word);
        if (row.count == kByteCandidates && !prune_bytes(cb, row)) return;
        row.score[row.count] = minima[g * kStep + i];
        row.lane[row.count++] = lane + static_cast<uint32_t>(g * kTickLanes + i);
      }
    }
  }
}

// The rows of a task in bytes: place j of the tiles holds row order[j].
struct ByteTiles {
  const uint8_t* bytes;  // whole tiles
  const int* order;
  int count;
  const int16_t* factors;  // pairs: [count][2], as score_panel_bytes takes them
  const float* ticks;      // quads: of each tile
};

// Fills the rows' candidates.
template <bool OneChunk>
static void coarse_pass_bytes(const Codebook& cb, const ByteTiles& tiles, ByteRow* rows, Tick* minima) {
  const int64_t steps = (cb.D + kStepFeatures - 1) / kStepFeatures;
  const int64_t chunks = (cb.D + kChunkFeatures - 1) / kChunkFeatures;
  const int64_t panels = (cb.K + kByteWidth - 1) / kByteWidth, group = cb.byte_group;
  const int64_t panel_bytes = steps * kStepFeatures * kByteWidth;
  const Tick* starts = static_cast<const Tick*>(cb.starts8);
  const HalfNorm* half_norms = static_cast<const HalfNorm*>(cb.half_norms8);
  int64_t block = kBlockBytes / panel_bytes;
  if (block > kBlockVectors * group) block = kBlockVectors * group;
  block = block / group * group;
  if (block < group) block = group;
  constexpr int64_t kStep = kTileRows * kTickLanes;
  for (int64_t first = 0; first < panels; first += block) {
    const int64_t last = first + block < panels ? first + block : panels;
    for (int start = 0; start < tiles.count; start += kTileRows) {
      Tick* out = minima;
      for (int64_t p = first, in_group = 0; p < last; ++p) {
        Ticks lo[kTileRows], hi[kTileRows];
        const uint8_t* bytes = tiles.bytes + start * 4 * steps;
        const int8_t* panel = cb.panels8 + p * panel_bytes;
        const Tick* begin = starts + p * chunks * kByteWidth;
#ifdef VQK_QUADS
        score_panel_bytes(bytes, steps, tiles.ticks[start / kTileRows], panel, begin, half_norms + p * kByteWidth, lo, hi);
#else
        score_panel_bytes<OneChunk>(bytes, steps, tiles.factors + 2 * start, panel, begin, cb.byte_shift,
                                    half_norms + p * kByteWidth, lo, hi);
#endif
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          Ticks x = VQK_MIN_TICKS(lo[r], hi[r]);
          if (in_group) x = VQK_MIN_TICKS(x, load_ticks(out + r * kTickLanes));
          *reinterpret_cast<TicksAtAny*>(out + r * kTickLanes) = x;
        }
        if (++in_group == group || p + 1 == last) in_group = 0, out += kStep;
      }
      for (int j = start; j < tiles.count && j < start + kTileRows; ++j)
        if (ByteRow& row = rows[tiles.order[j]]; row.count >= 0)
          filter_bytes(cb, row, minima + (j - start) * kTickLanes, (out - minima) / kStep,
                       static_cast<uint32_t>(first / group * kTickLanes));
    }
  }
}

#include "nearest_codeword_byte_rows.h"
