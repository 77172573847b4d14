"""vqkernels compare: semantic IDs by several methods, TIGER trained on each, baselines beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

OWN = (
    "results.json",
    "report.html",
    "scores.png",
    "usage.png",
    "collisions.png",
    "training.png",
    "invalid.png",
    "accuracy.png",
    "catalogue",
    "methods",
)


def compare(
    data: Annotated[
        Path, typer.Option(help="Data folder: sequences.txt[.gz], items.csv[.gz] and, if wanted, embeddings.npy.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html, pictures and models.")],
    methods: Annotated[
        str,
        typer.Option(
            help="all, or, comma separated: random, rkmeans, hkmeans, pkmeans, rqvae-ste, rqvae-rotation, "
            "rqvae-reflection, rqvae-gumbel, simvq, fsq, collaborative."
        ),
    ] = "random,rkmeans,rqvae-ste,rqvae-rotation",
    levels: Annotated[int, typer.Option(min=1, help="Codes in a semantic ID.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes to choose from at each level.")] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of TIGER over the training items.")] = 6,
    beams: Annotated[int, typer.Option(min=10, help="Beams in the evaluation.")] = 50,
    test_users: Annotated[
        int, typer.Option(min=0, help="So many of the test users are drawn to be evaluated on; 0: all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of codes, weights and batches.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, with seeds SEED, SEED + 1, ...")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the finished rows of the same run in --out.")] = False,
) -> None:
    """Compares semantic IDs on your data: one table, one report."""
    from ..data import load_folder
    from ..recommend.compare import Settings, check_methods

    chosen = check_methods([name.strip() for name in methods.split(",") if name.strip()])
    check_out(out, overwrite, resume)
    settings = Settings(
        seed=seed, levels=levels, codebook_size=codebook_size, epochs=epochs, beams=beams, test_users=test_users
    )
    run(load_folder(data), chosen, settings, out, seeds=seeds, overwrite=overwrite, resume=resume)


def check_out(out: Path, overwrite: bool = False, resume: bool = False) -> None:
    """Refuses an output folder that holds something, unless told what to do with it."""
    from ..data import DataError

    if overwrite and resume:
        raise DataError("--overwrite and --resume exclude each other; give one")
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite and not resume:
        raise DataError(
            f"--out {out} exists and is not empty. Choose another folder, or add --overwrite to replace the run in it, "
            "or --resume to go on with a run that was stopped"
        )


def remove(folder: Path, names) -> None:
    for path in (folder / name for name in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def embedded(catalogue, seed: int, console) -> str:
    """Gives the catalogue embeddings if it has none. Returns in words where they are from."""
    from ..data import embed_texts

    if catalogue.embeddings is not None:
        return f"the data folder's own embeddings, {catalogue.embeddings.shape[1]} features"
    with console.status("Embedding the item texts"):
        catalogue.embeddings, description = embed_texts(catalogue.item_texts, seed=seed, progress=False)
    return description


def run(
    catalogue, methods, settings, out: Path, *, seeds: int = 1, overwrite: bool = False, resume: bool = False
) -> dict:
    """The work of compare and demo, with progress, table and verdicts on the terminal. Returns the results."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from ..recommend.compare import BASELINES, METHODS, Comparison
    from ..recommend.report import verdicts, write_report

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 150)
    console.print(f"[bold]{catalogue}[/bold]")
    embedding = embedded(catalogue, settings.seed, console)
    console.print(f"Item texts embedded by: {embedding}")
    remove(out, OWN if overwrite else ())
    comparison = Comparison(catalogue, out, settings, embedding=embedding, resume=resume)

    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        runs = range(settings.seed, settings.seed + seeds)
        whole = progress.add_task("All methods", total=len(methods) * seeds, note="")
        for seed, method in ((seed, method) for seed in runs for method in (BASELINE, *methods)):
            name = (METHODS | BASELINES)[method] + (f", seed {seed}" if seeds > 1 else "")
            if comparison.finished(method, seed):
                console.print(f"{name}: finished before, kept")
                progress.update(whole, advance=method != BASELINE)
                continue
            task = progress.add_task(name, total=1.0, note="")
            if method == BASELINE:
                comparison.baselines(
                    seed, lambda done, loss, task=task: progress.update(task, completed=done, note=f"loss {loss:.3f}")
                )
                progress.update(task, visible=False)
                continue
            before = progress.tasks[whole].completed

            def heard(stage, share, note="", task=task, before=before):
                weight, start = STAGES[stage]
                done = start + weight * share
                progress.update(task, completed=done, note=f"{stage} {note}")
                progress.update(whole, completed=before + done)

            row = comparison.run(method, seed, progress=heard, tokens=False)
            progress.update(task, visible=False)
            progress.update(whole, completed=before + 1)
            console.print(
                f"{name}: HR@10 {row['HR@10']:.4f}, NDCG@10 {row['NDCG@10']:.4f}; "
                f"semantic IDs {row['tokenizer']['train_seconds']:.1f} s, "
                f"TIGER {row['train_seconds']:.0f} s, all {row['seconds']:.0f} s"
            )
    results = comparison.results
    console.print(table(results))
    for sentence in verdicts(out, results, catalogue):
        console.print(sentence)
    console.print(f"All rows together took {results['seconds']:.0f} s.")
    with console.status("Drawing"):
        page = write_report(out)
    console.print(f"\nWrote {page} and {out / 'results.json'}", soft_wrap=True)
    return results


BASELINE = "sasrec"  # the slow one of the baselines, which run with it
STAGES = {"semantic IDs": (0.0, 0.0), "training": (0.85, 0.05), "evaluation": (0.08, 0.9), "free beams": (0.02, 0.98)}


def table(results: dict):
    """The comparison as a rich table."""
    from rich.table import Table

    from ..recommend.compare import summary
    from ..recommend.report import COLUMNS, HEADS, LABELS, cell

    out = Table(title=f"{results['data']['name']}: leave one out, full ranking", title_justify="left")
    out.add_column("semantic IDs", no_wrap=True)
    for column in COLUMNS:
        out.add_column(HEADS.get(column, column), justify="right")
    before = None
    for row in summary(results):
        if before not in (None, row["kind"]):
            out.add_section()
        before = row["kind"]
        out.add_row(LABELS[row["method"]], *(cell(row, c) for c in COLUMNS))
    return out
