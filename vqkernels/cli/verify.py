"""vqkernels verify: every op x backend x dtype that can run here against float64, then the speed on this GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from .. import verify as checks
from ..bench import Result, gpu
from ..dispatch import backends
from ..info import machine
from ..registry import BACKENDS, SPECS


def verify(
    op: Annotated[list[str] | None, typer.Option(help="Only these operators (repeatable).")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write one record per op x backend x dtype x case, the speeds and what did not run."
        ),
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure speed too, on a machine with a GPU.")] = True,
) -> None:
    """Checks every operator, backend and dtype that can run here against float64; on a machine with a GPU it then times
    the CUDA and Triton kernels beside torch, flash-kmeans and cuVS. Exit code 0: all passed; 1: something failed."""
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
    console.print(_correctness(names, records))
    failed = [r for r in records if not r.passed]
    for r in failed:
        line = f"{r.op} {r.backend} {r.dtype} [{r.case}]: {r.detail}"
        console.print(f"[red]FAILED[/red] {escape(line)}", highlight=False)

    not_run = checks.not_run(names)
    speeds: list[Result] = []
    no_speed = gpu.not_run() if speed else "switched off by --no-speed"
    if no_speed is None:
        for name in names:
            for group in _groups(gpu.speed(name)):
                speeds += group
                console.print(_speed(group))
    for reason, where in not_run.items():
        console.print(f"Not run: {escape(', '.join(where))}: {escape(reason)}", highlight=False)
    if no_speed:
        console.print(f"Speed not measured: {escape(no_speed)}", highlight=False)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "machine": machine(),
            "records": [r.as_dict() for r in records],
            "not_run": not_run,
            "speed": [r.as_dict() for r in speeds],
            "speed_not_run": no_speed,
        }
        json_file.write_text(json.dumps(content, indent=1))
    verdict = f"{len(records) - len(failed)} of {len(records)} cases passed"
    console.print(f"[bold red]{verdict}[/bold red]" if failed else f"[bold green]{verdict}[/bold green]")
    raise typer.Exit(1 if failed else 0)


def _correctness(names: tuple[str, ...], records: list[checks.Record]) -> Table:
    table = Table(title="Against the float64 reference: cases passed, largest error in eps")
    table.add_column("operator")
    for backend in BACKENDS:
        table.add_column(backend)
    for name in names:
        row = backends()[name]
        table.add_row(name, *(_cell([r for r in records if (r.op, r.backend) == (name, b)], row[b]) for b in BACKENDS))
    return table


def _cell(records: list[checks.Record], available: bool | str) -> str:
    if not records:
        return "[dim]–[/dim]" if available is not True else "[dim]not run[/dim]"
    passed = sum(r.passed for r in records)
    if passed < len(records):
        return f"[red]{passed}/{len(records)}[/red]"
    worst = max(r.error for r in records)
    return f"[green]✓ {passed}[/green]" + (f"  {worst:.1f}" if worst else "")


def _groups(results):
    """The contenders of one dtype and workload together."""
    group: list[Result] = []
    for result in results:
        if group and (result.shape, result.dtype) != (group[0].shape, group[0].dtype):
            yield group
            group = []
        group.append(result)
    if group:
        yield group


def _speed(group: list[Result]) -> Table:
    first = group[0]
    table = Table(title=escape(f"{first.op} {first.dtype} {first.shape}"), title_justify="left")
    for column in ("", "ms (p20–p80)", "GFLOP/s", "GB/s"):
        table.add_column(column, justify="left" if not column else "right")
    for r in group:
        if r.error:
            table.add_row(r.backend, f"[dim]{escape(r.error)}[/dim]")
        else:
            time = f"{r.median_ms:.3f} ({r.p20_ms:.3f}–{r.p80_ms:.3f})"
            table.add_row(r.backend, time, f"{r.gflops:.0f}", f"{r.gbps:.0f}")
    return table
