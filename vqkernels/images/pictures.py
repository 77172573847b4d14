"""From a trained run to pictures: reconstructions of any image, samples of a prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import DataError
from ..data.progress import progress_bar
from ..models import VQVAE
from .runs import load_run
from .tasks import embed

TILE = 512  # pixels each way that go through the network at once
HALO = 8  # codes around a tile that its pixels can depend on: 3 by the encoder, 4 by the decoder
SAMPLES = 256  # at a time


def load_tokenizer(folder) -> VQVAE:
    """The VQVAE or VQGAN of a run, also of a prior's run."""
    model, config = load_run(folder)
    return load_run(Path(folder) / "tokenizer")[0] if config.kind == "prior" else model


@torch.no_grad()
def reconstruct(model: VQVAE, image: Tensor, *, tile: int = TILE, progress=None) -> tuple[Tensor, Tensor]:
    """An image [C, H, W] in [0, 1] of any size through the codes and back.

    The image is padded to whole codes by repeating its border, and goes through the network in tiles with what lies
    around them, so that memory does not grow with its size and no seam shows. C is 1, 3, or 4 with transparency, which
    is kept as it is. A model of grey images takes each colour by itself, a model of colour takes grey as three equal
    colours and gives their mean.

    Returns:
        The reconstruction, [C, H, W] in [0, 1], and the codes int64 [B, h, w] or [B, h, w, Q]: B is 3 for a colour
        image and a grey model, else 1.
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3, 4):
        raise DataError(f"an image of shape {list(image.shape)}; [1, 3 or 4, H, W] is needed")
    step, device = model.downsample, next(model.parameters()).device
    colour, alpha = image[:3], image[3:]
    batch = colour.unsqueeze(1) if model.channels == 1 else colour.expand(model.channels, -1, -1).unsqueeze(0)
    height, width = image.shape[1:]
    batch = F.pad(batch, (0, -width % step, 0, -height % step), mode="replicate")
    tile, halo = max(tile // step, 1) * step, HALO * step
    out = torch.empty_like(batch)
    codes: Tensor | None = None
    corners = [(y, x) for y in range(0, batch.shape[2], tile) for x in range(0, batch.shape[3], tile)]
    with progress_bar(progress, "Reconstructing", len(corners)) as advance:
        for y, x in corners:
            top, left = max(y - halo, 0), max(x - halo, 0)
            piece = batch[:, :, top : y + tile + halo, left : x + tile + halo]
            indices = model.encode(piece.to(device))
            pixels = model.decode(indices)[:, :, y - top :, x - left :][:, :, :tile, :tile]
            out[:, :, y : y + tile, x : x + tile] = pixels.cpu()
            inner = indices[:, (y - top) // step :, (x - left) // step :][:, : tile // step, : tile // step]
            if codes is None:
                codes = inner.new_empty((len(batch), batch.shape[2] // step, batch.shape[3] // step, *inner.shape[3:]))
            codes[:, y // step :, x // step :][:, : inner.shape[1], : inner.shape[2]] = inner
            advance()
    out = out[:, :, :height, :width].clamp(0, 1)
    if model.channels == 1:
        out = out.squeeze(1)
    else:
        out = out[0] if len(colour) == 3 else out[0].mean(0, keepdim=True)
    return torch.cat([out, alpha]), codes


def sample(
    folder,
    conditions: Sequence[int | str | None],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    progress=None,
) -> Tensor:
    """Images [B, C, H, W] in [0, 1] drawn from the prior of a run, one per condition: names or numbers of classes,
    texts, or None for a prior without. The other arguments as in ``Prior.sample``."""
    prior, config = load_run(folder)
    if config.kind != "prior":
        raise DataError(f"{folder} is the run of a {config.kind}, which has no prior. Train one: vqkernels train prior")
    tokenizer = load_tokenizer(folder)
    condition = _condition(prior, conditions)
    pictures = []
    for start in range(0, len(conditions), SAMPLES):
        codes = prior.sample(
            None if condition is None else condition[start : start + SAMPLES],
            len(conditions[start : start + SAMPLES]),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed + start,
            progress=progress,
        )
        pictures.append(tokenizer.decode(codes).clamp(0, 1))
    return torch.cat(pictures)


def _condition(prior, conditions: Sequence[int | str | None]) -> Tensor | None:
    names = prior.facts["classes"]
    if not conditions:
        raise DataError("no conditions: give one per image")
    if names:
        return torch.tensor([_class(names, condition) for condition in conditions])
    if prior.text_dim:
        wrong = next((c for c in conditions if not isinstance(c, str)), None)
        if wrong is not None or None in conditions:
            raise DataError(f"this prior was trained on texts; {wrong!r} is no text")
        different = sorted(set(conditions))
        vectors = embed(different, False)
        return vectors[[different.index(text) for text in conditions]]
    if any(condition is not None for condition in conditions):
        raise DataError("this prior was trained without a condition. Leave it out")
    return None


def _class(names: list[str], condition: int | str | None) -> int:
    if condition in names:
        return names.index(condition)
    if str(condition).isdecimal() and int(condition) < len(names):
        return int(condition)
    raise DataError(f"class {condition!r} is unknown. There are: {', '.join(names)} (or 0 to {len(names) - 1})")


def write_image(path, image: Tensor) -> None:
    """[1, 3 or 4, H, W] in [0, 1] as a file of 8 bits a channel, of the kind its ending says."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).squeeze(-1).cpu().numpy()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def check_picture_file(path: Path) -> None:
    """DataError where no picture can be written: told before the work, not after it."""
    from PIL import Image

    if path.is_dir():
        raise DataError(f"{path} is a folder. Give the file to write, such as {path / 'picture.png'}")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise DataError(f"{path}: no kind of picture ends in {path.suffix or 'nothing'!r}. Write .png, for example")


def grid(images: Tensor, columns: int, gap: int = 2, enlarge: int = 1) -> Tensor:
    """Images [B, C, H, W] side by side on white, ``columns`` to a row; every pixel drawn ``enlarge`` times as large."""
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = images.new_ones(channels, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for place, image in enumerate(images):
        y, x = gap + place // columns * (height + gap), gap + place % columns * (width + gap)
        sheet[:, y : y + height, x : x + width] = image
    return sheet
