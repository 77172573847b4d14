"""The quantizer layers by name, and one way to use them all on latent images [B, dim, h, w]."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..layers import FSQ, ResidualVQ, SimVQ, VectorQuantize

NAMES = ("vq", "residual", "simvq", "fsq")
# what Mentzer et al. 2023 (arXiv 2309.15505) recommend for 2^4, 2^6, ... 2^16 codes
FSQ_LEVELS = (
    (5, 3),
    (8, 8),
    (8, 6, 5),
    (8, 8, 8),
    (8, 5, 5, 5),
    (8, 8, 6, 5),
    (7, 5, 5, 5, 5),
    (8, 8, 8, 6, 5),
    (8, 8, 8, 5, 5, 5),
)
# codewords that start on the data, follow it quickly, and move when hardly any vector chooses them
CODEBOOK = {"kmeans_init": True, "threshold_ema_dead_code": 1.0, "decay": 0.9}


def make_quantizer(
    name: str, dim: int, codebook_size: int, estimator: str = "rotation", beta: float = 0.25, **options
) -> nn.Module:
    """A quantizer of latent images [B, dim, h, w].

    ``name``: "vq" (``VectorQuantize``; EMA codewords, ``learnable_codebook=True`` for codewords trained by the loss,
    ``freeze_codebook=True`` for codewords that stay where k-means put them), "residual" (``ResidualVQ``, 4 levels
    unless ``num_quantizers`` says otherwise), "simvq" (``SimVQ``) or "fsq" (``FSQ``, whose ``levels`` are by default
    the published ones with about ``codebook_size`` codes; no estimator, no commitment loss). ``estimator``: "rotation",
    "reflection", "ste" or "gumbel" for "vq" and "residual", "rotation" or "ste" for "simvq". ``options``: of the layer.
    ValueError for names and options that do not exist.
    """
    if name not in NAMES:
        raise ValueError(f"quantizer {name!r} is unknown. Use one of {', '.join(NAMES)}")
    try:
        if name == "vq":
            options = {"accept_image_fmap": True, "commitment_weight": beta} | CODEBOOK | options
            return VectorQuantize(dim, codebook_size, estimator=estimator, **options)
        if name == "residual":
            options = {"accept_image_fmap": True, "commitment_weight": beta, "num_quantizers": 4} | CODEBOOK | options
            return ResidualVQ(dim=dim, codebook_size=codebook_size, estimator=estimator, **options)
        if name == "simvq":
            if estimator not in ("rotation", "ste"):
                raise ValueError(f"quantizer 'simvq' has the estimators 'rotation' and 'ste', not {estimator!r}")
            options = {"input_to_quantize_commit_loss_weight": beta} | options
            return SimVQ(dim, codebook_size, channel_first=True, rotation_trick=estimator == "rotation", **options)
        levels = min(FSQ_LEVELS, key=lambda levels: abs(math.log(math.prod(levels) / codebook_size)))
        return FSQ(dim=dim, **{"levels": levels} | options)
    except TypeError as error:
        raise ValueError(f"quantizer {name!r} with options {sorted(options)}: {error}") from None


def quantize(quantizer: nn.Module, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """latent [B, dim, h, w] -> quantized, indices int64 [B, h, w] or [B, h, w, Q], loss () (0 where the layer has
    none)."""
    quantized, indices, *losses = quantizer(latent)
    loss = losses[0].sum() if losses else latent.new_zeros(())
    return quantized, indices.long(), loss


def dequantize(quantizer: nn.Module, indices: Tensor) -> Tensor:
    """Indices as ``quantize`` gave them -> quantized [B, dim, h, w]."""
    lookup = getattr(quantizer, "get_output_from_indices", None) or quantizer.indices_to_codes
    return lookup(indices)


def codewords(quantizer: nn.Module) -> Tensor:
    """What every code stands for, [K, dim], or [Q, K, dim] for a residual quantizer's levels."""
    levels = getattr(quantizer, "num_quantizers", None)
    codes = torch.arange(quantizer.codebook_size, device=next(iter(quantizer.state_dict().values())).device)
    if levels is None:
        return dequantize(quantizer, codes.view(-1, 1, 1)).flatten(1)
    alone = torch.full((levels, len(codes), 1, 1, levels), -1, device=codes.device)
    for level in range(levels):
        alone[level, :, 0, 0, level] = codes
    return dequantize(quantizer, alone.flatten(0, 1)).flatten(1).unflatten(0, (levels, -1))
