"""Constrained decoding in any transformers model: a logits processor over the trie of valid semantic IDs."""

from __future__ import annotations

import torch
from torch import Tensor

from .trie import Trie


class TrieLogitsProcessor:
    """Keeps ``generate()`` of a transformers model, with or without beams, on the way to an item.

        model.generate(**inputs, num_beams=20, max_new_tokens=trie.depth,
                       logits_processor=[TrieLogitsProcessor(trie, tokens, prompt_length)])

    It does what ``prefix_allowed_tokens_fn`` does, in a few tensor operations for all beams instead of one Python call
    for each.

    Args:
        trie: all items, or a view with fewer (``trie.allow``, ``trie.deny``); its lists may be one for each row of the
            batch that ``generate`` is given.
        tokens: for each level the vocabulary's token of code 0, 1, ...: lists, tensors or ranges. With codes one level
            after another behind 32000 words: ``[range(32000, 32256), range(32256, 32512), range(32512, 32768)]``.
        prompt_length: tokens before the first code: 1 for an encoder-decoder (its start token),
            ``inputs["input_ids"].shape[1]`` for a decoder.
        eos_token_id: the token allowed after a whole semantic ID. Needed where ``generate`` may go on for more than
            ``trie.depth`` tokens.

    Called with ``input_ids`` ``[B · beams, T]`` and ``scores`` ``[B · beams, vocabulary]`` it returns the scores, -inf
    for all tokens that lead to no item. After tokens that are no code of theirs nothing leads to an item.

    Raises:
        ValueError: tokens for another number of levels or of codes; codes asked for after the last level; rows that are
            no multiple of the trie's histories.
    """

    def __init__(self, trie: Trie, tokens, prompt_length: int, eos_token_id: int | None = None):
        self.trie, self.prompt_length, self.eos = trie, prompt_length, eos_token_id
        self.tokens = [torch.as_tensor(level, dtype=torch.int64, device=trie.roots.device) for level in tokens]
        lengths, sizes = [level.numel() for level in self.tokens], list(trie.codebook_sizes)
        if len(lengths) != trie.depth or any(a < b for a, b in zip(lengths, sizes, strict=True)):
            raise ValueError(f"tokens has levels of {lengths} codes; the trie needs one token a code, for {sizes}")
        self._codes = []  # of every token of the vocabulary, -1 for none
        for level in self.tokens:
            codes = torch.full((int(level.max()) + 1,), -1, device=level.device)
            codes[level] = torch.arange(level.numel(), device=level.device)
            self._codes.append(codes)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        trie, rows = self.trie, len(input_ids)
        written = input_ids[:, self.prompt_length :]
        histories = trie.histories or 1
        if rows % histories:
            raise ValueError(f"{rows} rows for the lists of {histories} histories; give generate() as many inputs")
        states = trie.roots.repeat_interleave(rows // len(trie.roots))
        level = written.shape[1]
        for known, token in zip(self._codes, written.T, strict=False):
            code = torch.where(token < len(known), known[token.clamp(max=len(known) - 1)], -1)
            states = trie.walk(states, code)
        if level >= trie.depth:
            if self.eos is None:
                raise ValueError(
                    f"generate() asks for token {level + 1} of semantic IDs with {trie.depth}; set max_new_tokens to "
                    f"{trie.depth}, or give TrieLogitsProcessor the eos_token_id"
                )
            out = torch.full_like(scores, -torch.inf)
            out[:, self.eos] = scores[:, self.eos]
            return out
        # the children of every row's node, one row after another
        node = states.clamp(min=0)
        first = trie.row_offsets[node]
        count = torch.where(states >= 0, trie.row_offsets[node + 1] - first, 0)
        row = torch.arange(rows, device=scores.device).repeat_interleave(count)
        edge = torch.arange(len(row), device=scores.device) + (first - count.cumsum(0) + count)[row]
        code = trie.edge_tokens[edge]
        open_ = code >= 0
        if trie.denied is not None:
            open_ &= ~trie.closed(row * histories // rows, trie.edge_children[edge], level)
        if not open_.all():
            row, code = row[open_], code[open_]
        closed = torch.ones_like(scores, dtype=torch.bool)
        closed.view(-1).scatter_(0, row * scores.shape[1] + self.tokens[level][code], False)
        return scores.masked_fill(closed, -torch.inf)
