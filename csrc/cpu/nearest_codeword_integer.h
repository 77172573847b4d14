// The coarse pass in 16-bit integers. Part of nearest_codeword_kernel.h at levels that define VQK_INTEGER:
//   VQK_PAIR(p)          two int16 at p in every 32-bit lane
//   VQK_MADD(x, c, sum)  sum + x.lo * c.lo + x.hi * c.hi in every 32-bit lane
//   VQK_TO_FLOAT(x)      an IntVec as floats, rounded to nearest
//
// A vector holds twice as many int16 as floats, and the multipliers take as many vectors a cycle. Row and
// codeword are divided by a scale of their own and rounded to integers; their product sums are exact in 32 bits,
// because a row's integers have length <= 32767 + sqrt(D)/2 and a codeword's <= 64000 + sqrt(D)/2 (Cauchy-Schwarz,
// for every partial sum). What rounding to integers cost is bounded in error_bound.h and is about 1e-4 |z||c|:
// seldom more than one survivor, and rows with too many of them take the fp32 pass.
//
//        panel of codewords [D/2][2 * VQK_LANES][2]     rows of a tile [D/2][VQK_ROWS][2]
//          | c0 c0 | c1 c1 | ... |  features d, d+1       | z0 z0 | z1 z1 | ...  features d, d+1

constexpr double kRowLength = 32766, kCodeLength = 64000;  // for D <= 2^14, see use_integers

// lo, hi = scores of a tile of rows against one panel.
VQK_INLINE void score_panel_integer(const int16_t* z, int64_t pairs, const float* row_scale, const int16_t* panel,
                                    const float* code_scale, const float* half_norms, Vec* lo, Vec* hi) {
  IntVec sum0[kTileRows], sum1[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sum0[r] = sum1[r] = IntVec{};
#pragma GCC unroll 2
  for (int64_t d = 0; d < pairs; ++d) {
    const IntVec c0 = *reinterpret_cast<const IntVecAtAny*>(panel);
    const IntVec c1 = *reinterpret_cast<const IntVecAtAny*>(panel + 2 * kLanes);
    panel += 2 * kWidth;
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const IntVec x = VQK_PAIR(z + 2 * r);
      sum0[r] = VQK_MADD(x, c0, sum0[r]);
      sum1[r] = VQK_MADD(x, c1, sum1[r]);
    }
    z += 2 * kTileRows;
  }
  const Vec s0 = load(code_scale), s1 = load(code_scale + kLanes);
  const Vec h0 = load(half_norms), h1 = load(half_norms + kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    const Vec minus = VQK_SPLAT(-row_scale[r]);
    lo[r] = VQK_FMA(minus, VQK_TO_FLOAT(sum0[r]) * s0, h0);
    hi[r] = VQK_FMA(minus, VQK_TO_FLOAT(sum1[r]) * s1, h1);
  }
}

// Row i of the tiles, from floats [D]; returns its scale, and through `error` a bound on |z - scale * integers|.
// `row`: room for D + 1 integers.
VQK_INLINE float row_to_integers(const float* z, double norm, int64_t D, int16_t* row, int16_t* tiles, int i,
                                 double* error) {
  typedef uint32_t Pair __attribute__((aligned(2), may_alias));
  const int64_t pairs = (D + 1) / 2;
  Pair* to = reinterpret_cast<Pair*>(tiles) + i / kTileRows * pairs * kTileRows + i % kTileRows;
  if (!(norm >= 0x1p-100)) {  // its reciprocal might overflow
    for (int64_t d = 0; d < pairs; ++d) to[d * kTileRows] = 0;
    *error = norm;
    return 0;
  }
  const float inverse = static_cast<float>(kRowLength / norm), scale = static_cast<float>(norm / kRowLength);
  for (int64_t d = 0; d < D; ++d) row[d] = static_cast<int16_t>(__builtin_rintf(z[d] * inverse));
  row[D] = 0;
  const Pair* from = reinterpret_cast<const Pair*>(row);
  for (int64_t d = 0; d < pairs; ++d) to[d * kTileRows] = from[d];
  // half a unit each; the reciprocal and the product round by less than 2^-22 * 32767 units
  *error = 0.51 * __builtin_sqrt(static_cast<double>(D)) * scale + norm * 0x1p-23;
  return scale;
}

// Codeword k as integers in its lane of the panels; returns the length of what rounding lost.
template <class T>
static double code_to_integers(const Codebook& cb, int64_t k, double norm, int16_t* panels, float* scales) {
  const int64_t D = cb.D, pairs = (D + 1) / 2, panel = k / kWidth, j = k % kWidth;
  int16_t* to = panels + (panel * pairs * kWidth + j) * 2;
  const T* row = static_cast<const T*>(cb.rows) + k * D;
  double largest = 0, lost = 0;
  for (int64_t d = 0; norm > 0 && d < D; ++d) {
    const double x = __builtin_fabs(static_cast<double>(row[d]) * cb.scale);
    largest = x > largest ? x : largest;
  }
  double length = norm / kCodeLength;
  length = largest / kRowLength > length ? largest / kRowLength : length;
  float scale = static_cast<float>(length * (1 + 0x1p-20));
  if (!(scale >= 0x1p-100f)) scale = 0;  // as good as zero: its integers are 0 and all of it is lost
  scales[k] = scale;
  for (int64_t d = 0; d < 2 * pairs; ++d) {
    const double x = d < D && norm > 0 ? static_cast<double>(row[d]) * cb.scale : 0.0;
    const double n = scale > 0 ? __builtin_rint(x / scale) : 0.0;
    to[d / 2 * kWidth * 2 + d % 2] = static_cast<int16_t>(n);
    lost += (x - n * scale) * (x - n * scale);
  }
  return __builtin_sqrt(lost);
}
