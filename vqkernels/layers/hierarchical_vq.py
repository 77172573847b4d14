"""``HierarchicalVQ``: residual quantization over scales, from one vector for the whole input up to its full size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import CodebookUsage, codebook_usage
from .dropout import common_seed, draw_cutoff
from .tokens import Layout, transformed
from .vector_quantize import VectorQuantize

_POOL = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MODE = ("linear", "bilinear", "trilinear")


class Phi(nn.Module):
    """The residual convolution after upsampling: ``x + ratio * (conv(x) - x)``."""

    def __init__(self, dim: int, spatial_dims: int, ratio: float):
        super().__init__()
        self.conv = _CONV[spatial_dims - 1](dim, dim, 3, padding=1)
        self.ratio = abs(float(ratio))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.ratio <= 1e-8 else x.lerp(self.conv(x).to(x.dtype), self.ratio)


class HierarchicalVQ(nn.Module):
    """Quantizes an input at growing scales: each level quantizes what is left, averaged down to its own size.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.HierarchicalVQ``;
    docs/migrating.md lists what differs on purpose.

    Args:
        dim: features of the input.
        codebook_size: codewords of every level, or one number per level.
        scales: size of every level, never smaller than the one before: a number, or one per spatial dimension.
        shared_codebook: one codebook for all levels.
        channel_first: input ``[B, dim, N]`` (``[B, dim, H, W]``, ``[B, dim, D, H, W]``), else ``[B, ..., dim]``.
        sync_codebook, decay, commitment_weight, rotation_trick, kmeans_init, kmeans_iters, threshold_ema_dead_code,
            stochastic_sample_codes, sample_codebook_temp, orthogonal_reg_weight, orthogonal_reg_max_codes,
            orthogonal_reg_active_codes_only: as in :class:`VectorQuantize`, for every level.
        quant_resi: share of the convolution that follows the upsampling; 0: none.
        share_quant_resi: convolutions that the levels share among them; 0 or less: one per level.
        nested_dropout: probability, in training, that only the first levels make up the result.
        nested_dropout_min_levels: how many stay at least.
        accept_image_fmap, accept_3d_fmap: two or three spatial dimensions instead of one.

    Raises:
        ValueError: options that do not fit together.

    Source: Tian et al. 2024 (VAR, arXiv 2404.02905).
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        scales: Sequence[int | Sequence[int]],
        shared_codebook: bool = True,
        channel_first: bool = True,
        sync_codebook: bool | None = None,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        rotation_trick: bool = False,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 0.1,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_max_codes: int | None = 128,
        orthogonal_reg_active_codes_only: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        nested_dropout: float = 0.0,
        nested_dropout_min_levels: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
    ):
        super().__init__()
        self.layout = Layout.of("HierarchicalVQ", dim, False, accept_image_fmap, accept_3d_fmap)
        self.spatial_dims = self.layout.spatial
        self.level_shapes = tuple(self._shape(scale) for scale in scales)
        steps = zip(self.level_shapes, self.level_shapes[1:], strict=False)
        if not self.level_shapes or any(a > b for low, high in steps for a, b in zip(low, high, strict=True)):
            raise ValueError(f"HierarchicalVQ: scales={scales!r}; at least one is expected, and none that shrinks")
        self.dim, self.channel_first, self.scales = dim, channel_first, tuple(scales)
        self.num_levels = len(self.level_shapes)
        sizes = (codebook_size,) * self.num_levels if isinstance(codebook_size, int) else tuple(codebook_size)
        if len(sizes) != self.num_levels or (shared_codebook and len(set(sizes)) > 1):
            raise ValueError(
                f"HierarchicalVQ: codebook_size={codebook_size!r} for {self.num_levels} scales; expected a number, or "
                "one per scale with shared_codebook=False"
            )
        if not 0.0 <= nested_dropout <= 1.0 or nested_dropout_min_levels < 1:
            raise ValueError(
                f"HierarchicalVQ: nested_dropout={nested_dropout}, nested_dropout_min_levels="
                f"{nested_dropout_min_levels}; expected a probability and a number >= 1"
            )
        self.codebook_sizes = sizes
        self.nested_dropout, self.nested_dropout_min_levels = nested_dropout, nested_dropout_min_levels

        options = {
            "sync_codebook": sync_codebook,
            "decay": decay,
            "commitment_weight": commitment_weight,
            "rotation_trick": rotation_trick,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "stochastic_sample_codes": stochastic_sample_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "orthogonal_reg_weight": orthogonal_reg_weight,
            "orthogonal_reg_max_codes": orthogonal_reg_max_codes,
            "orthogonal_reg_active_codes_only": orthogonal_reg_active_codes_only,
        }
        self.vq = VectorQuantize(dim, sizes[0], **options) if shared_codebook else None
        self.vqs = None if shared_codebook else nn.ModuleList(VectorQuantize(dim, size, **options) for size in sizes)
        shared_phi = share_quant_resi == 1
        phis = self.num_levels if share_quant_resi <= 0 else min(self.num_levels, int(share_quant_resi))
        self.phi_shared = Phi(dim, self.spatial_dims, quant_resi) if shared_phi else None
        self.phi_levels = (
            None if shared_phi else nn.ModuleList(Phi(dim, self.spatial_dims, quant_resi) for _ in range(phis))
        )
        self._last_indices: list[Tensor] | None = None

    def __getstate__(self):
        return self.__dict__ | {"_last_indices": None}

    def _shape(self, scale: int | Sequence[int]) -> tuple[int, ...]:
        """The size of a level, one number per spatial dimension."""
        shape = (scale,) * self.spatial_dims if isinstance(scale, int) else tuple(scale)
        if len(shape) != self.spatial_dims or any(size < 1 for size in shape):
            raise ValueError(
                f"HierarchicalVQ: a scale or shape of {scale!r}; expected a positive number, or {self.spatial_dims}, "
                "one per spatial dimension"
            )
        return shape

    def get_vq(self, level: int) -> VectorQuantize:
        """The quantizer of a level."""
        return self.vqs[level] if self.vq is None else self.vq

    def choose_phi(self, level: int) -> Phi:
        """The convolution of a level."""
        if self.phi_levels is None:
            return self.phi_shared
        position = level / max(self.num_levels - 1, 1)
        return self.phi_levels[round(position * (len(self.phi_levels) - 1))]

    @property
    def usage(self) -> tuple[CodebookUsage, ...]:
        """Counts, used fraction, entropy, perplexity and dead codewords of every level in the last forward.

        Raises:
            RuntimeError: there was no forward yet.
        """
        if self._last_indices is None:
            raise RuntimeError(
                "HierarchicalVQ.usage describes the last forward, and there was none yet; call the layer first"
            )
        return tuple(codebook_usage(i, k) for i, k in zip(self._last_indices, self.codebook_sizes, strict=True))

    def _pool(self, t: Tensor, level: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``[B, dim, ...]`` averaged down to the level's size over what the mask ``[B, ...]`` keeps, and which cells of
        it, ``[B, N]``, have anything to average."""
        pool, shape = _POOL[self.spatial_dims - 1], self.level_shapes[level]
        if mask is None:
            return pool(t, shape), None
        mask = mask.unsqueeze(1)
        share = pool(mask.to(t.dtype), shape)
        return pool(torch.where(mask, t, 0.0), shape) / share.clamp(min=1e-6), (share > 0).flatten(1)

    def _up(self, tokens: Tensor, level: int, full: tuple[int, ...]) -> Tensor:
        """A level's quantized cells ``[B, N, dim]`` -> ``[B, dim, ...]`` at the full size."""
        cells = tokens.mT.unflatten(-1, self.level_shapes[level])
        if self.level_shapes[level] != full:
            cells = F.interpolate(cells, size=full, mode=_MODE[self.spatial_dims - 1], align_corners=False)
        return self.choose_phi(level)(cells)

    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        return_cutoff: bool = False,
    ) -> tuple:
        """Quantizes x ``[B, dim, ...]`` (channels last, as constructed), then makes the levels' EMA steps.

        Args:
            indices: not supported, as in vector-quantize-pytorch.
            mask, lens: bool ``[B, ...]`` without features, or tokens per sample of a sequence; the rest takes no part
                and comes back as 0.
            sample_codebook_temp: overrides the constructor's.
            return_cutoff: also return the last level that nested dropout kept, None for all.

        Returns:
            ``(quantized, indices, loss)``: one int64 tensor ``[B, *scale]`` per level, -1 for cells without a valid
            token; the loss is the mean over the levels kept.

        Raises:
            ValueError: shapes that do not fit, arguments that exclude each other.
        """
        if indices is not None:
            raise ValueError("HierarchicalVQ.forward: indices is not supported; use get_output_from_indices")
        x = x if self.channel_first else x.movedim(-1, 1)
        full = tuple(x.shape[2:])
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"HierarchicalVQ: x is {tuple(x.shape)} with channels first; expected [B, {self.dim}] and "
                f"{self.spatial_dims} spatial dimensions"
            )
        mask = self.layout.mask(x.shape[:1] + x.shape[2:], mask, lens)

        residual, result, results, chosen, losses = x, torch.zeros_like(x), [], [], []
        for level, shape in enumerate(self.level_shapes):
            cells, valid = self._pool(residual, level, mask)
            quantized, index, loss = self.get_vq(level)(
                cells.flatten(2).mT, mask=valid, sample_codebook_temp=sample_codebook_temp
            )
            quantized = self._up(quantized, level, full)
            result, residual = result + quantized, residual - quantized
            results.append(result)
            chosen.append(index.unflatten(-1, shape))
            losses.append(loss)
        if not (torch.compiler.is_exporting() or transformed(chosen[0])):
            self._last_indices = chosen

        cutoff = self._draw_cutoff(x.device)
        kept = self.num_levels if cutoff is None else cutoff + 1
        result = results[kept - 1]
        if mask is not None:
            result = torch.where(mask.unsqueeze(1), result, 0.0)
        result = result if self.channel_first else result.movedim(1, -1)
        # a dropped level has gradient 0, not none: DistributedDataParallel waits for every parameter
        loss = (torch.stack(losses) * (torch.arange(self.num_levels, device=x.device) < kept)).sum() / kept
        output = result, tuple(chosen), loss
        return (*output, cutoff) if return_cutoff else output

    def _draw_cutoff(self, device: torch.device) -> int | None:
        """The last level that this forward keeps, the same on every process; None: all of them."""
        fewest = self.nested_dropout_min_levels
        if not self.training or self.nested_dropout <= 0.0 or fewest >= self.num_levels:
            return None
        return draw_cutoff(self.num_levels, fewest, self.nested_dropout, common_seed(device))

    def get_output_from_indices(self, indices: Sequence[Tensor], full_shape: int | Sequence[int] | None = None):
        """A tensor of indices per level, as ``forward`` returns them -> the quantized input; index -1 gives zeros.

        Args:
            full_shape: spatial size of the result; None: that of the last level.
        """
        if len(indices) != self.num_levels:
            raise ValueError(f"HierarchicalVQ: indices of {len(indices)} levels; expected {self.num_levels}")
        full = self.level_shapes[-1] if full_shape is None else self._shape(full_shape)
        levels = enumerate(index.flatten(1) for index in indices)
        cells = [self._up(self.get_vq(level).get_output_from_indices(index), level, full) for level, index in levels]
        result = sum(cells[1:], cells[0])
        return result if self.channel_first else result.movedim(1, -1)
