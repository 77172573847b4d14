"""Semantic IDs from a trained RQ-VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.progress import progress_bar
from ..models import RQVAE
from ..models.rqvae import check_quantizer
from ..ops import codebook_usage
from .base import Tokenizer
from .tokenizers import distinct

DEFAULT_EPOCHS, LEAST_STEPS, WARMUP = 20, 320, 20
SEED_ROWS = 1 << 16  # rows that seed the codebooks
ENCODE_ROWS = 1 << 14  # rows encoded at a time


class RQVAETokenizer(Tokenizer):
    """Trains an ``RQVAE`` on the standardised embeddings with AdamW and a cosine schedule; the IDs are its residual
    codes.

    ``quantizer``, ``estimator``, ``latent_dim``, ``hidden``, ``beta``: as in ``RQVAE``. ``epochs`` (default 20, more
    where these are fewer than 320 steps), ``lr``, ``batch_size``: of the training; the loss of each epoch, and the
    usage and perplexity of its codes (one number a level), are in ``history``.

    The autoencoder starts as the PCA of the items (``RQVAE.init_pca_``), the codebooks of "residual" as the k-means of
    what it encodes, so that training refines what k-means would find; codewords that batches hardly use move onto other
    items, so that they stay in use. "simvq" moves all codewords at each step, and the grid of "fsq" does not need to
    move. CPUs that multiply in bfloat16 do so in training; codes come from float32.
    """

    kind = "rqvae"

    def __init__(
        self,
        levels: int = 3,
        codebook_size: int = 256,
        seed: int = 0,
        estimator: str = "rotation",
        latent_dim: int | None = None,
        hidden: Sequence[int] = (256, 128),
        epochs: int | None = None,
        lr: float = 3e-3,
        batch_size: int = 512,
        beta: float = 0.25,
        quantizer: str = "residual",
        collisions: str = "digit",
    ):
        super().__init__(levels, codebook_size, seed, collisions)
        check_quantizer(quantizer, estimator)
        for name, value in (("latent_dim", latent_dim), ("epochs", epochs), ("batch_size", batch_size)):
            if not (value is None and name != "batch_size") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} is not a whole number from 1")
        self.quantizer, self.estimator, self.latent_dim, self.hidden = quantizer, estimator, latent_dim, tuple(hidden)
        self.epochs, self.lr, self.batch_size, self.beta = epochs, lr, batch_size, beta

    def _fit(self, z: Tensor, progress) -> Tensor:
        k = self.codebook_size
        if self.quantizer == "residual" and (k := distinct(z, k)) < self.codebook_size:
            self.notes.append(
                f"{k} codewords a level instead of {self.codebook_size}, since only so many items are different"
            )
        if self.quantizer == "fsq" and k.bit_count() > 1:
            self.notes.append(f"{1 << (k.bit_length() - 1)} codes a level instead of {k}: a power of two")
        with torch.random.fork_rng([z.device] if z.is_cuda else []):
            torch.manual_seed(self.seed)
            self._model = self._make(z.shape[1], k, len(z)).to(z.device)
            self._train(z, progress)
        self._model.eval()
        return self._codes(z)

    def _make(self, dim: int, codebook_size: int, rows: int) -> RQVAE:
        options = {}
        # dead: less than a quarter of a codeword's fair share of a batch, and less than one vector in two batches
        if self.quantizer == "residual":
            share = min(rows, self.batch_size) / codebook_size
            options["threshold_ema_dead_code"] = min(0.5, 0.25 * share)
        return RQVAE(
            dim,
            hidden=self.hidden,
            latent_dim=self.latent_dim,
            levels=self.levels,
            codebook_size=codebook_size,
            estimator=self.estimator,
            beta=self.beta,
            quantizer=self.quantizer,
            **options,
        )

    @torch.no_grad()
    def _start(self, z: Tensor) -> None:
        """The model as the PCA of z, its codebooks as the k-means of the latents."""
        quantizer = self._model.init_pca_(z).quantizer
        quantizer(self._model.encoder(z))
        if self.quantizer == "residual":
            # the running counts are those of all z: from there an unused codeword would take epochs to be found dead
            share = min(1.0, self.batch_size / len(z))
            for layer in quantizer.layers:
                layer._codebook.cluster_size *= share
                layer._codebook.embed_avg *= share

    def _train(self, z: Tensor, progress) -> None:
        model = self._model
        epochs = self.epochs or max(DEFAULT_EPOCHS, LEAST_STEPS // math.ceil(len(z) / self.batch_size))
        steps = epochs * math.ceil(len(z) / self.batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), self.lr, weight_decay=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        self._start(z[torch.randperm(len(z))[:SEED_ROWS].to(z.device)])
        # half the time of the products; others emulate it, slowly
        half = z.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        with progress_bar(progress, f"RQ-VAE ({self.estimator})", epochs) as advance:
            for epoch in range(1, epochs + 1):
                indices, total = [], torch.zeros(3, device=z.device)
                for rows in torch.randperm(len(z)).to(z.device).split(self.batch_size):
                    with torch.autocast("cpu", torch.bfloat16, enabled=half):
                        out = model(z[rows])
                    optimizer.zero_grad()
                    out.loss.backward()
                    optimizer.step()
                    schedule.step()
                    indices.append(out.indices)
                    losses = torch.stack([out.loss, out.reconstruction_loss, out.commitment_loss]).detach()
                    total += losses * (len(rows) / len(z))
                loss, reconstruction, commitment = total.tolist()
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss became {loss} in epoch {epoch} at lr={self.lr}. Use a smaller lr"
                    )
                use = codebook_usage(torch.cat(indices), model.quantizer.codebook_size, dim=1)
                self.history.append(
                    {
                        "epoch": epoch,
                        "step": epoch,
                        "loss": loss,
                        "reconstruction_loss": reconstruction,
                        "commitment_loss": commitment,
                        "usage": use.used.tolist(),
                        "perplexity": use.perplexity.tolist(),
                    }
                )
                advance(description=f"RQ-VAE ({self.estimator}), reconstruction {reconstruction:.3f}")

    def _codes(self, z: Tensor) -> Tensor:
        model = self._model.to(z.device)
        return torch.cat([model.encode(rows) for rows in z.split(ENCODE_ROWS)])

    def _decode(self, codes: Tensor) -> Tensor:
        return torch.cat([self._model.decode(rows) for rows in codes.split(ENCODE_ROWS)])

    def _level_sizes(self) -> list[int]:
        return [self._model.quantizer.codebook_size] * self.levels

    def _state(self) -> dict[str, Tensor]:
        return self._model.state_dict()

    def _restore(self, state: dict[str, Tensor]) -> None:
        self._model = self._make(len(self._mean), self._report["codebook_sizes"][0], self.batch_size)
        self._model.load_state_dict(state)
        self._model.eval()

    def _config(self) -> dict:
        return super()._config() | {
            "estimator": self.estimator,
            "latent_dim": self.latent_dim,
            "hidden": list(self.hidden),
            "epochs": self.epochs,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "beta": self.beta,
            "quantizer": self.quantizer,
        }
