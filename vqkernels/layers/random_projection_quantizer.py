"""``RandomProjectionQuantizer``: labels for self-supervised training, from a random projection and random codewords."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import CodebookUsage
from .tokens import features_last
from .vector_quantize import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """Projects standardised vectors at random and names the nearest of K random codewords; nothing is trained.

    Constructor, ``forward``, results and ``state_dict`` keys are those of
    ``vector_quantize_pytorch.RandomProjectionQuantizer``.

    Args:
        dim: features of the input.
        codebook_size: codewords K.
        codebook_dim: features of a codeword.
        num_codebooks: projections, each with a codebook and an index of its own.
        norm: standardise every vector first (mean 0, deviation 1).
        kwargs: the other options of :class:`VectorQuantize`, which is ``vq`` here and stays in evaluation.

    Source: Chiu et al. 2022 (arXiv 2202.01855).
    """

    def __init__(
        self, *, dim: int, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, norm: bool = True, **kwargs
    ):
        super().__init__()
        self.dim, self.num_codebooks = dim, num_codebooks
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = VectorQuantize(
            dim=codebook_dim * num_codebooks,
            heads=num_codebooks,
            codebook_size=codebook_size,
            use_cosine_sim=True,
            separate_codebook_per_head=True,
            **kwargs,
        ).eval()

    def train(self, mode: bool = True) -> RandomProjectionQuantizer:
        super().train(mode)
        self.vq.eval()
        return self

    @property
    def usage(self) -> CodebookUsage:
        """:attr:`VectorQuantize.usage` of the last forward."""
        return self.vq.usage

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """x ``[..., dim]`` -> indices int64 ``[...]`` (``[..., num_codebooks]``), -1 for a NaN or infinity.

        Args:
            indices: target codes; the result is then the cross entropy of the similarities against them, a scalar.

        Raises:
            ValueError: a shape that does not fit.
        """
        x = self.norm(features_last("RandomProjectionQuantizer", x, self.dim, channel_first=False))
        dtype = torch.promote_types(x.dtype, self.rand_projs.dtype)
        projection = self.rand_projs.to(dtype).transpose(0, 1).flatten(1)  # all codebooks in one product
        out = self.vq(x.to(dtype) @ projection, indices=indices)
        return out[1]
