"""``ResidualVQ``: the layer of vector-quantize-pytorch on this project's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import CodebookUsage, residual_quantize
from .affine import AffineCodebook
from .beam_search import beam_search
from .choice import Chosen, Sampling, choose, directional_reparam
from .dropout import DropsLevels
from .implicit_codebook import ImplicitCodebook
from .losses import cross_entropy, mean_square, trainable
from .search import similarities
from .tokens import Layout, at_least_float32, lookup, per_level, project
from .vector_quantize import VectorQuantize


class ResidualVQ(DropsLevels, nn.Module):
    """Quantizes vectors, then what is left of them, level after level; in one pass where the options allow it.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.ResidualVQ``;
    docs/migrating.md lists what differs on purpose. The gradient is the sum of the levels' own, as there.

    Args:
        dim: features of the input.
        num_quantizers: levels Q; may be left out when ``codebook_size`` is a tuple.
        codebook_size: codewords of every level, or one number per level.
        codebook_dim: features of a codeword; another value than ``dim`` adds ``project_in`` and ``project_out``.
        shared_codebook: one codebook for all levels, updated once per forward.
        diveq: the codewords are a parameter, and the output moves from the input towards them in a slightly random
            direction, which trains both without a loss of their own (in evaluation it is the codewords themselves).
        heads: 1.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training, use only the first
            levels, their number drawn per batch; the others get index -1 and loss 0.
        implicit_neural_codebook, mlp_kwargs: QINCo: from the second level on, a network (``dim_hidden``, ``depth``)
            makes the codewords from the stored ones and the sum chosen so far; all of it is trained by the loss.
        beam_size, eval_beam_size: keep that many prefixes instead of the nearest codeword's alone, in training and in
            evaluation (None: ``beam_size``).
        beam_score_quantizer_weights: of the levels' squared errors, whose sum the beam minimizes; None: 1 each.
            ``[0, ..., 0, 1]`` minimizes the error of the result.
        quant_grad_frac: share of the gradient of a level's codeword that reaches the levels before it.
        channel_last, accept_image_fmap, accept_3d_fmap: layout of the input.
        vq_kwargs: the other options of :class:`VectorQuantize`, for every level.

    Raises:
        ValueError: options that exclude each other.

    Source: Zeghidour et al. 2021 (arXiv 2107.03312), Vali et al. 2025 (DiVeQ, arXiv 2509.26469), Huijben et al. 2024
    (QINCo, arXiv 2401.14732).
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: list[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        channel_last: bool = True,
        accept_3d_fmap: bool = False,
        **vq_kwargs,
    ):
        super().__init__()
        if heads != 1:
            raise ValueError(f"ResidualVQ: heads={heads}; a residual code has one head, see GroupedResidualVQ")
        if isinstance(codebook_size, (tuple, list)):
            sizes = tuple(codebook_size)
        elif num_quantizers is not None:
            sizes = (codebook_size,) * num_quantizers
        else:
            raise ValueError(
                "ResidualVQ: num_quantizers is missing; give it, or a tuple codebook_size with one number per level"
            )
        if not sizes or num_quantizers not in (None, len(sizes)):
            raise ValueError(
                f"ResidualVQ: codebook_size={codebook_size!r} names {len(sizes)} levels, "
                f"num_quantizers={num_quantizers}"
            )
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"ResidualVQ: shared_codebook=True needs one codebook size, got {sizes}")
        weights = [1.0] * len(sizes) if beam_score_quantizer_weights is None else list(beam_score_quantizer_weights)
        if len(weights) != len(sizes):
            raise ValueError(
                f"ResidualVQ: beam_score_quantizer_weights has {len(weights)} numbers for {len(sizes)} levels"
            )
        self.dim, self.codebook_sizes, self.num_quantizers = dim, sizes, len(sizes)
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.shared_codebook, self.diveq = shared_codebook, diveq
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.implicit_neural_codebook = implicit_neural_codebook
        self.beam_size, self.eval_beam_size = beam_size, beam_size if eval_beam_size is None else eval_beam_size
        self.register_buffer("beam_score_weights", torch.tensor(weights), persistent=False)
        self._set_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        self.layout = Layout.of("ResidualVQ", dim, channel_last, accept_image_fmap, accept_3d_fmap)
        self.channel_last, self.accept_image_fmap, self.accept_3d_fmap = channel_last, accept_image_fmap, accept_3d_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        self.has_projections = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        if implicit_neural_codebook or diveq:
            vq_kwargs |= {"learnable_codebook": True, "ema_update": False}
        if diveq:
            vq_kwargs |= {"commitment_weight": 0.0, "route_gradients_to_input": False}
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
        self.layers = nn.ModuleList(
            VectorQuantize(dim=self.codebook_dim, codebook_size=size, **vq_kwargs) for size in sizes
        )
        if any(layer.has_projections for layer in self.layers):
            raise ValueError("ResidualVQ: codebook_dim belongs to ResidualVQ itself, its levels have no projection")
        self.mlps = None
        if implicit_neural_codebook:
            options = {"unit": self.layers[0].use_cosine_sim, **(mlp_kwargs or {})}
            mlps = (ImplicitCodebook(self.codebook_dim, **options) for _ in sizes[1:])
            self.mlps = nn.ModuleList(mlps)
        if shared_codebook:
            shared = self.layers[0]._codebook
            shared.expire_after_update = False
            for layer in self.layers[1:]:
                layer._codebook = shared

    # codebooks

    @property
    def codebook_size(self) -> int:
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """``[Q, K, D]``, or a tuple of ``[K_l, D]`` when the sizes differ."""
        books = tuple(layer._codebook.embed[0] for layer in self.layers)
        return torch.stack(books) if self.uniform_codebook_size else books

    @property
    def usage(self) -> tuple[CodebookUsage, ...]:
        """:attr:`VectorQuantize.usage` of every level; a level that dropout left out keeps that of its last forward."""
        return tuple(layer.usage for layer in self.layers)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices ``[..., q]`` of the first q levels -> codewords ``[Q, ..., D]``; zeros for -1 and missing levels."""
        codes, total = [], 0.0
        for level, index in enumerate(per_level("ResidualVQ", indices, self.num_quantizers)):
            codebook = self.layers[level]._codebook
            codes.append(self._lookup(level, codebook.codewords(codebook.embed.dtype, snapshot=False)[0], index, total))
            total = total + codes[-1]
        return torch.stack(codes)

    def _mlp(self, level: int) -> ImplicitCodebook | None:
        return self.mlps[level - 1] if self.mlps is not None and level > 0 else None

    def _lookup(self, level: int, codebook: Tensor, index: Tensor, total: Tensor | float) -> Tensor:
        """Codewords ``[..., D]`` of a level after the sum ``total`` of the levels before it; zeros for index -1."""
        mlp = self._mlp(level)
        if mlp is None:
            return lookup(codebook, index)
        code = mlp.chosen(codebook, index, total)
        return code.masked_fill((index < 0).unsqueeze(-1), 0.0)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returned for these indices, in the layout of the input; tokens with only -1 are 0."""
        output = self.project_out(self.get_codes_from_indices(indices).sum(0))
        return self.layout.from_tokens(output.masked_fill((indices < 0).all(-1, keepdim=True), 0.0))

    # forward

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        *,
        lens: Tensor | None = None,
    ):
        """Quantizes x ``[..., dim]`` (or channels first, as constructed), then makes the levels' EMA steps.

        Args:
            mask, lens: bool ``[...]`` without features, or tokens per sample; the other tokens take no part.
            indices: target codes ``[..., Q]``; the result is then ``(quantized, sum of the levels' cross entropies)``.
            return_all_codes: also return the codewords ``[Q, ..., D]``.
            sample_codebook_temp, freeze_codebook, beam_size: override the constructor's.
            rand_quantize_dropout_fixed_seed: seed of this call's quantize dropout.

        Returns:
            ``(quantized, indices [..., Q], losses [Q])`` and the codewords if asked for. In evaluation the losses are
            0, after a beam search the levels' errors.

        Raises:
            ValueError: shapes that do not fit, arguments that exclude each other.
        """
        tokens = self.layout.to_tokens(x)
        lead = tokens.shape[:-1]
        mask = self.layout.mask(lead, mask, lens)
        frozen = self.layers[0].freeze_codebook if freeze_codebook is None else freeze_codebook
        beam = (self.beam_size if self.training else self.eval_beam_size) if beam_size is None else beam_size
        beam = 1 if beam is None else beam
        if beam < 1:
            raise ValueError(f"ResidualVQ.forward: beam_size={beam}; expected a number >= 1")
        z = at_least_float32(project(self.project_in, tokens)).reshape(-1, self.codebook_dim)
        flat_mask = None if mask is None else mask.flatten()
        entropy = None
        if indices is not None:
            targets = torch.stack(indices, -1) if isinstance(indices, list) else indices
            if targets.shape != (*lead, self.num_quantizers):
                raise ValueError(
                    f"ResidualVQ.forward: indices is {tuple(targets.shape)}; expected {(*lead, self.num_quantizers)}"
                )
            self._init_levels(z, flat_mask)
            entropy = self._cross_entropy(z, targets.flatten(0, -2), flat_mask)

        levels = self.num_quantizers
        if indices is None:
            levels = self._draw_levels(rand_quantize_dropout_fixed_seed, x.device)
        if beam > 1 or (self.mlps is not None and self.layers[0].plain):
            quantized, index, losses = self._searched(z, flat_mask, levels, frozen, lead, beam, sample_codebook_temp)
        elif self._one_pass():
            quantized, index, losses = self._all_levels(z, flat_mask, levels, frozen)
        else:
            z_tokens = z.reshape(*lead, self.codebook_dim)
            quantized, index, losses = self._level_by_level(z_tokens, mask, levels, frozen, sample_codebook_temp)
        if self.diveq and self.training:
            usable = index[:, :1] >= 0
            moved = directional_reparam(torch.where(usable, z, 0.0), torch.where(usable, quantized, 0.0))
            quantized = torch.where(usable, moved, quantized.detach())
        quantized = self._output(quantized, tokens, mask)
        if entropy is not None:
            return quantized, entropy
        dropped = (0, self.num_quantizers - levels)
        index = F.pad(index, dropped, value=-1).reshape(*lead, self.num_quantizers)
        result = quantized, index, F.pad(losses, dropped)
        return (*result, self.get_codes_from_indices(index)) if return_all_codes else result

    def _output(self, quantized: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        quantized = quantized.reshape(*tokens.shape[:-1], self.codebook_dim).to(tokens.dtype)
        quantized = project(self.project_out, quantized)
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding.to(quantized.dtype))
        return self.layout.from_tokens(quantized)

    def _one_pass(self) -> bool:
        """Whether the fused kernel computes what the levels would, one after the other."""
        first = self.layers[0]
        # the cosine codebook compares normalized residuals, has its loss there too, but subtracts from the plain ones
        plain = first.plain and not first.use_cosine_sim and (self.diveq or not self.quant_grad_frac)
        return plain and not any(layer._codebook.needs_init for layer in self.layers)

    def _all_levels(self, z: Tensor, mask: Tensor | None, levels: int, frozen: bool):
        """-> quantized ``[N, D]``, indices ``[N, levels]``, losses ``[levels]``."""
        first, layers = self.layers[0], self.layers[:levels]
        updating = self.training and not frozen and first._codebook.keeps_statistics
        by_loss = first.trains_by_loss(frozen)
        if self.shared_codebook:
            books = [first._codebook.codewords(z.dtype, snapshot=updating)[0]] * levels
        else:
            books = [layer._codebook.codewords(z.dtype, snapshot=updating)[0] for layer in layers]
        out = residual_quantize(
            z if self.training and not self.diveq else z.detach(),
            books if by_loss else [book.detach() for book in books],
            first.estimator,
            1.0,
            "l2",
            mask,
            per_level=True,
        )
        inputs, residual = [], z.detach()
        for level, layer in enumerate(layers):
            index = out.indices[:, level].unsqueeze(0)
            layer._remember(index)
            if updating:
                layer._codebook.update(residual.unsqueeze(0), index)
                if self.shared_codebook:
                    inputs.append(residual)
                if level + 1 < levels:  # a row with index -1 has it at every level, so its residual never counts
                    residual = residual - books[level].detach().index_select(0, index[0].clamp(min=0))
        if updating and self.shared_codebook:
            self._update_shared(inputs, out.indices)
        quantized = out.quantized
        if not (self.training and z.requires_grad and first.route_gradients_to_input):
            quantized = quantized.detach()
            if first.learnable_codebook and torch.is_grad_enabled():  # the codewords get the gradient in its place
                total = sum(lookup(book, index) for book, index in zip(books, out.indices.unbind(-1), strict=True))
                quantized = torch.where(out.indices[:, :1] < 0, quantized, total)
        if not self.training:
            return quantized, out.indices, out.commitment_loss.new_zeros(levels)
        commitment = out.commitment_loss
        if by_loss:
            commitment = commitment + (out.codebook_loss - out.codebook_loss.detach())
        return quantized, out.indices, trainable(commitment * max(first.commitment_weight, 0.0))

    def _level_by_level(self, z: Tensor, mask: Tensor | None, levels: int, frozen: bool, temperature: float | None):
        """As :meth:`_all_levels`, through the layers themselves; z ``[..., D]``."""
        inputs, indices, losses, residual, quantized = [], [], [], z, torch.zeros_like(z)
        for level, layer in enumerate(self.layers[:levels]):
            inputs.append(residual.detach().reshape(-1, self.codebook_dim))
            mlp = self._mlp(level)
            code, index, loss = layer(
                residual,
                mask=mask,
                sample_codebook_temp=temperature,
                freeze_codebook=frozen,
                codebook_transform_fn=None if mlp is None else mlp.candidates(quantized),
            )
            residual = residual - self._passed_back(code)
            quantized = quantized + code
            indices.append(index.flatten())
            losses.append(loss)
        index = torch.stack(indices, -1)
        if self.training and not frozen and self.shared_codebook:
            self._update_shared(inputs, index)
        return quantized.reshape(-1, self.codebook_dim), index, torch.stack(losses)

    # levels whose codes are searched first, all of them; then losses, gradients and EMA steps follow for these codes

    def _searched(self, z: Tensor, mask, levels: int, frozen: bool, lead, beam: int, temperature: float | None):
        """As :meth:`_all_levels`, by beam search and with implicit codebooks."""
        if beam > 1:
            self._check_beam()
        self._init_levels(z, mask)
        usable = z.isfinite().all(-1) if mask is None else z.isfinite().all(-1) & mask
        hole = torch.nan if mask is None else torch.where(mask.unsqueeze(-1), torch.nan, 0.0)
        z = torch.where(usable.unsqueeze(-1), z, 0.0)
        first = self.layers[0]
        temperature = first.sample_codebook_temp if temperature is None else temperature
        sampling = first.choose.sampling(self.training, temperature, True)
        proposals = [self._proposals(level, z.dtype, beam, sampling) for level in range(levels)]
        indices = beam_search(z, proposals, self.beam_score_weights, beam)
        indices = torch.where(usable.unsqueeze(-1), indices, -1)

        updating = self.training and not frozen
        inputs, losses, errors, residual, quantized = [], [], [], z, torch.zeros_like(z)
        for level, layer in enumerate(self.layers[:levels]):
            index, vector = indices[:, level].unsqueeze(0), layer._vectors(residual)
            embed = layer._codebook.codewords(z.dtype, snapshot=self.training)
            code = self._lookup(level, embed[0], index, quantized)
            similarity = None
            if (mlp := self._mlp(level)) is not None and layer.codebook_diversity_loss_weight > 0.0:
                similarity = mlp.similarities(vector, embed, quantized)
            routed = self.training and vector.requires_grad and layer.route_gradients_to_input
            passed = layer.choose.pass_gradient(vector, code, routed)
            error = mean_square(vector, code.detach(), usable), mean_square(vector.detach(), code, usable)
            chosen = Chosen(passed, index, *error, similarity)
            loss, _ = layer._losses(vector, embed, chosen, layer.trains_by_loss(frozen), lead, None)
            if updating:
                layer._codebook.update(vector.detach(), index)
            layer._remember(index)
            if self.training and layer.sync_update_v > 0.0:
                passed = passed + layer.sync_update_v * (passed - passed.detach())
            inputs.append(vector[0].detach())
            losses.append(loss)
            errors.append(error[0].detach())
            quantized, residual = quantized + passed[0], residual - self._passed_back(passed[0])
        if updating and self.shared_codebook:
            self._update_shared(inputs, indices)
        quantized = torch.where(usable.unsqueeze(-1), quantized, hole)
        if beam > 1 and not self.training:  # a beam search reports the errors in evaluation, too
            weight = self.layers[0].commitment_weight
            losses = [error * weight if self.layers[0].has_commitment_loss else error for error in errors]
        return quantized, indices, torch.stack(losses)

    def _check_beam(self) -> None:
        first = self.layers[0]
        wrong = {
            "straight_through=True": first.straight_through,
            "estimator='gumbel'": first.estimator == "gumbel",
            "affine_param=True": isinstance(first._codebook, AffineCodebook),
            "commitment_use_cross_entropy_loss=True": self.training and first.commitment_use_cross_entropy_loss,
            "in_place_codebook_optimizer": self.training and first.in_place_codebook_optimizer is not None,
        }
        if any(wrong.values()):
            names = ", ".join(name for name, found in wrong.items() if found)
            raise ValueError(f"ResidualVQ: a beam search cannot go with {names}; leave it out, or use beam_size=1")

    def _proposals(self, level: int, dtype: torch.dtype, count: int, sampling: Sampling):
        """The best codewords of a level for a beam search."""
        layer, mlp = self.layers[level], self._mlp(level)
        book = layer._codebook.codewords(dtype, snapshot=False).detach()
        metric, k = layer.choose.metric, min(count, layer.codebook_size)

        def propose(residual: Tensor, total: Tensor):
            vector = layer._vectors(residual)
            if mlp is None:
                index = choose(vector, book, metric, k, sampling).indices[0]
            else:
                index = mlp.nearest(vector[0], book[0], total, k, sampling)
            code = self._lookup(level, book[0], index, total.unsqueeze(1))
            return index, code, (code - vector[0].unsqueeze(1)).double().square().sum(-1)

        return propose

    @torch.no_grad()
    def _init_levels(self, z: Tensor, mask: Tensor | None) -> None:
        """The k-means start of all levels, each from what the nearest codewords before it leave."""
        if not any(layer._codebook.needs_init for layer in self.layers):
            return
        usable = z.isfinite().all(-1) if mask is None else z.isfinite().all(-1) & mask
        residual = torch.where(usable.unsqueeze(-1), z, 0.0)
        total = torch.zeros_like(residual)
        for level, layer in enumerate(self.layers):
            layer._codebook.init_(layer._vectors(residual), usable.unsqueeze(0))
            code = self._proposals(level, z.dtype, 1, Sampling())(residual, total)[1][:, 0]
            residual, total = residual - code, total + code

    def _cross_entropy(self, z: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """Sum over levels of the cross entropy of the similarities against targets ``[N, Q]``, each level given the
        target codes before it; targets -1 and masked rows do not count.

        Source: Shen et al. 2023 (NaturalSpeech 2, arXiv 2304.09116).
        """
        usable = z.isfinite().all(-1) if mask is None else z.isfinite().all(-1) & mask
        residual = torch.where(usable.unsqueeze(-1), z, 0.0)
        total, entropy = torch.zeros_like(residual), 0.0
        for level, (layer, target) in enumerate(zip(self.layers, targets.unbind(-1), strict=True)):
            target = torch.where(usable, target, -1)
            book = layer._codebook.codewords(z.dtype, snapshot=self.training)
            vector = layer._vectors(residual)
            if (mlp := self._mlp(level)) is None:
                logits = similarities(vector, book, layer.choose.metric)
            else:
                logits = mlp.similarities(vector, book, total)
            entropy = entropy + cross_entropy(logits[0], target)
            code = self._lookup(level, book[0], target, total)
            residual, total = residual - self._passed_back(code), total + code
        return entropy

    def _passed_back(self, code: Tensor) -> Tensor:
        share = self.quant_grad_frac
        return share * code + (1.0 - share) * code.detach() if share > 0.0 else code.detach()

    def _update_shared(self, inputs: list[Tensor], indices: Tensor) -> None:
        """Ends the EMA step of a shared codebook: every level's input ``[N, D]`` and indices ``[N, levels]``."""
        codebook = self.layers[0]._codebook
        if codebook.ema_update:
            codebook.update_ema()
        self.layers[0].update_in_place_optimizer()
        if codebook.threshold_ema_dead_code:
            codebook.expire_(torch.stack(inputs, 1).flatten(0, 1).unsqueeze(0), indices.reshape(1, -1))
