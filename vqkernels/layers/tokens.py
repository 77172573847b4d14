"""What the quantizer layers share: input layouts, masks, and the split of features among heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autograd import Function

_TINY = 2.0**-60  # times a feature: no overflow


@dataclass(frozen=True)
class Layout:
    """Where the feature dimension of an input lies. Tokens are ``[..., dim]`` whatever the layout.

    ``spatial`` counts the dimensions after the channels: 1 sequence ``[B, dim, N]``, 2 image ``[B, dim, H, W]``,
    3 volume ``[B, dim, D, H, W]``; None: channels last, any number of leading dimensions.
    """

    owner: str
    dim: int
    spatial: int | None

    @staticmethod
    def of(owner: str, dim: int, channel_last: bool, accept_image_fmap: bool, accept_3d_fmap: bool) -> Layout:
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError(f"{owner}: accept_image_fmap and accept_3d_fmap are both True; choose one")
        spatial = 2 if accept_image_fmap else 3 if accept_3d_fmap else None if channel_last else 1
        return Layout(owner, dim, spatial)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Features last, checked. A single token per sample, ``[B, dim]``, is taken in every layout but the maps."""
        one_token = x.dim() == 2 and self.spatial in (None, 1)
        fits = x.dim() >= 2 if self.spatial is None else one_token or x.dim() == self.spatial + 2
        channel = -1 if self.spatial is None or one_token else 1
        if not fits or x.shape[channel] != self.dim:
            expected = {None: "..., {d}", 1: "B, {d}, N", 2: "B, {d}, H, W", 3: "B, {d}, D, H, W"}[self.spatial]
            raise ValueError(f"{self.owner}: x is {tuple(x.shape)}; expected [{expected.format(d=self.dim)}]")
        return self.channels_last(x)

    def channels_last(self, x: Tensor) -> Tensor:
        return x if self.spatial is None else x.movedim(1, -1)

    def from_tokens(self, tokens: Tensor) -> Tensor:
        return tokens if self.spatial is None else tokens.movedim(-1, 1)

    def mask(self, lead: torch.Size, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        """The bool mask ``lead``, True where a token takes part, from ``mask`` or ``lens`` (tokens per sample)."""
        if mask is not None and lens is not None:
            raise ValueError(f"{self.owner}: mask and lens were both given; give one of them")
        if lens is not None:
            if len(lead) != 2 or lens.shape != lead[:1]:
                raise ValueError(
                    f"{self.owner}: lens is {tuple(lens.shape)}; expected one length per sample of [batch, N] = "
                    f"{tuple(lead)}"
                )
            return torch.arange(lead[1], device=lens.device) < lens.unsqueeze(-1)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != lead):
            raise ValueError(
                f"{self.owner}: mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(lead)}, "
                "True takes part"
            )
        return mask


@dataclass(frozen=True)
class Heads:
    """How the features of a token are split among codebooks: tokens ``[B, ..., heads, *]`` <-> vectors ``[H, N, *]``.

    With a codebook per head H is the number of heads. Heads that share one are more vectors of it, in the order sample,
    head, position, in which vector-quantize-pytorch draws its noise for them, too.
    """

    count: int
    dim: int
    separate: bool

    def split(self, t: Tensor, features: int = 1) -> Tensor:
        """``features``: the number of dimensions after the heads."""
        lead, rest = t.shape[: t.dim() - 1 - features], t.shape[t.dim() - features :]
        t = t.reshape(lead[0], math.prod(lead[1:]), self.count, *rest)
        if self.separate:
            return t.movedim(2, 0).reshape(self.count, math.prod(lead), *rest)
        return t.transpose(1, 2).reshape(1, math.prod(lead) * self.count, *rest)

    def merge(self, t: Tensor, lead: torch.Size) -> Tensor:
        """``[H, N, *]`` -> ``[*lead, heads, *]``."""
        positions = math.prod(lead[1:])
        if self.separate:
            t = t.reshape(self.count, lead[0], positions, *t.shape[2:]).movedim(0, 2)
        else:
            t = t.reshape(lead[0], self.count, positions, *t.shape[2:]).transpose(1, 2)
        return t.reshape(*lead, *t.shape[2:])

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask of tokens as one of vectors ``[H, N]``."""
        if mask is None:
            return None
        return self.split(mask.unsqueeze(-1).expand(*mask.shape, self.count), features=0)


def features_last(owner: str, x: Tensor, dim: int, channel_first: bool) -> Tensor:
    """``[B, dim, ...]`` or ``[..., dim]`` -> tokens ``[..., dim]``, checked; any number of dimensions."""
    if x.dim() < 2 or x.shape[1 if channel_first else -1] != dim:
        expected = f"[B, {dim}, ...]" if channel_first else f"[..., {dim}]"
        raise ValueError(f"{owner}: x is {tuple(x.shape)}; expected {expected}")
    return x.movedim(1, -1) if channel_first else x


def per_level(owner: str, indices: Tensor, levels: int, dim: int = -1) -> tuple[Tensor, ...]:
    """Indices of the first levels of a residual code, side by side in ``dim`` -> one tensor for each of all levels; a
    missing one is all -1."""
    missing = levels - indices.shape[dim]
    if missing < 0:
        raise ValueError(
            f"{owner}: indices is {tuple(indices.shape)}: {indices.shape[dim]} levels in dimension {dim}, expected at "
            f"most {levels}"
        )
    return F.pad(indices.movedim(dim, -1), (0, missing), value=-1).unbind(-1)


def transformed(t: Tensor) -> bool:
    """Whether t stands for other tensors inside ``torch.vmap``, ``torch.func.grad`` and the like."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(t)


def at_least_float32(x: Tensor) -> Tensor:
    """Quantizers compute in float32, or in float64 for float64 inputs."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _StraightThrough(Function):
    @staticmethod
    def forward(x, value):
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, bit for bit and without a copy, with the gradient of x; same shape and dtype."""
    return _StraightThrough.apply(x, value.detach())


def poison(x: Tensor) -> Tensor:
    """``[..., D]`` -> ``[...]``, in at least float32: 0, or NaN where a value is NaN or infinite. A product costs less
    than a test of every value."""
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x.detach())
        return (x @ x.new_full(x.shape[-1:], _TINY)) * 0.0


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``, where a row ``[..., D]`` with NaN or infinity becomes NaN, and does not reach the gradient of the
    weights: 0 times such a value would be NaN."""
    if isinstance(linear, nn.Identity):
        return x
    hole = poison(x).unsqueeze(-1)
    if torch.is_grad_enabled():
        lost = hole.isnan()
        return torch.where(lost, torch.nan, linear(straight_through(x, torch.where(lost, 0.0, x.detach()))))
    result = linear(x)
    return result + hole.to(result.dtype)


def mixed_radix(digits: Tensor, basis: Tensor, codes: int) -> Tensor:
    """Digits ``[..., d]``, floats -> the int32 index ``[...]`` below ``codes``, first digit fastest; -1 for a NaN."""
    digits = digits if codes <= 2**24 else digits.double()  # whole numbers up to 2^24 are exact in float32
    return (digits * basis).sum(-1).nan_to_num(-1.0).to(torch.int32)


def lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook ``[K, D]``, indices of any shape -> codewords ``[..., D]``; a negative index gives a zero vector."""
    codes = F.embedding(indices.clamp(min=0), codebook)
    return codes.masked_fill((indices < 0).unsqueeze(-1), 0.0)
