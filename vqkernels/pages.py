"""What every report is made of: figures as PNG bytes, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io

import numpy as np

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  color: #1f2937; background: #f8fafc; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 64px; background: #fff;
  box-shadow: 0 0 24px rgba(15,23,42,.06); }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 20px; margin: 44px 0 10px; }
h3 { font-size: 15px; margin: 0; color: #475569; }
p, ul.verdict { max-width: 90ch; }
.lead { color: #475569; margin-top: 0; }
.note, figcaption { color: #64748b; font-size: 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 7px 6px; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e7eb; }
th { white-space: normal; vertical-align: bottom; font-weight: 600; color: #475569; border-bottom: 2px solid #cbd5e1; }
th:first-child, td:first-child { text-align: left; }
tr.baseline td { color: #64748b; }
tr.first td { border-top: 2px solid #cbd5e1; }
td.best { font-weight: 700; color: #1d4ed8; }
ul.verdict { padding-left: 20px; }
ul.verdict li { margin: 4px 0; }
figure { margin: 18px 0 30px; }
figure img { width: 100%; height: auto; display: block; }
.user { display: grid; grid-template-columns: 1fr 1fr; gap: 28px; }
.user ol, .user ul { margin: 6px 0; padding-left: 28px; }
.hit { font-weight: 700; color: #15803d; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 14px; }
dt { color: #64748b; }
dd { margin: 0; }
@media (max-width: 700px) { .user { grid-template-columns: 1fr; } main { padding: 24px 16px; } }
"""


def figure(rows: int, columns: int, width: float, height: float):
    """A matplotlib figure of so many inches, and its axes [rows, columns]."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("reports are drawn with matplotlib. Run: pip install 'vqkernels[models]'") from None

    canvas = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return canvas, axes


def png(canvas, cut: bool = False) -> bytes:
    """``cut``: without the white around it."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, dpi=150, metadata={"Software": None}, bbox_inches="tight" if cut else None)
    return buffer.getvalue()


def sheet(rows) -> bytes:
    """Rows of (name, images float [n, C, H, W] in [0, 1]) or (name, images, their labels) as one picture, a row to a
    line; C is 1 or 3."""
    longest, (height, width) = max(len(row[1]) for row in rows), rows[0][1].shape[2:]
    across, down = width + max(1, width // 12), height + max(2, height // (3 if any(len(r) > 2 for r in rows) else 12))
    pixels = np.ones((down * len(rows), across * longest, 3), np.float32)
    scale = 9.0 / (across * longest)  # inches a pixel
    canvas, axes = figure(1, 1, 10, scale * down * len(rows) + 0.1)
    ax = axes[0, 0]
    for line, (_, images, *labels) in enumerate(rows):
        bottom = (line + 1) * down
        for place, image in enumerate(np.asarray(images)):
            left = place * across
            pixels[bottom - height : bottom, left : left + width] = image.transpose(1, 2, 0)
            if labels:
                ax.text(left + width / 2, bottom - height - 1, labels[0][place], ha="center", va="bottom", fontsize=6)
    ax.imshow(pixels, vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([(line + 1) * down - height / 2 for line in range(len(rows))], [row[0] for row in rows])
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    return png(canvas, cut=True)


def picture(image: bytes, caption: str) -> str:
    """PNG bytes as a figure of the page."""
    text, data = html.escape(caption, quote=True), base64.b64encode(image).decode()
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def facts(pairs: dict) -> str:
    """Names and values, one a line."""
    lines = (
        f"<dt>{html.escape(str(k).replace('_', ' '))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in pairs.items()
    )
    return f"<dl>{''.join(lines)}</dl>"


def page(title: str, parts: list[str]) -> str:
    """The whole file; ``parts`` are HTML."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>"
    )
