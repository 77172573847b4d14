"""vqkernels verify: every op x backend x dtype that can run here against the float64 reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import verify as checks
from ..dispatch import backends
from ..info import machine
from ..registry import BACKENDS, SPECS


def verify(
    op: Annotated[list[str] | None, typer.Option(help="Only these operators (repeatable).")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write one record per op x backend x dtype x case.")
    ] = None,
) -> None:
    """Checks every operator, backend and dtype that can run here against float64. Exit code 0: all passed; 1:
    something failed."""
    console = Console()
    unknown = set(op or ()) - set(SPECS)
    if unknown:
        console.print(
            f"[red]verify: unknown operator {', '.join(sorted(unknown))}; there are: {', '.join(SPECS)}[/red]"
        )
        raise typer.Exit(2)
    names = tuple(op or SPECS)
    records: list[checks.Record] = []
    for name in track(names, description="Verifying", console=console, transient=True):
        records += checks.run(ops=(name,))

    table = Table(title="Against the float64 reference: cases passed, largest error in eps")
    table.add_column("operator")
    for backend in BACKENDS:
        table.add_column(backend)
    for name in names:
        table.add_row(
            name,
            *(_cell([r for r in records if (r.op, r.backend) == (name, b)], backends()[name][b]) for b in BACKENDS),
        )
    console.print(table)
    failed = [r for r in records if not r.passed]
    for r in failed:
        console.print(
            f"[red]FAILED[/red] {r.op} {r.backend} {r.dtype} [{r.case}]: {r.detail}", markup=True, highlight=False
        )
    if json_file:
        json_file.write_text(json.dumps({"machine": machine(), "records": [r.as_dict() for r in records]}, indent=1))
    verdict = f"{len(records) - len(failed)} of {len(records)} cases passed"
    console.print(f"[bold red]{verdict}[/bold red]" if failed else f"[bold green]{verdict}[/bold green]")
    raise typer.Exit(1 if failed else 0)


def _cell(records: list[checks.Record], available: bool | str) -> str:
    if not records:
        return "[dim]–[/dim]" if available is not True else "[dim]not run[/dim]"
    passed = sum(r.passed for r in records)
    if passed < len(records):
        return f"[red]{passed}/{len(records)}[/red]"
    worst = max(r.error for r in records)
    return f"[green]✓ {passed}[/green]" + (f"  {worst:.1f}" if worst else "")
