// What the coarse pass in bytes leaves. Part of nearest_codeword_bytes.h.
//
// A few tiles of rows at a time:
//
//   minima of all codewords of a block -> each row's lowest lane -> the codewords behind it in fp32: they exist, so
//   nothing further than the nearest of them can win -> the other lanes within that limit, of which there are few
//
// The low bits of a minimum are overwritten with the number of its group, so that the lowest one says where it was.

struct ByteScratch {
  ByteRows* rows;
  uint8_t* tiles;        // whole tiles of rows
  int16_t* factors;      // pairs: [kMaxRows][2], as score_panel_bytes takes them
  uint8_t* row;          // [D + kLanes] bytes of a row
  Tick* minima;          // [kBlockVectors][kTileRows][kTickLanes]
  int* candidate_place;  // [kByteCandidates] lanes within a row's limit
  uint32_t* candidate_lane;  // group * kTickLanes + lane
  int* candidate_score;
  int* place;            // [kScoredPairs] rows and codewords being scored in fp32
  uint32_t* code;
  float* score;
  int* tie_place;        // [kTies] codewords that fp32 cannot tell from their row's nearest
  uint32_t* tie_code;
  float* tie_score;
};

struct Candidates {  // how many there are in ByteScratch; codewords scored so far
  int lanes = 0, ties = 0;
  int64_t scored = 0;
};

// |c|^2 / 2 - z.c in fp32 of the pairs [first, last) in s, a multiple of four.
VQK_INLINE void score_pairs(const Codebook& cb, const float* z, const ByteScratch& s, int first, int last) {
  const int64_t D = cb.D;
  const int* const place = s.place;
  const uint32_t* const code = s.code;
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
    const Four halves = {half[code[j]], half[code[j + 1]], half[code[j + 2]], half[code[j + 3]]};
    const Four scores = halves - sums_of_lanes(sum);
    __builtin_memcpy(s.score + j, &scores, sizeof scores);
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

// Makes room for lanes in the same way.
static __attribute__((noinline)) void prune_lanes(const ByteScratch& s, Candidates& found) {
  int of_place[kMaxRows] = {};
  found.lanes = drop_lanes(s, found.lanes);
  if (found.lanes < kByteCandidates / 2) return;
  for (int j = 0; j < found.lanes; ++j)
    if (++of_place[s.candidate_place[j]] > kByteCandidates / 2 / kMaxRows) give_up(*s.rows, s.candidate_place[j]);
  found.lanes = drop_lanes(s, found.lanes);
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

// Scores the cb.byte_group codewords behind lanes[0..count) of places[0..count) in fp32. count: kMaxRows at most, and
// both may be written up to a multiple of kLanes.
static void score_lanes(const Codebook& cb, const float* z, const ByteScratch& s, int count, int* places,
                        uint32_t* lanes, Candidates& found) {
  const int width = cb.byte_group, whole = (count + 3) / 4 * 4, stride = (count + kLanes - 1) / kLanes * kLanes;
  const uint32_t last_code = static_cast<uint32_t>(cb.K - 1);
  for (int i = count; i < stride; ++i) places[i] = places[count - 1], lanes[i] = lanes[count - 1];
  for (int v = 0, j = 0; v < width; ++v, j += stride) {
    for (int i = 0; i < stride; ++i) {
      const uint32_t k = (lanes[i] / kTickLanes * width + v) * kTickLanes + lanes[i] % kTickLanes;
      s.place[j + i] = places[i];
      s.code[j + i] = k < last_code ? k : last_code;  // beyond the last codeword the last
    }
    score_pairs(cb, z, s, j, j + whole);
    for (int i = whole; i < stride; ++i) s.score[j + i] = v == 0 ? 0 : __builtin_inff();  // ties with nothing
  }
  found.scored += whole * width;
  // each lane's lowest, side by side
  float low[kMaxRows], slack[kMaxRows];
  uint32_t code[kMaxRows];
  for (int i = 0; i < stride; ++i) slack[i] = s.rows->slack[places[i]];
  IntVec tie = {};
  for (int i = 0; i < stride; i += kLanes) {
    Vec lowest = load(s.score + i);
    IntVec of = *reinterpret_cast<const IntVecAtAny*>(s.code + i);
    for (int v = 1; v < width; ++v) {
      const Vec score = load(s.score + v * stride + i);
      const IntVec better = (IntVec)(score < lowest);
      const Vec high = (Vec)(((IntVec)lowest & better) | ((IntVec)score & ~better));
      of = (*reinterpret_cast<const IntVecAtAny*>(s.code + v * stride + i) & better) | (of & ~better);
      lowest = VQK_MIN(score, lowest);
      tie |= (IntVec)(high <= lowest + load(slack + i));
    }
    store(low + i, lowest);
    *reinterpret_cast<IntVecAtAny*>(code + i) = of;
  }
  if (__builtin_expect(VQK_NONZERO(tie) != 0, 0))
    for (int v = 0; v < width; ++v)
      for (int j = v * stride; j < v * stride + count; ++j) note(s, s.place[j], s.code[j], s.score[j], found);
  else
    for (int i = 0; i < count; ++i) note(s, places[i], code[i], low[i], found);
}

// Filters rows [start, last), whole tiles but for the last. s.minima: [tile][groups][kTileRows][kTickLanes] of lanes that
// start at `lane`.
static void filter_rows(const Codebook& cb, const float* z, const ByteScratch& s, int64_t groups, uint32_t lane,
                        int start, int last, Candidates& found) {
  constexpr int64_t kStep = kTileRows * kTickLanes;
  constexpr int kRoom = kMaxRows + kLanes;
  ByteRows& b = *s.rows;
  Ticks low[kMaxRows], second[kMaxRows];  // of each lane over the groups
  int scored[kMaxRows];                   // the row's lowest lane, if the row has had none as low; else -1
  int list[kRoom], count = 0;             // of rows
  uint32_t lanes[kRoom];
  const Tick* tile = s.minima;
  for (int first = start; first < last; first += kTileRows, tile += groups * kStep)
    for (int r = 0; r < kTileRows; ++r) {
      const Tick* m = tile + r * kTickLanes;
      Ticks a = load_ticks(m), c = Ticks{} + kMostTicks;
      for (int64_t g = 1; g < groups; ++g) {
        const Ticks x = load_ticks(m + g * kStep), high = VQK_MAX_TICKS(a, x);
        a = VQK_MIN_TICKS(a, x);
        c = VQK_MIN_TICKS(c, high);
      }
      const int lowest = VQK_LOWEST_TICKS(a), i = first + r - start;
      low[i] = a, second[i] = c;
      const unsigned within = VQK_WITHIN(a, Ticks{} + static_cast<Tick>(lowest));
      const int at = (lowest & b.tags) * kTickLanes + __builtin_ctz(within), known = b.best[start + i];
      const bool falls = (lowest < known) & (start + i < last);
      list[count] = start + i;
      lanes[count] = lane + static_cast<uint32_t>(at);
      count += falls;
      scored[i] = falls ? at : -1;
      b.best[start + i] = falls ? lowest : known;
    }
  score_lanes(cb, z, s, count, list, lanes, found);
  for (int j = start; j < last; ++j) {
    const double limit = (b.nearest[j] + b.shift[j]) * b.ticks[j] + b.eps[j], known = b.limit[j];
    // towards zero: no lower than the floor
    b.limit[j] = static_cast<int>(limit < known ? (limit < kNoTicks ? kNoTicks : limit) : known);
  }
  count = 0;
  for (int j = start; j < last; ++j) {  // rows with other lanes within the limit
    const Ticks limit = Ticks{} + static_cast<Tick>(b.limit[j]);
    const int at = scored[j - start];
    const uint32_t one = at < 0 ? 0u : 1u << at % kTickLanes;
    const uint32_t others = VQK_WITHIN(low[j - start], limit) & ~one, twice = VQK_WITHIN(second[j - start], limit);
    list[count] = j;
    lanes[count] = others | twice << 16;
    count += lanes[count] != 0;
  }
  for (int i = 0; i < count; ++i) {
    const int j = list[i];
    if (found.lanes > kByteCandidates - kBlockVectors * kTickLanes) prune_lanes(s, found);
    auto take = [&](int at, int score) __attribute__((always_inline)) {
      s.candidate_place[found.lanes] = j;
      s.candidate_lane[found.lanes] = lane + static_cast<uint32_t>(at);
      s.candidate_score[found.lanes++] = score;
    };
    if (lanes[i] >> 16 == 0) {  // one group a lane, mostly
      uint32_t bits = lanes[i];
      do {
        const int at = __builtin_ctz(bits);
        Tick score;
        __builtin_memcpy(&score, reinterpret_cast<const char*>(&low[j - start]) + at * sizeof(Tick), sizeof score);
        take((score & b.tags) * kTickLanes + at, score);
        bits &= bits - 1;
      } while (bits);
      continue;
    }
    const Tick* m = s.minima + (j - start) / kTileRows * groups * kStep + (j - start) % kTileRows * kTickLanes;
    for (int g = 0; g < groups; ++g, m += kStep)
      for (unsigned bits = VQK_WITHIN(load_ticks(m), Ticks{} + static_cast<Tick>(b.limit[j])); bits; bits &= bits - 1)
        if (const int at = g * kTickLanes + __builtin_ctz(bits); at != scored[j - start]) take(at, m[at % kTickLanes]);
  }
}

// Scores of all rows against all codewords; what they leave.
template <bool OneChunk>
static Candidates coarse_pass_bytes(const Codebook& cb, const float* z, const ByteScratch& s,
                                    const SearchHints& hints) {
  const ByteRows& b = *s.rows;
  Candidates found;
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
  // what comes next into the cache, a share with every tile: it waits for memory otherwise
  const char *next = hints.next, *const next_end = hints.next + hints.next_bytes;
  const int64_t per_tile = hints.next_bytes / (b.count / kTileRows + 1) + 64;
  for (int64_t first = 0; first < panels; first += block) {
    const int64_t last = first + block < panels ? first + block : panels;
    const int64_t groups = (last - first + panels_per_group - 1) / panels_per_group;
    const int batch = kTileRows * static_cast<int>(groups < kBatchVectors ? kBatchVectors / groups : 1);
    const uint32_t lane = static_cast<uint32_t>(first / panels_per_group * kTickLanes);
    for (int begin = 0; begin < b.count; begin += batch) {
      const int end = begin + batch < b.count ? begin + batch : b.count;
      Tick* out = s.minima;
      for (int start = begin; start < end; start += kTileRows) {
        for (int64_t line = 0; line < per_tile && next < next_end; line += 64, next += 64) __builtin_prefetch(next);
#ifdef VQK_QUADS
        if (panels_per_group > 1 && steps <= 4) {
          for (int64_t p = first; p < last; p += panels_per_group, out += kStep) {
            const int64_t count = last - p < panels_per_group ? last - p : panels_per_group;
            Ticks lowest[kTileRows];
            lowest_in_group_bytes(s.tiles + start * 4 * steps, steps, b.tile_ticks[start / kTileRows],
                                  cb.panels8 + p * panel_bytes, starts + p * kByteWidth, half_norms + p * kByteWidth,
                                  count, lowest);
            const Tick kept = static_cast<Tick>(~b.tags), group = static_cast<Tick>((p - first) / panels_per_group);
            const Ticks keep = Ticks{} + kept, tag = Ticks{} + group;
#pragma GCC unroll 16
            for (int r = 0; r < kTileRows; ++r)
              *reinterpret_cast<TicksAtAny*>(out + r * kTickLanes) = (lowest[r] & keep) | tag;
          }
          continue;
        }
#endif
        for (int64_t p = first, in_group = 0; p < last; ++p) {
          Ticks lo[kTileRows], hi[kTileRows];
          const bool done = in_group + 1 == panels_per_group || p + 1 == last;
          const Tick kept = static_cast<Tick>(done ? ~b.tags : -1);
          const Tick group = static_cast<Tick>(done ? (p - first) / panels_per_group : 0);
          const Ticks keep = Ticks{} + kept, tag = Ticks{} + group;
          const uint8_t* bytes = s.tiles + start * 4 * steps;
          const int8_t* panel = cb.panels8 + p * panel_bytes;
          const Tick* from = starts + p * chunks * kByteWidth;
#ifdef VQK_QUADS
          score_panel_bytes(bytes, steps, b.tile_ticks[start / kTileRows], panel, from, half_norms + p * kByteWidth, lo,
                            hi);
#else
          score_panel_bytes<OneChunk>(bytes, steps, s.factors + 2 * start, panel, from, cb.byte_shift,
                                      half_norms + p * kByteWidth, lo, hi);
#endif
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r) {
            Ticks x = VQK_MIN_TICKS(lo[r], hi[r]);
            if (in_group) x = VQK_MIN_TICKS(x, load_ticks(out + r * kTickLanes));
            x = (x & keep) | tag;
            *reinterpret_cast<TicksAtAny*>(out + r * kTickLanes) = x;
          }
          ++in_group;
          if (done) in_group = 0, out += kStep;
        }
      }
      filter_rows(cb, z, s, groups, lane, begin, end, found);
    }
  }
  return found;
}
