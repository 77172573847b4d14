"""Semantic IDs in the form that LC-Rec and LETTER exchange them: {"item": ["<a_1>", "<b_2>", ...], ...}."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

import numpy as np

from .catalogue import DataError, write_atomic
from .lines import fail, read_json


def write_index(path, semantic_ids, items: Sequence | None = None) -> Path:
    """Write semantic IDs int64 [N, L] (L <= 26, no negative ones) under the items' names, by default 1 to N. The
    layout's own projects count items from 0: give them ``items=range(N)``. DataError for other shapes and names."""
    ids, path = np.asarray(semantic_ids), Path(path)
    items = range(1, len(ids) + 1) if items is None else items
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not 1 <= ids.shape[1] <= 26 or (ids.size and ids.min() < 0):
        raise DataError(
            f"semantic_ids: {ids.dtype} of shape {list(ids.shape)}; integers from 0, [N, 1 to 26], are needed"
        )
    tokens = {
        str(item): [f"<{letter}_{code}>" for letter, code in zip(ascii_lowercase, row, strict=False)]
        for item, row in zip(items, ids.tolist(), strict=False)
    }
    if len(items) != len(ids) or len(tokens) != len(ids):
        raise DataError(
            f"{len(ids)} semantic IDs, {len(items)} items of {len(tokens)} different names; give each one name"
        )
    write_atomic(path, json.dumps(tokens, indent=0).encode())
    return path


def read_index(path) -> tuple[np.ndarray, list[str]]:
    """Read semantic IDs: int64 [N, L], and the items' names, in ascending order of the numbers where all names are
    numbers, else in the file's. IDs of several lengths, as where only colliding items have a digit, are filled up with
    0. DataError, naming file and line, for anything else."""
    path = Path(path)
    record, lines = read_json(path)
    rows = []
    for item, tokens in record.items():
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            fail(path, lines.of(item), f"item {item!r} has no list of tokens", 'A value is ["<a_1>", "<b_2>", ...]')
        codes = [re.fullmatch(r"<([a-z])_([0-9]{1,9})>", token) for token in tokens]
        for place, (token, code) in enumerate(zip(tokens, codes, strict=True)):
            if not code or code[1] != ascii_lowercase[place : place + 1]:
                form = f"<{ascii_lowercase[min(place, 25)]}_NUMBER>"
                fail(path, lines.of(item), f"item {item!r} has token {token!r} at place {place + 1}", f"Write {form}")
        rows.append([int(code[2]) for code in codes if code])
    if not rows:
        raise DataError(f"{path}: no items")
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int64)
    items = list(record)
    if all(item.isascii() and item.isdigit() for item in items):
        order = sorted(range(len(items)), key=lambda i: int(items[i]))
        ids, items = ids[order], [items[i] for i in order]
    return ids, items
