// The coarse pass in 8-bit integers, before the ones in 16 bits and floats. Part of nearest_codeword_kernel.h at
// levels that define VQK_BYTES; a Shorts vector holds 2 * VQK_LANES int16:
//   VQK_PAIR(p)               the 4 bytes at p in every 32-bit lane
//   VQK_MADD_BYTES(x, c)      x.lo * c.lo + x.hi * c.hi of unsigned x and signed c in every int16, saturated
//   VQK_MULHRS(a, b)          a * b / 2^15, rounded          VQK_SUBS(a, b)   a - b, saturated
//   VQK_MIN16, VQK_LOWEST16   minimum of lanes, over lanes   VQK_NONZERO16(x) bit i = lane i of x is not 0
// or, with VQK_QUADS, instead of VQK_MADD_BYTES
//   VQK_DOT_BYTES(x, c, sum)  sum + the 4 products of unsigned x and signed c in every 32-bit lane
//   VQK_PACK16(a, b)          int32 lanes as int16, saturated: four of a, four of b, in turn
//
// A vector of bytes takes four times as many features as one of floats, and sums stay in 16 bits: a multiply-add and an
// addition per 2 * VQK_LANES * 2 products, so up to three times the fp32 peak with AVX2. In quads (VNNI) it is one
// instruction per VQK_LANES * 4 products, summed in 32 bits: four times.
//
// Rows and codewords are moved to the codebook's mean (l2: both, dot and cosine: the codewords), which changes no
// comparison, then rounded to multiples of a row's unit a and the codebook's unit b: z = a n + e, c = b m + f. The
// units are as small as these allow, for every chunk of kChunkFeatures features (quads: for all features):
//   |n_d| <= 127 (stored as n_d + 128), |m_d| <= 63: no pair of products saturates: 2 * 255 * 63 < 2^15 (quads: 127)
//   |n| |m| < 2^15 - 8: a chunk's sum of products fits 16 bits (Cauchy-Schwarz), whatever its partial sums wrapped to
//   (quads: 2^shift times that, for a shift that leaves ordinary rows alone)
// What rounding lost, |e| and |f|, is measured, not assumed. Chunks add up after a shift that keeps their sum in 16
// bits, and |c|^2 / 2 joins in the same unit, so that a score is an int16 and a vector of minima holds 2 * VQK_LANES:
//
//        panel of codewords [D/2][4 * VQK_LANES][2]     rows of a tile [D/2][VQK_ROWS][2][2]
//          | c0 c0 | c1 c1 | ... |  features d, d+1       | z0 z0 z0 z0 | z1 z1 z1 z1 | ...
//        quads: [D/4][2 * VQK_LANES][4]                 [D/4][VQK_ROWS][4]
//
// The bound is about 3 % of |z||c|. Once one fp32 score is known nothing further than a bound above it can win: a few
// to a few tens of codewords a row are scored in fp32 one by one, and what is left within that bound is compared
// canonically. Rows with too many candidates take the next coarse pass.

constexpr int kByteLanes = 2 * kLanes;
constexpr int64_t kMostByteFeatures = 1024;
#ifdef VQK_QUADS
constexpr int kStepFeatures = 4, kByteWidth = kByteLanes, kLargestByte = 127;
constexpr int64_t kChunkFeatures = kMostByteFeatures;  // one chunk
typedef int32_t Start;
typedef uint32_t CodeBytes;  // a codeword's share of a step
#else
constexpr int kStepFeatures = 2, kByteWidth = 2 * kByteLanes, kLargestByte = 63;
constexpr int64_t kChunkFeatures = 64;
typedef int16_t Start;
typedef uint16_t CodeBytes;
#endif
constexpr ByteFormat kByteFormat = {kByteWidth, kStepFeatures, kLargestByte, kChunkFeatures};
constexpr int kMostByteGroup = 4;              // panels folded into one vector
constexpr int kByteCandidates = 64;            // lanes of minima per row; more than that: the next coarse pass
constexpr double kChunkSum = 32760;            // of products, at most

typedef int16_t Shorts __attribute__((vector_size(4 * VQK_LANES)));
typedef int16_t ShortsAtAny __attribute__((vector_size(4 * VQK_LANES), aligned(2), may_alias));
typedef uint16_t Sums __attribute__((vector_size(4 * VQK_LANES)));  // wrap around

VQK_INLINE Shorts load_shorts(const int16_t* p) { return *reinterpret_cast<const ShortsAtAny*>(p); }

// Where codeword j of a panel lies, so that its score comes to lane j.
VQK_INLINE int slot(int j) {
#ifdef VQK_QUADS
  return j % 8 / 4 * kLanes + j / 8 * 4 + j % 4;
#else
  return j;
#endif
}

#ifndef VQK_QUADS
// Sums of products over `steps` steps of a chunk, and what they start with.
VQK_INLINE void sum_chunk_bytes(const uint8_t* z, int64_t steps, const int8_t* panel, const Start* start, Sums* sum0,
                                Sums* sum1) {
  const Sums s0 = (Sums)load_shorts(start), s1 = (Sums)load_shorts(start + kByteLanes);
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
#endif

// Scores of a tile of rows against one panel: lo, and hi where a panel has two vectors. start: [chunks][kByteWidth],
// what the sums begin with.
template <bool OneChunk>
VQK_INLINE void score_panel_bytes(const uint8_t* z, int64_t steps, const int16_t* factors, const int8_t* panel,
                                  const Start* start, int shift, const int16_t* half_norms, Shorts* lo, Shorts* hi) {
#ifdef VQK_QUADS
  typedef int32_t Signed __attribute__((vector_size(4 * VQK_LANES)));
  IntVec sum0[kTileRows], sum1[kTileRows];
  const IntVec s0 = *reinterpret_cast<const IntVecAtAny*>(start);
  const IntVec s1 = *reinterpret_cast<const IntVecAtAny*>(start + kLanes);
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
  const Shorts h0 = load_shorts(half_norms);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
    lo[r] = VQK_SUBS(VQK_MULHRS(h0, VQK_PAIR(factors + 2 * r)),
                     VQK_PACK16((Signed)sum0[r] >> shift, (Signed)sum1[r] >> shift));
  (void)hi;
#else
  constexpr int64_t kChunkSteps = kChunkFeatures / kStepFeatures;
  Sums sum0[kTileRows], sum1[kTileRows];
  if constexpr (OneChunk) {  // unshifted, and the sums stay in registers
    sum_chunk_bytes(z, steps, panel, start, sum0, sum1);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) lo[r] = (Shorts)sum0[r], hi[r] = (Shorts)sum1[r];
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) lo[r] = hi[r] = Shorts{};
    for (int64_t first = 0; first < steps; first += kChunkSteps, start += kByteWidth) {
      const int64_t count = steps - first < kChunkSteps ? steps - first : kChunkSteps;
      sum_chunk_bytes(z + first * 4 * kTileRows, count, panel + first * 2 * kByteWidth, start, sum0, sum1);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        lo[r] += (Shorts)sum0[r] >> shift;
        hi[r] += (Shorts)sum1[r] >> shift;
      }
    }
  }
  const Shorts h0 = load_shorts(half_norms), h1 = load_shorts(half_norms + kByteLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    const IntVec factor = VQK_PAIR(factors + 2 * r);
    lo[r] = VQK_SUBS(VQK_MULHRS(h0, factor), lo[r]);
    hi[r] = VQK_SUBS(VQK_MULHRS(h1, factor), hi[r]);
  }
#endif
}

struct ByteRow {
  int16_t best, limit, slack;  // as Row's, in ticks: units of the row's scores
  int count;                   // of candidates; kEveryCodeword: for the next pass; kNone: takes no part
  const float* z;
  double shift, ticks, eps;    // (fp32 score + shift) * ticks is within eps of the score in ticks
  int16_t score[kByteCandidates];
  uint32_t lane[kByteCandidates];  // group * kByteLanes + lane
};

VQK_INLINE int16_t add_saturated(int a, int b) {
  return static_cast<int16_t>(a + b > 32767 ? 32767 : a + b);
}

VQK_INLINE float sum_of_lanes(Vec x) {
#if VQK_LANES == 16
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  typedef float Half __attribute__((vector_size(32)));
  const Half y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  const Vec y = x;
#endif
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter z = __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
  z += __builtin_shufflevector(z, z, 2, 3, 0, 1);
  return z[0] + z[1];
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
  a += b;
  float sum = 0;
  for (; d < D; ++d) sum += z[d] * c[d];
  return half_norm - (sum + sum_of_lanes(a));
}

// The codewords behind a candidate: call(k) for each.
template <class Call>
VQK_INLINE void for_each_codeword(const Codebook& cb, uint32_t lane, const Call& call) {
  const int64_t step = static_cast<int64_t>(cb.byte_group) * kByteWidth;
  const int64_t first = lane / kByteLanes * step + lane % kByteLanes;
  for (int64_t k = first; k < first + step && k < cb.K; k += kByteLanes) call(k);
}

// A codeword with this fp32 score exists: those that can still win have a score in ticks of no more than limit.
VQK_INLINE void tighten(ByteRow& row, float score) {
  const double limit = (score + row.shift) * row.ticks + row.eps;
  if (limit < row.limit) row.limit = limit < -32768 ? -32768 : static_cast<int16_t>(__builtin_floor(limit));
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

// minima: `groups` vectors, kTileRows * kByteLanes apart, of lanes that start at `lane`.
VQK_INLINE void filter_bytes(const Codebook& cb, ByteRow& row, const int16_t* minima, int64_t groups, uint32_t lane) {
  constexpr int64_t kStep = kTileRows * kByteLanes;
  Shorts lowest0 = load_shorts(minima), lowest1 = lowest0;
  int64_t g = 1;
  for (; g + 1 < groups; g += 2) {
    lowest0 = VQK_MIN16(lowest0, load_shorts(minima + g * kStep));
    lowest1 = VQK_MIN16(lowest1, load_shorts(minima + (g + 1) * kStep));
  }
  if (g < groups) lowest0 = VQK_MIN16(lowest0, load_shorts(minima + g * kStep));
  const int16_t best = VQK_LOWEST16(VQK_MIN16(lowest0, lowest1));
  if (best > row.limit) return;
  if (best < row.best) {
    row.best = best;
    const int16_t limit = add_saturated(best, row.slack);
    if (limit < row.limit) row.limit = limit;
  }
  const Shorts limit = Shorts{} + row.limit;
  for (int64_t first = 0; first < groups; first += 16) {  // as in filter: a lane's bits say which groups
    const int64_t last = first + 16 < groups ? first + 16 : groups;
    Sums bits = {};
    for (g = last - 1; g >= first; --g) bits = bits + bits - (Sums)(load_shorts(minima + g * kStep) <= limit);
    uint16_t words[kByteLanes];
    __builtin_memcpy(words, &bits, sizeof words);
    for (unsigned lanes = VQK_NONZERO16(bits); lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      for (uint32_t word = words[i]; word; word &= word - 1) {
        g = first + __builtin_ctz(word);
        if (row.count == kByteCandidates && !prune_bytes(cb, row)) return;
        row.score[row.count] = minima[g * kStep + i];
        row.lane[row.count++] = lane + static_cast<uint32_t>(g * kByteLanes + i);
      }
    }
  }
}

// Fills the rows' candidates. bytes: whole tiles; factors: [rows][2], the row's factor for half norms, twice.
template <bool OneChunk>
static void coarse_pass_bytes(const Codebook& cb, const uint8_t* bytes, const int16_t* factors, ByteRow* rows, int n,
                              int16_t* minima) {
  const int64_t steps = (cb.D + kStepFeatures - 1) / kStepFeatures;
  const int64_t chunks = (cb.D + kChunkFeatures - 1) / kChunkFeatures;
  const int64_t panels = (cb.K + kByteWidth - 1) / kByteWidth, group = cb.byte_group;
  const int64_t panel_bytes = steps * kStepFeatures * kByteWidth;
  const Start* starts = static_cast<const Start*>(cb.starts8);
  int64_t block = kBlockBytes / panel_bytes;
  if (block > kBlockVectors * group) block = kBlockVectors * group;
  block = block / group * group;
  if (block < group) block = group;
  constexpr int64_t kStep = kTileRows * kByteLanes;
  for (int64_t first = 0; first < panels; first += block) {
    const int64_t last = first + block < panels ? first + block : panels;
    for (int start = 0; start < n; start += kTileRows) {
      int16_t* out = minima;
      for (int64_t p = first, in_group = 0; p < last; ++p) {
        Shorts lo[kTileRows], hi[kTileRows];
        score_panel_bytes<OneChunk>(bytes + start * 4 * steps, steps, factors + 2 * start, cb.panels8 + p * panel_bytes,
                          starts + p * chunks * kByteWidth, cb.byte_shift, cb.half_norms8 + p * kByteWidth, lo, hi);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          Shorts x = lo[r];
          if (kByteWidth > kByteLanes) x = VQK_MIN16(x, hi[r]);
          if (in_group) x = VQK_MIN16(x, load_shorts(out + r * kByteLanes));
          *reinterpret_cast<ShortsAtAny*>(out + r * kByteLanes) = x;
        }
        if (++in_group == group || p + 1 == last) in_group = 0, out += kStep;
      }
      for (int i = start; i < n && i < start + kTileRows; ++i)
        if (rows[i].count >= 0)
          filter_bytes(cb, rows[i], minima + (i - start) * kByteLanes, (out - minima) / kStep,
                       static_cast<uint32_t>(first / group * kByteLanes));
    }
  }
}

// ---------------------------------------------------------------- rows and codewords as bytes

// Lengths of a row or codeword moved by the mean. fp32 sums of squares are off by 2^-17.
struct Centred {
  double peak, chunk, squares;  // largest magnitude; square of the longest chunk; of the whole
};

// out[0 .. D) = x - mean (x, where mean is null), then zeros up to a whole vector.
VQK_INLINE Centred centre(const float* x, const float* mean, int64_t D, float* out) {
  Centred most{};
  Vec least = {};  // of -|x|
  for (int64_t first = 0; first < D; first += kChunkFeatures) {
    const int64_t last = first + kChunkFeatures < D ? first + kChunkFeatures : D;
    Vec sum = {};
    auto take = [&](int64_t d, Vec y) {
      store(out + d, y);
      sum = VQK_FMA(y, y, sum);
      least = VQK_MIN(least, VQK_MIN(y, -y));
    };
    int64_t d = first;
    for (; d + kLanes <= last; d += kLanes) take(d, mean ? load(x + d) - load(mean + d) : load(x + d));
    if (d < last) {
      Vec y = {};
      for (int j = 0; j < last - d; ++j) y[j] = mean ? x[d + j] - mean[d + j] : x[d + j];
      take(d, y);
    }
    const double total = sum_of_lanes(sum);
    most.chunk = total > most.chunk ? total : most.chunk;
    most.squares += total;
  }
  most.peak = -static_cast<double>(lowest(least));
  return most;
}

// kLanes values from x as multiples of a unit: returns the multiples as floats, x = what they lack.
VQK_INLINE Vec to_multiples(Vec& x, float unit, float inverse) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer
  const Vec n = x * inverse + kRound - kRound;
  x = VQK_FMA(n, VQK_SPLAT(-unit), x);
  return n;
}
VQK_INLINE IntVec to_bytes(Vec n, float offset) {  // the low bytes of the lanes
  return (IntVec)(n + (0x1.8p23f + offset)) & 255u;
}

VQK_INLINE uint32_t step_bytes(const uint32_t* x) {
  uint32_t bytes = 0;
#pragma GCC unroll 4
  for (int f = 0; f < kStepFeatures; ++f) bytes |= x[f] << 8 * f;
  return bytes;
}

// What a row's unit is no less than: so much for its longest chunk's length; that for the half norms to fit 16 bits.
struct ByteLimits {
  double per_length, half_norms;
};

static ByteLimits byte_limits(const Codebook& cb, double tick) {
  // rounding makes a chunk longer by sqrt(features) / 2 units at most
  const int64_t features = cb.D < kChunkFeatures ? cb.D : kChunkFeatures;
  const double most = kChunkSum * (kStepFeatures == 4 ? 1 << cb.byte_shift : 1);
  const double left = most / cb.byte_length - 0.5001 * __builtin_sqrt(static_cast<double>(features));
  return {1 / left, cb.half_norm_unit * (1 + 0x1p-14) / tick};
}

struct ByteScale {
  float unit;      // a
  double row;      // |row| after centring, or up to 2^-15 more
  double error;    // no less than |row - unit * bytes|
};

// Row i of the tiles from floats [D]. `row`: room for D + kLanes integers. False where bytes cannot hold it.
VQK_INLINE bool row_to_bytes(const Codebook& cb, const ByteLimits& limits, const float* z, double norm, uint32_t* row,
                             uint8_t* tiles, int i, ByteScale* scale) {
  typedef uint32_t Quad __attribute__((aligned(4), may_alias));
  const int64_t D = cb.D, steps = (D + kStepFeatures - 1) / kStepFeatures;
  const Centred most = centre(z, cb.l2 ? cb.mean : nullptr, D, reinterpret_cast<float*>(row));
  scale->row = __builtin_sqrt(most.squares) * (1 + 0x1p-17);
  double unit = __builtin_sqrt(most.chunk) * (1 + 0x1p-17) * limits.per_length;
  unit = most.peak * (1 / 126.99) > unit ? most.peak * (1 / 126.99) : unit;
  unit = limits.half_norms > unit ? limits.half_norms : unit;
  if (!(unit > 0x1p-60 && unit < 0x1p60)) return false;
  const float a = static_cast<float>(unit * (1 + 0x1p-20)), inverse = 1 / a;
  scale->unit = a;
  Vec lost = {};
  for (int64_t d = 0; d < D; d += kLanes) {
    Vec x = load(reinterpret_cast<float*>(row) + d);
    const Vec n = to_multiples(x, a, inverse);
    lost = VQK_FMA(x, x, lost);
    *reinterpret_cast<IntVecAtAny*>(row + d) = to_bytes(n, 128);
  }
  // the sum's own roundings; what subtracting the mean rounded off
  scale->error = __builtin_sqrt(static_cast<double>(sum_of_lanes(lost))) * (1 + 0x1p-12) +
                 (cb.l2 ? 0x1p-23 * (norm + scale->row) : 0.0);
  Quad* to = reinterpret_cast<Quad*>(tiles) + i / kTileRows * steps * kTileRows + i % kTileRows;
  for (int64_t d = 0; d < steps; ++d) {
    const uint32_t bytes = step_bytes(row + d * kStepFeatures);
    to[d * kTileRows] = kStepFeatures == 2 ? bytes * 0x10001u : bytes;
  }
  return true;
}

// Of codewords [first, last) of cb, centred.
static ByteLengths byte_lengths(const Codebook& cb, int64_t first, int64_t last) {
  float centred[kMostByteFeatures + kLanes];
  double row = 0, chunk = 0, peak = 0;
  for (int64_t k = first; k < last; ++k) {
    const Centred most = centre(static_cast<const float*>(cb.rows) + k * cb.D, cb.mean, cb.D, centred);
    row = most.squares > row ? most.squares : row;
    chunk = most.chunk > chunk ? most.chunk : chunk;
    peak = most.peak > peak ? most.peak : peak;
  }
  return {__builtin_sqrt(row), __builtin_sqrt(chunk), peak};
}

// Fills panels [first, last) of cb; returns the longest that a codeword lost and the longest chunk of bytes. Lanes
// beyond the last codeword repeat it: their scores are never the lowest alone.
static ByteLengths pack_bytes(const Codebook& cb, int64_t first, int64_t last) {
  const int64_t D = cb.D, steps = (D + kStepFeatures - 1) / kStepFeatures;
  const int64_t chunks = (D + kChunkFeatures - 1) / kChunkFeatures;
  CodeBytes* panels = reinterpret_cast<CodeBytes*>(const_cast<int8_t*>(cb.panels8));
  Start* starts = static_cast<Start*>(const_cast<void*>(cb.starts8));
  int16_t* half_norms = const_cast<int16_t*>(cb.half_norms8);
  const float unit = static_cast<float>(cb.byte_unit), inverse = 1 / unit;
  float centred[kMostByteFeatures + kLanes];
  uint32_t* bytes = reinterpret_cast<uint32_t*>(centred);
  double most_lost = 0, most_length = 0;
  for (int64_t p = first; p < last; ++p)
    for (int j = 0; j < kByteWidth; ++j) {
      const int64_t k = p * kByteWidth + j < cb.K ? p * kByteWidth + j : cb.K - 1;
      const Centred most = centre(static_cast<const float*>(cb.rows) + k * D, cb.mean, D, centred);
      Vec lost = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = chunk * kChunkFeatures, end = begin + kChunkFeatures < D ? begin + kChunkFeatures : D;
        Vec sum = {}, length = {};  // integers below 2^24: exact
        for (int64_t d = begin; d < end; d += kLanes) {
          Vec x = load(centred + d);
          const Vec n = to_multiples(x, unit, inverse);
          lost = VQK_FMA(x, x, lost);
          sum += n;
          length += n * n;
          *reinterpret_cast<IntVecAtAny*>(bytes + d) = to_bytes(n, 0);
        }
        const double squares = sum_of_lanes(length);
        most_length = squares > most_length ? squares : most_length;
        starts[(p * chunks + chunk) * kByteWidth + slot(j)] =
            static_cast<Start>(-128 * static_cast<int>(sum_of_lanes(sum)));
      }
      CodeBytes* to = panels + p * steps * kByteWidth + slot(j);
      for (int64_t d = 0; d < steps; ++d)
        to[d * kByteWidth] = static_cast<CodeBytes>(step_bytes(bytes + d * kStepFeatures));
      const double half_norm = cb.half_norm_unit > 0 ? 0.5 * most.squares / cb.half_norm_unit : 0.0;
      half_norms[p * kByteWidth + j] = static_cast<int16_t>(__builtin_rint(half_norm));
      const double error = __builtin_sqrt(static_cast<double>(sum_of_lanes(lost))) * (1 + 0x1p-12) +
                           0x1p-23 * __builtin_sqrt(most.squares);
      most_lost = error > most_lost ? error : most_lost;
    }
  return {most_lost, __builtin_sqrt(most_length), 0};
}
