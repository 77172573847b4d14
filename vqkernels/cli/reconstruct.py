"""vqkernels reconstruct: a picture through the codes and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def reconstruct(
    image: Annotated[Path, typer.Argument(help="A picture of any size: grey, colour or transparent, 8 or 16 bits.")],
    out: Annotated[Path, typer.Argument(help="The picture to write, with 8 bits a channel.")],
    run: Annotated[Path, typer.Option(help="Folder that vqkernels train wrote.")] = Path("out/vqvae"),
) -> None:
    """Encodes a picture as codes, decodes them, and says how many bits the codes take and how much is lost."""
    import math

    from rich.console import Console

    from ..data import read_image
    from ..images.pictures import check_picture_file, load_tokenizer, write_image
    from ..images.pictures import reconstruct as through_codes

    check_picture_file(out)
    model = load_tokenizer(run)
    original = read_image(image)
    picture, codes = through_codes(model, original)
    write_image(out, picture)
    channels, height, width = original.shape
    error = float((picture[:3] - original[:3]).square().mean())
    bits = codes.numel() * math.log2(model.codebook_size)
    quality = f"PSNR {-10 * math.log10(error):.1f} dB" if error else "no loss"
    console = Console(highlight=False)
    console.print(
        f"{width} x {height} pixels, {channels} channels: {codes.numel():,} codes of {model.codebook_size}, "
        f"{bits / (height * width):.3f} bits a pixel; {quality}",
        soft_wrap=True,
    )
    console.print(f"Wrote {out}", soft_wrap=True)
