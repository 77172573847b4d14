"""``LatentQuantize``: every feature takes the nearest of a few values of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..ops import nearest_codeword
from .tokens import at_least_float32, features_last, project, straight_through
from .usage import RemembersIndices


class MissingCodebookDim(ValueError, RuntimeError):
    """A ValueError like the others; a RuntimeError too, because code written for vector-quantize-pytorch expects it."""


class LatentQuantize(RemembersIndices, nn.Module):
    """Replaces every feature by the nearest of its own values, which start evenly spread over [-0.5, 0.5].

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.LatentQuantize``;
    docs/migrating.md lists what differs on purpose. As there, the losses train what lies around the layer; the values
    themselves move only by ``in_place_codebook_optimizer``.

    Args:
        levels: number of values per feature, or one number for ``codebook_dim`` features.
        dim: features of the input ``[B, dim, ...]``; another value than ``codebook_dim * num_codebooks`` adds
            ``project_in`` and ``project_out``.
        commitment_loss_weight: weight of the mean square that draws the output to the input; None: 0.
        quantization_loss_weight: weight of the mean square that draws the input to the output; None: 0.
        num_codebooks: groups of features, each with an index of its own and the same values.
        codebook_dim: features of a group where ``levels`` is a number.
        keep_num_codebooks_dim: indices ``[..., num_codebooks]`` also for one codebook.
        optimize_values: the values are parameters; otherwise they are fixed.
        in_place_codebook_optimizer: makes an optimizer of the values, ``parameters -> Optimizer``; every training
            forward then takes a step on the mean square between features and values, and quantizes after it.

    Raises:
        ValueError: options that do not fit together.

    Source: Hsu et al. 2023 (arXiv 2305.18378).
    """

    def __init__(
        self,
        levels: Sequence[int] | int,
        dim: int,
        commitment_loss_weight: float | None = 0.1,
        quantization_loss_weight: float | None = 0.1,
        num_codebooks: int = 1,
        codebook_dim: int = -1,
        keep_num_codebooks_dim: bool | None = None,
        optimize_values: bool | None = True,
        in_place_codebook_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ):
        super().__init__()
        if isinstance(levels, int):
            if codebook_dim < 1:
                raise MissingCodebookDim(
                    f"LatentQuantize: levels={levels} is one number; say for how many features by codebook_dim, "
                    f"got {codebook_dim}"
                )
            levels = [levels] * codebook_dim
        levels = [int(v) for v in levels]
        if not levels or min(levels) < 2 or math.prod(levels) >= 2**31:
            raise ValueError(
                f"LatentQuantize: levels={levels}; expected integers >= 2 that multiply to less than 2^31 codes"
            )
        if codebook_dim > 0 and codebook_dim != len(levels):
            raise ValueError(
                f"LatentQuantize: codebook_dim={codebook_dim}, but levels={levels}; leave codebook_dim out"
            )
        if in_place_codebook_optimizer is not None and not optimize_values:
            raise ValueError("LatentQuantize: in_place_codebook_optimizer needs optimize_values=True")
        self.levels, self.dim = levels, dim
        self.commitment_loss_weight = commitment_loss_weight or 0.0
        self.quantization_loss_weight = quantization_loss_weight or 0.0
        self.codebook_dim, self.num_codebooks = len(levels), num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.codebook_size = math.prod(levels)
        self.keep_num_codebooks_dim = bool(keep_num_codebooks_dim) or num_codebooks > 1
        self.optimize_values = bool(optimize_values)
        self.usage_dim = -1 if num_codebooks > 1 else None

        self.has_projections = dim != self.effective_codebook_dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, self.effective_codebook_dim)
            self.project_out = nn.Linear(self.effective_codebook_dim, dim)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int32), persistent=False)
        values = [_even_values(count) for count in levels]
        self.values_per_latent = nn.ParameterList(values) if optimize_values else _FixedValues(values)
        self.in_place_codebook_optimizer = (
            None if in_place_codebook_optimizer is None else in_place_codebook_optimizer(self.values_per_latent)
        )

    def extra_repr(self) -> str:
        return f"levels={self.levels}, dim={self.dim}, num_codebooks={self.num_codebooks}"

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes ``[K, codebook_dim]``."""
        return self._codes(torch.arange(self.codebook_size, device=self._levels.device))

    # features [..., d] <-> levels [..., d] <-> indices [...]

    def _table(self) -> Tensor:
        """The values ``[d, most levels]``; the missing ones are infinite and never chosen."""
        return pad_sequence([v.detach() for v in self.values_per_latent], True, float("inf"))

    def _nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """-> levels int64 ``[..., d]``, -1 where z is not finite, and their values, there NaN."""
        table = self._table().to(z.dtype)
        flat = z.detach().reshape(-1, self.codebook_dim).T
        level, _ = nearest_codeword(flat.unsqueeze(-1), table.unsqueeze(-1))  # one head per feature
        value = table.gather(1, level.clamp(min=0)).masked_fill(level < 0, torch.nan)
        return level.T.reshape(z.shape), value.T.contiguous().view(z.shape)

    def quantize(self, z: Tensor) -> Tensor:
        """z ``[..., codebook_dim]`` -> the nearest values, with a straight-through gradient."""
        return straight_through(z, self._nearest(at_least_float32(z))[1].to(z.dtype))

    def _index(self, level: Tensor) -> Tensor:
        index = (level.to(torch.int32) * self._basis).sum(-1, dtype=torch.int32)
        return index.masked_fill((level < 0).any(-1), -1)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Codes ``[..., codebook_dim]`` -> int32 ``[...]``, first feature fastest; -1 where a value is not finite."""
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(
                f"LatentQuantize.codes_to_indices: zhat is {tuple(zhat.shape)}; expected [..., {self.codebook_dim}]"
            )
        return self._index(self._nearest(at_least_float32(zhat))[0])

    def _codes(self, indices: Tensor) -> Tensor:
        """Indices ``[...]`` -> codes ``[..., codebook_dim]``; zeros for a negative index."""
        level = indices.clamp(min=0).unsqueeze(-1) // self._basis % self._levels
        feature = torch.arange(self.codebook_dim, device=level.device)
        return self._table()[feature, level.long()].masked_fill((indices < 0).unsqueeze(-1), 0.0)

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Indices as ``forward`` returns them -> what it returned beside them, before ``project_out`` if False."""
        codes = self._codes(indices)
        codes = codes.flatten(-2) if self.keep_num_codebooks_dim else codes
        return (self.project_out(codes) if project_out else codes).movedim(-1, 1)

    # forward

    def quantization_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        return nn.functional.mse_loss(zhat.detach(), z, reduction=reduce)

    def commitment_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        return nn.functional.mse_loss(z.detach(), zhat, reduction=reduce)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes z ``[B, dim, ...]``.

        Returns:
            ``(quantized, indices, loss)``: indices int32 ``[B, ...]`` (``[B, ..., num_codebooks]``), -1 for tokens with
            a value that is not finite, which take no part in the loss; the loss is 0 in evaluation.

        Raises:
            ValueError: a shape that does not fit.
        """
        tokens = features_last("LatentQuantize", z, self.dim, True)
        features = project(self.project_in, tokens)
        groups = at_least_float32(features.unflatten(-1, (self.num_codebooks, self.codebook_dim)))
        level, value = self._nearest(groups)
        if self.in_place_codebook_optimizer is not None and self.training:
            self._step(groups.detach(), level)
            level, value = self._nearest(groups)
        codes = straight_through(groups, value)
        output = project(self.project_out, codes.flatten(-2).to(features.dtype))
        index = self._index(level)
        self._remember(index)
        loss = self._loss(tokens, output, (index >= 0).all(-1))
        return output.movedim(-1, 1), index if self.keep_num_codebooks_dim else index.squeeze(-1), loss

    def _loss(self, tokens: Tensor, output: Tensor, usable: Tensor) -> Tensor:
        tokens, output = at_least_float32(tokens), at_least_float32(output)
        loss = tokens.new_zeros(())
        if not self.training:
            return loss
        count = (usable.sum() * self.dim).clamp(min=1)
        tokens, output = (torch.where(usable.unsqueeze(-1), t, 0.0) for t in (tokens, output))
        if self.commitment_loss_weight:
            loss = loss + self.commitment_loss_weight * self.commitment_loss(tokens, output, "sum") / count
        if self.quantization_loss_weight:
            loss = loss + self.quantization_loss_weight * self.quantization_loss(tokens, output, "sum") / count
        return loss

    def _step(self, z: Tensor, level: Tensor) -> None:
        """One step of the values' own optimizer."""
        parameters = list(self.values_per_latent)
        with torch.enable_grad():
            pairs = zip(parameters, level.clamp(min=0).unbind(-1), strict=True)
            chosen = torch.stack([values[index] for values, index in pairs], -1).to(z.dtype)
            usable = level >= 0
            squares = torch.where(usable, z - chosen, 0.0).square().sum()
            loss = squares / usable.sum().clamp(min=1)
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = grad
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()


class _FixedValues(nn.Module):
    """A list of tensors that moves with the layer and is no part of its checkpoint."""

    def __init__(self, values: list[Tensor]):
        super().__init__()
        for i, value in enumerate(values):
            self.register_buffer(str(i), value, persistent=False)

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, i: int) -> Tensor:
        return self._buffers[str(range(len(self))[i])]

    def __iter__(self):
        return iter(self._buffers.values())


def _even_values(count: int) -> Tensor:
    """Zero is among them and -0.5 is the first."""
    return torch.linspace(-0.5, 0.5, count) if count % 2 else torch.arange(count) / count - 0.5
