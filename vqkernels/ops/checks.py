"""Argument checks that several ops share. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import DTYPES

_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def choice(op: str, argument: str, value: str, allowed: dict[str, int]) -> int:
    """The integer that the raw schema uses for a named option."""
    if value not in allowed:
        raise ValueError(f"{op}: {argument}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}")
    return allowed[value]


def tensor(op: str, argument: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a torch.Tensor, got {type(value).__name__}")


def floating(op: str, argument: str, value) -> None:
    tensor(op, argument, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {argument} has dtype {value.dtype}; allowed: {_NAMES}")


def same(op: str, a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    """Equal dtype and device."""
    if a.dtype != b.dtype:
        raise TypeError(f"{op}: {a_name} is {a.dtype} and {b_name} is {b.dtype}; convert one with .to()")
    if a.device != b.device:
        raise ValueError(f"{op}: {a_name} is on {a.device} and {b_name} is on {b.device}; move one with .to()")


def integer(op: str, argument: str, value) -> None:
    tensor(op, argument, value)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{op}: {argument} has dtype {value.dtype}; integer indices are expected")


def positive(op: str, argument: str, value: int) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{op}: {argument}={value!r}; a positive integer is expected")


def vectors_and_codebook(op: str, z: Tensor, codebook: Tensor, name: str = "codebook") -> None:
    """z [..., D] with codebook [K,D], or z [H, ..., D] with codebook [H,K,D]."""
    floating(op, "z", z)
    floating(op, name, codebook)
    same(op, "z", z, name, codebook)
    if z.dim() < 1 or codebook.dim() not in (2, 3):
        raise ValueError(
            f"{op}: z is {tuple(z.shape)} and {name} is {tuple(codebook.shape)}; "
            f"expected z [..., D] with {name} [K, D], "
            f"or one codebook per head: z [H, ..., D] with {name} [H, K, D]"
        )
    if z.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"{op}: z is {tuple(z.shape)} and {name} is {tuple(codebook.shape)}: "
            f"the last dimensions (features) differ, "
            f"{z.shape[-1]} against {codebook.shape[-1]}"
        )
    if codebook.shape[-2] == 0 or codebook.shape[-1] == 0:
        raise ValueError(f"{op}: {name} is {tuple(codebook.shape)}; it needs at least one codeword and one feature")
    if codebook.dim() == 3 and (z.dim() < 2 or z.shape[0] != codebook.shape[0]):
        raise ValueError(
            f"{op}: {name} {tuple(codebook.shape)} holds {codebook.shape[0]} heads, "
            f"so z must be [{codebook.shape[0]}, ..., D]; "
            f"it is {tuple(z.shape)}"
        )


def row_mask(op: str, mask: Tensor | None, lead: torch.Size, device: torch.device) -> None:
    if mask is None:
        return
    tensor(op, "mask", mask)
    if mask.dtype != torch.bool or mask.shape != lead or mask.device != device:
        raise ValueError(
            f"{op}: mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}; "
            f"expected torch.bool {tuple(lead)} on {device} "
            f"(z without its last dimension; True takes part)"
        )


def finite_rows(x: Tensor) -> Tensor:
    """bool [N]: the rows of x [N, D] without NaN and infinity. A finite sum has finite terms only, so that the row by
    row look, several times as long, is left to an x that needs it."""
    if x.sum().isfinite():
        return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    return x.isfinite().all(-1)
