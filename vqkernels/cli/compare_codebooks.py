"""vqkernels compare-codebooks: gradient estimators, remedies against collapse and codebook sizes in one table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

OWN = ("results.json", "report.html", "originals.npy", "pictures")
PICTURES = ("usage.png", "gradients.png", "sizes.png", "speed.png", "reconstructions.png")
QUICK = {
    "data": "fashion-mnist-subset",
    "sizes": (32, 64),
    "seeds": 1,
    "steps": 10,
    "width": 8,
    "dim": 8,
    "test_images": 64,
    "feature_images": 32,
    "timed_steps": 1,
}


def compare_codebooks(
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html and pictures.")] = Path(
        "out/codebooks"
    ),
    data: Annotated[
        str, typer.Option(help="fashion-mnist, fashion-mnist-subset, emoji or a folder of images.")
    ] = "fashion-mnist",
    size: Annotated[int | None, typer.Option(min=4, help="Scale images to so many pixels each way.")] = None,
    estimators: Annotated[
        str, typer.Option(help="Comma separated: ste, rotation, reflection, gumbel.")
    ] = "ste,rotation,reflection,gumbel",
    remedies: Annotated[
        str, typer.Option(help="Comma separated: none, kmeans, revival, entropy, simvq, fsq.")
    ] = "none,kmeans,revival,entropy,simvq,fsq",
    sizes: Annotated[
        str, typer.Option(help="Codewords, comma separated; all remedies are tried at the first.")
    ] = "256,1024,4096,16384,65536",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each row, with seeds 0, 1, ...")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a run.")] = 200,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small everything, to see that it works; the other options do not count.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the finished runs of the same comparison.")] = False,
) -> None:
    """Trains a small VQ-VAE with each estimator, remedy and codebook size: one table, one report."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..data import DataError
    from ..images.compare import Comparison, Settings, plan, verdicts
    from ..images.compare_report import write_report
    from .compare import check_out

    try:
        codebooks = tuple(int(k) for k in _words(sizes))
    except ValueError:
        raise DataError(f"--sizes {sizes}: give whole numbers, as in 256,1024") from None
    given = {
        "data": data,
        "size": size,
        "estimators": _words(estimators),
        "remedies": _words(remedies),
        "sizes": codebooks,
        "seeds": seeds,
        "steps": steps,
    }
    settings = Settings(**(QUICK if quick else given))
    check_out(out, overwrite, resume)
    if overwrite:
        for path in (out / name for name in (*OWN, *PICTURES)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 190)
    with console.status("Reading images"):
        comparison = Comparison(out, settings, resume=resume)
    # seed by seed, so that a comparison that is stopped has every row, with fewer runs
    runs = [(case, seed) for seed in range(settings.seeds) for case in plan(settings)]
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(runs) * settings.steps)
        for case, seed in runs:
            if comparison.finished(case, seed):
                progress.advance(task, settings.steps)
                continue
            progress.update(task, description=f"{case}, seed {seed}")
            comparison.run(case, seed, lambda: progress.advance(task))
    console.print(table(comparison.results))
    for sentence in verdicts(comparison.results):
        console.print(sentence)
    with console.status("Drawing"):
        page = write_report(out)
    console.print(f"\nWrote {page} and {out / 'results.json'}", soft_wrap=True)


def table(results: dict):
    """The comparison as a rich table."""
    from rich.table import Table

    from ..images.compare import COLUMNS, ESTIMATORS, REMEDIES, summary
    from ..images.compare_report import cell

    out = Table(title=f"Codebooks on {results['settings']['data']}", title_justify="left")
    out.add_column("K", justify="right")
    out.add_column("estimator", no_wrap=True)
    out.add_column("remedy", no_wrap=True)
    for column, name in COLUMNS.items():
        out.add_column(name, justify="right", no_wrap="step" not in column)
    before = None
    for line in summary(results):
        case = line["case"]
        if before not in (None, case.codebook_size):
            out.add_section()
        before = case.codebook_size
        estimator = "own" if case.remedy == "fsq" else ESTIMATORS[case.estimator]
        cells = (cell(column, line[column]) for column in COLUMNS)
        out.add_row(str(line["codes"]), estimator, REMEDIES[case.remedy], *cells)
    return out


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
