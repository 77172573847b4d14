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
from ..ops.checks import finite_rows
from .collisions import COLLISIONS, add_digit, collision_report, place, reassign

FORMAT = 1
DECODED = 1 << 17  # codes decoded at a time where every item is tried with every code
CHUNK = 1 << 11  # rows summed, decoded or moved at a time: they stay in the cache
CONFIG, TENSORS = "tokenizer.json", "tokenizer.safetensors"
KINDS: dict[str, type[Tokenizer]] = {}


class Tokenizer:
    """Turns item embeddings into semantic IDs: ``levels`` codes an item.

    ``fit(embeddings)`` makes the codebooks and the items' IDs; ``semantic_ids`` int64 [N, columns] are these (row =
    item id - 1), ``codebook_sizes`` how many values each column has, ``history`` the records of the training, one dict
    a step or level, and ``report()`` what came out. ``collisions`` says what becomes of items with equal codes:

    * "digit": one more column counts them, so that all IDs are different (columns = levels + 1);
    * "sinkhorn": the items of a prefix share out its codes of the last level by optimal transport, so that all IDs are
      different unless more items have a prefix than the last level has codes (columns = levels);
    * "none": they stay, and the report counts them (columns = levels).

    Embeddings are standardised: each feature's mean is taken off, and
    all are divided by one number that makes the mean variance 1. One number, because a feature's scale says how much it
    means: a scale of its own for each would turn the last components of an SVD, or dead features, into noise as strong
    as the first. The same seed gives the same IDs. All devices work; results lie on the CPU.
    """

    kind: str

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    def __init__(self, levels: int = 3, codebook_size: int = 256, seed: int = 0, collisions: str = "digit"):
        for name, value in (("levels", levels), ("codebook_size", codebook_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a whole number from 1")
        if collisions not in COLLISIONS:
            raise ValueError(f"collisions={collisions!r} is unknown. Use {', '.join(map(repr, COLLISIONS))}")
        self.levels, self.codebook_size, self.seed, self.collisions = levels, codebook_size, seed, collisions
        self.history: list[dict] = []
        self.notes: list[str] = []
        self._ids: np.ndarray | None = None

    # What a tokenizer defines. z: the standardised embeddings, float32 [N, D].

    def _fit(self, z: Tensor, progress) -> Tensor:
        """Make the codebooks, append to ``history`` and ``notes``; the codes of z, int64 [N, levels]. May overwrite z:
        a copy of a million embeddings is gigabytes."""
        raise NotImplementedError

    def _codes(self, z: Tensor) -> Tensor:
        """Codes of new items, int64 [N, levels]."""
        raise NotImplementedError

    def _decode(self, codes: Tensor) -> Tensor | None:
        """What codes [N, q] of the first q levels say z is, NaN for codes that do not exist; None where codes say
        nothing about it."""
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
        names = ("levels", "codebook_size", "seed", "collisions")
        return {name: getattr(self, name) for name in names}

    # What users call.

    def fit(self, embeddings, progress=None) -> Tokenizer:
        """Make codebooks and semantic IDs of N items from their embeddings [N, D], an array or tensor of finite floats.

        ``progress``: None (a bar on the terminal), False or a running ``rich.progress.Progress``. Returns self.
        """
        x = _rows("embeddings", embeddings)
        if not len(x):
            raise DataError("embeddings have no rows. Give one row an item")
        start = time.perf_counter()
        mean = (sum(rows.double().sum(0) for rows in x.split(CHUNK)) / len(x)).float()
        # the square of a small or large float32 may leave its range
        scale = (sum((rows - mean).double().square_().sum() for rows in x.split(CHUNK)) / x.numel()).sqrt()
        self._mean, self._scale = mean.cpu(), torch.where(scale > 0, scale, 1.0).float().cpu()
        self._fingerprints = _fingerprints(x)
        self.history, self.notes = [], []
        codes = self._fit(self._standardise(x), progress).cpu().numpy()
        if self.collisions == "sinkhorn":
            codes = reassign(codes, lambda rows: self._last_costs(x, codes, rows))
        self._ids = add_digit(codes) if self.collisions == "digit" else codes
        self._report = self._make_report(x, codes, time.perf_counter() - start)
        return self

    @property
    def semantic_ids(self) -> np.ndarray:
        """The fitted items' IDs, int64 [N, columns]."""
        self._need_fit()
        return self._ids

    @property
    def codebook_sizes(self) -> list[int]:
        """How many values each column of ``semantic_ids`` has; that of digits as many as the largest group."""
        digits = [int(column.max()) + 1 for column in self.semantic_ids[:, self.levels :].T]
        return self._level_sizes() + digits

    def encode(self, x):
        """IDs of embeddings [N, D]: int64 [N, columns], an array, or a tensor on x's device if x is one.

        A row that was fitted gets its item's ID (equal rows, in their order, those of the items they came from). Any
        other is a new item; no codebook and no fitted ID changes for it. Where the fitted items, or the new ones before
        it in x, have its codes already, ``collisions`` decides: "digit" gives it the next digit (beyond
        ``codebook_sizes[-1]`` where the largest group grows), "sinkhorn" the best code of the last level that is free
        under its prefix (its own, shared, where none is), "none" lets both have the same. So encode all new items in
        one call.
        """
        self._need_fit()
        rows = _rows("x", x, len(self._mean))
        items = {key: i for i, key in enumerate(_numbered(self._fingerprints))}
        fitted = np.array([items.get(key, -1) for key in _numbered(_fingerprints(rows))], np.int64)
        ids = self._ids[fitted]
        new = np.flatnonzero(fitted < 0)
        if len(new):
            fresh = rows[torch.from_numpy(new).to(rows.device)]
            codes = self._codes(self._standardise(fresh)).cpu().numpy()
            if self.collisions == "digit":
                codes = add_digit(np.concatenate([self._ids[:, : self.levels], codes]))[-len(new) :]
            elif self.collisions == "sinkhorn":
                codes = place(codes, self._ids, lambda rows: self._last_costs(fresh, codes, rows))
            ids[new] = codes
        return torch.from_numpy(ids).to(x.device) if isinstance(x, Tensor) else ids

    def codes(self, x):
        """As ``encode``, without the digit: int64 [N, levels]."""
        return self.encode(x)[:, : self.levels]

    def decode(self, codes) -> np.ndarray:
        """Embeddings float32 [N, D] that codes int64 [N, q] of the first q <= levels levels stand for, each level
        making it finer; a digit is ignored. ValueError for codes that do not exist, and for random ones."""
        self._need_fit()
        codes = torch.as_tensor(np.asarray(codes))
        if codes.dim() != 2 or codes.shape[1] == 0 or codes.is_floating_point():
            raise ValueError(f"codes: {codes.dtype} of shape {list(codes.shape)}; integers of shape [N, q] are needed")
        codes = codes[:, : self.levels]
        sizes = torch.tensor(self._level_sizes()[: codes.shape[1]])
        wrong = ((codes < 0) | (codes >= sizes)).any(1).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(f"codes: row {row} is {codes[row].tolist()}; the levels have {sizes.tolist()} codes")
        decoded = self._decode(codes.long())
        if decoded is None:
            raise ValueError(f"the codes of a {self.kind} tokenizer say nothing about the embedding")
        absent = decoded.isnan().any(1).nonzero().flatten()
        if len(absent):
            raise ValueError(f"codes: row {int(absent[0])} is {codes[absent[0]].tolist()}; no item has that prefix")
        return (decoded * self._scale + self._mean).numpy()

    def report(self) -> dict:
        """What came out of fitting N items.

        ``unique_fraction``, ``collision_rate``, ``largest_group``, ``group_sizes`` of the level codes as in
        ``collision_report``; a list with one number a level for ``codebook_sizes``, ``usage`` (share of the codewords
        that some item has), ``perplexity`` and ``entropy`` (nats) of that use, and ``energy``: share of the embeddings'
        energy around their mean that the codes up to that level reconstruct, 1 is all of it (None for random codes);
        ``reconstruction_error``: 1 minus the energy of all levels, the mean squared error of the standardised features;
        ``train_seconds``; ``notes``: list of what is worth knowing, such as codebooks smaller than asked for, or
        codewords that no item has.
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
        return (x - self._mean.to(x.device)).div_(self._scale.to(x.device))

    def _last_costs(self, x: Tensor, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Squared error of x[rows] standardised, with each code of the last level in place of its own:
        [len(rows), K]."""
        k = self._level_sizes()[-1]
        if len(rows) * k > DECODED and len(rows) > 1:
            halves = np.array_split(rows, 2)
            return np.concatenate([self._last_costs(x, codes, half) for half in halves])
        z = self._standardise(x[torch.from_numpy(rows).to(x.device)])
        every = torch.from_numpy(codes[rows]).to(z.device).repeat_interleave(k, 0)
        every[:, -1] = torch.arange(k, device=z.device).repeat(len(rows))
        decoded = self._decode(every)
        if decoded is None:  # every code is as good as another, so that an item's own is as good as any
            return 1.0 - np.eye(k)[codes[rows, -1]]
        error = (decoded.view(len(rows), k, -1) - z.unsqueeze(1)).square().sum(-1)
        return error.nan_to_num(torch.inf).double().cpu().numpy()

    def _make_report(self, x: Tensor, codes: np.ndarray, seconds: float) -> dict:
        sizes, levels = self._level_sizes(), torch.from_numpy(codes)
        use = [codebook_usage(column, size) for column, size in zip(levels.T, sizes, strict=True)]
        energy = self._energy(x, levels.to(x.device))
        collisions, notes = collision_report(codes), list(self.notes)
        for level, u in enumerate(use, 1):
            if (dead := int(u.dead.sum())) > 0:
                notes.append(f"level {level}: {dead} of {sizes[level - 1]} codewords belong to no item")
        if self.collisions != "digit" and (same := round(collisions["collision_rate"] * len(codes))):
            notes.append(f"{same} items share their ID with another. collisions='digit' tells all apart")
        return collisions | {
            "codebook_sizes": sizes,
            "usage": [float(u.used) for u in use],
            "perplexity": [float(u.perplexity) for u in use],
            "entropy": [float(u.entropy) for u in use],
            "energy": energy,
            "reconstruction_error": None if energy is None else 1 - energy[-1],
            "train_seconds": seconds,
            "notes": notes,
        }

    def _energy(self, x: Tensor, codes: Tensor) -> list[float] | None:
        left = [0.0] * self.levels
        for rows, own in zip(map(self._standardise, x.split(CHUNK)), codes.split(CHUNK), strict=True):
            for level in range(self.levels):
                decoded = self._decode(own[:, : level + 1])
                if decoded is None:
                    return None
                left[level] += float((rows - decoded).square_().sum())
        return [1 - error / x.numel() for error in left]


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
    x = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.require(x, requirements="CW"))
    if not x.is_floating_point() or x.dim() != 2 or x.shape[1] == 0:
        raise DataError(
            f"{name}: {x.dtype} of shape {list(x.shape)}; floats of shape [N, D] are needed, one row an item"
        )
    if features is not None and x.shape[1] != features:
        raise DataError(
            f"{name}: {x.shape[1]} features, but the tokenizer was fitted on {features}. Use the same embedding model"
        )
    if len(bad := (~finite_rows(x)).nonzero().flatten()):
        raise DataError(
            f"{name}: row {int(bad[0])} holds NaN or infinity, and so do {len(bad) - 1} other rows. "
            "Embeddings must be finite"
        )
    return x.float()


def _fingerprints(x: Tensor) -> np.ndarray:
    """One int64 a row that tells rows apart, by their bits (-0 counts as 0)."""
    digest = lambda row: hashlib.blake2b(row, digest_size=8).digest()  # noqa: E731
    rows = (row for part in x.split(CHUNK) for row in (part + 0.0).cpu().contiguous().numpy())
    return np.frombuffer(b"".join(map(digest, rows)), "<i8").astype(np.int64)


def _numbered(values: np.ndarray):
    """(value, how many times it came before) for each value: equal rows stay apart."""
    seen: Counter = Counter()
    for value in values.tolist():
        yield value, seen[value]
        seen[value] += 1
