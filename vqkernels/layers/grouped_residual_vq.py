"""``GroupedResidualVQ``: the features in groups, each with a residual quantizer of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import CodebookUsage
from .dropout import common_seed
from .residual_vq import ResidualVQ


class GroupedResidualVQ(nn.Module):
    """Splits the features into groups, each quantized by a :class:`ResidualVQ`.

    Constructor, ``forward``, results and ``state_dict`` keys are those of
    ``vector_quantize_pytorch.GroupedResidualVQ``; docs/migrating.md lists what differs on purpose.

    Args:
        dim: features of the input, a multiple of ``groups``.
        groups: G.
        accept_image_fmap: input ``[B, dim, H, W]``.
        kwargs: the other options of :class:`ResidualVQ`, the other layouts among them.

    Raises:
        ValueError: options that do not fit together.

    Source: Yang et al. 2023 (HiFi-Codec, arXiv 2305.02765).
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs):
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"GroupedResidualVQ: dim={dim} does not split into groups={groups}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        options = {"dim": dim // groups, "accept_image_fmap": accept_image_fmap, **kwargs}
        self.rvqs = nn.ModuleList(ResidualVQ(**options) for _ in range(groups))

    @property
    def codebook_size(self) -> int:
        return self.rvqs[0].codebook_size

    @property
    def num_quantizers(self) -> int:
        return self.rvqs[0].num_quantizers

    @property
    def codebooks(self) -> Tensor | tuple[tuple[Tensor, ...], ...]:
        """``[G, Q, K, D]``, or per group a tuple of ``[K_l, D]`` when the sizes differ."""
        books = tuple(rvq.codebooks for rvq in self.rvqs)
        return torch.stack(books) if self.rvqs[0].uniform_codebook_size else books

    @property
    def usage(self) -> tuple[tuple[CodebookUsage, ...], ...]:
        """:attr:`ResidualVQ.usage` of every group: ``layer.usage[group][level]``."""
        return tuple(rvq.usage for rvq in self.rvqs)

    @property
    def split_dim(self) -> int:
        return -1 if self.rvqs[0].layout.spatial is None else 1

    def _per_group(self, indices: Tensor) -> Tensor:
        if len(indices) != self.groups:
            raise ValueError(
                f"GroupedResidualVQ: indices is for {len(indices)} groups; expected {self.groups}, as in "
                f"[{self.groups}, ..., {self.num_quantizers}]"
            )
        return indices

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices ``[G, ..., q]`` of the first q levels -> codewords ``[G, Q, ..., D]``; zeros for -1 and missing
        levels."""
        groups = zip(self.rvqs, self._per_group(indices), strict=True)
        return torch.stack([rvq.get_codes_from_indices(index) for rvq, index in groups])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returned for these indices, in the layout of the input."""
        groups = zip(self.rvqs, self._per_group(indices), strict=True)
        outputs = [rvq.get_output_from_indices(index) for rvq, index in groups]
        return torch.cat(outputs, 1 if self.split_dim == 1 and outputs[0].dim() > 2 else -1)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple:
        """Quantizes x ``[..., dim]`` (or channels first, as constructed), then makes the EMA steps.

        Args:
            indices: target codes ``[G, ..., Q]``, or one tensor per group; the result is then ``(quantized, sum of the
                cross entropies)``.
            others: as in :meth:`ResidualVQ.forward`, the same for all groups.

        Returns:
            ``(quantized, indices [G, ..., Q], losses [G, Q])`` and, if asked for, a tuple of every group's codewords
            ``[Q, ..., D]``.

        Raises:
            ValueError: shapes that do not fit, arguments that exclude each other.
        """
        split = self.split_dim if x.dim() > 2 else -1  # one token per sample has its features last in every layout
        if x.dim() < 2 or x.shape[split] != self.dim:
            raise ValueError(
                f"GroupedResidualVQ: x is {tuple(x.shape)}; expected {self.dim} features in dimension {split}"
            )
        seed = rand_quantize_dropout_fixed_seed
        if self.training and seed is None:  # all groups keep the same levels
            if self.rvqs[0].quantize_dropout:
                seed = common_seed(x.device)
            else:
                torch.randint(0, 10_000, ())  # theirs draws it all the same: the noise that follows is then equal
        options = {
            "return_all_codes": return_all_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "mask": mask,
            "lens": lens,
            "freeze_codebook": freeze_codebook,
            "beam_size": beam_size,
            "rand_quantize_dropout_fixed_seed": seed,
        }
        targets = [None] * self.groups if indices is None else self._per_group(indices)
        parts = zip(self.rvqs, x.chunk(self.groups, split), targets, strict=True)
        results = [rvq(part, indices=target, **options) for rvq, part, target in parts]
        quantized, *rest = zip(*results, strict=True)
        quantized = torch.cat(quantized, split)
        if indices is not None:
            return quantized, torch.stack(rest[0]).sum(0)
        index, losses, *codes = rest
        return (quantized, torch.stack(index), torch.stack(losses), *codes)
