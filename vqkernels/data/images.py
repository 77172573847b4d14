"""Fashion-MNIST from Debian's package, and a small subset of it that comes with this package."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from .catalogue import DataError, write_atomic
from .movielens import default_cache_dir

DEBIAN_PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def fashion_mnist(cache_dir=None, limit: int | None = None, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST: uint8 images [N, 28, 28] and int64 labels [N] (names in ``CLASSES``), the first ``limit`` of a
    split.

    ``split``: "train" (60,000) or "test" (10,000). Read from Debian's package dataset-fashion-mnist (MIT licence):
    where it is installed, else from ``cache_dir`` (default ``~/.cache/vqkernels``), where the first call puts it with
    apt-get, no root needed. DataError says how to get it elsewhere; ``fashion_mnist_subset`` needs nothing.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown. Use 'train' or 'test'")
    prefix, count = SPLITS[split]
    names = (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    folder = INSTALLED
    if not all((folder / name).is_file() for name in names):
        folder = Path(cache_dir or default_cache_dir()) / "fashion-mnist"
        if not all((folder / name).is_file() for name in names):
            how = (
                f"On Debian or Ubuntu run 'apt-get install {DEBIAN_PACKAGE}'; elsewhere put the four files "
                f"{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz of Fashion-MNIST into {folder}; "
                "or use fashion_mnist_subset(), which comes with the package"
            )
            fetch_debian(DEBIAN_PACKAGE, INSTALLED, "*-ubyte.gz", folder, "Fashion-MNIST", how)
    images = _read_idx(folder / names[0], (count, 28, 28))
    labels = _read_idx(folder / names[1], (count,)).astype(np.int64)
    return images[:limit], labels[:limit]


def fashion_mnist_subset() -> tuple[np.ndarray, np.ndarray]:
    """800 images of Fashion-MNIST's test split, 80 of each class: uint8 [800, 28, 28] and int64 labels [800]. Works
    offline."""
    with np.load(Path(__file__).with_name("fashion_mnist_subset.npz"), allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"].astype(np.int64)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An idx file: two zero bytes, the type (8 = uint8), the number of dimensions, each as a big-endian uint32, the
    data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}). Remove it and run again to fetch it") from None
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    if not data.startswith(header) or len(data) != len(header) + int(np.prod(shape)):
        raise DataError(f"{path}: not an idx file of uint8 {list(shape)}. Remove it and run again to fetch it")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def fetch_debian(package: str, inside: Path, pattern: str, folder: Path, what: str, how: str) -> None:
    """Downloads a Debian package, not installing it, and copies the files ``inside / pattern`` into ``folder``.
    ``what`` it is and ``how`` it can be had otherwise go into messages. Raises DataError."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise DataError(f"{what} is neither in {inside} nor in {folder}, and there is no apt-get to fetch it. {how}")
    with tempfile.TemporaryDirectory() as temporary:
        print(f"fetching {what} (package {package}) ...", file=sys.stderr)
        os.chmod(temporary, 0o755)  # apt-get drops its privileges to fetch and would warn
        result = subprocess.run(["apt-get", "download", "-qq", package], cwd=temporary, capture_output=True, text=True)
        packages = list(Path(temporary).glob("*.deb"))
        if result.returncode == 0 and packages:
            result = subprocess.run(["dpkg", "-x", packages[0], temporary], capture_output=True, text=True)
        if result.returncode or not packages:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"{what} is not in {folder} and could not be fetched: {reason}. {how}")
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted((Path(temporary) / inside.relative_to("/")).glob(pattern)):
            write_atomic(folder / file.name, file.read_bytes())
