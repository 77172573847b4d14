"""The trie of valid semantic IDs, as flat tensors: what constrained beam search walks."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.catalogue import DataError, write_atomic

FORMAT = "1"


class Trie:
    """Prefix tree of semantic IDs in compressed sparse row form.

    Args:
        semantic_ids: integer codes ``[N, L]``, one row per item, all rows different; array or tensor.
        codebook_sizes: how many codes each level has (``L`` numbers); by default what the codes need.

    Nodes are numbered breadth first from the root 0, so the edge at position ``e`` leads to node ``e + 1``, the
    descendants of a node at any one depth are neighbours, and the leaves are the last ``N`` nodes. Node ``s`` has the
    children ``edge_children[row_offsets[s]:row_offsets[s + 1]]``, with their codes, ascending, at the same places of
    ``edge_tokens``.

    ``allow`` and ``deny`` give views with fewer items (stock, freshness, what a user has seen); nothing is rebuilt.

    Attributes:
        row_offsets: int64 ``[nodes + 1]``.
        edge_tokens, edge_children: int64 ``[nodes - 1]``; in a view, the token of an edge without items is −1.
        leaf_items: int64 ``[N]``, the row of ``semantic_ids`` at each leaf.
        histories: None, or ``B`` in a view with lists for each of B histories.
        roots: int64 ``[1]``, or ``[B]`` where each history has a root of its own (−1: no item is allowed to it).
        denied: None, or for each level the nodes closed to a history, int64, ascending: ``history · nodes + node``.

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
        count, depth = ids.shape
        columns = [np.ascontiguousarray(ids[:, level], dtype=np.int64) for level in range(depth)]
        sizes = np.array([column.max() + 1 for column in columns])
        if codebook_sizes is not None:
            sizes = np.asarray(codebook_sizes, dtype=np.int64)
        if sizes.shape != (depth,):
            raise ValueError(f"codebook_sizes has {sizes.size} numbers for {depth} levels; give one per level")
        for level, column in enumerate(columns):
            if column.min() < 0 or column.max() >= sizes[level]:
                row = int(np.argmax((column < 0) | (column >= sizes[level])))
                raise ValueError(
                    f"item row {row} has code {column[row]} at level {level}; allowed are 0 to {sizes[level] - 1}"
                )

        if count * depth * int(sizes.max()) >= 2**62:
            raise ValueError(
                f"codes up to {sizes.max() - 1} for {count} items do not fit into 62 bits; number them anew"
            )
        order = _lexicographic(columns, sizes)
        opens = np.zeros(count, dtype=bool)  # this row's codes up to the level differ from those of the row before
        opens[0] = True
        before, edges, row_offsets, tokens = opens.copy(), 0, [], []
        for level in range(depth):
            codes = columns[level][order]
            columns[level] = None  # a catalogue of many millions: one level's work at a time
            opens[1:] |= codes[1:] != codes[:-1]
            rows = np.flatnonzero(opens)
            # a node's first child opens in the row that opened the node
            row_offsets.append(edges + np.flatnonzero(before[rows]))
            tokens.append(codes[rows])
            edges += len(rows)
            before = opens.copy()
        if len(rows) < count:
            second = int(np.argmin(opens))
            raise ValueError(
                f"item rows {' and '.join(map(str, sorted(order[second - 1 : second + 1])))} have the same semantic ID "
                f"{ids[order[second]].tolist()}; make IDs unique first (the tokenizers append a collision digit)"
            )

        self.depth = depth
        self.codebook_sizes = tuple(int(size) for size in sizes)
        self.row_offsets = torch.from_numpy(np.concatenate([*row_offsets, np.full(count + 1, edges)]))
        self.edge_tokens = torch.from_numpy(np.concatenate(tokens))
        self.leaf_items = torch.from_numpy(order)
        self._complete()

    def _complete(self):
        self.edge_children = torch.arange(1, self.row_offsets.numel() - 1)
        self.roots, self.denied, self.histories = torch.zeros(1, dtype=torch.int64), None, None
        self._first_leaf = self.row_offsets.numel() - 1 - self.leaf_items.numel()
        self._codes = self.edge_tokens  # of every edge, also where a view has masked it
        self._base = max(self.codebook_sizes)
        self._shared = {}  # with views: what is made when it is first needed
        self._allowed_before = None  # in a view [N + 1]: how many of the leaves so far it allows

    @property
    def num_nodes(self) -> int:
        return self.row_offsets.numel() - 1

    @property
    def num_items(self) -> int:
        return self.leaf_items.numel()

    @property
    def nbytes(self) -> int:
        """Memory of the tensors that trie_topk reads; all else keeps 8 bytes more a node and an item, once used."""
        tensors = (self.row_offsets, self.edge_tokens, self.edge_children, self.leaf_items)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __repr__(self):
        return (
            f"Trie(items={self.num_items}, levels={self.depth}, nodes={self.num_nodes}, {self.nbytes / 2**20:.1f} MiB)"
        )

    def to(self, device) -> Trie:
        """Moves the tensors to ``device``, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        if self.denied is not None:
            self.denied = [keys.to(device) for keys in self.denied]
        self._shared = {}
        return self

    # Walking.

    def items(self, states: Tensor) -> Tensor:
        """Rows of ``semantic_ids`` at these nodes; −1 where a node is no leaf (or −1 itself). Shape as given."""
        leaf = states - self._first_leaf
        return torch.where(leaf >= 0, self.leaf_items[leaf.clamp(min=0)], -1)

    def walk(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The nodes reached from ``states`` by one code each, −1 where the trie has no such edge. Shape as given."""
        keys, key = self._keys(), states * self._base + tokens
        edge = torch.searchsorted(keys, key).clamp(max=keys.numel() - 1)
        found = (keys[edge] == key) & (self.edge_tokens[edge] == tokens)  # a view masks tokens
        return torch.where(found & (tokens >= 0), self.edge_children[edge], -1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Item rows of whole semantic IDs ``[..., L]`` → ``[...]``; −1 where no item has that ID, or where an ``allow``
        or ``deny`` for all histories has taken it out."""
        states = torch.zeros_like(codes[..., 0])
        for level in range(self.depth):
            states = self.walk(states, codes[..., level])
        return self.items(states)

    def closed(self, histories: Tensor, states: Tensor, level: int) -> Tensor:
        """bool: which nodes, reached by the code of ``level``, the lists of ``deny`` close to the history."""
        keys, key = self.denied[level], histories * self.num_nodes + states
        if not keys.numel():
            return torch.zeros_like(key, dtype=torch.bool)
        return keys[torch.searchsorted(keys, key).clamp(max=keys.numel() - 1)] == key

    # Fewer items, and more.

    def allow(self, items) -> Trie:
        """A view in which only these items exist.

        Args:
            items: rows of ``semantic_ids``, or bool ``[N]``: the same for all histories, one pass over the trie. Or a
                list of ``B`` such lists of rows: one for each history, in time and memory of the lists' length.
        """
        self._whole("allow")
        lists = self._lists("allow", items)
        if lists is None:
            return self._masked(self._mask("allow", items))
        view, depth = copy.copy(self), self.depth
        owners = np.repeat(np.arange(len(lists)), [len(rows) for rows in lists])
        rows = np.concatenate(lists) if len(owners) else owners
        if self._allowed_before is not None:
            kept = self._allowed(self._leaves()[torch.from_numpy(rows)]).cpu().numpy()
            owners, rows = owners[kept], rows[kept]
        if not len(rows):
            view.roots, view.histories = torch.full((len(lists),), -1, device=self.roots.device), len(lists)
            return view
        # a level of its own for the histories, above the others
        codes = self.codes(torch.from_numpy(rows)).cpu().numpy()
        view = Trie(np.column_stack([owners, codes]), (len(lists), *self.codebook_sizes))
        view.leaf_items = torch.from_numpy(rows)[view.leaf_items]
        view.roots = view.walk(torch.zeros(len(lists), dtype=torch.int64), torch.arange(len(lists)))
        view.depth, view.codebook_sizes, view.histories = depth, self.codebook_sizes, len(lists)
        return view.to(self.roots.device)

    def deny(self, items) -> Trie:
        """A view in which these items do not exist: prefixes that lead to no other item are closed as well.

        Args:
            items: as for :meth:`allow`. Lists for each history take time and memory of their length.
        """
        self._whole("deny")
        lists = self._lists("deny", items)
        if lists is None:
            return self._masked(~self._mask("deny", items))
        view = copy.copy(self)
        lists = [np.unique(rows) for rows in lists]
        owners = torch.from_numpy(np.repeat(np.arange(len(lists)), [len(rows) for rows in lists]))
        leaves = self._leaves()[torch.from_numpy(np.concatenate(lists)) if len(owners) else owners]
        kept = self._allowed(leaves)
        owners, nodes = owners[kept.cpu()].to(leaves.device), leaves[kept]
        view.denied, view.histories = [], len(lists)
        for _ in range(self.depth):
            keys, counts = torch.unique(owners * self.num_nodes + nodes, return_counts=True)
            view.denied.insert(0, keys[counts == self._sizes(keys % self.num_nodes)])
            nodes = self._parents(nodes)
        return view

    def append(self, semantic_ids) -> Trie:
        """A trie with these items added, as rows ``N``, ``N + 1``, ... Codes may lie beyond ``codebook_sizes``.

        It is built anew from the codes it holds: seconds for 10⁷ items (``vqkernels bench --op trie`` says how many),
        while this one goes on serving. States and views of this one mean nothing to the new one."""
        self._whole("append")
        ids = np.asarray(semantic_ids)
        if ids.ndim != 2 or ids.shape[1] != self.depth or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"append: semantic_ids is {ids.dtype} of shape {list(ids.shape)}; integer codes [M, {self.depth}] fit"
            )
        if not len(ids):
            return self
        sizes = np.maximum(self.codebook_sizes, ids.max(0) + 1)
        return Trie(np.concatenate([self.codes().cpu().numpy(), ids]), sizes)

    def codes(self, items: Tensor | None = None) -> Tensor:
        """Semantic IDs of these rows, or of all: int64 ``[..., L]``."""
        nodes, out = torch.arange(self._first_leaf, self.num_nodes, device=self.roots.device), []
        if items is not None:
            nodes = self._leaves()[items]
        for _ in range(self.depth):
            out.append(self._codes[nodes - 1])
            nodes = self._parents(nodes)
        codes = torch.stack(out[::-1], -1)
        # all of them in the order of the leaves, where neighbours share their parents
        return codes if items is not None else torch.empty_like(codes).index_copy_(0, self.leaf_items, codes)

    # Files.

    def save(self, path) -> Path:
        """Writes the trie into one safetensors file, whole or not at all; of a view, the trie it was made from."""
        from safetensors.torch import save

        tensors = {"row_offsets": self.row_offsets, "edge_tokens": self._codes, "leaf_items": self.leaf_items}
        metadata = {"format": FORMAT, "codebook_sizes": json.dumps(self.codebook_sizes)}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata))
        return path

    @classmethod
    def load(cls, path) -> Trie:
        """Reads what ``save`` wrote. DataError when the file is missing, damaged or of another format."""
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"format {metadata.get('format')!r}, this version reads {FORMAT!r}")
                trie = cls.__new__(cls)
                trie.codebook_sizes = tuple(json.loads(metadata["codebook_sizes"]))
                trie.depth = len(trie.codebook_sizes)
                for name in ("row_offsets", "edge_tokens", "leaf_items"):
                    setattr(trie, name, file.get_tensor(name))
            if trie.edge_tokens.numel() != trie.num_nodes - 1 or int(trie.row_offsets[-1]) != trie.edge_tokens.numel():
                raise ValueError("its tensors do not belong together")
        except Exception as error:  # safetensors raises its own class for damaged files
            raise DataError(f"{path}: not a saved trie ({error}). Give the file that Trie.save() wrote") from None
        trie._complete()
        return trie

    # Inside.

    def _whole(self, name: str) -> None:
        if self.histories is not None:
            raise ValueError(f"{name}: this trie has a list for each history already; give lists for each history last")

    def _lists(self, name: str, items) -> list[np.ndarray] | None:
        """A list of lists, checked; None for one list."""
        if not isinstance(items, (list, tuple)) or not items or np.ndim(items[0]) == 0:
            return None
        return [self._rows(name, rows) for rows in items]

    def _rows(self, name: str, items) -> np.ndarray:
        rows = items.cpu().numpy() if isinstance(items, Tensor) else np.asarray(items)
        rows = rows.astype(np.int64) if rows.size == 0 else rows
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(f"{name}: items are {rows.dtype} of shape {list(rows.shape)}; give whole numbers [M]")
        bad = (rows < 0) | (rows >= self.num_items)
        if bad.any():
            raise ValueError(f"{name}: unknown item row {rows[bad][0]}; rows run from 0 to {self.num_items - 1}")
        return rows.astype(np.int64)

    def _mask(self, name: str, items) -> Tensor:
        mask = torch.as_tensor(items)
        if mask.dtype == torch.bool:
            if mask.shape != (self.num_items,):
                raise ValueError(f"{name}: the mask has shape {list(mask.shape)}; bool [{self.num_items}] is expected")
            return mask.to(self.leaf_items.device)
        mask = torch.zeros(self.num_items, dtype=torch.bool)
        mask[torch.from_numpy(self._rows(name, items))] = True
        return mask.to(self.leaf_items.device)

    def _masked(self, items: Tensor) -> Trie:
        """The view with only these items of it, bool ``[N]``."""
        opened = items[self.leaf_items]
        if self._allowed_before is not None:
            opened &= self._allowed_before.diff() > 0
        view, running = copy.copy(self), _running(opened)
        view._allowed_before, by_depth = running, [opened]
        starts = [0]
        for _ in range(self.depth):
            starts.append(int(self.row_offsets[starts[-1]]) + 1)
        for start, stop in zip(starts[-2::-1], starts[:0:-1], strict=True):
            edges = self.row_offsets[start : stop + 1] - self.row_offsets[start]
            opened = running[edges[1:]] > running[edges[:-1]]
            running = _running(opened)
            by_depth.append(opened)
        view.edge_tokens = torch.where(torch.cat(by_depth[::-1])[1:], self._codes, -1)
        return view

    def _leaves(self) -> Tensor:
        """The leaf of each item."""
        if "leaves" not in self._shared:
            leaves = torch.arange(self._first_leaf, self.num_nodes, device=self.leaf_items.device)
            self._shared["leaves"] = torch.empty_like(leaves).scatter_(0, self.leaf_items, leaves)
        return self._shared["leaves"]

    def _keys(self) -> Tensor:
        """(parent, code) of every edge as one ascending number: a walk down is a binary search, one up a division."""
        if "keys" not in self._shared:
            nodes = torch.arange(self.num_nodes, device=self.row_offsets.device)
            self._shared["keys"] = (nodes * self._base).repeat_interleave(self.row_offsets.diff()) + self._codes
        return self._shared["keys"]

    def _parents(self, nodes: Tensor) -> Tensor:
        return self._keys()[nodes - 1] // self._base

    def _allowed(self, leaves: Tensor) -> Tensor:
        return self._sizes(leaves) > 0

    def _sizes(self, nodes: Tensor) -> Tensor:
        """How many items a view has under these nodes."""
        first, last = nodes, nodes + 1
        for _ in range(self.depth):
            inner = first < self._first_leaf
            last = torch.where(inner, self.row_offsets[last] + 1, last)
            first = torch.where(inner, self.row_offsets[first] + 1, first)
        if self._allowed_before is None:
            return last - first
        return self._allowed_before[last - self._first_leaf] - self._allowed_before[first - self._first_leaf]


def _running(flags: Tensor) -> Tensor:
    """How many are true before each place: int64 ``[N + 1]``."""
    return torch.nn.functional.pad(flags.cumsum(0), (1, 0))


def _lexicographic(columns: list[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """The order of rows by their codes, first level first, packed into as few keys of 63 bits as hold them."""
    order, level = None, len(columns)
    while level:
        key, bits = np.zeros_like(columns[0]), 0
        while level and bits + (width := int(sizes[level - 1] - 1).bit_length()) <= 63:
            key |= columns[level - 1] << bits
            level, bits = level - 1, bits + width
        key = torch.from_numpy(key if order is None else key[order])
        found = key.sort(stable=True).indices.numpy()
        order = found if order is None else order[found]
    return order
