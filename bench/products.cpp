// What one core multiplies, by kind of product, in 512-bit registers: what the search's coarse pass chooses from.
//
//   floats    vfmadd231ps   1 product a 32-bit lane        words     vpdpwssd    2 of 16-bit integers
//   bfloat16  vdpbf16ps     2, summed as floats            bytes     vpdpbusd    4
//
// From registers alone, and in the search's register tile: 12 rows x 32 codewords, a block of 256 KiB of codewords from L2,
// 192 rows one tile after the other. Nothing but products: no scores, minima or filter.
//
//   make products        x86-64 with AVX-512; what the processor does not have is left out
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f")

namespace {

enum class Kind { floats, words, bfloat16, bytes };
constexpr int kRows = 12, kTiles = 16, kLanes = 16;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// sum + the products of x and c. In assembly: the assembler has to know them, not the compiler.
template <Kind kind>
inline __attribute__((always_inline)) __m512i multiply(__m512i x, __m512i c, __m512i sum) {
  if constexpr (kind == Kind::floats) asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
  if constexpr (kind == Kind::words) asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
  if constexpr (kind == Kind::bfloat16) asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
  if constexpr (kind == Kind::bytes) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
  return sum;
}

// z [kRows][steps], panel [steps][2][kLanes] of 32 bits.
template <Kind kind>
__attribute__((noinline)) void multiply_tile(const int32_t* z, const int32_t* panel, int64_t steps) {
  __m512i lo[kRows], hi[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) lo[r] = hi[r] = _mm512_setzero_si512();
  for (int64_t d = 0; d < steps; ++d, panel += 2 * kLanes) {
    const __m512i c0 = _mm512_loadu_si512(panel), c1 = _mm512_loadu_si512(panel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = _mm512_set1_epi32(z[r * steps + d]);
      lo[r] = multiply<kind>(x, c0, lo[r]);
      hi[r] = multiply<kind>(x, c1, hi[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) asm volatile("" : : "v"(lo[r]), "v"(hi[r]));
}

// Instructions a second without any memory.
template <Kind kind>
__attribute__((noinline)) double rate_in_registers() {
  constexpr int64_t kRounds = 1 << 20;
  double best = 1e9;
  for (int repeat = 0; repeat < 50; ++repeat) {
    __m512i sum[24];
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) sum[i] = _mm512_setzero_si512();
    const double start = seconds();
    for (int64_t i = 0; i < kRounds; ++i) {
      __m512i x = _mm512_setzero_si512();
      asm("" : "+v"(x));
#pragma GCC unroll 24
      for (int j = 0; j < 24; ++j) sum[j] = multiply<kind>(x, x, sum[j]);
    }
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) asm volatile("" : : "v"(sum[i]));
    best = std::min(best, seconds() - start);
  }
  return 24.0 * kRounds / best;
}

template <Kind kind>
double rate_in_tiles(int64_t features, int products) {
  const int64_t steps = features / products, panels = (256 << 10) / (steps * 2 * kLanes * 4);
  std::vector<int32_t> z(kTiles * kRows * steps), c(panels * steps * 2 * kLanes);
  uint32_t state = 1;
  for (auto* values : {&z, &c})
    for (int32_t& x : *values) x = static_cast<int32_t>(((state = state * 1664525u + 1013904223u) & 0x9fff9fffu) | 0x20002000u);  // normal, as float and bfloat16
  double best = 1e9;
  for (int repeat = 0; repeat < 60; ++repeat) {
    const double start = seconds();
    for (int round = 0; round < 4; ++round)
      for (int t = 0; t < kTiles; ++t)
        for (int64_t p = 0; p < panels; ++p)
          multiply_tile<kind>(z.data() + t * kRows * steps, c.data() + p * steps * 2 * kLanes, steps);
    best = std::min(best, seconds() - start);
  }
  return 4.0 * kTiles * panels * kRows * 2 * steps / best;
}

constexpr int64_t kFeatures[] = {32, 64, 256, 768};

template <Kind kind>
void report(const char* name, const char* flag, int products, double floats) {
  if (std::system((std::string("grep -qsw ") + flag + " /proc/cpuinfo").c_str()) != 0)
    return (void)std::printf("%-9s not on this processor\n", name);
  const double lane = 2.0 * kLanes * products * 1e-9;  // GFLOP an instruction
  const double alone = rate_in_registers<kind>() * lane;
  std::printf("%-9s %7.1f  %3.0f %%", name, alone, 100 * alone / floats);
  for (int64_t features : kFeatures) {
    const double rate = rate_in_tiles<kind>(features, products) * lane;
    std::printf("   %7.1f  %3.0f %%", rate, 100 * rate / floats);
  }
  std::printf("\n");
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512f")) return std::fprintf(stderr, "this processor has no AVX-512\n"), 1;
  const double floats = rate_in_registers<Kind::floats>() * 2 * kLanes * 1e-9;
  std::printf("GFLOP/s of one core (2 for a product and its sum), and per cent of float32 from registers\n%-9s %14s", "",
              "registers");
  for (int64_t features : kFeatures) std::printf("   %3lld features  ", static_cast<long long>(features));
  std::printf("\n");
  report<Kind::floats>("floats", "avx512f", 1, floats);
  report<Kind::words>("words", "avx512_vnni", 2, floats);
  report<Kind::bfloat16>("bfloat16", "avx512_bf16", 2, floats);
  report<Kind::bytes>("bytes", "avx512_vnni", 4, floats);
}
#else
int main() { return std::fprintf(stderr, "x86-64 only\n"), 1; }
#endif
