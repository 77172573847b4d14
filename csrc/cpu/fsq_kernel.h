// Rows [begin, end) of fsq and fsq_backward; see fsq.cpp. Included once per SIMD level after half.h, inside an
// unnamed namespace; VQK_AVX2 selects the instructions of the half-precision loads and stores.
#include "float_kernel.h"

// Levels passed by x of feature j: 0 .. L - 1, or -1 for NaN.
static inline int32_t fsq_digit(const FsqTable& t, int64_t j, int64_t levels, double x) {
  if (x != x) return -1;
  const std::vector<double>& threshold = t.exact[j];
  const double* first = threshold.data();
  if (!threshold.empty()) {
    int64_t low = 0, high = levels - 1;  // thresholds below `low` are passed, from `high` on are not
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (x >= first[middle]) low = middle + 1;
      else high = middle;
    }
    return static_cast<int32_t>(low);
  }
  const double value = __builtin_nearbyint(t.half[j] * __builtin_tanh(x + t.shift64[j]) - t.offset[j]);
  const int64_t level = static_cast<int64_t>(value) + levels / 2;  // 1/1000 more than the range is too much here
  return static_cast<int32_t>(level < 0 ? 0 : level < levels ? level : levels - 1);
}

template <class T>
static inline void fsq_one(const FsqParams& p, const FsqTable& t, int64_t i, int64_t j, int32_t* digit) {
  const T* z = static_cast<const T*>(p.z);
  T* out = static_cast<T*>(p.quantized);
  const int64_t width = p.levels[j] / 2;
  *digit = fsq_digit(t, j, p.levels[j], to_float(z[i]));
  if constexpr (sizeof(T) == 8) {
    out[i] = *digit < 0 ? z[i] : static_cast<double>(*digit - width) / static_cast<double>(width);
  } else {
    round_to(*digit < 0 ? to_float(z[i]) : static_cast<float>(*digit - width) / static_cast<float>(width), out + i);
  }
}

// Eight values at a time where all features have few levels. `digits`: of kFsqRows rows.
template <class T>
static inline int64_t fsq_vectors(const FsqParams& p, const FsqTable& t, int64_t first, int64_t count,
                                  int32_t* digits) {
  if constexpr (sizeof(T) == 8) return 0;
  else {
    const T* z = static_cast<const T*>(p.z) + first;
    T* out = static_cast<T*>(p.quantized) + first;
    int64_t phase = 0, i = 0;
    for (; i + kFsqLanes <= count; i += kFsqLanes) {
      const v8f x = load8(z + i), width = load8(&t.width[phase * kFsqLanes]);
      const float* threshold = &t.threshold[phase * t.steps * kFsqLanes];
      v8i digit = {};
      for (int64_t s = 0; s < t.steps; ++s) digit -= x >= load8(threshold + s * kFsqLanes);
      const v8i nan = x != x;
      const v8f value = (__builtin_convertvector(digit, v8f) - width) / width;
      store8(out + i, (v8f)(((v8i)x & nan) | ((v8i)value & ~nan)));
      digit |= nan;
      __builtin_memcpy(digits + i, &digit, 32);
      phase = phase + 1 == t.phases ? 0 : phase + 1;
    }
    return i;
  }
}

template <class Count>
static inline void fsq_indices(const int32_t* digits, const int32_t* basis, int64_t rows, Count d, int32_t* indices) {
  for (int64_t r = 0; r < rows; ++r) {
    int32_t index = 0, bad = 0;
    for (int64_t j = 0; j < d; ++j) {
      index += digits[r * d + j] * basis[j];
      bad |= digits[r * d + j];
    }
    indices[r] = bad < 0 ? -1 : index;
  }
}

template <class T>
static void fsq_rows_of(const FsqParams& p, const FsqTable& t, int64_t begin, int64_t end) {
  const int64_t d = p.d;
  int32_t digits[kFsqRows * kFsqMaxFeatures];
  for (int64_t row = begin; row < end; row += kFsqRows) {
    const int64_t rows = end - row < kFsqRows ? end - row : kFsqRows, count = rows * d;
    int64_t i = t.steps ? fsq_vectors<T>(p, t, row * d, count, digits) : 0;
    for (; i < count; ++i) fsq_one<T>(p, t, row * d + i, i % d, digits + i);
    switch (d) {  // a constant d lets the compiler unroll
      case 3: fsq_indices(digits, t.basis.data(), rows, std::integral_constant<int64_t, 3>(), p.indices + row); break;
      case 4: fsq_indices(digits, t.basis.data(), rows, std::integral_constant<int64_t, 4>(), p.indices + row); break;
      case 5: fsq_indices(digits, t.basis.data(), rows, std::integral_constant<int64_t, 5>(), p.indices + row); break;
      case 6: fsq_indices(digits, t.basis.data(), rows, std::integral_constant<int64_t, 6>(), p.indices + row); break;
      default: fsq_indices(digits, t.basis.data(), rows, d, p.indices + row);
    }
  }
}

template <class T>
static inline T fsq_slope(const FsqTable& t, int64_t j, int64_t width, double x, double g) {
  const double u = x + t.shift64[j], e = __builtin_exp(-2 * __builtin_fabs(u)), f = 1 + e;
  return static_cast<T>(g * (t.half[j] / static_cast<double>(width)) * (4 * e / (f * f)));
}

template <class T>
static void fsq_backward_rows_of(const FsqBackwardParams& p, const FsqTable& t, int64_t begin, int64_t end) {
  const T* z = static_cast<const T*>(p.z);
  const T* g = static_cast<const T*>(p.grad);
  T* dz = static_cast<T*>(p.dz);
  int64_t i = begin * p.d;
  const int64_t last = end * p.d;
  if constexpr (sizeof(T) != 8) {
    for (int64_t phase = 0; i + kFsqLanes <= last; i += kFsqLanes) {
      v8f u = load8(z + i) + load8(&t.shift[phase * kFsqLanes]);
      u = (v8f)((v8i)u & 0x7fffffff);
      const v8f e = exp_negative(u * -2.0f), f = e + 1.0f;
      store8(dz + i, load8(g + i) * load8(&t.slope[phase * kFsqLanes]) * (e * 4.0f / (f * f)));
      phase = phase + 1 == t.phases ? 0 : phase + 1;
    }
  }
  for (; i < last; ++i) {
    const int64_t j = i % p.d;
    if constexpr (sizeof(T) == 8) dz[i] = fsq_slope<double>(t, j, p.levels[j] / 2, z[i], g[i]);
    else round_to(fsq_slope<float>(t, j, p.levels[j] / 2, to_float(z[i]), to_float(g[i])), dz + i);
  }
}

template <class Params, class Run>
static inline void fsq_dispatch(const Params& p, const Run& run) {
  switch (p.dtype) {
    case DType::f64: return run(double{});
    case DType::bf16: return run(bf16{});
    case DType::f16: return run(f16{});
    default: return run(float{});
  }
}

static void fsq_rows_here(const FsqParams& p, const FsqTable& t, int64_t begin, int64_t end) {
  fsq_dispatch(p, [&](auto type) { fsq_rows_of<decltype(type)>(p, t, begin, end); });
}
static void fsq_backward_rows_here(const FsqBackwardParams& p, const FsqTable& t, int64_t begin, int64_t end) {
  fsq_dispatch(p, [&](auto type) { fsq_backward_rows_of<decltype(type)>(p, t, begin, end); });
}
