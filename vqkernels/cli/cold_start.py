"""vqkernels cold-start: who can recommend items that appeared after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OWN = ("results.json", "cold_start.png")


def cold_start(
    data: Annotated[
        Path, typer.Option(help="Data folder: sequences.txt[.gz], items.csv[.gz] and, if wanted, embeddings.npy.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results.json and cold_start.png.")],
    method: Annotated[str, typer.Option(help="Semantic IDs, as in vqkernels compare.")] = "rkmeans",
    share: Annotated[float, typer.Option(help="Of the test users' last items that training must not see.")] = 0.05,
    levels: Annotated[int, typer.Option(min=1, help="Codes in a semantic ID.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes to choose from at each level.")] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of TIGER and of LIGER over the training items.")] = 6,
    beams: Annotated[int, typer.Option(min=10, help="Beams in the evaluation.")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, with seeds 0, 1, ...")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
) -> None:
    """TIGER, LIGER and the baselines on items that training has seen and on items that it has not: one table."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from ..data import load_folder
    from ..recommend.cold_start import cold_start
    from ..recommend.compare import Settings, check_methods
    from .compare import check_out, embedded

    check_methods([method])
    check_out(out, overwrite)
    for name in OWN if overwrite else ():
        (out / name).unlink(missing_ok=True)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 150)
    catalogue = load_folder(data)
    console.print(f"[bold]{catalogue}[/bold]\nItem texts embedded by: {embedded(catalogue, 0, console)}")
    settings = Settings(levels=levels, codebook_size=codebook_size, epochs=epochs, beams=beams)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=1.0)
        results = cold_start(
            catalogue,
            out,
            settings,
            method=method,
            share=share,
            seeds=seeds,
            progress=lambda done, note: progress.update(task, completed=done, description=note),
        )
    console.print(table(results))
    console.print(f"\nWrote {out / 'results.json'} and {out / 'cold_start.png'}", soft_wrap=True)


def table(results: dict):
    """The comparison as a rich table."""
    from rich.table import Table

    from ..recommend.cold_start import ROWS, summary

    facts = results["data"]
    title = (
        f"{facts['name']}: {facts['cold_items']} items hidden from training, {facts['cold_users']} test users want one"
    )
    out = Table(title=title, title_justify="left")
    out.add_column("", no_wrap=True)
    for column in ("HR@10", "NDCG@10", "cold HR@10", "cold NDCG@10"):
        out.add_column(column, justify="right")
    spread = results["settings"]["seeds"] > 1
    for name, parts in summary(results).items():
        cells = (parts[part][metric] for part in ("in_set", "cold") for metric in ("HR@10", "NDCG@10"))
        out.add_row(ROWS[name], *(f"{mean:.4f}" + (f" ± {sd:.4f}" if spread else "") for mean, sd in cells))
    return out
