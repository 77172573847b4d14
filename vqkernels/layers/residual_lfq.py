"""``ResidualLFQ`` and ``GroupedResidualLFQ``: lookup-free quantization of what the levels before left over."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import CodebookUsage
from .dropout import DropsLevels, common_seed
from .lfq import LFQ
from .tokens import features_last, per_level, project


class ResidualLFQ(DropsLevels, nn.Module):
    """Quantizes vectors by LFQ, then what is left of them with codes of half the size, level after level.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.ResidualLFQ``;
    docs/migrating.md lists what differs on purpose.

    Args:
        dim: features of the input; another value than ``log2(codebook_size)`` adds ``project_in`` and ``project_out``.
        num_quantizers: levels Q.
        codebook_size: codes of every level, a power of two.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training, use only the first
            levels, their number drawn per batch; the others get index -1 and loss 0.
        soft_clamp_input_value: bound of the first level's input, by tanh; every further level has half of it.
        kwargs: the other options of :class:`LFQ`, for every level.

    Raises:
        ValueError: options that do not fit together.
    """

    quantize_dropout_without_gradients = False

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        **kwargs,
    ):
        super().__init__()
        if num_quantizers < 1:
            raise ValueError(f"ResidualLFQ: num_quantizers={num_quantizers}; at least one is needed")
        if kwargs.get("num_codebooks", 1) != 1 or kwargs.get("has_projections"):
            raise ValueError("ResidualLFQ: num_codebooks > 1 and has_projections=True belong to LFQ alone")
        self.dim, self.num_quantizers, self.codebook_size = dim, num_quantizers, codebook_size
        self.codebook_dim = codebook_size.bit_length() - 1
        self.channel_first = kwargs.pop("channel_first", None)
        self._set_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)

        self.has_projections = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        kwargs |= {"codebook_size": codebook_size, "keep_num_codebooks_dim": False, "channel_first": False}
        self.layers = nn.ModuleList(
            LFQ(
                codebook_scale=2.0**-level,
                soft_clamp_input_value=None if soft_clamp_input_value is None else soft_clamp_input_value * 2.0**-level,
                **kwargs,
            )
            for level in range(num_quantizers)
        )

    @property
    def codebooks(self) -> Tensor:
        """``[Q, K, D]``, before normalisation and rotation."""
        return torch.stack([layer.codebook for layer in self.layers])

    @property
    def usage(self) -> tuple[CodebookUsage, ...]:
        """:attr:`LFQ.usage` of every level; a level that dropout left out keeps that of its last forward."""
        return tuple(layer.usage for layer in self.layers)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices ``[..., q]`` of the first q levels -> codes ``[Q, ..., D]``; zeros for -1 and missing levels."""
        levels = per_level("ResidualLFQ", indices, self.num_quantizers)
        return torch.stack([layer._decode(index) for layer, index in zip(self.layers, levels, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returned for these indices, in the layout of the input; tokens with only -1 are 0."""
        # one after the other as in forward, so that the sum is the same to the bit
        output = self.project_out(sum(self.get_codes_from_indices(indices).unbind(0)))
        output = output.masked_fill((indices < 0).all(-1, keepdim=True), 0.0)
        return output.movedim(-1, 1) if self._channels_first(indices.dim()) else output

    def _channels_first(self, dims: int) -> bool:
        return dims >= 4 if self.channel_first is None else self.channel_first

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x ``[..., dim]``, or ``[B, dim, ...]`` with ``channel_first`` or of 4 dimensions and more.

        Args:
            mask: bool ``[...]`` without features, or ``[B, tokens]``; the losses leave the False tokens out.
            return_all_codes: also return what :meth:`get_codes_from_indices` gives.
            rand_quantize_dropout_fixed_seed: seed of this call's quantize dropout.

        Returns:
            ``(quantized, indices [..., Q], losses [Q])`` and the codes if asked for.

        Raises:
            ValueError: a shape that does not fit.
        """
        first = self._channels_first(x.dim())
        features = project(self.project_in, features_last("ResidualLFQ", x, self.dim, first))
        levels = self._draw_levels(rand_quantize_dropout_fixed_seed, x.device)
        residual, quantized, indices, losses = features, 0.0, [], []
        for layer in self.layers[:levels]:
            code, index, loss = layer(residual, mask=mask)
            residual = residual - code.detach()
            quantized = quantized + code
            indices.append(index)
            losses.append(loss)
        dropped = self.num_quantizers - levels
        index = F.pad(torch.stack(indices, -1), (0, dropped), value=-1)
        output = project(self.project_out, quantized)
        result = output.movedim(-1, 1) if first else output, index, F.pad(torch.stack(losses), (0, dropped))
        return (*result, self.get_codes_from_indices(index)) if return_all_codes else result


class GroupedResidualLFQ(nn.Module):
    """Splits the features into groups, each quantized by a :class:`ResidualLFQ` of its own.

    Args:
        dim: features of the input, a multiple of ``groups``.
        accept_image_fmap: input ``[B, dim, ...]``, as with ``channel_first=True``.
        kwargs: the options of :class:`ResidualLFQ`.

    Raises:
        ValueError: options that do not fit together.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs):
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"GroupedResidualLFQ: dim={dim} does not split into groups={groups}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        if accept_image_fmap:
            kwargs["channel_first"] = True
        self.rvqs = nn.ModuleList(ResidualLFQ(dim=dim // groups, **kwargs) for _ in range(groups))

    @property
    def codebooks(self) -> Tensor:
        """``[groups, Q, K, D]``, before normalisation and rotation."""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    @property
    def usage(self) -> tuple[tuple[CodebookUsage, ...], ...]:
        """:attr:`ResidualLFQ.usage` of every group."""
        return tuple(rvq.usage for rvq in self.rvqs)

    @property
    def split_dim(self) -> int:
        return 1 if self.accept_image_fmap else -1

    def _split_dim(self, dims: int) -> int:
        return 1 if self.rvqs[0]._channels_first(dims) else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices ``[groups, ...]`` -> ``[groups, Q, B, ..., D]``."""
        groups = zip(self.rvqs, indices, strict=True)
        return torch.stack([rvq.get_codes_from_indices(index) for rvq, index in groups])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returned for these indices."""
        outputs = [rvq.get_output_from_indices(index) for rvq, index in zip(self.rvqs, indices, strict=True)]
        return torch.cat(outputs, self._split_dim(indices.dim() - 1))

    def forward(self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False) -> tuple:
        """As :meth:`ResidualLFQ.forward`, with indices ``[groups, ...]``, losses ``[groups, Q]`` and a tuple of every
        group's codes."""
        split = self._split_dim(x.dim())
        if x.dim() < 2 or x.shape[split] != self.dim:
            raise ValueError(
                f"GroupedResidualLFQ: x is {tuple(x.shape)}; expected {self.dim} features in dimension {split}"
            )
        seed = None
        if self.training and self.rvqs[0].quantize_dropout:
            seed = common_seed(x.device)
        elif self.training:
            torch.randint(0, 10_000, ())  # theirs draws it all the same: what is drawn later is then equal
        parts = zip(self.rvqs, x.chunk(self.groups, split), strict=True)
        out = zip(*(rvq(part, mask, return_all_codes, seed) for rvq, part in parts), strict=True)
        quantized, indices, losses, *codes = out
        return (torch.cat(quantized, split), torch.stack(indices), torch.stack(losses), *codes)
