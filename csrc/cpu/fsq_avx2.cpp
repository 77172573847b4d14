// fsq_kernel.h for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "fsq.h"

#define VQK_AVX2  // before GCC 13 the pragma defines no __AVX2__ of its own
#pragma GCC target("avx2,fma,f16c")
#include "half.h"

namespace vqk::cpu {
namespace {
#include "fsq_kernel.h"
}  // namespace

void fsq_rows_avx2(const FsqParams& p, const FsqTable& t, int64_t begin, int64_t end) {
  fsq_rows_here(p, t, begin, end);
}
void fsq_backward_rows_avx2(const FsqBackwardParams& p, const FsqTable& t, int64_t begin, int64_t end) {
  fsq_backward_rows_here(p, t, begin, end);
}

}  // namespace vqk::cpu
#endif
