// The search kernel, written once and compiled once per SIMD level: the including file defines
//   VQK_LANES        floats in a vector                     VQK_SPLAT(x)       vector of x
//   VQK_ROWS         rows of z in a register tile           VQK_FMA(a, b, c)   a * b + c, fused where there is FMA
//   VQK_WIDEN(p)     4 floats (2 when VQK_LANES is 4) as fp64
//   VQK_NONZERO(x)   bit i = lane i of an IntVec is not 0   VQK_MIN(a, b)      lane-wise minimum
// and includes this inside its own anonymous namespace: nothing here may be shared between levels.
//
// Two stages (docs/numerics.md proves that the result is the canonical nearest codeword).
//
// 1. Coarse scores |c|^2/2 - z.c in fp32, one register tile at a time. Accumulators start at |c|^2/2
//    and take D fused multiply-adds with the negated codebook:
//
//                    panel of codewords [D][2 * VQK_LANES], in L2, streamed
//                      | c0 c0 .. c0 | c1 c1 .. c1 |
//        row 0  z[d] x |  lo[0]      |  hi[0]      |     VQK_ROWS x 2 accumulators in registers
//        ...           |             |             |
//        row R-1       |  lo[R-1]    |  hi[R-1]    |
//
//    No index is tracked. `group` score vectors are folded into one by lane-wise minima, kept in L1 for
//    a block of the codebook (256 KiB: stays in L2 while all rows of the task pass), then filtered: a
//    lane whose minimum is within 2 eps of the row's best so far becomes a candidate.
// 2. The codewords behind the candidates that are still within 2 eps of the final best are compared by
//    the canonical distance, eight (row, codeword) pairs at a time, each lane one sequential fp64 sum.
//    Rows with more candidates than fit, or without a finite bound, are compared with every codeword.

constexpr int kLanes = VQK_LANES, kTileRows = VQK_ROWS, kWidth = 2 * kLanes;
constexpr int kTileOfRows = 16, kMostTileRows = 2 * kTileOfRows;  // AMX: rows of a tile; at once
constexpr int kCandidates = 14;               // per row; more than that: compare with every codeword
constexpr int64_t kBlockBytes = 256 << 10;    // of panels: half of the smallest common L2
constexpr int64_t kBlockVectors = 64;         // of folded minima per row: 12 KiB of L1 for 6 rows of 8 lanes

typedef float Vec __attribute__((vector_size(4 * VQK_LANES)));
typedef float VecAtAny __attribute__((vector_size(4 * VQK_LANES), aligned(4), may_alias));
typedef uint32_t IntVec __attribute__((vector_size(4 * VQK_LANES)));
typedef uint32_t IntVecAtAny __attribute__((vector_size(4 * VQK_LANES), aligned(4), may_alias));
#define VQK_INLINE static inline __attribute__((always_inline))

VQK_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAtAny*>(p); }
VQK_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecAtAny*>(p) = x; }
VQK_INLINE float lowest(Vec x) {
#if VQK_LANES == 16
  x = VQK_MIN(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = VQK_MIN(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = VQK_MIN(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = VQK_MIN(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif VQK_LANES == 8
  x = VQK_MIN(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = VQK_MIN(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  x = VQK_MIN(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#else
  x = VQK_MIN(x, __builtin_shufflevector(x, x, 2, 3, 0, 1));
  x = VQK_MIN(x, __builtin_shufflevector(x, x, 1, 0, 3, 2));
#endif
  return x[0];
}

#include "nearest_codeword_canonical.h"

// ---------------------------------------------------------------- coarse scores

// Rows 0, 3, 6, ... of a tile: all addresses then take these and the stride, which leaves registers to spare.
constexpr int kThirds = (kTileRows + 2) / 3;
template <class T>
VQK_INLINE void every_third_row(const T* z, int64_t stride, const T** rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kThirds; ++i) {
    rows[i] = z + 3 * i * stride;
    asm("" : "+r"(rows[i]));  // or the compiler makes a register, and then a place in memory, of every row
  }
}

// lo, hi = scores of kTileRows rows of z, `stride` apart, against one panel.
VQK_INLINE void score_panel(const float* z, int64_t stride, const float* panel, const float* half_norms, int64_t D,
                            Vec* lo, Vec* hi) {
  const Vec h0 = load(half_norms), h1 = load(half_norms + kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) lo[r] = h0, hi[r] = h1;
  const float* thirds[kThirds];
  every_third_row(z, stride, thirds);
  for (int64_t d = 0; d < D; ++d) {
    const Vec c0 = load(panel), c1 = load(panel + kLanes);
    panel += kWidth;
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec x = VQK_SPLAT(thirds[r / 3][r % 3 * stride + d]);
      lo[r] = VQK_FMA(x, c0, lo[r]);
      hi[r] = VQK_FMA(x, c1, hi[r]);
    }
  }
}

#ifdef VQK_INTEGER
#include "nearest_codeword_integer.h"
#endif

constexpr int kEveryCodeword = -1, kNone = -2;  // as a row's number of candidates

struct Row {
  float best, limit;  // lowest score seen; best + 2 eps, or -inf: take no more candidates
  float slack;        // 2 eps
  int count;          // of candidates; kEveryCodeword: compare with all; kNone: the row takes no part
  float score[kCandidates];
  uint32_t lane[kCandidates];  // group * kLanes + lane
};

// Makes room among the candidates by dropping those that a better one has overtaken.
static __attribute__((noinline)) bool prune(Row& row) {
  int kept = 0;
  for (int i = 0; i < kCandidates; ++i)
    if (row.score[i] <= row.limit) row.score[kept] = row.score[i], row.lane[kept] = row.lane[i], ++kept;
  row.count = kept;
  if (kept < kCandidates) return true;
  row.count = kEveryCodeword;
  row.limit = -__builtin_inff();
  return false;
}

// minima: `groups` vectors, kTileRows * kLanes floats apart, of lanes that start at `lane`.
VQK_INLINE void filter(Row& row, const float* minima, int64_t groups, uint32_t lane) {
  constexpr int64_t kStep = kTileRows * kLanes;
  Vec lowest0 = load(minima), lowest1 = lowest0;
  int64_t g = 1;
  for (; g + 1 < groups; g += 2) {
    lowest0 = VQK_MIN(lowest0, load(minima + g * kStep));
    lowest1 = VQK_MIN(lowest1, load(minima + (g + 1) * kStep));
  }
  if (g < groups) lowest0 = VQK_MIN(lowest0, load(minima + g * kStep));
  const float best = lowest(VQK_MIN(lowest0, lowest1));
  if (!(best <= row.limit) || best == __builtin_inff()) return;
  if (best < row.best) {
    row.best = best;
    row.limit = best + row.slack;
  }
  // Bit g of lane i: group g's minimum there is a candidate. Found so that there are about as many
  // branches as candidates, not as many as groups.
  const Vec limit = VQK_SPLAT(row.limit);
  for (int64_t first = 0; first < groups; first += 32) {
    const int64_t last = first + 32 < groups ? first + 32 : groups;
    IntVec bits = {};
    for (g = last - 1; g >= first; --g) bits = bits + bits - (IntVec)(load(minima + g * kStep) <= limit);
    uint32_t words[kLanes];
    *reinterpret_cast<IntVecAtAny*>(words) = bits;
    for (unsigned lanes = VQK_NONZERO(bits); lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      for (uint32_t word = words[i]; word; word &= word - 1) {
        g = first + __builtin_ctz(word);
        if (row.count == kCandidates && !prune(row)) return;
        row.score[row.count] = minima[g * kStep + i];
        row.lane[row.count++] = lane + static_cast<uint32_t>(g * kLanes + i);
      }
    }
  }
}

// Rows of a task as the coarse pass takes them: [max(n, kTileRows), D] scaled floats, or whole tiles of integers
// (see nearest_codeword_integer.h), the rows' scales beside them.
struct CoarseRows {
  const float* z;
  const int16_t* integers;
  const float* scale;
};

// lo, hi = scores of the rows of a tile from `start` against panel p.
template <bool Integer>
VQK_INLINE void score_tile(const Codebook& cb, const CoarseRows& z, int64_t start, int64_t p, Vec* lo, Vec* hi) {
#ifdef VQK_INTEGER
  if constexpr (Integer) {
    const int64_t pairs = (cb.D + 1) / 2;
    score_panel_integer(z.integers + start * 2 * pairs, pairs, z.scale + start, cb.panels16 + p * pairs * 2 * kWidth,
                        cb.code_scales + p * kWidth, cb.half_norms + p * kWidth, lo, hi);
    return;
  }
#endif
  score_panel(z.z + start * cb.D, cb.D, cb.panels + p * cb.D * kWidth, cb.half_norms + p * kWidth, cb.D, lo, hi);
}

// Fills the rows' candidates.
template <bool Integer>
static void coarse_pass(const Codebook& cb, const CoarseRows& z, Row* rows, int n, float* minima) {
  const int64_t D = cb.D, panels_per_group = cb.group > 2 ? cb.group / 2 : 1;
  const int64_t groups_per_panel = cb.group == 1 ? 2 : 1;
  int64_t block = kBlockBytes / (D * kWidth * (Integer ? 2 : 4));
  const int64_t most = kBlockVectors * panels_per_group / groups_per_panel;  // what the minima have room for
  if (block > most) block = most;
  block = block / panels_per_group * panels_per_group;
  if (block < panels_per_group) block = panels_per_group;
  constexpr int64_t kStep = kTileRows * kLanes;
  for (int64_t first = 0; first < cb.panels_count; first += block) {
    const int64_t last = first + block < cb.panels_count ? first + block : cb.panels_count;
    const uint32_t lane = static_cast<uint32_t>(first / panels_per_group * groups_per_panel * kLanes);
    for (int done = 0; done < n; done += kTileRows) {
      // the last tile of floats overlaps the one before, that of integers is filled up
      const int start = Integer || done + kTileRows <= n || n < kTileRows ? done : n - kTileRows;
      float* out = minima;
      for (int64_t p = first, in_group = 0; p < last; ++p) {
        Vec lo[kTileRows], hi[kTileRows];
        score_tile<Integer>(cb, z, start, p, lo, hi);
        if (groups_per_panel == 2) {
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r) store(out + r * kLanes, lo[r]), store(out + kStep + r * kLanes, hi[r]);
          out += 2 * kStep;
          continue;
        }
        if (in_group == 0) {
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r) store(out + r * kLanes, VQK_MIN(lo[r], hi[r]));
        } else {
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r)
            store(out + r * kLanes, VQK_MIN(VQK_MIN(lo[r], hi[r]), load(out + r * kLanes)));
        }
        if (++in_group == panels_per_group || p + 1 == last) in_group = 0, out += kStep;
      }
      const int64_t groups = (out - minima) / kStep;
      for (int i = done; i < n && i < start + kTileRows; ++i)
        if (rows[i].count >= 0) filter(rows[i], minima + (i - start) * kLanes, groups, lane);
    }
  }
}

// Behind a lane of a large group are many codewords that are far away: their coarse scores, computed again
// in the same order, say which. Bit v: the panel's vector v has a score <= limit in this lane.
constexpr int kNarrowGroup = 8;

template <bool Integer>
VQK_INLINE unsigned lanes_within(const Codebook& cb, const CoarseRows& z, int64_t i, int64_t panel, int lane,
                                 float limit) {
  Vec lo = load(cb.half_norms + panel * kWidth), hi = load(cb.half_norms + panel * kWidth + kLanes);
#ifdef VQK_INTEGER
  if constexpr (Integer) {
    const int64_t pairs = (cb.D + 1) / 2;
    const int16_t* c = cb.panels16 + panel * pairs * 2 * kWidth;
    const int16_t* row = z.integers + 2 * (i / kTileRows * pairs * kTileRows + i % kTileRows);
    IntVec sum0 = {}, sum1 = {};
    for (int64_t d = 0; d < pairs; ++d, c += 2 * kWidth) {
      const IntVec x = VQK_PAIR(row + 2 * d * kTileRows);
      sum0 = VQK_MADD(x, *reinterpret_cast<const IntVecAtAny*>(c), sum0);
      sum1 = VQK_MADD(x, *reinterpret_cast<const IntVecAtAny*>(c + 2 * kLanes), sum1);
    }
    const Vec minus = VQK_SPLAT(-z.scale[i]);
    lo = VQK_FMA(minus, VQK_TO_FLOAT(sum0) * load(cb.code_scales + panel * kWidth), lo);
    hi = VQK_FMA(minus, VQK_TO_FLOAT(sum1) * load(cb.code_scales + panel * kWidth + kLanes), hi);
  }
#endif
  if constexpr (!Integer) {
    const float *c = cb.panels + panel * cb.D * kWidth, *row = z.z + i * cb.D;
    for (int64_t d = 0; d < cb.D; ++d, c += kWidth) {
      const Vec x = VQK_SPLAT(row[d]);
      lo = VQK_FMA(x, load(c), lo);
      hi = VQK_FMA(x, load(c + kLanes), hi);
    }
  }
  const unsigned below_lo = VQK_NONZERO(lo <= VQK_SPLAT(limit)), below_hi = VQK_NONZERO(hi <= VQK_SPLAT(limit));
  return (below_lo >> lane & 1) | (below_hi >> lane & 1) << 1;
}

// ---------------------------------------------------------------- search

template <class T>
VQK_INLINE double sum_of_squares(const T* x, int64_t D) {
  Doubles a = {}, b = {};
  int64_t d = 0;
  for (; d + 2 * kDoubles <= D; d += 2 * kDoubles) {
    const Doubles p = load_doubles(x + d), q = load_doubles(x + d + kDoubles);
    a += p * p;
    b += q * q;
  }
  double sum = 0;
  for (; d < D; ++d) sum += static_cast<double>(x[d]) * x[d];
  a += b;
  for (int j = 0; j < kDoubles; ++j) sum += a[j];
  return sum + (sizeof(T) == 8 ? D * 0x1p-1060 : 0.0);  // no less than the truth if fp64 squares underflow
}

#ifdef VQK_BYTES
#include "nearest_codeword_bytes.h"
#endif

struct Scratch {
  float* minima;
  Row* rows;
  double* scale;      // [kMaxRows] power of two that a row is multiplied by
  float* integer_scale;
  int64_t* again;     // [kMaxRows] rows that the integer pass leaves to the fp32 pass, then what that finds
  int64_t* index;
  double* value;
  float* z;           // [n][D]
  int16_t* integers;  // [n, up to a whole tile][D + 1], or bytes of as many rows as are taken at once
  int16_t* row;       // [D + 1]
#ifdef VQK_BYTES
  ByteScratch bytes;
#endif
  char* gathered;     // [n][D] values of the rows `again`
  char* end;
};

static Scratch carve(char* memory, int n, int64_t D) {
  Scratch s;
  auto take = [&](auto*& pointer, size_t count) {
    pointer = reinterpret_cast<__typeof__(pointer)>(memory);
    memory += (count * sizeof(*pointer) + 63) / 64 * 64;
  };
  const size_t rows = (n + kTileRows - 1) / kTileRows * kTileRows;
  take(s.minima, kBlockVectors * kTileRows * kLanes);
  take(s.rows, kMaxRows);
  take(s.scale, kMaxRows);
  take(s.integer_scale, kMaxRows);
  take(s.again, kMaxRows);
  take(s.index, kMaxRows);
  take(s.value, kMaxRows);
  take(s.z, rows * D);
  take(s.integers, (rows + kMostTileRows) * (D + 4) + kLanes);
  take(s.row, D + 1);
#ifdef VQK_BYTES
  take(s.bytes.rows, 1);
  take(s.bytes.factors, 2 * kMaxRows);
  take(s.bytes.row, D + kLanes);
  take(s.bytes.tie_place, kTies);
  take(s.bytes.tie_code, kTies);
  take(s.bytes.tie_score, kTies);
  take(s.bytes.candidate_place, kByteCandidates);
  take(s.bytes.candidate_lane, kByteCandidates);
  take(s.bytes.candidate_score, kByteCandidates);
  s.bytes.minima = reinterpret_cast<Tick*>(s.minima);
  s.bytes.tiles = reinterpret_cast<uint8_t*>(s.integers);
#endif
  take(s.gathered, n * D * sizeof(double));
  s.end = memory;
  return s;
}

static size_t scratch_bytes(int n, int64_t D) { return carve(nullptr, n, D).end - static_cast<char*>(nullptr); }

// 2^-exponent(x), kept in the range of normal floats; 1 for ordinary x, so that most data is used in place.
static double power_of_two_scale(double x) {
  if ((x >= 0x1p-40 && x <= 0x1p40) || !(x > 0) || x - x != 0) return 1;
  int exponent = __builtin_ilogb(x);
  exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
  return __builtin_scalbn(1.0, -exponent);
}

// The rows' nearest codewords; with integers, the number of rows in s.again for which they were not enough.
template <class T, bool L2, bool Integer>
static int search_rows(const Codebook& cb, const T* z, const bool* skip, int n, const Scratch& s, int64_t* index,
                       double* value) {
  const int64_t D = cb.D;
  constexpr bool kDouble = sizeof(T) == 8;
  bool in_place = !kDouble && (Integer || n >= kTileRows);
  double norms[kMaxRows];
  for (int i = 0; i < n; ++i) {
    Row& row = s.rows[i];
    index[i] = -1;
    value[i] = __builtin_nan("");
    row.best = row.limit = __builtin_inff();
    row.slack = 0;
    row.count = kNone;
    s.scale[i] = cb.scale;
    norms[i] = 0;
    in_place &= s.scale[i] == 1;
    if ((skip && skip[i]) || !cb.finite) continue;
    const double squares = sum_of_squares(z + i * D, D);
    if (squares - squares != 0 && !(kDouble && all_finite(z + i * D, D))) continue;
    const double norm = __builtin_sqrt(squares);
    if (!L2) {
      s.scale[i] = power_of_two_scale(norm);
      in_place &= s.scale[i] == 1;
    }
    norms[i] = norm * s.scale[i];
    const bool overflows = kDouble && !(norm + cb.norm / cb.scale < 0x1p500);  // canonical sums might
    row.count = overflows ? kEveryCodeword : 0;
  }
  if (!in_place) {
    for (int i = 0; i < n; ++i) {
      const T scale = static_cast<T>(s.scale[i]);
      for (int64_t d = 0; d < D; ++d) s.z[i * D + d] = static_cast<float>(z[i * D + d] * scale);
    }
    for (int64_t j = n * D; j < kTileRows * D; ++j) s.z[j] = 0;
  }
  CoarseRows rows = {s.z, s.integers, s.integer_scale};
  if constexpr (!kDouble)
    if (in_place) rows.z = z;
  for (int i = 0; i < n; ++i) {
    Row& row = s.rows[i];
    const double underflow = kDouble ? 0x1p-1074 * s.scale[i] * cb.scale : 0.0;
    double eps = 0;
#ifdef VQK_INTEGER
    if constexpr (Integer) {
      double error = 0;
      const bool usable = row.count == 0 && norms[i] < 0x1p120;
      s.integer_scale[i] = row_to_integers(rows.z + i * D, usable ? norms[i] : 0.0, D, s.row, s.integers, i, &error);
      eps = integer_error_bound(D, norms[i], error, cb.norm, cb.integer_error, L2, underflow);
    }
#endif
    if constexpr (!Integer) eps = score_error_bound(D, norms[i], cb.norm, L2, underflow);
    if (row.count == 0 && !(eps < 0x1p120)) row.count = kEveryCodeword;
    row.slack = cb.certified ? static_cast<float>(2 * eps) : 0.0f;
  }
#ifdef VQK_INTEGER
  if constexpr (Integer)  // the last tile is filled up with zeros
    for (int i = n; i % kTileRows; ++i) {
      double error;
      s.integer_scale[i] = row_to_integers(s.z, 0.0, D, s.row, s.integers, i, &error);
    }
#endif
  if (cb.finite) coarse_pass<Integer>(cb, rows, s.rows, n, s.minima);

  Decision<T, L2> decision{z, static_cast<const T*>(cb.rows), D, index, value};
  int again = 0;
  for (int i = 0; i < n; ++i) {
    const Row& row = s.rows[i];
    if (Integer && row.count == kEveryCodeword) {
      s.again[again++] = i;
      continue;
    }
    if (row.count == kEveryCodeword)
      for (int64_t k = 0; k < cb.K; ++k) decision.add(i, k);
    for (int j = 0; j < row.count; ++j) {
      if (!(row.score[j] <= row.limit)) continue;
      const int64_t first = static_cast<int64_t>(row.lane[j] / kLanes) * cb.group;  // vector of codewords
      const int64_t last = first + cb.group;
      const int lane = row.lane[j] % kLanes;
      if (cb.group < kNarrowGroup)
        for (int64_t v = first; v < last && v * kLanes + lane < cb.K; ++v) decision.add(i, v * kLanes + lane);
      else
        for (int64_t v = first; v < last && v * kLanes + lane < cb.K; v += 2)
          for (unsigned found = lanes_within<Integer>(cb, rows, i, v / 2, lane, row.limit); found; found &= found - 1)
            decision.add(i, (v + __builtin_ctz(found)) * kLanes + lane);
    }
  }
  decision.finish();
  if (kDouble && !L2)
    for (int i = 0; i < n; ++i)
      if (index[i] < 0) value[i] = __builtin_nan("");
  return again;
}

#ifdef VQK_BYTES
#include "nearest_codeword_byte_search.h"
#endif

// Bytes, 16-bit integers, floats: each pass takes the rows for which the one before was not exact enough.
template <class T, bool L2>
static void search_with(const Codebook& cb, const void* rows, const bool* skip, int n, char* memory, int64_t* index,
                        double* value, [[maybe_unused]] const SearchHints& hints) {
  const Scratch s = carve(memory, n, cb.D);
  const T* z = static_cast<const T*>(rows);
  T* const gathered = reinterpret_cast<T*>(s.gathered);
  int64_t from[kMaxRows];  // which rows z holds
  for (int i = 0; i < n; ++i) from[i] = i;
  int64_t* found = index;
  double* found_value = value;
  // After a pass: its answers go to their rows, the `again` rows of s.again become z.
  auto finish = [&](int again) {
    if (found != index)
      for (int j = 0; j < n; ++j) index[from[j]] = found[j], value[from[j]] = found_value[j];
    for (int j = 0; j < again; ++j) {
      __builtin_memmove(gathered + j * cb.D, z + s.again[j] * cb.D, cb.D * sizeof(T));
      from[j] = from[s.again[j]];
    }
    const bool most = again > n / 2;  // of the rows: stop asking this pass
    z = gathered, skip = nullptr, n = again, found = s.index, found_value = s.value;
    return most;
  };
#ifdef VQK_BYTES
  if constexpr (sizeof(T) == sizeof(float))
    if (cb.panels8) {
      if (!__atomic_load_n(cb.bytes_fail, __ATOMIC_RELAXED) &&
          finish(search_bytes<L2>(cb, z, skip, n, s.bytes, s.again, found, found_value, hints)))
        __atomic_store_n(cb.bytes_fail, true, __ATOMIC_RELAXED);
      if (n) make_panels(cb);
    }
#endif
#ifdef VQK_INTEGER
  if (n && cb.panels16 && !__atomic_load_n(cb.integers_fail, __ATOMIC_RELAXED) &&
      finish(search_rows<T, L2, true>(cb, z, skip, n, s, found, found_value)))
    __atomic_store_n(cb.integers_fail, true, __ATOMIC_RELAXED);
#endif
  if (n) finish(search_rows<T, L2, false>(cb, z, skip, n, s, found, found_value));
}

static void search(const Codebook& cb, const void* rows, const bool* skip, int n, char* scratch, int64_t* index,
                   double* value, const SearchHints& hints) {
  auto* run = cb.is_double ? (cb.l2 ? search_with<double, true> : search_with<double, false>)
                           : (cb.l2 ? search_with<float, true> : search_with<float, false>);
  run(cb, rows, skip, n, scratch, index, value, hints);
}

#include "nearest_codeword_prepare.h"
