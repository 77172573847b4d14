"""vqkernels report: draws a finished comparison again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Option(help="Folder that vqkernels demo or compare wrote.")]) -> None:
    """Prints a comparison's table and verdicts again, and writes its pictures and report.html anew."""
    from rich.console import Console

    from ..data import load_folder
    from ..recommend.compare import read_results
    from ..recommend.evaluation import leave_one_out
    from ..recommend.report import verdicts, write_report
    from .compare import table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 150)
    results = read_results(run)
    page = write_report(run)
    console.print(table(results))
    targets = leave_one_out(load_folder(run / "catalogue").sequences).test.targets
    for sentence in verdicts(run, results, targets):
        console.print(sentence)
    console.print(f"\nWrote {page}", soft_wrap=True)
