"""VQ-VAE: a convolutional autoencoder whose latent image is made of codewords (van den Oord et al. 2017, arXiv
1711.00937)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.progress import progress_bar
from ..ops import CodebookUsage, codebook_usage
from .quantizers import codewords, dequantize, make_quantizer, quantize

EVALUATE_IMAGES = 512  # at a time


class VQVAEOutput(NamedTuple):
    """``reconstruction`` like the input; ``indices`` int64 [B, h, w], [B, h, w, Q] for a residual quantizer; ``loss`` =
    ``reconstruction_loss`` (mean squared error) + ``commitment_loss`` (beta included)."""

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor


class VQVAE(nn.Module):
    """Images [B, channels, H, W] to codes [B, h, w] and back, h = H / downsample and w = W / downsample.

    ``width``: channels of the hidden layers. ``downsample``: 2, 4, 8, ...; pixels a code stands for, each way. ``dim``,
    ``codebook_size``: of the codewords. ``estimator``: "rotation", "reflection", "ste" or "gumbel". ``beta``: weight of
    the commitment loss. ``quantizer``: "vq", "residual", "simvq" or "fsq", and ``options`` of its layer, see
    ``make_quantizer``; or a module that takes [B, dim, h, w] and returns (quantized, indices, loss) instead of all
    these but ``dim``.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        width: int = 64,
        downsample: int = 4,
        dim: int = 32,
        codebook_size: int = 256,
        estimator: str = "rotation",
        beta: float = 0.25,
        quantizer: str | nn.Module = "vq",
        **options,
    ):
        super().__init__()
        stages = downsample.bit_length() - 1
        if stages < 1 or downsample != 1 << stages:
            raise ValueError(f"VQVAE: downsample={downsample}; a power of two from 2 on is needed")
        if min(channels, width // 2, dim) < 1:
            raise ValueError(f"VQVAE: channels={channels}, width={width}, dim={dim}; 1, 2 and 1 or more are needed")
        self.channels, self.downsample = channels, downsample
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        inner = [width // 2 if stages > 1 else width, *[width] * (stages - 1)]  # channels after each halving
        for before, after in pairwise([channels, *inner]):
            down += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
            up = [nn.ReLU(), nn.ConvTranspose2d(after, before, 4, 2, 1), *up]
        self.encoder = nn.Sequential(*down[:-1], Residual(width), Residual(width), nn.ReLU(), nn.Conv2d(width, dim, 1))
        if isinstance(quantizer, str):
            quantizer = make_quantizer(quantizer, dim, codebook_size, estimator, beta, **options)
        elif options:
            raise ValueError(
                f"VQVAE: {', '.join(options)} belong to the default quantizer, but one was given. Set them there"
            )
        self.quantizer = quantizer
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 3, 1, 1), Residual(width), Residual(width), *up)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def levels(self) -> int:
        """Codes at each position: more than one for a residual quantizer."""
        return getattr(self.quantizer, "num_quantizers", 1)

    @property
    def codebook(self) -> Tensor:
        """What every code stands for in the decoder's input: [K, dim], or [levels, K, dim] for a residual
        quantizer."""
        with torch.no_grad():
            return codewords(self.quantizer)

    def usage(self, indices: Tensor) -> CodebookUsage:
        """How indices, as ``encode`` gives them, are spread over the codes; by level for a residual quantizer."""
        if self.levels == 1:
            return codebook_usage(indices.flatten(), self.codebook_size)
        return codebook_usage(indices.flatten(0, -2), self.codebook_size, dim=-1)

    def forward(self, images: Tensor) -> VQVAEOutput:
        """In training mode the codewords move, so call it once a step."""
        quantized, indices, commitment_loss = quantize(self.quantizer, self._latent(images))
        reconstruction = self.decoder(quantized)
        reconstruction_loss = nn.functional.mse_loss(reconstruction, images)
        return VQVAEOutput(
            reconstruction, indices, reconstruction_loss + commitment_loss, reconstruction_loss, commitment_loss
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> codes int64 [B, h, w], [B, h, w, Q] for a residual quantizer; moves no
        codeword."""
        training = self.quantizer.training
        try:
            self.quantizer.eval()
            return quantize(self.quantizer, self._latent(images))[1]
        finally:
            self.quantizer.train(training)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Codes as ``encode`` gives them -> the reconstruction; as the network says it, so clamp it to show it."""
        return self.decoder(dequantize(self.quantizer, indices))

    def _latent(self, images: Tensor) -> Tensor:
        step = self.downsample
        if images.dim() != 4 or images.shape[2] % step or images.shape[3] % step:
            raise ValueError(
                f"VQVAE: images of shape {list(images.shape)}; [B, channels, H, W] is needed, H and W multiples of "
                f"{step}. Pad or crop them"
            )
        return self.encoder(images)

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
                indices.append(out.indices)
                advance()
                if step % 50 == 0 or step == steps:
                    loss, reconstruction = torch.stack(losses).mean(0).tolist()
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"the loss became {loss} before step {step} at lr={lr}. Use a smaller lr"
                        )
                    use = self.usage(torch.cat(indices))
                    history.append(
                        {
                            "step": step,
                            "loss": loss,
                            "reconstruction_loss": reconstruction,
                            "usage": float(use.used.mean()),
                            "perplexity": float(use.perplexity.mean()),
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
        squares, indices = 0.0, []
        for batch in images.split(EVALUATE_IMAGES):
            out = self(batch.to(device))
            squares += float((out.reconstruction - batch.to(device)).square().mean()) * len(batch)
            indices.append(out.indices)
        self.train(training)
        use = self.usage(torch.cat(indices))
        return {
            "reconstruction_error": squares / len(images),
            "usage": float(use.used.mean()),
            "perplexity": float(use.perplexity.mean()),
        }


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width // 2, 3, 1, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
