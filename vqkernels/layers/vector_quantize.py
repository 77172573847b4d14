"""``VectorQuantize``: the layer of vector-quantize-pytorch on this project's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import CodebookUsage, codebook_usage, rotation_trick, vector_quantize
from .codebook import Codebook, normalize
from .search import nearest_k, similarities
from .tokens import Layout, lookup, reject_unsupported

# constructor options of vector-quantize-pytorch that this version does not have, with their defaults
UNSUPPORTED = {
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "sync_affine_param": False,
    "vq_bridge": None,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
    "route_gradients_to_input": True,
}


class LossBreakdown(NamedTuple):
    """The unweighted parts of the loss; the last three belong to options that this version does not have and are 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Quantizes vectors to the nearest of K codewords, and trains the codewords by EMA or by gradient.

    Constructor names, order and defaults, the arguments and results of ``forward`` and the keys of ``state_dict`` are
    those of ``vector_quantize_pytorch.VectorQuantize``; docs/migrating.md lists what differs on purpose. An option that
    this version does not have raises ValueError when set.

    Args:
        dim: features of the input.
        codebook_size: codewords K.
        codebook_dim: features of a codeword; where ``codebook_dim * heads`` is not ``dim``, the linear layers
            ``project_in`` and ``project_out`` are added.
        heads, separate_codebook_per_head: split the features into heads, quantized apart with one or several codebooks.
        decay, eps: of the exponential moving average that trains the codewords.
        freeze_codebook: no EMA step (also an argument of ``forward``).
        kmeans_init, kmeans_iters: seed the codewords by k-means on the first batch (k-means++ start up to 1024
            codewords, random rows above).
        use_cosine_sim: unit vectors, largest dot product.
        threshold_ema_dead_code: running count under which a codeword moves onto a random row of the batch; 0: never.
        channel_last, accept_image_fmap, accept_3d_fmap: layout of the input.
        commitment_weight: weight of the commitment loss.
        learnable_codebook: codewords are a parameter trained by the loss; EMA is then off.
        rotation_trick: rotation trick (default for dim > 1) or straight-through gradient.
        sync_codebook, sync_kmeans: None or True: processes of the default group share statistics; False: they do not.
        manual_ema_update: ``_codebook.update_ema()`` is left to the caller.
        return_zeros_for_masked_padding: masked tokens come back as 0 (default) or as they came.
        estimator: "rotation", "reflection" or "ste"; None follows ``rotation_trick``. Not in vector-quantize-pytorch.

    Raises:
        ValueError: an option not supported yet, options that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss=False,
        orthogonal_reg_weight=0.0,
        orthogonal_reg_active_codes_only=False,
        orthogonal_reg_max_codes=None,
        codebook_diversity_loss_weight=0.0,
        codebook_diversity_temperature=100.0,
        stochastic_sample_codes=False,
        sample_codebook_temp=1.0,
        straight_through=False,
        rotation_trick: bool | None = None,
        directional_reparam=False,
        directional_reparam_variance=5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param=False,
        ema_update: bool | None = None,
        vq_bridge=None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer=None,
        manual_in_place_optimizer_update=False,
        affine_param=False,
        affine_param_batch_decay=0.99,
        affine_param_codebook_decay=0.9,
        sync_update_v=0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input=True,
        *,
        estimator: str | None = None,
    ):
        given = dict(locals())
        super().__init__()
        reject_unsupported("VectorQuantize", given, UNSUPPORTED)
        learnable = bool(learnable_codebook)
        ema_update = not learnable if ema_update is None else ema_update
        if learnable and ema_update:
            raise ValueError(
                "VectorQuantize: learnable_codebook=True and ema_update=True train one codebook twice; choose one"
            )
        if learnable and use_cosine_sim:
            raise ValueError(
                "VectorQuantize: learnable_codebook=True is not supported with use_cosine_sim=True; use EMA"
            )
        if threshold_ema_dead_code < 0 or not 0.0 <= decay <= 1.0:
            raise ValueError(
                f"VectorQuantize: decay={decay!r}, threshold_ema_dead_code={threshold_ema_dead_code!r}; "
                "expected decay in [0, 1] and a threshold >= 0"
            )
        self.estimator = _estimator(estimator, rotation_trick, dim)
        self.rotation_trick = self.estimator == "rotation"

        self.dim, self.heads, self.codebook_size = dim, heads, codebook_size
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.separate_codebook_per_head = separate_codebook_per_head
        self.layout = Layout.of("VectorQuantize", dim, channel_last, accept_image_fmap, accept_3d_fmap)
        self.channel_last, self.accept_image_fmap, self.accept_3d_fmap = channel_last, accept_image_fmap, accept_3d_fmap
        self.use_cosine_sim, self.learnable_codebook = use_cosine_sim, learnable
        self.commitment_weight, self.freeze_codebook = commitment_weight, freeze_codebook
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        inner = self.codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)
        self._codebook = Codebook(
            self.codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            learnable_codebook=learnable,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
            sync_codebook=sync_codebook,
            sync_kmeans=sync_kmeans,
        )
        self._last_indices: Tensor | None = None

    def __getstate__(self):
        return self.__dict__ | {"_last_indices": None}

    # codebook

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """``[K, D]``, or ``[heads, K, D]`` with a codebook per head."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed.squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes.unsqueeze(0))

    @property
    def usage(self) -> CodebookUsage:
        """Counts, used fraction, entropy, perplexity and dead codewords of the last forward; one row per codebook with
        ``separate_codebook_per_head``. Computed when asked for; ``forward`` only keeps its indices.

        Raises:
            RuntimeError: there was no forward yet.
        """
        if self._last_indices is None:
            raise RuntimeError(
                "VectorQuantize.usage describes the last forward, and there was none yet; call the layer first"
            )
        if self.separate_codebook_per_head:
            return codebook_usage(self._last_indices, self.codebook_size, dim=0)
        return codebook_usage(self._last_indices, self.codebook_size)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices as ``forward`` returns them -> codewords in the layout of the input; index -1 gives zeros."""
        return self.layout.from_tokens(self._codes(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The same through ``project_out``: what ``forward`` returned; tokens with index -1 are 0."""
        empty = indices < 0 if self.heads == 1 else (indices < 0).all(-1)
        output = self.project_out(self._codes(indices)).masked_fill(empty.unsqueeze(-1), 0.0)
        return self.layout.from_tokens(output)

    def _codes(self, indices: Tensor) -> Tensor:
        embed = self._codebook.embed
        if self.heads == 1:
            return lookup(embed[0], indices)
        if self.separate_codebook_per_head:
            return torch.cat([lookup(book, index) for book, index in zip(embed, indices.unbind(-1), strict=True)], -1)
        return lookup(embed[0], indices).flatten(-2)

    # tokens [..., heads D] <-> vectors per codebook [H, N, D]

    def _split(self, tokens: Tensor) -> Tensor:
        """Per-codebook vectors, float32 or float64, on the unit sphere for the cosine codebook."""
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        z = self._per_codebook(tokens.unflatten(-1, (self.heads, self.codebook_dim)))
        if not self.use_cosine_sim:
            return z
        finite = z.isfinite().all(-1, keepdim=True)  # kept away from the norm, whose gradient would turn 0 into NaN
        return torch.where(finite, normalize(torch.where(finite, z, 0.0)), torch.nan)

    def _per_codebook(self, t: Tensor, features: int = 1) -> Tensor:
        """``[..., heads, *]`` -> ``[H, N, *]``; heads that share the codebook are more vectors of the same one."""
        t = t.flatten(0, t.dim() - 2 - features)
        return t.transpose(0, 1).contiguous() if self.separate_codebook_per_head else t.flatten(0, 1).unsqueeze(0)

    def _per_token(self, t: Tensor, lead: torch.Size) -> Tensor:
        """``[H, N, *]`` -> ``[..., heads, *]``."""
        if self.separate_codebook_per_head:
            t = t.transpose(0, 1)
        return t.reshape(*lead, self.heads, *t.shape[2:])

    def _split_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        return self._per_codebook(mask.unsqueeze(-1).expand(*mask.shape, self.heads), features=0)

    # forward

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ):
        """Quantizes x ``[..., dim]`` (or channels first, as constructed), then makes the EMA step.

        Args:
            indices: target codes; the result is then ``(quantized, cross entropy of the similarities against them)``.
            mask, lens: bool ``[...]`` without features, or tokens per sample; the other tokens take no part.
            topk: the k nearest codewords instead of one, nearest first, without an EMA step.
            freeze_codebook: overrides the constructor's.
            ema_update_weight: scales the EMA step per codeword, ``[K]`` or ``[H, K]``, or a function of (sums, counts).
            accum_ema_update: only add this batch to the next EMA step.
            ema_update: overrides the constructor's.

        Returns:
            ``(quantized, indices, loss)``, with ``return_loss_breakdown`` also :class:`LossBreakdown`. Indices are
            int64 ``[...]`` (``[..., heads]``, ``[..., k]``), -1 for masked and non-finite tokens. The loss is a scalar,
            0 in eval; with topk it is ``[..., k]``.

        Raises:
            ValueError: shapes that do not fit, arguments that exclude each other or are not supported yet.
        """
        given = {"sample_codebook_temp": sample_codebook_temp, "codebook_transform_fn": codebook_transform_fn}
        reject_unsupported("VectorQuantize.forward", given, dict.fromkeys(given))
        tokens = self.layout.to_tokens(x)
        mask = self.layout.mask(tokens.shape[:-1], mask, lens)
        z, z_mask = self._split(self.project_in(tokens)), self._split_mask(mask)
        self._codebook.init_(z, z_mask)
        if topk is not None:
            if self.heads > 1 or indices is not None:
                raise ValueError("VectorQuantize.forward: topk needs heads=1 and no indices")
            return self._forward_topk(
                tokens, z, z_mask, mask, min(int(topk), self.codebook_size), return_loss_breakdown
            )

        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        updating = self.training and not frozen
        embed = self._codebook.codewords(z.dtype, snapshot=updating)
        quantized, index, commitment, loss = self._quantize(z, embed, z_mask, frozen)
        if updating:
            self._codebook.update(
                z.detach(), index, weight=ema_update_weight, accumulate=accum_ema_update, ema_update=ema_update
            )
        if not torch.compiler.is_exporting():
            self._last_indices = index
        lead = tokens.shape[:-1]
        quantized = self._output(self._per_token(quantized, lead).flatten(-2), tokens, mask)
        if indices is not None:
            return quantized, self._cross_entropy(z, embed, indices, lead)
        index = self._per_token(index, lead)
        result = quantized, index.squeeze(-1) if self.heads == 1 else index, loss
        return (*result, self._breakdown(commitment)) if return_loss_breakdown else result

    def _quantize(self, z: Tensor, embed: Tensor, mask: Tensor | None, frozen: bool):
        """-> quantized ``[H, N, D]``, indices ``[H, N]``, unweighted commitment, loss. Eval gives z no gradient."""
        metric = "dot" if self.use_cosine_sim else "l2"
        by_loss = self.trains_by_loss(frozen)
        book = embed if by_loss else embed.detach()  # a frozen parameter gets no gradient at all, not a zero one
        out = vector_quantize(z if self.training else z.detach(), book, self.estimator, 1.0, metric, mask)
        quantized, index = out.quantized, out.indices
        if self.learnable_codebook and not (self.training and z.requires_grad):
            # with no input to route the gradient to, it goes to the codewords, as from any embedding
            chosen = torch.stack([lookup(book, i) for book, i in zip(embed, index, strict=True)])
            quantized = torch.where((index < 0).unsqueeze(-1), quantized.detach(), chosen)
        if not self.training:
            zero = out.commitment_loss.new_zeros(())
            return quantized, index, zero, zero.clone()
        commitment = out.commitment_loss
        if by_loss:
            # one mean square, with its gradient to both sides
            commitment = commitment + (out.codebook_loss - out.codebook_loss.detach())
        if self.commitment_weight <= 0.0:
            commitment = torch.zeros_like(commitment)
        return quantized, index, commitment, _trainable(commitment * self.commitment_weight)

    def trains_by_loss(self, frozen: bool) -> bool:
        return self.learnable_codebook and self.training and not frozen and self.commitment_weight > 0.0

    def _output(self, quantized: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``[..., heads D]`` -> the result: input dtype, projected, padding filled, in the input's layout."""
        quantized = self.project_out(quantized.to(tokens.dtype))
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            if quantized.dim() > tokens.dim():  # topk
                padding, mask = padding.unsqueeze(-2), mask.unsqueeze(-1)
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding.to(quantized.dtype))
        return self.layout.from_tokens(quantized)

    def _forward_topk(
        self, tokens: Tensor, z: Tensor, z_mask: Tensor | None, mask: Tensor | None, k: int, breakdown: bool
    ):
        if k < 1:
            raise ValueError(f"VectorQuantize.forward: topk={k}; a positive integer is expected")
        lead = tokens.shape[:-1]
        embed = self._codebook.codewords(z.dtype, snapshot=False)[0]
        index = nearest_k(z[0], embed, k, "dot" if self.use_cosine_sim else "l2", None if z_mask is None else z_mask[0])
        codes = lookup(embed, index)
        repeated = z[0].unsqueeze(-2).expand_as(codes)
        target = codes if self.training and self.learnable_codebook else codes.detach()
        commitment = (target - repeated).square().mean(-1).masked_fill(index < 0, 0.0).reshape(*lead, k)
        if self.training and z.requires_grad:
            codes = rotation_trick(repeated, codes, self.estimator)
        codes = torch.where((z[0].isfinite().all(-1))[:, None, None], codes, torch.nan)
        quantized = self._output(codes.reshape(*lead, k, self.codebook_dim), tokens, mask)
        loss = commitment * self.commitment_weight if self.commitment_weight > 0.0 else torch.zeros_like(commitment)
        result = quantized, index.reshape(*lead, k), loss
        return (*result, self._breakdown(commitment)) if breakdown else result

    def _cross_entropy(self, z: Tensor, embed: Tensor, targets: Tensor, lead: torch.Size) -> Tensor:
        """Cross entropy of the similarities as logits; needs the N x K matrix. Targets -1 do not count."""
        expected = (*lead, self.heads) if self.heads > 1 else tuple(lead)
        if tuple(targets.shape) != expected:
            raise ValueError(f"VectorQuantize.forward: indices is {tuple(targets.shape)}; expected {expected}")
        logits = similarities(z, embed, "dot" if self.use_cosine_sim else "l2")
        return F.cross_entropy(self._per_token(logits, lead).flatten(0, -2), targets.flatten(), ignore_index=-1)

    def _breakdown(self, commitment: Tensor) -> LossBreakdown:
        zero = commitment.new_zeros(())
        return LossBreakdown(commitment, zero, zero, zero)

    # codebook training by hand

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """The EMA step of ``forward`` for inputs whose indices are already there (after ``topk`` or a beam search)."""
        tokens = self.layout.to_tokens(x)
        mask = self.layout.mask(tokens.shape[:-1], mask, None)
        if mask is not None:
            indices = indices.masked_fill(~(mask if self.heads == 1 else mask.unsqueeze(-1)), -1)
        per_head = indices.unsqueeze(-1) if self.heads == 1 else indices
        self._codebook.update(self._split(self.project_in(tokens)), self._per_codebook(per_head, features=0))

    update_ema_indices = update_indices

    @torch.no_grad()
    def expire_codes_(self, x: Tensor) -> None:
        """Moves dead codewords onto random rows of x, an input as for ``forward``."""
        z = self._split(self.project_in(self.layout.to_tokens(x)))
        self._codebook.expire_(z, torch.where(z.isfinite().all(-1), 0, -1))


def _estimator(estimator: str | None, rotation_trick: bool | None, dim: int) -> str:
    if estimator is None:
        # a rotation of one feature is at most a change of sign
        return "rotation" if (dim > 1 if rotation_trick is None else rotation_trick) else "ste"
    if estimator not in ("rotation", "reflection", "ste"):
        raise ValueError(
            f"VectorQuantize: estimator={estimator!r} is unknown; allowed: 'rotation', 'reflection', 'ste'"
        )
    if rotation_trick is not None and rotation_trick != (estimator == "rotation"):
        raise ValueError(
            f"VectorQuantize: estimator={estimator!r} and rotation_trick={rotation_trick} disagree; give one of them"
        )
    return estimator


def _trainable(loss: Tensor) -> Tensor:
    """A loss that ``backward`` accepts even when no input needs a gradient."""
    return loss if loss.requires_grad or not torch.is_grad_enabled() else loss.requires_grad_()
