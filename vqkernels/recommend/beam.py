"""Beam search over semantic IDs with a key-value cache: constrained to the trie of valid IDs, or free."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..ops import trie_topk
from .decoder import BeamDecoder


def search(model, histories, beams: int, trie, users=None) -> tuple[Tensor, Tensor, Tensor]:
    """The ``beams`` best next items of histories that fill the decoder's window equally far.

    Args:
        trie: the items to find, or a view with fewer; None searches freely, any code after any other.

    Returns:
        item ids int64 ``[B, beams]``, 0 for none or for a free beam that is no item's ID; log-probabilities float32
        ``[B, beams]``, best first; for each level the share of beams that lead to no item, float32 ``[B, levels]``.
    """
    source, tokens = model.context(histories, users)
    batch, mask = len(source), (source > 0).long()
    encoded = model.t5.encoder(input_ids=source, attention_mask=mask).last_hidden_state
    step = Free(model.trie, batch) if trie is None else Constrained(trie, batch)
    decoder = BeamDecoder(model.t5.decoder, encoded, mask, tokens, model.levels - 1)
    hidden, scores, invalid = decoder.states, torch.zeros(batch, 1, device=source.device), []
    for level, (low, _) in enumerate(model.level_ranges):
        scores, parents, codes = step(model.level_logits(hidden, level).float(), scores, beams)
        invalid.append((step.states < 0).float().mean(1))
        if level + 1 < model.levels:
            hidden = decoder.step(codes + low, parents)
    items = torch.where(scores > -torch.inf, step.trie.items(step.states) + 1, 0)
    missing = (0, beams - items.shape[1])
    scores = torch.nn.functional.pad(scores, missing, value=-torch.inf)
    return torch.nn.functional.pad(items, missing), scores, torch.stack(invalid, 1)


class Free:
    """Any code may follow any other; the trie only says where that leads."""

    def __init__(self, trie, batch: int):
        self.trie, self.states = trie, trie.roots.expand(batch, 1)

    def __call__(self, logits: Tensor, scores: Tensor, beams: int):
        total = (scores.unsqueeze(-1) + logits.log_softmax(-1)).flatten(1)
        scores, position = total.topk(min(beams, total.shape[1]), dim=1)
        parents, codes = position // logits.shape[-1], position % logits.shape[-1]
        self.states = self.trie.walk(self.states.gather(1, parents), codes)
        return scores, parents, codes


class Constrained:
    """Only codes on the way to an item of the trie, or of the view that each history has of it."""

    def __init__(self, trie, batch: int):
        self.trie, self.level = trie, 0
        self.states = trie.roots.unsqueeze(1).expand(batch, 1)
        self.histories = torch.arange(batch, device=self.states.device).unsqueeze(1)
        # so many candidates more than beams are enough, whichever of them are closed to their history
        self.spare = [
            int(torch.bincount(keys // trie.num_nodes).max()) if keys.numel() else 0 for keys in trie.denied or ()
        ]

    def __call__(self, logits: Tensor, scores: Tensor, beams: int):
        keep = beams
        if self.spare and self.spare[self.level]:
            keep = min(beams + self.spare[self.level], max(beams, logits[0].numel()))
        scores, parents, codes, states = trie_topk(logits, scores, self.states, self.trie, keep)
        if keep > beams:
            closed = self.trie.closed(self.histories, states, self.level)
            scores, kept = scores.masked_fill(closed, -torch.inf).sort(dim=1, descending=True, stable=True)
            scores, kept = scores[:, :beams], kept[:, :beams]
            parents, codes, states = (t.gather(1, kept) for t in (parents, codes, states))
        self.level += 1
        self.states = states.masked_fill(scores == -torch.inf, -1)
        return scores, parents.clamp(min=0), codes.clamp(min=0)  # dead beams decode something, and stay dead


def per_history(items) -> bool:
    """Whether these are lists of items, one for each history, or one list (or mask) for all of them."""
    return isinstance(items, (list, tuple)) and len(items) > 0 and np.ndim(items[0]) > 0


def view(trie, allow: list | None, deny: list[np.ndarray]):
    """The trie with the items of a batch of histories. ``allow``: None or a list for each; ``deny``: a list for each,
    maybe empty. Rows of the trie's IDs."""
    if allow is not None:
        return trie.allow([np.setdiff1d(a, d) for a, d in zip(allow, deny, strict=True)])
    return trie.deny(deny) if any(map(len, deny)) else trie
