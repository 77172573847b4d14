"""A finished comparison of codebooks as words, pictures and one HTML page that needs nothing else."""

from __future__ import annotations

import html
import statistics
from pathlib import Path

import numpy as np

from ..data.catalogue import read_array, write_atomic
from ..pages import facts, figure, page, picture, png, sheet
from .compare import COLUMNS, ESTIMATORS, REMEDIES, Case, case_of, picture_file, read_results, summary, verdicts
from .gradients import KINDS

COLORS = {
    "ste": "#2563eb",
    "rotation": "#d97706",
    "reflection": "#0d9488",
    "gumbel": "#7c3aed",
    "simvq": "#b91c1c",
    "fsq": "#64748b",
}
SMOOTH = 10  # steps that a training curve is averaged over
DECIMALS = {"reconstruction_error": 4, "perceptual_distance": 3, "quantization_error": 3, "fid_like": 0, "usage": 1}


def cell(column: str, value: tuple[float, float | None] | None) -> str:
    """Mean and standard deviation, as people read them; "–" where there is none."""
    if value is None:
        return "–"
    mean, spread = (100 * v if v is not None and column == "usage" else v for v in value)
    digits = DECIMALS.get(column, 1)
    if column == "usage" and 0 < mean < 1:  # with many codewords the share is small
        digits = 3
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}") + " %" * (column == "usage")


def write_report(out) -> Path:
    """Writes ``OUT/report.html`` and the pictures ``OUT/*.png``; returns the page."""
    out, results = Path(out), read_results(out)
    pictures = []
    for name, title, caption, draw in (
        (
            "usage",
            "Usage in training",
            "Share of the codewords that a training batch uses, and the perplexity of its codes; no remedy. "
            f"Means over {SMOOTH} steps; the band is one standard deviation over the seeds.",
            _draw_training,
        ),
        (
            "gradients",
            "The gradient that the encoder is given",
            "Left: how much the angle between a vector and its gradient differs from the one between its codeword and "
            "the gradient there; 0 is kept. Right: cosine of the given gradient with that of the loss averaged over "
            "small moves of the vector; 1 is unbiased in direction. Each estimator on the same trained models, those "
            "without a remedy; bars: mean, lines: one standard deviation over models.",
            _draw_gradients,
        ),
        (
            "sizes",
            "Codebook size",
            "Without a remedy, and the two codebooks that need none. Bars: one standard deviation over the seeds.",
            _draw_sizes,
        ),
        (
            "speed",
            "Time of a training step",
            "Median of a whole training step of the model by codebook size, with this project's layer and with "
            "vector-quantize-pytorch's, timed in turns.",
            _draw_speed,
        ),
        (
            "reconstructions",
            "Originals beside reconstructions",
            "Test images after the training with seed 0, at the smallest codebook of the comparison.",
            lambda results: _draw_reconstructions(out, results),
        ),
    ):
        image = draw(results)
        if image is None:
            (out / f"{name}.png").unlink(missing_ok=True)
        else:
            write_atomic(out / f"{name}.png", image)
            pictures.append(f"<h2>{title}</h2>{picture(image, caption)}")
    write_atomic(out / "report.html", _page(results, pictures).encode())
    return out / "report.html"


def _page(results: dict, pictures: list[str]) -> str:
    settings = results["settings"]
    lines, before = [], None
    for line in summary(results):
        case = line["case"]
        first = " class='first'" if before not in (None, case.codebook_size) else ""
        before = case.codebook_size
        name = "own" if case.remedy == "fsq" else ESTIMATORS[case.estimator]
        cells = "".join(f"<td>{cell(column, line[column])}</td>" for column in COLUMNS)
        lines.append(f"<tr{first}><td>{line['codes']}</td><td>{name}</td><td>{REMEDIES[case.remedy]}</td>{cells}</tr>")
    heads = "".join(f"<th>{name}</th>" for name in ("K", "estimator", "remedy", *COLUMNS.values()))
    runs = max(line["runs"] for line in summary(results))
    parts = [
        f"<h1>Codebooks on {html.escape(settings['data'])}</h1>",
        f"<p class='lead'>A small VQ-VAE, trained for {settings['steps']} steps with each gradient estimator, each "
        f"remedy against collapse and each codebook size; {runs} seed{'s' * (runs > 1)}.</p>",
        f"<div class='wide'><table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>",
        "<p class='note'>Mean ± standard deviation over the seeds, on test images. Reconstruction error: mean squared, "
        "of pixels in [0, 1]. Perceptual distance: between maps of EfficientNet-Lite0. FID-like: Fréchet distance of "
        f"its vectors over {settings['feature_images']} images; not the Inception FID. Usage and perplexity: of the "
        "codes of all test images. Quantization error: squared distance of vector and codeword, as a share of the "
        "vectors' variance. Step times: one seed. –: does not apply, or the other library has no such layer.</p>",
        "<h2>In words</h2>",
        "<ul class='verdict'>" + "".join(f"<li>{html.escape(s)}</li>" for s in verdicts(results)) + "</ul>",
        "<p class='note'>±: two standard errors over the seeds.</p>",
        *pictures,
        "<h2>Machine and settings</h2>",
        facts(results["machine"] | settings),
    ]
    return page(f"Codebooks on {settings['data']}", parts)


# Pictures. Each takes the results and returns PNG bytes, or None where the comparison has nothing for it.


def _rows(results: dict, remedy: str, size: int | None = None) -> dict[str, list[dict]]:
    """Rows of a remedy by estimator, in a fixed order."""
    found: dict[str, list[dict]] = {}
    for name in ESTIMATORS:
        mine = [r for r in results["rows"] if (r["estimator"], r["remedy"]) == (name, remedy)]
        mine = [r for r in mine if size is None or r["codebook_size"] == size]
        if mine:
            found[name] = mine
    return found


def _draw_training(results) -> bytes | None:
    groups = _rows(results, "none", results["settings"]["sizes"][0])
    if not groups:
        return None
    canvas, axes = figure(1, 2, 9, 3.3)
    for ax, (name, title, scale) in zip(
        axes[0], (("usage", "usage, %", 100), ("perplexity", "perplexity", 1)), strict=True
    ):
        for estimator, rows in groups.items():
            curves = np.array([r["history"][name] for r in rows]) * scale
            width = min(SMOOTH, curves.shape[1])
            curves = np.array([np.convolve(c, np.ones(width) / width, "valid") for c in curves])
            steps = np.arange(width, width + curves.shape[1])
            mean, spread = curves.mean(0), curves.std(0)
            ax.plot(steps, mean, color=COLORS[estimator], lw=1.6, label=ESTIMATORS[estimator])
            ax.fill_between(steps, mean - spread, mean + spread, color=COLORS[estimator], alpha=0.18, lw=0)
        ax.set_title(title, fontsize=10, fontweight="bold", loc="left")
        ax.set_xlabel("step", fontsize=8)
        ax.set_yscale("log")
    _legend(canvas, axes[0, 0])
    return png(canvas)


def _draw_gradients(results) -> bytes | None:
    rows = [r["gradients"] for r in results["rows"] if r.get("gradients")]
    panels = []
    for name, title in (
        ("angle", "angle to the gradient changed by, degrees"),
        ("cosine", "cosine with the true gradient"),  # where a collapsed codebook leaves one
    ):
        values = {kind: [r[kind][name] for r in rows if name in r[kind]] for kind in KINDS}
        if all(values.values()):
            panels.append((name, title, values))
    if not panels:
        return None
    canvas, axes = figure(1, len(panels), 9, 2.6)
    for ax, (name, title, values) in zip(axes[0], panels, strict=True):
        means = [statistics.fmean(v) for v in values.values()]
        spreads = [statistics.pstdev(v) for v in values.values()]
        numbers = [f"{mean:.{2 if name == 'angle' else 3}f}" for mean in means]
        labels = [f"{ESTIMATORS[kind]}\n{number}" for kind, number in zip(KINDS, numbers, strict=True)]
        ax.bar(labels, means, 0.6, yerr=spreads, color=[COLORS[k] for k in KINDS], ecolor="#475569", capsize=3)
        ax.set_title(title, fontsize=10, fontweight="bold", loc="left")
    return png(canvas)


def _curves(results) -> dict[str, dict[int, list[dict]]]:
    """Label and color key -> codebook size -> rows, for what was tried at every size."""
    groups = {name: rows for name, rows in _rows(results, "none").items() if name != "gumbel"}
    for remedy in ("simvq", "fsq"):
        for name, rows in _rows(results, remedy).items():
            if remedy == "fsq" or name == "rotation":
                groups[remedy] = rows
    curves: dict[str, dict[int, list[dict]]] = {}
    for name, rows in groups.items():
        for row in rows:
            curves.setdefault(name, {}).setdefault(row["codes"], []).append(row)
    return curves


def _draw_sizes(results) -> bytes | None:
    curves = _curves(results)
    if len(results["settings"]["sizes"]) < 2 or not curves:
        return None
    canvas, axes = figure(1, 3, 11, 3.3)
    for ax, (name, title) in zip(
        axes[0],
        (("usage", "usage, %"), ("perplexity", "perplexity"), ("reconstruction_error", "reconstruction error")),
        strict=True,
    ):
        for key, points in curves.items():
            sizes = sorted(points)
            scale = 100 if name == "usage" else 1
            values = [[scale * r[name] for r in points[k]] for k in sizes]
            means, spreads = [statistics.fmean(v) for v in values], [statistics.pstdev(v) for v in values]
            label = {"simvq": "SimVQ, rotation", "fsq": "fixed (FSQ)"}.get(key) or ESTIMATORS[key]
            ax.errorbar(sizes, means, spreads, color=COLORS[key], lw=1.6, marker="o", ms=3, capsize=2, label=label)
        ax.set_xscale("log", base=2)
        if name != "reconstruction_error":
            ax.set_yscale("log")
        ax.set_title(title, fontsize=10, fontweight="bold", loc="left")
        ax.set_xlabel("codewords", fontsize=8)
    _legend(canvas, axes[0, 0])
    return png(canvas)


def _draw_speed(results) -> bytes | None:
    wanted = (("rotation", "none"), ("rotation", "simvq"), ("ste", "fsq"))
    timed = [r for r in results["rows"] if r.get("incumbent_step_ms") and (r["estimator"], r["remedy"]) in wanted]
    if len({r["codes"] for r in timed}) < 2:
        return None
    canvas, axes = figure(1, 1, 9, 3.6)
    ax = axes[0, 0]
    for key, (estimator, remedy) in zip(("rotation", "simvq", "fsq"), wanted, strict=True):
        rows = sorted((r for r in timed if case_of(r)[:2] == (estimator, remedy)), key=lambda r: r["codes"])
        if rows:
            sizes, name = [r["codes"] for r in rows], "VectorQuantize" if remedy == "none" else REMEDIES[remedy]
            for column, style, who in (
                ("step_ms", "-", "vqkernels"),
                ("incumbent_step_ms", "--", "vector-quantize-pytorch"),
            ):
                ax.plot(
                    sizes,
                    [r[column] for r in rows],
                    style,
                    color=COLORS[key],
                    marker="o",
                    ms=3,
                    lw=1.6,
                    label=f"{name}, {who}",
                )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("codewords", fontsize=8)
    ax.set_ylabel("ms", fontsize=8)
    _legend(canvas, ax, 3)
    return png(canvas)


def _legend(canvas, ax, columns: int = 5) -> None:
    """Below all panels, where it hides no curve."""
    canvas.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _draw_reconstructions(out: Path, results) -> bytes | None:
    size = results["settings"]["sizes"][0]
    cases = [Case(name, "none", size) for name in ESTIMATORS]
    best = "rotation" if "rotation" in results["settings"]["estimators"] else results["settings"]["estimators"][0]
    cases += [Case("ste" if remedy == "fsq" else best, remedy, size) for remedy in REMEDIES if remedy != "none"]
    cases = [case for case in cases if picture_file(out, case).is_file()]
    files = [("original", out / "originals.npy")]
    files += [(str(case).replace(f", K = {size}", ""), picture_file(out, case)) for case in cases]
    return sheet([(name, read_array(file).transpose(0, 3, 1, 2) / 255) for name, file in files])
