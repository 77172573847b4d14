"""vqkernels tokenize: semantic IDs for a catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = 4  # items whose neighbours are printed


def tokenize(
    data: Annotated[Path, typer.Option(help="Data folder: items.csv[.gz] and, if wanted, embeddings.npy.")],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer and semantic_ids.json.")],
    method: Annotated[
        str,
        typer.Option(
            help="random, rkmeans, hkmeans, pkmeans, rqvae-ste, rqvae-rotation, rqvae-reflection, rqvae-gumbel, simvq "
            "or fsq."
        ),
    ] = "rkmeans",
    levels: Annotated[
        int, typer.Option(min=1, max=25, help="Codes in a semantic ID, not counting the collision digit.")
    ] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes to choose from at each level.")] = 256,
    collisions: Annotated[
        str,
        typer.Option(
            help="Items with equal codes: digit (one more column), sinkhorn (other codes of the last level) or none."
        ),
    ] = "digit",
    seed: Annotated[int, typer.Option(help="Seed of codebooks and training.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier tokenizer in --out.")] = False,
) -> None:
    """Makes semantic IDs: a tokenizer that encodes new items, and the IDs as {"1": ["<a_5>", "<b_17>", ...], ...}."""
    from rich.console import Console
    from rich.table import Table

    from ..data import load_folder, write_index
    from ..semantic_ids import make_tokenizer, shared_prefixes
    from .compare import check_out, embedded

    console = Console(highlight=False)
    tokenizer = make_tokenizer(method, levels, codebook_size, seed, collisions)
    check_out(out, overwrite)
    catalogue = load_folder(data, items_only=True)
    console.print(f"{catalogue.num_items:,} items; texts embedded by: {embedded(catalogue, seed, console)}")
    tokenizer.fit(catalogue.embeddings)
    tokenizer.save(out, overwrite=overwrite)
    write_index(out / "semantic_ids.json", tokenizer.semantic_ids)

    report = tokenizer.report()
    table = Table(
        title=f"{method}: {100 * report['collision_rate']:.1f} % of items share their codes, "
        f"at most {report['largest_group']} the same"
    )
    for name in ("level", "codes", "used", "entropy", "perplexity", "energy so far"):
        table.add_column(name, justify="right")
    for level, size in enumerate(report["codebook_sizes"]):
        table.add_row(
            str(level + 1),
            str(size),
            f"{report['usage'][level]:.1%}",
            f"{report['entropy'][level]:.2f} nats",
            f"{report['perplexity'][level]:.1f}",
            f"{report['energy'][level]:.1%}" if report["energy"] else "none",
        )
    console.print(table)
    groups = ", ".join(f"{count:,} of {size}" for size, count in report["group_sizes"])
    console.print(f"Groups of items with equal codes: {groups}", soft_wrap=True)
    some = range(0, catalogue.num_items, -(-catalogue.num_items // EXAMPLES))
    for example in shared_prefixes(tokenizer.semantic_ids[:, :levels], catalogue.item_titles, some):
        console.print(f"\n{example['title']}  {example['codes']}", markup=False, soft_wrap=True)
        for shared in example["shared"]:
            titles = " | ".join(shared["titles"])
            more = f" and {shared['count'] - len(shared['titles']):,} more" * (shared["count"] > len(shared["titles"]))
            console.print(f"  shares {shared['levels']} of {levels}: {titles}{more}", markup=False, soft_wrap=True)
    for note in report["notes"]:
        console.print(f"Note: {note}", markup=False)
    console.print(f"Wrote {out}", soft_wrap=True)
