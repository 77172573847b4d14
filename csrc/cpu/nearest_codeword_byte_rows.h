// Rows and codewords as bytes. Part of nearest_codeword_bytes.h.

// kLanes features of x from d on, then zeros.
VQK_INLINE Vec features(const float* x, int64_t d, int64_t D) {
  return d + kLanes <= D ? load(x + d) : VQK_LOAD_FIRST(x + d, static_cast<int>(D - d));
}

// The same moved by the mean, or as they are.
template <bool Move>
VQK_INLINE Vec centred(const float* x, const float* mean, int64_t d, int64_t D) {
  return Move ? features(x, d, D) - features(mean, d, D) : features(x, d, D);
}

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
VQK_INLINE Eight half_of(Vec x, bool upper) {
#if VQK_LANES == 16
  return upper ? __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15)
               : __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return upper ? Eight{} : x;
#endif
}

// Of four vectors, each one's lanes folded into one.
template <class Fold>
VQK_INLINE Four fold_lanes(const Vec* x, const Fold& fold) {
  Eight e[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) e[r] = kLanes == 16 ? fold(half_of(x[r], false), half_of(x[r], true)) : half_of(x[r], false);
  const Eight a = fold(__builtin_shufflevector(e[0], e[1], 0, 8, 2, 10, 4, 12, 6, 14),
                       __builtin_shufflevector(e[0], e[1], 1, 9, 3, 11, 5, 13, 7, 15));
  const Eight b = fold(__builtin_shufflevector(e[2], e[3], 0, 8, 2, 10, 4, 12, 6, 14),
                       __builtin_shufflevector(e[2], e[3], 1, 9, 3, 11, 5, 13, 7, 15));
  const Eight c = fold(__builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13),
                       __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
  return fold(__builtin_shufflevector(c, c, 0, 1, 2, 3), __builtin_shufflevector(c, c, 4, 5, 6, 7));
}
VQK_INLINE Four sums_of_lanes(const Vec* x) {
  return fold_lanes(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
VQK_INLINE Four lowest_of_lanes(const Vec* x) {
  return fold_lanes(x, [](auto a, auto b) __attribute__((always_inline)) { return a < b ? a : b; });
}
VQK_INLINE float sum_of_lanes(Vec x) {
  const Vec one[4] = {x, x, x, x};
  return sums_of_lanes(one)[0];
}

// Of eight vectors, each one's sums over eight lanes: halves the number of vectors three times, within 128 bits at first.
// 16 lanes: the lower sums, then the upper ones.
VQK_INLINE Vec halves_of_eight(const Vec* x) {
  Vec a[4], b[2];
#if VQK_LANES == 16
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    a[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(x[2 * i], x[2 * i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(b[0], b[1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
         __builtin_shufflevector(b[0], b[1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#else
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    a[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
           __builtin_shufflevector(x[2 * i], x[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(b[0], b[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(b[0], b[1], 4, 5, 6, 7, 12, 13, 14, 15);
#endif
}

VQK_INLINE Eight sums_of_eight(const Vec* x) {
  const Vec sums = halves_of_eight(x);
  return kLanes == 16 ? half_of(sums, false) + half_of(sums, true) : half_of(sums, false);
}

// Of four rows or codewords: squared lengths after centring, as a whole and of the longest chunk; the largest
// magnitude; before centring the product with the mean. fp32 sums of D / kLanes or less and a few
// more terms: off by 2^-17.
struct FourRows {
  Four squares, chunk, peak, along;
};

template <bool Move>
VQK_INLINE FourRows measure(const float* const* x, const float* mean, int64_t D) {
  FourRows sums{};
  Vec least[4] = {};  // of -|y|
  for (int64_t first = 0; first < D; first += kChunkFeatures) {
    const int64_t last = first + kChunkFeatures < D ? first + kChunkFeatures : D;
    Vec squares[4] = {}, along[4] = {};
    for (int64_t d = first; d < last; d += kLanes) {
      const Vec m = features(mean, d, D);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const Vec v = features(x[r], d, D), y = Move ? v - m : v;
        squares[r] = VQK_FMA(y, y, squares[r]);
        along[r] = VQK_FMA(v, m, along[r]);
        least[r] = VQK_MIN(least[r], (Vec)((IntVec)y | 0x80000000u));
      }
    }
    const Four chunk = sums_of_lanes(squares);
    sums.chunk = sums.chunk < chunk ? chunk : sums.chunk;
    sums.squares += chunk;
    sums.along += sums_of_lanes(along);
  }
  sums.peak = -lowest_of_lanes(least);
  return sums;
}

// The rows of a task: place j of its tiles holds row order[j]. The rest is by place.
constexpr int kPlaces = kMaxRows + 16;
struct ByteRows {
  int count, order[kPlaces];
  float length[kPlaces], along[kPlaces];                 // |z - mean|, or 2^-16 more; z.mean
  float unit[kPlaces], lost[kPlaces];                    // a (0: bytes cannot hold the row); |e|^2
  float slack[kPlaces];                                  // 2 eps of fp32 scores
  double shift[kPlaces], ticks[kPlaces], eps[kPlaces];   // (fp32 score + shift) * ticks is within eps of a score
  // In the coarse pass, in ticks: units of the row's scores, or 2^-tag_bits of them in quads.
  int best[kPlaces];         // lowest score seen
  uint32_t lane[kPlaces];    // where that was
  int settled[kPlaces];      // the one whose codewords have been scored in fp32
  int limit[kPlaces];        // nothing above can win; kNoTicks: the row is for the next pass
  int tag_bits;              // low bits of minima that number their group
  float nearest[kPlaces];    // lowest fp32 score known, and whose it is
  uint32_t code[kPlaces];
  float tile_ticks[kMaxRows / kTileRows + 2];  // quads: of each tile
};

// kLanes values from x as multiples of a unit: returns the multiples as floats, x = what they lack.
VQK_INLINE Vec to_multiples(Vec& x, float unit, float inverse) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer
  const Vec n = x * inverse + kRound - kRound;
  x = VQK_FMA(n, VQK_SPLAT(-unit), x);
  return n;
}

// The low bytes of kLanes multiples.
VQK_INLINE void store_bytes(uint8_t* to, Vec n, float offset) {
  VQK_STORE_BYTES(to, (IntVec)(n + (0x1.8p23f + offset)));
}

#ifdef VQK_QUADS
VQK_INLINE void store_words(uint8_t* to, Vec n) { VQK_STORE_WORDS(to, (IntVec)(n + 0x1.8p23f)); }
#else
VQK_INLINE void store_words(uint8_t*, Vec) {}
#endif

// What a row's unit is no less than: so much for its largest magnitude and for its longest chunk's length; that for the
// half norms to fit.
struct ByteLimits {
  float per_peak, per_length, half_norms;
};

static ByteLimits byte_limits(const Codebook& cb, double tick) {
  // rounding makes a chunk longer by sqrt(features) / 2 units at most
  const int64_t features = cb.D < kChunkFeatures ? cb.D : kChunkFeatures;
  const double left = kChunkSum / cb.byte_length - 0.5001 * __builtin_sqrt(static_cast<double>(features));
  const double per_length = cb.byte_words ? 1 / kWordLength : kStepFeatures == 4 ? 0.0 : 1 / left;
  return {cb.byte_words ? 0.0f : 1 / 126.99f, static_cast<float>(per_length),
          static_cast<float>(cb.half_norm_unit * (1 + 0x1p-14) / tick)};
}

// Lengths and units of rows z[0..n). A row that is not finite has unit 0, and a length that is no number below 2^40.
template <bool L2>
static void measure_rows(const Codebook& cb, const float* z, int n, const ByteLimits& limits, ByteRows& b) {
  float peak[kPlaces], chunk[kPlaces];
  auto store = [](float* to, Four x) __attribute__((always_inline)) { __builtin_memcpy(to, &x, sizeof x); };
  for (int i = 0; i < n; i += 4) {
    const float* x[4];
    for (int r = 0; r < 4; ++r) x[r] = z + (i + r < n ? i + r : n - 1) * cb.D;
    for (int r = 0; r < 4 && i + 4 + r < n; ++r)  // the next four: no stream of addresses is long enough to be foreseen
      for (int64_t d = 0; d < cb.D; d += 16) __builtin_prefetch(z + (i + 4 + r) * cb.D + d);
    const FourRows four = measure<L2>(x, cb.mean, cb.D);
    store(b.length + i, four.squares), store(b.along + i, four.along);
    store(peak + i, four.peak), store(chunk + i, four.chunk);
  }
  for (int i = 0; i < n; ++i) {
    b.length[i] = __builtin_sqrtf(b.length[i]) * (1 + 0x1p-17f);
    float unit = peak[i] * limits.per_peak;
    const float for_chunk = __builtin_sqrtf(chunk[i]) * limits.per_length;
    unit = unit < for_chunk ? for_chunk : unit;
    unit = (unit < limits.half_norms ? limits.half_norms : unit) * (1 + 0x1p-16f);
    b.unit[i] = (unit > 0x1p-50f) & (unit < 0x1p50f) & (b.length[i] < 0x1p40f) ? unit : 0.0f;
  }
}

// Places sorted by the rows' units, largest first, to one part in eight and 2^-16 of the largest.
static void order_by_unit(ByteRows& b) {
  constexpr int kSteps = 8 * 16;
  int first[kSteps] = {}, step[kMaxRows], most = 0;
  for (int j = 0; j < b.count; ++j) {
    uint32_t bits;
    __builtin_memcpy(&bits, &b.unit[j], sizeof bits);
    step[j] = static_cast<int>(bits >> 20);
    most = step[j] > most ? step[j] : most;
  }
  for (int j = 0; j < b.count; ++j) {
    step[j] = most - step[j] < kSteps ? most - step[j] : kSteps - 1;
    ++first[step[j]];
  }
  for (int s = 0, sum = 0; s < kSteps; ++s) {
    const int here = first[s];
    first[s] = sum, sum += here;
  }
  for (int j = 0; j < b.count; ++j) step[j] = first[step[j]]++;  // the place it goes to
  auto move = [&](auto* x) {
    __typeof__(*x + 0) from[kMaxRows];
    __builtin_memcpy(from, x, b.count * sizeof *x);
    for (int j = 0; j < b.count; ++j) x[step[j]] = from[j];
  };
  move(b.order), move(b.length), move(b.along), move(b.unit);
}

// AMX: a row's bytes to a tile [instructions][kTileOfRows][bytes of an instruction].
VQK_INLINE void store_parts(uint8_t* tile, int row, int64_t steps, const uint8_t* bytes) {
  const int64_t instructions = (steps + kTileSteps - 1) / kTileSteps, part = 4 * steps / instructions;
  for (int64_t i = 0; i < instructions; ++i) __builtin_memcpy(tile + (i * kTileOfRows + row) * part, bytes + i * part, part);
}

// Rows of z with their units to their places in the tiles; fills lost. In quads all rows of a tile get the unit of the
// largest. `scratch`: room for D + kLanes bytes.
template <bool L2>
static void rows_to_bytes(const Codebook& cb, const float* z, uint8_t* scratch, uint8_t* tiles, ByteRows& b) {
  typedef uint32_t Quad __attribute__((aligned(4), may_alias));
  const int64_t D = cb.D, steps = cb.byte_steps;
  const int count = b.count, tile_rows = tile_rows_of(cb);
  const bool parts = in_tiles(cb) && steps > kTileSteps;  // a row's instructions apart
  float unit = 0;
  for (int j = 0; j < count; j += 4) {
    Vec lost[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const int place = j + r < count ? j + r : count - 1;
      if (kStepFeatures == 4 && place % tile_rows == 0) {
        unit = 0;
        for (int p = place; p < place + tile_rows && p < count; ++p) unit = b.unit[p] > unit ? b.unit[p] : unit;
      }
      const float* row = z + b.order[place] * D;
      const float a = kStepFeatures == 4 ? unit : b.unit[place], inverse = 1 / a;
      b.unit[place] = a;
      uint8_t* bytes = kStepFeatures == 4 && !parts ? tiles + place * 4 * steps : scratch;
      for (int64_t d = 0; d < D; d += kLanes) {
        Vec x = centred<L2>(row, cb.mean, d, D);
        const Vec n = to_multiples(x, a, inverse);
        lost[r] = VQK_FMA(x, x, lost[r]);
        if (cb.byte_words) store_words(bytes + 2 * d, n);
        else store_bytes(bytes + d, n, 128);  // in quads the next row takes what is beyond D
      }
      if (parts) store_parts(tiles + place / tile_rows * tile_rows * 4 * steps, place % tile_rows, steps, scratch);
      if (kStepFeatures == 4) continue;
      Quad* to = reinterpret_cast<Quad*>(tiles) + place / kTileRows * steps * kTileRows + place % kTileRows;
      for (int64_t d = 0; d < steps; ++d) {
        uint16_t pair;
        __builtin_memcpy(&pair, scratch + 2 * d, 2);
        to[d * kTileRows] = pair * 0x10001u;
      }
    }
    const Four sums = sums_of_lanes(lost);
    __builtin_memcpy(b.lost + j, &sums, sizeof sums);
  }
}

// Of codewords [first, last) of cb, centred.
static ByteLengths byte_lengths(const Codebook& cb, int64_t first, int64_t last) {
  Four row{}, chunk{}, peak{};
  auto raise = [](Four& most, Four x) __attribute__((always_inline)) { most = most < x ? x : most; };
  for (int64_t k = first; k < last; k += 4) {
    const float* x[4];
    for (int r = 0; r < 4; ++r) x[r] = static_cast<const float*>(cb.rows) + (k + r < last ? k + r : last - 1) * cb.D;
    const FourRows four = measure<true>(x, cb.mean, cb.D);
    raise(row, four.squares), raise(chunk, four.chunk), raise(peak, four.peak);
  }
  auto most = [](Four x) {
    const double a = x[0] < x[1] ? x[1] : x[0], b = x[2] < x[3] ? x[3] : x[2];
    return a < b ? b : a;
  };
  return {__builtin_sqrt(most(row)) * (1 + 0x1p-17), __builtin_sqrt(most(chunk)) * (1 + 0x1p-17), most(peak)};
}

// Fills panels [first, last) of cb; returns the longest that a codeword lost and the longest chunk of bytes. Lanes
// beyond the last codeword repeat it: their scores are never the lowest alone.
static ByteLengths pack_bytes(const Codebook& cb, int64_t first, int64_t last) {
  constexpr bool kQuads = kStepFeatures == 4;
  const int64_t D = cb.D, steps = cb.byte_steps;
  const int64_t chunks = (D + kChunkFeatures - 1) / kChunkFeatures;
  CodeBytes* panels = reinterpret_cast<CodeBytes*>(const_cast<int8_t*>(cb.panels8));
  Tick* starts = static_cast<Tick*>(const_cast<void*>(cb.starts8));
  HalfNorm* half_norms = static_cast<HalfNorm*>(const_cast<void*>(cb.half_norms8));
  const float unit = static_cast<float>(cb.byte_unit), inverse = 1 / unit;
  uint8_t bytes[kMostByteFeatures + 4 * kLanes] = {};  // zeros where steps are filled up
  double most_lost = 0, most_length = 0;
  for (int64_t p = first; p < last; ++p)
    for (int j = 0; j < kByteWidth; ++j) {
      const int64_t vector = 2 * p + j / kTickLanes, group = vector / cb.byte_group, lane = j % kTickLanes;
      const int64_t at = (group * kTickLanes + lane) * cb.byte_group + vector % cb.byte_group;
      const int64_t k = at < cb.K ? at : cb.K - 1;
      const float* row = static_cast<const float*>(cb.rows) + k * D;
      Vec lost = {};
      Doubles squares4 = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = chunk * kChunkFeatures, end = begin + kChunkFeatures < D ? begin + kChunkFeatures : D;
        Vec sum = {}, length = {};  // integers below 2^24: exact
        for (int64_t d = begin; d < end; d += kLanes) {
          Vec x = centred<true>(row, cb.mean, d, D);
          float y[kLanes];
          store(y, x);
          for (int i = 0; i < kLanes; i += kDoubles) squares4 += load_doubles(y + i) * load_doubles(y + i);
          const Vec n = to_multiples(x, unit, inverse);
          lost = VQK_FMA(x, x, lost);
          sum += n;
          length += n * n;
          if (cb.byte_words) store_words(bytes + 2 * d, -n);
          else store_bytes(bytes + d, kQuads ? -n : n, 0);
        }
        const double chunk_squares = sum_of_lanes(length);
        most_length = chunk_squares > most_length ? chunk_squares : most_length;
        // in quads with what score_panel_bytes adds and does not mean: the bits of 1.5 * 2^23
        const int offset = cb.byte_words ? 0 : 128 * static_cast<int>(sum_of_lanes(sum));
        starts[(p * chunks + chunk) * kByteWidth + j] = static_cast<Tick>(kQuads ? offset - 0x4b400000 : -offset);
      }
      double squares = 0;
      for (int i = 0; i < kDoubles; ++i) squares += squares4[i];
      CodeBytes* to = panels + p * steps * kByteWidth + j;
      for (int64_t d = 0; d < steps; ++d) __builtin_memcpy(to + d * kByteWidth, bytes + d * sizeof *to, sizeof *to);
      const double half_norm = cb.l2 ? 0.5 * squares : 0.0;
      half_norms[p * kByteWidth + j] =
          static_cast<HalfNorm>(kQuads || !cb.l2 ? half_norm : __builtin_rint(half_norm / cb.half_norm_unit));
      const double error = __builtin_sqrt(static_cast<double>(sum_of_lanes(lost))) * (1 + 0x1p-12) +
                           0x1p-23 * __builtin_sqrt(squares);
      most_lost = error > most_lost ? error : most_lost;
    }
  return {most_lost, __builtin_sqrt(most_length), 0};
}
