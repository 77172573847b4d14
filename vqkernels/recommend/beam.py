"""Beam search over semantic IDs with a key-value cache: constrained to the trie of valid IDs, or free."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..ops import trie_topk


def search(model, histories, beams: int, constrained: bool, exclude_seen: bool, users=None) -> tuple[Tensor, Tensor]:
    """The ``beams`` best next items of histories that fill the decoder's window equally far.

    Returns:
        item ids int64 ``[B, beams]``, 0 for none or for a free beam that is no item's ID, and log-probabilities
        float32 ``[B, beams]``, best first.
    """
    source, tokens = model.context(histories, users)
    batch, mask = len(source), (source > 0).long()
    encoded = model.t5.encoder(input_ids=source, attention_mask=mask).last_hidden_state
    step = Constrained(model, histories if exclude_seen else None) if constrained else Free(model)
    scores, cache, width = torch.zeros(batch, 1, device=source.device), None, 1
    for level, (low, _) in enumerate(model.level_ranges):
        out = model.t5.decoder(
            input_ids=tokens,
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        logits = model.level_logits(out.last_hidden_state[:, -1], level).unflatten(0, (batch, width))
        scores, parents, codes = step(logits.float(), scores, beams)
        if level + 1 < model.levels:
            cache, rows = out.past_key_values, torch.arange(batch, device=source.device).unsqueeze(1)
            cache.self_attention_cache.batch_select_indices((rows * width + parents).flatten())
            if (
                width != codes.shape[1]
            ):  # beams of one history share what the encoder said: repeat it only when they multiply
                owners = (rows * width).expand_as(codes).flatten()
                cache.cross_attention_cache.batch_select_indices(owners)
                encoded, mask, width = encoded[owners], mask[owners], codes.shape[1]
            tokens = (codes + low).flatten().unsqueeze(1)
    items = torch.where(scores > -torch.inf, step.items() + 1, 0)
    missing = (0, beams - items.shape[1])
    return torch.nn.functional.pad(items, missing), torch.nn.functional.pad(scores, missing, value=-torch.inf)


class Free:
    """Any code may follow any other."""

    def __init__(self, model):
        self.trie, self.codes = model.trie, None

    def __call__(self, logits: Tensor, scores: Tensor, beams: int):
        total = (scores.unsqueeze(-1) + logits.log_softmax(-1)).flatten(1)
        scores, position = total.topk(min(beams, total.shape[1]), dim=1)
        parents, codes = position // logits.shape[-1], position % logits.shape[-1]
        last = codes.unsqueeze(-1)
        if self.codes is not None:
            last = torch.cat(
                [self.codes.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.codes.shape[-1])), last], -1
            )
        self.codes = last
        return scores, parents, codes

    def items(self) -> Tensor:
        return self.trie.lookup(self.codes)


class Constrained:
    """Only codes on the way to an item, and, where histories are given, to one that is not in the history."""

    def __init__(self, model, histories):
        self.trie, self.states = model.trie, None
        self.blocked = None if histories is None else seen_prefixes(model, histories)
        # no level has more blocked prefixes than the history has items, so so many spare candidates always suffice
        self.spare = 0 if histories is None else max(len(set(h.tolist())) for h in histories)

    def __call__(self, logits: Tensor, scores: Tensor, beams: int):
        if self.states is None:
            self.states = torch.zeros(scores.shape, dtype=torch.long, device=scores.device)
        scores, parents, codes, states = trie_topk(logits, scores, self.states, self.trie, beams + self.spare)
        if self.blocked is not None:
            scores = scores.masked_fill(self.blocked.gather(1, states.clamp(min=0)), -torch.inf)
            scores, kept = scores.sort(dim=1, descending=True, stable=True)
            scores, kept = scores[:, :beams], kept[:, :beams]
            parents, codes, states = (t.gather(1, kept) for t in (parents, codes, states))
        self.states = states.masked_fill(scores == -torch.inf, -1)
        return scores, parents.clamp(min=0), codes.clamp(min=0)  # dead beams decode something, and stay dead

    def items(self) -> Tensor:
        return self.trie.items(self.states)


def seen_prefixes(model, histories) -> Tensor:
    """bool ``[B, nodes]``: the trie's nodes under which every item is in the history."""
    trie, device = model.trie, model.device
    states, paths = torch.zeros(trie.num_items, dtype=torch.long, device=device), []
    for level, (low, _) in enumerate(model.level_ranges):
        states = trie.walk(states, model.item_tokens[1:, level] - low)
        paths.append(states)
    paths = torch.stack(paths, 1)  # [items, L]: the nodes on the way to each item
    size = torch.bincount(paths.flatten(), minlength=trie.num_nodes)
    size[0] = trie.num_items
    seen = [np.unique(h) for h in histories]
    row = torch.from_numpy(np.repeat(np.arange(len(seen)), [len(s) for s in seen])).to(device)
    nodes = paths[torch.from_numpy(np.concatenate(seen)).to(device) - 1]
    counts = torch.bincount((row.unsqueeze(1) * trie.num_nodes + nodes).flatten(), minlength=len(seen) * trie.num_nodes)
    return counts.view(len(seen), -1) == size
