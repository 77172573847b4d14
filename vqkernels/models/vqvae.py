"""VQ-VAE: a convolutional autoencoder whose latent image is made of codewords (van den Oord et al. 2017, arXiv
1711.00937)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.progress import progress_bar
from ..layers import VectorQuantize
from ..ops import codebook_usage

EVALUATE_IMAGES = 512  # at a time


class VQVAEOutput(NamedTuple):
    """``reconstruction`` like the input; ``indices`` int64 [B, H/4, W/4]; ``loss`` = ``reconstruction_loss`` (mean
    squared error) + ``commitment_loss`` (beta included)."""

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor


class VQVAE(nn.Module):
    """Images [B, channels, H, W] to codes [B, H/4, W/4] and back; H and W are multiples of 4.

    ``width``: channels of the hidden layers. ``dim``, ``codebook_size``: of the codewords. ``estimator``: "rotation",
    "reflection" or "ste". ``beta``: weight of the commitment loss. ``options``: further options of ``VectorQuantize``.
    Or ``quantizer``: a module that takes [B, dim, h, w] and returns (quantized, indices, loss), instead of all these
    but ``dim``.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        width: int = 64,
        dim: int = 32,
        codebook_size: int = 256,
        estimator: str = "rotation",
        beta: float = 0.25,
        quantizer: nn.Module | None = None,
        **options,
    ):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width // 2, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, 2, 1),
            Residual(width),
            Residual(width),
            nn.ReLU(),
            nn.Conv2d(width, dim, 1),
        )
        if quantizer is None:
            options = {"kmeans_init": True, "threshold_ema_dead_code": 1.0, "decay": 0.9} | options
            quantizer = VectorQuantize(
                dim, codebook_size, accept_image_fmap=True, estimator=estimator, commitment_weight=beta, **options
            )
        elif options:
            raise ValueError(
                f"VQVAE: {', '.join(options)} belong to the default quantizer, but one was given. Set them there"
            )
        self.quantizer = quantizer
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, 1, 1),
            Residual(width),
            Residual(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, channels, 4, 2, 1),
        )

    def forward(self, images: Tensor) -> VQVAEOutput:
        """In training mode the codewords move, so call it once a step."""
        if images.dim() != 4 or images.shape[2] % 4 or images.shape[3] % 4:
            raise ValueError(
                f"VQVAE: images of shape {list(images.shape)}; [B, channels, H, W] is needed, H and W multiples of 4. "
                "Pad or crop them"
            )
        quantized, indices, commitment_loss = self.quantizer(self.encoder(images))
        reconstruction = self.decoder(quantized)
        reconstruction_loss = nn.functional.mse_loss(reconstruction, images)
        return VQVAEOutput(
            reconstruction, indices, reconstruction_loss + commitment_loss, reconstruction_loss, commitment_loss
        )

    def fit(
        self, images: Tensor, steps: int = 500, batch_size: int = 64, lr: float = 1e-3, seed: int = 0, progress=None
    ) -> list[dict]:
        """Train with AdamW on images [N, channels, H, W]; returns one record for every 50 steps: ``step``, ``loss``,
        ``reconstruction_loss`` (means), ``usage``, ``perplexity`` of the codes given meanwhile. ``seed`` decides the
        batches and the codebook's draws, not the weights the model was made with. ``progress``: None (a bar on the
        terminal), False or a running ``rich.progress.Progress``."""
        device = next(self.parameters()).device
        optimizer = torch.optim.AdamW(self.parameters(), lr)
        history: list[dict] = []
        losses, indices, order = [], [], images.new_empty(0, dtype=torch.int64)
        self.train()
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            progress_bar(progress, "VQ-VAE", steps) as advance,
        ):
            torch.manual_seed(seed)
            for step in range(1, steps + 1):
                if len(order) < min(batch_size, len(images)):
                    order = torch.randperm(len(images))
                batch, order = order[:batch_size], order[batch_size:]
                out = self(images[batch].to(device))
                optimizer.zero_grad()
                out.loss.backward()
                optimizer.step()
                losses.append(torch.stack([out.loss, out.reconstruction_loss]).detach())
                indices.append(out.indices.flatten())
                advance()
                if step % 50 == 0 or step == steps:
                    loss, reconstruction = torch.stack(losses).mean(0).tolist()
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"the loss became {loss} before step {step} at lr={lr}. Use a smaller lr"
                        )
                    use = codebook_usage(torch.cat(indices), self.quantizer.codebook_size)
                    history.append(
                        {
                            "step": step,
                            "loss": loss,
                            "reconstruction_loss": reconstruction,
                            "usage": float(use.used),
                            "perplexity": float(use.perplexity),
                        }
                    )
                    losses, indices = [], []
        return history

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> dict:
        """``reconstruction_error`` (mean squared error), ``usage`` and ``perplexity`` of the codes over images; moves
        no codeword."""
        training = self.training
        self.eval()
        device = next(self.parameters()).device
        outs = [self(batch.to(device)) for batch in images.split(EVALUATE_IMAGES)]
        self.train(training)
        use = codebook_usage(torch.cat([out.indices.flatten() for out in outs]), self.quantizer.codebook_size)
        error = sum(float(out.reconstruction_loss) * len(out.indices) for out in outs) / len(images)
        return {"reconstruction_error": error, "usage": float(use.used), "perplexity": float(use.perplexity)}


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width // 2, 3, 1, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
