"""Items that appear after training, in one table: who can recommend them, and what that costs on the others."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..data import Catalogue, DataError
from ..data.catalogue import write_atomic
from ..info import machine
from ..pages import figure, png
from .baselines import ContentNeighbours, Markov, Popularity
from .compare import Settings, make_tokenizer
from .evaluation import METRICS, cold_split, metrics
from .liger import LIGER
from .sasrec import SASRec
from .tiger import TIGER

ROWS = {
    "popularity": "most popular items",
    "markov": "first-order Markov chain",
    "content": "content neighbours",
    "sasrec": "SASRec",
    "tiger": "TIGER",
    "liger-generative": "LIGER, beam search alone",
    "liger-dense": "LIGER, dense head alone",
    "liger-hybrid": "LIGER, beams and cold items by the dense head",
}
PARTS = ("in_set", "cold")
TOP = 10


def cold_start(
    catalogue: Catalogue, out, settings: Settings, *, method="rkmeans", share=0.05, seeds=1, progress=None
) -> dict:
    """Hides a share of the test targets' items from training, runs every row of ``ROWS`` and keeps ``OUT/results.json``
    and ``OUT/cold_start.png``.

    The tokenizer is fitted on the items that are left; the hidden ones are encoded without retraining, and are in the
    trie.

    Args:
        catalogue: items and histories, with embeddings.
        method: of the semantic IDs, as in ``make_tokenizer``.
        share: as in ``cold_split``.
        seeds: runs, with seeds ``settings.seed``, + 1, ...: of hidden items, codes, weights and batches.
        progress: called as ``progress(share_done, note)``.

    Returns:
        ``{"settings", "machine", "data", "rows": [{"row", "seed", "in_set": {...}, "cold": {...}, "seconds"}]}``, the
        metrics those of ``METRICS``.
    """
    if catalogue.embeddings is None:
        raise DataError(f"{catalogue.name} has no embeddings; embed its texts first (vqkernels.data.embed_texts)")
    out, say = Path(out), progress or (lambda share_done, note: None)
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "settings": asdict(settings) | {"method": method, "share": share, "seeds": seeds},
        "machine": machine(),
        "data": {"name": catalogue.name, "users": len(catalogue.sequences), "items": catalogue.num_items},
        "rows": [],
    }
    for run in range(seeds):
        try:
            split = cold_split(catalogue.sequences, share=share, seed=settings.seed + run)
        except ValueError as error:
            raise DataError(f"{catalogue.name}: {error}") from None
        results["data"] |= {"cold_items": len(split.cold_items), "cold_users": len(split.cold.targets)}
        stages = _models(catalogue, split, settings, method, settings.seed + run)
        for name, recommend, seconds in stages(lambda done, note, run=run: say((run + done) / seeds, note)):
            row = {"row": name, "seed": settings.seed + run, "seconds": seconds}
            for part in PARTS:
                queries = getattr(split, part)
                row[part] = metrics(recommend(queries), queries.targets)
            results["rows"].append(row)
            write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
    write_atomic(out / "cold_start.png", _draw(results))
    return results


def _models(catalogue, split, settings, method, seed):
    """A generator of (row, queries -> top items, seconds of training) that hears ``say(share_done, note)``."""

    def stages(say):
        num_items, embeddings = catalogue.num_items, np.asarray(catalogue.embeddings, dtype=np.float32)
        for name, make in (
            ("popularity", lambda: Popularity(num_items).fit(split.train)),
            ("markov", lambda: Markov(num_items).fit(split.train)),
            ("content", lambda: ContentNeighbours(embeddings)),
        ):
            model, seconds = _timed(make)
            yield name, lambda q, m=model: m.recommend_batch(q.histories, TOP)[0], seconds

        def hear(first, last, what):
            return lambda done, loss: say(first + (last - first) * done, f"{what}, loss {loss:.3f}")

        model, seconds = _timed(
            lambda: SASRec(num_items, seed=seed).fit(
                split.train, validation=split.validation, progress=hear(0.0, 0.2, "SASRec")
            )
        )
        yield "sasrec", lambda q: model.recommend_batch(q.histories, TOP)[0], seconds

        say(0.2, "semantic IDs")
        warm = np.setdiff1d(np.arange(1, num_items + 1), split.cold_items)
        tokenizer = make_tokenizer(method, settings.levels, settings.codebook_size, seed)
        tokenizer.fit(embeddings[warm - 1], progress=False)
        ids = np.asarray(tokenizer.encode(embeddings))
        options = settings.tiger() | {"seed": seed}
        training = {"epochs": settings.epochs, "batch_size": settings.batch_size, "lr": settings.lr}
        beams = max(settings.beams, TOP)
        for name, make, first, last in (
            ("tiger", lambda: TIGER(ids, **options), 0.2, 0.55),
            ("liger", lambda: LIGER(ids, embeddings, **options), 0.55, 1.0),
        ):
            model, seconds = _timed(
                lambda make=make, first=first, last=last, name=name: make().fit(
                    split.train, validation=split.validation, progress=hear(first, last, name.upper()), **training
                )
            )
            if name == "tiger":
                yield (
                    name,
                    lambda q, m=model: m.recommend_batch(q.histories, TOP, beams=beams, users=q.users)[0],
                    seconds,
                )
                continue
            for way in ("generative", "dense", "hybrid"):
                yield (
                    f"liger-{way}",
                    lambda q, m=model, way=way: m.recommend_batch(
                        q.histories, TOP, way=way, cold_items=split.cold_items, beams=beams, users=q.users
                    )[0],
                    seconds,
                )

    return stages


def _timed(make):
    began = time.perf_counter()
    return make(), time.perf_counter() - began


def summary(results: dict) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """``{row: {"in_set" | "cold": {metric: (mean, standard deviation over the seeds)}}}``."""
    out: dict = {}
    for name in ROWS:
        rows = [r for r in results["rows"] if r["row"] == name]
        if rows:
            out[name] = {
                part: {
                    metric: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0)
                    for metric in METRICS
                    if (v := [r[part][metric] for r in rows])
                }
                for part in PARTS
            }
    return out


def _draw(results: dict) -> bytes:
    means = summary(results)
    canvas, axes = figure(1, 2, 10, 0.9 + 0.36 * len(means))
    titles = {"in_set": "NDCG@10, items of the training", "cold": "NDCG@10, items that appeared after it"}
    for ax, part in zip(axes[0], PARTS, strict=True):
        values = [means[name][part]["NDCG@10"] for name in means]
        bars = ax.barh(
            [ROWS[name] for name in means],
            [mean for mean, _ in values],
            xerr=[spread for _, spread in values],
            color=[
                "#2563eb" if name.startswith("liger") else "#0d9488" if name == "tiger" else "#cbd5e1" for name in means
            ],
            height=0.65,
        )
        ax.bar_label(bars, [f" {mean:.4f}" for mean, _ in values], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.25 * max(max(mean + spread for mean, spread in values), 1e-3))
        ax.set_title(titles[part], fontsize=10, fontweight="bold", loc="left")
    axes[0, 1].set_yticklabels([])
    return png(canvas)
