// The memory-bound CPU kernels alone, without torch and without allocating their results, against memcpy and
// against reading alone on the same threads. Bytes are the least a kernel can move: its inputs once, its result once.
//
//   make cpp-bench [THREADS=2]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "vqk/launch.h"
#include "vqk/simd.h"

using namespace vqk;

static int threads = 2;

static void run(int64_t tasks, void (*body)(void*, int64_t), void* ctx) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t t; (t = next++) < tasks;) body(ctx, t);
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (auto& t : pool) t.join();
}

template <class T>
static T* make(int64_t n) {
  const size_t page = 2 << 20, bytes = (n * sizeof(T) + page - 1) / page * page;
  void* p = std::aligned_alloc(page, bytes);
  madvise(p, bytes, MADV_HUGEPAGE);
  return static_cast<T*>(p);
}

static uint32_t state = 1;
static uint32_t draw() { return (state = state * 1664525u + 1013904223u) >> 8; }

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int main(int argc, char** argv) {
  if (argc > 1) threads = std::max(1, std::atoi(argv[1]));
  const Parallel parallel{run, threads};
  const int64_t N = 262144, D = 256, M = N * D, Q = 4, K = 1024, I = 1 << 24;
  float *z = make<float>(M), *q = make<float>(M), *g = make<float>(M), *out = make<float>(M),
        *sums = make<float>(K * D);
  for (int64_t i = 0; i < M; ++i)
    z[i] = draw() * 1e-7f - 0.8f, q[i] = draw() * 1e-7f - 0.8f, g[i] = draw() * 1e-7f, out[i] = 0;
  int64_t *indices = make<int64_t>(I), *codes = make<int64_t>(N * Q), *counts = make<int64_t>(65536), bad;
  for (int64_t i = 0; i < I; ++i) indices[i] = draw() % K;
  for (int64_t i = 0; i < N * Q; ++i) codes[i] = draw() % 256;
  const void* books[Q] = {q, q + 256 * D, q + 512 * D, q + 768 * D};
  const int64_t sizes[Q] = {256, 256, 256, 256};
  const float scale[Q] = {.1f, .1f, .1f, .1f};

  struct Row {
    std::string name;
    double bytes;
    std::function<void()> call;
    double best = 1e9;
  };
  std::vector<Row> rows;
  rows.push_back({"memcpy 256 MiB", 8.0 * M, [&] {
                    float* pair[2] = {z, out};
                    run(
                        64,
                        [](void* p, int64_t t) {
                          float** a = static_cast<float**>(p);
                          const int64_t part = N * D / 64;
                          std::memcpy(a[1] + t * part, a[0] + t * part, part * 4);
                        },
                        pair);
                  }});
  rows.push_back({"read 256 MiB", 4.0 * M, [&] {
                    run(
                        64,
                        [](void* p, int64_t t) {
                          typedef float v8f __attribute__((vector_size(32)));
                          const int64_t part = N * D / 64;
                          const v8f* from = reinterpret_cast<const v8f*>(static_cast<float*>(p) + t * part);
                          v8f sum[8] = {};
                          for (int64_t i = 0; i < part / 8; i += 8)
                            for (int j = 0; j < 8; ++j) sum[j] += from[i + j];
                          for (int i = 1; i < 8; ++i) sum[0] += sum[i];
                          volatile float keep = sum[0][0];
                          (void)keep;
                        },
                        z);
                  }});
  for (const char* level : {"portable", "avx2"}) {
    auto with = [&, level](auto call) {
      return [=] {
        if (!set_simd_level(level)) call();
      };
    };
    const std::string at = std::string(" ") + level;
    for (int64_t d : {32l, 256l})
      for (auto [type, size, name] :
           {std::tuple{DType::f32, 4, "f32"}, {DType::bf16, 2, "bf16"}, {DType::f16, 2, "f16"}})
        rows.push_back({"rotation_trick_backward " + std::to_string(M / d) + "x" + std::to_string(d) + " " + name + at,
                        4.0 * M * size, with([=, &parallel] {
                          cpu::rotation_trick_backward({z, q, g, out, M / d, d, type, Estimator::rotation}, parallel);
                        })});
    for (int64_t d : {32l, 64l, 256l})
      rows.push_back({"codeword_sums " + std::to_string(M / d) + "x" + std::to_string(d) + " K=1024" + at,
                      4.0 * M + 8.0 * M / d, with([=, &parallel, &bad] {
                        cpu::codeword_sums({z, indices, sums, counts, &bad, 1, M / d, K, d, DType::f32}, parallel);
                      })});
    for (bool per_level : {false, true})
      rows.push_back({std::string("residual_quantize_backward Q=4 ") + (per_level ? "per level" : "sum") + at,
                      12.0 * M + 8.0 * N * Q, with([=, &parallel, &books, &sizes, &scale] {
                        cpu::residual_quantize_backward({z, books, sizes, codes, g, scale, out, 1, N, Q, D, DType::f32,
                                                         Estimator::rotation, per_level},
                                                        parallel);
                      })});
  }
  for (int64_t k : {1024l, 65536l})
    rows.push_back({"codebook_usage 16M K=" + std::to_string(k), 8.0 * I,
                    [=, &parallel, &bad] { cpu::codebook_usage({indices, counts, &bad, 1, I, k}, parallel); }});

  for (int repeat = 0; repeat < 5; ++repeat)
    for (Row& row : rows) {
      const double start = seconds();
      row.call();
      row.best = std::min(row.best, seconds() - start);
    }
  const double copy = rows[0].bytes / rows[0].best, read = rows[1].bytes / rows[1].best;
  std::printf("%-58s %9s %7s %9s %9s\n", (std::to_string(threads) + " threads").c_str(), "ms", "GB/s", "% of copy",
              "% of read");
  for (const Row& row : rows) {
    const double speed = row.bytes / row.best;
    std::printf("%-58s %9.1f %7.1f %8.0f%% %8.0f%%\n", row.name.c_str(), row.best * 1e3, speed / 1e9, 100 * speed / copy,
                100 * speed / read);
  }
}
