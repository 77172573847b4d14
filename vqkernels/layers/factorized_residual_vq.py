"""``FactorizedResidualVQ``: residual quantization with a low-dimensional projection per level, as in audio codecs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import vector_quantize
from .tokens import at_least_float32, features_last, lookup, project
from .usage import RemembersIndices


class FactorizedVQ(nn.Module):
    """One level: ``project_in``, the codeword nearest in direction, ``project_out``. The codebook is a parameter."""

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.project_in = nn.Linear(dim, codebook_dim)
        self.project_out = nn.Linear(codebook_dim, dim)
        self.codebook = nn.Parameter(torch.randn(codebook_size, codebook_dim))

    def forward(self, x: Tensor, mask: Tensor | None, estimator: str, commitment_weight: float):
        """x ``[..., dim]`` -> quantized ``[..., dim]``, indices ``[...]``, loss."""
        z = at_least_float32(project(self.project_in, x))
        book = self.codebook.to(z.dtype)
        out = vector_quantize(z, book, estimator, commitment_weight, "cosine", mask)
        loss = out.commitment_loss + out.codebook_loss
        if mask is not None:  # the mean is over all samples, those left out count as 0
            loss = loss * mask.to(loss.dtype).mean()
        return project(self.project_out, out.quantized.to(x.dtype)), out.indices, loss


class FactorizedResidualVQ(RemembersIndices, nn.Module):
    """Quantizes in a few features per level, by direction alone: the quantizer of the Descript audio codec.

    Args:
        dim: features of the input.
        num_quantizers: levels Q.
        codebook_size: codewords of every level.
        codebook_dim: features of a codeword, one number for all levels or one per level.
        quantize_dropout: share of the samples of a training batch that use only the first levels, their number drawn
            per sample.
        commitment_weight: weight of the commitment loss beside the codebook loss (1).
        channel_first: input ``[B, dim, ...]`` (default) or ``[B, ..., dim]``.
        estimator: "ste" (default), "rotation" or "reflection".

    Raises:
        ValueError: numbers that do not fit together.

    Source: Kumar et al. 2023 (arXiv 2306.06546); factorized codes: Yu et al. 2021 (arXiv 2110.04627).
    """

    usage_dim = -1

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int | Sequence[int] = 8,
        *,
        quantize_dropout: float = 0.0,
        commitment_weight: float = 0.25,
        channel_first: bool = True,
        estimator: str = "ste",
    ):
        super().__init__()
        dims = (codebook_dim,) * num_quantizers if isinstance(codebook_dim, int) else tuple(codebook_dim)
        if num_quantizers < 1 or len(dims) != num_quantizers or not 0.0 <= quantize_dropout <= 1.0:
            raise ValueError(
                f"FactorizedResidualVQ: num_quantizers={num_quantizers}, codebook_dim={codebook_dim!r}, "
                f"quantize_dropout={quantize_dropout}; expected at least one level, one codebook_dim per level, and a "
                "share in [0, 1]"
            )
        self.dim, self.num_quantizers, self.codebook_size = dim, num_quantizers, codebook_size
        self.quantize_dropout, self.commitment_weight = quantize_dropout, commitment_weight
        self.channel_first, self.estimator = channel_first, estimator
        self.layers = nn.ModuleList(FactorizedVQ(dim, codebook_size, d) for d in dims)

    def forward(self, x: Tensor, num_quantizers: int | None = None):
        """x ``[B, dim, ...]`` -> ``(quantized like x, indices [B, ..., Q], losses [Q])``.

        ``num_quantizers``: use only the first levels; without effect on a training batch with ``quantize_dropout``. A
        sample that dropout cuts short has index -1 beyond. A level's loss is its codebook loss plus commitment_weight
        times its commitment loss.

        Raises:
            ValueError: x or num_quantizers does not fit.
        """
        tokens = features_last("FactorizedResidualVQ", x, self.dim, self.channel_first)
        levels = self.num_quantizers if num_quantizers is None else num_quantizers
        if not 1 <= levels <= self.num_quantizers:
            raise ValueError(
                f"FactorizedResidualVQ.forward: num_quantizers={levels}; there are {self.num_quantizers} levels"
            )
        until = self._draw_levels(tokens) if self.training and self.quantize_dropout else None
        levels = self.num_quantizers if until is not None else levels
        residual, quantized, indices, losses = tokens, torch.zeros_like(tokens), [], []
        for number, level in enumerate(self.layers[:levels]):
            mask = None
            if until is not None:
                mask = (number < until).view(-1, *[1] * (tokens.dim() - 2)).expand(tokens.shape[:-1])
            code, index, loss = level(residual, mask, self.estimator, self.commitment_weight)
            if mask is not None:
                code = code * mask.unsqueeze(-1)
            quantized, residual = quantized + code, residual - code
            indices.append(index)
            losses.append(loss)
        index = torch.stack(indices, -1)
        self._remember(index)
        quantized = quantized.movedim(-1, 1) if self.channel_first else quantized
        return quantized, index, torch.stack(losses)

    def _draw_levels(self, tokens: Tensor) -> Tensor:
        """How many levels each sample of the batch uses, ``[B]``."""
        batch = tokens.shape[0]
        until = torch.randint(1, self.num_quantizers + 1, (batch,), device=tokens.device)
        cut = torch.arange(batch, device=tokens.device) < int(batch * self.quantize_dropout)
        return torch.where(cut, until, self.num_quantizers)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Indices ``[B, ..., q]`` of the first q levels -> what ``forward`` returned for them; -1 adds nothing."""
        output = 0.0
        for level, index in zip(self.layers, indices.unbind(-1), strict=False):
            code = level.project_out(lookup(level.codebook, index))
            output = output + code.masked_fill((index < 0).unsqueeze(-1), 0.0)
        return output.movedim(-1, 1) if self.channel_first else output
