"""Quantize dropout: a residual layer trains with only its first levels, their number drawn per batch."""

from __future__ import annotations

import random

import torch
import torch.distributed as dist


def check_dropout(owner: str, levels: int, cutoff_index: int, multiple_of: int) -> None:
    if not 0 <= cutoff_index < levels or multiple_of < 1:
        raise ValueError(
            f"{owner}: quantize_dropout_cutoff_index={cutoff_index}, quantize_dropout_multiple_of={multiple_of}; "
            f"expected 0 <= cutoff < {levels} and a multiple >= 1"
        )


@torch.compiler.disable  # how many levels run is decided on the host: a compiled layer has a graph break here
def draw_levels(levels: int, cutoff_index: int, multiple_of: int, seed: int) -> int:
    """How many of the levels to use: at least ``cutoff_index + 1``, rounded up to a multiple."""
    last = random.Random(seed).randrange(cutoff_index, levels)
    return min(-(-(last + 1) // multiple_of) * multiple_of, levels)


@torch.compiler.disable
def draw_cutoff(levels: int, fewest: int, probability: float, seed: int) -> int | None:
    """With this probability the last of the levels to use, at least ``fewest`` and not all; else None."""
    draw = random.Random(seed)
    return draw.randrange(fewest - 1, levels - 1) if draw.random() < probability else None


@torch.compiler.disable
def common_seed(device: torch.device) -> int:
    """A draw from torch's generator, the same on every process; only several make the host wait for the device."""
    seed = torch.randint(0, 10_000, ())
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        seed = seed.to(device)
        dist.broadcast(seed, 0)
    return int(seed)
