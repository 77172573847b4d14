"""Training an RQ-VAE: this project's, and the same autoencoder (384-256-128-32) on vector-quantize-pytorch's
``ResidualVQ``. Processor time.

python bench/rqvae.py [--batch 512] [--levels 3] [--size 256] [--steps 12] [--threads 1] [--bf16]
python bench/rqvae.py --data FOLDER [--epochs 80]

Without --data, a step: forward, backward and AdamW on rows like embeddings, the same options and batches; "quantizer"
is forward and backward of the quantizer alone on its latents; "rest" the step with no quantizer. Best of 5 runs.

With --data, the time to equal quality on a catalogue's embeddings: what share of their energy the incumbent's codes
reconstruct after --epochs (Adam at 1e-3, codebooks from the k-means of the first batch, its defaults but for the weight
of the commitment loss), and the shortest ``RQVAETokenizer`` fit whose codes reconstruct as much. All of a fit counts,
start and report too; the incumbent's evaluation does not. For information, the incumbent from this project's start.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from vqkernels.data import load_folder
from vqkernels.info import machine
from vqkernels.layers import ResidualVQ
from vqkernels.models import RQVAE
from vqkernels.models.rqvae import CODEBOOK
from vqkernels.semantic_ids import RQVAETokenizer

HIDDEN = (256, 128)
FITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60, 80)  # epochs that are tried


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


def autoencoder(features: int, quantizer: nn.Module) -> RQVAE:
    model = RQVAE(features, hidden=HIDDEN, latent_dim=32, codebook_size=8)
    model.quantizer = quantizer
    return model


def step_times(args) -> None:
    from vector_quantize_pytorch import ResidualVQ as Theirs

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
        model = autoencoder(384, quantizer)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

        def step(model=model, optimizer=optimizer):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
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


@torch.no_grad()
def energy(model: RQVAE, z: Tensor) -> float:
    model.eval()
    left = sum(float((model(rows).reconstruction - rows).square().sum()) for rows in z.split(4096))
    model.train()
    return 1 - left / float(z.square().sum())


def incumbent(z: Tensor, args, start: bool, enough: float = 1.0) -> tuple[float, float]:
    """Energy and processor seconds after the epoch that has enough, or the last."""
    from vector_quantize_pytorch import ResidualVQ as Theirs

    torch.manual_seed(0)
    began = time.process_time()
    quantizer = Theirs(
        dim=32,
        num_quantizers=args.levels,
        codebook_size=args.size,
        kmeans_init=True,
        commitment_weight=0.25,
        rotation_trick=True,
    )
    model = autoencoder(z.shape[1], quantizer)
    if start:
        with torch.no_grad():
            model.init_pca_(z).quantizer(model.encoder(z))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    seconds = time.process_time() - began
    for epoch in range(1, args.epochs + 1):
        began = time.process_time()
        for rows in torch.randperm(len(z)).split(args.batch):
            loss = model(z[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.process_time() - began
        if epoch in (1, args.epochs) or epoch % 10 == 0 or enough < 1:
            found = energy(model, z)
            print(f"  epoch {epoch}: {found:.1%}, {seconds:.1f} s", flush=True)
            if found >= enough:
                break
    return found, seconds


def quality(args) -> None:
    x = torch.as_tensor(load_folder(args.data, items_only=True).embeddings).float()
    z = x - x.mean(0)
    z /= z.square().mean().sqrt()
    print("vector-quantize-pytorch")
    target, theirs = incumbent(z, args, start=False)
    print("RQVAETokenizer, a fit each")
    for epochs in FITS:
        began = time.process_time()
        tokenizer = RQVAETokenizer(args.levels, args.size, batch_size=args.batch, epochs=epochs, collisions="none")
        found = tokenizer.fit(x, progress=False).report()["energy"][-1]
        ours = time.process_time() - began
        print(f"  {epochs} epochs: {found:.1%}, {ours:.1f} s", flush=True)
        if found >= target:
            break
    print("vector-quantize-pytorch from the same start")
    args.epochs = math.ceil(args.epochs / 4)
    reached, same = incumbent(z, args, start=True, enough=target)
    print(f"to {target:.1%}: {theirs:.1f} s against {ours:.1f} s, {theirs / ours:.1f} times as fast; "
          f"the incumbent from the same start {reached:.1%} in {same:.1f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data folder with embeddings: time to equal quality")
    defaults = {"batch": 512, "levels": 3, "size": 256, "steps": 12, "threads": 1, "epochs": 80}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true", help="a step's products in bfloat16, in all models")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"batch {args.batch}, {args.levels} x {args.size}, {args.threads} threads; {machine()}")
    quality(args) if args.data else step_times(args)


if __name__ == "__main__":
    main()
