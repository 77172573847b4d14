"""VQ-GAN: a VQ-VAE whose pictures are also judged by a perceptual loss and by a discriminator of patches (Esser et al.
2021, arXiv 2012.09841)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .features import PerceptualLoss
from .vqvae import VQVAE

LARGEST_WEIGHT = 1e4  # of the adversarial loss, as published


class VQGANOutput(NamedTuple):
    """``reconstruction`` like the input; ``indices`` int64 [B, h, w], [B, h, w, Q] for a residual quantizer; ``loss``:
    ``reconstruction_loss`` (mean absolute error) + ``perceptual_loss`` and ``commitment_loss`` (weights included) +
    ``adaptive_weight`` * ``adversarial_loss`` + ``discriminator_loss``. The last three are 0 without the discriminator.
    """

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor
    perceptual_loss: Tensor
    adversarial_loss: Tensor
    discriminator_loss: Tensor
    adaptive_weight: Tensor


class VQGAN(VQVAE):
    """A VQVAE, and the losses that keep its pictures sharp. Images have 1 or 3 channels and values in [0, 1].

    One backward pass of ``loss`` trains everything: the autoencoder gets no gradient from ``discriminator_loss``, the
    discriminator none from the rest. (The paper takes the two steps one after the other.)

    ``perceptual_weight``: of ``PerceptualLoss``; 0 needs no feature network. ``adversarial_weight``: of the adversarial
    loss, on top of the adaptive weight |gradient of the other reconstruction losses| / |gradient of the adversarial
    loss| at the decoder's last layer. ``discriminator_width``, ``discriminator_layers``: of ``PatchDiscriminator``.
    The rest as in ``VQVAE``.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.8,
        discriminator_width: int = 64,
        discriminator_layers: int = 3,
        **options,
    ):
        super().__init__(channels, **options)
        self.perceptual_weight, self.adversarial_weight = perceptual_weight, adversarial_weight
        self.discriminator = PatchDiscriminator(channels, discriminator_width, discriminator_layers)
        self.perceptual: PerceptualLoss | None = None  # no state: made by the first training step that needs it

    def forward(self, images: Tensor, adversarial: bool = True) -> VQGANOutput:
        """``adversarial``: whether the discriminator takes part, which the paper delays until the pictures are fair. In
        evaluation it never does. In training mode the codewords move, so call it once a step."""
        out = super().forward(images)
        zero = out.loss.new_zeros(())
        reconstruction_loss, perceptual = F.l1_loss(out.reconstruction, images), zero
        if self.perceptual_weight:
            if self.perceptual is None:
                self.perceptual = PerceptualLoss().to(images.device)
            perceptual = self.perceptual_weight * self.perceptual(out.reconstruction, images)
        generator, discriminator, weight = zero, zero, zero
        if adversarial and self.training:
            # the discriminator as it is: no gradient of the adversarial loss reaches its weights
            fixed = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            generator = -functional_call(self.discriminator, fixed, (out.reconstruction,)).mean()
            weight = self._adaptive_weight(reconstruction_loss + perceptual, generator)
            discriminator = self._discriminator_loss(images, out.reconstruction.detach())
        loss = reconstruction_loss + perceptual + out.commitment_loss + weight * generator + discriminator
        return VQGANOutput(
            out.reconstruction,
            out.indices,
            loss,
            reconstruction_loss,
            out.commitment_loss,
            perceptual,
            generator,
            discriminator,
            weight,
        )

    def _adaptive_weight(self, others: Tensor, adversarial: Tensor) -> Tensor:
        last = self.decoder[-1].weight
        theirs, its = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (others, adversarial))
        return self.adversarial_weight * (theirs / (its + 1e-4)).clamp(0.0, LARGEST_WEIGHT).detach()

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """The hinge loss."""
        return 0.5 * (F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake)).mean())


class PatchDiscriminator(nn.Module):
    """Images [B, channels, H, W] to a verdict on every patch, [B, 1, h, w]: above 0 for real ones (Isola et al. 2017,
    arXiv 1611.07004). ``layers``: halvings of the resolution; a verdict of 3 sees 70 x 70 pixels, of 2 it sees
    34 x 34."""

    def __init__(self, channels: int, width: int = 64, layers: int = 3):
        super().__init__()
        steps: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        inputs = width
        for layer in range(1, layers + 1):
            outputs, stride = width * min(2**layer, 8), 2 if layer < layers else 1
            steps += [nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
            inputs = outputs
        self.layers = nn.Sequential(*steps, nn.Conv2d(inputs, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
