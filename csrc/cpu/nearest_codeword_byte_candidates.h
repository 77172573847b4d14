// What the coarse pass in bytes leaves. Part of nearest_codeword_bytes.h.
//
// A few tiles of rows at a time:
//
//   minima of all codewords of a block -> each row's lowest lane -> the codewords behind it in fp32: they exist, so
//   nothing further than the nearest of them can win -> the other lanes within that limit, of which there are few
//
// Blocks after the first list what is within two bounds of the lowest instead: most of what they would score is
// beaten by a later one. All lists come after the last block: lowest lanes first, others if they can still win.
//
// The low bits of a minimum number its group, so that the lowest one says where it was.

struct ByteScratch {
  ByteRows* rows;
  uint8_t* tiles;        // whole tiles of rows
  int16_t* factors;      // pairs: [kMaxRows][2], as score_panel_bytes takes them
  uint8_t* row;          // [D + kLanes] bytes of a row
  Tick* minima;          // [kBlockVectors][kTileRows][kTickLanes], or fewer: see filter_rows
  int* candidate_place;  // [kByteCandidates] lanes within a row's limit
  uint32_t* candidate_lane;  // group * kTickLanes + lane
  int* candidate_score;
  int* tie_place;        // [kTies] codewords that fp32 cannot tell from their row's nearest
  uint32_t* tie_code;
  float* tie_score;
};

struct Candidates {  // how many there are in ByteScratch; codewords scored so far
  int lanes = 0, ties = 0;
  int64_t scored = 0;
};

// Towards |c|^2 / 2 - z.c in fp32: sum[r] -= products of features of a row and codeword r, lane by lane; the 8 codewords
// are those of Rows rows, neighbours from c[row] on.
template <int Rows>
VQK_INLINE void subtract_products(const float* const* x, const float* const* c, int64_t D, Vec* sum,
                                  const float* const* ahead = nullptr) {
  constexpr int kEach = 8 / Rows;
  for (int64_t d = 0; d < D; d += kLanes)
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      const Vec y = -features(x[row], d, D);
#pragma GCC unroll 8
      for (int v = 0; v < kEach; ++v) {
        Vec& to = sum[row * kEach + v];
        if (ahead) __builtin_prefetch(ahead[row] + v * D + d);
        to = VQK_FMA(y, features(c[row] + v * D, d, D), to);
      }
    }
}

// Drops the ties that a better codeword of their row excludes; returns how many are left.
static int drop_ties(const ByteScratch& s, int count) {
  const ByteRows& b = *s.rows;
  int kept = 0;
  for (int j = 0; j < count; ++j) {
    const int place = s.tie_place[j];
    s.tie_place[kept] = place, s.tie_code[kept] = s.tie_code[j], s.tie_score[kept] = s.tie_score[j];
    kept += s.tie_score[kept] <= b.nearest[place] + b.slack[place];
  }
  return kept;
}

// Makes the row one for the next pass.
VQK_INLINE void give_up(ByteRows& b, int place) {
  b.best[place] = b.limit[place] = kNoTicks;
  b.nearest[place] = -__builtin_inff();
}

// Makes room for ties, if need be at the expense of rows with many.
static __attribute__((noinline)) void prune_ties(const ByteScratch& s, Candidates& found) {
  int of_place[kMaxRows] = {};
  found.ties = drop_ties(s, found.ties);
  if (found.ties <= kTies / 2) return;
  for (int j = 0; j < found.ties; ++j)
    if (++of_place[s.tie_place[j]] > kTies / 2 / kMaxRows) give_up(*s.rows, s.tie_place[j]);
  found.ties = drop_ties(s, found.ties);
}

// Drops the lanes beyond their row's limit; returns how many are left.
static int drop_lanes(const ByteScratch& s, int count) {
  int kept = 0;
  for (int j = 0; j < count; ++j) {
    const int place = s.candidate_place[j], score = s.candidate_score[j];
    const uint32_t lane = s.candidate_lane[j];
    s.candidate_place[kept] = place, s.candidate_lane[kept] = lane, s.candidate_score[kept] = score;
    kept += score <= s.rows->limit[place];
  }
  return kept;
}

// Takes note of a codeword's fp32 score.
VQK_INLINE void note(const ByteScratch& s, int place, uint32_t code, float score, Candidates& found) {
  ByteRows& b = *s.rows;
  const uint32_t known_code = b.code[place];
  const float known = b.nearest[place];
  // masks: compilers make branches of selections, which would be predicted badly
  const uint32_t better = -static_cast<uint32_t>(score < known);
  const uint32_t x = __builtin_bit_cast(uint32_t, score), y = __builtin_bit_cast(uint32_t, known);
  const uint32_t least = y ^ ((x ^ y) & better);
  const float low = __builtin_bit_cast(float, least), high = __builtin_bit_cast(float, x ^ y ^ least);
  b.nearest[place] = low;
  b.code[place] = known_code ^ ((code ^ known_code) & better);
  if (__builtin_expect(high <= low + b.slack[place], 0)) {
    s.tie_place[found.ties] = place, s.tie_score[found.ties] = high;
    s.tie_code[found.ties] = code ^ ((code ^ known_code) & better);
    if (++found.ties == kTies) prune_ties(s, found);
  }
}

// The scores of 8 codewords side by side, from `first` on.
VQK_INLINE Eight score_neighbours(const Codebook& cb, const float* x, uint32_t first) {
  const float* const c = static_cast<const float*>(cb.rows) + first * cb.D;
  Vec sum[8] = {};
  subtract_products<1>(&x, &c, cb.D, sum);
  Eight half;
  __builtin_memcpy(&half, cb.half_norms + first, sizeof half);
  return half + sums_of_eight(sum);
}

#if VQK_LANES == 16
// The scores of 16 with 8 features, two to a vector: the even ones first, then the odd ones.
VQK_INLINE Vec score_neighbours_of_eight_features(const Codebook& cb, const float* x, uint32_t first) {
  const float* const c = static_cast<const float*>(cb.rows) + first * 8;
  Eight once;
  __builtin_memcpy(&once, x, sizeof once);
  const Vec twice = -__builtin_shufflevector(once, once, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
  Vec product[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) product[r] = twice * load(c + 16 * r);
  const Vec half = load(cb.half_norms + first);
  return __builtin_shufflevector(half, half, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15) +
         halves_of_eight(product);
}
#endif

// score_lanes where a lane's codewords fill vectors.
VQK_INLINE void score_wide_lanes(const Codebook& cb, const float* z, const ByteScratch& s, int count,
                                 const int* places, const uint32_t* lanes, Candidates& found) {
  const uint32_t width = cb.byte_group, last = static_cast<uint32_t>(cb.K - width);
  for (int i = 0; i < count; ++i) {
    const int place = places[i];
    const float* const x = z + s.rows->order[place] * cb.D;
    const uint32_t first = lanes[i] * width < last ? lanes[i] * width : last;
    float score[kMostByteGroup];
    uint32_t near;  // bit v: codeword first + v is within the slack of the lowest
    float low;
#if VQK_LANES == 16
    Vec scores;
    const bool twice = cb.D == 8 && width == 16;
    if (twice) {
      scores = score_neighbours_of_eight_features(cb, x, first);
    } else {
      const Eight a = score_neighbours(cb, x, first);
      const Eight b = width == 16 ? score_neighbours(cb, x, first + 8) : Eight{} + __builtin_inff();
      scores = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
    low = lowest(scores);
    near = VQK_NONZERO(scores <= VQK_SPLAT(low + s.rows->slack[place]));
    auto code = [&](int v) __attribute__((always_inline)) { return first + (twice ? 2 * (v & 7) + (v >> 3) : v); };
    store(score, scores);
#else
    const Eight a = score_neighbours(cb, x, first);
    const Eight b = width == 16 ? score_neighbours(cb, x, first + 8) : Eight{} + __builtin_inff();
    low = lowest(VQK_MIN(a, b));
    const Vec limit = VQK_SPLAT(low + s.rows->slack[place]);
    near = VQK_NONZERO(a <= limit) | VQK_NONZERO(b <= limit) << 8;
    auto code = [&](int v) __attribute__((always_inline)) { return first + v; };
    store(score, a), store(score + 8, b);
#endif
    note(s, place, code(__builtin_ctz(near)), (near & (near - 1)) ? score[__builtin_ctz(near)] : low, found);
    while (__builtin_expect((near &= near - 1) != 0, 0))
      note(s, place, code(__builtin_ctz(near)), score[__builtin_ctz(near)], found);
  }
  found.scored += count * width;
}

// score_lanes where several lanes' codewords fill vectors.
template <int Width>
VQK_INLINE void score_narrow_lanes(const Codebook& cb, const float* z, const ByteScratch& s, int count, int* places,
                                   uint32_t* lanes, Candidates& found) {
  constexpr int kAtOnce = 8 / Width;
  const int whole = (count + kAtOnce - 1) / kAtOnce * kAtOnce, stride = (count + kLanes - 1) / kLanes * kLanes;
  const uint32_t last = static_cast<uint32_t>(cb.K - Width);
  uint32_t first[kPlaces];  // of a lane's codewords
  for (int i = count; i < stride; ++i) places[i] = places[count - 1], lanes[i] = lanes[count - 1];
  for (int i = 0; i < stride; ++i) first[i] = lanes[i] * Width < last ? lanes[i] * Width : last;
  float score[Width][kPlaces];
  for (int i = 0; i < whole; i += kAtOnce) {
    const float *x[kAtOnce], *c[kAtOnce];
    Vec sum[8];
#pragma GCC unroll 8
    for (int r = 0; r < kAtOnce; ++r) {
      x[r] = z + s.rows->order[places[i + r]] * cb.D;
      c[r] = static_cast<const float*>(cb.rows) + first[i + r] * cb.D;
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) sum[r * Width + v] = Vec{cb.half_norms[first[i + r] + v]};
    }
    if (in_tiles(cb) && cb.K * cb.D >= kFarFloats) {
      const float* ahead[kAtOnce];  // the next ones
#pragma GCC unroll 8
      for (int r = 0; r < kAtOnce; ++r) {
        const int j = i + kAtOnce + r < stride ? i + kAtOnce + r : i + r;
        ahead[r] = static_cast<const float*>(cb.rows) + first[j] * cb.D;
      }
      subtract_products<kAtOnce>(x, c, cb.D, sum, ahead);
    } else {
      subtract_products<kAtOnce>(x, c, cb.D, sum);
    }
    const Eight e = sums_of_eight(sum);
    const Eight by_v = Width == 1   ? e
                       : Width == 2 ? __builtin_shufflevector(e, e, 0, 2, 4, 6, 1, 3, 5, 7)
                                    : __builtin_shufflevector(e, e, 0, 4, 1, 5, 2, 6, 3, 7);
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v)
      __builtin_memcpy(&score[v][i], reinterpret_cast<const char*>(&by_v) + v * kAtOnce * 4, kAtOnce * 4);
  }
#pragma GCC unroll 4
  for (int v = 0; v < Width; ++v)
    for (int i = whole; i < stride; ++i) score[v][i] = v == 0 ? 0 : __builtin_inff();  // ties with nothing
  found.scored += whole * Width;
  // each lane's lowest, side by side
  float low[kPlaces], slack[kPlaces];
  uint32_t code[kPlaces];
  for (int i = 0; i < stride; ++i) slack[i] = s.rows->slack[places[i]];
  IntVec tie = {};
  for (int i = 0; i < stride; i += kLanes) {
    Vec lowest = load(score[0] + i);
    const IntVec from = *reinterpret_cast<const IntVecAtAny*>(first + i);
    IntVec of = from;
#pragma GCC unroll 4
    for (int v = 1; v < Width; ++v) {
      const Vec x = load(score[v] + i);
      const IntVec better = (IntVec)(x < lowest);
      const Vec high = (Vec)(((IntVec)lowest & better) | ((IntVec)x & ~better));
      of = ((from + static_cast<uint32_t>(v)) & better) | (of & ~better);
      lowest = VQK_MIN(x, lowest);
      tie |= (IntVec)(high <= lowest + load(slack + i));
    }
    store(low + i, lowest);
    *reinterpret_cast<IntVecAtAny*>(code + i) = of;
  }
  if (__builtin_expect(VQK_NONZERO(tie) != 0, 0))
    for (int v = 0; v < Width; ++v)
      for (int i = 0; i < count; ++i) note(s, places[i], first[i] + v, score[v][i], found);
  else
    for (int i = 0; i < count; ++i) note(s, places[i], code[i], low[i], found);
}

// Scores the cb.byte_group codewords behind lanes[0..count) of places[0..count) in fp32. count: kMaxRows at most, and
// both may be written up to a multiple of kLanes.
static void score_lanes(const Codebook& cb, const float* z, const ByteScratch& s, int count, int* places,
                        uint32_t* lanes, Candidates& found) {
  if (cb.byte_group >= 8) score_wide_lanes(cb, z, s, count, places, lanes, found);
  else if (cb.byte_group == 4) score_narrow_lanes<4>(cb, z, s, count, places, lanes, found);
  else if (cb.byte_group == 2) score_narrow_lanes<2>(cb, z, s, count, places, lanes, found);
  else score_narrow_lanes<1>(cb, z, s, count, places, lanes, found);
}

// Scores the lowest lanes of rows[0..count): nothing beyond their nearest can win. As score_lanes.
VQK_INLINE void settle(const Codebook& cb, const float* z, const ByteScratch& s, int start, int last, int count, int* rows,
                       uint32_t* lanes, Candidates& found) {
  ByteRows& b = *s.rows;
  score_lanes(cb, z, s, count, rows, lanes, found);
  for (int j = start; j < last; ++j) {  // all of them are here
    const double limit = (b.nearest[j] + b.shift[j]) * b.ticks[j] + b.eps[j], known = b.limit[j];
    // towards zero: no lower than the floor
    b.limit[j] = static_cast<int>(limit < known ? (limit < kNoTicks ? kNoTicks : limit) : known);
    b.settled[j] = b.best[j];
  }
}

// The same for those that have not been settled; drops the lanes which that excludes.
static void settle_all(const Codebook& cb, const float* z, const ByteScratch& s, Candidates& found) {
  const ByteRows& b = *s.rows;
  int list[kPlaces], count = 0;
  uint32_t lanes[kPlaces];
  for (int j = 0; j < b.count; ++j) {
    list[count] = j, lanes[count] = b.lane[j];
    count += (b.best[j] != b.settled[j]) & (b.best[j] != kNoTicks);
  }
  if (count) settle(cb, z, s, 0, b.count, count, list, lanes, found);
  found.lanes = drop_lanes(s, found.lanes);
}

// Makes room for lanes, if need be at the expense of rows with many.
static __attribute__((noinline)) void prune_lanes(const Codebook& cb, const float* z, const ByteScratch& s,
                                                  Candidates& found) {
  int of_place[kMaxRows] = {};
  settle_all(cb, z, s, found);
  if (found.lanes < kByteCandidates / 2) return;
  for (int j = 0; j < found.lanes; ++j)
    if (++of_place[s.candidate_place[j]] > kByteCandidates / 2 / kMaxRows) give_up(*s.rows, s.candidate_place[j]);
  found.lanes = drop_lanes(s, found.lanes);
}

// Filters rows [start, last), whole tiles but for the last. s.minima: [tile][groups][kTileRows][kTickLanes] of lanes that
// start at `lane`; Cells: [tile][cells of kCellGroups][kTileOfRows][2][kTickLanes]. Later: than the first block.
template <bool Later, bool Cells>
static void filter_rows(const Codebook& cb, const float* z, const ByteScratch& s, int64_t groups, uint32_t lane,
                        int start, int last, Candidates& found) {
  const int tile_rows = tile_rows_of(cb);
  constexpr int64_t kRow = Cells ? 2 * kTickLanes : kTickLanes;
  const int64_t step = tile_rows * kRow, cells = Cells ? (groups + kCellGroups - 1) / kCellGroups : groups;
  constexpr int kRoom = kByteCandidates - kBlockVectors * kTickLanes;  // for all lanes of a row
  ByteRows& b = *s.rows;
  Ticks low[kMaxRows], second[kMaxRows];  // of each lane over the groups
  int skip[kMaxRows];                     // the row's lowest lane, which is not listed; -1: had that before
  const int tags = (1 << b.tag_bits) - 1;
  int list[kPlaces], count = 0;           // of rows
  uint32_t lanes[kPlaces], once[kMaxRows], more[kMaxRows];
  auto take = [&](int place, uint32_t of, int score) __attribute__((always_inline)) {
    s.candidate_place[found.lanes] = place, s.candidate_lane[found.lanes] = of, s.candidate_score[found.lanes] = score;
  };
  if (found.lanes > kRoom - kMaxRows) prune_lanes(cb, z, s, found);
  const Tick* tile = s.minima;
  for (int first = start; first < last; first += tile_rows, tile += cells * step)
    for (int r = 0; r < tile_rows && first + r < last; ++r) {
      const Tick* m = tile + r * kRow;
      Ticks a = load_ticks(m), c = Cells ? load_ticks(m + kTickLanes) : Ticks{} + kMostTicks;
      for (int64_t g = 1; g < cells; ++g) {
        const Ticks x = load_ticks(m + g * step), high = VQK_MAX_TICKS(a, x);
        a = VQK_MIN_TICKS(a, x);
        c = VQK_MIN_TICKS(c, high);
        if (Cells) c = VQK_MIN_TICKS(c, load_ticks(m + g * step + kTickLanes));
      }
      const int lowest = VQK_LOWEST_TICKS(a), j = first + r, i = j - start;
      low[i] = a, second[i] = c;
      const int at = __builtin_ctz(VQK_WITHIN(a, Ticks{} + static_cast<Tick>(lowest)));
      const int known = b.best[j];
      const bool falls = lowest < known;
      const uint32_t mask = -static_cast<uint32_t>(falls), was = b.lane[j];
      const uint32_t is = lane + static_cast<uint32_t>((lowest & tags) * kTickLanes + at);
      if (Later) {  // the lowest lane till now becomes one of the others, if its codewords have not been scored
        take(j, was, known);
        found.lanes += falls & (known != b.settled[j]);
      }
      list[count] = j, lanes[count] = is;
      count += falls;
      b.best[j] = falls ? lowest : known;
      b.lane[j] = was ^ ((is ^ was) & mask);
      skip[i] = static_cast<int>(at | ~mask);
    }
  if (!Later) settle(cb, z, s, start, last, count, list, lanes, found);
  else
    for (int j = start; j < last; ++j) {  // the lowest lane stands for a codeword, too
      const double limit = b.best[j] + 2 * b.eps[j], known = b.limit[j];
      b.limit[j] = static_cast<int>(limit < known ? limit : known);
    }
  count = 0;
  for (int j = start; j < last; ++j) {  // rows with other lanes within the limit
    const Ticks limit = Ticks{} + static_cast<Tick>(b.limit[j]);
    const int at = skip[j - start];
    const uint32_t one = at < 0 ? 0u : 1u << at;
    const uint32_t others = VQK_WITHIN(low[j - start], limit) & ~one, twice = VQK_WITHIN(second[j - start], limit);
    list[count] = j, once[count] = others, more[count] = twice;
    count += (others | twice) != 0;
  }
  for (int i = 0; i < count; ++i) {
    const int j = list[i];
    if (found.lanes > kRoom) prune_lanes(cb, z, s, found);
    if (more[i] == 0) {  // one group a lane, mostly
      uint32_t bits = once[i];
      do {
        const int at = __builtin_ctz(bits);
        Tick score;
        __builtin_memcpy(&score, reinterpret_cast<const char*>(&low[j - start]) + at * sizeof(Tick), sizeof score);
        take(j, lane + static_cast<uint32_t>((score & tags) * kTickLanes + at), score);
        ++found.lanes;
        bits &= bits - 1;
      } while (bits);
      continue;
    }
    const Tick* m = s.minima + (j - start) / tile_rows * cells * step + (j - start) % tile_rows * kRow;
    const uint32_t lowest = skip[j - start] < 0 ? ~0u : b.lane[j];
    for (int64_t g = 0; g < cells; ++g, m += step)
      for (unsigned bits = VQK_WITHIN(load_ticks(m), Ticks{} + static_cast<Tick>(b.limit[j])); bits; bits &= bits - 1) {
        const int at = __builtin_ctz(bits);
        auto add = [&](int64_t group, int score) __attribute__((always_inline)) {
          const uint32_t of = lane + static_cast<uint32_t>(group * kTickLanes + at);
          take(j, of, score);
          found.lanes += of != lowest;
        };
        if (!Cells) {
          add(g, m[at]);
          continue;
        }
        const int nearest = m[at] & tags;
        add(nearest, m[at]);
        if (m[kTickLanes + at] > b.limit[j]) continue;
        const int64_t end = (g + 1) * kCellGroups < groups ? (g + 1) * kCellGroups : groups;
        for (int64_t other = g * kCellGroups; other < end; ++other)  // any of them may be as near as the second
          if (other != nearest) add(other, m[kTickLanes + at]);
      }
  }
}
