"""vqkernels data: published data sets into a data folder, and what a data set holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SOURCES = typer.Argument(help="Files, or a folder that holds them.")
FORMATS = "amazon2014, amazon2018, amazon2023, recbole, movielens, s3rec, sasrec or lcrec"


def import_(
    sources: Annotated[list[Path], SOURCES],
    format: Annotated[str, typer.Option(help=f"{FORMATS}.")],
    out: Annotated[Path, typer.Option(help="Data folder to write.")],
    core: Annotated[int, typer.Option(min=0, help="Keep users and items with at least so many interactions.")] = 0,
    embeddings: Annotated[
        Path | None, typer.Option(help="Item embeddings: .npy, .safetensors (rows by item_id) or .parquet (with ids).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the data files in --out.")] = False,
) -> None:
    """Reads a published data set and writes it as a data folder."""
    from ..data import import_data, save_folder
    from ..data.index_json import write_index

    imported = import_data(sources, format, core=core, embeddings=embeddings)
    save_folder(imported.catalogue, out, overwrite=overwrite)
    if imported.semantic_ids is not None:
        write_index(out / "semantic_ids.json", imported.semantic_ids)
    _print(imported.catalogue, imported.warnings)
    typer.echo(f"Wrote {out}")


def describe(
    sources: Annotated[list[Path], SOURCES],
    format: Annotated[str | None, typer.Option(help=f"{FORMATS}; without it, a data folder.")] = None,
    core: Annotated[int, typer.Option(min=0, help="As in import.")] = 0,
) -> None:
    """Counts what a data set holds and warns of what is odd about it. Writes nothing."""
    from ..data import DataError, import_data, load_folder
    from ..data.importer import look_over

    if format is not None:
        imported = import_data(sources, format, core=core)
        _print(imported.catalogue, imported.warnings)
        return
    if len(sources) != 1 or core:
        raise DataError("a data folder is described alone and as it is. Give --format for other files, or with --core")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lost order: it is among those printed here
        catalogue = load_folder(sources[0])
    _print(catalogue, look_over(catalogue))


def _print(catalogue, notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..data.importer import describe as facts

    console = Console(highlight=False)
    table = Table(title=catalogue.name, title_justify="left", show_header=False)
    for name, value in facts(catalogue):
        table.add_row(name, value)
    console.print(table)
    for note in notes:
        console.print(f"Warning: {note}.", markup=False, soft_wrap=True)


data = {"import": import_, "describe": describe}
