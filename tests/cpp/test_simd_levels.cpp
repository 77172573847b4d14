// Every SIMD level that this processor runs gives the same bits, for a million rows with ties and duplicated codewords.
//
//   g++ -O3 -std=c++20 -ffp-contract=off -I csrc/include tests/cpp/test_simd_levels.cpp csrc/cpu/*.cpp -o test_simd_levels
//
// tests/cpp/avx512_in_bochs.sh runs it on an emulated AVX-512 processor, for machines that have none; there the program is
// the init process, so it powers the machine off instead of returning.
#include <termios.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "vqk/launch.h"
#include "vqk/simd.h"

#ifdef __linux__
#include <sys/reboot.h>
#endif

using namespace vqk;

namespace {

uint64_t state = 88172645463325252u;
float uniform() {  // xorshift: the same numbers everywhere
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<float>(state >> 40) * 0x1p-23f - 1.0f;
}

void run_here(int64_t tasks, void (*body)(void*, int64_t), void* ctx) {
  for (int64_t t = 0; t < tasks; ++t) body(ctx, t);
}
const Parallel here{run_here, 1};

struct Case {
  const char* name;
  int64_t N, K, D;
  DType dtype;
  Metric metric;
};

struct Answer {
  std::vector<int64_t> indices, levels;
  std::vector<float> distances, quantized;
  bool operator==(const Answer& o) const {
    return indices == o.indices && levels == o.levels && !std::memcmp(distances.data(), o.distances.data(), distances.size() * 4) &&
           !std::memcmp(quantized.data(), o.quantized.data(), quantized.size() * 4);
  }
};

Answer compute(const Case& c, const std::vector<float>& z, const std::vector<float>& codebook) {
  Answer a;
  a.indices.resize(c.N), a.distances.resize(c.N);
  cpu::nearest_codeword({z.data(), codebook.data(), nullptr, a.indices.data(), a.distances.data(), 1, c.N, c.K, c.D, c.dtype, c.metric, true}, here);
  const int64_t rows = c.N / 16, K[2] = {c.K, c.K};
  const void* books[2] = {codebook.data(), codebook.data()};
  float losses[2];
  int64_t valid;
  a.levels.resize(rows * 2), a.quantized.resize(rows * c.D);
  cpu::residual_quantize({z.data(), books, K, nullptr, a.levels.data(), a.quantized.data(), losses, &valid, 1, rows, 2, c.D, c.dtype, c.metric}, here);
  return a;
}

// Half the rows and two thirds of the codewords lie on a coarse grid, so exact ties abound; the last codewords repeat earlier ones.
int run() {
  const int64_t million = std::getenv("VQK_ROWS") ? std::atoll(std::getenv("VQK_ROWS")) : 1000000;
  const Case cases[] = {{"rows x96x8 l2", million, 96, 8, DType::f32, Metric::l2},
                        {"6000x1000x33 l2", 6000, 1000, 33, DType::f32, Metric::l2},
                        {"6000x200x64 dot", 6000, 200, 64, DType::f32, Metric::dot},
                        {"3000x130x600 l2", 3000, 130, 600, DType::f32, Metric::l2},
                        {"6000x300x4 l2", 6000, 300, 4, DType::f32, Metric::l2},
                        {"6000x130x17 cosine", 6000, 130, 17, DType::f32, Metric::cosine}};
  const char* names[] = {"portable", "avx2", "avxvnni", "avx512", "vnni", "amx"};
  int failures = 0, levels = 0;
  std::printf("%lld rows in the first case\n", static_cast<long long>(million));
  for (const Case& c : cases) {
    std::vector<float> z(c.N * c.D), codebook(c.K * c.D);
    for (int64_t n = 0; n < c.N; ++n)
      for (int64_t d = 0; d < c.D; ++d) z[n * c.D + d] = n % 2 ? uniform() : static_cast<float>(static_cast<int>(uniform() * 2.5f));
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t d = 0; d < c.D; ++d) codebook[k * c.D + d] = k % 3 ? static_cast<float>(static_cast<int>(uniform() * 2.5f)) : uniform();
    std::memcpy(&codebook[(c.K - 20) * c.D], &codebook[7 * c.D], 20 * c.D * sizeof(float));
    Answer first;
    for (const char* name : names) {
      if (const char* why = set_simd_level(name)) {
        std::printf("%-18s %-8s not run: %s\n", c.name, name, why);
        continue;
      }
      Answer a = compute(c, z, codebook);
      if (name == names[0]) first = a;
      const bool same = a == first;
      failures += !same, ++levels;
      std::printf("%-18s %-8s %s\n", c.name, name, same ? "same bits" : "DIFFERENT");
      std::fflush(stdout);
    }
  }
  std::printf("%d comparisons, %d different\n", levels, failures);
  return failures != 0;
}

}  // namespace

int main() {
  const int status = run();
  std::printf("finished with status %d\n", status);
  std::fflush(stdout);
#ifdef __linux__
  if (getpid() == 1) tcdrain(1), sleep(2), reboot(RB_POWER_OFF);  // the console may still be busy
#endif
  return status;
}
