"""Leave-one-out evaluation with full ranking.

The last item of a sequence is the test target and the one before it the validation target; the rest is training. Every
method ranks the whole catalogue. Items of the user's history are never recommended, by any method: on data where users
repeat items such a repeat is a miss for all of them alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CUTOFFS = {"HR": (1, 5, 10), "NDCG": (5, 10)}
JUDGED = 2000  # validation users, at most, who decide which epoch's weights are kept
METRICS = tuple(f"{name}@{k}" for name, cutoffs in CUTOFFS.items() for k in cutoffs)


class Queries(NamedTuple):
    """Histories to recommend for, the item that came next in each, and the number of the user's sequence."""

    histories: list[np.ndarray]
    targets: np.ndarray
    users: np.ndarray


class Split(NamedTuple):
    train: list[np.ndarray]
    validation: Queries
    test: Queries


def leave_one_out(sequences) -> Split:
    """Splits each sequence (item ids, oldest first). Those shorter than 3 items are training only.

    Raises:
        ValueError: when no sequence has 3 items.
    """
    sequences = [np.asarray(s, dtype=np.int64) for s in sequences]
    users = np.array([i for i, s in enumerate(sequences) if len(s) >= 3], dtype=np.int64)
    if not len(users):
        raise ValueError(
            "no sequence has 3 items, so nothing is left to test on; leave-one-out needs at least one that has"
        )

    def queries(back: int) -> Queries:
        return Queries([sequences[i][:-back] for i in users], np.array([sequences[i][-back] for i in users]), users)

    return Split([s[:-2] if len(s) >= 3 else s for s in sequences], queries(2), queries(1))


def drawn(queries: Queries, count: int, rng: np.random.Generator) -> Queries:
    """At most ``count`` of the queries, drawn by ``rng``, in their order."""
    rows = np.sort(rng.permutation(len(queries.targets))[:count])
    return Queries([queries.histories[i] for i in rows], queries.targets[rows], queries.users[rows])


def metrics(items, targets) -> dict[str, float]:
    """HR@1/5/10 and NDCG@5/10 of ranked lists.

    Args:
        items: item ids ``[B, k]``, best first, ``k >= 10``; 0 = no item.
        targets: the item to find, ``[B]``.
    """
    items, targets = np.asarray(items), np.asarray(targets)
    widest = max(max(c) for c in CUTOFFS.values())
    if items.ndim != 2 or items.shape[1] < widest or targets.shape != items.shape[:1] or not len(items):
        raise ValueError(
            f"items {list(items.shape)} and targets {list(targets.shape)}; "
            f"expected [B, k] with k >= {widest}, and [B], B > 0"
        )
    hits = items == targets[:, None]
    rank = np.where(hits.any(1), hits.argmax(1), widest)  # 0 = best; a list holds an item at most once
    gain = 1 / np.log2(rank + 2)
    found = {"HR": lambda k: rank < k, "NDCG": lambda k: np.where(rank < k, gain, 0.0)}
    return {f"{name}@{k}": float(found[name](k).mean()) for name, cutoffs in CUTOFFS.items() for k in cutoffs}


def evaluate(recommender, queries: Queries, **options) -> dict[str, float]:
    """:func:`metrics` of the top 10 that ``recommender.recommend_batch(histories, k, **options)`` returns first."""
    items, _ = recommender.recommend_batch(queries.histories, 10, **options)
    return metrics(items, queries.targets)


class ColdSplit(NamedTuple):
    """``cold_items``: ids that no training or validation sequence and no history has. The test queries whose target is
    one of them, ``cold``, and the others, ``in_set``."""

    train: list[np.ndarray]
    validation: Queries
    in_set: Queries
    cold: Queries
    cold_items: np.ndarray


def cold_split(sequences, *, share: float = 0.05, seed: int = 0, cold_items=None) -> ColdSplit:
    """Leave-one-out with items that appear after training.

    They vanish from training, validation and all histories; what a test user did with one last is what the cold test
    asks for (Rajput et al. 2023, section 4.3). Users left without a history or a target are left out.

    Args:
        sequences: item ids, oldest first.
        share: of the different test targets; so many are drawn by ``seed`` to be cold.
        cold_items: these ids instead, such as the newest of a catalogue.

    Raises:
        ValueError: for a share outside (0, 1), or when no test query is left of either kind.
    """
    sequences = [np.asarray(s, dtype=np.int64) for s in sequences]
    targets = np.unique([s[-1] for s in sequences if len(s) >= 3])
    if cold_items is None:
        if not 0 < share < 1:
            raise ValueError(f"share is {share}; a number between 0 and 1 is needed")
        count = max(1, round(share * len(targets)))
        cold_items = np.random.default_rng(seed).permutation(targets)[:count]
    cold_items = np.unique(np.asarray(cold_items, dtype=np.int64))
    warm = [s[~np.isin(s, cold_items)] for s in sequences]

    def queries(wanted) -> Queries:
        rows = [i for i, s in enumerate(sequences) if len(s) >= 3 and wanted(i)]
        return Queries(
            [warm[i] if sequences[i][-1] in known else warm[i][:-1] for i in rows],
            np.array([sequences[i][-1] for i in rows], dtype=np.int64),
            np.array(rows, dtype=np.int64),
        )

    known = set(cold_items.tolist())
    cold = queries(lambda i: sequences[i][-1] in known and len(warm[i]))
    in_set = queries(lambda i: sequences[i][-1] not in known and len(warm[i]) > 1)
    if not len(cold.targets) or not len(in_set.targets):
        raise ValueError(
            f"{len(cold.targets)} test users end with a cold item and {len(in_set.targets)} with another; both kinds "
            "are needed. Choose other cold items, or another share"
        )
    last = np.array([len(s) >= 3 and s[-1] not in known for s in sequences])
    before = [s[:-1] if drop else s for s, drop in zip(warm, last, strict=True)]  # without the test targets
    rows = [i for i, s in enumerate(before) if len(s) >= 3]
    validation = Queries([before[i][:-1] for i in rows], np.array([before[i][-1] for i in rows]), np.array(rows))
    train = [s[:-1] if len(s) >= 3 else s for s in before]
    return ColdSplit(train, validation, in_set, cold, cold_items)
