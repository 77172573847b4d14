"""How tight the error bounds are: how many codewords of a row the coarse passes leave to the canonical comparison.

python bench/survivors.py [--data FOLDER] [--rows 16384] [--codes 1024] [--features 64]

Gaussian, clustered and lognormal rows and codewords, and what an RQ-VAE trained on a catalogue's embeddings
(MovieLens-100k without --data) quantizes at each of its levels. The torch-free driver counts, for every SIMD level:
of a row, the codewords that were compared in float64, and those for which a float32 score had to say more than bytes.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from vqkernels.data import embed_texts, load_folder, movielens100k
from vqkernels.info import machine
from vqkernels.ops import residual_quantize
from vqkernels.semantic_ids import RQVAETokenizer

ROOT = Path(__file__).resolve().parent.parent


def drawn(rows: int, codes: int, features: int):
    """Pairs of rows and codebook, float32, by kind of data."""
    rng = np.random.default_rng(0)
    yield "Gaussian", rng.normal(size=(rows, features)), rng.normal(size=(codes, features))
    centres = rng.normal(size=(codes // 2, features))  # two codewords and many rows around each
    near = lambda n: centres[rng.integers(len(centres), size=n)] + 0.1 * rng.normal(size=(n, features))  # noqa: E731
    yield "clustered", near(rows), near(codes)
    yield "lognormal", rng.lognormal(sigma=1.5, size=(rows, features)), rng.lognormal(sigma=1.5, size=(codes, features))


def trained(embeddings, codes: int):
    """What each level of a trained RQ-VAE gets, and its codebook."""
    tokenizer = RQVAETokenizer(codebook_size=codes).fit(embeddings)
    model = tokenizer._model
    with torch.inference_mode():
        left = model.encoder(tokenizer._standardise(torch.as_tensor(embeddings)))
    for level, codebook in enumerate(model.quantizer.codebooks.detach()):
        yield f"RQ-VAE, level {level + 1}", left.numpy(), codebook.numpy()
        left = left - residual_quantize(left, [codebook]).quantized


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path)
    arguments.add_argument("--rows", type=int, default=16384)
    arguments.add_argument("--codes", type=int, default=1024)
    arguments.add_argument("--features", type=int, default=64)
    a = arguments.parse_args()
    if a.data is None:
        catalogue = movielens100k()
        embeddings, _ = embed_texts(catalogue.item_texts)
    else:
        embeddings = load_folder(a.data).embeddings
    print(f"{a.codes} codewords; {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, z, codebook in [*drawn(a.rows, a.codes, a.features), *trained(embeddings, a.codes)]:
            path = Path(folder) / name
            with path.open("wb") as file:
                np.array([len(z), len(codebook), z.shape[1]], dtype=np.int64).tofile(file)
                for part in (z, codebook):
                    np.ascontiguousarray(part, dtype=np.float32).tofile(file)
            files.append(path)
        subprocess.run([ROOT / "tests/cpp/run", "survivors", *files], check=True)


if __name__ == "__main__":
    main()
