"""Published data sets to a catalogue: filtered, ordered in time, numbered, and looked over for what is odd."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .catalogue import Catalogue, DataError, order_lost
from .formats import read_raw
from .index_json import read_index
from .vectors import read_embeddings


class Imported(NamedTuple):
    """``catalogue``; ``warnings``, what is odd about it, in words; ``semantic_ids`` int64 [N, L], row = item id - 1,
    where the source brought an ``index.json``, else None."""

    catalogue: Catalogue
    warnings: list[str]
    semantic_ids: np.ndarray | None


def import_data(sources, format: str, *, core: int = 0, embeddings=None) -> Imported:
    """Read a published data set.

    ``sources``: files, or a folder that holds them. ``format``: "amazon2014", "amazon2018", "amazon2023" (reviews or
    ratings, and metadata), "recbole", "movielens" (100k, 1m, csv), "s3rec" (``user item item ...``), "sasrec" (``user
    item``) or "lcrec" (``X.inter.json``, ``X.item.json``, ``X.index.json``). ``core``: keep only users and items with
    at least so many interactions, among those that are kept. ``embeddings``: a file as in ``read_embeddings``, rows in
    the order of the item ids, or by the items' own ids.

    Items and users are numbered in the order of their own ids, numbers before words; ``source_ids`` keeps the items'.
    A history is ordered by time; interactions at one time keep the order of the files. Every rating counts as an
    interaction, repeated ones too; items without one are left out. Raises DataError, naming file and line, for anything
    malformed.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    if not isinstance(core, int) or core < 0:
        raise DataError(f"core={core!r} is not a whole number from 0")
    raw = read_raw(list(sources), format)
    users, user = _number(raw.users)
    items, item = _number(raw.items)
    times = np.array(raw.times) if raw.times else np.zeros(len(user))
    order = _core(user, item, core)
    if not len(order):
        raise DataError(f"no interactions are left with core={core}. Give a smaller one")
    order = order[np.lexsort((times[order], user[order]))]  # lexsort is stable: ties keep the files' order
    kept_users, user = np.unique(user[order], return_inverse=True)
    kept_items, item = np.unique(item[order], return_inverse=True)
    users, items = ([names[i] for i in kept.tolist()] for names, kept in ((users, kept_users), (items, kept_items)))
    sequences = np.split(item + 1, np.flatnonzero(np.diff(user)) + 1)
    titles = [raw.titles.get(name) or f"item {name}" for name in items]
    texts = [raw.texts.get(name) or title for name, title in zip(items, titles, strict=True)]
    name = Path(sources[0]).resolve().name.split(".")[0]
    vectors = None if embeddings is None else read_embeddings(embeddings, items)
    catalogue = Catalogue(sequences, users, len(items), texts, titles, vectors, name, items)
    notes = look_over(catalogue)
    if raw.times:
        notes += _ties(user, item, times[order])
    return Imported(catalogue, notes, None if raw.index is None else _published_ids(raw.index, items))


def look_over(catalogue: Catalogue) -> list[str]:
    """What is odd about a catalogue, in words: lost order, short histories, repeats, items without text or with that of
    others, items nobody has, embeddings that are equal or zero."""
    notes, n = [], catalogue.num_items
    if warning := order_lost(catalogue.sequences):
        notes.append(warning)
    lengths = np.array([len(sequence) for sequence in catalogue.sequences], np.int64)
    if short := int((lengths < 3).sum()):
        notes.append(
            f"{short:,} users have fewer than 3 interactions: too few to leave out one for test and validation"
        )
    again = sum(int((np.diff(sequence) == 0).sum()) for sequence in catalogue.sequences)
    if again:
        notes.append(
            f"{again:,} interactions repeat the user's one before: duplicates make the next item easy to guess"
        )
    if catalogue.sequences:
        seen = np.zeros(n + 1, bool)
        seen[np.concatenate(catalogue.sequences)] = True
        if unseen := n - int(seen[1:].sum()):
            notes.append(f"{unseen:,} items have no interactions: only content can recommend them")
    own = catalogue.source_ids or range(1, n + 1)
    untitled = sum(text == f"item {name}" for text, name in zip(catalogue.item_texts, own, strict=True))
    if untitled:
        notes.append(f"{untitled:,} items have no text: their embeddings say nothing")
    same = [text for text, count in Counter(catalogue.item_texts).items() if count > 1]
    if same:
        items = sum(count for count in Counter(catalogue.item_texts).values() if count > 1)
        notes.append(f"{items:,} items have the text of another, such as {same[0][:60]!r}: their semantic IDs collide")
    if catalogue.embeddings is not None:
        rows = np.unique(catalogue.embeddings, axis=0)
        if len(rows) < n:
            notes.append(f"{n - len(rows):,} embeddings repeat another: these items' semantic IDs collide")
        if zero := int((catalogue.embeddings == 0).all(1).sum()):
            notes.append(f"{zero:,} embeddings are zero: they say nothing")
    return notes


def describe(catalogue: Catalogue) -> list[tuple[str, str]]:
    """Names and values, in words, of what a data set holds."""
    lengths = np.array([len(sequence) for sequence in catalogue.sequences] or [0])
    facts = [
        ("users", f"{len(catalogue.users):,}"),
        ("items", f"{catalogue.num_items:,}"),
        ("interactions", f"{catalogue.num_interactions:,}"),
    ]
    if catalogue.sequences:
        counts = np.sort(np.bincount(np.concatenate(catalogue.sequences), minlength=catalogue.num_items + 1)[1:])[::-1]
        top = counts[: max(1, len(counts) // 100)].sum() / counts.sum()
        density = catalogue.num_interactions / (len(catalogue.users) * catalogue.num_items)
        facts += [
            ("density", f"{density:.4%}"),
            (
                "history",
                f"{lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}, median {np.median(lengths):.0f}",
            ),
            ("an item's interactions", f"{counts[-1]} to {counts[0]:,}, median {np.median(counts):.0f}"),
            ("share of the top 1 % of items", f"{top:.1%}"),
        ]
    words = np.mean([len(text.split()) for text in catalogue.item_texts])
    facts.append(("words in an item's text", f"{words:.1f} on average"))
    if catalogue.embeddings is not None:
        facts.append(("embeddings", f"{catalogue.embeddings.shape[1]} features"))
    return facts


def _ties(user: np.ndarray, item: np.ndarray, times: np.ndarray) -> list[str]:
    """Of interactions sorted by user and time."""
    notes = []
    tied = (np.diff(user) == 0) & (np.diff(times) == 0)
    last = np.append(np.diff(user) != 0, True)
    split = int((tied & last[1:]).sum())
    if split:
        users = int(last.sum())
        notes.append(
            f"{split:,} of {users:,} users ({split / users:.0%}) share one time on their last two interactions: the "
            "order of the files decides which is tested. Compare only with results that kept that order"
        )
    if tied.any():
        notes.append(
            f"{int(tied.sum()):,} interactions ({tied.sum() / len(user):.0%}) are at the time of the one before"
        )
    twice = len(user) - len(np.unique(np.stack([user, item, times], 1), axis=0))
    if twice:
        notes.append(f"{twice:,} interactions are there twice: same user, item and time")
    return notes


def _core(user: np.ndarray, item: np.ndarray, core: int) -> np.ndarray:
    """Numbers of the interactions left when users and items with fewer than ``core`` go, until none do."""
    left = np.arange(len(user))
    while core > 1:
        enough = np.ones(len(left), bool)
        for ids in (user[left], item[left]):
            enough &= np.bincount(ids)[ids] >= core if len(ids) else enough
        if enough.all():
            break
        left = left[enough]
    return left


def _number(names: list[str]) -> tuple[list[str], np.ndarray]:
    """Different names in ascending order, numbers before words, and each name's place among them."""
    different = sorted(set(names), key=lambda name: (0, int(name), name) if _is_count(name) else (1, 0, name))
    place = {name: i for i, name in enumerate(different)}
    return different, np.array([place[name] for name in names], np.int64)


def _is_count(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 1000


def _published_ids(path: Path, items: list[str]) -> np.ndarray:
    ids, names = read_index(path)
    row = {name: i for i, name in enumerate(names)}
    if missing := [name for name in items if name not in row]:
        raise DataError(f"{path}: {len(missing)} of {len(items)} items have no semantic ID, such as {missing[0]!r}")
    return ids[[row[name] for name in items]]
