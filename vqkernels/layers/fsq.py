"""``FSQ``: finite scalar quantization, every feature rounded to one of a few levels; nothing to train, no codebook."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import fsq
from .tokens import at_least_float32, features_last, mixed_radix, project, straight_through
from .usage import RemembersIndices

_MOST_CODES = 2**31 - 1  # indices are int32


class FSQ(RemembersIndices, nn.Module):
    """Rounds every feature to one of its levels; the code is all levels together, so no codebook is stored or searched.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.FSQ``;
    docs/migrating.md lists what differs on purpose.

    Args:
        levels: number of values per feature; their product is the codebook size.
        dim: features of the input; another value than ``len(levels) * num_codebooks`` adds the linear layers
            ``project_in`` and ``project_out`` (``projection_has_bias``).
        num_codebooks: groups of ``len(levels)`` features, each with an index of its own.
        keep_num_codebooks_dim: indices ``[..., num_codebooks]`` also for one codebook.
        scale: kept as an attribute, no effect, as there.
        allowed_dtypes, force_quantization_f32: kept as attributes; quantization is always in float32 or float64.
        channel_first: input ``[B, dim, ...]``; inputs of 4 dimensions and more always are.
        return_indices: False returns None for them and allows any number of codes.
        preserve_symmetry: levels evenly spread over [-1, 1], section 3.2 of arXiv 2411.19842; needed for 2 levels.
        noise_dropout: with ``preserve_symmetry``, in training: share of the values that are moved by uniform noise.
        bound_hard_clamp: bound by a clamp to [-1, 1] instead of tanh.
        orthogonal_rotation: quantize in a fixed, randomly rotated basis.

    Raises:
        ValueError: levels or options that do not fit together, more than 2^31 - 1 codes with indices.

    Source: Mentzer et al. 2023 (arXiv 2309.15505).
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ):
        super().__init__()
        levels = [int(v) for v in levels]
        if not levels or min(levels) < (2 if preserve_symmetry else 3):
            raise ValueError(
                f"FSQ: levels={levels}; a non-empty list of integers >= 3 is expected, >= 2 with preserve_symmetry=True"
            )
        if num_codebooks > 1 and keep_num_codebooks_dim is False:
            raise ValueError(
                f"FSQ: keep_num_codebooks_dim=False leaves no room for the indices of num_codebooks={num_codebooks}"
            )
        if not 0.0 <= noise_dropout <= 1.0 or (noise_dropout > 0 and not preserve_symmetry):
            raise ValueError(
                f"FSQ: noise_dropout={noise_dropout!r}; expected 0 to 1, and above 0 only with preserve_symmetry=True"
            )
        self.levels, self.scale = levels, scale
        self.codebook_dim, self.num_codebooks = len(levels), num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.codebook_size = math.prod(levels)
        self.keep_num_codebooks_dim = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        self.allowed_dtypes, self.force_quantization_f32 = allowed_dtypes, force_quantization_f32
        self.channel_first, self.return_indices = channel_first, return_indices
        self.preserve_symmetry, self.bound_hard_clamp = preserve_symmetry, bound_hard_clamp
        self.noise_dropout, self.orthogonal_rotation = noise_dropout, orthogonal_rotation
        self.usage_dim = -1 if num_codebooks > 1 else None

        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.effective_codebook_dim, self.dim, bias=projection_has_bias)
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        # remembers .double() or .bfloat16(), so that codes from indices are those of forward
        self.register_buffer("_like", torch.empty(0), persistent=False)
        if return_indices:
            if self.codebook_size > _MOST_CODES:
                raise ValueError(
                    f"FSQ: levels={levels} multiply to {self.codebook_size} codes, more than an int32 index holds "
                    f"({_MOST_CODES}); set return_indices=False, or use several codebooks"
                )
            basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], dtype=torch.int32)
            self.register_buffer("_basis", basis, persistent=False)
        if orthogonal_rotation:
            if len(set(levels)) > 1:
                warnings.warn(
                    f"FSQ: orthogonal_rotation mixes features of different numbers of levels, {levels}; "
                    "equal ones are recommended",
                    stacklevel=2,
                )
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(len(levels), len(levels))))

    def extra_repr(self) -> str:
        return f"levels={self.levels}, dim={self.dim}, num_codebooks={self.num_codebooks}"

    # values [..., d] -> codes [..., d]

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """z bounded and rounded to multiples of 1/(L // 2), in [-1, 1]; the gradient passes straight through the
        rounding. An even L has one value more on the negative side."""
        return self._bound(z, eps, hard_clamp)[0]

    def _bound(self, z: Tensor, eps: float, hard_clamp: bool) -> tuple[Tensor, Tensor]:
        """-> codes and digits, the levels counted from 0."""
        half = (self._levels - 1).to(z.dtype) * (1 + eps) / 2
        width = (self._levels // 2).to(z.dtype)
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        shift = offset / half
        bounded = (z + shift).clamp(-1.0, 1.0) if hard_clamp else (z + shift.atanh()).tanh()
        bounded = bounded * half - offset
        rounded = bounded.detach().round()
        if max(self.levels) * eps > 0.5:  # the range would take one level more
            rounded = rounded.clamp(-width, self._levels - 1 - width)
        return straight_through(bounded, rounded) / width, rounded + width

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """z bounded and rounded to L values evenly spread over [-1, 1]; straight-through gradient of the rounding."""
        return self._symmetric_bound(z, hard_clamp)[0]

    def _symmetric_bound(self, z: Tensor, hard_clamp: bool) -> tuple[Tensor, Tensor]:
        steps = (self._levels - 1).to(z.dtype)
        bounded = steps * ((z.clamp(-1.0, 1.0) if hard_clamp else z.tanh()) + 1) / 2.0 + 0.5
        digits = bounded.detach().floor()
        return straight_through(bounded, digits) * (2.0 / steps) - 1.0, digits

    def quantize(self, z: Tensor) -> Tensor:
        """z ``[..., d]``, d = len(levels) -> its codes, same shape."""
        return self._codes_and_digits(z)[0]

    def _codes_and_digits(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = at_least_float32(z)
        if self.preserve_symmetry:
            return self._symmetric_bound(z, self.bound_hard_clamp)
        return self._bound(z, 1e-3, self.bound_hard_clamp)

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> codes and indices: in one kernel for the default bound."""
        if self.preserve_symmetry or self.bound_hard_clamp:
            codes, digits = self._codes_and_digits(z)
            return codes, mixed_radix(digits, self._basis, self.codebook_size) if self.return_indices else None
        if self.return_indices:
            return fsq(z, self.levels, return_indices=True)
        return torch.cat([fsq(part, levels) for part, levels in self._parts(z)], -1), None

    def _parts(self, z: Tensor):
        """Runs of features that have no more codes together than an index holds."""
        start, codes = 0, 1
        for j, count in enumerate(self.levels):
            if codes * count > _MOST_CODES:
                yield z[..., start:j], self.levels[start:j]
                start, codes = j, 1
            codes *= count
        yield z[..., start:], self.levels[start:]

    def maybe_apply_noise(self, codes: Tensor) -> Tensor:
        if not self.training or self.noise_dropout == 0.0:
            return codes
        # drawn in the order of the dimensions, whatever the strides of the input
        dense = torch.contiguous_format
        chosen = torch.empty_like(codes, memory_format=dense).bernoulli_(self.noise_dropout).bool()
        offset = torch.rand_like(codes, memory_format=dense) - 0.5
        return torch.where(chosen, codes + offset, codes).clamp(-1.0, 1.0)

    def _rotate(self, x: Tensor, back: bool) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            rotation = self.orthogonal_rot.to(x.dtype)
            return x @ (rotation.T if back else rotation)

    # codes <-> indices

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Codes ``[..., d]`` -> int32 ``[...]``, first feature fastest; -1 where a value is NaN."""
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(f"FSQ.codes_to_indices: zhat is {tuple(zhat.shape)}; expected [..., {self.codebook_dim}]")
        zhat = at_least_float32(zhat)
        if self.preserve_symmetry:
            digits = (zhat + 1.0) / (2.0 / (self._levels - 1).to(zhat.dtype))
        else:
            width = self._levels // 2
            digits = zhat * width + width
        return mixed_radix(digits.round(), self._basis, self.codebook_size)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Indices ``[...]`` -> the level of every feature ``[..., d]``."""
        return indices.unsqueeze(-1) // self._basis % self._levels

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes ``[K, d]``, computed when asked for."""
        if not self.return_indices:
            raise AttributeError("FSQ.implicit_codebook: the layer was built with return_indices=False")
        indices = torch.arange(self.codebook_size, device=self._levels.device)
        return self._indices_to_codes(indices).to(self._like.dtype)

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices ``[...]`` -> codes ``[..., d]`` as they are quantized, in at least float32 and unrotated; zeros for a
        negative index."""
        digits = self.indices_to_level_indices(indices.clamp(min=0))
        digits = digits.to(torch.promote_types(self._like.dtype, torch.float32))
        if self.preserve_symmetry:
            codes = digits * (2.0 / (self._levels - 1).to(digits.dtype)) - 1.0
        else:
            width = self._levels // 2
            codes = (digits - width) / width
        return codes.masked_fill((indices < 0).unsqueeze(-1), 0.0)

    def _decode(self, indices: Tensor) -> Tensor:
        """As :meth:`_indices_to_codes`, rotated back: what ``forward`` rounds to the dtype of its input."""
        codes = self._indices_to_codes(indices)
        return self._rotate(codes, back=True) if self.orthogonal_rotation else codes

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices as ``forward`` returns them -> what it returned beside them, in the layout of the input."""
        if not self.return_indices:
            raise ValueError("FSQ.indices_to_codes: the layer was built with return_indices=False")
        codes = self._decode(indices).to(self._like.dtype)
        codes = self.project_out(codes.flatten(-2) if self.keep_num_codebooks_dim else codes)
        is_map = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        return codes.movedim(-1, 1) if is_map or self.channel_first else codes

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantizes z ``[..., dim]``, or ``[B, dim, ...]`` with ``channel_first`` or more than 3 dimensions.

        Returns:
            ``(quantized, indices)``: quantized as z, indices int32 ``[...]`` (``[..., num_codebooks]``) or None. A NaN
            value stays NaN and its index is -1.

        Raises:
            ValueError: a shape that does not fit.
        """
        channel_first = self.channel_first or z.dim() >= 4
        features = project(self.project_in, features_last("FSQ", z, self.dim, channel_first))
        groups = features.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            groups = self._rotate(groups, back=False)
        codes, indices = self._quantize(groups)
        codes = self.maybe_apply_noise(codes)
        if self.orthogonal_rotation:
            codes = self._rotate(codes, back=True)
        output = project(self.project_out, codes.flatten(-2).to(features.dtype))
        self._remember(indices)
        if indices is not None and not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        return output.movedim(-1, 1) if channel_first else output, indices
