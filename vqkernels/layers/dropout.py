"""Quantize dropout: a residual layer trains with only its first levels, their number drawn per batch."""

from __future__ import annotations

import random

import torch
import torch.distributed as dist


class DropsLevels:
    """Mixin of a residual layer with ``num_quantizers`` levels: its dropout's options and every forward's draw."""

    quantize_dropout_without_gradients = True  # whether it also drops under ``torch.no_grad()``

    def _set_dropout(self, drops: bool, cutoff_index: int, multiple_of: int) -> None:
        if not 0 <= cutoff_index < self.num_quantizers or multiple_of < 1:
            raise ValueError(
                f"{type(self).__name__}: quantize_dropout_cutoff_index={cutoff_index}, quantize_dropout_multiple_of="
                f"{multiple_of}; expected 0 <= cutoff < {self.num_quantizers} and a multiple >= 1"
            )
        self.quantize_dropout = drops and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = cutoff_index
        self.quantize_dropout_multiple_of = multiple_of

    def _draw_levels(self, seed: int | None, device: torch.device) -> int:
        """How many levels this forward uses."""
        learns = self.quantize_dropout_without_gradients or torch.is_grad_enabled()
        if not (self.training and self.quantize_dropout and learns):
            return self.num_quantizers
        seed = common_seed(device) if seed is None else seed
        cutoff, multiple = self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of
        return draw_levels(self.num_quantizers, cutoff, multiple, seed)


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
