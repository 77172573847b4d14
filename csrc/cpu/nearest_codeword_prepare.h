// Codebooks and rows made ready: packing, conversion, normalisation. Part of nearest_codeword_kernel.h: included once
// per SIMD level, inside that level's anonymous namespace.

// The magnitudes' bits are ordered as the magnitudes are, and their maximum is quick without AVX, too.
template <class T, class Bits>
static void survey_with(const T* row, int64_t n, int64_t D, double* sum, double* largest, int64_t* finite) {
  constexpr Bits kInfinity = __builtin_bit_cast(Bits, static_cast<T>(__builtin_inf())), kMagnitude = ~(Bits{1} << (8 * sizeof(T) - 1));
  for (int64_t k = 0; k < n; ++k, row += D) {
    Bits most = 0;
    for (int64_t d = 0; d < D; ++d) {
      Bits x;
      __builtin_memcpy(&x, row + d, sizeof x);
      x &= kMagnitude;
      most = most < x ? x : most;
    }
    if (sum)
      for (int64_t d = 0; d < D; ++d) sum[d] += row[d];
    if (most >= kInfinity) continue;
    const double magnitude = __builtin_bit_cast(T, most);
    *largest = *largest < magnitude ? magnitude : *largest;
    ++*finite;
  }
}

static void survey(const void* rows, bool is_double, int64_t n, int64_t D, double* sum, double* largest, int64_t* finite) {
  if (is_double) survey_with<double, int64_t>(static_cast<const double*>(rows), n, D, sum, largest, finite);
  else survey_with<float, int32_t>(static_cast<const float*>(rows), n, D, sum, largest, finite);
}

template <class T>
static bool usable(const Codebook& cb, int64_t k, double squares) {
  return squares - squares == 0 || (sizeof(T) == 8 && all_finite(static_cast<const T*>(cb.rows) + k * cb.D, cb.D));
}

template <class T>
static double half_norms_with(const Codebook& cb, int64_t first, int64_t last) {
  float* half_norms = const_cast<float*>(cb.half_norms);
  double largest = 0;
  for (int64_t k = first * kWidth; k < last * kWidth; ++k) {
    half_norms[k] = __builtin_inff();
    if (k >= cb.K) continue;
    const double squares = sum_of_squares(static_cast<const T*>(cb.rows) + k * cb.D, cb.D) * cb.scale * cb.scale;
    if (!usable<T>(cb, k, squares)) continue;
    half_norms[k] = cb.l2 ? static_cast<float>(0.5 * squares) : 0.0f;
    if (squares > largest) largest = squares;
  }
  return __builtin_sqrt(largest);
}

static double half_norms(const Codebook& cb, int64_t first, int64_t last) {
  return (cb.is_double ? half_norms_with<double> : half_norms_with<float>)(cb, first, last);
}

template <class T>
static double pack_with(const Codebook& cb, int64_t first, int64_t last) {
  const int64_t D = cb.D;
  float* panels = const_cast<float*>(cb.panels);
  const T scale = static_cast<T>(cb.scale);
  double lost = 0;
  for (int64_t p = first; p < last; ++p) {
    float* panel = panels + p * D * kWidth;
    for (int j = 0; j < kWidth; ++j) {
      const int64_t k = p * kWidth + j;
      const T* row = static_cast<const T*>(cb.rows) + k * D;
      const bool takes_part = cb.half_norms[k] < __builtin_inff();
      for (int64_t d = 0; d < D; ++d)
        panel[d * kWidth + j] = takes_part ? static_cast<float>(-(row[d] * scale)) : 0.0f;
#ifdef VQK_INTEGER
      if (!cb.panels16) continue;
      const double norm = takes_part ? __builtin_sqrt(sum_of_squares(row, D)) * cb.scale : 0.0;
      const double error = code_to_integers<T>(cb, k, norm, const_cast<int16_t*>(cb.panels16),
                                               const_cast<float*>(cb.code_scales));
      if (error > lost) lost = error;
#endif
    }
  }
  return lost;
}

static double pack(const Codebook& cb, int64_t first, int64_t last) {
  return (cb.is_double ? pack_with<double> : pack_with<float>)(cb, first, last);
}

static float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

static void convert(const void* from, DType dtype, int64_t count, void* to) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  float* out = static_cast<float*>(to);
  if (dtype == DType::bf16) {
    for (int64_t i = 0; i < count; ++i) out[i] = float_from_bits(static_cast<uint32_t>(half[i]) << 16);
  } else if (dtype == DType::f16) {
    for (int64_t i = 0; i < count; ++i) {
      // exponent and fraction moved into place, then 2^112 corrects the exponent's bias (subnormals too)
      const float magnitude = float_from_bits((half[i] & 0x7fffu) << 13) * 0x1p112f;
      uint32_t bits;
      __builtin_memcpy(&bits, &magnitude, 4);
      bits |= (half[i] & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
      out[i] = float_from_bits(bits | (half[i] & 0x8000u) << 16);
    }
  } else {
    __builtin_memcpy(to, from, count * (dtype == DType::f64 ? 8 : 4));
  }
}

template <class T>
static void normalize_with(const T* from, int64_t n, int64_t D, T* to) {
  for (int64_t first = 0; first < n; first += kPairs) {
    const T* rows[kPairs];
    double squares[kPairs];
    for (int i = 0; i < kPairs; ++i) rows[i] = from + (first + i < n ? first + i : first) * D;
    canonical_costs<T, false>(rows, rows, D, squares);
    for (int i = 0; i < kPairs && first + i < n; ++i) {
      const double norm = __builtin_sqrt(-squares[i]);
      T* out = to + (first + i) * D;
      for (int64_t d = 0; d < D; ++d)
        out[d] = norm == 0 ? T(0) : static_cast<T>(static_cast<double>(rows[i][d]) / norm);
    }
  }
}

static void normalize(const void* from, bool is_double, int64_t n, int64_t D, void* to) {
  if (is_double) normalize_with(static_cast<const double*>(from), n, D, static_cast<double*>(to));
  else normalize_with(static_cast<const float*>(from), n, D, static_cast<float*>(to));
}
