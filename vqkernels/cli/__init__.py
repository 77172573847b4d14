"""The ``vqkernels`` command: a file per subcommand, with a function of its name (or a dict of them, each a subcommand
of its own), imported when used."""

from __future__ import annotations

import functools
import importlib
import sys

try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    sys.exit("The vqkernels command needs typer and rich. Run: pip install 'vqkernels[cli]'")

COMMANDS = (
    "info",
    "verify",
    "bench",
    "tune",
    "demo",
    "data",
    "compare",
    "cold-start",
    "compare-codebooks",
    "tokenize",
    "recommend",
    "report",
    "train",
    "reconstruct",
    "generate",
)


class Commands(TyperGroup):
    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        word = name.replace("-", "_")
        try:
            function = getattr(importlib.import_module(f".{word}", __name__), word)
        except ImportError as error:
            function = _cannot_run(error)
        single = typer.Typer(add_completion=False)
        if isinstance(function, dict):
            single.callback(help=sys.modules[f"{__name__}.{word}"].__doc__)(lambda: None)
            for part, body in function.items():
                single.command(part)(_plain_errors(body, f"{name} {part}"))
        else:
            single.command(name)(_plain_errors(function, name))
        return typer.main.get_command(single)


def _cannot_run(error: ImportError):
    def command() -> None:
        raise error

    command.__doc__ = f"Cannot run here: {error}"
    return command


def _plain_errors(function, name: str):
    """Bad input ends in one paragraph and exit code 2, without a traceback."""

    @functools.wraps(function)
    def command(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            from rich.console import Console

            console = Console(stderr=True)
            console.print(f"[bold red]vqkernels {name}:[/bold red] ", end="")
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)  # a path stays in one piece
            raise typer.Exit(2) from None

    return command


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Exact, fast, memory-lean vector quantization for PyTorch, and recommendation on semantic IDs."""
