// trie_topk_kernel.h for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "trie_topk.h"

#define VQK_AVX2  // before GCC 13 the pragma defines no __AVX2__ of its own
#pragma GCC target("avx2,fma,f16c")
#include "half.h"

namespace vqk::cpu {
namespace {
#include "trie_topk_kernel.h"
}  // namespace

double row_highest_avx2(const TrieTopkParams& p, int64_t row) { return row_highest_here(p, row); }
double row_sum_avx2(const TrieTopkParams& p, int64_t row, double highest) { return row_sum_here(p, row, highest); }

}  // namespace vqk::cpu
#endif
