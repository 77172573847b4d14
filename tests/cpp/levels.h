// The SIMD levels that the driver runs here, real or emulated.
#pragma once
#include <array>
#include <vector>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "vqk/simd.h"

namespace {
using vqk::Simd;

inline const char* level_name(Simd level) {
  return std::array{"portable", "avx2", "avxvnni", "avx512", "vnni", "amx"}[static_cast<int>(level)];
}

inline std::vector<Simd> levels() {
  std::vector<Simd> found{Simd::portable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(Simd::avx2);
#if defined(VQK_EMULATE_AVXVNNI)
    const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#else
    const bool vnni = __builtin_cpu_supports("avxvnni");
#endif
    if (vnni) found.push_back(Simd::avxvnni);
#if defined(VQK_EMULATE_AMX)
    const bool tiles = true;
#else
    static const bool tiles = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // as simd.cpp asks for them
#endif
#if defined(VQK_EMULATE_AVX512)
    found.insert(found.end(), {Simd::avx512, Simd::vnni});
#else
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.push_back(Simd::avx512);
    if (found.back() == Simd::avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(Simd::vnni);
#endif
    if (found.back() == Simd::vnni && tiles) found.push_back(Simd::amx);
  }
#endif
  return found;
}

}  // namespace
