"""``SimVQ``: a frozen random codebook seen through a trained map, so that every codeword moves at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import vector_quantize
from .tokens import at_least_float32, features_last, lookup
from .usage import RemembersIndices


class SimVQ(RemembersIndices, nn.Module):
    """Quantizes vectors to the nearest of K codewords ``code_transform(frozen_codebook)``.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.SimVQ``;
    docs/migrating.md lists what differs on purpose. ``code_transform`` runs once per call and in the precision of its
    weights also under autocast: the codes are then the same wherever they are decoded.

    Args:
        dim: features of the input.
        codebook_size: codewords K.
        codebook_transform: a module ``[K, frozen_codebook_dim] -> [K, dim]``; default a linear layer without bias.
        init_fn: changes the frozen Gaussian codebook ``[K, frozen_codebook_dim]`` before it is stored.
        channel_first: input ``[B, dim, ...]``.
        rotation_trick: rotation trick or straight-through gradient to the input.
        input_to_quantize_commit_loss_weight: share of the loss that draws the input to its codeword.
        commitment_weight: weight of the whole loss.
        frozen_codebook_dim: features of the frozen codebook, ``dim`` by default.

    Source: Zhu et al. 2024 (arXiv 2411.02038), with the rotation trick of arXiv 2410.06424.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = lambda codebook: codebook,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ):
        super().__init__()
        self.dim = self.codebook_dim = dim
        self.codebook_size, self.channel_first, self.rotation_trick = codebook_size, channel_first, rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        width = dim if frozen_codebook_dim is None else frozen_codebook_dim
        codebook = init_fn(torch.randn(codebook_size, width) * width**-0.5)
        if codebook_transform is None:
            codebook_transform = nn.Linear(width, dim, bias=False)
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", codebook)

    @property
    def codebook(self) -> Tensor:
        """``[K, dim]``, computed anew, with its gradient to ``code_transform``."""
        with torch.autocast(self.frozen_codebook.device.type, enabled=False):
            return self.code_transform(self.frozen_codebook)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices as ``forward`` returns them -> codewords in the layout of the input; zeros for index -1."""
        codes = lookup(self.codebook, indices)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes x ``[..., dim]``, or ``[B, dim, ...]`` with ``channel_first``.

        Args:
            mask: bool ``[...]`` without features; tokens at False come back as 0 and take no part in the loss.

        Returns:
            ``(quantized, indices, loss)``: indices int64 ``[...]``, -1 for masked and non-finite tokens; the loss a
            scalar, in evaluation too. Search and loss are computed in float32 or float64.

        Raises:
            ValueError: a shape that does not fit.
        """
        tokens = features_last("SimVQ", x, self.dim, self.channel_first)
        z = at_least_float32(tokens)
        estimator, beta = self.estimator, self.input_to_quantize_commit_loss_weight
        out = vector_quantize(z, self.codebook.to(z.dtype), estimator, beta, "l2", mask)
        self._remember(out.indices)
        quantized = out.quantized.to(tokens.dtype)
        loss = (out.codebook_loss + out.commitment_loss) * self.commitment_weight
        return quantized.movedim(-1, 1) if self.channel_first else quantized, out.indices, loss

    @property
    def estimator(self) -> str:
        return "rotation" if self.rotation_trick else "ste"
