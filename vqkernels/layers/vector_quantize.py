"""``VectorQuantize``: the layer of vector-quantize-pytorch on this project's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .affine import AffineCodebook
from .choice import Chooser, Chosen
from .codebook import Codebook, normalize
from .losses import LossBreakdown, cross_entropy, diversity_loss, orthogonal_loss, trainable, used_codes
from .options import check_options, estimator_name
from .search import similarities
from .tokens import Heads, Layout, lookup, project
from .usage import RemembersIndices


class VectorQuantize(RemembersIndices, nn.Module):
    """Quantizes vectors to the nearest of K codewords, and trains the codewords by EMA or by gradient.

    Constructor names, order and defaults, the arguments and results of ``forward`` and the keys of ``state_dict`` are
    those of ``vector_quantize_pytorch.VectorQuantize``; docs/migrating.md lists what differs on purpose.

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
        commitment_weight, commitment_use_cross_entropy_loss: weight of the commitment loss; the second makes it the
            cross entropy of the similarities against the chosen codes.
        orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: weight of the mean squared
            cosine between codewords; of those the batch chose, of a random choice of them.
        codebook_diversity_loss_weight, codebook_diversity_temperature: weight of minus the entropy of the codes.
        stochastic_sample_codes, sample_codebook_temp: in training draw the code with probabilities
            softmax(similarity / temperature).
        straight_through: the gradient of softmax(similarity / temperature) in place of the choice. As in
            vector-quantize-pytorch the identity replaces it wherever gradients are routed to the input;
            ``estimator="gumbel"`` does what the name promises.
        rotation_trick: rotation trick (default for dim > 1) or straight-through gradient.
        directional_reparam, directional_reparam_variance: DiVeQ: in training the output lies beside the codeword, and
            its gradient trains the codewords, with no commitment loss.
        sync_codebook, sync_kmeans: None or True: processes of the default group share statistics; False: they do not.
        ema_update, manual_ema_update: train by EMA; ``_codebook.update_ema()`` is left to the caller.
        vq_bridge: module that maps the codewords ``[H, K, D]`` before every use (FVQ).
        learnable_codebook: codewords are a parameter trained by the loss; EMA is then off.
        in_place_codebook_optimizer, manual_in_place_optimizer_update: a function of parameters that gives an optimizer,
            which makes one step on the codewords inside every training forward, or waits for
            ``update_in_place_optimizer()``.
        affine_param, affine_param_batch_decay, affine_param_codebook_decay, sync_affine_param: codewords follow the
            mean and variance of the input; see :class:`AffineCodebook`.
        sync_update_v: v of the synchronous update rule (arXiv 2305.08842): the output passes on 1 + v of its gradient.
        return_zeros_for_masked_padding: masked tokens come back as 0 (default) or as they came.
        route_gradients_to_input: False: the output passes no gradient to the input.
        estimator: "rotation", "reflection", "ste" or "gumbel"; None follows the options above. "gumbel" is the
            straight-through Gumbel-softmax with temperature t = ``sample_codebook_temp``: with similarities s and noise
            g the code is argmax(s + g), the output its codeword, the gradient that of sum_k softmax((s + g) / t)_k c_k;
            in evaluation the nearest codeword. Not in vector-quantize-pytorch.

    Raises:
        ValueError: options that exclude each other.
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
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        *,
        estimator: str | None = None,
    ):
        super().__init__()
        bridged = vq_bridge is not None
        learnable = directional_reparam or bridged if learnable_codebook is None else learnable_codebook
        ema_update = not (learnable or directional_reparam or bridged) if ema_update is None else ema_update
        check_options(
            learnable=learnable,
            ema_update=ema_update,
            bridged=bridged,
            decay=decay,
            threshold_ema_dead_code=threshold_ema_dead_code,
            directional_reparam=directional_reparam,
            straight_through=straight_through,
            sync_update_v=sync_update_v,
            affine_param=affine_param,
            use_cosine_sim=use_cosine_sim,
            has_parameter=learnable or orthogonal_reg_weight > 0.0,
            in_place=in_place_codebook_optimizer is not None,
        )
        self.estimator = estimator_name(estimator, rotation_trick, straight_through, directional_reparam, dim)
        self.rotation_trick = self.estimator == "rotation"
        self.choose = Chooser(
            "dot" if use_cosine_sim else "l2",
            self.estimator,
            stochastic_sample_codes,
            straight_through,
            directional_reparam_variance,
            route_gradients_to_input,
        )

        self.dim, self.heads, self.codebook_size = dim, heads, codebook_size
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.separate_codebook_per_head = separate_codebook_per_head
        self.usage_dim = 0 if separate_codebook_per_head else None
        self.layout = Layout.of("VectorQuantize", dim, channel_last, accept_image_fmap, accept_3d_fmap)
        self.split_heads = Heads(heads, self.codebook_dim, separate_codebook_per_head)
        self.channel_last, self.accept_image_fmap, self.accept_3d_fmap = channel_last, accept_image_fmap, accept_3d_fmap
        self.use_cosine_sim, self.learnable_codebook = use_cosine_sim, learnable
        self.commitment_weight, self.freeze_codebook = commitment_weight, freeze_codebook
        self.has_commitment_loss = commitment_weight > 0.0 and not directional_reparam
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.stochastic_sample_codes, self.sample_codebook_temp = stochastic_sample_codes, sample_codebook_temp
        self.straight_through = straight_through
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.sync_update_v, self.route_gradients_to_input = sync_update_v, route_gradients_to_input
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update

        inner = self.codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)
        affine = (sync_affine_param, affine_param_batch_decay, affine_param_codebook_decay)
        self._codebook = (partial(AffineCodebook, affine) if affine_param else Codebook)(
            self.codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            learnable_codebook=learnable or orthogonal_reg_weight > 0.0,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
            sync_codebook=sync_codebook,
            sync_kmeans=sync_kmeans,
            vq_bridge=vq_bridge,
        )
        self.in_place_codebook_optimizer = None
        if in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(self._codebook.parameters())
        # nothing but search, estimator and commitment loss: what ResidualVQ may do for all levels at once
        self.plain = not (
            any((commitment_use_cross_entropy_loss, stochastic_sample_codes, straight_through, directional_reparam))
            or any((bridged, affine_param, sync_update_v, self.estimator == "gumbel"))
            or max(orthogonal_reg_weight, codebook_diversity_loss_weight) > 0.0
            or self.in_place_codebook_optimizer is not None
        )

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

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices as ``forward`` returns them -> codewords in the layout of the input; index -1 gives zeros."""
        return self.layout.from_tokens(self._codes(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The same through ``project_out``: what ``forward`` returned; tokens with index -1 are 0."""
        empty = indices < 0 if self.heads == 1 else (indices < 0).all(-1)
        output = self.project_out(self._codes(indices)).masked_fill(empty.unsqueeze(-1), 0.0)
        return self.layout.from_tokens(output)

    def _codes(self, indices: Tensor) -> Tensor:
        embed = self._codebook.codewords(self._codebook.embed.dtype, snapshot=False)
        if self.heads == 1:
            return lookup(embed[0], indices)
        if self.separate_codebook_per_head:
            return torch.cat([lookup(book, index) for book, index in zip(embed, indices.unbind(-1), strict=True)], -1)
        return lookup(embed[0], indices).flatten(-2)

    def _vectors(self, tokens: Tensor) -> Tensor:
        """Tokens ``[..., heads D]`` -> ``[H, N, D]``, float32 or float64, unit vectors for the cosine codebook."""
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        z = self.split_heads.split(tokens.unflatten(-1, (self.heads, self.codebook_dim)))
        if not self.use_cosine_sim:
            return z
        finite = z.isfinite().all(-1, keepdim=True)  # kept away from the norm, whose gradient would turn 0 into NaN
        return torch.where(finite, normalize(torch.where(finite, z, 0.0)), torch.nan)

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
            sample_codebook_temp, freeze_codebook, ema_update: override the constructor's.
            codebook_transform_fn: codewords ``[H, K, D]`` -> every token's own candidates ``[H, B, N, K, D]``
                (with heads that share a codebook, B counts samples times heads).
            ema_update_weight: scales the EMA step per codeword, ``[K]`` or ``[H, K]``, or a function of (sums, counts).
            accum_ema_update: only add this batch to the next EMA step.

        Returns:
            ``(quantized, indices, loss)``, with ``return_loss_breakdown`` also :class:`LossBreakdown`. Indices are
            int64 ``[...]`` (``[..., heads]``, ``[..., k]``), -1 for masked and non-finite tokens. The loss is a scalar,
            0 in eval; with topk it is ``[..., k]``, in eval the commitment loss, and unweighted where its weight is 0.

        Raises:
            ValueError: shapes that do not fit, arguments that exclude each other.
        """
        tokens = self.layout.to_tokens(x)
        lead = tokens.shape[:-1]
        mask = self.layout.mask(lead, mask, lens)
        z, z_mask = self._vectors(project(self.project_in, tokens)), self.split_heads.mask(mask)
        self._codebook.init_(z, z_mask)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        updating = self.training and not frozen and topk is None
        k = None if topk is None else self._checked_topk(topk, indices)
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        step = {"weight": ema_update_weight, "accumulate": accum_ema_update, "ema_update": ema_update}

        in_place = None
        if self.in_place_codebook_optimizer is not None and updating:
            with torch.enable_grad():
                _, chosen = self._chosen(z.detach(), z_mask, True, temperature, codebook_transform_fn, k)
                self._codebook.update(z.detach(), chosen.indices, **step)
                chosen.codebook_loss.backward()
            in_place = chosen.codebook_loss.detach()
            if not self.manual_in_place_optimizer_update:
                self.update_in_place_optimizer()
        trains_codes = self.trains_by_loss(frozen)
        embed, chosen = self._chosen(z, z_mask, trains_codes, temperature, codebook_transform_fn, k)
        if updating and in_place is None:
            self._codebook.update(z.detach(), chosen.indices, **step)
        quantized, index = chosen.quantized, chosen.indices
        if self.training and self.sync_update_v > 0.0:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        if k is None:
            self._remember(index)
            quantized = self.split_heads.merge(quantized, lead).flatten(-2)
        else:
            quantized = quantized.reshape(*lead, k, self.codebook_dim)
        quantized = self._output(quantized, tokens, mask)
        if indices is not None:
            return quantized, self._cross_entropy(self._similarity(z, embed, chosen), indices, lead)
        loss, parts = self._losses(z, embed, chosen, trains_codes, lead, k)
        if in_place is not None:
            parts = parts._replace(inplace_optimize=in_place)
        index = index.reshape(*lead, k) if k else self.split_heads.merge(index, lead)
        result = quantized, index.squeeze(-1) if self.heads == 1 and k is None else index, loss
        return (*result, parts) if return_loss_breakdown else result

    def _checked_topk(self, topk: int, indices: Tensor | None) -> int:
        if topk < 1:
            raise ValueError(f"VectorQuantize.forward: topk={topk}; a positive integer is expected")
        if self.heads > 1 or indices is not None:
            raise ValueError("VectorQuantize.forward: topk needs heads=1 and no indices")
        by_training = self.commitment_use_cross_entropy_loss or self.in_place_codebook_optimizer is not None
        if self.training and by_training:
            raise ValueError(
                "VectorQuantize.forward: topk makes no step, so in training it cannot go with "
                "commitment_use_cross_entropy_loss or in_place_codebook_optimizer"
            )
        return min(int(topk), self.codebook_size)

    def _chosen(self, z: Tensor, mask: Tensor | None, trains_codes: bool, temperature: float, transform, k: int | None):
        """-> codewords, :class:`Chosen`."""
        self._codebook.observe(z.detach(), mask)
        # every step on the codewords comes before backward, which must see those of the forward
        embed = self._codebook.codewords(z.dtype, snapshot=self.training)
        candidates = None
        if transform is not None:
            candidates = transform(embed)
            expected = (z.shape[0], z.shape[1], *embed.shape[1:])
            if candidates.dim() < 4 or candidates.flatten(1, -3).shape != expected:
                raise ValueError(
                    f"VectorQuantize.forward: codebook_transform_fn gave {tuple(candidates.shape)}; expected [heads, "
                    f"batch, positions, {', '.join(map(str, embed.shape[1:]))}] with batch * positions = {z.shape[1]}"
                )
            candidates = candidates.flatten(1, -3).to(z.dtype)
            candidates = normalize(candidates) if self.use_cosine_sim else candidates
        chosen = self.choose(
            z,
            embed,
            mask,
            training=self.training,
            trains_codes=trains_codes,
            temperature=temperature,
            candidates=candidates,
            k=k,
        )
        return embed, chosen

    def _similarity(self, z: Tensor, embed: Tensor, chosen: Chosen) -> Tensor:
        """``[H, N, K]``, 0 for vectors that take no part, differentiable."""
        if chosen.similarity is not None:
            return chosen.similarity
        usable = chosen.indices >= 0 if chosen.indices.dim() == 2 else (chosen.indices >= 0).all(-1)
        z = torch.where(usable.unsqueeze(-1), z, 0.0)
        return similarities(z, embed, self.choose.metric)

    def trains_by_loss(self, frozen: bool) -> bool:
        return self.learnable_codebook and self.training and not frozen and self.has_commitment_loss

    def _losses(
        self, z: Tensor, embed: Tensor, chosen: Chosen, trains_codes: bool, lead: torch.Size, k: int | None
    ) -> tuple[Tensor, LossBreakdown]:
        """-> the weighted sum, its parts."""
        zero = chosen.commitment.new_zeros(())
        commitment = chosen.commitment
        if not self.training:
            commitment = zero if k is None else commitment.reshape(*lead, k)
            loss = commitment * self.commitment_weight if self.has_commitment_loss else commitment.clone()
            return loss, LossBreakdown(commitment, zero, zero, zero)
        similarity = None
        if self.codebook_diversity_loss_weight > 0.0 or self.commitment_use_cross_entropy_loss:
            similarity = self._similarity(z, embed, chosen)
        if k is not None:
            commitment = commitment.reshape(*lead, k)
        elif self.commitment_use_cross_entropy_loss:
            commitment = cross_entropy(similarity, chosen.indices)
        elif trains_codes:  # one mean square, with its gradient to both sides
            commitment = commitment + (chosen.codebook_loss - chosen.codebook_loss.detach())
        if not self.has_commitment_loss:
            commitment = torch.zeros_like(commitment)
        loss, diversity, orthogonal = commitment * self.commitment_weight, zero, zero
        if self.codebook_diversity_loss_weight > 0.0:
            usable = chosen.indices >= 0 if k is None else (chosen.indices >= 0).all(-1)
            positions = math.prod(lead[1:])
            by_sample = (z.shape[0], z.shape[1] // max(positions, 1), positions)
            diversity = diversity_loss(
                similarity.reshape(*by_sample, self.codebook_size),
                usable.reshape(by_sample),
                self.codebook_diversity_temperature,
            )
            loss = loss + diversity * self.codebook_diversity_loss_weight
        if self.orthogonal_reg_weight > 0.0:
            active = None
            if self.orthogonal_reg_active_codes_only:
                active = used_codes(chosen.indices.flatten(1), self.codebook_size)
            # of the codewords after this forward's step; a copy, because the next one's may come before backward
            orthogonal = orthogonal_loss(self._codebook.embed.clone(), active, self.orthogonal_reg_max_codes)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        return trainable(loss), LossBreakdown(commitment, diversity, orthogonal, zero)

    def _cross_entropy(self, similarity: Tensor, targets: Tensor, lead: torch.Size) -> Tensor:
        """Cross entropy of the similarities as logits. Targets -1 do not count."""
        expected = (*lead, self.heads) if self.heads > 1 else tuple(lead)
        if tuple(targets.shape) != expected:
            raise ValueError(f"VectorQuantize.forward: indices is {tuple(targets.shape)}; expected {expected}")
        return cross_entropy(self.split_heads.merge(similarity, lead).flatten(-3, -2), targets.reshape(-1))

    def _output(self, quantized: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``[..., heads D]`` -> the result: input dtype, projected, padding filled, in the input's layout."""
        quantized = project(self.project_out, quantized.to(tokens.dtype))
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            if quantized.dim() > tokens.dim():  # topk
                padding, mask = padding.unsqueeze(-2), mask.unsqueeze(-1)
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding.to(quantized.dtype))
        return self.layout.from_tokens(quantized)

    # codebook training by hand

    def update_in_place_optimizer(self) -> None:
        """The step of ``in_place_codebook_optimizer`` on the gradients that are there; processes average theirs."""
        if self.in_place_codebook_optimizer is None:
            return
        if (world := self._codebook._world()) > 1:
            for parameter in self._codebook.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """The EMA step of ``forward`` for inputs whose indices are already there (after ``topk`` or a beam search)."""
        tokens = self.layout.to_tokens(x)
        mask = self.layout.mask(tokens.shape[:-1], mask, None)
        if mask is not None:
            indices = indices.masked_fill(~(mask if self.heads == 1 else mask.unsqueeze(-1)), -1)
        per_head = indices.unsqueeze(-1) if self.heads == 1 else indices
        self._codebook.update(self._vectors(self.project_in(tokens)), self.split_heads.split(per_head, features=0))

    update_ema_indices = update_indices

    @torch.no_grad()
    def expire_codes_(self, x: Tensor) -> None:
        """Moves dead codewords onto random rows of x, an input as for ``forward``."""
        z = self._vectors(self.project_in(self.layout.to_tokens(x)))
        self._codebook.expire_(z, torch.where(z.isfinite().all(-1), 0, -1))
