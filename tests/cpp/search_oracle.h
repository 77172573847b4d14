// What test_nearest_codeword.cpp compares with and on what: dtypes, the naive scalar oracle, and the data that breaks
// approximate searches.
#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "vqk/params.h"

using namespace vqk;

namespace {

// ---------------------------------------------------------------- dtypes, one value at a time

double decode(DType dtype, const void* base, int64_t i) {
  if (dtype == DType::f64) return static_cast<const double*>(base)[i];
  if (dtype == DType::f32) return static_cast<const float*>(base)[i];
  const uint16_t bits = static_cast<const uint16_t*>(base)[i];
  if (dtype == DType::bf16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// Rounds x to the dtype by searching among all 16-bit patterns' neighbours is slow; the half types are
// made by truncation, which is as good as any data.
void encode(DType dtype, double x, void* base, int64_t i) {
  if (dtype == DType::f64) static_cast<double*>(base)[i] = x;
  if (dtype == DType::f32) static_cast<float*>(base)[i] = static_cast<float>(x);
  if (dtype == DType::bf16)
    static_cast<uint16_t*>(base)[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(x)) >> 16);
  if (dtype == DType::f16) {
    uint16_t bits = std::signbit(x) ? 0x8000 : 0;
    const double a = std::fabs(x);
    if (std::isnan(x)) bits |= 0x7e00;
    else if (a >= 65536) bits |= 0x7c00;
    else if (a < std::ldexp(1, -14)) bits |= static_cast<uint16_t>(std::ldexp(a, 24));
    else {
      const int e = std::ilogb(a);
      bits |= static_cast<uint16_t>((e + 15) << 10 | (static_cast<int>(std::ldexp(a, 10 - e)) - 1024));
    }
    static_cast<uint16_t*>(base)[i] = bits;
  }
}

size_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
const char* name(DType dtype) { return std::vector{"f32", "f64", "bf16", "f16"}[static_cast<int>(dtype)]; }
const char* name(Metric metric) { return std::vector{"l2", "cosine", "dot"}[static_cast<int>(metric)]; }

// A tensor whose data starts one element past an aligned address.
struct Array {
  Array(DType dtype, const std::vector<double>& values)
      : dtype(dtype), memory(bytes_of(dtype) * (values.size() + 1) + 64) {
    for (size_t i = 0; i < values.size(); ++i) encode(dtype, values[i], data(), i);
  }
  char* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + ((address + 31) / 32 * 32 - address) + bytes_of(dtype);
  }
  double operator[](int64_t i) { return decode(dtype, data(), i); }
  DType dtype;
  std::vector<char> memory;
};

// ---------------------------------------------------------------- oracle

std::vector<double> row_of(Array& a, int64_t i, int64_t D, bool normalize) {
  std::vector<double> row(D);
  double squares = 0;
  for (int64_t d = 0; d < D; ++d) row[d] = a[i * D + d], squares += row[d] * row[d];
  const double norm = std::sqrt(squares);
  if (normalize)
    for (double& x : row) {
      x = norm == 0 ? 0.0 : x / norm;
      if (a.dtype != DType::f64) x = static_cast<float>(x);
    }
  return row;
}

bool finite(const std::vector<double>& row) {
  return std::all_of(row.begin(), row.end(), [](double x) { return std::isfinite(x); });
}

struct Answer {
  int64_t index;
  double value;  // canonical, as the op returns it before the last rounding
};

Answer nearest(const std::vector<double>& z, const std::vector<std::vector<double>>& codebook, Metric metric) {
  Answer best{-1, NAN};
  if (!finite(z)) return best;
  double lowest = 0;
  for (size_t k = 0; k < codebook.size(); ++k) {
    if (!finite(codebook[k])) continue;
    double sum = 0;
    for (size_t d = 0; d < z.size(); ++d) {
      const double x = metric == Metric::l2 ? z[d] - codebook[k][d] : z[d],
                   y = metric == Metric::l2 ? x : codebook[k][d];
      const double product = x * y;
      sum += product;
    }
    const double cost = metric == Metric::l2 ? sum : -sum;
    if (best.index < 0 || cost < lowest) best.index = static_cast<int64_t>(k), lowest = cost;
  }
  if (best.index >= 0) best.value = lowest + (metric == Metric::cosine ? 1.0 : 0.0);  // and no -0
  return best;
}

// ---------------------------------------------------------------- data

using Random = std::mt19937_64;
using Draw =
    std::function<void(Random&, int64_t N, int64_t K, int64_t D, std::vector<double>& z, std::vector<double>& c)>;

double normal(Random& random) { return std::normal_distribution<double>()(random); }
double uniform(Random& random) { return std::uniform_real_distribution<double>()(random); }

void fill(std::vector<double>& x, const std::function<double()>& draw) {
  for (double& v : x) v = draw();
}

// Codewords that are copies of others, or of rows.
void duplicate(Random& random, int64_t N, int64_t K, int64_t D, std::vector<double>& z, std::vector<double>& c) {
  for (int64_t k = 0; k < K; ++k) {
    const int64_t from = static_cast<int64_t>(random() % K), row = static_cast<int64_t>(random() % N);
    if (random() % 2) std::copy_n(c.begin() + from * D, D, c.begin() + k * D);
    else if (random() % 4 == 0) std::copy_n(z.begin() + row * D, D, c.begin() + k * D);
  }
}

const std::vector<std::pair<const char*, Draw>> kData = {
    {"gaussian",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return normal(r); });
       fill(c, [&] { return normal(r); });
     }},
    {"far cluster",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return 1000 + 0.01 * normal(r); });
       fill(c, [&] { return 1000 + 0.01 * normal(r); });
     }},
    {"very far cluster",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return 1e6 + normal(r); });
       fill(c, [&] { return 1e6 + normal(r); });
     }},
    {"lognormal",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return std::exp(3 * normal(r)); });
       fill(c, [&] { return std::exp(3 * normal(r)); });
     }},
    {"cauchy",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return normal(r) / normal(r); });
       fill(c, [&] { return normal(r) / normal(r); });
     }},
    {"integers",
     [](Random& r, auto N, auto K, auto D, auto& z, auto& c) {
       fill(z, [&] { return static_cast<int>(r() % 7) - 3; });
       fill(c, [&] { return static_cast<int>(r() % 7) - 3; });
       duplicate(r, N, K, D, z, c);
     }},
    {"duplicates",
     [](Random& r, auto N, auto K, auto D, auto& z, auto& c) {
       fill(z, [&] { return normal(r); });
       fill(c, [&] { return normal(r); });
       duplicate(r, N, K, D, z, c);
     }},
    {"one-ulp gaps",
     [](Random& r, auto, auto K, auto D, auto& z, auto& c) {
       fill(z, [&] { return normal(r); });
       fill(c, [&] { return normal(r); });
       for (int64_t k = 1; k < K; ++k)
         for (int64_t d = 0; d < D; ++d) {
           const float x = static_cast<float>(c[d]);
           c[k * D + d] = r() % D ? x : std::nextafter(x, r() % 2 ? INFINITY : -INFINITY);
         }
     }},
    {"scale 1e30",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return 1e30 * normal(r); });
       fill(c, [&] { return 1e30 * normal(r); });
     }},
    {"scale 1e38",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return 1e38 * normal(r); });
       fill(c, [&] { return 1e38 * normal(r); });
     }},
    {"scale 1e-30",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return 1e-30 * normal(r); });
       fill(c, [&] { return 1e-30 * normal(r); });
     }},
    {"z 1e30, c 1e-30",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return 1e30 * normal(r); });
       fill(c, [&] { return 1e-30 * normal(r); });
     }},
    {"z 1e-30, c 1",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return 1e-30 * normal(r); });
       fill(c, [&] { return normal(r); });
     }},
    {"long rows",  // up to a hundred times as long as codewords
     [](Random& r, auto, auto, int64_t D, auto& z, auto& c) {
       int64_t i = 0;
       double scale = 1;
       fill(z, [&] { return (i++ % D ? scale : scale = std::pow(10.0, 2 * uniform(r))) * normal(r); });
       fill(c, [&] { return normal(r); });
     }},
    {"subnormals",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return 1e-41 * normal(r); });
       fill(c, [&] { return 1e-41 * normal(r); });
     }},
    {"fp64 extremes",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return normal(r) * std::pow(10.0, static_cast<int>(r() % 5) * 120 - 300); });
       fill(c, [&] { return normal(r) * std::pow(10.0, static_cast<int>(r() % 5) * 100 - 300); });
     }},
    {"mixed scales",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return normal(r) * std::pow(10.0, 30 * (uniform(r) - 0.5)); });
       fill(c, [&] { return normal(r) * std::pow(10.0, 60 * (uniform(r) - 0.5)); });
     }},
    {"all equal",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return normal(r); });
       fill(c, [&] { return 0.25; });
     }},
    {"all zero",
     [](Random&, auto, auto, auto, auto& z, auto& c) {
       fill(z, [] { return 0; });
       fill(c, [] { return -0.0; });
     }},
    {"not finite",
     [](Random& r, auto N, auto K, auto D, auto& z, auto& c) {
       const double bad[] = {NAN, INFINITY, -INFINITY};
       fill(z, [&] { return normal(r); });
       fill(c, [&] { return normal(r); });
       for (int64_t i = 0; i < N; ++i)
         if (r() % 4 == 0) z[i * D + r() % D] = bad[r() % 3];
       for (int64_t k = 0; k < K; ++k)
         if (r() % 3 == 0) c[k * D + r() % D] = bad[r() % 3];
     }},
    {"no finite codeword",
     [](Random& r, auto, auto, auto, auto& z, auto& c) {
       fill(z, [&] { return normal(r); });
       fill(c, [] { return NAN; });
     }},
};

}  // namespace
