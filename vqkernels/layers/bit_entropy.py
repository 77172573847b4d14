"""Entropies over all 2^d codes of d independent bits, without a table of rows times codes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 1e-5  # as in vector-quantize-pytorch, probabilities are clamped here before the logarithm
_LOG_SMALLEST = math.log(SMALLEST)
_ONE_TABLE = 5  # bits up to which the whole table costs less than the detour over its halves


def bits_of(codes: Tensor, bits: int) -> Tensor:
    """int64 ``[...]`` -> bool ``[..., bits]``, most significant bit first."""
    return (codes.unsqueeze(-1) >> torch.arange(bits - 1, -1, -1, device=codes.device)) % 2 == 1


def entropy(probabilities: Tensor) -> Tensor:
    """``[..., K]`` -> ``[...]``, in nats."""
    return -(probabilities * probabilities.clamp(min=SMALLEST).log()).sum(-1)


class BitEntropies(nn.Module):
    """Mean entropy of N rows of d independent bits, and their mean distribution over the 2^d codes.

    The probability of a code is the product of those of its bits. So a row's table of probabilities is the outer
    product of two short ones, over the codes of the high and of the low half of the bits, and

    * the mean table is a matrix product of the short ones;
    * the entropy of a row is the sum of the entropies of its bits, less what the clamp takes from rare codes,
      ``sum p (log 1e-5 - log p)`` over ``p < 1e-5``: cumulative sums over the sorted low half give it, with one binary
      search for each entry of the high half.

    Memory and work are N 2^(d/2); only the matrix product multiplies N 2^d numbers, and it never holds them.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        high = bits if bits <= _ONE_TABLE else (bits + 1) // 2
        self.register_buffer("high", _part_codes(high), persistent=False)
        self.register_buffer("low", _part_codes(bits - high), persistent=False)

    def forward(self, logits: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: finite ``[C, N, d]`` of C independent codebooks, float32 or float64: bit i of a row is 1 with
                probability ``sigmoid(logits[..., i])``.
            weight: ``[N]``, what each row counts in both means.

        Returns:
            ``()``, the mean also over the codebooks, and ``[C, 2^d]``, codes by their binary number, most significant
            bit first.
        """
        high, low = self.high.to(logits.dtype), self.low.to(logits.dtype)
        if self.bits <= _ONE_TABLE:
            # every bit that is not the likelier one costs its logit: no large numbers cancel
            one = logits.clamp(max=0.0)
            table = (torch.stack([one - logits, one], -1).flatten(-2) @ high).softmax(-1)
            return (entropy(table) @ weight).mean(), weight @ table

        # an exponential beyond this bound is invisible in a sum; within it, products of two and a weight stay normal
        bound = -0.4 * math.log(torch.finfo(logits.dtype).tiny)
        logits = logits.clamp(-bound, bound)
        log_bits = F.logsigmoid(torch.stack([-logits, logits], -1)).flatten(-2)
        log_high, log_low = log_bits.split([len(high), len(low)], -1)
        log_high, log_low = (log_high @ high).clamp(min=-bound), (log_low @ low).clamp(min=-bound)
        table_high = log_high.exp()
        mean = (table_high * weight.unsqueeze(-1)).mT @ log_low.exp()
        rows = (log_bits.exp() * log_bits).sum(-1) + (table_high * _excess(log_high, log_low)).sum(-1)
        return -(rows @ weight).mean(), mean.flatten(-2)


def _part_codes(bits: int) -> Tensor:
    """``[2 bits, 2^bits]``, 0 or 1: which of (bit 0 is 0, bit 0 is 1, bit 1 is 0, ...) hold in each code."""
    ones = bits_of(torch.arange(2**bits), bits)
    return torch.stack([~ones, ones], -1).flatten(-2).T.float().contiguous()


def _excess(log_high: Tensor, log_low: Tensor) -> Tensor:
    """For every a of ``log_high``: the sum of ``e^b (log 1e-5 - a - b)`` over the b of ``log_low`` with
    a + b < log 1e-5."""
    gap = _LOG_SMALLEST - log_high
    log_low = log_low.sort(-1).values
    mass = log_low.exp()
    below = torch.searchsorted(log_low.detach(), gap.detach())
    total = F.pad(mass.cumsum(-1), (1, 0)).gather(-1, below)
    weighted = F.pad((mass * log_low).cumsum(-1), (1, 0)).gather(-1, below)
    return gap * total - weighted
