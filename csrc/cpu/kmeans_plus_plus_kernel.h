// One block of rows of kmeans_plus_plus; see kmeans_plus_plus.cpp. Included once per SIMD level, inside an unnamed
// namespace.

template <class T>
struct Lanes {
  typedef T Vec __attribute__((vector_size(8 * sizeof(T))));  // 8 lanes at every level: the same order of additions
  typedef T Half __attribute__((vector_size(4 * sizeof(T))));
};

// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
template <class T>
static inline T sum_of_lanes(const typename Lanes<T>::Vec& s) {
  typedef typename Lanes<T>::Half Half;
  Half h = __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
  h += __builtin_shufflevector(h, h, 2, 3, 0, 1);
  return h[0] + h[1];
}

// distance[l] = |x - c_l|^2: lane = d mod 8, lanes combined in one order, nothing fused.
template <class T, int Count>
static inline void squared_distances(const T* x, const T* c, int64_t D, T* distance) {
  typedef typename Lanes<T>::Vec Vec;
  Vec sum[Count] = {};
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    Vec v;
    __builtin_memcpy(&v, x + d, sizeof(Vec));
    for (int l = 0; l < Count; ++l) {
      Vec w;
      __builtin_memcpy(&w, c + l * D + d, sizeof(Vec));
      const Vec t = v - w;
      sum[l] += t * t;
    }
  }
  for (int l = 0; l < Count; ++l) {
    for (int64_t j = d; j < D; ++j) {
      const T t = x[j] - c[l * D + j];
      sum[l][j & 7] += t * t;
    }
    distance[l] = sum_of_lanes<T>(sum[l]);
  }
}

template <class T>
static void seed_block_here(const SeedBlock& b) {
  const T *x = static_cast<const T*>(b.x), *c = static_cast<const T*>(b.candidates);
  const T* nearest = static_cast<const T*>(b.nearest);
  double potential[kSeedCandidates] = {};
  int64_t count = 0;
  for (int64_t n = b.begin; n < b.end; ++n) {
    const T have = nearest[n];
    // |c - centre| >= 2 |x - centre| puts the candidate no nearer to x than its centre (triangle inequality)
    if (b.centre && b.clearance[b.centre[n]] >= 4.0 * static_cast<double>(have)) {
      for (int l = 0; l < b.L; ++l) potential[l] += static_cast<double>(have);
      continue;
    }
    T* distance = static_cast<T*>(b.distances) + count * b.L;
    int l = 0;
    for (; l + 4 <= b.L; l += 4) squared_distances<T, 4>(x + n * b.D, c + l * b.D, b.D, distance + l);
    for (; l < b.L; ++l) squared_distances<T, 1>(x + n * b.D, c + l * b.D, b.D, distance + l);
    for (l = 0; l < b.L; ++l) potential[l] += static_cast<double>(distance[l] < have ? distance[l] : have);
    b.active[count++] = static_cast<int32_t>(n - b.begin);
  }
  *b.count = count;
  for (int l = 0; l < b.L; ++l) b.potential[l] = potential[l];
}
