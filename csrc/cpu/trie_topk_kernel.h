// Maximum and sum of exponentials of a row of logits; see trie_topk.cpp. Included once per SIMD level after half.h, inside
// an unnamed namespace; VQK_AVX2 selects the instructions of the half-precision loads.
#include "float_kernel.h"

constexpr int64_t kLogits = 512;  // added in float, lane by lane; their sums are added in double

// The last logits, fewer than eight, and then -inf.
template <class T>
static inline v8f last8(const T* x, int64_t at, int64_t V) {
  v8f v = v8f{} - __builtin_inff();
  for (int64_t i = at; i < V; ++i) v[i - at] = static_cast<float>(to_float(x[i]));
  return v;
}

template <class T>
static double highest_of(const T* x, int64_t V) {
  if constexpr (sizeof(T) == 8) {
    double top = -__builtin_inf();
    for (int64_t i = 0; i < V; ++i) top = x[i] <= top ? top : x[i] != x[i] ? x[i] : top != top ? top : x[i];
    return top;
  } else {
    v8f top = v8f{} - __builtin_inff();
    v8i nan = {};
    auto take = [&](const v8f& v) {
      const v8i more = v > top;
      top = (v8f)((more & (v8i)v) | (~more & (v8i)top));
      nan |= v != v;
    };
    int64_t i = 0;
    for (; i + 8 <= V; i += 8) take(load8(x + i));
    if (i < V) take(last8(x, i, V));
    float most = top[0];
    bool bad = nan[0];
    for (int lane = 1; lane < 8; ++lane) most = top[lane] > most ? top[lane] : most, bad |= nan[lane] != 0;
    return bad ? __builtin_nan("") : most;
  }
}

template <class T>
static double sum_of(const T* x, int64_t V, double highest) {
  double sum = 0;
  if constexpr (sizeof(T) == 8) {
    for (int64_t i = 0; i < V; ++i) sum += __builtin_exp(x[i] - highest);
  } else {
    const v8f origin = v8f{} + static_cast<float>(highest);
    for (int64_t begin = 0; begin < V; begin += kLogits) {
      const int64_t end = begin + kLogits < V ? begin + kLogits : V;
      v8f part = {};
      int64_t i = begin;
      for (; i + 8 <= end; i += 8) part += exp_negative(load8(x + i) - origin);
      if (i < end) part += exp_negative(last8(x, i, V) - origin);
      for (int lane = 0; lane < 8; ++lane) sum += part[lane];
    }
  }
  return sum;
}

template <class Run>
static inline double of_row(const TrieTopkParams& p, int64_t row, const Run& run) {
  switch (p.dtype) {
    case DType::f64: return run(static_cast<const double*>(p.logits) + row * p.V);
    case DType::bf16: return run(static_cast<const bf16*>(p.logits) + row * p.V);
    case DType::f16: return run(static_cast<const f16*>(p.logits) + row * p.V);
    default: return run(static_cast<const float*>(p.logits) + row * p.V);
  }
}

static double row_highest_here(const TrieTopkParams& p, int64_t row) {
  return of_row(p, row, [&](auto* x) { return highest_of(x, p.V); });
}
static double row_sum_here(const TrieTopkParams& p, int64_t row, double highest) {
  return of_row(p, row, [&](auto* x) { return sum_of(x, p.V, highest); });
}
