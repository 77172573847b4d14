"""SASRec: self-attention over the history, a score for every item. The strong baseline that is no semantic ID.

Kang and McAuley 2018 (arXiv 1808.09781), trained with the cross entropy over the whole catalogue in place of one
negative an item: Klenitskiy and Vasilev 2023 (arXiv 2309.07602) find that this made up the published gap to BERT4Rec.
"""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
from torch import Tensor, nn

from .baselines import Baseline
from .evaluation import JUDGED, Queries, drawn, metrics


class SASRec(Baseline):
    """Scores from a causal transformer over the latest items, whose item embeddings are the output's too.

    Args:
        num_items: items have ids from 1 to this.
        d_model, heads, layers, dropout: sizes of the transformer.
        max_history: how many of the latest items it looks at.
        seed: fixes initial weights, batches and dropout.

    ``history`` holds one record per epoch of ``fit``.
    """

    def __init__(
        self,
        num_items: int,
        *,
        d_model: int = 64,
        heads: int = 2,
        layers: int = 2,
        dropout: float = 0.2,
        max_history: int = 50,
        seed: int = 0,
    ):
        if d_model % heads or min(num_items, layers, max_history) < 1:
            raise ValueError(
                f"num_items {num_items}, layers {layers} and max_history {max_history} must be at least 1, and d_model "
                f"{d_model} a multiple of heads {heads}"
            )
        self.num_items, self.max_history, self.seed, self.history = num_items, max_history, seed, []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = _Transformer(num_items, d_model, heads, layers, dropout, max_history)

    def to(self, device) -> SASRec:
        self.net.to(device)
        return self

    def fit(
        self,
        sequences,
        *,
        epochs: int = 30,
        batch_size: int = 128,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        patience: int = 5,
        validation: Queries | None = None,
        progress=None,
    ) -> SASRec:
        """Trains on sequences (item ids from 1, oldest first; those of one item teach nothing) with AdamW.

        Args:
            epochs: each shows the latest ``max_history + 1`` items of every sequence once.
            batch_size: sequences per step.
            patience: epochs without a better NDCG@10 on ``validation`` after which training stops; 0: never.
            validation: up to 2,000 of these queries, drawn by the seed, judge every epoch, and the best epoch's
                weights are kept.
            progress: called as ``progress(share_done, loss)`` after each step.
        """
        kept = [np.asarray(s, dtype=np.int64)[-self.max_history - 1 :] for s in sequences if len(s) > 1]
        if not kept or epochs < 1 or batch_size < 1:
            raise ValueError(
                f"{len(kept)} sequences of two items and more, epochs {epochs}, batch_size {batch_size}; each must be "
                "at least 1"
            )
        rng, device = np.random.default_rng(self.seed), self.net.items.weight.device
        judged = None if validation is None else drawn(validation, JUDGED, rng)
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        best, waited, self.history = None, 0, []
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for epoch in range(epochs):
                self.net.train()
                began, losses = time.perf_counter(), []
                batches = _like_lengths(kept, batch_size, rng)
                for step, rows in enumerate(batches):
                    items = _padded([kept[i] for i in rows]).to(device)
                    loss = self.net.loss(items[:, :-1], items[:, 1:])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
                    if progress:
                        progress((epoch + (step + 1) / len(batches)) / epochs, losses[-1])
                record = {"epoch": epoch + 1, "loss": float(np.mean(losses)), "seconds": time.perf_counter() - began}
                self.history.append(record)
                if judged is not None:
                    top, _ = self.recommend_batch(judged.histories)
                    record["validation_ndcg"] = metrics(top, judged.targets)["NDCG@10"]
                    waited += 1
                    if best is None or record["validation_ndcg"] > best[0]:
                        best, waited = (record["validation_ndcg"], copy.deepcopy(self.net.state_dict())), 0
                    if patience and waited >= patience:
                        break
        if best is not None:
            self.net.load_state_dict(best[1])
        return self

    @torch.inference_mode()
    def scores(self, histories):
        """float64 ``[B, num_items]``; the same for all items after an empty history."""
        self.net.eval()
        latest = [np.asarray(h, dtype=np.int64)[-self.max_history :] for h in histories]
        lengths = torch.tensor([max(len(h), 1) for h in latest])
        items = _padded([h if len(h) else np.zeros(1, dtype=np.int64) for h in latest])
        device = self.net.items.weight.device
        hidden = self.net(items.to(device))[torch.arange(len(items)), lengths.to(device) - 1]
        scores = (hidden @ self.net.items.weight[1:].T).double().cpu().numpy()
        scores[[not len(h) for h in latest]] = 0.0
        return scores


class _Transformer(nn.Module):
    def __init__(self, num_items: int, d_model: int, heads: int, layers: int, dropout: float, max_history: int):
        super().__init__()
        self.items = nn.Embedding(num_items + 1, d_model, padding_idx=0)
        self.places = nn.Embedding(max_history, d_model)
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=d_model**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, heads, 4 * d_model, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d_model)

    def forward(self, items: Tensor) -> Tensor:
        """Item ids ``[B, T]``, 0 = padding behind -> states ``[B, T, d_model]``. No state sees what comes after it, so
        padding needs no mask."""
        length = items.shape[1]
        x = self.dropout(self.items(items) + self.places.weight[:length])
        later = torch.ones(length, length, dtype=torch.bool, device=items.device).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=later)
        return self.norm(x)

    def loss(self, items: Tensor, following: Tensor) -> Tensor:
        real = following > 0
        logits = self(items)[real] @ self.items.weight[1:].T
        return nn.functional.cross_entropy(logits, following[real] - 1)


def _padded(sequences: list[np.ndarray]) -> Tensor:
    out = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, items in enumerate(sequences):
        out[row, : len(items)] = items
    return torch.from_numpy(out)


def _like_lengths(sequences: list[np.ndarray], batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches of rows with like lengths, so that little is padding, in random order."""
    order = np.lexsort([rng.random(len(sequences)), [len(s) for s in sequences]])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]
