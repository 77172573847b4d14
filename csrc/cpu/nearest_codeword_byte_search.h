// The search of rows by bytes. Part of nearest_codeword_kernel.h at levels that define VQK_BYTES.
//
// In stages, each over all rows of a task: one row's chain of dependent operations and its badly predicted branches would
// take longer than its distances to a few hundred codewords; side by side they hide behind each other.
//
//   lengths, units -> tiles of bytes, what they lost -> bounds -> coarse pass: candidates
//   -> fp32 scores of each row's lowest candidate -> of the others that can still win -> canonical comparison

// The bounds of all places, from their lengths, units and what they lost.
template <bool L2>
static void bound_rows(const Codebook& cb, double tick, ByteRows& b) {
  const int64_t D = cb.D, chunks = (D + kChunkFeatures - 1) / kChunkFeatures;
  const double rounded = kStepFeatures == 4 ? 3 : static_cast<double>(chunks) + 3;  // ticks a score is off by itself
  const double c_norm = cb.norm, c_row = cb.byte_row, c_error = cb.byte_error, mean_norm = cb.mean_norm;
  const double mean_part = L2 ? 0.5 * mean_norm * mean_norm : 0.0, doubled = cb.certified ? 2 : 0;
  double window[kPlaces], window32[kPlaces];
  for (int j = 0; j < b.count; ++j) {
    const double norm = b.norm[j], length = b.length[j], ticks = 1 / (b.unit[j] * tick);
    // the sum's own roundings; what subtracting the mean rounded off
    const double error = __builtin_sqrt(static_cast<double>(b.lost[j])) * (1 + 0x1p-12) +
                         (L2 ? 0x1p-23 * (norm + length) : 0.0);
    const double eps = byte_error_bound(D, norm, length, error, c_norm, c_row, c_error, L2);
    const double eps32 = score_error_bound(D, norm, c_norm, L2, 0.0);
    const double most = 2 * (eps * ticks + rounded) + 1;
    window[j] = most;
    window32[j] = eps32;
    b.slack[j] = static_cast<float>(doubled * eps32);
    // Centred scores differ from others by the same for all codewords; fp32 sums know z.mean to 2^-17.
    b.shift[j] = b.along[j] - mean_part;
    b.eps[j] = (eps + 2 * eps32 + 0x1p-17 * norm * mean_norm) * ticks + rounded + 1;
    b.ticks[j] = ticks;
  }
  for (int j = 0; j < b.count; ++j) {
    const bool fits = window[j] < 0.9 * kMostTicks && window32[j] < 0x1p120;
    b.best[j] = kMostTicks;
    b.limit[j] = fits ? kMostTicks : kNoTicks;
    b.window[j] = fits ? static_cast<int>(window[j]) : 0;
    b.lowest[j] = 0;
  }
}

// Of s.candidates, compares canonically what fp32 scores leave; returns how many codewords were scored.
template <bool L2>
static int64_t decide_bytes(const Codebook& cb, const float* z, const ByteScratch& s, int candidates,
                            Decision<float, L2>& decision) {
  const ByteRows& b = *s.rows;
  const int width = cb.byte_group, near = b.count * width;
  int *const place = s.scored_place, *const left = s.left;
  uint32_t* const code = s.scored_code;
  float* const score = s.score;
  float best[kPlaces];
  auto compare = [&](int from, int to) {
    int count = 0;
    for (int j = from; j < to; ++j) {  // without a branch that would be predicted badly
      left[count] = j;
      count += score[j] <= best[place[j]] + b.slack[place[j]];
    }
    for (int j = 0; j < count; ++j) decision.add(b.order[place[left[j]]], code[left[j]]);
  };
  score_lowest(cb, z, s, candidates, best);
  int used = near;
  int64_t scored = near;
  for (int c = 0; c < candidates; ++c) {
    const auto [j, lane, ticks] = s.candidates[c];
    for (int v = 0; v < width; ++v) place[used + v] = j, code[used + v] = codeword(cb, lane, v);
    used += width * ((ticks <= b.limit[j]) & (lane != b.lowest[j]));
    if (c + 1 < candidates && used <= kScoredPairs - 2 * kMostByteGroup) continue;
    score_pairs(cb, z, s, near, used);
    for (int j = near; j < used; ++j) best[place[j]] = score[j] < best[place[j]] ? score[j] : best[place[j]];
    compare(near, used);
    scored += used - near, used = near;
  }
  compare(0, near);
  decision.finish();
  return scored;
}

// The rows' nearest codewords; returns the number of rows in again for which bytes were not enough.
template <bool L2>
static int search_bytes(const Codebook& cb, const float* z, const bool* skip, int n, const ByteScratch& s,
                        int64_t* again, int64_t* index, double* value) {
  constexpr bool kQuads = kStepFeatures == 4;
  const double tick = cb.byte_unit * (1 << cb.byte_shift);
  ByteRows& b = *s.rows;
  float least = __builtin_inff(), most = 0;
  bool next[kMaxRows] = {};  // rows for the next pass
  measure_rows<L2>(cb, z, n, byte_limits(cb, tick), b);
  b.count = 0;
  for (int i = 0; i < n; ++i) {
    index[i] = -1;
    value[i] = __builtin_nan("");
    if (skip && skip[i]) continue;
    if (b.unit[i] > 0) {
      const int j = b.count++;
      b.order[j] = i, b.norm[j] = b.norm[i], b.length[j] = b.length[i], b.along[j] = b.along[i], b.unit[j] = b.unit[i];
      least = b.unit[i] < least ? b.unit[i] : least;
      most = b.unit[i] > most ? b.unit[i] : most;
    } else if (const double squares = sum_of_squares(z + i * cb.D, cb.D); squares - squares == 0) {
      next[i] = true;
    }
  }
  if (kQuads && most > 4 * least) order_by_unit(b);  // like rows share a tile
  rows_to_bytes<L2>(cb, z, s.row, s.tiles, b);
  bound_rows<L2>(cb, tick, b);
  for (int j = 0; j < b.count; ++j)
    if (kQuads) b.tile_ticks[j / kTileRows] = static_cast<float>(b.ticks[j]);
    else s.factors[2 * j] = s.factors[2 * j + 1] = static_cast<int16_t>(__builtin_rint(cb.half_norm_unit * b.ticks[j] * 32768));
  const int candidates = (cb.D <= kChunkFeatures ? coarse_pass_bytes<true> : coarse_pass_bytes<false>)(cb, z, s);
  for (int j = 0; j < b.count; ++j)
    if (b.limit[j] == kNoTicks) next[b.order[j]] = true;
  int left = 0;
  for (int i = 0; i < n; ++i)  // ascending
    if (next[i]) again[left++] = i;
  Decision<float, L2> decision{z, static_cast<const float*>(cb.rows), cb.D, index, value};
  const int64_t scored = decide_bytes<L2>(cb, z, s, candidates, decision);
  VQK_COUNTED(vqk_scored, scored);
  // Where fp32 scores one by one cost more than what bytes save beside 16-bit integers, stop asking bytes.
  if (scored * (cb.D + 64) > n * cb.K * cb.D / 8) __atomic_store_n(cb.bytes_fail, true, __ATOMIC_RELAXED);
  return left;
}
