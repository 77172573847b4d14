"""A training step of an RQ-VAE: this project's residual quantizer and vector-quantize-pytorch's in the same model, with
the same options, on the same batches.

python bench/rqvae.py [--batch 512] [--levels 3] [--size 256] [--steps 60] [--threads 1]

The step is forward, backward and AdamW of an MLP autoencoder (384-256-128-32) on rows like embeddings; "quantizer" is
forward and backward of the quantizer alone on its latents; "rest" the step with no quantizer. Best of 5 runs.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from vqkernels.info import machine
from vqkernels.layers import ResidualVQ
from vqkernels.models import RQVAE
from vqkernels.models.rqvae import CODEBOOK


class Nothing(nn.Module):
    def forward(self, z):
        return z, None, z.new_zeros(1)


def best(work, steps: int, runs: int = 5) -> float:
    """Milliseconds of processor time for one of ``steps`` calls."""
    times = []
    for _ in range(runs):
        began = time.process_time()
        for _ in range(steps):
            work()
        times.append((time.process_time() - began) / steps * 1e3)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 512), ("levels", 3), ("size", 256), ("steps", 12), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from vector_quantize_pytorch import ResidualVQ as Theirs

    print(f"batch {args.batch}, {args.levels} x {args.size}, {args.threads} threads; {machine()}")
    x = torch.randn(args.batch, 384) + 2 * torch.randn(64, 384)[torch.randint(64, (args.batch,))]
    options = {"dim": 32, "num_quantizers": args.levels, "codebook_size": args.size, "commitment_weight": 0.25}
    quantizers = {
        "vqkernels": ResidualVQ(**options, **CODEBOOK, estimator="rotation"),
        "vector-quantize-pytorch": Theirs(**options, **CODEBOOK, rotation_trick=True),
        "rest": Nothing(),
    }
    found = {}
    for name, quantizer in quantizers.items():
        torch.manual_seed(0)
        model = RQVAE(384, hidden=(256, 128), latent_dim=32, codebook_size=8)
        model.quantizer = quantizer
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def step(model=model, optimizer=optimizer):
            loss = model(x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        latent = model.encoder(x).detach().requires_grad_()

        def alone(quantizer=quantizer, z=latent):
            quantized, _, losses = quantizer(z)
            (quantized.sum() + losses.sum()).backward()

        step()
        found[name] = best(step, args.steps), best(alone, args.steps) if name != "rest" else 0.0
        print(f"{name}: step {found[name][0]:.2f} ms, quantizer alone {found[name][1]:.2f} ms", flush=True)
    (ours, mine), (theirs, its), _ = found.values()
    print(f"step {theirs / ours:.1f} times as fast, quantizer {its / mine:.1f} times")


if __name__ == "__main__":
    main()
