"""``FSP``: finite scalar quantization of probabilities, with noise within a level instead of rounding in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .tokens import at_least_float32, features_last, mixed_radix, project, straight_through
from .usage import RemembersIndices

_UNIFORM_STD = 12**-0.5  # of a uniform distribution on [0, 1]

# distribution functions, each with its inverse
CDFS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (lambda z: (z.tanh() + 1.0) / 2.0, lambda p: (2.0 * p - 1.0).atanh()),
    "sigmoid": (torch.sigmoid, torch.logit),
    "normal": (
        lambda z: (1.0 + (z / math.sqrt(2.0)).erf()) / 2.0,
        lambda p: (2.0 * p - 1.0).erfinv() * math.sqrt(2.0),
    ),
    "laplace": (
        lambda z: (1.0 + z.sign() * (1.0 - (-z.abs()).exp())) * 0.5,
        lambda p: -(p - 0.5).sign() * (1.0 - 2.0 * (p - 0.5).abs()).log(),
    ),
    "cauchy": (lambda z: z.atan() / math.pi + 0.5, lambda p: ((p - 0.5) * math.pi).tan()),
}

# targets and weights of VectorNorm; the variances are those of the distributions of the same name
_NO_MOMENTS = {"l1_weight": 0.0, "l2_weight": 0.0, "l3_weight": 0.0, "l4_weight": 0.0}
_TWO_MOMENTS = {"l3_weight": 0.0, "l4_weight": 0.0}
PRESETS = {
    "none": _NO_MOMENTS,
    "var": _TWO_MOMENTS,
    "kurt": {},
    "var_tanh": _TWO_MOMENTS | {"l2_target": 0.8225},
    "var_sigmoid": _TWO_MOMENTS | {"l2_target": 3.29},
    "var_laplace": _TWO_MOMENTS | {"l2_target": 2.0},
}


def build_cdf_act(act_name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The distribution function of that name, to (0, 1), and its inverse.

    Raises:
        ValueError: unknown name.
    """
    if act_name not in CDFS:
        raise ValueError(f"build_cdf_act: act_name={act_name!r} is unknown; allowed: {', '.join(map(repr, CDFS))}")
    return CDFS[act_name]


def batch_stats(batch: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """batch ``[N, d]`` -> mean, unbiased variance, skewness and excess kurtosis, each ``[d]``, over the rows whose
    values are all finite; zeros where there are none."""
    return _moments(batch, eps)[:4]


def _moments(batch: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`batch_stats`, and whether there was a row."""
    usable = (batch.detach() * 0.0).sum(-1, keepdim=True) == 0.0  # 0 times NaN or infinity is NaN
    rows = usable.sum()
    count = rows.clamp(min=1)
    mean = torch.where(usable, batch, 0.0).sum(0) / count
    centred = torch.where(usable, batch - mean, 0.0)
    squares = centred * centred
    variance = squares.sum(0) / (count - 1).clamp(min=1)
    # clamped before the root, whose gradient at 0 is infinite
    clamped = variance.clamp_min(eps * eps)
    skewness = (squares * centred).sum(0) / (count * clamped * clamped.sqrt())
    kurtosis = (squares * squares).sum(0) / (count * clamped * clamped) - 3.0
    return mean, variance, skewness, torch.where(rows > 0, kurtosis, 0.0), rows > 0


class VectorNorm(nn.Module):
    """Loss that draws mean, variance, skewness and excess kurtosis of a batch ``[N, d]`` to targets.

    ``forward`` returns it with the four statistics by name.
    """

    def __init__(
        self,
        l1_target: float = 0.0,
        l1_weight: float = 0.1,
        l2_target: float = 1.0,
        l2_weight: float = 0.07,
        l3_target: float = 0.0,
        l3_weight: float = 0.06,
        l4_target: float = 0.0,
        l4_weight: float = 0.05,
        eps: float = 1e-8,
    ):
        super().__init__()
        self.l1_target, self.l2_target, self.l3_target, self.l4_target = l1_target, l2_target, l3_target, l4_target
        self.l1_weight, self.l2_weight, self.l3_weight, self.l4_weight = l1_weight, l2_weight, l3_weight, l4_weight
        self.eps = eps

    @classmethod
    def build(cls, name: str) -> VectorNorm:
        """By name: none, var, kurt, var_tanh, var_sigmoid, var_laplace."""
        if name not in PRESETS:
            raise ValueError(f"VectorNorm: {name!r} is unknown; allowed: {', '.join(map(repr, PRESETS))}")
        return cls(**PRESETS[name])

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        *moments, any_row = _moments(z, self.eps)
        targets = self.l1_target, self.l2_target, self.l3_target, self.l4_target
        weights = self.l1_weight, self.l2_weight, self.l3_weight, self.l4_weight
        parts = zip(moments, targets, weights, strict=True)
        loss = sum((moment - target).square().mean() * weight for moment, target, weight in parts)
        return loss * any_row, dict(zip(("mean", "variance", "skewness", "kurtosis"), moments, strict=True))


class FSP(RemembersIndices, nn.Module):
    """Maps every feature to a probability and quantizes that to the middle of one of its levels.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.FSP``;
    docs/migrating.md lists what differs on purpose.

    Args:
        levels: number of levels per feature; their product is the codebook size.
        dim: features of the input; another value than ``len(levels)`` adds ``project_in`` and ``project_out``
            (``projection_has_bias``).
        channel_first: input ``[B, dim, ...]``.
        act_name: distribution function: tanh, sigmoid, normal, laplace or cauchy.
        quantize_rate: share of the values that are quantized in training; the others get noise as wide as a level.
        need_inv_act: map the probability back by the inverse function; otherwise it is centred and scaled to unit
            variance.
        vector_norm: preset of :class:`VectorNorm`, the loss on the features before the distribution function.

    Raises:
        ValueError: levels, names or a rate that make no sense.

    Source: finite scalar perturbation (arXiv 2602.17133).
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        act_name: str = "tanh",
        quantize_rate: float = 0.0,
        need_inv_act: bool = False,
        vector_norm: str = "var_tanh",
    ):
        super().__init__()
        levels = [int(v) for v in levels]
        if not levels or min(levels) < 1 or math.prod(levels) >= 2**31:
            raise ValueError(f"FSP: levels={levels}; expected integers >= 1 that multiply to less than 2^31 codes")
        if not 0.0 <= quantize_rate <= 1.0:
            raise ValueError(f"FSP: quantize_rate={quantize_rate!r}; expected 0 to 1")
        build_cdf_act(act_name)
        self.levels, self.codebook_dim, self.codebook_size = levels, len(levels), math.prod(levels)
        self.dim = self.codebook_dim if dim is None else dim
        self.channel_first, self.act_name, self.need_inv_act = channel_first, act_name, need_inv_act
        self.quantize_rate = quantize_rate
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int32), persistent=False)
        self.has_projections = self.dim != self.codebook_dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.codebook_dim, self.dim, bias=projection_has_bias)
        self.vector_norm = VectorNorm.build(vector_norm)

    def extra_repr(self) -> str:
        return (
            f"levels={self.levels}, dim={self.dim}, act_name={self.act_name!r}, "
            f"need_inv_act={self.need_inv_act}, quantize_rate={self.quantize_rate}"
        )

    @property
    def act_func(self) -> Callable[[Tensor], Tensor]:
        return CDFS[self.act_name][0]

    @property
    def inv_act_func(self) -> Callable[[Tensor], Tensor]:
        return CDFS[self.act_name][1]

    # probabilities [..., d] <-> levels [..., d] <-> indices [...]

    def quantize_act_value(self, act_z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Probabilities -> the middles of their levels, with a straight-through gradient, and the levels as floats."""
        level = (act_z.detach().clamp_max(1.0 - eps) * self._levels).floor()
        return straight_through(act_z, (level + 0.5) / self._levels), level

    def level_indices_to_indices(self, level_indices: Tensor) -> Tensor:
        """Levels ``[..., d]`` -> int32 ``[...]``, first feature fastest; -1 for a NaN."""
        return mixed_radix(at_least_float32(level_indices), self._basis, self.codebook_size)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        return indices.unsqueeze(-1) // self._basis % self._levels

    def indices_to_act_value(self, indices: Tensor) -> Tensor:
        """Indices ``[...]`` -> the middles of their levels ``[..., d]``."""
        dtype = self.project_out.weight.dtype if self.has_projections else torch.float32
        level = self.indices_to_level_indices(indices).to(torch.promote_types(dtype, torch.float32))
        return (level + 0.5) / self._levels

    def indices_to_codes(self, indices: Tensor, eps: float = 1e-6) -> Tensor:
        """Indices as ``forward`` returns them -> what it returned beside them in evaluation; zeros (through
        ``project_out``) for index -1."""
        codes = self._to_code(self.indices_to_act_value(indices.clamp(min=0)), eps)
        codes = codes.masked_fill((indices < 0).unsqueeze(-1), 0.0)
        if self.has_projections:
            codes = self.project_out(codes.to(self.project_out.weight.dtype))
        return codes.movedim(-1, 1) if self.channel_first else codes

    def _to_code(self, probability: Tensor, eps: float) -> Tensor:
        if self.need_inv_act:
            return self.inv_act_func(probability.clamp(eps, 1.0 - eps))
        return (probability - 0.5) / _UNIFORM_STD

    def forward(self, z: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor, Tensor, dict]:
        """Quantizes z ``[..., dim]``, or ``[B, dim, ...]`` with ``channel_first``.

        Returns:
            ``(quantized, indices, norm_loss, info)``: indices int32 ``[...]``, -1 for a NaN; ``info`` holds
            ``level_indices`` ``[..., len(levels)]``, ``norm_info`` and, with noise, ``p_accept_prob``, the share of the
            noise that stayed within (0, 1). Computed in float32 or float64.

        Raises:
            ValueError: a shape that does not fit.
        """
        tokens = features_last("FSP", z, self.dim, self.channel_first)
        features = project(self.project_in, tokens.reshape(-1, self.dim))
        flat = at_least_float32(features)
        eps = eps or torch.finfo(flat.dtype).eps
        norm_loss, norm_info = self.vector_norm(flat)
        probability = self.act_func(flat)
        chosen, level = self.quantize_act_value(probability, eps)
        info = {"level_indices": level.reshape(*tokens.shape[:-1], self.codebook_dim), "norm_info": norm_info}
        if self.training and self.quantize_rate < 1.0:
            moved = probability + (torch.rand_like(probability) * 2.0 - 1.0) / (2 * self._levels)
            inside = (moved > 0.0) & (moved < 1.0)
            info["p_accept_prob"] = inside.float().mean()
            unquantized = torch.rand_like(probability) > self.quantize_rate
            chosen = torch.where(unquantized, torch.where(inside, moved, probability), chosen)
        codes = self._to_code(chosen, eps)
        if self.need_inv_act:
            codes = straight_through(flat, codes)  # through both functions
        indices = self.level_indices_to_indices(level).reshape(tokens.shape[:-1])
        self._remember(indices)
        output = project(self.project_out, codes.to(features.dtype)).reshape(tokens.shape)
        return output.movedim(-1, 1) if self.channel_first else output, indices, norm_loss, info
