"""How good the gradient is that an estimator gives the encoder: a measurement on a trained model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import VQVAE
from ..ops import nearest_codeword, rotation_trick

KINDS = ("ste", "rotation", "reflection")
DRAWS = 4096  # pairs of opposite perturbations of a vector


def gradient_quality(model: VQVAE, images: Tensor, seed: int = 0) -> dict:
    """For each estimator, on the same model [one codebook], images [B, C, H, W] and gradient of the reconstruction's
    squared error:

    * ``angle``: degrees, mean over vectors z with codeword q of the difference between the angle of q and its gradient
      and the angle of z and the gradient it is given. Zero is what the rotation trick promises.
    * ``cosine``: of the gradient given to z with the true one, mean over images. The loss is a step function of z, so
      the true one is that of its average over z + noise, the noise as large as the quantization error. One vector an
      image is moved, the loss of each codeword in its place computed, and the average taken over draws.

    ``images``: how many had a true gradient other than zero (with a collapsed codebook the code may never change).
    """
    model.eval()
    codebook = model.codebook
    with torch.no_grad():
        z = model.encoder(images).movedim(1, -1)
    size, dim = z.shape[:-1], z.shape[-1]
    z = z.reshape(-1, dim)
    indices, distances = nearest_codeword(z, codebook)
    q = codebook[indices].requires_grad_()
    as_latent = lambda vectors: vectors.unflatten(0, size).movedim(-1, 1)  # noqa: E731
    squared = (model.decoder(as_latent(q)) - images).square().flatten(1).sum(1)
    (gradient,) = torch.autograd.grad(squared.sum(), q)
    q = q.detach()

    generator = torch.Generator().manual_seed(seed)
    per_image = size[1] * size[2]
    chosen = torch.arange(size[0]) * per_image + torch.randint(per_image, (size[0],), generator=generator)
    true = _smoothed_gradient(model, images, q, z, chosen, codebook, distances.mean().sqrt() / dim**0.5, generator)
    moves = true.norm(dim=1) > 0
    out: dict = {"images": int(moves.sum())}
    for kind in KINDS:
        leaf = z.clone().requires_grad_()
        (given,) = torch.autograd.grad(rotation_trick(leaf, q, kind=kind), leaf, gradient)
        angle = (_angle(z, given) - _angle(q, gradient)).abs().nanmean()
        out[kind] = {"angle": float(angle)}
        if moves.any():
            out[kind]["cosine"] = float(F.cosine_similarity(given[chosen][moves], true[moves]).mean())
    return out


@torch.no_grad()
def _smoothed_gradient(model, images, q, z, chosen, codebook, spread, generator) -> Tensor:
    """[B, D]: the gradient, for one vector z an image, of the squared error averaged over z + spread noise."""
    batch, (K, dim) = len(images), codebook.shape
    positions = len(q) // batch
    latents = q.view(batch, positions, dim)
    rows = []
    for image, place in enumerate((chosen % positions).tolist()):
        tried = latents[image].repeat(K, 1, 1)
        tried[:, place] = codebook
        height = images.shape[2] // model.downsample
        tried = tried.unflatten(1, (height, -1)).movedim(-1, 1)
        loss = torch.cat(
            [(model.decoder(part) - images[image]).square().flatten(1).sum(1) for part in tried.split(256)]
        )
        noise = torch.randn(DRAWS, dim, generator=generator)
        above = nearest_codeword(z[chosen[image]] + spread * noise, codebook)[0]
        below = nearest_codeword(z[chosen[image]] - spread * noise, codebook)[0]
        rows.append(((loss[above] - loss[below])[:, None] * noise).mean(0) / (2 * spread))
    return torch.stack(rows)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between rows; NaN where one is zero."""
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return cosine.clamp(-1, 1).acos().rad2deg()
