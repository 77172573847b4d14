"""``ResidualSimVQ``: SimVQ level after level, all levels in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import CodebookUsage, residual_quantize
from .dropout import DropsLevels
from .sim_vq import SimVQ
from .tokens import at_least_float32, features_last, lookup, per_level


class ResidualSimVQ(DropsLevels, nn.Module):
    """Quantizes vectors by :class:`SimVQ`, then what is left of them, level after level.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.ResidualSimVQ``;
    docs/migrating.md lists what differs on purpose. The gradient is the sum of the levels' own, as there.

    Args:
        dim: features of the input.
        num_quantizers: levels Q.
        codebook_size: codewords of every level.
        heads: 1.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training, use only the first
            levels, their number drawn per batch; the others get index -1 and loss 0.
        channel_first: input ``[B, dim, ...]``.
        rotation_trick: rotation trick or straight-through gradient to the input.
        sim_vq_kwargs: the other options of :class:`SimVQ`, for every level.

    Raises:
        ValueError: options that do not fit together.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs,
    ):
        super().__init__()
        if heads != 1 or num_quantizers < 1:
            raise ValueError(
                f"ResidualSimVQ: heads={heads}, num_quantizers={num_quantizers}; expected one head and at least one "
                "quantizer"
            )
        self.dim, self.num_quantizers, self.channel_first = dim, num_quantizers, channel_first
        self._set_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        options = {"channel_first": channel_first, "rotation_trick": rotation_trick, **sim_vq_kwargs}
        self.layers = nn.ModuleList(SimVQ(dim, codebook_size, **options) for _ in range(num_quantizers))

    @property
    def codebook_size(self) -> int:
        return self.layers[0].codebook_size

    @property
    def codebook_dim(self) -> int:
        """Features of a codeword."""
        return self.layers[0].codebook_dim

    @property
    def codebooks(self) -> Tensor:
        """``[Q, K, dim]``, computed anew."""
        return torch.stack([layer.codebook for layer in self.layers])

    @property
    def usage(self) -> tuple[CodebookUsage, ...]:
        """:attr:`SimVQ.usage` of every level; a level that dropout left out keeps that of its last forward."""
        return tuple(layer.usage for layer in self.layers)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices ``[..., q]`` of the first q levels -> codewords ``[Q, ...]``, each in the layout of the input; zeros
        for index -1 and missing levels."""
        levels = per_level("ResidualSimVQ", indices, self.num_quantizers)
        return self._codes([layer.codebook for layer in self.layers[: indices.shape[-1]]], levels)

    def _codes(self, codebooks: list[Tensor], indices: tuple[Tensor, ...]) -> Tensor:
        """Of the first levels, which have a codebook each; zeros for the others."""
        codes = [lookup(book, index) for book, index in zip(codebooks, indices, strict=False)]
        codes = torch.stack(codes + [torch.zeros_like(codes[0])] * (self.num_quantizers - len(codes)))
        return codes.movedim(-1, 2) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returned for these indices."""
        codes = self.get_codes_from_indices(indices)
        # one after the other as in forward, so that the sum is the same to the bit
        return sum(at_least_float32(codes).unbind(0)).to(codes.dtype)

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x ``[..., dim]``, or ``[B, dim, ...]`` with ``channel_first``.

        Args:
            return_all_codes: also return what :meth:`get_codes_from_indices` gives.
            rand_quantize_dropout_fixed_seed: seed of this call's quantize dropout.
            mask: bool ``[...]`` without features; tokens at False come back as 0 and take no part in the losses.

        Returns:
            ``(quantized, indices [..., Q], losses [Q])`` and the codewords if asked for.

        Raises:
            ValueError: a shape that does not fit.
        """
        tokens = features_last("ResidualSimVQ", x, self.dim, self.channel_first)
        z, first = at_least_float32(tokens), self.layers[0]
        used = self._draw_levels(rand_quantize_dropout_fixed_seed, x.device)
        books = [layer.codebook for layer in self.layers[:used]]
        out = residual_quantize(
            z,
            [book.to(z.dtype) for book in books],
            first.estimator,
            first.input_to_quantize_commit_loss_weight,
            "l2",
            mask,
            per_level=True,
        )
        for layer, index in zip(self.layers, out.indices.unbind(-1), strict=False):
            layer._remember(index)
        quantized = out.quantized.to(tokens.dtype)
        losses = (out.codebook_loss + out.commitment_loss) * first.commitment_weight
        dropped = (0, self.num_quantizers - used)
        indices = F.pad(out.indices, dropped, value=-1)
        result = quantized.movedim(-1, 1) if self.channel_first else quantized, indices, F.pad(losses, dropped)
        return (*result, self._codes(books, out.indices.unbind(-1))) if return_all_codes else result
