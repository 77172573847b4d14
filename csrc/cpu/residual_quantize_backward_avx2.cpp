// residual_quantize_backward_kernel.h for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "residual_quantize_backward.h"

#define VQK_AVX2  // before GCC 13 the pragma defines no __AVX2__ of its own
#pragma GCC target("avx2,fma,f16c")
#include "half.h"

namespace vqk::cpu {
namespace {
#include "residual_quantize_backward_kernel.h"
}  // namespace

void backward_rows_avx2(const ResidualQuantizeBackwardParams& p, void* scratch, int64_t begin, int64_t end) {
  backward_rows_here(p, scratch, begin, end);
}

}  // namespace vqk::cpu
#endif
