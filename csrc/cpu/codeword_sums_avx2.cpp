// codeword_sums_kernel.h for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "codeword_sums.h"

#define VQK_AVX2  // before GCC 13 the pragma defines no __AVX2__ of its own
#pragma GCC target("avx2,fma,f16c")
#include "half.h"

namespace vqk::cpu {
namespace {
#include "codeword_sums_kernel.h"
}  // namespace

void add_piece_avx2(const CodewordSumsParams& p, const SumPiece& piece, double* sum) { add_piece_here(p, piece, sum); }
void add_slice_avx2(const CodewordSumsParams& p, const SumSlice& slice) { add_slice_here(p, slice); }

}  // namespace vqk::cpu
#endif
