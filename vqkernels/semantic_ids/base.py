"""What all tokenizers share: fitting on a catalogue's embeddings, encoding, reports, saving and loading."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.catalogue import DataError, write_atomic
from ..ops import codebook_usage
from .collisions import add_digit, collision_report

FORMAT = 1
CONFIG, TENSORS = "tokenizer.json", "tokenizer.safetensors"
KINDS: dict[str, type[Tokenizer]] = {}


class Tokenizer:
    """Turns item embeddings into semantic IDs: ``levels`` codes an item, and one digit that tells equal codes apart.

    ``fit(embeddings)`` makes the codebooks and the items' IDs; ``semantic_ids`` int64 [N, levels + 1] are these (row =
    item id - 1), ``codebook_sizes`` how many values each column has, ``history`` the records of the training, one dict
    a step or level, and ``report()`` what came out. Embeddings are standardised: each feature's mean is taken off, and
    all are divided by one number that makes the mean variance 1. One number, because a feature's scale says how much it
    means: a scale of its own for each would turn the last components of an SVD, or dead features, into noise as strong
    as the first. The same seed gives the same IDs. All devices work; results lie on the CPU.
    """

    kind: str

    def __init_subclass__(cls) -> None:
        KINDS[cls.kind] = cls

    def __init__(self, levels: int = 3, codebook_size: int = 256, seed: int = 0):
        for name, value in (("levels", levels), ("codebook_size", codebook_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a whole number from 1")
        self.levels, self.codebook_size, self.seed = levels, codebook_size, seed
        self.history: list[dict] = []
        self.notes: list[str] = []
        self._ids: np.ndarray | None = None

    # What a tokenizer defines. z: the standardised embeddings, float32 [N, D].

    def _fit(self, z: Tensor, progress) -> None:
        """Make the codebooks; append to ``history`` and ``notes``."""
        raise NotImplementedError

    def _codes(self, z: Tensor) -> Tensor:
        """int64 [N, levels]."""
        raise NotImplementedError

    def _reconstruct(self, z: Tensor) -> Tensor | None:
        """What the codes of z say z is, or None where codes say nothing about it."""
        return None

    def _level_sizes(self) -> list[int]:
        return [self.codebook_size] * self.levels

    def _state(self) -> dict[str, Tensor]:
        """What ``_codes`` needs, to be saved."""
        return {}

    def _restore(self, state: dict[str, Tensor]) -> None:
        pass

    def _config(self) -> dict:
        """The constructor's arguments."""
        return {"levels": self.levels, "codebook_size": self.codebook_size, "seed": self.seed}

    # What users call.

    def fit(self, embeddings, progress=None) -> Tokenizer:
        """Make codebooks and semantic IDs of N items from their embeddings [N, D], an array or tensor of finite floats.

        ``progress``: None (a bar on the terminal), False or a running ``rich.progress.Progress``. Returns self.
        """
        x = _rows("embeddings", embeddings)
        if not len(x):
            raise DataError("embeddings have no rows. Give one row an item")
        start = time.perf_counter()
        variance, mean = torch.var_mean(x.double(), 0, correction=0)
        scale = variance.mean().sqrt()
        self._mean, self._scale = mean.float().cpu(), torch.where(scale > 0, scale, 1.0).float().cpu()
        self._fingerprints = _fingerprints(x)
        self.history, self.notes = [], []
        z = self._standardise(x)
        self._fit(z, progress)
        codes = self._codes(z).cpu()
        self._ids = add_digit(codes.numpy())
        self._report = self._make_report(z, codes, time.perf_counter() - start)
        return self

    @property
    def semantic_ids(self) -> np.ndarray:
        """The fitted items' IDs, int64 [N, levels + 1], all different."""
        self._need_fit()
        return self._ids

    @property
    def codebook_sizes(self) -> list[int]:
        """How many values each column of ``semantic_ids`` has; the last is the largest group of equal codes."""
        return [*self._level_sizes(), int(self.semantic_ids[:, -1].max()) + 1]

    def encode(self, x):
        """IDs of embeddings [N, D]: int64 [N, levels + 1], an array, or a tensor on x's device if x is one.

        A row that was fitted gets its item's ID (equal rows, in their order, those of the items they came from). Any
        other is a new item: its level codes, and the next digit that is free after the fitted items and the new ones
        before it in x. So encode all new items in one call, and expect digits beyond ``codebook_sizes[-1]`` where a
        group of equal codes grows.
        """
        self._need_fit()
        rows = _rows("x", x, len(self._mean))
        items = {key: i for i, key in enumerate(_numbered(self._fingerprints))}
        fitted = np.array([items.get(key, -1) for key in _numbered(_fingerprints(rows))], np.int64)
        ids = self._ids[fitted]
        new = np.flatnonzero(fitted < 0)
        if len(new):
            codes = self._codes(self._standardise(rows[torch.from_numpy(new).to(rows.device)])).cpu().numpy()
            ids[new] = add_digit(np.concatenate([self._ids[:, :-1], codes]))[-len(new) :]
        return torch.from_numpy(ids).to(x.device) if isinstance(x, Tensor) else ids

    def codes(self, x):
        """As ``encode``, without the digit: int64 [N, levels]."""
        return self.encode(x)[:, :-1]

    def report(self) -> dict:
        """What came out of fitting N items.

        ``unique_fraction``, ``collision_rate``, ``largest_group`` as in ``collision_report``; a list with one number a
        level for ``codebook_sizes``, ``usage`` (share of the codewords that some item has), ``perplexity`` and
        ``entropy`` (nats) of that use; ``reconstruction_error``: mean squared error of the standardised features, so 1
        is no better than the mean (None for random codes); ``train_seconds``; ``notes``: list of what is worth knowing,
        such as codebooks smaller than asked for.
        """
        self._need_fit()
        return dict(self._report)

    def save(self, path, overwrite: bool = False) -> Path:
        """Write ``tokenizer.json`` and ``tokenizer.safetensors`` into a folder; ``load_tokenizer`` reads them back."""
        self._need_fit()
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file; a folder is needed. Give another path")
        if (folder / CONFIG).exists() and not overwrite:
            raise DataError(f"{folder} holds a tokenizer already. Give another path, or overwrite=True to replace it")
        state = {
            "mean": self._mean,
            "scale": self._scale,
            "semantic_ids": torch.from_numpy(self._ids),
            "fingerprints": torch.from_numpy(self._fingerprints),
        }
        state |= {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in self._state().items()}
        data = _safetensors().save(state)
        config = {
            "format": FORMAT,
            "kind": self.kind,
            "arguments": self._config(),
            "report": self._report,
            "history": self.history,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / TENSORS, data)
        write_atomic(folder / CONFIG, json.dumps(config, indent=1).encode())
        return folder

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._config().items())})"

    def _need_fit(self) -> None:
        if self._ids is None:
            raise RuntimeError(
                f"this {type(self).__name__} is not fitted. Call fit(embeddings) first, or load_tokenizer(folder)"
            )

    def _standardise(self, x: Tensor) -> Tensor:
        return (x - self._mean.to(x.device)) / self._scale.to(x.device)

    def _make_report(self, z: Tensor, codes: Tensor, seconds: float) -> dict:
        sizes = self._level_sizes()
        use = [codebook_usage(column, size) for column, size in zip(codes.T, sizes, strict=True)]
        reconstruction = self._reconstruct(z)
        error = None if reconstruction is None else float((z - reconstruction).double().square().mean())
        return collision_report(codes.numpy()) | {
            "codebook_sizes": sizes,
            "usage": [float(u.used) for u in use],
            "perplexity": [float(u.perplexity) for u in use],
            "entropy": [float(u.entropy) for u in use],
            "reconstruction_error": error,
            "train_seconds": seconds,
            "notes": list(self.notes),
        }


def load_tokenizer(path) -> Tokenizer:
    """Read a tokenizer that ``save`` wrote. DataError when a file is missing, damaged or of another format."""
    folder = Path(path)
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {' and '.join(missing)} missing. Give the folder that a tokenizer's save() wrote")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        version, kind, arguments = config["format"], config["kind"], config["arguments"]
        report, history, expected = config["report"], config["history"], config["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / CONFIG}: not a tokenizer's description ({error!r}). Save the tokenizer again"
        ) from None
    if version != FORMAT or kind not in KINDS:
        raise DataError(
            f"{folder / CONFIG}: format {version!r}, kind {kind!r}; this version reads format {FORMAT} and the kinds "
            f"{', '.join(KINDS)}. Fit the tokenizer again, or use the version that saved it"
        )
    data = (folder / TENSORS).read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise DataError(
            f"{folder / TENSORS}: damaged, or not the file that belongs to {CONFIG}. Save the tokenizer again"
        )
    try:
        state = _safetensors().load(data)
        tokenizer = KINDS[kind](**arguments)
        tokenizer._mean, tokenizer._scale = state.pop("mean"), state.pop("scale")
        tokenizer._ids, tokenizer._fingerprints = state.pop("semantic_ids").numpy(), state.pop("fingerprints").numpy()
        tokenizer._report, tokenizer.history, tokenizer.notes = report, history, report["notes"]
        tokenizer._restore({name.removeprefix("model."): tensor for name, tensor in state.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{folder}: its two files do not describe a {kind} tokenizer ({error!r}). Save it again"
        ) from None
    return tokenizer


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("saving and loading tokenizers needs safetensors. Run: pip install safetensors") from None
    return safetensors.torch


def _rows(name: str, x, features: int | None = None) -> Tensor:
    """Embeddings as a float32 tensor [N, D], checked."""
    x = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))
    if not x.is_floating_point() or x.dim() != 2 or x.shape[1] == 0:
        raise DataError(
            f"{name}: {x.dtype} of shape {list(x.shape)}; floats of shape [N, D] are needed, one row an item"
        )
    if features is not None and x.shape[1] != features:
        raise DataError(
            f"{name}: {x.shape[1]} features, but the tokenizer was fitted on {features}. Use the same embedding model"
        )
    bad = (~x.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise DataError(
            f"{name}: row {int(bad[0])} holds NaN or infinity, and so do {len(bad) - 1} other rows. "
            "Embeddings must be finite"
        )
    return x.float()


def _fingerprints(x: Tensor) -> np.ndarray:
    """One int64 a row that tells rows apart, by their bits (-0 counts as 0)."""
    rows = np.ascontiguousarray((x + 0.0).cpu().numpy())
    return np.array(
        [int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little", signed=True) for row in rows], np.int64
    )


def _numbered(values: np.ndarray):
    """(value, how many times it came before) for each value: equal rows stay apart."""
    seen: Counter = Counter()
    for value in values.tolist():
        yield value, seen[value]
        seen[value] += 1
