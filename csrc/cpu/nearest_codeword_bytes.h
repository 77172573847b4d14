// The coarse pass in 8-bit integers, before the ones in 16 bits and floats. Part of nearest_codeword_kernel.h at
// levels that define VQK_BYTES. Scores are ticks: int16 in a vector of 2 * VQK_LANES,
//   VQK_PAIR(p)               the 4 bytes at p in every 32-bit lane
//   VQK_MADD_BYTES(x, c)      x.lo * c.lo + x.hi * c.hi of unsigned x and signed c in every int16, saturated
//   VQK_MULHRS(a, b)          a * b / 2^15, rounded          VQK_SUBS(a, b)   a - b, saturated
// or, with VQK_QUADS, int32 in a vector of VQK_LANES,
//   VQK_DOT_BYTES(x, c, sum)  sum + the 4 products of unsigned x and signed c in every 32-bit lane
// and either way
//   VQK_STORE_BYTES(p, x)     the low bytes of the 32-bit lanes, side by side
//   VQK_MIN_TICKS, VQK_LOWEST_TICKS   minimum of lanes, over lanes     VQK_WITHIN(x, limit)  bit i = lane i <= limit
//   VQK_LOAD_FIRST(p, n)      n < VQK_LANES floats, then zeros
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
//        quads: [D/4][2 * VQK_LANES][4]                 [VQK_ROWS][D/4][4]
//
// The bound is about 3 % of |z||c|. Once one fp32 score is known nothing further than a bound above it can win: a few
// to a few tens of codewords a row are scored in fp32 one by one, and what is left within that bound is compared
// canonically. Rows with too many candidates take the next coarse pass.

constexpr int64_t kMostByteFeatures = 1024;
#ifdef VQK_QUADS
constexpr int kStepFeatures = 4, kTickLanes = kLanes, kLargestByte = 127, kPaysK = 128, kPaysKD = 4096;
constexpr int64_t kChunkFeatures = kMostByteFeatures;  // one chunk
constexpr double kMostHalfNorm = 0x1.fcp21;            // ticks; below 2^22, so that adding 1.5 * 2^23 rounds to integers
typedef int32_t Tick;  // also what sums start with
typedef uint32_t TickWord;
typedef uint32_t CodeBytes;  // a codeword's share of a step
typedef float HalfNorm;
#else
constexpr int kStepFeatures = 2, kTickLanes = 2 * kLanes, kLargestByte = 63, kPaysK = 512, kPaysKD = 32768;
constexpr int64_t kChunkFeatures = 64;
constexpr double kMostHalfNorm = 32766;
typedef int16_t Tick;
typedef uint16_t TickWord;
typedef uint16_t CodeBytes;
typedef int16_t HalfNorm;  // in half_norm_unit
#endif
constexpr int kByteWidth = 2 * kTickLanes;
constexpr ByteFormat kByteFormat = {kByteWidth,    kStepFeatures, kLargestByte, kChunkFeatures,
                                    kMostHalfNorm, kPaysK,        kPaysKD};
constexpr int kMostByteGroup = 16;             // vectors folded into one
constexpr int kByteCandidates = 12288;         // lanes of minima that a task has room for
constexpr int kScoredPairs = 2 * kMaxRows * kMostByteGroup;  // of row and codeword, in fp32 at a time
constexpr double kChunkSum = 32760;            // of products, at most
constexpr Tick kMostTicks = kStepFeatures == 4 ? 0x7fffffff : 32767;
constexpr Tick kNoTicks = -kMostTicks - 1;

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
  const int64_t stride = 4 * steps;
  IntVec sum0[kTileRows], sum1[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sum0[r] = s0, sum1[r] = s1;
  for (int64_t d = 0; d < steps; ++d) {
    const IntVec c0 = *reinterpret_cast<const IntVecAtAny*>(panel);
    const IntVec c1 = *reinterpret_cast<const IntVecAtAny*>(panel + 4 * kLanes);
    panel += 4 * kByteWidth;
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const IntVec x = VQK_PAIR(z + r * stride + 4 * d);
      sum0[r] = VQK_DOT_BYTES(x, c0, sum0[r]);
      sum1[r] = VQK_DOT_BYTES(x, c1, sum1[r]);
    }
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

#include "nearest_codeword_byte_rows.h"

struct ByteCandidate {
  int place;
  uint32_t lane;  // group * kTickLanes + lane
  int score;
};

struct ByteScratch {
  ByteRows* rows;
  uint8_t* tiles;        // whole tiles of rows
  int16_t* factors;      // pairs: [kMaxRows][2], as score_panel_bytes takes them
  uint8_t* row;          // [D + kLanes] bytes of a row
  Tick* minima;
  ByteCandidate* candidates;  // [kByteCandidates]
  int* scored_place;     // [kScoredPairs], as the next two: pairs of a row and a codeword scored in fp32
  uint32_t* scored_code;
  float* score;
  int* left;             // [kScoredPairs] those that fp32 leaves
};

// Codeword v of the cb.byte_group behind a lane; beyond the last codeword the last.
VQK_INLINE uint32_t codeword(const Codebook& cb, uint32_t lane, int v) {
  const uint32_t k = (lane / kTickLanes * cb.byte_group + v) * kTickLanes + lane % kTickLanes;
  const uint32_t last = static_cast<uint32_t>(cb.K - 1);
  return k < last ? k : last;
}

// |c|^2 / 2 - z.c in fp32 of the pairs [first, last) in s; the three beyond may be overwritten.
static void score_pairs(const Codebook& cb, const float* z, const ByteScratch& s, int first, int last) {
  const int64_t D = cb.D;
  int* const place = s.scored_place;
  uint32_t* const code = s.scored_code;
  for (int j = last; last > first && (j - first) % 4; ++j) place[j] = place[last - 1], code[j] = code[last - 1];
  for (int j = first; j < last; j += 4) {
    const float *x[4], *c[4];
    for (int r = 0; r < 4; ++r) {
      x[r] = z + s.rows->order[place[j + r]] * D;
      c[r] = static_cast<const float*>(cb.rows) + code[j + r] * D;
    }
    Vec sum[4] = {};
    for (int64_t d = 0; d < D; d += kLanes)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sum[r] = VQK_FMA(features(x[r], d, D), features(c[r], d, D), sum[r]);
    const float* half = cb.half_norms;
    const Four scores = Four{half[code[j]], half[code[j + 1]], half[code[j + 2]], half[code[j + 3]]} - sums_of_lanes(sum);
    __builtin_memcpy(s.score + j, &scores, sizeof scores);
  }
}

// Scores the codewords behind the lowest lane of every place, cb.byte_group of them, place by place in s.score. Such a
// codeword exists, so those that can still win have a score in ticks of no more than the limit then set.
static void score_lowest(const Codebook& cb, const float* z, const ByteScratch& s, int candidates, float* best) {
  ByteRows& b = *s.rows;
  const int width = cb.byte_group, count = b.count;
  for (int c = 0; c < candidates; ++c) {
    const auto [j, lane, score] = s.candidates[c];
    const uint32_t same = -static_cast<uint32_t>(score == b.best[j]);  // a mask: compilers make branches of selections
    b.lowest[j] = (lane & same) | (b.lowest[j] & ~same);
  }
  for (int v = 0; v < width; ++v)
    for (int j = 0; j < count; ++j) {
      s.scored_place[v * count + j] = j;
      s.scored_code[v * count + j] = codeword(cb, b.lowest[j], v);
    }
  score_pairs(cb, z, s, 0, count * width);
  for (int j = 0; j < count; ++j) best[j] = s.score[j];
  for (int v = 1; v < width; ++v)
    for (int j = 0; j < count; ++j) best[j] = s.score[v * count + j] < best[j] ? s.score[v * count + j] : best[j];
  for (int j = 0; j < count; ++j) {
    double limit = (best[j] + b.shift[j]) * b.ticks[j] + b.eps[j];
    limit = limit < b.limit[j] ? limit : b.limit[j];
    b.limit[j] = static_cast<int>(limit < kNoTicks ? kNoTicks : limit);  // towards zero: no lower than the floor
  }
}

// Makes room among the candidates: drops those that cannot win any more, then, if that is not enough, rows with many.
static __attribute__((noinline)) int prune_bytes(const Codebook& cb, const float* z, const ByteScratch& s, int count) {
  ByteRows& b = *s.rows;
  float best[kPlaces];
  int of_place[kMaxRows] = {};
  score_lowest(cb, z, s, count, best);
  auto drop = [&] {
    int kept = 0;
    for (int j = 0; j < count; ++j)
      if (s.candidates[j].score <= b.limit[s.candidates[j].place]) s.candidates[kept++] = s.candidates[j];
    count = kept;
  };
  drop();
  if (count < kByteCandidates / 2) return count;
  for (int j = 0; j < count; ++j)
    if (++of_place[s.candidates[j].place] > kByteCandidates / 2 / kMaxRows) b.limit[s.candidates[j].place] = kNoTicks;
  drop();
  return count;
}

// Appends to s.candidates, which holds `count`, of places [start, last) of a tile; returns how many there are then.
// minima: `groups` vectors, kTileRows * kTickLanes apart, of lanes that start at `lane`.
VQK_INLINE int filter_tile(const Codebook& cb, const float* z, const ByteScratch& s, const Tick* minima, int64_t groups,
                           uint32_t lane, int start, int last, int count) {
  constexpr int64_t kStep = kTileRows * kTickLanes, kWord = 64 / kTickLanes;
  ByteRows& b = *s.rows;
  for (int j = start; j < last; ++j, minima += kTickLanes) {
    Ticks lowest0 = load_ticks(minima), lowest1 = lowest0;
    int64_t g = 1;
    for (; g + 1 < groups; g += 2) {
      lowest0 = VQK_MIN_TICKS(lowest0, load_ticks(minima + g * kStep));
      lowest1 = VQK_MIN_TICKS(lowest1, load_ticks(minima + (g + 1) * kStep));
    }
    if (g < groups) lowest0 = VQK_MIN_TICKS(lowest0, load_ticks(minima + g * kStep));
    const int best = VQK_LOWEST_TICKS(VQK_MIN_TICKS(lowest0, lowest1));
    b.best[j] = best < b.best[j] ? best : b.best[j];
  }
  minima -= (last - start) * kTickLanes;
  for (int j = start; j < last; ++j) b.limit[j] = b.best[j] + b.window[j] < b.limit[j] ? b.best[j] + b.window[j] : b.limit[j];
  for (int j = start; j < last; ++j, minima += kTickLanes) {
    if (count > kByteCandidates - kBlockVectors * kTickLanes) count = prune_bytes(cb, z, s, count);
    const Ticks limit = Ticks{} + static_cast<Tick>(b.limit[j]);
    for (int64_t first = 0; first < groups; first += kWord) {
      uint64_t word = 0;
      for (int64_t g = 0; g < kWord && first + g < groups; ++g)
        word |= static_cast<uint64_t>(VQK_WITHIN(load_ticks(minima + (first + g) * kStep), limit)) << g * kTickLanes;
      auto take = [&] __attribute__((always_inline)) () {
        const int bit = __builtin_ctzll(word | 1ull << 63);
        s.candidates[count] = {j, lane + static_cast<uint32_t>(first * kTickLanes + bit),
                               minima[(first + bit / kTickLanes) * kStep + bit % kTickLanes]};
        count += word != 0;
        word &= word - 1;
      };
      // two without a branch that would be predicted badly, where there are few words
      if (groups <= 2 * kWord) take(), take();
      while (word) take();
    }
  }
  return count;
}

// Fills s.candidates; returns how many.
template <bool OneChunk>
static int coarse_pass_bytes(const Codebook& cb, const float* z, const ByteScratch& s) {
  const ByteRows& b = *s.rows;
  Tick* const minima = s.minima;
  int candidates = 0;
  const int64_t steps = (cb.D + kStepFeatures - 1) / kStepFeatures;
  const int64_t chunks = (cb.D + kChunkFeatures - 1) / kChunkFeatures;
  const int64_t panels = (cb.K + kByteWidth - 1) / kByteWidth;
  const int64_t panel_bytes = steps * kStepFeatures * kByteWidth;
  const Tick* starts = static_cast<const Tick*>(cb.starts8);
  const HalfNorm* half_norms = static_cast<const HalfNorm*>(cb.half_norms8);
  const int64_t panels_per_group = cb.byte_group / 2;
  int64_t block = kBlockBytes / panel_bytes;
  if (block > kBlockVectors * panels_per_group) block = kBlockVectors * panels_per_group;
  block = block / panels_per_group * panels_per_group;
  if (block < panels_per_group) block = panels_per_group;
  constexpr int64_t kStep = kTileRows * kTickLanes;
  for (int64_t first = 0; first < panels; first += block) {
    const int64_t last = first + block < panels ? first + block : panels;
    const uint32_t lane = static_cast<uint32_t>(first / panels_per_group * kTickLanes);
    for (int start = 0; start < b.count; start += kTileRows) {
      Tick* out = minima;
      for (int64_t p = first, in_group = 0; p < last; ++p) {
        Ticks lo[kTileRows], hi[kTileRows];
        const uint8_t* bytes = s.tiles + start * 4 * steps;
        const int8_t* panel = cb.panels8 + p * panel_bytes;
        const Tick* begin = starts + p * chunks * kByteWidth;
#ifdef VQK_QUADS
        score_panel_bytes(bytes, steps, b.tile_ticks[start / kTileRows], panel, begin, half_norms + p * kByteWidth, lo, hi);
#else
        score_panel_bytes<OneChunk>(bytes, steps, s.factors + 2 * start, panel, begin, cb.byte_shift,
                                    half_norms + p * kByteWidth, lo, hi);
#endif
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          Ticks x = VQK_MIN_TICKS(lo[r], hi[r]);
          if (in_group) x = VQK_MIN_TICKS(x, load_ticks(out + r * kTickLanes));
          *reinterpret_cast<TicksAtAny*>(out + r * kTickLanes) = x;
        }
        if (++in_group == panels_per_group || p + 1 == last) in_group = 0, out += kStep;
      }
      const int end = start + kTileRows < b.count ? start + kTileRows : b.count;
      candidates = filter_tile(cb, z, s, minima, (out - minima) / kStep, lane, start, end, candidates);
    }
  }
  return candidates;
}
