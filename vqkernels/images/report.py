"""A trained run as one HTML page that needs nothing else: what the codes keep, what each of them stands for."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import DataError, image_source
from ..data.catalogue import write_atomic
from ..info import machine
from ..models import VQVAE
from ..pages import facts, figure, page, picture, png, sheet
from .classifier import accuracy, train_classifier
from .config import NAMES, config_to_dict
from .pictures import grid, load_tokenizer, sample
from .runs import load_run, read_metrics

EVALUATED = 1024  # test images whose codes are counted
SHOWN = 12  # test images beside their reconstructions, and samples in a row
LISTED = 256  # codes decoded one by one
ROWS = 6  # of nearest neighbours, and of images with one token changed
CLASSIFIED = 40  # samples of each class that the classifier judges
TEXTS = 8  # texts that a prior with text condition is asked for


def write_report(run, *, seed: int = 0, progress=None) -> Path:
    """Writes ``RUN/report.html`` for a run of vqkernels train; returns the page. ``seed``: of the samples and the
    classifier. ``progress``: as for training."""
    run = Path(run)
    model, config = load_run(run)
    tokenizer = load_tokenizer(run)
    source = image_source(config.data.source, "test", config.data.size)
    images = _stack(source, EVALUATED, tokenizer.downsample)
    with torch.no_grad():
        codes = torch.cat([tokenizer.encode(batch) for batch in images.split(128)])
        restored = torch.cat([tokenizer.decode(part).clamp(0, 1) for part in codes.split(128)])
    use = tokenizer.usage(codes)
    counts = use.counts.reshape(tokenizer.levels, -1)
    error = float((restored - images).square().mean())
    parts = [
        f"<h1>{NAMES[config.kind]} on {html.escape(str(config.data.source))}</h1>",
        f"<p class='lead'>An image of {images.shape[3]} x {images.shape[2]} pixels becomes "
        f"{codes[0].numel()} codes of {tokenizer.codebook_size}.</p>",
        facts(
            {
                "test images": len(images),
                "reconstruction error (mean squared)": f"{error:.5f}",
                "peak signal to noise": f"{-10 * np.log10(max(error, 1e-12)):.2f} dB",
                "codes in use": " / ".join(f"{100 * float(u):.1f} %" for u in use.used.flatten()),
                "perplexity": " / ".join(f"{float(p):.1f}" for p in use.perplexity.flatten()),
            }
        ),
        "<h2>Originals beside reconstructions</h2>",
        picture(
            sheet([("original", images[:SHOWN]), ("reconstruction", restored[:SHOWN])]),
            "Test images, and what their codes decode to.",
        ),
    ]
    if config.kind == "prior":
        parts += _samples(run, model, config, source, seed, progress)
    parts += ["<h2>Codebook</h2>", _codebook(tokenizer, counts[0])]
    parts += [
        "<h2>Usage</h2>",
        picture(_draw_usage(counts), "How often each code is used on the test images, codes sorted by use."),
        "<h2>Nearest neighbours in code space</h2>",
        picture(
            _neighbours(tokenizer, counts[0]),
            "Codes from often to seldom used, each decoded by itself as an area of three by three, and beside it the "
            "codes that lie nearest to it, with their distance.",
        ),
        "<h2>What changing one token does</h2>",
        picture(
            _one_token(tokenizer, restored, codes, counts[0]),
            "The code in the middle replaced by others, from often to seldom used; below, how much each pixel changes, "
            "the same scale throughout.",
        ),
    ]
    for folder, title in ((run, "Training"), (run / "tokenizer", "Training of the tokenizer")):
        records = read_metrics(folder)
        if records:
            caption = "By step; dots: on held-out images."
            parts += [f"<h2>{title}</h2>", picture(_draw_training(records), caption)]
    settings = {
        f"{group} {name}": value
        for group, values in config_to_dict(config).items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    parts += ["<h2>Machine and settings</h2>", facts(machine() | settings)]
    write_atomic(run / "report.html", page(f"{NAMES[config.kind]} on {config.data.source}", parts).encode())
    return run / "report.html"


def _samples(run: Path, prior, config, source, seed: int, progress) -> list[str]:
    names, parts = prior.facts["classes"], ["<h2>Generated images</h2>"]
    if names:
        wanted = [name for name in names for _ in range(CLASSIFIED)]
        images = sample(run, wanted, seed=seed, progress=progress)
        rows = [(name, images[place * CLASSIFIED :][:SHOWN]) for place, name in enumerate(names)]
        parts.append(picture(sheet(rows), "Samples of the prior, a row for each class; not selected."))
        classifier = train_classifier(
            image_source(config.data.source, "train", config.data.size), seed=seed, progress=progress
        )
        real = source.__getitems__(list(range(min(2000, len(source)))))
        on_real = accuracy(
            classifier, torch.stack([r["image"] for r in real]), torch.tensor([r["label"] for r in real])
        )
        height, width = real[0]["image"].shape[1:]
        labels = torch.arange(len(names)).repeat_interleave(CLASSIFIED)
        on_samples = accuracy(classifier, images[:, :, :height, :width], labels)
        parts += [
            f"<p>A classifier trained on real images alone names the class of <b>{100 * on_real:.1f} %</b> of "
            f"{len(real)} real test images and of <b>{100 * on_samples:.1f} %</b> of {len(images)} generated ones, "
            f"where the class is the one that was asked for. Guessing: {100 / len(names):.1f} %.</p>"
        ]
    else:
        wanted = [None] * TEXTS if source.condition != "text" else [source[i]["label"] for i in range(TEXTS)]
        columns = 4 if wanted[0] else SHOWN
        images = sample(run, [w for w in wanted for _ in range(columns)], seed=seed, progress=progress)
        rows = [(text or "", images[place * columns :][:columns]) for place, text in enumerate(wanted)]
        parts.append(picture(sheet(rows), "Samples of the prior, a row for each text; not selected."))
    return parts


def _stack(source, most: int, step: int) -> Tensor:
    items = source.__getitems__(list(range(min(most, len(source)))))
    images = [item["image"] for item in items]
    if len({image.shape for image in images}) > 1:
        raise DataError("the test images have different shapes. Set data.size, to which all are scaled")
    stacked = torch.stack(images)
    height, width = stacked.shape[2:]
    return torch.nn.functional.pad(stacked, (0, -width % step, 0, -height % step), mode="replicate")


# What a code stands for. Residual codes are shown at their first level, the others left out.


def _alone(tokenizer: VQVAE, chosen: Tensor, side: int = 3, margin: int = 1) -> Tensor:
    """[len(chosen), C, s, s]: each code everywhere in a small latent image, decoded, without the outer codes."""
    indices = chosen.view(-1, 1, 1).expand(-1, side, side)
    if tokenizer.levels > 1:
        indices = torch.stack([indices] + [torch.full_like(indices, -1)] * (tokenizer.levels - 1), -1)
    inner = slice(margin * tokenizer.downsample, (side - margin) * tokenizer.downsample)
    return tokenizer.decode(indices.contiguous())[:, :, inner, inner].clamp(0, 1)


def _most_used(counts: Tensor, most: int) -> Tensor:
    order = counts.argsort(descending=True, stable=True)
    return order[: max(1, min(most, int((counts > 0).sum())))]


def _codebook(tokenizer: VQVAE, counts: Tensor) -> str:
    chosen = _most_used(counts, LISTED)
    caption = f"Each code decoded by itself, as an area of nothing else; the {len(chosen)} most used, most used first."
    return picture(_mosaic(_alone(tokenizer, chosen), 32), caption)


def _neighbours(tokenizer: VQVAE, counts: Tensor) -> bytes:
    book = tokenizer.codebook if tokenizer.levels == 1 else tokenizer.codebook[0]
    others = _most_used(counts, len(counts))
    rows = []
    for code in others[torch.linspace(0, len(others) - 1, min(ROWS, len(others))).long()]:
        rest = others[others != code]
        distances = (book[rest] - book[code]).norm(dim=1)
        near = distances.argsort(stable=True)[: SHOWN - 1]
        labels = ["", *(f"{float(d):.2f}" for d in distances[near])]
        rows.append((f"code {int(code)}", _alone(tokenizer, torch.cat([code[None], rest[near]]), 5), labels))
    return sheet(rows)


def _one_token(tokenizer: VQVAE, restored: Tensor, codes: Tensor, counts: Tensor) -> bytes:
    used = _most_used(counts, len(counts))
    chosen = used[torch.linspace(0, len(used) - 1, min(SHOWN - 1, len(used))).long()]
    rows, y, x = [], codes.shape[1] // 2, codes.shape[2] // 2
    changed, differences = [], []
    for image in range(min(ROWS // 2, len(codes))):
        tried = codes[image : image + 1].repeat(len(chosen), *[1] * (codes.dim() - 1))
        if tokenizer.levels == 1:
            tried[:, y, x] = chosen
        else:
            tried[:, y, x, 0] = chosen
        with torch.no_grad():
            changed.append(torch.cat([restored[image : image + 1], tokenizer.decode(tried).clamp(0, 1)]))
        differences.append((changed[-1] - changed[-1][:1]).abs().mean(1, keepdim=True))
    most = max(float(d.max()) for d in differences) or 1.0
    for pictures, difference in zip(changed, differences, strict=True):
        labels = ["as encoded", *(f"code {int(code)}" for code in chosen)]
        rows += [("", pictures, labels), ("change", difference / most)]
    return sheet(rows)


# Pictures, as PNG bytes.


def _mosaic(images: Tensor, columns: int) -> bytes:
    pixels = grid(images, min(columns, len(images)), gap=1, enlarge=4)
    canvas, axes = figure(1, 1, 10, 10 * pixels.shape[1] / pixels.shape[2])
    axes[0, 0].imshow(pixels.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes[0, 0].set_axis_off()
    return png(canvas)


def _draw_usage(counts: Tensor) -> bytes:
    canvas, axes = figure(1, len(counts), 9, 2.4)
    for level, (ax, mine) in enumerate(zip(axes[0], counts, strict=True)):
        ordered = mine.sort(descending=True).values.numpy()
        ax.fill_between(
            np.arange(len(ordered) + 1), np.append(ordered, ordered[-1]), step="post", color="#2563eb", lw=0
        )
        ax.set_xlim(0, len(ordered))
        ax.set_ylim(0, None)
        ax.set_xlabel("codes, most used first", fontsize=8)
        if len(counts) > 1:
            ax.set_title(f"level {level + 1}", fontsize=9, loc="left")
    axes[0, 0].set_ylabel("times used", fontsize=8)
    return png(canvas)


CURVES = (
    ("loss", "reconstruction_loss", "perceptual_loss", "adversarial_loss", "discriminator_loss"),
    ("usage",),
    ("perplexity",),
)


def _draw_training(records: list[dict]) -> bytes:
    groups = [[name for name in names if any(name in r for r in records)] for names in CURVES]
    groups = [names for names in groups if names]
    canvas, axes = figure(1, len(groups), 10, 2.8)
    for ax, names in zip(axes[0], groups, strict=True):
        for name in names:
            mine = [r for r in records if name in r]
            (line,) = ax.plot([r["step"] for r in mine], [r[name] for r in mine], lw=1.2, label=name.replace("_", " "))
            held = [r for r in records if f"validation_{name}" in r]
            ax.plot(
                [r["step"] for r in held], [r[f"validation_{name}"] for r in held], "o", ms=4, color=line.get_color()
            )
        ax.set_xlabel("step", fontsize=8)
        ax.legend(fontsize=7, frameon=False)
    if all(np.all(np.asarray(line.get_ydata()) > 0) for line in axes[0, 0].lines):
        axes[0, 0].set_yscale("log")
    return png(canvas)
