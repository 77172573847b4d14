"""vqkernels generate: pictures from a prior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    out: Annotated[Path, typer.Argument(help="The picture to write, such as samples.png.")],
    run: Annotated[Path, typer.Option(help="Folder that vqkernels train prior wrote.")] = Path("out/prior"),
    condition: Annotated[
        list[str] | None,
        typer.Option(help="A class, by name or number, or a text; a row each (repeatable). Default: all classes."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images in a row.")] = 8,
    temperature: Annotated[float, typer.Option(help="Below 1: likelier codes; above: more varied ones.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest codes; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest codes that have this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    enlarge: Annotated[int, typer.Option(min=1, help="Draw every pixel this many times as large.")] = 2,
) -> None:
    """Draws images from a prior, a row for each condition, into one picture."""
    from rich.console import Console

    from ..images import load_run, sample
    from ..images.pictures import check_picture_file, grid, write_image

    check_picture_file(out)
    facts = getattr(load_run(run)[0], "facts", {})
    if not condition and facts.get("text_dim"):
        raise ValueError(f"{run} was trained on texts; say what to draw, as in --condition 'red heart'")
    rows = condition or facts.get("classes") or [None]
    images = sample(
        run,
        [row for row in rows for _ in range(count)],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    write_image(out, grid(images, count, enlarge=enlarge))
    names = f", a row each: {', '.join(rows)}" if rows[0] is not None else ""
    Console(highlight=False).print(f"Wrote {len(images)} images{names} to {out}", soft_wrap=True, markup=False)
