"""``ResidualVQ``: the layer of vector-quantize-pytorch on this project's kernels."""

from __future__ import annotations

import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import CodebookUsage, residual_quantize
from .tokens import Layout, lookup, reject_unsupported
from .vector_quantize import VectorQuantize, _trainable

UNSUPPORTED = {
    "diveq": False,
    "heads": 1,
    "implicit_neural_codebook": False,
    "mlp_kwargs": None,
    "beam_size": None,
    "eval_beam_size": None,
    "beam_score_quantizer_weights": None,
}


class ResidualVQ(nn.Module):
    """Quantizes vectors, then what is left of them, level after level; in one pass where the options allow it.

    Constructor, ``forward``, results and ``state_dict`` keys are those of ``vector_quantize_pytorch.ResidualVQ``;
    docs/migrating.md lists what differs on purpose. The gradient is the sum of the levels' own, as there.

    Args:
        dim: features of the input.
        num_quantizers: levels Q; may be left out when ``codebook_size`` is a tuple.
        codebook_size: codewords of every level, or one number per level.
        codebook_dim: features of a codeword; another value than ``dim`` adds ``project_in`` and ``project_out``.
        shared_codebook: one codebook for all levels, updated once per forward.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training, use only the first
            levels, their number drawn per batch; the others get index -1 and loss 0.
        quant_grad_frac: share of the gradient of a level's codeword that reaches the levels before it.
        channel_last, accept_image_fmap, accept_3d_fmap: layout of the input.
        vq_kwargs: the other options of :class:`VectorQuantize`, for every level.

    Raises:
        ValueError: an option not supported yet, options that exclude each other.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq=False,
        heads=1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook=False,
        mlp_kwargs=None,
        beam_size=None,
        eval_beam_size=None,
        beam_score_quantizer_weights=None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        channel_last: bool = True,
        accept_3d_fmap: bool = False,
        **vq_kwargs,
    ):
        given = dict(locals()) | {"mlp_kwargs": mlp_kwargs or None}
        super().__init__()
        reject_unsupported("ResidualVQ", given, UNSUPPORTED)
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
        if not 0 <= quantize_dropout_cutoff_index < len(sizes) or quantize_dropout_multiple_of < 1:
            raise ValueError(
                f"ResidualVQ: quantize_dropout_cutoff_index={quantize_dropout_cutoff_index}, "
                f"quantize_dropout_multiple_of={quantize_dropout_multiple_of}; "
                f"expected 0 <= cutoff < {len(sizes)} and a multiple >= 1"
            )
        self.dim, self.codebook_sizes, self.num_quantizers = dim, sizes, len(sizes)
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.shared_codebook, self.quant_grad_frac = shared_codebook, quant_grad_frac
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.layout = Layout.of("ResidualVQ", dim, channel_last, accept_image_fmap, accept_3d_fmap)
        self.channel_last, self.accept_image_fmap, self.accept_3d_fmap = channel_last, accept_image_fmap, accept_3d_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        self.has_projections = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True}
        self.layers = nn.ModuleList(
            VectorQuantize(dim=self.codebook_dim, codebook_size=size, **vq_kwargs) for size in sizes
        )
        if any(layer.has_projections for layer in self.layers):
            raise ValueError("ResidualVQ: codebook_dim belongs to ResidualVQ itself, its levels have no projection")
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
        missing = self.num_quantizers - indices.shape[-1]
        if missing < 0:
            raise ValueError(
                f"ResidualVQ: indices is {tuple(indices.shape)}; its last dimension holds levels, at most "
                f"{self.num_quantizers}"
            )
        indices = F.pad(indices, (0, missing), value=-1)
        levels = zip(self.layers, indices.unbind(-1), strict=True)
        return torch.stack([lookup(layer._codebook.embed[0], index) for layer, index in levels])

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
            freeze_codebook: overrides the levels' own.
            rand_quantize_dropout_fixed_seed: seed of this call's quantize dropout.

        Returns:
            ``(quantized, indices [..., Q], losses [Q])`` and the codewords if asked for.

        Raises:
            ValueError: shapes that do not fit, arguments that exclude each other or are not supported yet.
        """
        given = {"sample_codebook_temp": sample_codebook_temp, "beam_size": beam_size}
        reject_unsupported("ResidualVQ.forward", given, dict.fromkeys(given))
        tokens = self.layout.to_tokens(x)
        lead = tokens.shape[:-1]
        mask = self.layout.mask(lead, mask, lens)
        frozen = self.layers[0].freeze_codebook if freeze_codebook is None else freeze_codebook
        z = self.project_in(tokens)
        z = (z if z.dtype == torch.float64 else z.float()).reshape(-1, self.codebook_dim)
        flat_mask = None if mask is None else mask.flatten()
        if indices is not None:
            targets = torch.stack(indices, -1) if isinstance(indices, list) else indices
            if targets.shape != (*lead, self.num_quantizers):
                raise ValueError(
                    f"ResidualVQ.forward: indices is {tuple(targets.shape)}; expected {(*lead, self.num_quantizers)}"
                )
            quantized, entropy = self._cross_entropy(z, targets.flatten(0, -2), flat_mask, frozen)
            return self._output(quantized, tokens, mask), entropy

        levels = self._draw_levels(rand_quantize_dropout_fixed_seed)
        run = self._all_levels if self._one_pass(z) else self._level_by_level
        quantized, index, losses = run(z, flat_mask, levels, frozen)
        dropped = self.num_quantizers - levels
        index = F.pad(index, (0, dropped), value=-1).reshape(*lead, self.num_quantizers)
        result = self._output(quantized, tokens, mask), index, F.pad(losses, (0, dropped))
        return (*result, self.get_codes_from_indices(index)) if return_all_codes else result

    def _output(self, quantized: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        quantized = self.project_out(quantized.reshape(*tokens.shape[:-1], self.codebook_dim).to(tokens.dtype))
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding.to(quantized.dtype))
        return self.layout.from_tokens(quantized)

    def _draw_levels(self, seed: int | None) -> int:
        """How many levels this forward uses."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        if seed is None:
            seed = _common_seed(self.layers[0]._codebook.embed.device)
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers)

    def _one_pass(self, z: Tensor) -> bool:
        """Whether the fused kernel computes what the levels would, one after the other."""
        first = self.layers[0]
        # the cosine codebook compares normalized residuals, has its loss there too, but subtracts from the plain ones
        plain = not first.use_cosine_sim and first.heads == 1 and not self.quant_grad_frac
        to_input = not first.learnable_codebook or (self.training and z.requires_grad)
        return plain and to_input and not any(layer._codebook.needs_init for layer in self.layers)

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
            z if self.training else z.detach(),
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
            if not torch.compiler.is_exporting():
                layer._last_indices = index
            if updating:
                layer._codebook.update(residual.unsqueeze(0), index)
                if self.shared_codebook:
                    inputs.append(residual)
                if level + 1 < levels:  # a row with index -1 has it at every level, so its residual never counts
                    residual = residual - books[level].detach().index_select(0, index[0].clamp(min=0))
        if updating and self.shared_codebook:
            self._update_shared(inputs, out.indices)
        if not self.training:
            return out.quantized, out.indices, out.commitment_loss.new_zeros(levels)
        commitment = out.commitment_loss
        if by_loss:
            commitment = commitment + (out.codebook_loss - out.codebook_loss.detach())
        return out.quantized, out.indices, _trainable(commitment * max(first.commitment_weight, 0.0))

    def _level_by_level(self, z: Tensor, mask: Tensor | None, levels: int, frozen: bool):
        """As :meth:`_all_levels`, through the layers themselves."""
        inputs, indices, losses, residual, quantized = [], [], [], z, 0.0
        for layer in self.layers[:levels]:
            inputs.append(residual.detach())
            code, index, loss = layer(residual, mask=mask, freeze_codebook=frozen)
            quantized = quantized + code
            residual = residual - self._passed_back(code)
            indices.append(index)
            losses.append(loss)
        index = torch.stack(indices, -1)
        if self.training and not frozen and self.shared_codebook:
            self._update_shared(inputs, index)
        return quantized, index, torch.stack(losses)

    def _cross_entropy(self, z: Tensor, targets: Tensor, mask: Tensor | None, frozen: bool) -> tuple[Tensor, Tensor]:
        residual, quantized, total = z, 0.0, 0.0
        for layer, target in zip(self.layers, targets.unbind(-1), strict=True):
            code, entropy = layer(residual, indices=target, mask=mask, freeze_codebook=frozen)
            quantized, total = quantized + code, total + entropy
            residual = residual - self._passed_back(code)
        return quantized, total

    def _passed_back(self, code: Tensor) -> Tensor:
        share = self.quant_grad_frac
        return share * code + (1.0 - share) * code.detach() if share > 0.0 else code.detach()

    def _update_shared(self, inputs: list[Tensor], indices: Tensor) -> None:
        """Ends the EMA step of a shared codebook: every level's input ``[N, D]`` and indices ``[N, levels]``."""
        codebook = self.layers[0]._codebook
        if codebook.ema_update:
            codebook.update_ema()
        if codebook.threshold_ema_dead_code:
            codebook.expire_(torch.cat(inputs).unsqueeze(0), indices.mT.reshape(1, -1))


def _common_seed(device: torch.device) -> int:
    """A draw from torch's generator, the same on every process; only several make the host wait for the device."""
    seed = torch.randint(0, 10_000, ())
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        seed = seed.to(device)
        dist.broadcast(seed, 0)
    return int(seed)
