"""The baselines that any model is printed beside: cheap, honest and strong."""

from __future__ import annotations

import numpy as np

BATCH = 256


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of each row's ``k`` highest scores, best first, equal ones by the lowest column. int64 ``[B, k]``."""
    cut = np.partition(scores, -k, axis=1)[:, -k, None]
    above, at = scores > cut, scores == cut
    room = k - above.sum(1, keepdims=True)
    columns = np.nonzero(above | (at & (np.cumsum(at, 1) <= room)))[1].reshape(len(scores), k)
    order = np.argsort(-np.take_along_axis(scores, columns, 1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1)


class Baseline:
    """A score for every item given a history. ``num_items`` items with ids from 1."""

    num_items: int

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """float64 ``[B, num_items]``, column = item id − 1; −inf = never recommend."""
        raise NotImplementedError

    def recommend_batch(self, histories, k: int = 10, *, exclude_seen: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` best items of each history, as ids int64 ``[B, k]`` (0 = none left), and their scores."""
        width = min(k, self.num_items)
        items = np.zeros((len(histories), k), dtype=np.int64)
        best = np.full((len(histories), k), -np.inf)
        for start in range(0, len(histories), BATCH):
            rows = [np.asarray(h, dtype=np.int64) for h in histories[start : start + BATCH]]
            scores = self.scores(rows)
            if exclude_seen:
                for row, history in enumerate(rows):
                    scores[row, history - 1] = -np.inf
            columns = top_k(scores, width)
            value = np.take_along_axis(scores, columns, 1)
            items[start : start + BATCH, :width] = np.where(value > -np.inf, columns + 1, 0)
            best[start : start + BATCH, :width] = value
        return items, best


class Popularity(Baseline):
    """The items with most interactions in the training sequences, the same for everybody."""

    def __init__(self, num_items: int):
        self.num_items = num_items

    def fit(self, sequences) -> Popularity:
        self.counts = np.bincount(np.concatenate(sequences) - 1, minlength=self.num_items).astype(np.float64)
        return self

    def scores(self, histories):
        return np.tile(self.counts, (len(histories), 1))


class Markov(Popularity):
    """What followed the last item most often in training; popularity breaks ties and is the back-off."""

    def fit(self, sequences) -> Markov:
        super().fit(sequences)
        pairs = np.concatenate([(s[:-1] - 1) * self.num_items + s[1:] - 1 for s in sequences])
        pairs, self._times = np.unique(pairs, return_counts=True)
        self._follower = pairs % self.num_items
        self._start = np.searchsorted(pairs // self.num_items, np.arange(self.num_items + 1))
        return self

    def scores(self, histories):
        scores = super().scores(histories) / (self.counts.sum() + 1)  # below 1, the least that a pair counts
        for row, history in enumerate(histories):
            if len(history):
                edges = slice(self._start[history[-1] - 1], self._start[history[-1]])
                scores[row, self._follower[edges]] += self._times[edges]
        return scores


class ContentNeighbours(Baseline):
    """The items whose embeddings have the highest cosine with the last item's; none for an empty history."""

    def __init__(self, embeddings):
        embeddings = np.asarray(embeddings, dtype=np.float32)
        self.unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        self.num_items = len(embeddings)

    def scores(self, histories):
        last = np.array([h[-1] - 1 if len(h) else -1 for h in histories])
        scores = (self.unit[last] @ self.unit.T).astype(np.float64)
        scores[last < 0] = -np.inf
        return scores
