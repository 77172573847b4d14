// The SIMD level of the CPU kernels: detected once, forced by VQK_SIMD, changed in tests.
#pragma once

namespace vqk {

enum class Simd : int { portable = 0, avx2 = 1, avx512 = 2, vnni = 3 };

const char* simd_name(Simd);  // "portable" | "avx2" | "avx512" | "vnni"
Simd simd_detected();         // best level that this CPU and operating system run
Simd simd_level();            // level in use: VQK_SIMD where set, else simd_detected()

// Takes "portable", "avx2", "avx512", "vnni" or "auto". Returns null, or why it cannot be done (unknown
// name; level above simd_detected()). A bad VQK_SIMD is reported by simd_error() and kernels refuse.
const char* set_simd_level(const char* name);
const char* simd_error();

}  // namespace vqk
