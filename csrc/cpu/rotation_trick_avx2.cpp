// rotation_trick_kernel.h for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "rotation_trick.h"

#define VQK_AVX2  // before GCC 13 the pragma defines no __AVX2__ of its own
#pragma GCC target("avx2,fma,f16c")
#include "half.h"

namespace vqk::cpu {
namespace {
#define STREAM4(p, v) _mm_stream_ps(p, v)
#define STREAM_DONE() _mm_sfence()
#include "rotation_trick_kernel.h"
}  // namespace

void rotation_rows_avx2(const RotationTrickBackwardParams& p, bool stream, int64_t begin, int64_t end) {
  rotation_rows_here(p, stream, begin, end);
}

}  // namespace vqk::cpu
#endif
