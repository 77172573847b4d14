"""vqkernels demo: the whole idea on MovieLens-100k."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

METHODS = ("random", "rkmeans", "rqvae-ste", "rqvae-rotation")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html, pictures and models.")],
    seed: Annotated[int, typer.Option(help="Seed of codes, weights and batches.")] = 0,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes of TIGER over the training items; fewer is a quick look.")
    ] = 6,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the finished rows of the same run in --out.")] = False,
) -> None:
    """MovieLens-100k from titles to recommendations: four kinds of semantic IDs, TIGER on each, four baselines."""
    from rich.console import Console

    from ..data import load_folder, movielens100k
    from ..recommend.compare import Settings
    from ..recommend.report import LABELS, example
    from .compare import check_out, run

    began = time.perf_counter()
    check_out(out, overwrite, resume)
    # 64 codes a level: 1,682 films would leave most of a larger codebook's codes with a handful of films each
    settings = Settings(seed=seed, levels=3, codebook_size=64, epochs=epochs)
    results = run(movielens100k(), METHODS, settings, out, overwrite=overwrite, resume=resume)

    console = Console(highlight=False)
    shown = example(out, results, load_folder(out / "catalogue"))
    console.print(
        f"\n[bold]User {shown['user']}[/bold], drawn by the seed, has {shown['seen']} films behind; the latest:"
    )
    for title in shown["history"]:
        console.print(f"  {title}", markup=False)
    console.print(f"TIGER on {LABELS[shown['method']]} recommends:")
    for place, (title, hit) in enumerate(shown["recommended"], 1):
        console.print(f"  {place:2}. {title}{'   <- what came next' if hit else ''}", markup=False)
    if not any(hit for _, hit in shown["recommended"]):
        console.print(f"What came next was {shown['next']}, which is not in the list.", markup=False)
    console.print(f"\nAll of it took {time.perf_counter() - began:.0f} s.")
