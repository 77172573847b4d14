// The search of rows by bytes. Part of nearest_codeword_kernel.h at levels that define VQK_BYTES.
//
// In stages, each over all rows of a task: one row's chain of dependent operations and its badly predicted branches would
// take longer than its distances to a few hundred codewords; side by side they hide behind each other.
//
//   lengths, units -> tiles of bytes, what they lost -> bounds -> coarse pass (nearest_codeword_byte_coarse.h, nearest_codeword_byte_candidates.h)
//   -> fp32 scores of the candidates that can still win -> the cost of each row's nearest -> ties canonically

// The bounds of all places, from their lengths, units and what they lost.
template <bool L2>
static void bound_rows(const Codebook& cb, double tick, ByteRows& b) {
  const int64_t D = cb.D, chunks = (D + kChunkFeatures - 1) / kChunkFeatures;
  const double rounded = kStepFeatures == 4 ? 3 : static_cast<double>(chunks) + 3;  // ticks a score is off by itself
  int64_t groups = (cb.K + kTickLanes * cb.byte_group - 1) / (kTickLanes * cb.byte_group);
  groups += cb.byte_group == 1 ? groups & 1 : 0;  // whole panels
  for (b.tag_bits = 0; 1 << b.tag_bits < groups && 1 << b.tag_bits < kBlockVectors;) ++b.tag_bits;
  const int tags = 1 << b.tag_bits, fine = kStepFeatures == 4 ? tags : 1;
  const double c_norm = cb.norm, c_row = cb.byte_row, c_error = cb.byte_error, mean_norm = cb.mean_norm;
  const double mean_part = L2 ? 0.5 * mean_norm * mean_norm : 0.0, doubled = cb.certified ? 2 : 0;
  double window[kPlaces], window32[kPlaces];
  for (int j = 0; j < b.count; ++j) {
    const double length = b.length[j], norm = L2 ? length + mean_norm : length, ticks = 1 / (b.unit[j] * tick);
    // the sum's own roundings; what subtracting the mean rounded off
    const double error = __builtin_sqrt(static_cast<double>(b.lost[j])) * (1 + 0x1p-12) +
                         (L2 ? 0x1p-23 * (norm + length) : 0.0);
    const double eps = byte_error_bound(D, norm, length, error, c_norm, c_row, c_error, L2);
    const double eps32 = score_error_bound(D, norm, c_norm, L2, 0.0);
    window[j] = (2 * (eps * ticks + rounded) + 1) * fine;
    window32[j] = eps32;
    b.slack[j] = static_cast<float>(doubled * eps32);
    // Centred scores differ from others by the same for all codewords; fp32 sums know z.mean to 2^-17.
    b.shift[j] = b.along[j] - mean_part;
    b.eps[j] = ((eps + 2 * eps32 + 0x1p-17 * norm * mean_norm) * ticks + rounded) * fine + tags;
    b.ticks[j] = ticks * fine;
  }
  for (int j = 0; j < b.count; ++j) {
    const bool fits = window[j] < 0.9 * kMostTicks && window32[j] < 0x1p120;
    b.best[j] = b.limit[j] = fits ? kMostTicks : kNoTicks;
    b.lane[j] = 0;
    b.settled[j] = kMostTicks;
    b.nearest[j] = __builtin_inff();
    b.code[j] = 0;
  }
}

// The canonical cost of every row's nearest codeword, as far as fp32 can tell which one that is.
template <bool L2>
static void compare_nearest(const Codebook& cb, const float* z, const ByteRows& b, int64_t* index, double* value) {
  for (int first = 0; first < b.count; first += kPairs) {
    const float *x[kPairs], *c[kPairs];
    double cost[kPairs];
    for (int i = 0; i < kPairs; ++i) {
      const int j = first + i < b.count ? first + i : b.count - 1;
      x[i] = z + b.order[j] * cb.D;
      c[i] = static_cast<const float*>(cb.rows) + b.code[j] * cb.D;
    }
    canonical_costs<float, L2>(x, c, cb.D, cost);
    for (int i = 0; i < kPairs && first + i < b.count; ++i) {
      index[b.order[first + i]] = b.code[first + i];
      value[b.order[first + i]] = cost[i];
    }
  }
  VQK_COUNTED(vqk_compared, b.count);
}

VQK_INLINE Doubles fold_wide(WideDoubles x) {
#if VQK_LANES == 16
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  return x;
#endif
}

// The same where the cost will be rounded to float32: a float64 sum in any order is within (D + 3) 2^-53 of the exact
// one, as the canonical one is. Where both ends of twice that round to the same float, so does the canonical cost.
static void round_nearest(const Codebook& cb, const float* z, const ByteRows& b, int64_t* index, double* value) {
  const int64_t D = cb.D;
  const double error = static_cast<double>(2 * D + 8) * 0x1p-53;
  double sums[kPlaces];
  for (int first = 0; first < b.count; first += kDoubles) {
    Doubles sum[kDoubles], turned[kDoubles];
    double rest[kDoubles];
    for (int i = 0; i < kDoubles; ++i) {
      const int j = first + i < b.count ? first + i : b.count - 1;
      const float* x = z + b.order[j] * D;
      const float* c = static_cast<const float*>(cb.rows) + b.code[j] * D;
      WideDoubles even = {}, odd = {};
      int64_t d = 0;
      for (; d + kLanes <= D; d += kLanes) {
        const WideDoubles y = VQK_WIDEN_HALF(x + d) - VQK_WIDEN_HALF(c + d);
        const WideDoubles w = VQK_WIDEN_HALF(x + d + kLanes / 2) - VQK_WIDEN_HALF(c + d + kLanes / 2);
        even = VQK_FMA_WIDE(y, y, even);
        odd = VQK_FMA_WIDE(w, w, odd);
      }
      for (; d + kLanes / 2 <= D; d += kLanes / 2) {
        const WideDoubles y = VQK_WIDEN_HALF(x + d) - VQK_WIDEN_HALF(c + d);
        even = VQK_FMA_WIDE(y, y, even);
      }
      rest[i] = 0;
      for (; d < D; ++d) {
        const double y = static_cast<double>(x[d]) - c[d];
        rest[i] += y * y;
      }
      sum[i] = fold_wide(even + odd);
    }
    transpose(sum, turned);
    for (int i = 1; i < kDoubles; ++i) turned[0] += turned[i];
    for (int i = 0; i < kDoubles; ++i) sums[first + i] = turned[0][i] + rest[i];
  }
  uint32_t doubtful = 0;
  for (int j = 0; j < b.count; ++j)
    doubtful |= static_cast<float>(sums[j] * (1 - error)) != static_cast<float>(sums[j] * (1 + error));
  for (int j = 0; j < b.count; ++j) index[b.order[j]] = b.code[j], value[b.order[j]] = sums[j];
  VQK_COUNTED(vqk_compared, b.count);
  if (doubtful) compare_nearest<true>(cb, z, b, index, value);
}

// The rows' nearest codewords; returns the number of rows in again for which bytes were not enough.
template <bool L2>
static int search_bytes(const Codebook& cb, const float* z, const bool* skip, int n, const ByteScratch& s,
                        int64_t* again, int64_t* index, double* value, const SearchHints& hints) {
  constexpr bool kQuads = kStepFeatures == 4;
  const double tick = cb.byte_unit * (1 << cb.byte_shift);
  ByteRows& b = *s.rows;
  bool next[kMaxRows] = {};  // rows for the next pass
  measure_rows<L2>(cb, z, n, byte_limits(cb, tick), b);
  int usable = 0;
  for (int i = 0; i < n; ++i) usable += b.unit[i] > 0;
  b.count = n;
  for (int i = 0; i < n; ++i) b.order[i] = i;
  if (skip || usable < n) {  // the others close ranks
    b.count = 0;
    for (int i = 0; i < n; ++i) {
      index[i] = -1;
      value[i] = __builtin_nan("");
      if (skip && skip[i]) continue;
      if (b.unit[i] > 0) {
        const int j = b.count++;
        b.order[j] = i, b.length[j] = b.length[i], b.along[j] = b.along[i], b.unit[j] = b.unit[i];
      } else if (const double squares = sum_of_squares(z + i * cb.D, cb.D); squares - squares == 0) {
        next[i] = true;
      }
    }
  }
  uint32_t least = ~0u, most = 0;  // bits of positive floats
  for (int j = 0; j < b.count; ++j) {
    const uint32_t unit = __builtin_bit_cast(uint32_t, b.unit[j]);
    least = unit < least ? unit : least;
    most = unit > most ? unit : most;
  }
  if (kQuads && most > least + (2u << 23)) order_by_unit(b);  // more than 4 times as large: like rows share a tile
  rows_to_bytes<L2>(cb, z, s.row, s.tiles, b);
  bound_rows<L2>(cb, tick, b);
  for (int j = 0; j < b.count; j += kQuads ? tile_rows_of(cb) : 1)
    if (kQuads) b.tile_ticks[j / tile_rows_of(cb)] = static_cast<float>(b.ticks[j] / (1 << b.tag_bits));
    else
      s.factors[2 * j] = s.factors[2 * j + 1] =
          static_cast<int16_t>(__builtin_rint(cb.half_norm_unit * b.ticks[j] * 32768));
  Candidates found = (cb.D <= kChunkFeatures ? coarse_pass_bytes<true> : coarse_pass_bytes<false>)(cb, z, s, hints);
  settle_all(cb, z, s, found);
  for (int c = 0; c < found.lanes; c += kMaxRows) {
    const int count = found.lanes - c < kMaxRows ? found.lanes - c : kMaxRows;
    score_lanes(cb, z, s, count, s.candidate_place + c, s.candidate_lane + c, found);
  }
  uint32_t given_up = 0;
  for (int j = 0; j < b.count; ++j) given_up |= b.limit[j] == kNoTicks;
  int left = 0;
  if (given_up || b.count < n) {
    for (int j = 0; j < b.count; ++j)
      if (b.limit[j] == kNoTicks) next[b.order[j]] = true;
    for (int i = 0; i < n; ++i)  // ascending
      if (next[i]) again[left++] = i;
  }
  if (L2 && hints.rounded) round_nearest(cb, z, b, index, value);
  else compare_nearest<L2>(cb, z, b, index, value);
  Decision<float, L2> decision{z, static_cast<const float*>(cb.rows), cb.D, index, value};
  found.ties = drop_ties(s, found.ties);
  for (int j = 0; j < found.ties; ++j) value[b.order[s.tie_place[j]]] = __builtin_nan("");  // not canonical yet
  for (int j = 0; j < found.ties; ++j) {
    const int place = s.tie_place[j];
    decision.add(b.order[place], b.code[place]), decision.add(b.order[place], s.tie_code[j]);
  }
  decision.finish();
  VQK_COUNTED(vqk_scored, found.scored);
  // Where fp32 scores one by one cost more than what bytes save beside 16-bit integers (or floats, see use_integers),
  // stop asking bytes.
  const int64_t beyond = found.scored - (cb.byte_words ? n * cb.byte_group : 0);  // words are quick to score one lane each
  const int64_t saved = cb.byte_words   ? cb.K * cb.D / 2
                        : cb.byte_tiles ? cb.K * cb.D / 16 * 3
                                        : cb.K * cb.D / 8 * (cb.D < 16 ? 3 : 1);
  if (beyond * (cb.D + 112) > n * saved)
    __atomic_store_n(cb.bytes_fail, true, __ATOMIC_RELAXED);
  return left;
}
