"""RQ-VAE: an MLP autoencoder whose latent is a residual code (Lee et al. 2022, arXiv 2203.01941; TIGER, arXiv
2305.05065)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import ResidualVQ


class RQVAEOutput(NamedTuple):
    """``reconstruction`` [N, D]; ``indices`` int64 [N, levels]; ``loss`` = ``reconstruction_loss`` (mean squared error)
    + ``commitment_loss`` (beta times the levels' sum)."""

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor


class RQVAE(nn.Module):
    """Encoder MLP, residual quantizer, decoder MLP. The codewords are seeded by k-means++ on the first training batch
    and then follow their vectors by an exponential moving average; those that hardly any vector chooses move onto other
    vectors.

    ``dim``: features D of the input. ``hidden``: widths of the encoder's layers, reversed in the decoder.
    ``estimator``: "rotation", "reflection" or "ste". ``beta``: weight of the commitment loss. ``quantizer``: further
    options of ``ResidualVQ``, such as ``decay`` or ``threshold_ema_dead_code``.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int] = (512, 256, 128),
        latent_dim: int = 32,
        levels: int = 3,
        codebook_size: int = 256,
        estimator: str = "rotation",
        beta: float = 0.25,
        **quantizer,
    ):
        super().__init__()
        self.encoder = _mlp([dim, *hidden, latent_dim])
        self.decoder = _mlp([latent_dim, *reversed(hidden), dim])
        options = {"kmeans_init": True, "threshold_ema_dead_code": 0.5, "decay": 0.9} | quantizer
        self.quantizer = ResidualVQ(
            dim=latent_dim,
            num_quantizers=levels,
            codebook_size=codebook_size,
            estimator=estimator,
            commitment_weight=beta,
            **options,
        )

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


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
