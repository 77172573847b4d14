"""Item embeddings from what a text says and from the company an item keeps.

The recipe of the OneRec technical report (arXiv 2506.13695) at the scale of one machine: a few learned queries read the
token states of a frozen text model; their outputs make the embedding. Items that were chosen near each other are drawn
together by a contrastive loss (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748), and a decoder that has to write
the text from the same outputs keeps the content in them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.catalogue import DataError, write_atomic
from ..data.progress import progress_bar
from ..data.text import STATE_TOKENS, TokenStates, token_states
from ..models.resampler import CaptionDecoder, Resampler

CONFIG, WEIGHTS = "collaborative.json", "collaborative.safetensors"
PARTNERS = 4  # drawn for an item each time that it is taken
NEAR = 3  # places apart in a sequence at which two items still keep company
BATCH = 512  # texts per step of encode


class CollaborativeEncoder:
    """Item texts to embeddings that also know which items are chosen together.

    Args:
        width: of the queries and of the embedding.
        queries: learned vectors that read a text.
        depth, heads, dropout: of the resampler; the captions' decoder has one block of half the width.
        temperature: of the contrastive loss.
        contrastive_weight, caption_weight: what each loss counts in the sum; 0 leaves it out.
        seed: fixes initial weights, batches and dropout. The same seed, machine, thread count and torch give the same
            embeddings.

    ``history`` holds one record per epoch of ``fit``.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        queries: int = 4,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        temperature: float = 0.1,
        contrastive_weight: float = 1.0,
        caption_weight: float = 1.0,
        seed: int = 0,
    ):
        self._config = {name: value for name, value in locals().items() if name != "self"}
        if min(width, queries, depth, heads) < 1 or width % (2 * heads):
            raise ValueError(
                f"width {width}, queries {queries}, depth {depth}, heads {heads}; 1 or more each, and width a multiple "
                "of twice the heads"
            )
        if not 0 <= dropout < 1 or temperature <= 0:
            raise ValueError(f"dropout {dropout}, temperature {temperature}; 0 <= dropout < 1 and temperature > 0")
        if min(contrastive_weight, caption_weight) < 0 or contrastive_weight + caption_weight <= 0:
            raise ValueError(
                f"contrastive_weight {contrastive_weight}, caption_weight {caption_weight}; neither below 0, and one "
                "above it"
            )
        self.temperature, self.weights, self.seed = temperature, (contrastive_weight, caption_weight), seed
        self.device, self.history = torch.device("cpu"), []
        self.net: _Network | None = None

    def to(self, device) -> CollaborativeEncoder:
        """Where to train and encode; the text model itself runs on the CPU."""
        self.device = torch.device(device)
        if self.net is not None:
            self.net.to(self.device)
        return self

    def fit(
        self,
        texts,
        sequences,
        *,
        epochs: int | None = None,
        batch_size: int = 256,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        progress=None,
    ) -> CollaborativeEncoder:
        """Trains with AdamW, the learning rate rising and then falling as a cosine.

        Two items are a positive pair if they are at most three places apart in a sequence; an item's partners are
        drawn in proportion to how often that was so. No item is a negative of itself or of any of its positives, drawn
        or not. Items that were in no sequence learn from the caption loss alone.

        Args:
            texts: of items 1 to N.
            sequences: item ids, oldest first, of the training part only.
            epochs: each takes every item once, with four drawn partners where it has any. By default 30, fewer for
                more than 1,666 items (50,000 visits of items in all), 8 at the least.
            batch_size: items per step, their partners not counted.
            warmup: share of all steps in which the learning rate rises.
            progress: as in ``progress_bar``.

        Raises:
            DataError: for texts that are not strings, item ids without a text, or sequences without a pair.
            ImportError: where the package of the text model is missing.
        """
        return self._fit(
            token_states(texts, progress), sequences, epochs, batch_size, lr, weight_decay, warmup, progress
        )

    def _fit(
        self, texts: TokenStates, sequences, epochs=None, batch_size=256, lr=3e-3, weight_decay=0.01, warmup=0.1,
        progress=None,
    ) -> CollaborativeEncoder:  # fmt: skip
        items = len(texts.starts) - 1
        epochs = max(8, min(30, 50_000 // items)) if epochs is None else epochs
        if epochs < 1 or batch_size < 2 or not 0 < warmup < 1:
            raise ValueError(
                f"epochs {epochs}, batch_size {batch_size}, warmup {warmup}; at least 1, at least 2 (an item needs "
                "others to be told from), between 0 and 1"
            )
        pairs = Pairs(sequences, items)
        vocabulary = np.unique(texts.pieces)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net = _Network(texts.states.shape[1], torch.from_numpy(vocabulary), self._config).to(self.device)
        groups = [{"params": [p for p in self.net.parameters() if (p.ndim > 1) == matrix]} for matrix in (True, False)]
        groups[1]["weight_decay"] = 0.0
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
        rng, steps, self.history = np.random.default_rng(self.seed), -(-items // batch_size), []
        with torch.random.fork_rng(), progress_bar(progress, "collaborative encoder", epochs * steps) as advance:
            torch.manual_seed(self.seed)
            for epoch in range(epochs):
                self.net.train()
                began, losses = time.perf_counter(), []
                for step, anchors in enumerate(np.array_split(rng.permutation(items), steps)):
                    done = (epoch + (step + 0.5) / steps) / epochs
                    fall = 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - warmup) / (1 - warmup))
                    for group in optimizer.param_groups:
                        group["lr"] = lr * min(done / warmup, fall)
                    both = self._losses(texts, anchors, pairs, rng)
                    optimizer.zero_grad(set_to_none=True)
                    sum(weight * loss for weight, loss in zip(self.weights, both, strict=True)).backward()
                    nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                    optimizer.step()
                    losses.append([float(loss.detach()) for loss in both])
                    advance()
                contrastive, caption = np.mean(losses, 0).tolist()
                self.history.append(
                    {
                        "epoch": epoch + 1,
                        "contrastive_loss": contrastive,
                        "caption_loss": caption,
                        "seconds": time.perf_counter() - began,
                    }
                )
        self.net.eval()
        return self

    def _losses(self, texts: TokenStates, anchors: np.ndarray, pairs: Pairs, rng) -> tuple[Tensor, Tensor]:
        """Contrastive and caption loss of one batch of items (from 0)."""
        paired = pairs.degree[anchors] > 0
        firsts = np.repeat(anchors[paired], PARTNERS)
        seconds = pairs.draw(firsts, rng)
        read = np.concatenate([anchors, np.setdiff1d(seconds, anchors)])  # each text is read once
        queries, place = self._read(texts, read), np.empty(len(texts.starts), dtype=np.int64)
        place[read] = np.arange(len(read))
        contrastive = caption = 0.0 * queries.sum()  # a batch may hold nothing to learn from
        if self.weights[0] and len(firsts):
            unit = self.net.embedding(queries)
            logits = unit[place[firsts]] @ unit[place[seconds]].T / self.temperature
            contrastive = info_nce(logits, torch.from_numpy(pairs.related(firsts, seconds)).to(self.device))
        if self.weights[1]:
            caption = sum(
                nn.functional.cross_entropy(*self._captions(texts, anchors[rows], queries[rows]), reduction="sum")
                for rows in _like_lengths(texts, anchors)
            ) / int((np.diff(texts.starts)[anchors] - 1).sum())
        return contrastive, caption

    def _read(self, texts: TokenStates, rows: np.ndarray) -> Tensor:
        """The queries' outputs ``[B, queries, width]`` for some texts."""
        parts = _like_lengths(texts, rows)
        read = torch.cat([self.net.resampler(*self._states(texts, rows[part])) for part in parts])
        return read[torch.from_numpy(np.argsort(np.concatenate(parts))).to(self.device)]

    def _padded(self, texts: TokenStates, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of some texts: where in ``texts`` their pieces are, int64 ``[B, T]``, and which of them are real."""
        first, size = texts.starts[rows], texts.starts[rows + 1] - texts.starts[rows]
        columns = np.arange(size.max())
        real = columns < size[:, None]
        return np.where(real, first[:, None] + columns, 0), real

    def _states(self, texts: TokenStates, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        where, real = self._padded(texts, rows)
        states = torch.from_numpy(texts.states[where]).to(self.device).float()
        return states, torch.from_numpy(real).to(self.device)

    def _captions(self, texts: TokenStates, rows: np.ndarray, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every piece of some texts after its first, and which piece it is; −100 for one of a new text that
        the vocabulary lacks, as cross_entropy knows it."""
        where, real = self._padded(texts, rows)
        vocabulary = self.net.vocabulary.cpu().numpy()
        pieces = np.searchsorted(vocabulary, texts.pieces[where]).clip(max=len(vocabulary) - 1)
        target = np.where(vocabulary[pieces] == texts.pieces[where], pieces, -100)
        pieces, target, mask = (torch.from_numpy(array).to(self.device) for array in (pieces, target, real))
        return self.net.decoder(queries, pieces, mask), target[:, 1:][mask[:, 1:]]

    def encode(self, texts, progress=None) -> np.ndarray:
        """Embeddings of texts, trained on or new: float32 ``[N, width]``, rows of unit length."""
        self._need_fit()
        return self._encode(token_states(texts, progress))

    @torch.inference_mode()
    def _encode(self, texts: TokenStates) -> np.ndarray:
        out = [
            self.net.embedding(self.net.resampler(*self._states(texts, rows))).cpu().numpy()
            for rows in _chunks(len(texts.starts) - 1)
        ]
        return np.concatenate(out)

    def caption_accuracy(self, texts, progress=None) -> tuple[float, float]:
        """The share of word pieces that the decoder names, given the ones before and the text's own outputs; and given
        the outputs of the next text instead, which is what the language alone tells it."""
        self._need_fit()
        return self._caption_accuracy(token_states(texts, progress))

    @torch.inference_mode()
    def _caption_accuracy(self, texts: TokenStates) -> tuple[float, float]:
        items, right, pieces = len(texts.starts) - 1, np.zeros(2), 0
        for rows in _chunks(items):
            for place, source in enumerate((rows, (rows + 1) % items)):
                logits, target = self._captions(texts, rows, self.net.resampler(*self._states(texts, source)))
                right[place] += int((logits.argmax(1) == target).sum())
            pieces += len(target)
        return tuple((right / max(pieces, 1)).tolist())

    def save(self, path) -> Path:
        """Writes ``collaborative.json`` and ``collaborative.safetensors`` into a folder, each whole or not at all."""
        from safetensors.torch import save

        self._need_fit()
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        data = save({name: value.cpu().contiguous() for name, value in self.net.state_dict().items()})
        config = {
            "format": 1,
            "arguments": self._config,
            "history": self.history,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(folder / WEIGHTS, data)
        write_atomic(folder / CONFIG, json.dumps(config, indent=1).encode())
        return folder

    @classmethod
    def load(cls, path) -> CollaborativeEncoder:
        """Reads what ``save`` wrote. DataError when a file is missing or damaged."""
        from safetensors.torch import load

        folder = Path(path)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise DataError(
                f"{folder}: {' and '.join(missing)} missing. Give the folder that CollaborativeEncoder.save() wrote"
            )
        try:
            config, data = json.loads((folder / CONFIG).read_bytes()), (folder / WEIGHTS).read_bytes()
            if hashlib.sha256(data).hexdigest() != config["sha256"]:
                raise ValueError(f"{WEIGHTS} is damaged, or not the file that belongs to {CONFIG}")
            state, encoder = load(data), cls(**config["arguments"])
            features = state["resampler.project.1.weight"].shape[1]
            encoder.net = _Network(features, state["vocabulary"], encoder._config).eval()
            encoder.net.load_state_dict(state)
            encoder.history = config["history"]
        except Exception as error:  # safetensors raises its own class for damaged files
            raise DataError(f"{folder}: not a whole saved encoder ({error!r}). Train and save it again") from None
        return encoder

    def _need_fit(self) -> None:
        if self.net is None:
            raise RuntimeError(
                "this CollaborativeEncoder is not fitted. Call fit(texts, sequences) first, or "
                "CollaborativeEncoder.load(folder)"
            )


def collaborative_embeddings(catalogue, train_sequences, seed: int = 0, progress=None) -> tuple[np.ndarray, dict]:
    """Embeddings of a catalogue's items, float32 ``[N, D]``, by a :class:`CollaborativeEncoder` fitted on its texts and
    the training sequences, and a report: ``embedding`` (in words), ``train_seconds``, ``parameters``, ``pairs``
    (different positive pairs), ``unpaired_items``, ``caption_accuracy`` as in the method, ``training`` (the history).
    """
    began = time.perf_counter()
    encoder = CollaborativeEncoder(seed=seed).fit(catalogue.item_texts, train_sequences, progress=progress)
    embeddings = encoder.encode(catalogue.item_texts)
    pairs = Pairs(train_sequences, catalogue.num_items)
    return embeddings, {
        "embedding": f"semantic + collaborative, {embeddings.shape[1]} features (token states of all-MiniLM-L6-v2)",
        "train_seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in encoder.net.parameters()),
        "pairs": len(pairs.others) // 2,
        "unpaired_items": int((pairs.degree == 0).sum()),
        "caption_accuracy": encoder.caption_accuracy(catalogue.item_texts),
        "training": encoder.history,
    }


class Pairs:
    """Which items keep company: both directions of every pair, ordered by item.

    Args:
        sequences: item ids from 1, oldest first.
        items: how many there are; they count from 0 here.

    ``degree``: different partners of each item, ``[items]``. ``others``: all partners, item by item.
    """

    def __init__(self, sequences, items: int):
        sequences = [np.asarray(s) for s in sequences]
        flat = np.concatenate([s for s in sequences if s.size] or [np.zeros(0, np.int64)])
        if flat.ndim != 1 or not np.issubdtype(flat.dtype, np.integer):
            raise DataError(f"sequences hold {flat.dtype} of {flat.ndim} dimensions; give lists of item ids")
        wrong = flat[(flat < 1) | (flat > items)]
        if len(wrong):
            raise DataError(
                f"a sequence holds item {wrong[0]}, but there are {items} texts; item ids run from 1 to that"
            )
        owner = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
        keys = [np.zeros(0, np.int64)]
        for apart in range(1, NEAR + 1):
            a, b = flat[:-apart].astype(np.int64) - 1, flat[apart:].astype(np.int64) - 1
            near = (owner[:-apart] == owner[apart:]) & (a != b)
            keys += [a[near] * items + b[near], b[near] * items + a[near]]
        self.keys, counts = np.unique(np.concatenate(keys), return_counts=True)
        if not len(self.keys):
            raise DataError(
                f"{len(sequences)} sequences hold no two different items near each other, so there is nothing to draw "
                "together. Give the training part of the histories"
            )
        self.items, self.others = items, self.keys % items
        self.starts = np.searchsorted(self.keys // items, np.arange(items + 1))
        self.degree = np.diff(self.starts)
        self.until = np.cumsum([0, *counts])

    def draw(self, rows: np.ndarray, rng) -> np.ndarray:
        """One partner of each item, in proportion to how often the two were near each other."""
        low, high = self.until[self.starts[rows]], self.until[self.starts[rows + 1]]
        return self.others[np.searchsorted(self.until, rng.integers(low, high), "right") - 1]

    def related(self, firsts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """bool ``[len(firsts), len(seconds)]``: the same item, or a positive pair."""
        a, row = np.unique(firsts, return_inverse=True)  # items are drawn more than once
        b, column = np.unique(seconds, return_inverse=True)
        keys = a[:, None] * self.items + b
        found = self.keys[np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)] == keys
        return (found | (a[:, None] == b))[row][:, column]


def info_nce(logits: Tensor, related: Tensor) -> Tensor:
    """Symmetric InfoNCE. ``logits`` ``[n, n]``: row i against the partner of row j, its own where i = j; ``related``
    bool ``[n, n]``: what is no negative of that row, whatever the diagonal says."""
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(related & ~own, -math.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


class _Network(nn.Module):
    """Resampler, embedding of its outputs, and the captions' decoder over the word pieces that the catalogue has."""

    def __init__(self, features: int, vocabulary: Tensor, config: dict):
        super().__init__()
        sizes = {name: config[name] for name in ("width", "queries", "heads", "dropout")}
        self.register_buffer("vocabulary", vocabulary)
        self.resampler = Resampler(features, depth=config["depth"], **sizes)
        self.head = nn.Linear(sizes["queries"] * sizes["width"], sizes["width"])
        self.decoder = CaptionDecoder(len(vocabulary), longest=STATE_TOKENS, **sizes)

    def embedding(self, queries: Tensor) -> Tensor:
        return nn.functional.normalize(self.head(queries.flatten(1)), dim=-1)


def _like_lengths(texts: TokenStates, rows: np.ndarray, size: int = 64) -> list[np.ndarray]:
    """Places in ``rows`` with the shortest texts, the next ones, ...: little of a batch is padding then."""
    order = np.argsort(np.diff(texts.starts)[rows], kind="stable")
    return np.split(order, range(size, len(order), size))


def _chunks(items: int) -> list[np.ndarray]:
    return np.array_split(np.arange(items), -(-items // BATCH))
