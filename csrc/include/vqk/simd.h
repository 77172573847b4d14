// The SIMD level of the CPU kernels: detected once, forced by VQK_SIMD, changed in tests.
#pragma once

namespace vqk {

// Each level has what those before it have but avxvnni: AVX2 with byte products in 256 bits, for processors without AVX-512.
enum class Simd : int { portable = 0, avx2 = 1, avxvnni = 2, avx512 = 3, vnni = 4, amx = 5 };

const char* simd_name(Simd);  // "portable" | "avx2" | "avxvnni" | "avx512" | "vnni" | "amx"
Simd simd_detected();         // best level that this CPU and operating system run
Simd simd_level();            // level in use: VQK_SIMD where set, else simd_detected()

// Takes a level's name or "auto". Returns null, or why it cannot be done (unknown name; the processor does
// not run it). A bad VQK_SIMD is reported by simd_error() and kernels refuse.
const char* set_simd_level(const char* name);
const char* simd_error();

}  // namespace vqk
