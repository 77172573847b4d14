"""One step of beam search over the trie of valid semantic IDs."""

from __future__ import annotations

import torch
from torch import Tensor

from .nearest_codeword import accumulate_dtype


def trie_topk(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    row_offsets: Tensor,
    edge_tokens: Tensor,
    edge_children: Tensor,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [B,W,V], scores [B,W], states [B,W] -> scores, beams, tokens, states, each [B,k].

    A state that is no node is a dead beam, and a token that has no logit is no child: that is how a trie is masked."""
    B, W, V = logits.shape
    logp = logits.to(accumulate_dtype(logits)).log_softmax(-1)
    live = (states >= 0) & (states < row_offsets.numel() - 1)
    node = torch.where(live, states, 0)
    first, last = row_offsets[node], row_offsets[node + 1]
    width = int((last - first).max()) if states.numel() else 0
    slot = torch.arange(width, device=logits.device)
    edge = first.unsqueeze(-1) + slot  # [B,W,width]: the edges that leave each beam's node, in token order
    valid = (edge < last.unsqueeze(-1)) & live.unsqueeze(-1)
    edge = torch.where(valid, edge, 0)
    token = edge_tokens[edge] if edge_tokens.numel() else torch.zeros_like(edge)
    child = edge_children[edge] if edge_tokens.numel() else torch.zeros_like(edge)
    valid &= (token >= 0) & (token < V)
    token = torch.where(valid, token, 0)
    total = scores.to(logp.dtype).unsqueeze(-1) + logp.gather(-1, token)
    total = torch.where(valid, total, -torch.inf).reshape(B, W * width)
    # stable sort: ties keep the lowest (beam, token)
    total, position = total.sort(dim=-1, descending=True, stable=True)
    n = min(k, W * width)
    total, position = total[:, :n], position[:, :n]
    dead = total == -torch.inf
    beam = position // max(width, 1)
    pick = lambda values: torch.where(dead, -1, values.reshape(B, W * width).gather(1, position))  # noqa: E731
    out = [total, torch.where(dead, -1, beam), pick(token), pick(child)]
    fill = [-torch.inf, -1, -1, -1]
    return tuple(torch.cat([t, t.new_full((B, k - n), f)], 1) for t, f in zip(out, fill, strict=True))
