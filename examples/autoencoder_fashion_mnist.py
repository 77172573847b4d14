"""The autoencoder example of vector-quantize-pytorch on Fashion-MNIST, with either library: only the import differs.

    python examples/autoencoder_fashion_mnist.py                      both libraries, both estimators, 5 seeds
    python examples/autoencoder_fashion_mnist.py --library ours --estimator rotation --seeds 1 --steps 200
    python examples/autoencoder_fashion_mnist.py --subset             the 800 images that come with the package

A run is one to two minutes on one core. Writes autoencoder.json, one row per run, and autoencoder.md, a table with mean
and standard deviation over the seeds. The figures are means over the last 50 steps: reconstruction loss (mean absolute
error of pixels in [-1, 1]), commitment loss, and the share of the codewords in use in one batch.
"""

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

from vqkernels.data import fashion_mnist, fashion_mnist_subset

LIBRARIES = {"ours": "vqkernels", "incumbent": "vector_quantize_pytorch"}
ESTIMATORS = {"ste": False, "rotation": True}  # the argument rotation_trick
LAST = 50  # steps that the reported figures are means of
FIGURES = {"rec_loss": "reconstruction loss", "cmt_loss": "commitment loss", "active": "active codewords, %"}


def autoencoder(library: str, estimator: str, codewords: int, dim: int) -> nn.Module:
    module = importlib.import_module(LIBRARIES[library])
    quantizer = module.VectorQuantize(
        dim=dim, codebook_size=codewords, accept_image_fmap=True, rotation_trick=ESTIMATORS[estimator]
    )
    return module.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.MaxPool2d(2),
        nn.GELU(),
        nn.Conv2d(16, dim, 3, padding=1),
        nn.MaxPool2d(2),
        quantizer,
        nn.Upsample(scale_factor=2),
        nn.Conv2d(dim, 16, 3, padding=1),
        nn.GELU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 1, 3, padding=1),
    )


def batches(images: torch.Tensor, size: int, seed: int):
    """Endless shuffled epochs; the order depends on the seed alone, so it is the same for both libraries."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(size):
            yield images[rows]


def train(images: torch.Tensor, library: str, estimator: str, seed: int, args, report) -> dict:
    torch.manual_seed(seed)
    model = autoencoder(library, estimator, args.codebook_size, args.dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    history = []
    start = time.perf_counter()
    for step, x in zip(range(args.steps), batches(images, args.batch_size, seed), strict=False):
        optimizer.zero_grad()
        out, indices, commitment = model(x)
        reconstruction = (out.clamp(-1.0, 1.0) - x).abs().mean()
        (reconstruction + args.alpha * commitment).backward()
        optimizer.step()
        active = 100 * indices.unique().numel() / args.codebook_size
        history.append((reconstruction.item(), commitment.item(), active))
        report(step, history[-1])
    seconds = time.perf_counter() - start
    means = [statistics.fmean(column) for column in zip(*history[-LAST:], strict=True)]
    run = {"library": library, "estimator": estimator, "seed": seed, "steps": args.steps}
    return run | dict(zip(FIGURES, means, strict=True)) | {"seconds": seconds}


def table(rows: list[dict]) -> str:
    lines = [
        f"| library | estimator | seeds | {' | '.join(FIGURES.values())} | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for library, estimator in dict.fromkeys((row["library"], row["estimator"]) for row in rows):
        group = [row for row in rows if (row["library"], row["estimator"]) == (library, estimator)]
        cells = [library, estimator, str(len(group))]
        for key in FIGURES:
            values = [row[key] for row in group]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 1 if key == "active" else 4
            cells.append(f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}")
        cells.append(f"{statistics.fmean(row['seconds'] for row in group):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=[*LIBRARIES, "both"], default="both")
    parser.add_argument("--estimator", choices=[*ESTIMATORS, "both"], default="both")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind, seeds 0, 1, ... (5)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (1000)")
    parser.add_argument("--codebook-size", type=int, default=256, help="codewords (256)")
    parser.add_argument("--dim", type=int, default=32, help="features of a codeword (32)")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of AdamW (3e-4)")
    parser.add_argument("--alpha", type=float, default=10.0, help="weight of the commitment loss (10)")
    parser.add_argument("--batch-size", type=int, default=256, help="images of a step (256)")
    parser.add_argument("--subset", action="store_true", help="the 800 images that come with the package")
    parser.add_argument("--out", type=Path, default=Path("out/autoencoder"), help="folder of the results")
    args = parser.parse_args()

    pixels, _ = fashion_mnist_subset() if args.subset else fashion_mnist()
    images = torch.from_numpy(pixels.copy()).unsqueeze(1) / 127.5 - 1.0
    libraries = LIBRARIES if args.library == "both" else [args.library]
    estimators = ESTIMATORS if args.estimator == "both" else [args.estimator]
    runs = [(lib, est, seed) for est in estimators for lib in libraries for seed in range(args.seeds)]
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with Progress() as progress:
        bar = progress.add_task("", total=len(runs) * args.steps)
        for library, estimator, seed in runs:

            def report(step, figures, name=f"{library} {estimator} {seed}"):
                rec, cmt, active = figures
                text = f"{name} | rec loss {rec:.3f} | cmt loss {cmt:.3f} | active {active:5.1f} %"
                progress.update(bar, advance=1, description=text)

            rows.append(train(images, library, estimator, seed, args, report))
            (args.out / "autoencoder.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            (args.out / "autoencoder.md").write_text(table(rows))
    print(f"{len(images)} images, {args.steps} steps, {args.codebook_size} codewords, torch {torch.__version__}\n")
    print(table(rows))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
