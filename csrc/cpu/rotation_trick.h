// The SIMD levels of rotation_trick_backward.
#pragma once
#include "vqk/params.h"

namespace vqk::cpu {
// Rows [begin, end). `stream`: dz is larger than the caches and 16-byte aligned rows allow stores past them.
void rotation_rows_portable(const RotationTrickBackwardParams&, bool stream, int64_t begin, int64_t end);
void rotation_rows_avx2(const RotationTrickBackwardParams&, bool stream, int64_t begin, int64_t end);
}  // namespace vqk::cpu
