"""A finished comparison as words, pictures and one HTML page that needs nothing else."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from ..data import Catalogue, load_folder
from ..data.catalogue import write_atomic
from ..pages import facts, figure, page, picture, png
from .compare import BASELINES, METHODS, SEARCHED, read_results, split_of, summary, top_items
from .evaluation import JUDGED, METRICS

LABELS = METHODS | BASELINES
COLORS = ("#8a8f98", "#2563eb", "#0d9488", "#0369a1", "#d97706", "#b91c1c", "#7c3aed", "#be185d", "#4d7c0f", "#713f12",
          "#0891b2")  # fmt: skip
COLUMNS = (*METRICS, "collision_rate", "usage", "perplexity", "invalid_rate", "train_seconds")
HEADS = {"collision_rate": "collisions", "invalid_rate": "invalid", "train_seconds": "training"}


def cell(row: dict, column: str) -> str:
    """A number of a row of ``summary``, as people read it."""
    value = row[column]
    if value is None:
        return "–"
    if column in METRICS:
        return f"{value:.4f}" + (f" ± {row['spread'][column]:.4f}" if row["seeds"] > 1 else "")
    if column == "usage":  # one number a level
        return " ".join(f"{100 * share:.0f}" for share in value) + " %"
    if column in ("collision_rate", "invalid_rate"):
        return "100 %" if value == 1 else f"{100 * value:.{2 if 0 < value < 0.01 else 1}f} %"
    return f"{value:.1f}" if column == "perplexity" else f"{value:.0f} s"


def verdicts(out, results: dict, catalogue: Catalogue) -> list[str]:
    """One sentence per TIGER row: whether its HR@10 beats popularity, Markov and random IDs.

    Users are paired: the mean difference of two rows' hits, themselves means over the seeds, is given with two standard
    errors.
    """
    targets, found = split_of(catalogue, results["settings"]).test.targets, {}
    for row in results["rows"]:
        found.setdefault(row["method"], []).append((top_items(out, row) == targets[:, None]).any(1))
    hits = {method: np.mean(lists, 0) for method, lists in found.items()}
    sentences = []
    for row in (r for r in summary(results) if r["kind"] == "tiger"):
        name, parts = LABELS[row["method"]], []
        for other, its in (("popularity", "popularity"), ("markov", "Markov"), ("random", "random IDs")):
            if other not in hits or other == row["method"]:
                continue
            difference = hits[row["method"]] - hits[other]
            mean, error = difference.mean(), 2 * difference.std() / np.sqrt(len(difference))
            word = "clearly beats" if mean > error else "is above" if mean > 0 else "does not beat"
            noise = "" if abs(mean) > error else ", within noise"
            parts.append(f"{word} {its} ({mean:+.4f} ± {error:.4f}{noise})")
        sentences.append(f"{name[0].upper()}{name[1:]}: HR@10 {row['HR@10']:.4f}, {'; '.join(parts)}.")
    return sentences


def best_row(results: dict, method: str | None = None) -> dict | None:
    """The TIGER row with the highest NDCG@10, of all or of one method's seeds."""
    rows = [r for r in results["rows"] if r["kind"] == "tiger" and method in (None, r["method"])]
    return max(rows, key=lambda r: r["NDCG@10"]) if rows else None


def example(out, results: dict, catalogue: Catalogue) -> dict | None:
    """One user, drawn by the seed: the latest items, the best row's recommendations, and what came next, as titles."""
    row = best_row(results)
    if row is None:
        return None
    test = split_of(catalogue, results["settings"]).test
    place = int(np.random.default_rng(results["settings"]["seed"]).integers(len(test.targets)))
    title = lambda item: catalogue.item_titles[item - 1]  # noqa: E731
    target = int(test.targets[place])
    return {
        "user": catalogue.users[test.users[place]],
        "method": row["method"],
        "seen": len(test.histories[place]),
        "history": [title(i) for i in test.histories[place][-8:]],
        "recommended": [(title(i), i == target) for i in top_items(out, row)[place] if i > 0],
        "next": title(target),
    }


def write_report(out) -> Path:
    """Draws ``OUT/*.png`` and writes ``OUT/report.html`` from what a comparison left in ``OUT``; returns the page."""
    out = Path(out)
    results = read_results(out)
    catalogue = load_folder(out / "catalogue")
    pictures = [
        (name, caption, draw(results))
        for name, caption, draw in (
            ("scores", "Hit rate and NDCG at 10. Pale: the baselines.", _draw_scores),
            ("usage", "How often each code is used, codes sorted by use, one panel per method and level.", _draw_usage),
            (
                "collisions",
                "Items by how many items share their codes; 1 is an item with codes of its own.",
                _draw_collisions,
            ),
            (
                "training",
                "TIGER's loss per code by epoch (solid: training, dashed: validation), and the RQ-VAE's own training.",
                _draw_training,
            ),
            (
                "invalid",
                "Free search: the share of beams that lead to no item after each code, by the number of beams.",
                _draw_invalid,
            ),
            (
                "accuracy",
                f"NDCG@10 on the validation items of at most {JUDGED:,} users against the seconds of training; a line "
                "that still rises at its end would gain from longer training.",
                _draw_accuracy,
            ),
        )
        if any(r["kind"] == "tiger" for r in results["rows"])
    ]
    for name, _, image in pictures:
        write_atomic(out / f"{name}.png", image)
    write_atomic(out / "report.html", _page(out, results, catalogue, pictures).encode())
    return out / "report.html"


# Pictures. Each takes the results and returns PNG bytes.


def _tiger_rows(results) -> list[tuple[dict, str]]:
    """Each method's row of the first seed, and its color."""
    first = {}
    for row in results["rows"]:
        first.setdefault(row["method"], row)
    return [(r, COLORS[list(METHODS).index(r["method"])]) for r in first.values() if r["kind"] == "tiger"]


def _draw_scores(results) -> bytes:
    rows = summary(results)
    colors = [COLORS[list(METHODS).index(r["method"])] if r["kind"] == "tiger" else "#cbd5e1" for r in rows]
    canvas, axes = figure(1, 2, 9, 0.8 + 0.32 * len(rows))
    for ax, metric in zip(axes[0], ("HR@10", "NDCG@10"), strict=True):
        means, spread = [r[metric] for r in rows], [r["spread"][metric] for r in rows]
        bars = ax.barh([LABELS[r["method"]] for r in rows], means, xerr=spread, color=colors, height=0.65)
        ax.bar_label(bars, [f" {mean:.4f}" for mean in means], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.2 * max(m + s for m, s in zip(means, spread, strict=True)))
        ax.set_title(metric, fontsize=10, fontweight="bold", loc="left")
    axes[0, 1].set_yticklabels([])
    return png(canvas)


def _draw_usage(results) -> bytes:
    rows = _tiger_rows(results)
    levels = max(len(r["code_counts"]) for r, _ in rows)
    canvas, axes = figure(len(rows), levels, 11, 0.4 + 1.4 * len(rows))
    for (row, color), line in zip(rows, axes, strict=True):
        for level, ax in enumerate(line[: len(row["code_counts"])]):
            counts = np.sort(row["code_counts"][level])[::-1]
            ax.fill_between(
                np.arange(len(counts) + 1), np.append(counts, counts[-1]), step="post", color=color, alpha=0.85, lw=0
            )
            ax.set_xlim(0, len(counts))
            ax.set_ylim(0, None)
            used, perplexity = row["tokenizer"]["usage"][level], row["tokenizer"]["perplexity"][level]
            name = LABELS[row["method"]] if level == 0 else f"level {level + 1}" if row is rows[0][0] else ""
            ax.set_title(name, fontsize=9, fontweight="bold" if level == 0 else "normal", loc="left")
            says = f"{100 * used:.0f} % used, perplexity {perplexity:.0f}"
            place = ax.text(0.98, 0.94, says, transform=ax.transAxes, ha="right", va="top", fontsize=8)
            place.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5})
    canvas.supxlabel("codes, most used first", fontsize=8)
    canvas.supylabel("items", fontsize=8)
    return png(canvas)


def _draw_collisions(results) -> bytes:
    rows = _tiger_rows(results)
    canvas, axes = figure(1, 1, 9, 2.6)
    ax, names = axes[0, 0], ["1", "2", "3", "4", "5–8", "9 and more"]
    for place, (row, color) in enumerate(rows):
        items = (
            np.arange(len(row["group_sizes"])) * row["group_sizes"]
        )  # items in groups of 0, 1, 2, ... with the same codes
        share = [items[a:b].sum() / items.sum() for a, b in ((1, 2), (2, 3), (3, 4), (4, 5), (5, 9), (9, None))]
        x = np.arange(len(names)) + (place - (len(rows) - 1) / 2) * 0.8 / len(rows)
        bars = ax.bar(x, 100 * np.array(share), 0.74 / len(rows), color=color, label=LABELS[row["method"]])
        ax.bar_label(bars, [f"{100 * s:.0f}" if s >= 0.005 else "" for s in share], fontsize=7)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlabel("items with the same codes", fontsize=8)
    ax.set_ylabel("% of items", fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    return png(canvas)


def _draw_training(results) -> bytes:
    rows = _tiger_rows(results)
    encoders = [
        (r, c) for r, c in rows if len(r["tokenizer_history"]) > r["tokenizer"].get("levels", len(r["code_counts"]))
    ]
    canvas, axes = figure(1, 2 if encoders else 1, 9, 2.9)
    ax = axes[0, 0]
    for row, color in rows:
        epochs = [e["epoch"] for e in row["training"]]
        ax.plot(epochs, [e["loss"] for e in row["training"]], color=color, lw=1.6, label=LABELS[row["method"]])
        if "validation_loss" in row["training"][0]:
            ax.plot(epochs, [e["validation_loss"] for e in row["training"]], color=color, lw=1.2, ls="--")
    ax.set_title("TIGER", fontsize=10, fontweight="bold", loc="left")
    ax.set_xlabel("epoch", fontsize=8)
    ax.set_ylabel("cross entropy per code", fontsize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=8, frameon=False)
    if encoders:
        ax = axes[0, 1]
        for row, color in encoders:
            ax.plot([h["step"] for h in row["tokenizer_history"]], [h["loss"] for h in row["tokenizer_history"]],
                    color=color, lw=1.2, label=LABELS[row["method"]])  # fmt: skip
        ax.set_yscale("log")
        ax.set_title("RQ-VAE", fontsize=10, fontweight="bold", loc="left")
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylabel("loss", fontsize=8)
        ax.legend(fontsize=8, frameon=False)
    return png(canvas)


def _draw_accuracy(results) -> bytes:
    lines = [(row, color, "-") for row, color in _tiger_rows(results)]
    lines += [(row, "#64748b", "--") for row in results["rows"] if row["method"] == "sasrec"][:1]
    canvas, axes = figure(1, 1, 9, 3.2)
    ax = axes[0, 0]
    for row, color, style in lines:
        seconds = np.cumsum([e["seconds"] for e in row["training"]])
        score = [e["validation_ndcg"] for e in row["training"]]
        ax.plot(seconds, score, color=color, lw=1.4, ls=style, marker="o", ms=2.5, label=LABELS[row["method"]])
    ax.set_xlabel("seconds of training", fontsize=8)
    ax.set_ylabel("validation NDCG@10", fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    return png(canvas)


def _draw_invalid(results) -> bytes:
    rows = [row for row, _ in _tiger_rows(results)]
    canvas, axes = figure(1, len(rows), 11, 2.4)
    top = max(share for row in rows for shares in row["invalid_rates"].values() for share in shares)
    for ax, row in zip(axes[0], rows, strict=True):
        for width, shares in row["invalid_rates"].items():
            levels = range(1, len(shares) + 1)
            ax.plot(levels, [100 * share for share in shares], marker="o", ms=3, lw=1.4, label=f"{width} beams")
        ax.set_ylim(0, 105 * top or 1)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_title(LABELS[row["method"]], fontsize=9, fontweight="bold", loc="left")
    axes[0, 0].set_ylabel("% of beams", fontsize=8)
    axes[0, 0].legend(fontsize=8, frameon=False)
    canvas.supxlabel("codes", fontsize=8)
    return png(canvas)


# The page.


def _page(out: Path, results: dict, catalogue: Catalogue, pictures) -> str:
    text = html.escape
    data, settings, machine = results["data"], results["settings"], results["machine"]
    seeds = max(row["seeds"] for row in summary(results))
    runs = f"{seeds} runs, mean ± standard deviation" if seeds > 1 else "one run with one seed"
    parts = [
        f"<h1>Semantic IDs on {text(data['name'])}</h1>",
        f"<p class='lead'>{data['users']:,} users, {data['items']:,} items, {data['interactions']:,} interactions. "
        f"Item texts embedded by {text(data['embedding'])}.</p>",
        "<p>Each method turns an item's embedding into a short sequence of codes, its semantic ID. TIGER, a small T5 "
        "encoder-decoder, reads a user's history as such codes and writes the codes of the next item. Only the IDs "
        "differ between its rows.</p>",
        "<div class='wide'>" + _table(results) + "</div>",
        f"<p class='note'>All rows together took {results['seconds']:,.0f} s. "
        f"Leave one out: each of {data['test_users']:,} users' last item is to be found among all "
        f"{data['items']:,}; items already in the history are not recommended, by any method. Collisions: share of "
        "items whose codes another item has too (a further digit tells them apart). Usage: of the "
        "codes, by level; perplexity: mean over levels. Invalid: share of "
        f"{settings['free_beams']} freely searched beams that are no item's ID, of up to {SEARCHED:,} users; "
        f"the scores use {settings['beams']} beams held to valid IDs. Training: TIGER alone.</p>",
        "<h2>In words</h2>",
        "<ul class='verdict'>" + "".join(f"<li>{text(s)}</li>" for s in verdicts(out, results, catalogue)) + "</ul>",
        f"<p class='note'>Differences of HR@10 over the same users, ± two standard errors, from {runs}: chance in the "
        "training is not in the ±.</p>",
    ]
    shown = example(out, results, catalogue)
    if shown:
        items = "".join(
            f"<li{' class=hit' if hit else ''}>{text(t)}{' ✓' if hit else ''}</li>" for t, hit in shown["recommended"]
        )
        found = "It is in the list." if any(hit for _, hit in shown["recommended"]) else "It is not in the list."
        parts += [
            "<h2>One user</h2>",
            f"<p class='note'>User {text(shown['user'])}, drawn by the seed; {shown['seen']} items in the history.</p>",
            "<div class='user'><div><h3>Latest items, oldest first</h3><ul>",
            "".join(f"<li>{text(t)}</li>" for t in shown["history"]),
            f"</ul></div><div><h3>Recommended by TIGER on {text(LABELS[shown['method']])}</h3>",
            f"<ol>{items}</ol></div></div>",
            f"<p>What came next: <b>{text(shown['next'])}</b>. {found}</p>",
        ]
    titles = {"scores": "Scores", "usage": "Codebook usage", "collisions": "Collisions", "training": "Training",
              "invalid": "Invalid beams", "accuracy": "Accuracy against training time"}  # fmt: skip
    for name, caption, image in pictures:
        parts.append(f"<h2>{titles[name]}</h2>{picture(image, caption)}")
    parts += ["<h2>Machine and settings</h2>", facts(machine | settings)]
    return page(f"Semantic IDs on {data['name']}", parts)


def _table(results: dict) -> str:
    rows = summary(results)
    best = {c: max((r[c] for r in rows if r["kind"] == "tiger"), default=None) for c in METRICS}
    lines, before = [], "tiger"
    for row in rows:
        tiger = row["kind"] == "tiger"
        style = ("" if tiger else "baseline") + (" first" if before != row["kind"] else "")
        before = row["kind"]
        cells = "".join(
            f"<td{' class=best' if tiger and row[c] == best.get(c) else ''}>{cell(row, c)}</td>" for c in COLUMNS
        )
        lines.append(f"<tr class='{style.strip()}'><td>{html.escape(LABELS[row['method']])}</td>{cells}</tr>")
    heads = "".join(f"<th>{HEADS.get(c, c)}</th>" for c in COLUMNS)
    return f"<table><thead><tr><th>semantic IDs</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
