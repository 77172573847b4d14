// Finds the SIMD level once: what the CPU has (cpuid) and the operating system saves (xgetbv).
#include "vqk/simd.h"

#include <atomic>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vqk {
namespace {

Simd detect() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  auto all = [](unsigned bits, std::initializer_list<int> wanted) {
    for (int bit : wanted)
      if (!(bits >> bit & 1)) return false;
    return true;
  };
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Simd::portable;
  if (!all(c, {12, 27, 28, 29})) return Simd::portable;  // fma, osxsave, avx, f16c
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!all(low, {1, 2})) return Simd::portable;                                         // the system saves xmm, ymm
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !all(b, {5})) return Simd::portable;  // avx2
  bool zmm = all(low, {5, 6, 7});                                                       // k, zmm0-15, zmm16-31
  if (!zmm || !all(b, {16, 17, 30, 31})) return Simd::avx2;                             // avx512 f, dq, bw, vl
  return all(c, {11}) ? Simd::vnni : Simd::avx512;
#else
  return Simd::portable;
#endif
}

std::atomic<int> current{-1};  // -1: not asked yet
std::string environment_error;

// Empty where `name` was taken up, else why not.
std::string take(const std::string& name) {
  const Simd best = simd_detected();
  if (name == "auto") return current = static_cast<int>(best), "";
  for (Simd level : {Simd::portable, Simd::avx2, Simd::avx512, Simd::vnni}) {
    if (name != simd_name(level)) continue;
    if (level > best) return "SIMD level " + name + " was asked for, but this CPU runs at most " + simd_name(best);
    return current = static_cast<int>(level), "";
  }
  return "unknown SIMD level '" + name + "'; allowed: portable, avx2, avx512, vnni, auto";
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
    case Simd::vnni: return "vnni";
    case Simd::avx512: return "avx512";
    case Simd::avx2: return "avx2";
    default: return "portable";
  }
}

Simd simd_detected() {
  static const Simd level = detect();
  return level;
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
