// Rows and codewords as bytes. Part of nearest_codeword_bytes.h.

// kLanes features of x from d on, moved by the mean (x itself, where mean is null), then zeros.
VQK_INLINE Vec centred(const float* x, const float* mean, int64_t d, int64_t D) {
  if (d + kLanes <= D) return mean ? load(x + d) - load(mean + d) : load(x + d);
  Vec y = {};
  for (int j = 0; j < D - d; ++j) y[j] = mean ? x[d + j] - mean[d + j] : x[d + j];
  return y;
}

// Lengths of a row or codeword moved by the mean. fp32 sums of squares are off by 2^-17.
struct Centred {
  double peak, chunk, squares;  // largest magnitude; square of the longest chunk; of the whole
};

VQK_INLINE Centred measure(const float* x, const float* mean, int64_t D) {
  Centred most{};
  Vec least = {};  // of -|x|
  for (int64_t first = 0; first < D; first += kChunkFeatures) {
    const int64_t last = first + kChunkFeatures < D ? first + kChunkFeatures : D;
    Vec sum = {};
    for (int64_t d = first; d < last; d += kLanes) {
      const Vec y = centred(x, mean, d, D);
      sum = VQK_FMA(y, y, sum);
      least = VQK_MIN(least, VQK_MIN(y, -y));
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

// The low bytes of kLanes multiples.
VQK_INLINE void store_bytes(uint8_t* to, Vec n, float offset) {
  VQK_STORE_BYTES(to, (IntVec)(n + (0x1.8p23f + offset)));
}

// What a row's unit is no less than: so much for its longest chunk's length; that for the half norms to fit.
struct ByteLimits {
  double per_length, half_norms;
};

static ByteLimits byte_limits(const Codebook& cb, double tick) {
  // rounding makes a chunk longer by sqrt(features) / 2 units at most
  const int64_t features = cb.D < kChunkFeatures ? cb.D : kChunkFeatures;
  const double left = kChunkSum / cb.byte_length - 0.5001 * __builtin_sqrt(static_cast<double>(features));
  return {kStepFeatures == 4 ? 0.0 : 1 / left, cb.half_norm_unit * (1 + 0x1p-14) / tick};
}

// The unit that suits row.z, whose norm is known; fills the row's length. 0 where bytes cannot hold it.
VQK_INLINE float row_unit(const Codebook& cb, const ByteLimits& limits, ByteRow& row) {
  const Centred most = measure(row.z, cb.l2 ? cb.mean : nullptr, cb.D);
  row.length = __builtin_sqrt(most.squares) * (1 + 0x1p-17);
  double unit = __builtin_sqrt(most.chunk) * (1 + 0x1p-17) * limits.per_length;
  unit = most.peak * (1 / 126.99) > unit ? most.peak * (1 / 126.99) : unit;
  unit = limits.half_norms > unit ? limits.half_norms : unit;
  return unit > 0x1p-60 && unit < 0x1p60 ? static_cast<float>(unit * (1 + 0x1p-20)) : 0.0f;
}

// order[0..count) sorted by the rows' units, largest first, to one part in eight and 2^-16 of the largest.
static void order_by_unit(const ByteRow* rows, int* order, int count) {
  constexpr int kSteps = 8 * 16;
  auto exponent = [&](int row) {
    uint32_t bits;
    __builtin_memcpy(&bits, &rows[row].unit, sizeof bits);
    return static_cast<int>(bits >> 20);
  };
  int most = 0, first[kSteps] = {}, from[kMaxRows];
  for (int j = 0; j < count; ++j) {
    from[j] = order[j];
    const int e = exponent(from[j]);
    most = e > most ? e : most;
  }
  auto step = [&](int row) {
    const int below = most - exponent(row);
    return below < kSteps ? below : kSteps - 1;
  };
  for (int j = 0; j < count; ++j) ++first[step(from[j])];
  for (int s = 0, sum = 0; s < kSteps; ++s) {
    const int here = first[s];
    first[s] = sum, sum += here;
  }
  for (int j = 0; j < count; ++j) order[first[step(from[j])]++] = from[j];
}

// Of the tile that begins there.
static float largest_unit(const ByteRow* rows, const int* order, int left) {
  float largest = 0;
  for (int j = 0; j < left && j < kTileRows; ++j)
    largest = rows[order[j]].unit > largest ? rows[order[j]].unit : largest;
  return largest;
}

// Place i of the tiles from a row with its unit. `scratch`: room for D + kLanes bytes. No less than
// |row - unit * bytes|.
VQK_INLINE double row_to_bytes(const Codebook& cb, const ByteRow& row, uint8_t* scratch, uint8_t* tiles, int i) {
  typedef uint32_t Quad __attribute__((aligned(4), may_alias));
  const int64_t D = cb.D, steps = (D + kStepFeatures - 1) / kStepFeatures;
  const float* mean = cb.l2 ? cb.mean : nullptr;
  const float inverse = 1 / row.unit;
  Vec lost = {};
  for (int64_t d = 0; d < D; d += kLanes) {
    Vec x = centred(row.z, mean, d, D);
    const Vec n = to_multiples(x, row.unit, inverse);
    lost = VQK_FMA(x, x, lost);
    store_bytes(scratch + d, n, 128);
  }
  Quad* to = reinterpret_cast<Quad*>(tiles) + i / kTileRows * steps * kTileRows + i % kTileRows;
  for (int64_t d = 0; d < steps; ++d) {
    uint32_t bytes = 0;
    __builtin_memcpy(&bytes, scratch + d * kStepFeatures, kStepFeatures);
    to[d * kTileRows] = kStepFeatures == 2 ? bytes * 0x10001u : bytes;
  }
  // the sum's own roundings; what subtracting the mean rounded off
  return __builtin_sqrt(static_cast<double>(sum_of_lanes(lost))) * (1 + 0x1p-12) +
         (cb.l2 ? 0x1p-23 * (row.norm + row.length) : 0.0);
}

// Of codewords [first, last) of cb, centred.
static ByteLengths byte_lengths(const Codebook& cb, int64_t first, int64_t last) {
  double row = 0, chunk = 0, peak = 0;
  for (int64_t k = first; k < last; ++k) {
    const Centred most = measure(static_cast<const float*>(cb.rows) + k * cb.D, cb.mean, cb.D);
    row = most.squares > row ? most.squares : row;
    chunk = most.chunk > chunk ? most.chunk : chunk;
    peak = most.peak > peak ? most.peak : peak;
  }
  return {__builtin_sqrt(row), __builtin_sqrt(chunk), peak};
}

// Fills panels [first, last) of cb; returns the longest that a codeword lost and the longest chunk of bytes. Lanes
// beyond the last codeword repeat it: their scores are never the lowest alone.
static ByteLengths pack_bytes(const Codebook& cb, int64_t first, int64_t last) {
  constexpr bool kQuads = kStepFeatures == 4;
  const int64_t D = cb.D, steps = (D + kStepFeatures - 1) / kStepFeatures;
  const int64_t chunks = (D + kChunkFeatures - 1) / kChunkFeatures;
  CodeBytes* panels = reinterpret_cast<CodeBytes*>(const_cast<int8_t*>(cb.panels8));
  Tick* starts = static_cast<Tick*>(const_cast<void*>(cb.starts8));
  HalfNorm* half_norms = static_cast<HalfNorm*>(const_cast<void*>(cb.half_norms8));
  const float unit = static_cast<float>(cb.byte_unit), inverse = 1 / unit;
  uint8_t bytes[kMostByteFeatures + kLanes];
  double most_lost = 0, most_length = 0;
  for (int64_t p = first; p < last; ++p)
    for (int j = 0; j < kByteWidth; ++j) {
      const int64_t k = p * kByteWidth + j < cb.K ? p * kByteWidth + j : cb.K - 1;
      const float* row = static_cast<const float*>(cb.rows) + k * D;
      Vec lost = {};
      double squares = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = chunk * kChunkFeatures, end = begin + kChunkFeatures < D ? begin + kChunkFeatures : D;
        Vec sum = {}, length = {};  // integers below 2^24: exact
        for (int64_t d = begin; d < end; d += kLanes) {
          Vec x = centred(row, cb.mean, d, D);
          for (int i = 0; i < kLanes; ++i) squares += static_cast<double>(x[i]) * x[i];
          const Vec n = to_multiples(x, unit, inverse);
          lost = VQK_FMA(x, x, lost);
          sum += n;
          length += n * n;
          store_bytes(bytes + d, kQuads ? -n : n, 0);
        }
        const double chunk_squares = sum_of_lanes(length);
        most_length = chunk_squares > most_length ? chunk_squares : most_length;
        // in quads with what score_panel_bytes adds and does not mean: the bits of 1.5 * 2^23
        const int offset = 128 * static_cast<int>(sum_of_lanes(sum));
        starts[(p * chunks + chunk) * kByteWidth + j] = static_cast<Tick>(kQuads ? offset - 0x4b400000 : -offset);
      }
      CodeBytes* to = panels + p * steps * kByteWidth + j;
      for (int64_t d = 0; d < steps; ++d) __builtin_memcpy(to + d * kByteWidth, bytes + d * kStepFeatures, sizeof *to);
      const double half_norm = cb.l2 ? 0.5 * squares : 0.0;
      half_norms[p * kByteWidth + j] =
          static_cast<HalfNorm>(kQuads || !cb.l2 ? half_norm : __builtin_rint(half_norm / cb.half_norm_unit));
      const double error = __builtin_sqrt(static_cast<double>(sum_of_lanes(lost))) * (1 + 0x1p-12) +
                           0x1p-23 * __builtin_sqrt(squares);
      most_lost = error > most_lost ? error : most_lost;
    }
  return {most_lost, __builtin_sqrt(most_length), 0};
}
