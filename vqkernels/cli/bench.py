"""vqkernels bench: operators and layers against every installed alternative and against the machine's limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import bench as harness


def bench(
    op: Annotated[list[str] | None, typer.Option(help=f"Only these (repeatable): {', '.join(harness.rows())}.")] = None,
    seconds: Annotated[float, typer.Option(help="Time spent on each contender.")] = 2.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: PyTorch's default.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write conditions and one record per contender.")
    ] = None,
) -> None:
    """Times operators and layers, after checking each answer, beside torch, faiss-cpu and vector-quantize-pytorch where
    installed."""
    console = Console()
    all_rows = harness.rows()
    unknown = set(op or ()) - set(all_rows)
    if unknown:
        console.print(
            f"[red]bench: unknown operator {', '.join(sorted(unknown))}; there are: {', '.join(all_rows)}[/red]"
        )
        raise typer.Exit(2)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    with console.status("Measuring the machine's limits"):
        limits = harness.conditions()
    console.print(", ".join(f"{k} {v}" for k, v in limits.items()), highlight=False)
    results: list[harness.Result] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)
        for name in op or all_rows:
            for row in all_rows[name]():
                progress.update(bar, description=f"{row.op} {row.shape}")
                group = list(harness.measure(row, limits, seconds))
                results += group
                progress.console.print(_table(row, group))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"conditions": limits, "records": [r.as_dict() for r in results]}, indent=1))
        console.print(f"Wrote {json_file}")
    wrong = [r for r in results if r.backend == "vqkernels" and r.error]
    for r in wrong:
        console.print(f"[red]{r.op} {r.shape}: {r.error}[/red]")
    raise typer.Exit(1 if wrong else 0)


def _table(row: harness.Row, group: list[harness.Result]) -> Table:
    table = Table(title=f"{row.op} {row.shape}", title_justify="left")
    roof = {"fma": ("GFLOP/s", "% of FMA peak"), "copy": ("GB/s", "% of copy"), "": ()}[row.roof]
    for column in ("", "ms (p20–p80)", *roof, "extra MB", "ours is"):
        table.add_column(column, justify="left" if not column else "right")
    ours = next((r.median_ms for r in group if r.backend == "vqkernels"), float("nan"))
    for r in group:
        if r.error:
            table.add_row(r.backend, f"[dim]{r.error}[/dim]")
            continue
        ratio = (
            ""
            if r.backend == "vqkernels"
            else f"{r.median_ms / ours:.1f}x faster"
            if r.median_ms >= ours
            else f"[red]{ours / r.median_ms:.1f}x slower[/red]"
        )
        speed = r.gflops if row.roof == "fma" else r.gbps
        table.add_row(
            f"[bold]{r.backend}[/bold]" if r.backend == "vqkernels" else r.backend,
            f"{r.median_ms:.1f} ({r.p20_ms:.1f}–{r.p80_ms:.1f})",
            *((f"{speed:.0f}", f"{100 * r.limit:.0f}") if roof else ()),
            f"{r.extra_mb:.0f}",
            ratio,
        )
    return table
