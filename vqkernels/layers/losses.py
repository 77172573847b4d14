"""The losses of a quantizer beside the plain commitment loss. Rows that take no part are marked, never cut out: cutting
would make the host wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import transformed


class LossBreakdown(NamedTuple):
    """The unweighted parts of a quantizer's loss; a part that is switched off is 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


def mean_square(a: Tensor, b: Tensor, usable: Tensor) -> Tensor:
    """Mean of (a - b)^2, both ``[..., D]``, over the usable rows ``[...]``; 0 without one."""
    squares = torch.where(usable.unsqueeze(-1), (a - b).square(), 0.0)
    return squares.sum() / (usable.sum().clamp(min=1) * a.shape[-1])


def cross_entropy(similarity: Tensor, targets: Tensor) -> Tensor:
    """Of softmax(similarity ``[..., K]``) against targets ``[...]``, averaged; -1 does not count, none gives 0."""
    total = F.cross_entropy(similarity.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


def diversity_loss(similarity: Tensor, usable: Tensor, temperature: float) -> Tensor:
    """Minus the entropy of the codes: similarity ``[H, B, N, K]``, usable ``[H, B, N]``.

    At each of the N positions the distribution softmax(temperature * similarity) is averaged over heads and samples;
    the result is the mean over positions of minus its entropy.
    """
    share = (similarity * temperature).softmax(-1) * usable.unsqueeze(-1)
    count = usable.sum((0, 1))
    mean = share.sum((0, 1)) / count.clamp(min=1).unsqueeze(-1)
    negative_entropy = (mean * mean.clamp(min=1e-5).log()).sum(-1)
    return negative_entropy.sum() / (count > 0).sum().clamp(min=1)


def orthogonal_loss(codes: Tensor, active: Tensor | None = None, max_codes: int | None = None) -> Tensor:
    """Mean squared cosine between the codewords ``[H, K, D]``, minus its least value 1/K.

    Args:
        active: bool ``[H, K]``; only these codewords count.
        max_codes: of more than that, a random choice counts.

    Source: Shin et al. 2021 (arXiv 2112.00384), equation 2. The sum of the squared cosines is the squared Frobenius
    norm of U U^T, and of U^T U, which is the smaller matrix when there are more codewords than features.
    """
    H, K, D = codes.shape
    if max_codes is not None and max_codes < K:
        if active is None:
            K, codes = max_codes, codes[:, torch.randperm(K, device=codes.device)[:max_codes]]
        else:  # how many are active is known to the device alone
            key = torch.rand(H, K, device=codes.device).masked_fill(~active, 2.0)
            keep = key.topk(max_codes, -1, largest=False).indices
            K, active = max_codes, active.gather(-1, keep)
            codes = codes.gather(1, keep.unsqueeze(-1).expand(H, K, D))
    unit = F.normalize(codes, dim=-1, eps=1e-6)
    count = torch.full((H,), float(K), dtype=codes.dtype, device=codes.device)
    if active is not None:
        unit, count = unit * active.unsqueeze(-1), active.sum(-1).clamp(min=1).to(codes.dtype)
    with torch.autocast(unit.device.type, enabled=False):
        gram = unit.mT @ unit if D < K else unit @ unit.mT
    per_head = gram.square().sum((-1, -2)) / count.square() - 1.0 / count
    return (per_head if active is None else per_head * active.any(-1)).mean()


def used_codes(indices: Tensor, codebook_size: int) -> Tensor:
    """Which codewords the indices ``[H, N]`` name: bool ``[H, K]``; -1 names none."""
    used = torch.zeros(indices.shape[0], codebook_size + 1, dtype=torch.bool, device=indices.device)
    return used.scatter_(1, torch.where(indices < 0, codebook_size, indices), True)[:, :codebook_size]


def trainable(loss: Tensor) -> Tensor:
    """A loss that ``backward`` accepts even when no input needs a gradient. A compiled graph cannot make
    one, and the functions of ``torch.func`` need none."""
    as_is = loss.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed(loss)
    return loss if as_is else loss.requires_grad_()
