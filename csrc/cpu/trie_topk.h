// The SIMD levels of trie_topk: what is read of every logit. Internal to csrc/cpu.
#pragma once
#include "vqk/params.h"

namespace vqk::cpu {

// Row `row` of the logits, [B*W,V]: its maximum, or NaN where a logit is NaN.
double row_highest_portable(const TrieTopkParams&, int64_t row);
double row_highest_avx2(const TrieTopkParams&, int64_t row);
// The sum of exp(x - highest), for a finite `highest`.
double row_sum_portable(const TrieTopkParams&, int64_t row, double highest);
double row_sum_avx2(const TrieTopkParams&, int64_t row, double highest);

}  // namespace vqk::cpu
