"""``BinaryMapper``: samples bits from logits and returns the code they make as a one-hot vector."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autograd import Function
from .tokens import at_least_float32
from .usage import RemembersIndices

_NAT = math.log(2.0)  # the entropy of a fair bit
_LARGEST = 1e4  # a logit beyond this has probability 0 or 1 in every dtype


def binary_entropy(logits: Tensor) -> Tensor:
    """``[..., bits]`` -> ``[...]``: the entropy of independent bits, in nats."""
    logits = logits.clamp(-_LARGEST, _LARGEST)
    return -(logits.sigmoid() * F.logsigmoid(logits) + (-logits).sigmoid() * F.logsigmoid(-logits)).sum(-1)


class _OneHotFn(Function):
    """Value: the one-hot vector of a code ``[N, 2^bits]``; gradient: that of the codes' probabilities."""

    @staticmethod
    def forward(logits, indices, codes):
        one_hot = logits.new_zeros(logits.shape[0], codes.shape[0])
        return one_hot.scatter_(-1, indices.clamp(min=0).unsqueeze(-1), 1.0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        logits, indices, codes = ctx.saved_tensors
        logits = logits.nan_to_num(0.0, _LARGEST, -_LARGEST).clamp(-_LARGEST, _LARGEST)
        codes = codes.to(logits.dtype)
        # a code costs the logits of every bit that is not the likelier one
        cost = (-logits).relu() @ codes.mT + logits.relu() @ (1.0 - codes).mT
        flow = grad * (-cost).softmax(-1)
        to_one, to_zero = flow @ codes, flow @ (1.0 - codes)
        result = to_one * (-logits).sigmoid() - to_zero * logits.sigmoid()
        return result.masked_fill((indices < 0).unsqueeze(-1), 0.0), None, None


class BinaryMapper(RemembersIndices, nn.Module):
    """Samples bits from their logits; the code they make, one of 2^bits, is returned as a one-hot vector.

    Constructor, ``forward`` and results are those of ``vector_quantize_pytorch.BinaryMapper``; nothing to save.

    Args:
        bits: bits of a code; the first is the least significant.
        kl_loss_threshold: the auxiliary loss is what the divergence from fair bits, in nats, has above this.
        deterministic_on_eval: in evaluation take the likelier bit instead of sampling.

    Source: Fleuret 2025 (arXiv 2510.17558).
    """

    def __init__(self, bits: int = 1, kl_loss_threshold: float = _NAT, deterministic_on_eval: bool = False):
        super().__init__()
        if bits < 1:
            raise ValueError(f"BinaryMapper: bits={bits}; at least one is needed")
        self.bits, self.num_codes = bits, 2**bits
        self.codebook_size = self.num_codes
        power_two = 2 ** torch.arange(bits)
        self.register_buffer("power_two", power_two, persistent=False)
        self.register_buffer(
            "codes", torch.arange(self.num_codes).unsqueeze(-1).bitwise_and(power_two) != 0, persistent=False
        )
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self.kl_loss_threshold = kl_loss_threshold
        self.deterministic_on_eval = deterministic_on_eval

    def binary_entropy(self, logits: Tensor) -> Tensor:
        """``[..., bits]`` -> ``[...]``, in nats."""
        return binary_entropy(logits)

    def calc_aux_loss(self, logits: Tensor, reduce_aux_kl_loss: bool = True) -> Tensor:
        """logits ``[..., bits]`` -> the loss ``()``, or ``[...]`` without reduction; 0 for a NaN, which the mean leaves
        out."""
        usable = ~logits.isnan().any(-1)
        divergence = self.bits * _NAT - binary_entropy(logits.nan_to_num(0.0))
        loss = (divergence - self.kl_loss_threshold).relu().masked_fill(~usable, 0.0)
        return loss.sum() / usable.sum().clamp(min=1) if reduce_aux_kl_loss else loss

    def log_prob(
        self, logits: Tensor, *, indices: Tensor | None = None, one_hot: Tensor | None = None, sum_bits: bool = True
    ) -> Tensor:
        """The log-probability ``[...]`` of codes given by ``indices`` ``[...]`` or ``one_hot`` ``[..., 2^bits]`` under
        logits ``[..., bits]``; ``[..., bits]`` without ``sum_bits``.

        Raises:
            ValueError: both or none of ``indices`` and ``one_hot``.
        """
        if (indices is None) == (one_hot is None):
            raise ValueError("BinaryMapper.log_prob: give one of indices and one_hot")
        bits = self.codes[one_hot.argmax(-1) if indices is None else indices]
        log_prob = F.logsigmoid(torch.where(bits, logits, -logits))
        return log_prob.sum(-1) if sum_bits else log_prob

    def forward(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
        deterministic: bool | None = None,
        return_indices: bool = False,
        reduce_aux_kl_loss: bool = True,
    ) -> tuple[Tensor, ...]:
        """Samples a code for every row of logits ``[..., bits]``.

        Args:
            temperature: divides the logits before sampling.
            straight_through: gradient of the codes' probabilities; None: in training.
            calc_aux_loss: None: in training; otherwise the loss is 0.
            deterministic: take the likelier bit; None: as constructed.
            return_indices: also return the codes' numbers.
            reduce_aux_kl_loss: False: the loss per row.

        Returns:
            ``(one_hot [..., 2^bits], aux_loss)``, or ``(one_hot, indices, aux_loss)`` with int64 indices ``[...]``.
            A row with a NaN has index -1 and is NaN.

        Raises:
            ValueError: a shape that does not fit.
        """
        if logits.dim() < 1 or logits.shape[-1] != self.bits:
            raise ValueError(f"BinaryMapper: logits is {tuple(logits.shape)}; expected [..., {self.bits}]")
        if deterministic is None:
            deterministic = self.deterministic_on_eval and not self.training
        lead = logits.shape[:-1]
        rows = logits.reshape(-1, self.bits)
        bad = rows.isnan().any(-1)
        probability = (rows.detach() / temperature).sigmoid().nan_to_num(0.0)
        sampled = probability > 0.5 if deterministic else probability.bernoulli() > 0
        indices = (sampled * self.power_two).sum(-1).masked_fill(bad, -1)
        passed = rows if (self.training if straight_through is None else straight_through) else rows.detach()
        one_hot = _OneHotFn.apply(at_least_float32(passed), indices, self.codes)
        one_hot = one_hot.masked_fill(bad.unsqueeze(-1), torch.nan).reshape(*lead, self.num_codes).to(logits.dtype)
        aux = self.zero.clone()
        if self.training if calc_aux_loss is None else calc_aux_loss:
            aux = self.calc_aux_loss(logits, reduce_aux_kl_loss)
        indices = indices.reshape(lead)
        self._remember(indices)
        return (one_hot, indices, aux) if return_indices else (one_hot, aux)
