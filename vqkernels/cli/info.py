"""vqkernels info: versions, build, processor, and every op x backend with the reason where it cannot run."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .. import info as facts
from ..dispatch import backends, gpu_order
from ..registry import BACKENDS


def info() -> None:
    """Versions, build, processor, and which backend can run each operator here."""
    console = Console()
    table = Table(title="Machine", show_header=False)
    for key, value in facts.machine().items():
        if key == "simd" and (levels := facts.simd_levels()):
            value = f"{value}, of {', '.join(levels)} (VQK_SIMD chooses)"
        table.add_row(key, str(value))
    console.print(table)

    table = Table(title="Build", show_header=False)
    for key, value in (facts.build() or {"build": "none recorded: pip install --no-build-isolation -e ."}).items():
        table.add_row(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    console.print(table)

    table = Table(title="Operators: ✓ runs here, a number points to the reason below")
    table.add_column("operator")
    reasons: dict[str, int] = {}
    for backend in BACKENDS:
        table.add_column(backend, justify="center")
    table.add_column("GPU: first, then")
    for op, row in backends().items():
        cells = [
            "✓" if row[b] is True else str(reasons.setdefault(_general(op, row[b]), len(reasons) + 1)) for b in BACKENDS
        ]
        order, measured = gpu_order(op)
        choices = ", ".join(order).removesuffix(", reference")
        table.add_row(op, *cells, choices + (" (measured)" if measured else ""))
    console.print(table)
    for reason, number in reasons.items():
        console.print(f"{number}: {reason}", highlight=False)


def _general(op: str, reason: str) -> str:
    """The same reason for every operator is shown once."""
    return reason.replace(f" for {op} ", " for it ")
