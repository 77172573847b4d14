"""A codebook that follows the mean and the variance of its input."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .codebook import Codebook, check_step

_BATCH = ("batch_mean", "batch_variance")


class AffineCodebook(Codebook):
    """Codewords (c - m_c) s_b / s_c + m_b, with running means m and deviations s of the codebook and of the input.

    When the input drifts, all codewords go along, also those that no vector has chosen for long. EMA works on the
    codewords before the map, with the input mapped back. Source: Huh et al. 2023, "Straightening Out the
    Straight-Through Estimator" (arXiv 2305.08842).

    Statistics of the input are followed in evaluation, too, as in vector-quantize-pytorch; an exported graph keeps them
    as they are. ``batch_mean`` and ``batch_variance`` enter the ``state_dict`` with the first batch.
    """

    def __init__(self, affine: tuple[bool, float, float], *args, **options):
        """``affine``: sync_affine_param, affine_param_batch_decay, affine_param_codebook_decay."""
        super().__init__(*args, **options)
        self.sync_affine_param, self.affine_param_batch_decay, self.affine_param_codebook_decay = affine
        shape = self.num_codebooks, 1, self.dim
        for name in _BATCH:
            self.register_buffer(name, torch.zeros(shape), persistent=False)
        self.register_buffer("batch_needs_init", torch.tensor(True), persistent=False)
        for name in ("codebook_mean", "codebook_variance"):
            self.register_buffer(f"{name}_needs_init", torch.tensor(True))
            self.register_buffer(name, torch.zeros(shape))

    # statistics

    @torch.no_grad()
    def observe(self, z: Tensor, mask: Tensor | None) -> None:
        if torch.compiler.is_exporting():
            return
        check_step(z, self.batch_mean)
        if self.training:
            mean, variance = _moments(self.embed)
            for name, value in (("codebook_mean", mean), ("codebook_variance", variance)):
                fresh = getattr(self, f"{name}_needs_init")
                _follow(getattr(self, name), value, self.affine_param_codebook_decay, fresh)
                fresh.fill_(False)
        usable = z.isfinite().all(-1) if mask is None else z.isfinite().all(-1) & mask
        if self.sync_affine_param and self._joins():
            z, usable = self._join(z, usable.long())
        mean, variance, count = self._batch_moments(z, usable.unsqueeze(-1) > 0)
        found = (count > 0).all()
        for name, value in zip(_BATCH, (mean, variance), strict=True):
            old = getattr(self, name)
            _follow(old, torch.where(found, value, old), self.affine_param_batch_decay, self.batch_needs_init)
        self.batch_needs_init.logical_and_(~found)

    def _batch_moments(self, z: Tensor, usable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def total(t: Tensor) -> Tensor:
            t = t.sum(1, keepdim=True)
            if self.sync_affine_param and self._world() > 1 and not self._joins():
                dist.all_reduce(t)
            return t

        count = total(usable.to(z.dtype))
        mean = total(torch.where(usable, z, 0.0)) / count.clamp(min=1)
        return mean, total(torch.where(usable, z - mean, 0.0).square()) / count.clamp(min=1), count

    def _map(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the codebook, scale, mean of the input. Before the first batch this is the identity."""
        mean, variance = _moments(self.embed)
        mean = torch.where(self.codebook_mean_needs_init, mean, self.codebook_mean)
        variance = torch.where(self.codebook_variance_needs_init, variance, self.codebook_variance)
        batch_mean = torch.where(self.batch_needs_init, mean, self.batch_mean)
        batch_variance = torch.where(self.batch_needs_init, variance, self.batch_variance)
        scale = batch_variance.clamp(min=1e-5).sqrt() / variance.clamp(min=1e-5).sqrt()
        return mean.to(dtype), scale.to(dtype), batch_mean.to(dtype)

    # the codebook as others see it

    def codewords(self, dtype: torch.dtype, snapshot: bool) -> Tensor:
        mean, scale, batch_mean = self._map(dtype)
        return (super().codewords(dtype, snapshot) - mean) * scale + batch_mean

    def update(self, z: Tensor, indices: Tensor, **options) -> None:
        super().update(self._back(z), indices, **options)

    def expire_(self, z: Tensor, indices: Tensor) -> None:
        super().expire_(self._back(z), indices)

    def _back(self, z: Tensor) -> Tensor:
        mean, scale, batch_mean = self._map(z.dtype)
        return (z - batch_mean) / scale + mean

    # checkpoints

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not bool(self.batch_needs_init):
            destination.update({prefix + name: getattr(self, name) for name in _BATCH})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        found = [prefix + name in state_dict for name in _BATCH]
        for name in _BATCH:
            if all(found):
                getattr(self, name).copy_(state_dict[prefix + name])
                unexpected[:] = [key for key in unexpected if key != prefix + name]
        self.batch_needs_init.fill_(not all(found))


@torch.no_grad()
def _moments(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``[H, K, D]`` over K, without gradient."""
    return t.mean(1, keepdim=True), t.var(1, correction=0, keepdim=True)


def _follow(running: Tensor, new: Tensor, decay: float, fresh: Tensor) -> None:
    running.copy_(torch.where(fresh, new, running * decay + new * (1.0 - decay)))
