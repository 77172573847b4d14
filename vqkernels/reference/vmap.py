"""The raw operators under ``torch.vmap``: the mapped dimension joins the rows or the heads, so that one call does all.

A rule takes the operator, the size of the mapped dimension, where it lies in every argument (None: nowhere) and the
arguments; it returns the results and where it lies in each. Operators without a rule run once per element, by torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .nearest_codeword import accumulate_dtype


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _as_heads(t: Tensor, dim: int | None, size: int) -> Tensor:
    """[H, ...] of each -> [size H, ...]."""
    return _front(t, dim, size).flatten(0, 1)


def _as_rows(t: Tensor, dim: int | None, size: int) -> Tensor:
    """[H, N, ...] of each -> [H, size N, ...]."""
    return _front(t, dim, size).transpose(0, 1).flatten(1, 2)


class _Joined:
    """One call for all: more rows of the same codebooks, or, where these are mapped themselves, more heads."""

    def __init__(self, size: int, z: Tensor, dim: int | None, codebook_dims: list[int | None]):
        self.size, self.lead = size, _front(z, dim, size).shape[1:3]
        self.shared = all(dim is None for dim in codebook_dims)
        self.join = _as_rows if self.shared else _as_heads

    def tensor(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        return None if t is None else self.join(t, dim, self.size)

    def codebook(self, t: Tensor, dim: int | None) -> Tensor:
        return t if self.shared else _as_heads(t, dim, self.size)

    def apart(self, t: Tensor) -> Tensor:
        """-> [size, H, N, ...]."""
        heads, rows = self.lead
        if self.shared:
            return t.unflatten(1, (self.size, rows)).transpose(0, 1)
        return t.unflatten(0, (self.size, heads))


def nearest_codeword(op, size, dims, z, codebook, mask, metric, certified):
    joined = _Joined(size, z, dims[0], [dims[1]])
    parts = joined.tensor(z, dims[0]), joined.codebook(codebook, dims[1]), joined.tensor(mask, dims[2])
    return tuple(joined.apart(t) for t in op(*parts, metric, certified)), (0, 0)


def _residuals(size, dims, z, codebooks, indices):
    """What every level leaves: z and codebooks as they come, indices [size, H, N, Q] -> [size, H, N, D] each."""
    residual = _front(z, dims[0], size).to(accumulate_dtype(z))
    for level, (codebook, dim) in enumerate(zip(codebooks, dims[1], strict=True)):
        index = indices[..., level].clamp(min=0).unsqueeze(-1).expand(residual.shape)
        residual = residual - _front(codebook, dim, size).to(residual.dtype).gather(2, index)
        yield residual


def residual_quantize(op, size, dims, z, codebooks, mask, metric):
    """The losses are means over the rows of one element, so they are computed apart."""
    joined = _Joined(size, z, dims[0], dims[1])
    books = [joined.codebook(book, dim) for book, dim in zip(codebooks, dims[1], strict=True)]
    out = op(joined.tensor(z, dims[0]), books, joined.tensor(mask, dims[2]), metric)
    indices, quantized = joined.apart(out[0]), joined.apart(out[1])
    valid = indices[..., 0] >= 0
    count = valid.sum((1, 2))
    squares = (r.double().square().sum(-1) for r in _residuals(size, dims, z, codebooks, indices))
    total = torch.stack([torch.where(valid, s, 0.0).sum((1, 2)) for s in squares], -1)
    losses = total / (count.clamp(min=1) * quantized.shape[-1]).unsqueeze(-1)
    return (indices, quantized, losses.to(out[2].dtype), count), (0, 0, 0, 0)


def residual_quantize_backward(op, size, dims, z, codebooks, indices, grad, commitment_scale, estimator, per_level):
    """Every element has its own scale of the losses, so their part of the gradient is added apart."""
    joined = _Joined(size, z, dims[0], dims[1])
    books = [joined.codebook(book, dim) for book, dim in zip(codebooks, dims[1], strict=True)]
    parts = joined.tensor(indices, dims[2]), joined.tensor(grad, dims[3])
    none = commitment_scale.new_zeros(len(books))
    dz = joined.apart(op(joined.tensor(z, dims[0]), books, *parts, none, estimator, per_level))
    indices, scale = _front(indices, dims[2], size), _front(commitment_scale, dims[4], size)
    residuals = _residuals(size, dims, z, codebooks, indices)
    loss = sum(scale[:, level, None, None, None] * residual for level, residual in enumerate(residuals))
    return (dz + torch.where((indices[..., :1] >= 0), loss, 0.0)).to(dz.dtype), 0


def _independent(op, size, dims, *arguments):
    """Operators on tensors [N, ...] or [H, ...] whose first dimension holds things that do not meet."""
    parts = [_as_heads(t, dim, size) if isinstance(t, Tensor) else t for t, dim in zip(arguments, dims, strict=True)]
    results = op(*parts)
    if isinstance(results, Tensor):
        return _apart(results, size), 0
    return tuple(_apart(t, size) for t in results), (0,) * len(results)


def _apart(t: Tensor, size: int) -> Tensor:
    return t.unflatten(0, (size, len(t) // size))


RULES: dict[str, Callable] = {
    "nearest_codeword": nearest_codeword,
    "residual_quantize": residual_quantize,
    "residual_quantize_backward": residual_quantize_backward,
    "rotation_trick_backward": _independent,
    "fsq": _independent,
    "fsq_backward": _independent,
    "codeword_sums": _independent,
    "codebook_usage": _independent,
}


def register(library: torch.library.Library, name: str, overload: str) -> None:
    """The rule, if there is one, of an operator that the library has defined; overload "" or ".name"."""
    if name not in RULES:
        return
    op = getattr(getattr(getattr(torch.ops, library.ns), name), overload.removeprefix(".") or "default")

    def vmap(info, dims, *arguments):
        return RULES[name](op, info.batch_size, dims, *arguments)

    torch.library.register_vmap(f"{library.ns}::{name}{overload}", vmap, lib=library)
