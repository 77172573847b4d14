"""One comparison: semantic IDs by several methods, TIGER trained on each, baselines beside them.

Every finished row is on disk before the next one starts, so a run that was killed goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..data import Catalogue, DataError, save_folder
from ..data.catalogue import read_array, write_array, write_atomic
from ..semantic_ids.methods import METHODS, make_tokenizer
from .baselines import ContentNeighbours, Markov, Popularity
from .evaluation import METRICS, leave_one_out, metrics
from .sasrec import SASRec
from .tiger import TIGER

BASELINES = {
    "popularity": "most popular items",
    "markov": "first-order Markov chain",
    "content": "content neighbours",
    "sasrec": "SASRec",
}
RESULTS = "results.json"
MODEL_COLUMNS = ("collision_rate", "usage", "perplexity", "invalid_rate", "train_seconds")
TOP = 10


@dataclass(frozen=True)
class Settings:
    """What a comparison runs with; part of the results, and what a resumed run must share."""

    seed: int = 0
    levels: int = 3
    codebook_size: int = 256
    epochs: int = 10
    batch_size: int = 32
    lr: float = 3e-3
    d_model: int = 64
    d_ff: int = 128
    heads: int = 2
    layers: int = 2
    dropout: float = 0.0
    max_history: int = 30
    window: int = 20
    beams: int = 50
    free_beams: int = 10

    def tiger(self) -> dict:
        names = ("d_model", "d_ff", "heads", "layers", "dropout", "max_history", "window", "seed")
        return {name: getattr(self, name) for name in names}


def check_methods(methods) -> list[str]:
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise DataError(f"unknown method {', '.join(unknown) or '(none given)'}; there are: {', '.join(METHODS)}")
    return list(dict.fromkeys(methods))


class Comparison:
    """Runs rows and keeps ``OUT/results.json``.

    Args:
        catalogue: items and histories, with embeddings.
        out: folder for everything that is written.
        embedding: in words, what made the embeddings.
        resume: keep the finished rows of an earlier run in ``out``; it must have had the same data and settings.
    """

    def __init__(
        self, catalogue: Catalogue, out, settings: Settings, *, embedding: str = "given", resume: bool = False
    ):
        if catalogue.embeddings is None:
            raise DataError(f"{catalogue.name} has no embeddings; embed its texts first (vqkernels.data.embed_texts)")
        try:
            self.split = leave_one_out(catalogue.sequences)
        except ValueError as error:
            raise DataError(f"{catalogue.name}: {error}") from None
        self.catalogue, self.out, self.settings = catalogue, Path(out), settings
        found = self.out / RESULTS
        data = {
            "name": catalogue.name,
            "users": len(catalogue.sequences),
            "items": catalogue.num_items,
            "interactions": int(catalogue.num_interactions),
            "test_users": len(self.split.test.targets),
            "embedding": embedding,
            "fingerprint": _fingerprint(catalogue),
        }
        self.results = {"settings": asdict(settings), "data": data, "machine": _machine(), "rows": []}
        if resume and found.is_file():
            before = read_results(self.out)
            for part in ("settings", "data"):
                ours = self.results[part]
                differ = [
                    f"{k}: {before[part].get(k)!r} then, {v!r} now" for k, v in ours.items() if before[part].get(k) != v
                ]
                if differ:
                    raise DataError(
                        f"{found} is of another run and cannot be resumed ({part}: {'; '.join(differ)}). "
                        "Give the same data and settings, or another --out"
                    )
            self.results = before
        self.out.mkdir(parents=True, exist_ok=True)
        save_folder(catalogue, self.out / "catalogue", overwrite=True)

    @property
    def rows(self) -> list[dict]:
        return self.results["rows"]

    def finished(self, method: str) -> bool:
        return any(row["method"] == method for row in self.rows)

    def baselines(self, progress=None) -> None:
        """Adds the baseline rows. ``progress(share_done, loss)`` hears how far SASRec is, which alone takes long."""
        items, train = self.catalogue.num_items, self.split.train
        made = {
            "popularity": lambda: Popularity(items).fit(train),
            "markov": lambda: Markov(items).fit(train),
            "content": lambda: ContentNeighbours(self.catalogue.embeddings),
            "sasrec": lambda: SASRec(items, seed=self.settings.seed).fit(
                train, validation=self.split.validation, progress=progress
            ),
        }
        for name, make in made.items():
            if not self.finished(name):
                began = time.perf_counter()
                model = make()
                seconds = time.perf_counter() - began
                top, _ = model.recommend_batch(self.split.test.histories, TOP)
                self._add(name, top, dict.fromkeys(MODEL_COLUMNS) | {"train_seconds": seconds}, kind="baseline")

    def run(self, method: str, progress=None, tokens=None) -> dict:
        """Tokenizes, trains, evaluates and adds a row. ``progress(stage, share_done, note)`` hears how far it is.
        ``tokens`` is passed to the tokenizer's fit as its progress (False: silence)."""
        say = progress or (lambda stage, share, note="": None)
        s, folder = self.settings, method_folder(self.out, method)
        say("semantic IDs", 0.0)
        tokenizer = make_tokenizer(method, s.levels, s.codebook_size, s.seed)
        tokenizer.fit(self.catalogue.embeddings, progress=tokens)
        tokenizer.save(folder / "tokenizer", overwrite=True)
        report = tokenizer.report()

        began = time.perf_counter()
        model = TIGER(tokenizer.semantic_ids, tokenizer.codebook_sizes, **s.tiger())
        model.fit(
            self.split.train,
            epochs=s.epochs,
            batch_size=s.batch_size,
            lr=s.lr,
            validation=self.split.validation,
            progress=lambda share, loss: say("training", share, f"loss {loss:.3f}"),
        )
        seconds = time.perf_counter() - began
        model.save(folder / "model")

        test = self.split.test
        top, _ = model.recommend_batch(
            test.histories,
            TOP,
            beams=max(s.beams, TOP),
            users=test.users,
            progress=lambda share: say("evaluation", share),
        )
        invalid = model.invalid_rates(
            test.histories,
            (1, s.free_beams, s.beams),
            users=test.users,
            progress=lambda share: say("free beams", share),
        )
        extra = {
            "collision_rate": report["collision_rate"],
            "usage": float(np.mean(report["usage"])),
            "perplexity": float(np.mean(report["perplexity"])),
            "invalid_rate": invalid[s.free_beams][-1],
            "invalid_rates": invalid,
            "train_seconds": seconds,
            "tokenizer": report,
            "tokenizer_history": tokenizer.history,
            "training": model.history,
            "parameters": sum(p.numel() for p in model.parameters()),
            "codebook_sizes": [int(n) for n in tokenizer.codebook_sizes],
            "semantic_id_example": [int(c) for c in tokenizer.semantic_ids[0]],
            "code_counts": [np.bincount(column).tolist() for column in tokenizer.semantic_ids[:, :-1].T],
            "group_sizes": np.bincount(
                np.unique(tokenizer.semantic_ids[:, :-1], axis=0, return_counts=True)[1]
            ).tolist(),
        }
        return self._add(method, top, extra, kind="tiger")

    def _add(self, method: str, top: np.ndarray, extra: dict, kind: str) -> dict:
        row = {"method": method, "kind": kind, **metrics(top, self.split.test.targets), **extra}
        method_folder(self.out, method).mkdir(parents=True, exist_ok=True)
        write_array(method_folder(self.out, method) / "top10.npy", top)
        self.rows.append(row)
        order = [*METHODS, *BASELINES]
        self.rows.sort(key=lambda r: order.index(r["method"]))
        write_atomic(self.out / RESULTS, json.dumps(self.results, indent=1).encode())
        return row


def read_results(out) -> dict:
    """``OUT/results.json``. DataError when it is missing or damaged."""
    path = Path(out) / RESULTS
    try:
        results = json.loads(path.read_text())
        if (
            not all(set(METRICS) <= row.keys() for row in results["rows"])
            or "settings" not in results
            or "data" not in results
        ):
            raise KeyError("rows without metrics, or no settings")
        return results
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Give the folder that vqkernels demo or compare wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a comparison's results ({error!r}). Run the comparison again") from None


def method_folder(out, method: str) -> Path:
    """Where a row keeps its tokenizer, its model and ``top10.npy``."""
    return Path(out) / "methods" / method


def top_items(out, method: str) -> np.ndarray:
    """A finished row's recommendations for the test users: item ids int64 ``[users, 10]``, best first."""
    return read_array(method_folder(out, method) / "top10.npy")


def _fingerprint(catalogue: Catalogue) -> str:
    digest = hashlib.sha256()
    for sequence in catalogue.sequences:
        digest.update(np.asarray(sequence, dtype=np.int64).tobytes() + b"\n")
    digest.update(np.ascontiguousarray(catalogue.embeddings, dtype=np.float32).tobytes())
    return digest.hexdigest()[:16]


def _machine() -> dict:
    from ..info import machine

    return machine()
