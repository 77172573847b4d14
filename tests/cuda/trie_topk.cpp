#include "calls.h"

VQK_CALL(trie_topk) {
  const Array& logits = call.in(0);
  const vqk::TrieTopkParams p{.logits = logits.data,
                              .scores = call.in(1).data,
                              .states = call.in(2).as<int64_t>(),
                              .row_offsets = call.in(3).as<int64_t>(),
                              .edge_tokens = call.in(4).as<int64_t>(),
                              .edge_children = call.in(5).as<int64_t>(),
                              .out_scores = call.out(0).data,
                              .out_beams = call.out(1).as<int64_t>(),
                              .out_tokens = call.out(2).as<int64_t>(),
                              .out_states = call.out(3).as<int64_t>(),
                              .B = logits.size(0),
                              .W = logits.size(1),
                              .V = logits.size(2),
                              .S = call.in(3).size(0) - 1,
                              .k = call.integer(6),
                              .dtype = logits.dtype()};
  return vqk::cuda::trie_topk(p, call.workspace(vqk::cuda::trie_topk_workspace(p)), nullptr);
}
