"""A VQ-VAE on Fashion-MNIST, once with the straight-through gradient and once with the rotation trick.

    python examples/vqvae_fashion_mnist.py --out out/vqvae            # 800 images that come with the package, about a
    minute python examples/vqvae_fashion_mnist.py --full --steps 2000        # 20,000 images of Debian's
    dataset-fashion-mnist

Prints the reconstruction error on images that were not trained on, the share of codewords in use and their perplexity,
and saves originals and reconstructions as a picture.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import torch

from vqkernels.data import fashion_mnist, fashion_mnist_subset
from vqkernels.models import VQVAE

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps (400)")
    parser.add_argument("--codebook-size", type=int, default=256, help="codewords (256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--full", action="store_true", help="20,000 images of the whole data set instead of the 800 that come along"
    )
    parser.add_argument("--out", type=Path, default=Path("out/vqvae"), help="folder for the picture (out/vqvae)")
    args = parser.parse_args()

    pixels, _ = fashion_mnist(limit=20_000) if args.full else fashion_mnist_subset()
    images = torch.from_numpy(pixels.copy()).unsqueeze(1) / 255
    held_out = len(images) // 8
    train, test = images[:-held_out], images[-held_out:]
    print(f"{len(train)} images to train on, {len(test)} held out, {args.steps} steps, {args.codebook_size} codewords")
    print(f"{'estimator':<12}{'reconstruction error':>22}{'usage':>8}{'perplexity':>12}{'seconds':>9}")

    rows = [("original", test[:12])]
    for estimator in ("ste", "rotation"):
        torch.manual_seed(args.seed)
        model = VQVAE(codebook_size=args.codebook_size, estimator=estimator)
        start = time.perf_counter()
        model.fit(train, steps=args.steps, seed=args.seed)
        seconds = time.perf_counter() - start
        result = model.eval().evaluate(test)
        print(
            f"{estimator:<12}{result['reconstruction_error']:>22.5f}{result['usage']:>8.3f}{result['perplexity']:>12.1f}{seconds:>9.1f}"
        )
        with torch.no_grad():
            rows.append((estimator, model(test[:12]).reconstruction))

    figure, axes = plt.subplots(len(rows), 12, figsize=(12, 3.4))
    for (name, pictures), line in zip(rows, axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            axis.imshow(picture[0].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    figure.tight_layout()
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "reconstructions.png", dpi=120)
    print(f"saved {args.out / 'reconstructions.png'}")


if __name__ == "__main__":
    main()
