"""``ResidualFSQ`` and ``GroupedResidualFSQ``: finite scalar quantization of what the levels before left over."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import CodebookUsage
from .dropout import DropsLevels, common_seed
from .fsq import FSQ
from .tokens import at_least_float32, features_last, per_level, project


class ResidualFSQ(DropsLevels, nn.Module):
    """Quantizes vectors by FSQ, then what is left of them on a grid finer by the number of levels, and so on.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.ResidualFSQ``;
    docs/migrating.md lists what differs on purpose.

    Args:
        levels: number of values per feature, for every quantizer.
        num_quantizers: quantizers Q.
        dim: features of the input; another value than ``len(levels)`` adds ``project_in`` and ``project_out``.
        is_channel_first: input ``[B, dim, ...]``; indices are then ``[B, Q, ...]``.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training, use only the first
            quantizers, their number drawn per batch; the others get index -1.
        soft_clamp_input_value: bound of the input, one number or one per feature, by tanh; with ``bound_hard_clamp`` it
            is always ``1 + 1 / (L - 1)``.
        bound_hard_clamp: the quantizers clamp instead of applying tanh to every residual.
        kwargs: the other options of :class:`FSQ`; ``preserve_symmetry`` is always on.

    Raises:
        ValueError: options that do not fit together.
    """

    quantize_dropout_without_gradients = False

    def __init__(
        self,
        *,
        levels: list[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | list[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs,
    ):
        super().__init__()
        if num_quantizers < 1:
            raise ValueError(f"ResidualFSQ: num_quantizers={num_quantizers}; at least one is needed")
        if bound_hard_clamp and soft_clamp_input_value is not None:
            raise ValueError(
                "ResidualFSQ: bound_hard_clamp=True sets soft_clamp_input_value itself; give it with "
                "bound_hard_clamp=False"
            )
        if not kwargs.get("return_indices", True) or kwargs.get("num_codebooks", 1) != 1:
            raise ValueError("ResidualFSQ: return_indices=False and num_codebooks > 1 belong to FSQ alone")
        self.levels, self.num_quantizers = list(levels), num_quantizers
        self.codebook_dim = len(levels)
        self.dim = self.codebook_dim if dim is None else dim
        self.is_channel_first = is_channel_first
        self._set_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)

        self.has_projections = self.dim != self.codebook_dim
        self.project_in = nn.Linear(self.dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, self.dim) if self.has_projections else nn.Identity()
        self.layers = nn.ModuleList(
            FSQ(levels, preserve_symmetry=True, bound_hard_clamp=bound_hard_clamp, **kwargs)
            for _ in range(num_quantizers)
        )
        self.codebook_size = self.layers[0].codebook_size
        if bound_hard_clamp:
            soft_clamp_input_value = 1 + 1 / (torch.tensor(levels) - 1)
        elif soft_clamp_input_value is not None:
            soft_clamp_input_value = torch.as_tensor(soft_clamp_input_value)
        self.register_buffer("soft_clamp_input_value", soft_clamp_input_value, persistent=False)

    @property
    def scales(self) -> Tensor:
        """Half the width of every quantizer's grid, float32 ``[Q, len(levels)]``, whatever the layer is cast to."""
        levels = self.layers[0]._levels.float()
        return torch.stack([levels**-level for level in range(self.num_quantizers)])

    @property
    def codebooks(self) -> Tensor:
        """``[Q, K, len(levels)]``, before scaling."""
        return torch.stack([layer.implicit_codebook for layer in self.layers])

    @property
    def usage(self) -> tuple[CodebookUsage, ...]:
        """:attr:`FSQ.usage` of every quantizer; one that dropout left out keeps that of its last forward."""
        return tuple(layer.usage for layer in self.layers)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices as ``forward`` returns them, or of the first quantizers only -> scaled codes ``[Q, B, ...,
        len(levels)]``; zeros for index -1 and missing quantizers."""
        levels = per_level("ResidualFSQ", indices, self.num_quantizers, 1 if self.is_channel_first else -1)
        parts = zip(self.layers, levels, self.scales, strict=True)
        return torch.stack([layer._decode(index) * scale for layer, index, scale in parts])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returned for these indices, in the layout of the input."""
        # one after the other as in forward, so that the sum is the same to the bit
        codes = sum(self.get_codes_from_indices(indices).unbind(0))
        output = self.project_out(codes.to(self.layers[0]._like.dtype))
        return output.movedim(-1, 1) if self.is_channel_first else output

    def forward(
        self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> tuple[Tensor, ...]:
        """Quantizes x ``[..., dim]`` (``[B, dim, ...]`` with ``is_channel_first``).

        Args:
            return_all_codes: also return what :meth:`get_codes_from_indices` gives.
            rand_quantize_dropout_fixed_seed: seed of this call's quantize dropout.

        Returns:
            ``(quantized, indices)``, indices int32 ``[..., Q]`` (``[B, Q, ...]``), -1 for a dropped quantizer or a NaN.

        Raises:
            ValueError: a shape that does not fit.
        """
        features = project(self.project_in, features_last("ResidualFSQ", x, self.dim, self.is_channel_first))
        residual = at_least_float32(features)
        if self.soft_clamp_input_value is not None:
            residual = (residual / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        lead = residual.shape[:-1]
        residual = residual.reshape(1, -1, self.codebook_dim)  # a map is channels last here, FSQ takes it otherwise
        used, quantized, indices = self._draw_levels(rand_quantize_dropout_fixed_seed, x.device), 0.0, []
        for layer, scale in zip(self.layers[:used], self.scales[:used], strict=True):
            code, index = layer(residual / scale)
            code = code * scale
            residual = residual - code.detach()
            quantized = quantized + code
            indices.append(index.reshape(*lead, *index.shape[2:]))
        index = F.pad(torch.stack(indices, -1), (0, self.num_quantizers - used), value=-1)
        output = project(self.project_out, quantized.reshape(*lead, self.codebook_dim).to(features.dtype))
        if self.is_channel_first:
            output, index = output.movedim(-1, 1), index.movedim(-1, 1)
        return (output, index, self.get_codes_from_indices(index)) if return_all_codes else (output, index)


class GroupedResidualFSQ(nn.Module):
    """Splits the features into groups, each quantized by a :class:`ResidualFSQ` of its own.

    Args:
        dim: features of the input, a multiple of ``groups``.
        accept_image_fmap: input ``[B, dim, ...]``, as with ``is_channel_first``.
        kwargs: the options of :class:`ResidualFSQ`.

    Raises:
        ValueError: options that do not fit together.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs):
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"GroupedResidualFSQ: dim={dim} does not split into groups={groups}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        if accept_image_fmap:
            kwargs["is_channel_first"] = True
        self.rvqs = nn.ModuleList(ResidualFSQ(dim=dim // groups, **kwargs) for _ in range(groups))
        self.codebook_size = self.rvqs[0].codebook_size

    @property
    def codebooks(self) -> Tensor:
        """``[groups, Q, K, len(levels)]``."""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    @property
    def usage(self) -> tuple[tuple[CodebookUsage, ...], ...]:
        """:attr:`ResidualFSQ.usage` of every group."""
        return tuple(rvq.usage for rvq in self.rvqs)

    @property
    def split_dim(self) -> int:
        return 1 if self.rvqs[0].is_channel_first else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices ``[groups, ...]`` -> ``[groups, Q, B, ..., len(levels)]``."""
        groups = zip(self.rvqs, indices, strict=True)
        return torch.stack([rvq.get_codes_from_indices(index) for rvq, index in groups])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returned for these indices."""
        groups = zip(self.rvqs, indices, strict=True)
        return torch.cat([rvq.get_output_from_indices(index) for rvq, index in groups], self.split_dim)

    def forward(self, x: Tensor, return_all_codes: bool = False) -> tuple:
        """As :meth:`ResidualFSQ.forward`, with indices ``[groups, ...]`` and a tuple of every group's codes."""
        if x.dim() < 2 or x.shape[self.split_dim] != self.dim:
            raise ValueError(
                f"GroupedResidualFSQ: x is {tuple(x.shape)}; expected {self.dim} features in dimension {self.split_dim}"
            )
        seed = None
        if self.training and self.rvqs[0].quantize_dropout:
            seed = common_seed(x.device)
        elif self.training:
            torch.randint(0, 10_000, ())  # theirs draws it all the same: the noise that follows is then equal
        parts = zip(self.rvqs, x.chunk(self.groups, self.split_dim), strict=True)
        quantized, indices, *codes = zip(*(rvq(part, return_all_codes, seed) for rvq, part in parts), strict=True)
        return (torch.cat(quantized, self.split_dim), torch.stack(indices), *codes)
