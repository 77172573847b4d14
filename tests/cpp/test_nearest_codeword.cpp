// The CPU search against a naive scalar oracle: zero differences in index and distance bits, at every
// SIMD level and thread count, on the data that breaks approximate searches. No torch.
//
//   tests/cpp/run                 builds this with g++ in seconds and runs the checks
//   tests/cpp/run sanitize        the same under ASan and UBSan
//   tests/cpp/run decisions 100000000     with other data, until so many rows were compared
//   [VQK_SIMD=level] tests/cpp/run bench [N K D]    timings at the shapes of docs/numerics.md
//
// Built with VQK_EMULATE_AVX512 the AVX-512 source runs as 64-byte vectors lowered to AVX2, with VQK_EMULATE_AVXVNNI the
// AVX-VNNI source with AVX-512's spelling of two instructions, with VQK_EMULATE_AMX the AMX source on tiles in memory.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "levels.h"
#include "search_oracle.h"
#include "vqk/error_bound.h"
#include "vqk/launch.h"
#include "vqk/simd.h"

namespace vqk {
static Simd level = Simd::portable;
Simd simd_level() { return level; }  // instead of simd.cpp: the test picks freely
}  // namespace vqk

using namespace vqk;
#ifdef VQK_COUNT
long long vqk_compared, vqk_scored;
#endif

namespace {

int threads = 1;

void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  if (threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) body(context, i);
    return;
  }
  std::atomic<int64_t> next = 0;
  auto work = [&] {
    for (int64_t i; (i = next++) < tasks;) body(context, i);
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(work);
  work();
  for (auto& t : pool) t.join();
}

Parallel parallel() { return {run_tasks, threads}; }

// ---------------------------------------------------------------- checks

int64_t checks = 0, failures = 0;

void fail(const std::string& text) {
  if (++failures <= 20) std::printf("FAIL %s\n", text.c_str());
}

bool same_bits(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b);
}

double rounded(DType dtype, double x) { return dtype == DType::f64 ? x : static_cast<double>(static_cast<float>(x)); }

std::string describe(const char* data, DType dtype, Metric metric, int64_t H, int64_t N, int64_t K, int64_t D) {
  char text[200];
  std::snprintf(text, sizeof text, "%s %s %s H%lld N%lld K%lld D%lld %s threads %d", data, name(dtype), name(metric),
                (long long)H, (long long)N, (long long)K, (long long)D,
                level_name(level), threads);
  return text;
}

struct Problem {
  Problem(Random& random, const Draw& draw, DType dtype, int64_t H, int64_t N, int64_t K, int64_t D, bool masked)
      : H(H), N(N), K(K), D(D), z(dtype, {}), c(dtype, {}), mask(H * N, 1) {
    std::vector<double> zs, cs;
    for (int64_t h = 0; h < H; ++h) {
      std::vector<double> zh(N * D), ch(K * D);
      draw(random, N, K, D, zh, ch);
      zs.insert(zs.end(), zh.begin(), zh.end());
      cs.insert(cs.end(), ch.begin(), ch.end());
    }
    z = Array(dtype, zs);
    c = Array(dtype, cs);
    if (masked)
      for (char& m : mask) m = random() % 3 != 0;
  }
  int64_t H, N, K, D;
  Array z, c;
  std::vector<char> mask;
};

void check_nearest(Random& random, const char* data, const Draw& draw, DType dtype, Metric metric, int64_t H, int64_t N,
                   int64_t K, int64_t D, bool masked) {
  Problem p(random, draw, dtype, H, N, K, D, masked);
  std::vector<Answer> expected;
  for (int64_t h = 0; h < H; ++h) {
    std::vector<std::vector<double>> codebook;
    for (int64_t k = 0; k < K; ++k) codebook.push_back(row_of(p.c, h * K + k, D, metric == Metric::cosine));
    for (int64_t i = 0; i < N; ++i)
      expected.push_back(p.mask[h * N + i]
                             ? nearest(row_of(p.z, h * N + i, D, metric == Metric::cosine), codebook, metric)
                             : Answer{-1, 0.0});
  }
  for (Simd simd : levels())
    for (int t : {1, 2}) {
      level = simd;
      threads = t;
      std::vector<int64_t> indices(H * N, 12345);
      Array distances(dtype == DType::f64 ? DType::f64 : DType::f32, std::vector<double>(H * N, 1e9));
      cpu::nearest_codeword({.z = p.z.data(),
                             .codebook = p.c.data(),
                             .mask = masked ? reinterpret_cast<const bool*>(p.mask.data()) : nullptr,
                             .indices = indices.data(),
                             .distances = distances.data(),
                             .H = H,
                             .N = N,
                             .K = K,
                             .D = D,
                             .dtype = dtype,
                             .metric = metric,
                             .certified = true},
                            parallel());
      for (int64_t i = 0; i < H * N; ++i) {
        ++checks;
        if (indices[i] == expected[i].index && same_bits(distances[i], rounded(dtype, expected[i].value))) continue;
        char text[160];
        std::snprintf(text, sizeof text, ": row %lld is %lld at %.17g, must be %lld at %.17g", (long long)i,
                      (long long)indices[i], distances[i], (long long)expected[i].index,
                      rounded(dtype, expected[i].value));
        fail(describe(data, dtype, metric, H, N, K, D) + text);
        break;
      }
    }
}

void check_residual(Random& random, const char* data, const Draw& draw, DType dtype, Metric metric, int64_t H,
                    int64_t N, const std::vector<int64_t>& sizes, int64_t D, bool masked) {
  const int64_t Q = static_cast<int64_t>(sizes.size());
  std::vector<Problem> levels_data;
  for (int64_t K : sizes) levels_data.emplace_back(random, draw, dtype, H, N, K, D, masked);
  Problem& first = levels_data[0];
  const DType out = dtype == DType::f64 ? DType::f64 : DType::f32;
  std::vector<int64_t> expected(H * N * Q, -1);
  std::vector<double> quantized(H * N * D, NAN), losses(Q, 0.0);
  int64_t valid = 0;
  for (int64_t row = 0; row < H * N; ++row) {
    if (!first.mask[row]) {
      std::fill_n(quantized.begin() + row * D, D, 0.0);
      continue;
    }
    std::vector<double> r = row_of(first.z, row, D, false), q(D), squares(Q);
    std::vector<int64_t> index(Q);
    bool good = true;
    for (int64_t l = 0; l < Q && good; ++l) {
      Array residual(out, r);
      std::vector<std::vector<double>> codebook;
      for (int64_t k = 0; k < sizes[l]; ++k)
        codebook.push_back(row_of(levels_data[l].c, row / N * sizes[l] + k, D, metric == Metric::cosine));
      index[l] = nearest(row_of(residual, 0, D, metric == Metric::cosine), codebook, metric).index;
      good = index[l] >= 0;
      if (!good) break;
      const std::vector<double> c = row_of(levels_data[l].c, row / N * sizes[l] + index[l], D, false);
      for (int64_t d = 0; d < D; ++d) {
        squares[l] += (r[d] - c[d]) * (r[d] - c[d]);
        r[d] = rounded(out, r[d] - c[d]);
        q[d] = l ? rounded(out, q[d] + c[d]) : c[d];
      }
    }
    if (!good || !finite(r)) continue;
    ++valid;
    std::copy(index.begin(), index.end(), expected.begin() + row * Q);
    std::copy(q.begin(), q.end(), quantized.begin() + row * D);
    for (int64_t l = 0; l < Q; ++l) losses[l] += squares[l];
  }
  std::vector<double> first_losses;
  for (Simd simd : levels())
    for (int t : {1, 2}) {
      level = simd;
      threads = t;
      std::vector<const void*> codebooks;
      for (Problem& p : levels_data) codebooks.push_back(p.c.data());
      std::vector<int64_t> indices(H * N * Q, 12345);
      Array got(dtype, std::vector<double>(H * N * D, 7)), got_losses(out, std::vector<double>(Q, 7));
      int64_t got_valid = -5;
      cpu::residual_quantize({.z = first.z.data(),
                              .codebooks = codebooks.data(),
                              .K = sizes.data(),
                              .mask = masked ? reinterpret_cast<const bool*>(first.mask.data()) : nullptr,
                              .indices = indices.data(),
                              .quantized = got.data(),
                              .losses = got_losses.data(),
                              .valid = &got_valid,
                              .H = H,
                              .N = N,
                              .Q = Q,
                              .D = D,
                              .dtype = dtype,
                              .metric = metric},
                             parallel());
      const std::string where = describe(data, dtype, metric, H, N, sizes[0], D) + " residual";
      checks += H * N;
      if (indices != expected) fail(where + ": indices differ");
      if (got_valid != valid) fail(where + ": valid rows differ");
      for (int64_t i = 0; i < H * N * D; ++i) {
        // 16-bit outputs: within one rounding of the dtype, as the encoder here truncates
        const double e = quantized[i], unit = dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
        const bool same = bytes_of(dtype) > 2 ? same_bits(got[i], e)
                                              : (std::isnan(e) && std::isnan(got[i])) || got[i] == e ||
                                                    std::fabs(got[i] - e) <= std::max(unit * std::fabs(e), 0x1p-25);
        if (same) continue;
        fail(where + ": quantized differs: " + std::to_string(got[i]) + " for " + std::to_string(e));
        break;
      }
      std::vector<double> now;
      for (int64_t l = 0; l < Q; ++l) now.push_back(got_losses[l]);
      if (first_losses.empty()) first_losses = now;
      for (int64_t l = 0; l < Q; ++l) {
        const double e = valid ? losses[l] / (static_cast<double>(valid) * D) : 0.0;
        if (!same_bits(now[l], first_losses[l])) fail(where + ": losses depend on threads or SIMD level");
        if (rounded(out, e) != now[l] && !(std::fabs(now[l] - e) <= 1e-6 * e)) fail(where + ": losses differ");
      }
    }
}

int check() {
  const DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
  const Metric metrics[] = {Metric::l2, Metric::cosine, Metric::dot};
  Random random(20260101);
  const int64_t ragged[] = {1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 15, 16, 17, 31, 33, 63, 65, 97, 129, 257};
  auto pick = [&] { return ragged[random() % std::size(ragged)]; };
  for (const auto& [data, draw] : kData) {
    const int64_t before = failures, checked = checks;
    for (DType dtype : dtypes)
      for (Metric metric : metrics) {
        check_nearest(random, data, draw, dtype, metric, 1, 200, 300, 16, false);
        check_nearest(random, data, draw, dtype, metric, 2, 57, 129, 33, true);
        for (int i = 0; i < 6; ++i)
          check_nearest(random, data, draw, dtype, metric, 1 + random() % 2, pick(), pick(), pick(), random() % 2);
        check_residual(random, data, draw, dtype, metric, 2, 61, {33, 64, 17}, 12, true);
        check_residual(random, data, draw, dtype, metric, 1, pick(), {pick(), pick()}, pick(), random() % 2);
      }
    std::printf("%-20s %9lld rows  %s\n", data, (long long)(checks - checked), failures == before ? "ok" : "FAILED");
  }
  // Sizes that reach every code path: several codebook blocks, every group size, long rows.
  const int64_t before = failures, checked = checks;
  const Draw gaussian = kData[0].second, duplicates = kData[6].second;
  for (int64_t K : {1024, 5000, 20000})
    check_nearest(random, "many codewords", gaussian, DType::f32, Metric::l2, 1, 101, K, 4, false);
  check_nearest(random, "many codewords", duplicates, DType::f32, Metric::l2, 1, 101, 20000, 3, false);
  // What bytes and words do differently: 1 to 4 steps of features, lanes of 4, 8 and 16 codewords, two of these to a vector, blocks.
  constexpr int64_t kGroups[][2] = {{300, 2}, {9000, 3}, {2000, 5}, {600, 7}, {9000, 8}, {3000, 11}, {20000, 12}, {1200, 14}, {20000, 33}, {9000, 100}, {1500, 130}, {1500, 520}};
  for (const auto& [K, D] : kGroups)
    for (const Draw& draw : {gaussian, duplicates})
      check_nearest(random, "groups", draw, DType::f32, D % 2 ? Metric::l2 : Metric::dot, 1, 101, K, D, false);
  check_nearest(random, "groups", gaussian, DType::f32, Metric::l2, 1, 101, 16500, 8, false);
  // Codewords 16 apart are twins: bytes cannot tell which one is nearer.
  const Draw twins = [](Random& r, auto, auto K, auto D, auto& z, auto& c) {
    for (double& x : z) x = normal(r);
    for (int64_t i = 0; i < K * D; ++i) c[i] = i / D / 16 % 2 ? c[i - 16 * D] + 1e-4 * normal(r) : normal(r);
  };
  for (int64_t D : {40, 130, 520}) check_nearest(random, "twins", twins, DType::f32, Metric::l2, 1, 101, 160, D, false);
  check_nearest(random, "every codeword", gaussian, DType::f32, Metric::l2, 1, 10000, 2100, 8, false);
  check_nearest(random, "long rows", gaussian, DType::f32, Metric::l2, 1, 50, 300, 1500, false);
  check_nearest(random, "many rows", duplicates, DType::f32, Metric::l2, 3, 5000, 40, 9, true);
  check_nearest(random, "no rows", gaussian, DType::f32, Metric::l2, 1, 0, 40, 9, false);
  check_residual(random, "many rows", gaussian, DType::f32, Metric::l2, 1, 3000, {64, 64, 64, 64}, 8, false);
  std::printf("%-20s %9lld rows  %s\n", "large sizes", (long long)(checks - checked),
              failures == before ? "ok" : "FAILED");
  std::printf("%lld rows compared, %lld failures\n", (long long)checks, (long long)failures);
  return failures ? 1 : 0;
}

// Many rows of every kind against codebooks of ordinary size, until so many were compared.
int decide(int64_t wanted) {
  Random random(20260102);
  std::map<std::string, int64_t> rows;
  while (checks < wanted && !failures)
    for (const auto& [data, draw] : kData)
      for (Metric metric : {Metric::l2, Metric::cosine, Metric::dot}) {
        const bool wide = random() % 16 == 0;  // more features than AMX takes at once
        const int64_t before = checks, K = 32 + random() % 200, D = wide ? 65 + random() % 600 : 2 + random() % 30;
        const DType dtype = std::array{DType::f32, DType::f32, DType::f64, DType::bf16, DType::f16}[random() % 5];
        check_nearest(random, data, draw, dtype, metric, 1, wide ? 1000 : 10000, K, D, false);
        rows[data] += checks - before;
      }
  for (const auto& [data, count] : rows) std::printf("%-20s %11lld rows\n", data.c_str(), (long long)count);
  std::printf("%lld rows compared at %zu SIMD levels with 1 and 2 threads, %lld failures\n", (long long)checks,
              levels().size(), (long long)failures);
  return failures ? 1 : 0;
}

// ---------------------------------------------------------------- bench

// One thread is timed by its CPU time, which other programs on the machine disturb less; two by the clock.
double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }
double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double best_of(const std::function<double()>& clock, const std::function<void()>& body) {
  double best = 1e9, spent = 0;
  for (int i = 0; i < 1000 && (i < 3 || spent < 1.0); ++i) {
    const double start = clock();
    body();
    const double took = clock() - start;
    best = std::min(best, took);
    spent += took;
  }
  return best;
}

// GFLOP/s of 12 independent multiply-adds, the roof of a level; 0 for portable code.
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void multiply_adds() {
  typedef float Vec __attribute__((vector_size(32)));
  Vec a[12] = {}, x = Vec{} + 0.9f;
  for (int round = 0; round < 4000000; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) __asm__ volatile("vfmadd132ps %1, %1, %0" : "+x"(a[i]) : "x"(x));
}
__attribute__((target("avx512f"))) void multiply_adds_512() {
  typedef float Vec __attribute__((vector_size(64)));
  Vec a[12] = {}, x = Vec{} + 0.9f;
  for (int round = 0; round < 4000000; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) __asm__ volatile("vfmadd132ps %1, %1, %0" : "+v"(a[i]) : "v"(x));
}
double peak() {
  if (level == Simd::portable) return 0;
  const bool wide = level >= Simd::avx512;
  return 4e6 * 12 * (wide ? 32 : 16) / best_of(cpu_seconds, wide ? multiply_adds_512 : multiply_adds) * 1e-9;
}
#else
double peak() { return 0; }
#endif

void report(const char* what, int64_t N, int64_t K, int64_t D, double flops, double roof,
            const std::function<void()>& body) {
  threads = 1;
  const double one = best_of(cpu_seconds, body);
  threads = 2;
  const double two = best_of(seconds, body);
  std::printf(
      "%-8s N %6lld  K %6lld  D %4lld   1 thread %9.3f ms  %6.1f GFLOP/s  %5.1f %% of peak   2 threads %9.3f ms\n",
      what, (long long)N, (long long)K, (long long)D, one * 1e3, flops / one * 1e-9,
      roof > 0 ? 100 * flops / one * 1e-9 / roof : 0.0, two * 1e3);
  std::fflush(stdout);
}

void bench(int argc, char** argv) {
  level = levels().back();
  if (const char* wanted = std::getenv("VQK_SIMD"))
    for (Simd simd : levels())
      if (!std::strcmp(wanted, level_name(simd))) level = simd;
  const double roof = peak();
  std::printf("%s, fp32 multiply-add peak of one core: %.1f GFLOP/s\n", level_name(level), roof);
  struct Shape {
    int64_t N, K, D;
  };
  std::vector<Shape> shapes = {{65536, 256, 32},  {65536, 1024, 64}, {8192, 8192, 64}, {4096, 8192, 256},
                               {16384, 16384, 8}, {4096, 1024, 768}, {1, 8192, 256},   {16, 8192, 256}};
  if (argc > 4) shapes = {{std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4])}};
  Random random(1);
  auto gaussian = [&](int64_t count) {
    std::vector<float> x(count);
    for (float& v : x) v = static_cast<float>(normal(random));
    return x;
  };
  for (const Shape& s : shapes) {
    std::vector<float> z = gaussian(s.N * s.D), c = gaussian(s.K * s.D), distances(s.N);
    std::vector<int64_t> indices(s.N);
    report("nearest", s.N, s.K, s.D, 2.0 * s.N * s.K * s.D, roof, [&] {
      cpu::nearest_codeword({.z = z.data(),
                             .codebook = c.data(),
                             .mask = nullptr,
                             .indices = indices.data(),
                             .distances = distances.data(),
                             .H = 1,
                             .N = s.N,
                             .K = s.K,
                             .D = s.D,
                             .dtype = DType::f32,
                             .metric = Metric::l2,
                             .certified = true},
                            parallel());
    });
  }
  if (argc > 4) return;
  const int64_t N = 65536, K = 256, D = 32, Q = 4;
  std::vector<float> z = gaussian(N * D), c = gaussian(Q * K * D), quantized(N * D), losses(Q);
  std::vector<int64_t> indices(N * Q), sizes(Q, K);
  std::vector<const void*> codebooks;
  for (int64_t l = 0; l < Q; ++l) codebooks.push_back(c.data() + l * K * D);
  int64_t valid = 0;
  report("residual", N, K, D, 2.0 * Q * N * K * D, roof, [&] {
    cpu::residual_quantize({.z = z.data(),
                            .codebooks = codebooks.data(),
                            .K = sizes.data(),
                            .mask = nullptr,
                            .indices = indices.data(),
                            .quantized = quantized.data(),
                            .losses = losses.data(),
                            .valid = &valid,
                            .H = 1,
                            .N = N,
                            .Q = Q,
                            .D = D,
                            .dtype = DType::f32,
                            .metric = Metric::l2},
                           parallel());
  });
}

// ---------------------------------------------------------------- survivors

// Files of int64 N, K, D, then float rows and codewords (bench/survivors.py writes them).
int survivors([[maybe_unused]] int count, [[maybe_unused]] char** files) {
#ifdef VQK_COUNT
  std::printf("%-18s %-8s compared in float64, scored in float32 after bytes: a row\n", "", "");
  for (int f = 0; f < count; ++f) {
    int64_t size[3];  // N, K, D
    std::FILE* file = std::fopen(files[f], "rb");
    if (!file || std::fread(size, 8, 3, file) != 3) return std::fprintf(stderr, "%s: no header\n", files[f]), 1;
    const auto [N, K, D] = size;
    std::vector<float> z(N * D), c(K * D);
    const bool whole = std::fread(z.data(), 4, z.size(), file) == z.size() &&
                       std::fread(c.data(), 4, c.size(), file) == c.size();
    std::fclose(file);
    if (!whole) return std::fprintf(stderr, "%s is cut short\n", files[f]), 1;
    std::vector<float> distances(N);
    std::vector<int64_t> indices(N);
    for (Simd simd : levels()) {
      level = simd;
      vqk_compared = vqk_scored = 0;
      cpu::nearest_codeword({.z = z.data(),
                             .codebook = c.data(),
                             .mask = nullptr,
                             .indices = indices.data(),
                             .distances = distances.data(),
                             .H = 1,
                             .N = N,
                             .K = K,
                             .D = D,
                             .dtype = DType::f32,
                             .metric = Metric::l2,
                             .certified = true},
                            parallel());
      const char* name = std::strrchr(files[f], '/');
      std::printf("%-18s %-8s %8.3f %8.3f\n", name ? name + 1 : files[f], level_name(simd),
                  static_cast<double>(vqk_compared) / N, static_cast<double>(vqk_scored) / N);
    }
  }
  return 0;
#else
  return std::fprintf(stderr, "built without VQK_COUNT\n"), 1;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "bench")) return bench(argc, argv), 0;
  if (argc > 2 && !std::strcmp(argv[1], "decisions")) return decide(std::atoll(argv[2]));
  if (argc > 1 && !std::strcmp(argv[1], "survivors")) return survivors(argc - 2, argv + 2);
  return check();
}
