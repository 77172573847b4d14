// What one core multiplies, by kind of product: what the search's coarse pass chooses from. In 512-bit registers:
//
//   floats    vfmadd231ps   1 product a 32-bit lane        words     vpdpwssd    2 of 16-bit integers
//   bfloat16  vdpbf16ps     2, summed as floats            bytes     vpdpbusd    4
//   float16   vfmadd231ph   2, summed as float16
//
// and in AMX's tiles, "amx bf16" (tdpbf16ps) and "amx bytes" (tdpbusd).
//
// From registers alone, and in the search's register tile: 12 rows x 32 codewords (AMX: 32 x 32), a block of 256 KiB of codewords
// from L2, 192 rows one tile after the other. Nothing but products: no scores, minima or filter.
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
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC target("avx512f")

namespace {

enum class Kind { floats, words, bfloat16, float16, bytes };
constexpr int kRows = 12, kTiles = 16, kLanes = 16;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Ordinary numbers as floats and as halves of either kind: subnormal ones would be multiplied slowly.
uint32_t random_bits(uint32_t& state) { return ((state = state * 1664525u + 1013904223u) & 0x9fff9fffu) | 0x20002000u; }

// sum + the products of x and c. In assembly: the assembler has to know them, not the compiler.
template <Kind kind>
inline __attribute__((always_inline)) __m512i multiply(__m512i x, __m512i c, __m512i sum) {
  if constexpr (kind == Kind::floats) asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
  if constexpr (kind == Kind::words) asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
  if constexpr (kind == Kind::bfloat16) asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
  if constexpr (kind == Kind::float16) asm("vfmadd231ph %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
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
    for (int32_t& x : *values) x = static_cast<int32_t>(random_bits(state));
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

bool on_this_processor(const char* flag) {
  return std::system((std::string("grep -qsw ") + flag + " /proc/cpuinfo").c_str()) == 0;
}

template <Kind kind>
void report(const char* name, const char* flag, int products, double floats) {
  if (!on_this_processor(flag))
    return (void)std::printf("%-9s not on this processor\n", name);
  const double lane = 2.0 * kLanes * products * 1e-9;  // GFLOP an instruction
  const double alone = rate_in_registers<kind>() * lane;
  std::printf("%-9s %7.1f %4.0f %%", name, alone, 100 * alone / floats);
  for (int64_t features : kFeatures) {
    const double rate = rate_in_tiles<kind>(features, products) * lane;
    std::printf("   %7.1f %4.0f %%", rate, 100 * rate / floats);
  }
  std::printf("\n");
}

// ---------------------------------------------------------------- AMX

struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

template <int Sum, int Rows, int Codewords, bool Bytes>
inline __attribute__((always_inline)) void multiply_tiles() {
  if constexpr (Bytes) asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Rows), "i"(Codewords));
  else asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Rows), "i"(Codewords));
}
template <int T>
inline __attribute__((always_inline)) void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
inline __attribute__((always_inline)) void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

constexpr double kTileFlop = 2.0 * 16 * 16 * 64 * 1e-9;  // GFLOP an instruction, in bytes

template <bool Bytes>
__attribute__((noinline)) double tile_rate(int64_t features) {  // 0: from tiles alone
  const int64_t row = features * (Bytes ? 1 : 2) + 63, parts = row / 64, panels = features ? (256 << 10) / (parts * 2048) : 1;
  std::vector<int32_t> z(192 * 16 * (parts + 1)), c(panels * (parts + 1) * 512);
  uint32_t state = 1;
  for (auto* values : {&z, &c})
    for (int32_t& x : *values) x = static_cast<int32_t>(random_bits(state));
  double best = 1e9;
  int64_t products = 0;
  for (int repeat = 0; repeat < 60; ++repeat) {
    products = 0;
    const double start = seconds();
    if (!features)
      for (; products < 1 << 16; products += 4) {
        multiply_tiles<0, 4, 6, Bytes>(), multiply_tiles<1, 4, 7, Bytes>();
        multiply_tiles<2, 5, 6, Bytes>(), multiply_tiles<3, 5, 7, Bytes>();
      }
    else
      for (int round = 0; round < 4; ++round)
        for (int t = 0; t < 6; ++t)
          for (int64_t p = 0; p < panels; ++p) {
            zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
            for (int64_t i = 0; i < parts; ++i, products += 4) {
              const int32_t *rows = z.data() + (2 * t * parts + i) * 256, *panel = c.data() + (p * parts + i) * 512;
              load_tile<4>(rows, 64), load_tile<6>(panel, 128), multiply_tiles<0, 4, 6, Bytes>();
              load_tile<7>(panel + 16, 128), multiply_tiles<1, 4, 7, Bytes>();
              load_tile<5>(rows + parts * 256, 64), multiply_tiles<2, 5, 6, Bytes>();
              multiply_tiles<3, 5, 7, Bytes>();
            }
          }
    best = std::min(best, seconds() - start);
  }
  return products / best * kTileFlop * (Bytes ? 1 : 0.5);
}

template <bool Bytes>
void report_tiles(const char* name, const char* flag, double floats) {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (!on_this_processor(flag) || syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return (void)std::printf("%-9s not on this processor\n", name);
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = 16;
  asm volatile("ldtilecfg %0" : : "m"(config));
  const double alone = tile_rate<Bytes>(0);
  std::printf("%-9s %7.1f %4.0f %%", name, alone, 100 * alone / floats);
  for (int64_t features : kFeatures) {
    const double padding = features * (Bytes ? 1 : 2) < 64 ? 64.0 / (features * (Bytes ? 1 : 2)) : 1;
    const double rate = tile_rate<Bytes>(features) / padding;
    std::printf("   %7.1f %4.0f %%", rate, 100 * rate / floats);
  }
  std::printf("\n");
  asm volatile("tilerelease");
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
  report<Kind::float16>("float16", "avx512_fp16", 2, floats);
  report<Kind::bytes>("bytes", "avx512_vnni", 4, floats);
  report_tiles<false>("amx bf16", "amx_bf16", floats);
  report_tiles<true>("amx bytes", "amx_int8", floats);
}
#else
int main() { return std::fprintf(stderr, "x86-64 only\n"), 1; }
#endif
