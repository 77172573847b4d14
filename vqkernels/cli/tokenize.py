"""vqkernels tokenize: semantic IDs for a catalogue."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated

import typer


def tokenize(
    data: Annotated[Path, typer.Option(help="Data folder: items.csv[.gz] and, if wanted, embeddings.npy.")],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer and semantic_ids.json.")],
    method: Annotated[
        str, typer.Option(help="random, rkmeans, hkmeans, rqvae-ste, rqvae-rotation or rqvae-reflection.")
    ] = "rkmeans",
    levels: Annotated[
        int, typer.Option(min=1, max=25, help="Codes in a semantic ID, not counting the collision digit.")
    ] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes to choose from at each level.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of codebooks and training.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier tokenizer in --out.")] = False,
) -> None:
    """Makes semantic IDs: a tokenizer that encodes new items, and the IDs as {"1": ["<a_5>", "<b_17>", ...], ...}."""
    from rich.console import Console
    from rich.table import Table

    from ..data import load_folder
    from ..data.catalogue import write_atomic
    from ..recommend.compare import make_tokenizer
    from .compare import check_out, embedded

    console = Console(highlight=False)
    tokenizer = make_tokenizer(method, levels, codebook_size, seed)
    check_out(out, overwrite)
    catalogue = load_folder(data, items_only=True)
    console.print(f"{catalogue.num_items:,} items; texts embedded by: {embedded(catalogue, seed, console)}")
    tokenizer.fit(catalogue.embeddings)
    tokenizer.save(out, overwrite=overwrite)
    ids = {
        item: [f"<{ascii_lowercase[level]}_{code}>" for level, code in enumerate(row)]
        for item, row in enumerate(tokenizer.semantic_ids.tolist(), 1)
    }
    write_atomic(out / "semantic_ids.json", json.dumps(ids, indent=0).encode())

    report = tokenizer.report()
    table = Table(
        title=f"{method}: {100 * report['collision_rate']:.1f} % of items share their codes, "
        f"at most {report['largest_group']} the same"
    )
    for name in ("level", "codes", "used", "perplexity"):
        table.add_column(name, justify="right")
    for level, size in enumerate(report["codebook_sizes"]):
        table.add_row(
            str(level + 1), str(size), f"{100 * report['usage'][level]:.1f} %", f"{report['perplexity'][level]:.1f}"
        )
    console.print(table)
    for note in report["notes"]:
        console.print(f"Note: {note}", markup=False)
    console.print(f"Wrote {out}", soft_wrap=True)
