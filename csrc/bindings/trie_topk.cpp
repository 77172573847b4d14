#include "torch_util.h"

namespace vqk::bind {
namespace {

constexpr const char* op = "trie_topk";
using Beams = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Launch>
Beams trie_topk(const Tensor& logits, const Tensor& scores, const Tensor& states, const Tensor& row_offsets,
                const Tensor& edge_tokens, const Tensor& edge_children, int64_t k, Launch launch) {
  check_dim(op, "logits", logits, 3, "[B, W, V]");
  check_dim(op, "row_offsets", row_offsets, 1, "[S + 1]");
  check_dim(op, "edge_tokens", edge_tokens, 1, "[E]");
  if (k < 1) fail(op, "k is ", k, ", expected at least 1");
  if (row_offsets.size(0) < 1) fail(op, "row_offsets is empty; a trie of S nodes has S + 1 of them");
  const int64_t B = logits.size(0), W = logits.size(1), V = logits.size(2), E = edge_tokens.size(0);
  const int64_t S = row_offsets.size(0) - 1;
  const DType type = dtype(op, logits);
  const ScalarType wide = accumulate_dtype(logits);
  Tensor lc = as_contiguous(logits);
  Tensor sc = input(op, "scores", scores.scalar_type() == wide ? scores : torch::stable::to(scores, wide), {B, W}, wide,
                    logits);
  Tensor tc = input(op, "states", states, {B, W}, ScalarType::Long, logits);
  Tensor rc = input(op, "row_offsets", row_offsets, {S + 1}, ScalarType::Long, logits);
  Tensor ec = input(op, "edge_tokens", edge_tokens, {E}, ScalarType::Long, logits);
  Tensor cc = input(op, "edge_children", edge_children, {E}, ScalarType::Long, logits);
  Tensor out_scores = empty(logits, {B, k}, wide);
  Tensor out_beams = empty(logits, {B, k}, ScalarType::Long);
  Tensor out_tokens = empty(logits, {B, k}, ScalarType::Long);
  Tensor out_states = empty(logits, {B, k}, ScalarType::Long);
  launch(TrieTopkParams{.logits = lc.const_data_ptr(),
                        .scores = sc.const_data_ptr(),
                        .states = static_cast<const int64_t*>(tc.const_data_ptr()),
                        .row_offsets = static_cast<const int64_t*>(rc.const_data_ptr()),
                        .edge_tokens = static_cast<const int64_t*>(ec.const_data_ptr()),
                        .edge_children = static_cast<const int64_t*>(cc.const_data_ptr()),
                        .out_scores = out_scores.mutable_data_ptr(),
                        .out_beams = static_cast<int64_t*>(out_beams.mutable_data_ptr()),
                        .out_tokens = static_cast<int64_t*>(out_tokens.mutable_data_ptr()),
                        .out_states = static_cast<int64_t*>(out_states.mutable_data_ptr()),
                        .B = B,
                        .W = W,
                        .V = V,
                        .S = S,
                        .k = k,
                        .dtype = type});
  return {out_scores, out_beams, out_tokens, out_states};
}

Beams trie_topk_cpu(const Tensor& logits, const Tensor& scores, const Tensor& states, const Tensor& row_offsets,
                    const Tensor& edge_tokens, const Tensor& edge_children, int64_t k) {
  return trie_topk(logits, scores, states, row_offsets, edge_tokens, edge_children, k,
                   [](const TrieTopkParams& p) { cpu::trie_topk(p, torch_threads(op)); });
}

#ifdef VQK_WITH_CUDA
Beams trie_topk_cuda(const Tensor& logits, const Tensor& scores, const Tensor& states, const Tensor& row_offsets,
                     const Tensor& edge_tokens, const Tensor& edge_children, int64_t k) {
  torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  return trie_topk(logits, scores, states, row_offsets, edge_tokens, edge_children, k, [&](const TrieTopkParams& p) {
    Tensor workspace = empty(logits, {cuda::trie_topk_workspace(p)}, ScalarType::Byte);
    check_cuda(op, cuda::trie_topk(p, workspace.mutable_data_ptr(), cuda_stream(op, logits)));
  });
}
#endif

}  // namespace
}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("trie_topk", TORCH_BOX(&vqk::bind::trie_topk_cpu)); }

#ifdef VQK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) { m.impl("trie_topk", TORCH_BOX(&vqk::bind::trie_topk_cuda)); }
#endif
