"""``LFQ``: lookup-free quantization, every feature replaced by its sign; no codebook is stored or searched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .bit_entropy import BitEntropies, bits_of, entropy
from .tokens import at_least_float32, features_last, poison, project
from .usage import RemembersIndices

_MOST_BITS = 32  # the entropy loss needs a number per code


class Return(NamedTuple):
    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """The unweighted parts of the loss."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """Scaled cosines between the input and the columns of ``weight``."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=0)) * self.scale


class LFQ(RemembersIndices, nn.Module):
    """Quantizes every feature to plus or minus ``codebook_scale``; d features make one of 2^d codes.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.LFQ``;
    docs/migrating.md lists what differs on purpose. In training an entropy loss asks for confident bits in every token
    and for all codes being used over the batch. With codes c_j and logits 2 T x.c_j its softmax over the codes is a
    product over features: bit i is 1 with probability sigmoid(4 T scale x_i); :class:`BitEntropies` builds on that.

    Args:
        dim: features of the input; another value than ``log2(codebook_size) * num_codebooks`` adds the linear layers
            ``project_in`` and ``project_out`` (``has_projections``, ``projection_has_bias``).
        codebook_size: a power of two; 2^dim if left out.
        entropy_loss_weight, commitment_loss_weight: of the two losses; 0 leaves the work out.
        diversity_gamma: weight of the entropy over the batch within the entropy loss.
        straight_through_activation: applied to the features on the way back, none by default.
        num_codebooks: groups of ``log2(codebook_size)`` features, each with an index of its own.
        keep_num_codebooks_dim: indices ``[..., num_codebooks]`` also for one codebook.
        codebook_scale: absolute value of a quantized feature; with ``spherical``, length of a quantized vector.
        frac_per_sample_entropy: share of the tokens, drawn at random, that enters the entropy loss.
        soft_clamp_input_value: bound of the features, by tanh.
        cosine_sim_project_in, cosine_sim_project_in_scale: project in by cosine similarity.
        channel_first: input ``[B, dim, ...]``; None: inputs of 4 dimensions and more.
        experimental_softplus_entropy_loss, entropy_loss_offset: entropy loss softplus(loss + offset), never negative.
        spherical: normalise features and codes, binary spherical quantization (arXiv 2406.07548).
        force_quantization_f32: kept as an attribute; quantization is always in float32 or float64.
        orthogonal_rotation: quantize in a fixed, randomly rotated basis.

    Raises:
        ValueError: options that do not fit together.

    Source: Yu et al. 2023 (arXiv 2310.05737).
    """

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: Callable[[Tensor], Tensor] | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ):
        super().__init__()
        if codebook_size is None and dim is None:
            raise ValueError("LFQ: dim and codebook_size are both missing; give one of them, or both")
        codebook_size = 2**dim if codebook_size is None else codebook_size
        if codebook_size < 2 or codebook_size & (codebook_size - 1):
            nearest = max(2, 2 ** math.ceil(math.log2(max(codebook_size, 1))))
            raise ValueError(f"LFQ: codebook_size={codebook_size}; expected a power of two, for example {nearest}")
        if codebook_size > 2**_MOST_BITS:
            raise ValueError(f"LFQ: codebook_size={codebook_size} is above the largest, 2^{_MOST_BITS}")
        if keep_num_codebooks_dim is False and num_codebooks > 1:
            raise ValueError("LFQ: keep_num_codebooks_dim=False is for one codebook only")
        if not 0.0 < frac_per_sample_entropy <= 1.0:
            raise ValueError(f"LFQ: frac_per_sample_entropy={frac_per_sample_entropy}; expected above 0, at most 1")
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise ValueError(
                f"LFQ: soft_clamp_input_value={soft_clamp_input_value} is under codebook_scale={codebook_scale}, "
                "so no feature could reach its code"
            )
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.codebook_dim = codebook_size.bit_length() - 1
        features = self.codebook_dim * num_codebooks
        self.dim = features if dim is None else dim
        self.has_projections = self.dim != features if has_projections is None else has_projections
        if self.dim != features and not self.has_projections:
            raise ValueError(f"LFQ: dim={dim} needs projections, the codebooks have {features} features")
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            if cosine_sim_project_in:
                scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
                self.project_in = CosineSimLinear(self.dim, features, scale)
            else:
                self.project_in = nn.Linear(self.dim, features, bias=projection_has_bias)
            self.project_out = nn.Linear(features, self.dim, bias=projection_has_bias)
        self.keep_num_codebooks_dim = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        self.channel_first = channel_first
        self.activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        self.codebook_scale, self.spherical = codebook_scale, spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(2 * (self.codebook_dim,))))
        self.frac_per_sample_entropy, self.diversity_gamma = frac_per_sample_entropy, diversity_gamma
        self.entropy_loss_weight, self.commitment_loss_weight = entropy_loss_weight, commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.entropy_loss_offset = entropy_loss_offset
        self.force_quantization_f32 = force_quantization_f32
        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self.entropies = BitEntropies(self.codebook_dim)
        self.usage_dim = -1 if num_codebooks > 1 else None

    # codes

    @property
    def dtype(self) -> torch.dtype:
        return self.zero.dtype

    @property
    def codebook(self) -> Tensor:
        """All codes ``[2^d, d]``, before normalisation and rotation; made when asked for."""
        return self.bits_to_codes(bits_of(torch.arange(self.codebook_size, device=self.mask.device), self.codebook_dim))

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        return bits.to(self.dtype) * (2 * self.codebook_scale) - self.codebook_scale

    @property
    def _unit(self) -> float:
        """Absolute value of a quantized feature."""
        return self.codebook_scale / math.sqrt(self.codebook_dim) if self.spherical else self.codebook_scale

    def _decode(self, indices: Tensor) -> Tensor:
        """``[...]`` -> codes ``[..., d]`` in the basis of the features; index -1 gives zeros."""
        bits = bits_of(indices, self.codebook_dim)
        unit = self.zero + self._unit
        codes = torch.where(bits, unit, -unit).masked_fill((indices < 0).unsqueeze(-1), 0.0)
        return codes @ self.orthogonal_rot.mT.to(codes.dtype) if self.orthogonal_rotation else codes

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Indices as ``forward`` returns them -> what it returned for them (0 for -1), in the layout of the input."""
        is_map = indices.dim() >= 3 + self.keep_num_codebooks_dim
        if not self.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-1)
        codes = self._decode(indices).flatten(-2)
        if project_out:
            codes = self.project_out(codes).masked_fill((indices < 0).all(-1, keepdim=True), 0.0)
        return codes.movedim(-1, 1) if (is_map if self.channel_first is None else self.channel_first) else codes

    # forward

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Return | tuple[Return, LossBreakdown]:
        """Quantizes x ``[..., dim]``, or ``[B, dim, ...]`` (see ``channel_first``).

        Args:
            inv_temperature: T of the entropy loss, how sharply a feature decides for its bit.
            mask: bool ``[B]``, ``[B, tokens]`` or ``[...]`` without features; the losses leave the False tokens out,
                which are quantized all the same.

        Returns:
            ``(quantized, indices, entropy_aux_loss)``, with ``return_loss_breakdown`` a pair of that and
            :class:`LossBreakdown`. Indices are int64 ``[...]`` (``[..., num_codebooks]``), -1 for tokens with a NaN or
            infinity, whose quantized row is NaN. Losses are 0 in evaluation.

        Raises:
            ValueError: a shape that does not fit.
        """
        first = x.dim() >= 4 if self.channel_first is None else self.channel_first
        tokens = features_last("LFQ", x, self.dim, first)
        lead = tokens.shape[:-1]
        if mask is not None:
            mask = _mask(mask, lead)
        features = project(self.project_in, tokens)
        with torch.autocast(x.device.type, enabled=False):
            z = at_least_float32(features)
            hole = poison(z)[..., None, None]
            z = self._quantizer_input(z)
            # in place, because the result is then a float at once: a third of the time of a bool and its conversion
            bits = z.detach().clone().gt_(0) + hole
            codes = bits * (2.0 * self._unit) - self._unit
            exact = torch.float32 if self.codebook_dim <= 24 else torch.float64
            indices = (bits.to(exact) @ self.mask.to(exact)).nan_to_num(-1.0).long()
            quantized = codes
            if self.training:
                passed = self.activation(z)
                quantized = codes + (passed - passed.detach())
                valid = indices[..., 0].flatten() >= 0
                valid = valid if mask is None else valid & mask
                entropies = return_loss_breakdown or self.entropy_loss_weight != 0.0
                aux, breakdown = self._losses(z, codes, valid, inv_temperature, entropies)
            else:
                aux = z.new_zeros(())
                breakdown = LossBreakdown(*z.new_zeros(3).unbind()) if return_loss_breakdown else None
            if self.orthogonal_rotation:
                quantized = quantized @ self.orthogonal_rot.mT.to(z.dtype)
        quantized = project(self.project_out, quantized.flatten(-2).to(features.dtype))
        self._remember(indices)
        if not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        result = Return(quantized.movedim(-1, 1) if first else quantized, indices, aux)
        return (result, breakdown) if return_loss_breakdown else result

    def _quantizer_input(self, features: Tensor) -> Tensor:
        """``[..., features]`` -> ``[..., num_codebooks, d]``, whose signs are the code."""
        if self.soft_clamp_input_value is not None:
            features = (features / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        z = features.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            z = z @ self.orthogonal_rot.to(z.dtype)
        return F.normalize(z, dim=-1) * self.codebook_scale if self.spherical else z

    def _losses(
        self, z: Tensor, codes: Tensor, valid: Tensor, inv_temperature: float, entropies: bool
    ) -> tuple[Tensor, LossBreakdown]:
        """z, codes ``[..., num_codebooks, d]``, valid ``[N]``: the tokens that count."""
        z, codes = z.flatten(0, -3), codes.flatten(0, -3)
        weight = _shares(valid.to(z.dtype))
        per_sample = batch = commitment = z.new_zeros(())
        if self.commitment_loss_weight > 0.0:
            commitment = (z - codes).nan_to_num(0.0).square().mean((-2, -1)) @ weight
        if entropies:
            if self.frac_per_sample_entropy < 1.0:
                rows, valid = self._sample(valid)
                z, weight = z[rows], _shares(valid.to(z.dtype))
            logits = ((4.0 * self._unit * inv_temperature) * z.transpose(0, 1)).nan_to_num(0.0)
            per_sample, mean = self.entropies(logits, weight)
            batch = entropy(_over_processes(mean, valid)).mean()
        loss = per_sample - self.diversity_gamma * batch
        if self.experimental_softplus_entropy_loss:
            loss = F.softplus(loss + self.entropy_loss_offset)
        loss = loss * self.entropy_loss_weight
        if self.commitment_loss_weight > 0.0:
            loss = loss + commitment * self.commitment_loss_weight
        return loss, LossBreakdown(per_sample, batch, commitment)

    def _sample(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """A random share of the valid tokens: their positions, and which of these count (masked batches have fewer)."""
        total = valid.shape[0]
        order = torch.randn(total, device=valid.device).argsort(-1)
        rows = torch.where(valid, order, order + total).argsort()[: int(total * self.frac_per_sample_entropy)]
        wanted = (valid.sum().double() * self.frac_per_sample_entropy).floor()
        return rows, torch.arange(rows.shape[0], device=valid.device) < wanted


def _mask(mask: Tensor, lead: torch.Size) -> Tensor:
    """A mask of samples ``[B]``, of tokens ``[B, N]``, or of any leading dimensions of the input -> ``[tokens]``."""
    flat = lead[0], lead[1:].numel()
    if mask.dtype != torch.bool or not mask.dim() or mask.shape not in (lead[: mask.dim()], flat):
        raise ValueError(
            f"LFQ: mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(lead)}, True takes part"
        )
    return mask.flatten().repeat_interleave(lead.numel() // max(mask.numel(), 1))


def _shares(weight: Tensor) -> Tensor:
    return weight / weight.sum().clamp(min=1.0)


def _over_processes(mean: Tensor, valid: Tensor) -> Tensor:
    """The mean over the tokens of all processes, from every process's own; differentiable."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return mean
    from torch.distributed.nn.functional import all_reduce

    count = valid.sum().to(mean.dtype)
    total = count.clone()
    dist.all_reduce(total)
    return all_reduce(mean * (count / total.clamp(min=1.0)))
