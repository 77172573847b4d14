"""How vectors get their codewords, and what gradient passes through the choice.

The plain way, nearest codeword and estimator, is one fused op. The others choose several codewords, or one at random,
or out of candidates of the vector's own, and compose the rest from torch's operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import rotation_trick, vector_quantize
from .losses import mean_square
from .search import chunks, nearest_k, similarities
from .tokens import lookup


class Chosen(NamedTuple):
    """quantized ``[H, N, D]`` with its gradient, indices ``[H, N]``, both losses unweighted, and the similarities
    ``[H, N, K]`` if the choice needed them. With k codewords per vector: quantized ``[H, N, k, D]``, indices and
    commitment ``[H, N, k]``."""

    quantized: Tensor
    indices: Tensor
    commitment: Tensor
    codebook_loss: Tensor
    similarity: Tensor | None


@dataclass(frozen=True)
class Chooser:
    """The options of a quantizer that say how it chooses.

    Args:
        metric: "l2" or "dot".
        estimator: "rotation", "reflection", "ste", "gumbel" or "directional".
        stochastic, straight_through, variance: ``stochastic_sample_codes``, ``straight_through`` and
            ``directional_reparam_variance`` of :class:`VectorQuantize`.
        route: whether the gradient of quantized reaches the input.
    """

    metric: str
    estimator: str
    stochastic: bool = False
    straight_through: bool = False
    variance: float = 5e-3
    route: bool = True

    def __call__(
        self,
        z: Tensor,
        embed: Tensor,
        mask: Tensor | None,
        *,
        training: bool,
        trains_codes: bool,
        temperature: float,
        candidates: Tensor | None = None,
        k: int | None = None,
    ) -> Chosen:
        """z ``[H, N, D]``, embed ``[H, K, D]``, mask ``[H, N]``, candidates ``[H, N, K, D]`` in place of embed.

        ``trains_codes``: the codebook loss has a gradient. Masked and non-finite rows get index -1, no loss and no
        gradient; quantized is 0 there, and NaN.
        """
        routed = training and z.requires_grad and self.route
        sampling = self.sampling(training, temperature, routed)
        if sampling or candidates is not None or k is not None:
            return self._compose(z, embed, mask, routed, training, trains_codes, sampling, candidates, k)
        kind = "ste" if self.estimator in ("gumbel", "directional") else self.estimator
        out = vector_quantize(
            z if training else z.detach(), embed if trains_codes else embed.detach(), kind, 1.0, self.metric, mask
        )
        quantized = out.quantized
        if (self.estimator == "directional" and routed) or (embed.requires_grad and not routed):
            usable = (out.indices >= 0).unsqueeze(-1)
            codes = torch.stack([lookup(book, index) for book, index in zip(embed, out.indices, strict=True)])
            passed = self.pass_gradient(torch.where(usable, z, 0.0), codes, routed)
            quantized = torch.where(usable, passed, quantized.detach())
        elif not routed:
            quantized = quantized.detach()
        return Chosen(quantized, out.indices, out.commitment_loss, out.codebook_loss, None)

    def sampling(self, training: bool, temperature: float, routed: bool) -> Sampling:
        if training and self.estimator == "gumbel":
            if not temperature > 0.0:
                raise ValueError(f"estimator='gumbel' needs sample_codebook_temp > 0, got {temperature!r}")
            return Sampling(temperature, noise=True, soft=self.route, relaxed=True)
        active = training and temperature > 0.0
        return Sampling(temperature, active and self.stochastic, active and self.straight_through and not routed)

    def pass_gradient(self, z: Tensor, codes: Tensor, routed: bool) -> Tensor:
        """codes, with a gradient to z; that of the Gumbel estimator is in codes already."""
        if not routed or self.estimator == "gumbel":
            return codes
        if self.estimator == "directional":
            return directional_reparam(z, codes, self.variance)
        return rotation_trick(z, codes, self.estimator)

    def _compose(self, z, embed, mask, routed, training, trains_codes, sampling, candidates, k) -> Chosen:
        finite = z.isfinite().all(-1)
        usable = finite if mask is None else finite & mask
        fill = torch.where(usable if mask is None else finite | ~mask, 0.0, torch.nan).to(z.dtype)
        z = torch.where(usable.unsqueeze(-1), z, 0.0)
        indices, codes, similarity = choose(z, embed, self.metric, k or 1, sampling, candidates)
        if k is None:
            indices, codes = indices.squeeze(-1), codes.squeeze(-2)
            commitment, codebook_loss = (
                mean_square(z, codes.detach(), usable),
                mean_square(z.detach(), codes, usable),
            )
        else:
            usable, fill, z = usable.unsqueeze(-1), fill.unsqueeze(-1), z.unsqueeze(-2).expand_as(codes)
            target = codes.detach() if training and not trains_codes else codes
            commitment = codebook_loss = torch.where(usable, (target - z).square().mean(-1), 0.0)
        quantized = self.pass_gradient(z, codes, routed)
        quantized = torch.where(usable.unsqueeze(-1), quantized, fill.unsqueeze(-1))
        return Chosen(quantized, torch.where(usable, indices, -1), commitment, codebook_loss, similarity)


class Choice(NamedTuple):
    """indices ``[H, N, k]``, their codewords ``[H, N, k, D]`` (differentiable), the similarities if needed."""

    indices: Tensor
    codes: Tensor
    similarity: Tensor | None


class Sampling(NamedTuple):
    """How the choice is made at random, and what gradient passes through it.

    With similarities s, noise g of the Gumbel distribution and temperature t:

    * noise, without relaxed: index = argmax(s / t + g), a draw with probabilities softmax(s / t);
    * noise and relaxed: index = argmax(s + g), a draw with probabilities softmax(s); weights y = softmax((s + g) / t);
    * soft, without noise of its own: weights y = softmax(s / t).

    Weights pass the gradient on: the value is the chosen codeword, the gradient that of the mean sum_k y_k sg(c_k) in
    place of the choice (straight-through Gumbel-softmax, Jang et al. 2017, arXiv 1611.01144).
    """

    temperature: float = 1.0
    noise: bool = False
    soft: bool = False
    relaxed: bool = False

    def __bool__(self) -> bool:
        return self.noise or self.soft


def choose(
    z: Tensor, codebook: Tensor, metric: str, k: int, sampling: Sampling, candidates: Tensor | None = None
) -> Choice:
    """z ``[H, N, D]`` (finite) and codebook ``[H, K, D]``, or candidates ``[H, N, K, D]`` in place of the codebook."""
    similarity, weights = None, None
    if candidates is not None:
        similarity = candidate_similarities(z, candidates, metric)
    elif sampling.soft:
        similarity = similarities(z, codebook, metric)
    if similarity is None:
        search = _sample if sampling.noise else _nearest
        indices = search(z, codebook, metric, k, sampling.temperature)
    elif sampling:
        logits = similarity if sampling.relaxed else similarity / sampling.temperature
        noisy = logits + gumbel_noise(logits) if sampling.noise else logits
        indices = _best(noisy, k)
        weights = (noisy / sampling.temperature if sampling.relaxed else logits).softmax(-1)
    else:
        indices = _best(similarity, k)
    if candidates is None:
        codes = torch.stack([lookup(book, index) for book, index in zip(codebook, indices, strict=True)])
    else:
        codes = candidates.gather(2, indices.unsqueeze(-1).expand(*indices.shape, z.shape[-1]))
    if sampling.soft:
        with torch.autocast(z.device.type, enabled=False):
            if candidates is None:
                mean = (weights @ codebook.detach()).unsqueeze(2)
            else:
                mean = weights.unsqueeze(2) @ candidates.detach()
        codes = codes + (mean - mean.detach())
    return Choice(indices, codes, similarity)


def candidate_similarities(z: Tensor, candidates: Tensor, metric: str) -> Tensor:
    """z ``[H, N, D]``, candidates ``[H, N, K, D]`` -> ``[H, N, K]``, as :func:`similarities`."""
    with torch.autocast(z.device.type, enabled=False):
        if metric == "dot":
            return (candidates @ z.unsqueeze(-1)).squeeze(-1)
        return -torch.nn.functional.pairwise_distance(z.unsqueeze(-2), candidates)


def gumbel_noise(like: Tensor) -> Tensor:
    uniform = torch.rand(like.shape, dtype=like.dtype, device=like.device)
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def directional_reparam(z: Tensor, codes: Tensor, variance: float = 5e-3) -> Tensor:
    """z + |c - z| u, with u the direction of c - z + sqrt(variance) * normal noise: close to the codeword c, as far
    from z as c is, and differentiable in both. Source: DiVeQ, Vali et al. 2025, figure 1."""
    error = codes - z
    direction = torch.nn.functional.normalize(
        error + math.sqrt(variance) * torch.randn(error.shape, dtype=error.dtype, device=error.device), dim=-1, eps=1e-6
    )
    return z + direction.detach() * error.norm(dim=-1, keepdim=True)


def _best(scores: Tensor, k: int) -> Tensor:
    """Ties go to the lowest index for k = 1."""
    return scores.argmax(-1, keepdim=True) if k == 1 else scores.topk(k, -1).indices


def _nearest(z: Tensor, codebook: Tensor, metric: str, k: int, _: float) -> Tensor:
    return torch.stack([nearest_k(rows, book, k, metric) for rows, book in zip(z, codebook, strict=True)])


@torch.no_grad()
def _sample(z: Tensor, codebook: Tensor, metric: str, k: int, temperature: float) -> Tensor:
    """argmax(s / t + Gumbel noise), the k largest, a chunk of rows at a time: never the N x K matrix."""
    heads = []
    for rows, book in zip(z, codebook, strict=True):
        found = []
        for part in chunks(rows, len(book)):
            scores = similarities(part.unsqueeze(0), book.unsqueeze(0), metric)[0] / temperature
            found.append(_best(scores + gumbel_noise(scores), k))
        heads.append(torch.cat(found))
    return torch.stack(heads)
