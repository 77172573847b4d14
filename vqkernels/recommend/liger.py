"""LIGER: TIGER with a dense head, so that items nobody has bought yet can be recommended.

Yang et al. 2024, "Unifying Generative and Dense Retrieval for Sequential Recommendation" (arXiv 2411.18814). The same
decoder state that begins the next item's semantic ID is also a query: its cosine with each item's text embedding ranks
items, new ones among them. (The paper adds the text embeddings to the input as well; here the input is TIGER's.)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .tiger import TIGER

NEGATIVES = 4096  # items that a target is told from, at most
WAYS = ("hybrid", "dense", "generative")


class LIGER(TIGER):
    """A TIGER whose decoder also says what the next item's text is like.

    Args:
        semantic_ids, codebook_sizes, options: as in ``TIGER``.
        embeddings: text embeddings ``[num_items, D]``, row = item id - 1; items that no training sequence has may have
            one too, and are the ones that can be found by it alone.
        dense_weight: of the dense loss beside the mean cross entropy per code.
        temperature: cosines are divided by it in the dense loss.
    """

    GIVEN = ("embeddings",)

    def __init__(self, semantic_ids, embeddings, codebook_sizes=None, *, dense_weight=1.0, temperature=0.07, **options):
        super().__init__(semantic_ids, codebook_sizes, **options)
        text = torch.as_tensor(np.asarray(embeddings, dtype=np.float32))
        if text.ndim != 2 or len(text) != self.num_items or not text.isfinite().all():
            raise ValueError(
                f"embeddings are {list(text.shape)}; finite [num_items = {self.num_items}, D] are needed, row = item "
                "id - 1"
            )
        if not dense_weight > 0 or not temperature > 0:
            raise ValueError(f"dense_weight is {dense_weight} and temperature {temperature}; both must be above 0")
        self.dense_weight, self.temperature = dense_weight, temperature
        self._config |= {"dense_weight": dense_weight, "temperature": temperature}
        self.register_buffer("text", nn.functional.normalize(text, dim=1), persistent=False)
        width = self.t5.config.d_model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.query = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, text.shape[1]))
        self.eval()

    def _given(self) -> dict[str, Tensor]:
        return {"embeddings": self.text.cpu().contiguous()}

    def fit(self, sequences, **options) -> LIGER:
        """As in ``TIGER``; only items that the sequences have are negatives of the dense loss."""
        sequences = [self._checked(s) for s in sequences]
        self._known = torch.from_numpy(np.unique(np.concatenate(sequences))).to(self.device) if sequences else None
        return super().fit(sequences, **options)

    def forward(self, past: Tensor, target: Tensor, users: Tensor | None = None) -> Tensor:
        hidden, target = self._states(past, target, users)
        drawn = self._known
        if len(drawn) > NEGATIVES:
            drawn = drawn[torch.randint(len(drawn), (NEGATIVES,), device=drawn.device)]
        query = nn.functional.normalize(self.query(hidden[:, 0]), dim=1)
        right = (query * self.text[target - 1]).sum(1, keepdim=True)
        others = (query @ self.text[drawn - 1].T).masked_fill(drawn == target.unsqueeze(1), -torch.inf)
        logits = torch.cat([right, others], 1).float() / self.temperature
        dense = nn.functional.cross_entropy(logits, torch.zeros_like(target))
        return self._code_loss(hidden, target) + self.dense_weight * dense

    @torch.inference_mode()
    def recommend_batch(
        self,
        histories,
        k: int = 10,
        *,
        way: str = "hybrid",
        cold_items=(),
        beams: int = 50,
        exclude_seen: bool = True,
        users=None,
        batch_size: int = 64,
        progress=None,
        **options,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` best items of each history, as ids int64 ``[B, k]`` (0 = none), and their scores.

        Args:
            way: "hybrid": the ``beams`` items that beam search writes and all ``cold_items``, ranked by cosine;
                "dense": the whole catalogue, ranked by cosine; "generative": as TIGER does.
            cold_items: ids that are candidates whatever the beam search writes.
            The rest as in ``TIGER``.
        """
        if way not in WAYS:
            raise ValueError(f"way is {way!r}; allowed: {', '.join(map(repr, WAYS))}")
        common = {"users": users, "batch_size": batch_size, "progress": progress}
        if way == "generative":
            return super().recommend_batch(histories, k, beams=beams, exclude_seen=exclude_seen, **common, **options)
        histories, cold = [self._checked(h) for h in histories], self._checked(cold_items)
        written = None
        if way == "hybrid":
            written, _ = super().recommend_batch(
                histories, beams, beams=beams, exclude_seen=exclude_seen, **common, **options
            )
        items = np.zeros((len(histories), k), dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        width = min(k, self.num_items)
        for rows, group, who in self._groups(histories, users, batch_size):
            source, tokens = self.context(group, who)
            hidden = self._decode(source, tokens)[:, -1]
            cosine = nn.functional.normalize(self.query(hidden), dim=1) @ self.text.T
            if written is not None:
                candidate = torch.zeros(len(rows), self.num_items + 1, dtype=torch.bool, device=self.device)
                candidate.scatter_(1, torch.from_numpy(written[rows]).to(self.device), True)
                candidate[:, torch.from_numpy(cold).to(self.device)] = True
                cosine = cosine.masked_fill(~candidate[:, 1:], -torch.inf)
            if exclude_seen:
                for row, history in enumerate(group):
                    cosine[row, torch.from_numpy(history - 1).to(self.device)] = -torch.inf
            best, column = cosine.topk(width, dim=1)
            items[rows, :width] = torch.where(best > -torch.inf, column + 1, 0).cpu().numpy()
            scores[rows, :width] = best.float().cpu().numpy()
        return items, scores
