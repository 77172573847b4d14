"""One step of constrained beam search over the trie of valid semantic IDs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import pick
from . import checks


def trie_topk(logits: Tensor, scores: Tensor, states: Tensor, trie, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax, mask to the trie, and top-k over all beams of a user, in one step.

    Args:
        logits: next-token logits ``[B, W, V]`` (B users, W beams, V tokens). They are normalised over all V tokens, so
            scores stay the model's own log-probabilities.
        scores: log-probabilities of the beams so far ``[B, W]``.
        states: trie node of each beam, int64 ``[B, W]``; -1 is a dead beam.
        trie: has ``row_offsets`` ``[S+1]``, ``edge_tokens`` and ``edge_children`` ``[E]``, int64: node s has the edges
            row_offsets[s] .. row_offsets[s+1], tokens ascending; on the logits' device. An edge whose token has no
            logit, -1 for one, leads nowhere: that is how ``Trie.allow`` and ``deny`` mask items.
        k: beams to keep.

    Returns:
        ``scores`` ``[B, k]`` descending, ``beams`` ``[B, k]`` (which beam each came from), ``tokens`` ``[B, k]``,
        ``states`` ``[B, k]``. Ties go to the lowest (beam, token); NaN, from a beam with a NaN or infinite logit,
        counts as highest. Where fewer than k continuations are valid: score -inf and -1 elsewhere.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, k < 1.
    """
    op = "trie_topk"
    checks.floating(op, "logits", logits)
    checks.positive(op, "k", k)
    if logits.dim() != 3 or scores.shape != logits.shape[:2] or states.shape != logits.shape[:2]:
        raise ValueError(
            f"{op}: logits {tuple(logits.shape)}, scores {tuple(scores.shape)}, states {tuple(states.shape)}; "
            f"expected [B, W, V], [B, W], [B, W]"
        )
    if states.dtype != torch.int64:
        raise TypeError(f"{op}: states has dtype {states.dtype}; int64 is expected")
    return pick(op, logits.device)(
        logits.detach(), scores.detach(), states, trie.row_offsets, trie.edge_tokens, trie.edge_children, k
    )
