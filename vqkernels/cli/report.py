"""vqkernels report: one HTML page of what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder that vqkernels train, compare, compare-codebooks or demo wrote.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The same folder, as an option.")] = None,
) -> None:
    """Writes RUN/report.html anew: of a trained model of images, of a comparison of codebooks, or of a comparison of
    semantic IDs, whose table and verdicts are printed too."""
    from rich.console import Console

    from ..data import DataError

    if (folder is None) == (run is None):
        raise DataError("give one folder, as in: vqkernels report out/vqvae")
    run = folder or run
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 190)
    if (run / "config.yaml").is_file():
        from ..images.report import write_report

        page = write_report(run)
    elif (run / "originals.npy").is_file():
        from ..images.compare import read_results, verdicts
        from ..images.compare_report import write_report
        from .compare_codebooks import table

        results = read_results(run)
        page = write_report(run)
        console.print(table(results))
        for sentence in verdicts(results):
            console.print(sentence)
    elif not (run / "results.json").is_file():
        what = "holds no run" if run.is_dir() else "does not exist"
        raise DataError(f"{run} {what}. Give a folder that vqkernels train, compare, compare-codebooks or demo wrote")
    else:
        page = _recommendation(run, console)
    console.print(f"\nWrote {page}", soft_wrap=True)


def _recommendation(run: Path, console) -> Path:
    from ..data import load_folder
    from ..recommend.compare import read_results
    from ..recommend.report import verdicts, write_report
    from .compare import table

    results = read_results(run)
    page = write_report(run)
    console.print(table(results))
    for sentence in verdicts(run, results, load_folder(run / "catalogue")):
        console.print(sentence)
    return page
