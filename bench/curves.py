"""Time of nearest_codeword against N, K and D, beside faiss and chunked addmm: a JSON file and a picture. The file also
has our time and memory for ten million rows.

python bench/curves.py --json bench/results/curves-zen4.json --out docs/curves.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from vqkernels import bench, nearest_codeword
from vqkernels.bench import ops
from vqkernels.data.progress import progress_bar
from vqkernels.pages import figure, png

SWEEPS = {
    "N": [(N, 1024, 64) for N in (16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)],
    "K": [(16384, K, 64) for K in (16, 64, 256, 1024, 4096, 16384, 65536)],
    "D": [(16384, 1024, D) for D in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)],
}
LARGEST = (10_000_000, 1024, 64)
CONTENDERS = {
    "vqkernels": "#1d4ed8",
    "faiss IndexFlatL2": "#d97706",
    "torch addmm+argmin, chunked": "#94a3b8",
}


def measure(seconds: float) -> dict:
    limits, records = bench.conditions(), []
    shapes = [(axis, shape) for axis, sweep in SWEEPS.items() for shape in sweep]
    with progress_bar(None, "shapes", len(shapes)) as advance:
        for axis, shape in shapes:
            torch.manual_seed(0)
            row = next(ops.nearest_rows((shape,)))
            row.contenders = {name: row.contenders[name] for name in CONTENDERS}
            for result in bench.measure(row, limits, seconds):
                records.append({"axis": axis, "value": shape["NKD".index(axis)], **result.as_dict()})
            advance()
    return {"conditions": limits, "records": records, "largest": largest(seconds)}


def largest(seconds: float) -> dict:
    """Our time, and the memory beyond inputs and outputs, for LARGEST."""
    N, K, D = LARGEST
    torch.manual_seed(0)
    z, codebook = torch.randn(N, D), torch.randn(K, D)
    outputs_mb = sum(x.nbytes for x in nearest_codeword(z, codebook)) / 2**20
    extra_mb = bench.peak_extra_mb(lambda: nearest_codeword(z, codebook)) - outputs_mb
    times = bench.time_call(lambda: nearest_codeword(z, codebook), seconds)
    return {"shape": f"{N}x{K}x{D}", "median_ms": statistics.median(times), "beyond_outputs_mb": extra_mb}


def draw(results: dict) -> bytes:
    """Log axes; the dotted line through our last point is time in proportion to the axis."""
    canvas, axes = figure(1, 3, 12, 3.8)
    for ax, (axis, sweep) in zip(axes[0], SWEEPS.items(), strict=True):
        for name, color in CONTENDERS.items():
            rows = [r for r in results["records"] if r["axis"] == axis and r["backend"] == name and not r["error"]]
            x, y = [r["value"] for r in rows], [r["median_ms"] for r in rows]
            ax.loglog(x, y, "o-", color=color, label=name, markersize=3, linewidth=1.6)
            if name == "vqkernels":
                ax.loglog([x[0], x[-1]], [y[-1] * x[0] / x[-1], y[-1]], ":", color=color, linewidth=1)
        fixed = ", ".join(f"{k} = {v}" for k, v in zip("NKD", sweep[0], strict=True) if k != axis)
        ax.set_title(f"over {axis} ({fixed})", fontsize=10, fontweight="bold", loc="left")
        ax.set_xlabel(axis, fontsize=8)
        ax.grid(True, which="major", linewidth=0.4, color="#e2e8f0")
    axes[0, 0].set_ylabel("milliseconds", fontsize=8)
    axes[0, 0].legend(fontsize=8, frameon=False)
    return png(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="results; only drawn where the file is there")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each contender")
    chosen = parser.parse_args()
    if not chosen.json.exists():
        chosen.json.write_text(json.dumps(measure(chosen.seconds), indent=1))
    chosen.out.write_bytes(draw(json.loads(chosen.json.read_text())))


if __name__ == "__main__":
    main()
