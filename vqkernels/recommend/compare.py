"""One comparison: semantic IDs by several methods, TIGER trained on each, baselines beside them.

Every finished row is on disk before the next one starts, and a TIGER in training keeps checkpoints, so a run that was
killed goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..data import Catalogue, DataError, save_folder
from ..data.catalogue import read_array, write_array, write_atomic
from ..semantic_ids.methods import METHODS as TOKENIZERS
from ..semantic_ids.methods import make_tokenizer
from .baselines import ContentNeighbours, Markov, Popularity
from .evaluation import METRICS, Split, drawn, leave_one_out, metrics
from .sasrec import SASRec
from .tiger import TIGER

METHODS = TOKENIZERS | {"collaborative": "residual k-means, text + company"}
BASELINES = {
    "popularity": "most popular items",
    "markov": "first-order Markov chain",
    "content": "content neighbours",
    "sasrec": "SASRec",
}
RESULTS = "results.json"
MODEL_COLUMNS = ("collision_rate", "usage", "perplexity", "invalid_rate", "train_seconds")
TOP = 10
SEARCHED = 1000  # users, at most, whose free beams are counted


@dataclass(frozen=True)
class Settings:
    """What a comparison runs with; part of the results, and what a resumed run must share."""

    seed: int = 0
    levels: int = 3
    codebook_size: int = 256
    epochs: int = 6
    batch_size: int = 32
    lr: float = 3e-3
    d_model: int = 64
    d_ff: int = 1024  # where the model keeps which codes make an item
    heads: int = 2
    layers: int = 2
    dropout: float = 0.0
    max_history: int = 30
    window: int = 20
    beams: int = 50
    free_beams: int = 10
    test_users: int = 0  # so many are drawn; 0: all

    def tiger(self) -> dict:
        names = ("d_model", "d_ff", "heads", "layers", "dropout", "max_history", "window")
        return {name: getattr(self, name) for name in names}


def check_methods(methods) -> list[str]:
    """The methods without repetition; "all" stands for all. DataError for an unknown one."""
    if list(methods) == ["all"]:
        return list(METHODS)
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise DataError(f"unknown method {', '.join(unknown) or '(none given)'}; there are: all, {', '.join(METHODS)}")
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
        self.split = split_of(catalogue, asdict(settings))
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
        self.results = {"settings": asdict(settings), "data": data, "machine": _machine(), "seconds": 0.0, "rows": []}
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

    def finished(self, method: str, seed: int | None) -> bool:
        return any((row["method"], row["seed"]) == (method, seed) for row in self.rows)

    def baselines(self, seed: int, progress=None) -> None:
        """Adds the baseline rows that are not there yet: SASRec of this seed, and those that need none.
        ``progress(share_done, loss)`` hears how far SASRec is, which alone takes long."""
        items, train = self.catalogue.num_items, self.split.train
        made = {
            ("popularity", None): lambda: Popularity(items).fit(train),
            ("markov", None): lambda: Markov(items).fit(train),
            ("content", None): lambda: ContentNeighbours(self.catalogue.embeddings),
            ("sasrec", seed): lambda: SASRec(items, seed=seed).fit(
                train, validation=self.split.validation, progress=progress
            ),
        }
        for (name, its_seed), make in made.items():
            if not self.finished(name, its_seed):
                began = time.perf_counter()
                model = make()
                seconds = time.perf_counter() - began
                top, _ = model.recommend_batch(self.split.test.histories, TOP)
                extra = dict.fromkeys(MODEL_COLUMNS) | {"train_seconds": seconds}
                if name == "sasrec":
                    extra["training"] = model.history
                self._add(name, its_seed, top, extra, "baseline", began)

    def run(self, method: str, seed: int, progress=None, tokens=None) -> dict:
        """Tokenizes, trains, evaluates and adds a row. ``progress(stage, share_done, note)`` hears how far it is.
        ``tokens`` is passed to the tokenizer's fit as its progress (False: silence)."""
        say = progress or (lambda stage, share, note="": None)
        s, folder, start = self.settings, method_folder(self.out, method, seed), time.perf_counter()
        say("semantic IDs", 0.0)
        embeddings, encoder = self.catalogue.embeddings, None
        if method == "collaborative":
            from .collaborative import collaborative_embeddings

            embeddings, encoder = collaborative_embeddings(self.catalogue, self.split.train, seed, progress=tokens)
        name = "rkmeans" if method == "collaborative" else method
        tokenizer = make_tokenizer(name, s.levels, s.codebook_size, seed)
        tokenizer.fit(embeddings, progress=tokens)
        tokenizer.save(folder / "tokenizer", overwrite=True)
        report = tokenizer.report()

        model = TIGER(tokenizer.semantic_ids, tokenizer.codebook_sizes, **s.tiger(), seed=seed)
        model.fit(
            self.split.train,
            epochs=s.epochs,
            batch_size=s.batch_size,
            lr=s.lr,
            validation=self.split.validation,
            checkpoint=folder / "training",
            resume=True,
            progress=lambda share, loss: say("training", share, f"loss {loss:.3f}"),
        )
        seconds = sum(record["seconds"] for record in model.history)
        model.save(folder / "model")

        test = self.split.test
        top, _ = model.recommend_batch(
            test.histories,
            TOP,
            beams=max(s.beams, TOP),
            users=test.users,
            progress=lambda share: say("evaluation", share),
        )
        some = drawn(test, SEARCHED, np.random.default_rng(s.seed))
        invalid = model.invalid_rates(
            some.histories,
            (1, s.free_beams, s.beams),
            users=some.users,
            progress=lambda share: say("free beams", share),
        )
        extra = {
            "collision_rate": report["collision_rate"],
            "usage": [float(share) for share in report["usage"]],
            "perplexity": float(np.mean(report["perplexity"])),
            "invalid_rate": invalid[s.free_beams][-1],
            "invalid_rates": invalid,
            "train_seconds": seconds,
            "encoder": encoder,
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
        row = self._add(method, seed, top, extra, "tiger", start)
        shutil.rmtree(folder / "training")  # not before: a run killed in its evaluation need not train again
        return row

    def _add(self, method: str, seed: int | None, top: np.ndarray, extra: dict, kind: str, began: float) -> dict:
        row = {"method": method, "seed": seed, "kind": kind, **metrics(top, self.split.test.targets), **extra}
        row["seconds"] = time.perf_counter() - began
        folder = method_folder(self.out, method, seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_array(folder / "top10.npy", top)
        self.rows.append(row)
        self.results["seconds"] = sum(r["seconds"] for r in self.rows)
        order = [*METHODS, *BASELINES]
        self.rows.sort(key=lambda r: (order.index(r["method"]), r["seed"] or 0))
        write_atomic(self.out / RESULTS, json.dumps(self.results, indent=1).encode())
        return row


def split_of(catalogue: Catalogue, settings: dict) -> Split:
    """The data in three parts, with as many of the test users as the settings say. DataError when nothing is left to
    test on."""
    try:
        split = leave_one_out(catalogue.sequences)
    except ValueError as error:
        raise DataError(f"{catalogue.name}: {error}") from None
    count = settings.get("test_users")
    return split._replace(test=drawn(split.test, count, np.random.default_rng(settings["seed"]))) if count else split


def summary(results: dict) -> list[dict]:
    """One row per method: ``method``, ``kind``, ``seeds`` (how many), and for each column the mean over the seeds;
    ``spread`` has the standard deviations of the metrics (0 for one seed)."""
    out = []
    for method in dict.fromkeys(row["method"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["method"] == method]
        mean = {}
        for column in (*METRICS, *MODEL_COLUMNS):
            values = [row[column] for row in rows]
            mean[column] = None if values[0] is None else np.mean(values, 0).tolist()
        spread = {m: statistics.stdev(v) if len(v := [row[m] for row in rows]) > 1 else 0.0 for m in METRICS}
        out.append({"method": method, "kind": rows[0]["kind"], "seeds": len(rows), **mean, "spread": spread})
    return out


def read_results(out) -> dict:
    """``OUT/results.json``. DataError when it is missing or damaged."""
    path = Path(out) / RESULTS
    try:
        results = json.loads(path.read_text())
        if (
            not all({*METRICS, "seed"} <= row.keys() for row in results["rows"])
            or "settings" not in results
            or "data" not in results
        ):
            raise KeyError("rows without metrics, or no settings")
        return results
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Give the folder that vqkernels demo or compare wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a comparison's results ({error!r}). Run the comparison again") from None


def method_folder(out, method: str, seed: int | None) -> Path:
    """Where a row keeps its tokenizer, its model and ``top10.npy``."""
    folder = Path(out) / "methods" / method
    return folder if seed is None else folder / f"seed-{seed}"


def top_items(out, row: dict) -> np.ndarray:
    """A finished row's recommendations for the test users: item ids int64 ``[users, 10]``, best first."""
    return read_array(method_folder(out, row["method"], row["seed"]) / "top10.npy")


def _fingerprint(catalogue: Catalogue) -> str:
    digest = hashlib.sha256()
    for sequence in catalogue.sequences:
        digest.update(np.asarray(sequence, dtype=np.int64).tobytes() + b"\n")
    digest.update(np.ascontiguousarray(catalogue.embeddings, dtype=np.float32).tobytes())
    return digest.hexdigest()[:16]


def _machine() -> dict:
    from ..info import machine

    return machine()
