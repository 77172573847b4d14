// The SIMD levels of residual_quantize_backward.
#pragma once
#include "vqk/params.h"

namespace vqk::cpu {
// Rows [begin, end) of the H*N rows; scratch holds 2 D + Q doubles.
void backward_rows_portable(const ResidualQuantizeBackwardParams&, void* scratch, int64_t begin, int64_t end);
void backward_rows_avx2(const ResidualQuantizeBackwardParams&, void* scratch, int64_t begin, int64_t end);
}  // namespace vqk::cpu
