"""The trie of valid semantic IDs, as flat tensors: what constrained beam search walks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Trie:
    """Prefix tree of semantic IDs in compressed sparse row form.

    Args:
        semantic_ids: integer codes ``[N, L]``, one row per item, all rows different; array or tensor.
        codebook_sizes: how many codes each level has (``L`` numbers); by default what the codes need.

    Nodes are numbered breadth first from the root 0, so the edge at position ``e`` leads to node ``e + 1`` and the
    leaves are the last ``N`` nodes. Node ``s`` has the children ``edge_children[row_offsets[s]:row_offsets[s + 1]]``,
    with their codes, ascending, at the same places of ``edge_tokens``.

    Attributes:
        row_offsets: int64 ``[nodes + 1]``.
        edge_tokens, edge_children: int64 ``[nodes - 1]``.
        leaf_items: int64 ``[N]``, the row of ``semantic_ids`` at each leaf.

    Raises:
        ValueError: for codes out of range, repeated rows or a wrong shape.
    """

    def __init__(self, semantic_ids, codebook_sizes=None):
        ids = np.asarray(semantic_ids)
        if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"semantic_ids is {ids.dtype} of shape {list(ids.shape)}; a trie needs integer codes [N, L] with "
                "at least one item and one level"
            )
        ids = ids.astype(np.int64)
        count, depth = ids.shape
        sizes = ids.max(0) + 1 if codebook_sizes is None else np.asarray(codebook_sizes, dtype=np.int64)
        if sizes.shape != (depth,):
            raise ValueError(f"codebook_sizes has {sizes.size} numbers for {depth} levels; give one per level")
        bad = (ids < 0) | (ids >= sizes)
        if bad.any():
            row, level = np.argwhere(bad)[0]
            raise ValueError(
                f"item row {row} has code {ids[row, level]} at level {level}; allowed are 0 to {sizes[level] - 1}"
            )

        order = np.lexsort(ids.T[::-1])
        ids = ids[order]
        # new[i, l]: row i opens a node at depth l + 1, for its first l + 1 codes differ from the row before
        new = np.ones((count, depth), dtype=bool)
        new[1:] = np.logical_or.accumulate(ids[1:] != ids[:-1], axis=1)
        if not new[:, -1].all():
            second = int(np.argmin(new[:, -1]))
            raise ValueError(
                f"item rows {order[second - 1]} and {order[second]} have the same semantic ID {ids[second].tolist()}; "
                "make IDs unique first (the tokenizers append a collision digit)"
            )
        number = np.cumsum(new, axis=0) - 1  # [N, L]: the node's place within its depth
        sizes_by_depth = number[-1] + 1
        first = np.concatenate([[0, 1], 1 + np.cumsum(sizes_by_depth)])  # first node of each depth
        children = np.zeros(first[-1], dtype=np.int64)
        tokens = []
        for level in range(depth):
            opens = new[:, level]
            parent = number[opens, level - 1] + first[level] if level else np.zeros(opens.sum(), dtype=np.int64)
            children += np.bincount(parent, minlength=children.size)
            tokens.append(ids[opens, level])

        self.depth = depth
        self.codebook_sizes = tuple(int(size) for size in sizes)
        self.row_offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(children)]))
        self.edge_tokens = torch.from_numpy(np.concatenate(tokens))
        self.edge_children = torch.arange(1, children.size)
        self.leaf_items = torch.from_numpy(order)
        self._first_leaf = int(first[depth])
        # (parent, code) of every edge as one ascending number: walking is a binary search
        self._base = int(sizes.max())
        parents = torch.repeat_interleave(torch.arange(children.size), torch.from_numpy(children))
        self._keys = parents * self._base + self.edge_tokens

    @property
    def num_nodes(self) -> int:
        return self.row_offsets.numel() - 1

    @property
    def num_items(self) -> int:
        return self.leaf_items.numel()

    def __repr__(self):
        return f"Trie(items={self.num_items}, levels={self.depth}, nodes={self.num_nodes})"

    def to(self, device) -> Trie:
        """Moves the tensors to ``device``, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def items(self, states: Tensor) -> Tensor:
        """Rows of ``semantic_ids`` at these nodes; −1 where a node is no leaf (or −1 itself). Shape as given."""
        leaf = states - self._first_leaf
        return torch.where(leaf >= 0, self.leaf_items[leaf.clamp(min=0)], -1)

    def walk(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The nodes reached from ``states`` by one code each, −1 where the trie has no such edge. Shape as given."""
        inside = (states >= 0) & (tokens >= 0) & (tokens < self._base)
        key = states * self._base + tokens
        edge = torch.searchsorted(self._keys, key).clamp(max=self._keys.numel() - 1)
        return torch.where(inside & (self._keys[edge] == key), self.edge_children[edge], -1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Item rows of whole semantic IDs ``[..., L]`` → ``[...]``; −1 where no item has that ID."""
        states = torch.zeros_like(codes[..., 0])
        for level in range(self.depth):
            states = self.walk(states, codes[..., level].contiguous())
        return self.items(states)
