"""One comparison of codebooks: a small VQ-VAE trained with each gradient estimator and each remedy against collapse.

Every finished run is on disk before the next one starts, so a comparison that was killed goes on from there.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import DataError, image_source
from ..data.catalogue import write_array, write_atomic
from ..info import machine
from ..models import VQVAE
from ..models.features import FeatureNet, frechet_distance, map_distance
from ..models.quantizers import make_quantizer
from ..ops import codebook_usage
from .gradients import gradient_quality

ESTIMATORS = {"ste": "straight-through", "rotation": "rotation", "reflection": "reflection", "gumbel": "Gumbel-softmax"}
REMEDIES = {
    "none": "none",
    "kmeans": "k-means++ start",
    "revival": "dead codes revived",
    "entropy": "entropy term",
    "simvq": "SimVQ",
    "fsq": "fixed (FSQ)",
}
RESULTS = "results.json"
COLUMNS = {
    "reconstruction_error": "reconstruction error",
    "perceptual_distance": "perceptual distance",
    "fid_like": "FID-like",
    "usage": "usage",
    "perplexity": "perplexity",
    "quantization_error": "quantization error",
    "step_ms": "step, ms",
    "incumbent_step_ms": "step with vector-quantize-pytorch, ms",
    "train_seconds": "training, s",
}
SHOWN = 8  # test images whose reconstructions are kept
MOST_LISTED = 1024  # codewords up to which gradients are held against the truth, at the price of a decoding each


@dataclass(frozen=True)
class Settings:
    """What a comparison runs with; part of the results, and what a resumed run must share.

    ``sizes``: codebook sizes; every remedy is tried at the first one, none and those without a free codebook at all.
    ``seeds``: runs of each case, with seeds 0, 1, ... ``train_images``, ``test_images``, ``feature_images``: how many
    are trained on, encoded, and compared by the feature network. ``timed_steps``: with either library.
    """

    data: str = "fashion-mnist"
    size: int | None = None
    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    remedies: tuple[str, ...] = tuple(REMEDIES)
    sizes: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)
    seeds: int = 3
    steps: int = 200
    batch_size: int = 32
    lr: float = 1e-3
    width: int = 16
    dim: int = 16
    beta: float = 0.25
    train_images: int = 20_000
    test_images: int = 2048
    feature_images: int = 512
    timed_steps: int = 5

    def __post_init__(self):
        for name, chosen, known in (
            ("estimator", self.estimators, ESTIMATORS),
            ("remedy", self.remedies, REMEDIES),
        ):
            unknown = [c for c in chosen if c not in known]
            if unknown or not chosen:
                raise DataError(f"unknown {name} {', '.join(unknown) or '(none given)'}; there are: {', '.join(known)}")
        if not self.sizes or min(self.sizes) < 2:
            raise DataError(f"codebook sizes {list(self.sizes)}; give at least one, each 2 or more")
        if min(self.seeds, self.steps, self.batch_size, self.timed_steps) < 1:
            raise DataError("seeds, steps, batch size and timed steps must be 1 or more")


class Case(NamedTuple):
    estimator: str
    remedy: str
    codebook_size: int

    def __str__(self) -> str:
        remedy = "" if self.remedy == "none" else f", {REMEDIES[self.remedy]}"
        name = "" if self.remedy == "fsq" else f"{ESTIMATORS[self.estimator]}, "
        return f"{name}K = {self.codebook_size}{remedy}" if name else f"{REMEDIES['fsq']}, K = {self.codebook_size}"


def plan(settings: Settings) -> list[Case]:
    """The cases of a comparison, in the order they run.

    The Gumbel estimator and the entropy term hold a similarity for each vector and codeword, so they stay at the first
    size. SimVQ has two estimators, FSQ its own, which is straight-through."""
    cases = []
    for place, size in enumerate(settings.sizes):
        for remedy in settings.remedies:
            for estimator in settings.estimators:
                if remedy == "fsq" and estimator != settings.estimators[0]:
                    continue
                if remedy == "simvq" and estimator not in ("ste", "rotation"):
                    continue
                if place and (estimator == "gumbel" or remedy not in ("none", "simvq", "fsq")):
                    continue
                cases.append(Case("ste" if remedy == "fsq" else estimator, remedy, size))
    return cases


def quantizer_options(case: Case, settings: Settings, vectors: int) -> dict:
    """Options of ``VectorQuantize`` that are the remedy; the others are alike in all rows. ``vectors``: of a batch."""
    options = {"decay": 0.9, "kmeans_init": False, "threshold_ema_dead_code": 0.0}
    if case.remedy == "kmeans":
        options["kmeans_init"] = True
    if case.remedy == "revival":  # a tenth of what each codeword would get if all got the same
        options["threshold_ema_dead_code"] = 0.1 * vectors / case.codebook_size
    if case.remedy == "entropy":
        options |= {"codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 1.0}
        options |= {"learnable_codebook": True, "ema_update": False}  # the term's gradient has to reach the codewords
    return options


def ours(case: Case, settings: Settings, vectors: int) -> nn.Module:
    if case.remedy in ("simvq", "fsq"):
        return make_quantizer(case.remedy, settings.dim, case.codebook_size, case.estimator, settings.beta)
    options = quantizer_options(case, settings, vectors)
    return make_quantizer("vq", settings.dim, case.codebook_size, case.estimator, settings.beta, **options)


def incumbent(case: Case, settings: Settings, vectors: int) -> nn.Module | None:
    """vector-quantize-pytorch's layer for the same case; None where it has none or is not installed."""
    if case.estimator not in ("ste", "rotation"):
        return None
    try:
        import vector_quantize_pytorch as theirs
    except ImportError:
        return None
    rotation = case.estimator == "rotation"
    if case.remedy == "fsq":
        return theirs.FSQ(dim=settings.dim, levels=ours(case, settings, vectors).levels)
    if case.remedy == "simvq":
        return theirs.SimVQ(
            settings.dim,
            case.codebook_size,
            channel_first=True,
            rotation_trick=rotation,
            input_to_quantize_commit_loss_weight=settings.beta,
        )
    return theirs.VectorQuantize(
        dim=settings.dim,
        codebook_size=case.codebook_size,
        accept_image_fmap=True,
        rotation_trick=rotation,
        commitment_weight=settings.beta,
        **quantizer_options(case, settings, vectors),
    )


class Comparison:
    """Runs cases and keeps ``OUT/results.json``: ``{"settings", "machine", "rows": [...]}``, a row per case and seed.

    Args:
        out: folder for everything that is written.
        resume: keep the finished rows of an earlier run in ``out``; it must have had the same settings.
    """

    def __init__(self, out, settings: Settings, *, resume: bool = False):
        self.out, self.settings = Path(out), settings
        self.results = {"settings": _plain(settings), "machine": machine(), "rows": []}
        found = self.out / RESULTS
        if resume and found.is_file():
            before = read_results(self.out)
            then = before["settings"]
            differ = [f"{k}: {then.get(k)!r} then, {v!r} now" for k, v in _plain(settings).items() if then.get(k) != v]
            if differ:
                raise DataError(
                    f"{found} is of another run and cannot be resumed ({'; '.join(differ)}). Give the same options, or "
                    "another --out"
                )
            self.results = before
        self.train = _images(settings.data, "train", settings.size, settings.train_images)
        self.test = _images(settings.data, "test", settings.size, settings.test_images)
        self.features = FeatureNet()
        self.real = self._maps(self.test[: settings.feature_images])
        (self.out / "pictures").mkdir(parents=True, exist_ok=True)
        write_array(self.out / "originals.npy", _pixels(self.test[:SHOWN]))

    @property
    def rows(self) -> list[dict]:
        return self.results["rows"]

    def finished(self, case: Case, seed: int) -> bool:
        return any((*case_of(row), row["seed"]) == (*case, seed) for row in self.rows)

    def run(self, case: Case, seed: int, advance=lambda: None) -> dict:
        """Trains, evaluates and adds a row. ``advance()`` is called after every training step."""
        s = self.settings
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = self._model(ours(case, s, self._vectors()))
            optimizer = torch.optim.AdamW(model.parameters(), s.lr)
            history: dict[str, list] = {"usage": [], "perplexity": [], "reconstruction_loss": []}
            began = time.perf_counter()
            for _ in range(s.steps):
                out = _step(model, optimizer, self.train[torch.randint(len(self.train), (s.batch_size,))])
                use = codebook_usage(out.indices.flatten(), model.codebook_size)
                for name, value in (
                    ("usage", use.used),
                    ("perplexity", use.perplexity),
                    ("reconstruction_loss", out.reconstruction_loss.detach()),
                ):
                    history[name].append(float(f"{float(value):.4g}"))
                advance()
            seconds = time.perf_counter() - began
            row = {
                "estimator": case.estimator,
                "remedy": case.remedy,
                "codebook_size": case.codebook_size,
                "seed": seed,
                "codes": model.codebook_size,
                **self._evaluate(case, model.eval(), seed),
                "train_seconds": seconds,
                "history": history,
            }
            if seed == 0:
                row |= self._step_times(case)
        self.rows.append(row)
        write_atomic(self.out / RESULTS, json.dumps(self.results).encode())
        return row

    @torch.no_grad()
    def _evaluate(self, case: Case, model: VQVAE, seed: int) -> dict:
        s, latents, indices, squares = self.settings, [], [], 0.0
        reconstructions = []
        for batch in self.test.split(256):
            latents.append(model.encoder(batch))
            indices.append(model.encode(batch))
            reconstructions.append(model.decode(indices[-1]).clamp(0, 1))
            squares += float((reconstructions[-1] - batch).square().sum())
        reconstruction, codes = torch.cat(reconstructions), torch.cat(indices)
        use = codebook_usage(codes.flatten(), model.codebook_size)
        maps, real = self._maps(reconstruction[: s.feature_images]), self.real
        if seed == 0:
            write_array(picture_file(self.out, case), _pixels(reconstruction[:SHOWN]))
        row = {
            "reconstruction_error": squares / self.test.numel(),
            "perceptual_distance": float(map_distance(maps[:-1], real[:-1])),
            "fid_like": frechet_distance(maps[-1], real[-1]),
            "usage": float(use.used),
            "perplexity": float(use.perplexity),
            "quantization_error": None,
        }
        if case.remedy != "fsq":  # FSQ rounds features of its own, not the latent
            z = torch.cat(latents).movedim(1, -1).flatten(0, -2)
            q = model.codebook[codes.flatten()]
            row["quantization_error"] = float((z - q).square().sum() / (z - z.mean(0)).square().sum())
            if case.remedy == "none" and case.codebook_size <= MOST_LISTED:
                with torch.enable_grad():
                    row["gradients"] = gradient_quality(model, self.test[:32], seed)
        return row

    def _step_times(self, case: Case) -> dict:
        """Median milliseconds of a training step with our layer and with vector-quantize-pytorch's, taken in turns."""
        batch, times = self.train[: self.settings.batch_size], {}
        steps = {}
        for name, make in (("step_ms", ours), ("incumbent_step_ms", incumbent)):
            torch.manual_seed(0)
            quantizer = make(case, self.settings, self._vectors())
            times[name] = []
            if quantizer is not None:
                model = self._model(quantizer)
                optimizer = torch.optim.AdamW(model.parameters(), self.settings.lr)
                steps[name] = lambda model=model, optimizer=optimizer: _step(model, optimizer, batch)
                steps[name]()  # k-means starts, memory is taken
        for _ in range(self.settings.timed_steps):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                times[name].append(1000 * (time.perf_counter() - began))
        return {name: statistics.median(taken) if taken else None for name, taken in times.items()}

    def _model(self, quantizer: nn.Module) -> VQVAE:
        s = self.settings
        return VQVAE(self.train.shape[1], width=s.width, dim=s.dim, quantizer=quantizer).train()

    def _vectors(self) -> int:
        height, width = self.train.shape[2:]
        return self.settings.batch_size * (height // 4) * (width // 4)

    @torch.no_grad()
    def _maps(self, images: Tensor) -> list[Tensor]:
        """The feature network's maps of the four finest resolutions, and the vectors of the coarsest."""
        parts = [self.features(batch) for batch in images.split(128)]
        *maps, last = (torch.cat(level) for level in zip(*parts, strict=True))
        return [*maps, last.mean((2, 3))]


def read_results(out) -> dict:
    """``OUT/results.json``. DataError when it is missing or damaged."""
    path = Path(out) / RESULTS
    try:
        results = json.loads(path.read_text())
        if (
            not all({"estimator", "remedy", "history"} <= row.keys() for row in results["rows"])
            or not results["settings"]
        ):
            raise KeyError("rows without estimator and remedy, or no settings")
        return results
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Give the folder that vqkernels compare-codebooks wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a comparison of codebooks ({error!r}). Run it again") from None


def case_of(row: dict) -> Case:
    return Case(row["estimator"], row["remedy"], row["codebook_size"])


def summary(results: dict) -> list[dict]:
    """A row per case: ``case``, ``codes`` (K as it came out), ``runs``, and for each column (mean, standard deviation
    over the seeds) or None; the times of a step are of seed 0."""
    groups: dict[Case, list[dict]] = {}
    for row in results["rows"]:
        groups.setdefault(case_of(row), []).append(row)
    lines = []
    for case, rows in groups.items():
        line = {"case": case, "codes": rows[0]["codes"], "runs": len(rows)}
        for column in COLUMNS:
            values = [row[column] for row in rows if row.get(column) is not None]
            spread = statistics.stdev(values) if len(values) > 1 else None
            line[column] = (statistics.fmean(values), spread) if values else None
        lines.append(line)
    return lines


def verdicts(results: dict) -> list[str]:
    """In words, where no remedy helps: usage with the rotation trick and reflection against straight-through, run by
    run with the same seed."""
    usage = {(case_of(row), row["seed"]): row["usage"] for row in results["rows"]}
    sentences = []
    for size in results["settings"]["sizes"]:
        for other in ("rotation", "reflection"):
            seeds = [
                seed
                for case, seed in usage
                if case == Case(other, "none", size) and (Case("ste", "none", size), seed) in usage
            ]
            if not seeds:
                continue
            pairs = [(usage[Case(other, "none", size), s], usage[Case("ste", "none", size), s]) for s in seeds]
            wins = sum(a >= b for a, b in pairs)
            difference = [100 * (a - b) for a, b in pairs]
            error = 2 * statistics.stdev(difference) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
            spread = "" if error is None else f" ± {error:.2g}"
            sentences.append(
                f"K = {size}, no remedy: {ESTIMATORS[other]} uses at least as many codewords as straight-through in "
                f"{wins} of {len(pairs)} runs; difference {statistics.fmean(difference):+.2g}{spread} points."
            )
    return sentences


def picture_file(out, case: Case) -> Path:
    """Where a case's reconstructions are kept, uint8 [SHOWN, H, W, C]."""
    return Path(out) / "pictures" / f"{case.estimator}-{case.remedy}-{case.codebook_size}.npy"


def _step(model: VQVAE, optimizer, batch: Tensor):
    out = model(batch)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    return out


def _images(source: str, split: str, size: int | None, most: int) -> Tensor:
    """The first images of a source, [N, C, H, W], in memory: each is seen many times."""
    data = image_source(source, split, size)
    images = [item["image"] for item in data.__getitems__(list(range(min(most, len(data)))))]
    if len({image.shape for image in images}) > 1:
        raise DataError(f"{source} holds images of different shapes. Give --size, to which all are scaled")
    stacked = torch.stack(images)
    height, width = stacked.shape[2:]
    return F.pad(stacked, (0, -width % 4, 0, -height % 4), mode="replicate")


def _pixels(images: Tensor):
    return (images.clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()


def _plain(settings: Settings) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
