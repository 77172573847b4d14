// The canonical comparison of (row, codeword) pairs. Part of nearest_codeword_kernel.h: included once per SIMD
// level, inside that level's anonymous namespace, after VQK_LANES, VQK_WIDEN and VQK_INLINE.
//
// A canonical cost is one sequential fp64 sum over the features, every operation rounded by itself: nothing
// may be re-associated or fused (the build passes -ffp-contract=off). So the parallelism is across pairs:
//
//   pair 0   (z-c)^2 at d .. d+3  |           | pair 0..3 at d   |   sum += at d
//   pair 1   (z-c)^2 at d .. d+3  | transpose | pair 0..3 at d+1 |   sum += at d+1
//   ...                           |           | ...              |   ...
//
// two such chains hide the latency of the additions. Every lane adds in the order of the definition, so the
// bits do not depend on the vector width.

// fp64 lanes of the canonical sums
constexpr int kDoubles = kLanes == 4 ? 2 : 4;
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));
typedef double DoublesAtAny __attribute__((vector_size(8 * kDoubles), aligned(8), may_alias));

VQK_INLINE Doubles load_doubles(const double* p) { return *reinterpret_cast<const DoublesAtAny*>(p); }
VQK_INLINE Doubles load_doubles(const float* p) { return VQK_WIDEN(p); }
// The last `count` < kDoubles values, then zeros.
template <class T>
VQK_INLINE Doubles load_tail(const T* p, int64_t count) {
  Doubles x = {};
  for (int j = 0; j < kDoubles; ++j)
    if (j < count) x[j] = p[j];
  return x;
}

// t[j][i] = p[i][j]
VQK_INLINE void transpose(const Doubles* p, Doubles* t) {
#if VQK_LANES == 4
  t[0] = __builtin_shufflevector(p[0], p[1], 0, 2);
  t[1] = __builtin_shufflevector(p[0], p[1], 1, 3);
#else
  const Doubles a = __builtin_shufflevector(p[0], p[1], 0, 4, 2, 6);
  const Doubles b = __builtin_shufflevector(p[0], p[1], 1, 5, 3, 7);
  const Doubles c = __builtin_shufflevector(p[2], p[3], 0, 4, 2, 6);
  const Doubles d = __builtin_shufflevector(p[2], p[3], 1, 5, 3, 7);
  t[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  t[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  t[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  t[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

constexpr int kPairs = 8;

// sum[chain] += the terms of kDoubles features from d, in order; of the last D - d < kDoubles where !Whole:
// padded with zeros, as adding +0 is exact.
template <class T, bool L2, bool Whole>
VQK_INLINE void add_terms(const T* const* z, const T* const* c, int64_t d, int64_t D, Doubles* sum) {
#pragma GCC unroll 4
  for (int chain = 0; chain < kPairs / kDoubles; ++chain) {
    Doubles product[kDoubles], term[kDoubles];
#pragma GCC unroll 4
    for (int j = 0; j < kDoubles; ++j) {
      const T* zp = z[chain * kDoubles + j] + d;
      const T* cp = c[chain * kDoubles + j] + d;
      const Doubles x = Whole ? load_doubles(zp) : load_tail(zp, D - d);
      const Doubles y = Whole ? load_doubles(cp) : load_tail(cp, D - d);
      product[j] = L2 ? (x - y) * (x - y) : x * y;
    }
    transpose(product, term);
#pragma GCC unroll 4
    for (int j = 0; j < kDoubles; ++j) sum[chain] = sum[chain] + term[j];
  }
}

// cost[i] = sum over d, in order, of (z_d - c_d)^2 (l2) or minus that of z_d * c_d, in fp64 without
// fused multiply-adds. Products are computed along d, transposed, then added: lane i is pair i.
template <class T, bool L2>
VQK_INLINE void canonical_costs(const T* const* z, const T* const* c, int64_t D, double* cost) {
  Doubles sum[kPairs / kDoubles] = {};
  int64_t d = 0;
  for (; d + kDoubles <= D; d += kDoubles) add_terms<T, L2, true>(z, c, d, D, sum);
  if (d < D) add_terms<T, L2, false>(z, c, d, D, sum);
  for (int i = 0; i < kPairs; ++i) cost[i] = L2 ? sum[i / kDoubles][i % kDoubles] : -sum[i / kDoubles][i % kDoubles];
}

template <class T>
VQK_INLINE bool all_finite(const T* x, int64_t D) {
  for (int64_t d = 0; d < D; ++d)
    if (!(x[d] - x[d] == 0)) return false;
  return true;
}

// The value of a row, with index -1, where products of a finite fp64 pair overflowed to infinities that cancel (dot):
// nothing is lower, so no codeword replaces it.
constexpr double kUndecided = -__builtin_huge_val();

// Collects (row, codeword) pairs and keeps each row's best: lowest cost, then lowest index.
template <class T, bool L2>
struct Decision {
  const T* rows;
  const T* codewords;
  int64_t D;
  int64_t* index;
  double* value;
  const T* z[kPairs] = {};
  const T* c[kPairs] = {};
  int64_t row[kPairs] = {}, code[kPairs] = {};
  int count = 0;

  __attribute__((always_inline)) void add(int64_t i, int64_t k) {
    z[count] = rows + i * D;
    c[count] = codewords + k * D;
    row[count] = i;
    code[count] = k;
    VQK_COUNTED(vqk_compared, 1);
    if (++count == kPairs) finish();
  }

  __attribute__((noinline)) void finish() {
    if (!count) return;
    for (int j = count; j < kPairs; ++j) z[j] = z[j - 1], c[j] = c[j - 1], row[j] = row[j - 1], code[j] = code[j - 1];
    double cost[kPairs], total = 0;
    bool one_row = true;
    for (int j = 1; j < kPairs; ++j) one_row &= row[j] == row[0];
    canonical_costs<T, L2>(z, c, D, cost);
    for (int j = 0; j < kPairs; ++j) total += cost[j];
    // Not finite, rarely: a codeword that must not win, or finite fp64 values whose cost overflows.
    if (__builtin_expect(total - total != 0, 0)) {
      for (int j = 0; j < count; ++j)
        if (!all_finite(c[j], D)) continue;
        else if (cost[j] == cost[j]) update(row[j], code[j], cost[j]);
        else index[row[j]] = -1, value[row[j]] = kUndecided;
    } else if (one_row) {  // its pairs come with ascending codes, mostly
      double best = cost[0];
      int64_t best_code = code[0];
#pragma GCC unroll 8
      for (int j = 1; j < kPairs; ++j) {
        const bool better = (cost[j] < best) | ((cost[j] == best) & (code[j] < best_code));
        best_code = better ? code[j] : best_code;
        best = better ? cost[j] : best;
      }
      update(row[0], best_code, best);
    } else {
      for (int j = 0; j < kPairs; ++j) update(row[j], code[j], cost[j]);
    }
    count = 0;
  }

  __attribute__((always_inline)) void update(int64_t i, int64_t k, double x) {
    const double lowest_cost = value[i];  // NaN at first
    const bool better = (!(lowest_cost <= x)) | ((lowest_cost == x) & (k < index[i]));
    index[i] = better ? k : index[i];
    value[i] = better ? x : lowest_cost;
  }
};

template <class T, bool L2>
static void scan_with(const void* rows, int n, const void* codewords, int64_t count, int64_t D, int64_t* index,
                      double* value) {
  Decision<T, L2> decision{static_cast<const T*>(rows), static_cast<const T*>(codewords), D, index, value};
  for (int i = 0; i < n; ++i) {
    index[i] = -1;
    value[i] = __builtin_nan("");
    for (int64_t k = 0; k < count; ++k) decision.add(i, k);
  }
  decision.finish();
}

static void scan(const void* rows, int n, const void* codewords, int64_t count, int64_t D, bool is_double, bool l2,
                 int64_t* index, double* value) {
  auto* run = is_double ? (l2 ? scan_with<double, true> : scan_with<double, false>)
                        : (l2 ? scan_with<float, true> : scan_with<float, false>);
  run(rows, n, codewords, count, D, index, value);
}
