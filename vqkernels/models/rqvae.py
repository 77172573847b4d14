"""RQ-VAE: an MLP autoencoder whose latent is a residual code (Lee et al. 2022, arXiv 2203.01941; TIGER, arXiv
2305.05065)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import ResidualFSQ, ResidualSimVQ, ResidualVQ

LATENT = 32
ESTIMATORS = {
    "residual": ("rotation", "reflection", "ste", "gumbel"),
    "simvq": ("rotation", "ste"),
    "fsq": ("rotation",),
}


class RQVAEOutput(NamedTuple):
    """``reconstruction`` [N, D]; ``indices`` int64 [N, levels]; ``loss`` = ``reconstruction_loss`` (mean squared error)
    + ``commitment_loss`` (the quantizer's loss, the levels' sum)."""

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor


class RQVAE(nn.Module):
    """Encoder MLP, residual quantizer, decoder MLP.

    ``dim``: features D of the input. ``hidden``: widths of the encoder's layers, reversed in the decoder.
    ``latent_dim``: features of the latent (default 32). ``quantizer``:

    * "residual" (``ResidualVQ``): codewords are seeded by k-means++ on the first training batch and then follow their
      vectors by an exponential moving average; those that hardly any vector chooses move onto other vectors. The loss
      is ``beta`` times the commitment loss. With ``estimator="gumbel"`` latents are quantized at a fixed distance from
      0, large against the noise: else codes are drawn nearly at random, and their average makes all codewords one.
    * "simvq" (``ResidualSimVQ``, Zhu et al. 2024, arXiv 2411.02038): frozen codewords behind a trained linear map; the
      loss is the codebook loss and ``beta`` times the commitment loss.
    * "fsq" (``ResidualFSQ``, Mentzer et al. 2023, arXiv 2309.15505): two values a feature and level, so that
      ``codebook_size`` is cut to a power of two and the latent has its binary logarithm as features: more values on
      fewer features reconstruct embeddings worse. Has no loss.

    ``estimator``: how gradients pass the quantizer: "rotation", "reflection", "ste" or "gumbel" for "residual",
    "rotation" or "ste" for "simvq"; FSQ's rounding is straight-through whatever it is. ``options``: of the quantizer's
    layer, such as ``decay`` or ``threshold_ema_dead_code`` of ``ResidualVQ``.

    Raises:
        ValueError: a quantizer or estimator that does not exist, or a latent_dim that FSQ cannot have.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int] = (512, 256, 128),
        latent_dim: int | None = None,
        levels: int = 3,
        codebook_size: int = 256,
        estimator: str = "rotation",
        beta: float = 0.25,
        quantizer: str = "residual",
        **options,
    ):
        super().__init__()
        check_quantizer(quantizer, estimator)
        latent = latent_dim or LATENT
        if quantizer == "fsq":
            latent = max(codebook_size.bit_length() - 1, 1)
            if latent_dim not in (None, latent):
                raise ValueError(
                    f"latent_dim={latent_dim} with quantizer='fsq': codebook_size={codebook_size} gives {latent}. "
                    "Leave latent_dim out"
                )
            self.quantizer = _FSQ([2] * latent, levels, **options)
        elif quantizer == "simvq":
            self.quantizer = ResidualSimVQ(
                dim=latent,
                num_quantizers=levels,
                codebook_size=codebook_size,
                rotation_trick=estimator == "rotation",
                input_to_quantize_commit_loss_weight=beta,
                **options,
            )
        else:
            layer = _GumbelVQ if estimator == "gumbel" else ResidualVQ
            self.quantizer = layer(
                dim=latent,
                num_quantizers=levels,
                codebook_size=codebook_size,
                estimator=estimator,
                commitment_weight=beta,
                **CODEBOOK | options,
            )
        self.encoder = _mlp([dim, *hidden, latent])
        self.decoder = _mlp([latent, *reversed(hidden), dim])

    @torch.no_grad()
    def init_pca_(self, x: Tensor) -> RQVAE:
        """Make encoder and decoder the principal component analysis of x [N, D]; returns self.

        Two units of a ReLU layer carry a number p, as max(p, 0) and max(-p, 0), so that the autoencoder starts as the
        best linear one, which gradient descent needs hundreds of steps to find. Units that are left keep their random
        weights, but at first the last layers do not listen to them. A layer narrower than twice the latent carries
        fewer components, and the latent features beyond them start at random. Latents get a mean square of 1.
        """
        encoder, decoder = (
            [layer for layer in mlp if isinstance(layer, nn.Linear)] for mlp in (self.encoder, self.decoder)
        )
        latent = encoder[-1].out_features
        count = min(latent, *x.shape, *(layer.out_features // 2 for layer in encoder[:-1]))
        mean = x.mean(0)
        components = torch.linalg.eigh((x - mean).T @ (x - mean))[1].T.flip(0)[:count]
        scale = ((x - mean) @ components.T).square().mean().sqrt() if count else x.new_zeros(())
        if scale > 0:
            identity = torch.eye(count, latent, device=x.device)
            _carry(encoder, components / scale, identity[:, :count], -mean @ components.T / scale)
            _carry(decoder, identity, components.T * scale, mean)
        return self

    def forward(self, x: Tensor) -> RQVAEOutput:
        """x [N, D] -> RQVAEOutput. In training mode the codewords move, so call it once a step."""
        quantized, indices, losses = self.quantizer(self.encoder(x))
        reconstruction = self.decoder(quantized)
        reconstruction_loss, commitment_loss = nn.functional.mse_loss(reconstruction, x), losses.sum()
        return RQVAEOutput(
            reconstruction, indices, reconstruction_loss + commitment_loss, reconstruction_loss, commitment_loss
        )

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x [N, D] -> codes int64 [N, levels]; moves no codeword."""
        training = self.quantizer.training
        try:
            return self.quantizer.eval()(self.encoder(x))[1]
        finally:
            self.quantizer.train(training)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Codes [N, levels] -> reconstruction [N, D]; the first levels alone, [N, q], give a coarser one."""
        return self.decoder(self.quantizer.get_output_from_indices(indices))


CODEBOOK = {"kmeans_init": True, "threshold_ema_dead_code": 0.5, "decay": 0.99}
GUMBEL_SCALE = 100.0  # latents' root mean square against the noise, whose standard deviation is 1.3


class _GumbelVQ(ResidualVQ):
    """On latents of one length, in units of the Gumbel noise."""

    def forward(self, x: Tensor):
        unit = nn.functional.normalize(x, dim=-1) * self.dim**0.5
        quantized, indices, losses = super().forward(unit * GUMBEL_SCALE)
        return quantized / GUMBEL_SCALE, indices, losses / GUMBEL_SCALE**2

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        return super().get_output_from_indices(indices) / GUMBEL_SCALE


class _FSQ(ResidualFSQ):
    """With results like those of the layers that have codewords."""

    def __init__(self, grid: list[int], levels: int, **options):
        super().__init__(levels=grid, num_quantizers=levels, **options)

    def forward(self, x: Tensor):
        quantized, indices = super().forward(x)
        return quantized, indices.long(), quantized.new_zeros(self.num_quantizers)


def check_quantizer(quantizer: str, estimator: str) -> None:
    """ValueError where the quantizer does not exist, or does not have the estimator."""
    if quantizer not in ESTIMATORS:
        raise ValueError(f"quantizer={quantizer!r} is unknown. Use {_listed(ESTIMATORS)}")
    if estimator not in ESTIMATORS[quantizer]:
        raise ValueError(
            f"estimator={estimator!r} is unknown to quantizer={quantizer!r}. Use {_listed(ESTIMATORS[quantizer])}"
        )


def _listed(names) -> str:
    return " or ".join(map(repr, names))


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _carry(layers: Sequence[nn.Linear], first: Tensor, last: Tensor, bias: Tensor) -> None:
    """Make the outputs of these layers, with ReLUs between them, start with last @ (first @ x) + bias; first
    [m, inputs], last [n, m], bias [n], n <= outputs."""
    pairs, n = 2 * len(first), len(last)
    for layer in layers[:-1]:
        layer.weight[:pairs] = torch.eye(pairs, layer.in_features, device=first.device)
        layer.bias[:pairs] = 0.0
    if len(layers) == 1:
        layers[0].weight[:n] = last @ first
    else:
        layers[0].weight[:pairs] = torch.cat([first, -first])
        layers[-1].weight[:n] = 0.0
        layers[-1].weight[:n, :pairs] = torch.cat([last, -last], 1)
    layers[-1].bias[:n] = bias
