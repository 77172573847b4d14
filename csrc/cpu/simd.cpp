// Finds the SIMD level once: what the CPU has (cpuid) and the operating system saves (xgetbv).
#include "vqk/simd.h"

#include <atomic>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vqk {
namespace {

constexpr Simd kLevels[] = {Simd::portable, Simd::avx2, Simd::avxvnni, Simd::avx512, Simd::vnni, Simd::amx};

constexpr unsigned bit(Simd level) { return 1u << static_cast<int>(level); }

// Whether Linux lets this process use AMX's tiles: it has to be asked, once for all threads, because it saves 8 KB more
// for each from then on. It refuses where a thread's alternative signal stack is too small for that.
bool tiles_allowed() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// bit(level) of every level that runs here.
unsigned detect() {
  unsigned levels = bit(Simd::portable);
#if defined(__x86_64__)
  unsigned a, b, c, d;
  auto all = [](unsigned bits, std::initializer_list<int> wanted) {
    for (int bit : wanted)
      if (!(bits >> bit & 1)) return false;
    return true;
  };
  if (!__get_cpuid(1, &a, &b, &c, &d)) return levels;
  if (!all(c, {12, 27, 28, 29})) return levels;  // fma, osxsave, avx, f16c
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!all(low, {1, 2})) return levels;                                         // the system saves xmm, ymm
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !all(b, {5})) return levels;  // avx2
  levels |= bit(Simd::avx2);
  if (all(low, {5, 6, 7}) && all(b, {16, 17, 30, 31})) {  // k, zmm0-15, zmm16-31; avx512 f, dq, bw, vl
    levels |= bit(Simd::avx512);
    if (all(c, {11})) levels |= bit(Simd::vnni);  // avx512vnni
#ifndef VQK_NO_AMX  // setup.py: the assembler does not know it
    if (all(c, {11}) && all(d, {24, 25}) && all(low, {17, 18}) && tiles_allowed())  // amx-tile, amx-int8; their state
      levels |= bit(Simd::amx);
#endif
  }
#ifndef VQK_NO_AVXVNNI  // setup.py: the assembler does not know it
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && all(a, {4})) levels |= bit(Simd::avxvnni);
#endif
#endif
  return levels;
}

unsigned levels_here() {
  static const unsigned levels = detect();
  return levels;
}

// "portable, avx2, ...", of those in `levels`.
std::string names(unsigned levels) {
  std::string text;
  for (Simd level : kLevels)
    if (levels & bit(level)) text += std::string(text.empty() ? "" : ", ") + simd_name(level);
  return text;
}

std::atomic<int> current{-1};  // -1: not asked yet
std::string environment_error;

// Empty where `name` was taken up, else why not.
std::string take(const std::string& name) {
  if (name == "auto") return current = static_cast<int>(simd_detected()), "";
  for (Simd level : kLevels) {
    if (name != simd_name(level)) continue;
    if (!(levels_here() & bit(level)))
      return "SIMD level " + name + " was asked for, but this build runs " + names(levels_here()) + " on this CPU";
    return current = static_cast<int>(level), "";
  }
  return "unknown SIMD level '" + name + "'; allowed: " + names(~0u) + ", auto";
}

// Reads VQK_SIMD, once.
void init() {
  [[maybe_unused]] static const bool done = [] {
    const char* name = std::getenv("VQK_SIMD");
    std::string error = take(name && *name ? name : "auto");
    if (!error.empty()) environment_error = "VQK_SIMD: " + error, current = 0;
    return true;
  }();
}

}  // namespace

const char* simd_name(Simd level) {
  switch (level) {
    case Simd::amx: return "amx";
    case Simd::vnni: return "vnni";
    case Simd::avx512: return "avx512";
    case Simd::avxvnni: return "avxvnni";
    case Simd::avx2: return "avx2";
    default: return "portable";
  }
}

Simd simd_detected() {
  Simd best = Simd::portable;
  for (Simd level : kLevels)
    if (levels_here() & bit(level)) best = level;
  return best;
}

Simd simd_level() {
  init();
  return static_cast<Simd>(current.load(std::memory_order_relaxed));
}

const char* set_simd_level(const char* name) {
  init();
  thread_local std::string error;
  error = take(name);
  if (!error.empty()) return error.c_str();
  environment_error.clear();  // an explicit choice replaces a bad VQK_SIMD
  return nullptr;
}

const char* simd_error() {
  init();
  return environment_error.empty() ? nullptr : environment_error.c_str();
}

}  // namespace vqk
