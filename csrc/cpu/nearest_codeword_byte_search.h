// The search of rows by bytes. Part of nearest_codeword_kernel.h at levels that define VQK_BYTES.

// z.mean, to 2^-20 of |z| |mean|.
static double dot_with_mean(const Codebook& cb, const float* z) {
  Doubles sum = {};
  int64_t d = 0;
  for (; d + kDoubles <= cb.D; d += kDoubles) sum += load_doubles(z + d) * load_doubles(cb.mean + d);
  double total = 0;
  for (; d < cb.D; ++d) total += static_cast<double>(z[d]) * cb.mean[d];
  for (int j = 0; j < kDoubles; ++j) total += sum[j];
  return total;
}

// The rows' nearest codewords; returns the number of rows in s.again for which bytes were not enough.
template <bool L2>
static int search_bytes(const Codebook& cb, const float* z, const bool* skip, int n, const Scratch& s, int64_t* index,
                        double* value) {
  const int64_t D = cb.D, chunks = (D + kChunkFeatures - 1) / kChunkFeatures;
  constexpr bool kQuads = kStepFeatures == 4;
  const double rounded = kQuads ? 3 : static_cast<double>(chunks) + 3;  // ticks that a score is off by itself
  const double tick = cb.byte_unit * (1 << cb.byte_shift);
  const ByteLimits limits = byte_limits(cb, tick);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(s.integers);
  float slack[kMaxRows];  // 2 eps of fp32 scores
  float ticks[kMaxRows / kTileRows + 1];
  int order[kMaxRows], count = 0;
  for (int i = 0; i < n; ++i) {
    ByteRow& row = s.byte_rows[i];
    index[i] = -1;
    value[i] = __builtin_nan("");
    row.best = row.limit = kMostTicks;
    row.count = kNone;
    if (skip && skip[i]) continue;
    const double squares = sum_of_squares(z + i * D, D);
    if (squares - squares != 0) continue;
    row.norm = __builtin_sqrt(squares);
    row.z = z + i * D;
    row.count = kEveryCodeword;
    if (!(row.norm < 0x1p40)) continue;
    row.unit = row_unit(cb, limits, row);
    if (row.unit > 0) order[count++] = i;
  }
  if (kQuads) order_by_unit(s.byte_rows, order, count);
  float unit = 0;  // of a tile in quads
  for (int j = 0; j < count; ++j) {
    ByteRow& row = s.byte_rows[order[j]];
    if (kQuads && j % kTileRows == 0) unit = largest_unit(s.byte_rows, order + j, count - j);
    if (kQuads) row.unit = unit;
    const double error = row_to_bytes(cb, row, s.centred, bytes, j), squares = row.norm * row.norm;
    row.ticks = 1 / (row.unit * tick);
    if (kQuads) ticks[j / kTileRows] = static_cast<float>(row.ticks);
    const double factor = __builtin_rint(cb.half_norm_unit * row.ticks * 32768);
    if (!kQuads) s.factors[2 * j] = s.factors[2 * j + 1] = static_cast<int16_t>(factor);
    const double eps = byte_error_bound(D, row.norm, row.length, error, cb.norm, cb.byte_row, cb.byte_error, L2);
    const double most = 2 * (eps * row.ticks + rounded) + 1;
    const double eps32 = score_error_bound(D, row.norm, cb.norm, L2, 0.0);
    if (!(most < 0.97 * kMostTicks) || !(eps32 < 0x1p120)) continue;
    row.slack = static_cast<Tick>(most);
    row.count = 0;
    // Centred scores differ from others by the same for all codewords, known to 2^-15 of its largest part.
    row.shift = L2 ? 0.5 * (squares - row.length * row.length) : dot_with_mean(cb, row.z);
    row.eps = (eps + 2 * eps32 + 0x1p-15 * row.length * (L2 ? row.length : cb.byte_row)) * row.ticks + rounded + 1;
    slack[order[j]] = cb.certified ? static_cast<float>(2 * eps32) : 0.0f;
  }
  const ByteTiles tiles = {bytes, order, count, s.factors, ticks};
  (chunks == 1 ? coarse_pass_bytes<true> : coarse_pass_bytes<false>)(cb, tiles, s.byte_rows,
                                                                     reinterpret_cast<Tick*>(s.minima));

  const float* codewords = static_cast<const float*>(cb.rows);
  Decision<float, L2> decision{z, codewords, D, index, value};
  constexpr int64_t kMost = 2 * kMostByteGroup * kByteCandidates;
  int64_t code[kMost], scored = 0;
  float score[kMost];
  int again = 0;
  for (int i = 0; i < n; ++i) {
    ByteRow& row = s.byte_rows[i];
    if (row.count == kEveryCodeword) s.again[again++] = i;
    int64_t count = 0;
    float best = __builtin_inff();
    auto score_codewords = [&](int j) {
      for_each_codeword(cb, row.lane[j], [&](int64_t k) {
        const float x = score_float(row.z, codewords + k * D, cb.half_norms[k], D);
        best = x < best ? x : best;
        score[count] = x;
        code[count++] = k;
      });
      tighten(row, best);
    };
    int lowest = 0;
    for (int j = 1; j < row.count; ++j)
      if (row.score[j] < row.score[lowest]) lowest = j;
    if (row.count > 0) score_codewords(lowest);
    for (int j = 0; j < row.count; ++j)
      if (row.score[j] <= row.limit && j != lowest) score_codewords(j);
    const float limit = best + slack[i];
    for (int64_t j = 0; j < count; ++j)
      if (score[j] <= limit) decision.add(i, code[j]);
    scored += count;
    VQK_COUNTED(vqk_scored, count);
  }
  decision.finish();
  // Where fp32 scores one by one cost more than what bytes save beside 16-bit integers, stop asking bytes.
  if (scored * (D + 64) > n * cb.K * D / 8) __atomic_store_n(cb.bytes_fail, true, __ATOMIC_RELAXED);
  return again;
}
