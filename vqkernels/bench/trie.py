"""Constrained decoding over a trie beside transformers' ``prefix_allowed_tokens_fn``, and the trie itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..ops import trie_topk
from ..reference.trie_topk import trie_topk as reference
from ..semantic_ids import Trie, TrieLogitsProcessor
from . import Row

CODES = 256  # of each of three levels; the fourth counts the items that share them
ITEMS = (10_000, 100_000, 1_000_000, 10_000_000)
BEAMS = ((1, 20), (1, 50), (16, 20), (16, 50), (256, 20), (256, 50))
DICTIONARY = 1_000_000  # a larger one takes minutes to time


@functools.lru_cache(1)
def semantic_ids(items: int) -> np.ndarray:
    """Random codes [items, 4] in random order, all rows different."""
    ids = np.random.default_rng(0).integers(0, CODES, (items, 4))
    key = (ids[:, 0] * CODES + ids[:, 1]) * CODES + ids[:, 2]
    order = key.argsort(kind="stable")
    first = np.diff(key[order], prepend=-1) > 0
    place = np.arange(items)
    ids[order, 3] = place - np.maximum.accumulate(np.where(first, place, 0))
    return ids


def dictionary(ids: np.ndarray) -> dict[tuple, list]:
    """{prefix: the codes that may follow it}, what ``prefix_allowed_tokens_fn`` looks its answer up in."""
    allowed: dict[tuple, list] = {}
    for code in ids[np.lexsort(ids.T[::-1])].tolist():
        for n, token in enumerate(code):
            tokens = allowed.setdefault(tuple(code[:n]), [])
            if not tokens or tokens[-1] != token:
                tokens.append(token)
    return allowed


def by_trie(step, trie: Trie, logits: list[Tensor], beams: int):
    """Scores and nodes [B, beams]."""
    batch = len(logits[0])
    scores, states = torch.zeros(batch, 1), torch.zeros(batch, 1, dtype=torch.int64)
    for level in logits:
        scores, _, _, states = step(level, scores, states, trie, beams)
    return scores, states


def plain(logits, scores, states, trie, k):
    return reference(logits, scores, states, trie.row_offsets, trie.edge_tokens, trie.edge_children, k)


def by_processor(make, logits: list[Tensor], beams: int):
    """The same with a logits processor, as transformers' beam search uses it, to codes [B, beams, 4]. ``make(width)``
    gives the processor."""
    batch = len(logits[0])
    scores, written = torch.zeros(batch, 1), torch.zeros(batch, 1, 0, dtype=torch.int64)
    for level in logits:
        logp = make(level.shape[1])(written.flatten(0, 1), level.flatten(0, 1).log_softmax(-1))
        total = (scores.unsqueeze(-1) + logp.view(level.shape)).flatten(1)
        scores, place = total.topk(beams)
        parents = (place // CODES).unsqueeze(-1)
        before = written.gather(1, parents.expand(-1, -1, written.shape[-1]))
        written = torch.cat([before, (place % CODES).unsqueeze(-1)], -1)
    return scores, written


def step_rows(items=ITEMS, beams=BEAMS) -> Iterator[Row]:
    """All four steps of a search, with random logits in place of a model."""
    for count in items:
        trie = Trie(semantic_ids(count), [CODES] * 4)

        @functools.cache
        def allowed(count=count):
            return dictionary(semantic_ids(count))

        for batch, width in beams:
            logits = [3 * torch.randn(batch, 1 if level == 0 else width, CODES) for level in range(4)]
            want = by_trie(plain, trie, logits, width)

            def gate(output, want=want, trie=trie):
                scores, found = output
                items = trie.items(found) if found.dim() == 2 else trie.lookup(found)
                near = torch.allclose(scores, want[0], atol=1e-4)
                differ = int((items != trie.items(want[1])).sum())  # neighbours may change places by rounding
                return "" if near and differ <= 2 + items.numel() // 200 else f"{differ} of {items.numel()} differ"

            def prefix_allowed_tokens_fn(allowed=allowed, logits=logits, width=width):
                from transformers import PrefixConstrainedLogitsProcessor

                known = allowed()
                look_up = lambda _, written: known[tuple(written.tolist())]  # noqa: E731
                return lambda: by_processor(lambda n: PrefixConstrainedLogitsProcessor(look_up, n), logits, width)

            def logits_processor(trie=trie, logits=logits, width=width):
                processor = TrieLogitsProcessor(trie, [range(CODES)] * 4, 0)
                return lambda: by_processor(lambda n: processor, logits, width)

            yield Row(
                "trie_topk, 4 steps",
                f"{count} items, {batch}x{width} beams",
                {
                    "vqkernels": lambda t=trie, x=logits, w=width: lambda: by_trie(trie_topk, t, x, w),
                    "TrieLogitsProcessor": logits_processor,
                    "transformers prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
                },
                gate,
                bytes=sum(4.0 * level.numel() for level in logits),
                roof="copy",
            )


def trie_rows(items=ITEMS) -> Iterator[Row]:
    for count in items:
        ids = semantic_ids(count)
        trie = Trie(ids, [CODES] * 4)

        def gate(output, trie=trie, ids=ids):
            if isinstance(output, dict):
                return "" if len(output) == trie.num_nodes - trie.num_items else "prefixes are missing"
            rows = torch.arange(0, len(ids), 1 + len(ids) // 1000)
            return "" if torch.equal(output.lookup(torch.from_numpy(ids[rows])), rows) else "items are not found"

        build = {"vqkernels": lambda ids=ids: lambda: Trie(ids, [CODES] * 4)}
        if count <= DICTIONARY:
            build["dictionary of prefixes"] = lambda ids=ids: lambda: dictionary(ids)
        yield Row("Trie, built", f"{count}x4", build, gate, roof="")
        new = np.array([[CODES, 0, 0, 0]]) + np.arange(1000)[:, None] * [0, 0, 0, 1]
        yield Row(
            "Trie.append", f"1000 to {count}", {"vqkernels": lambda t=trie, n=new: lambda: t.append(n)}, gate, roof=""
        )
        stock = np.random.default_rng(1).random(count) < 0.9
        stock[:: 1 + count // 1000] = True
        yield Row(
            "Trie.allow", f"90 % of {count}", {"vqkernels": lambda t=trie, s=stock: lambda: t.allow(s)}, gate, roof=""
        )
