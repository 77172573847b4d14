"""Rows that are no numbers, through layers with projections: alone, and the weights learn as if they were not there."""

import pytest
import torch

from vqkernels import layers
from vqkernels.layers.factorized_residual_vq import FactorizedResidualVQ

DIM = 6
LAYERS = {
    "vq": lambda: layers.VectorQuantize(DIM, 16, codebook_dim=3),
    "vq-heads": lambda: layers.VectorQuantize(DIM, 16, codebook_dim=4, heads=2, separate_codebook_per_head=True),
    "vq-cosine-layernorm": lambda: layers.VectorQuantize(
        DIM, 16, codebook_dim=3, use_cosine_sim=True, layernorm_after_project_in=True
    ),
    "vq-learnable": lambda: layers.VectorQuantize(DIM, 16, codebook_dim=3, learnable_codebook=True, ema_update=False),
    "residual": lambda: layers.ResidualVQ(dim=DIM, codebook_dim=3, num_quantizers=2, codebook_size=16),
    "residual-sampled": lambda: layers.ResidualVQ(
        dim=DIM, codebook_dim=3, num_quantizers=2, codebook_size=16, quant_grad_frac=0.5
    ),
    "fsq": lambda: layers.FSQ([5, 4, 3], dim=DIM),
    "fsq-symmetric": lambda: layers.FSQ([5, 4, 3], dim=DIM, preserve_symmetry=True),
    "residual-fsq": lambda: layers.ResidualFSQ(levels=[5, 4, 3], num_quantizers=2, dim=DIM),
    "lfq": lambda: layers.LFQ(codebook_size=8, dim=DIM),
    "lfq-cosine": lambda: layers.LFQ(codebook_size=8, dim=DIM, cosine_sim_project_in=True, spherical=True),
    "residual-lfq": lambda: layers.ResidualLFQ(dim=DIM, num_quantizers=2, codebook_size=8),
    "latent": lambda: layers.LatentQuantize([5, 4, 3], dim=DIM),
    "fsp": lambda: layers.FSP([5, 4, 3], dim=DIM, quantize_rate=1.0),
    "factorized": lambda: FactorizedResidualVQ(DIM, 2, 16, 3, channel_first=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_learn_as_if_they_were_not_there(name):
    first = name == "latent"
    x = torch.randn(2, 12, DIM)
    bad = x.clone()
    bad[:, 9, 1], bad[0, 10, :2], bad[1, 10], bad[1, 11, 5] = torch.nan, torch.inf, torch.nan, -torch.inf
    bad[0, 11, 0], bad[0, 11, 1] = 1e38, -torch.inf
    results = []
    for rows in (x[:, :9], bad):
        torch.manual_seed(3)
        layer = LAYERS[name]()
        rows = rows.clone().requires_grad_()
        torch.manual_seed(4)
        quantized, index, *losses = layer(rows.movedim(-1, 1) if first else rows)
        loss = losses[0] if losses else torch.zeros(())
        quantized = quantized.movedim(1, -1) if first else quantized
        used = quantized[:, :9]
        (used.square().sum() + loss.sum()).backward()
        results.append((used, index[:, :9], loss, rows.grad[:, :9], *(p.grad for p in layer.parameters())))
    torch.testing.assert_close(results[1], results[0], msg=lambda text: f"{name}: {text}")
    assert (index[:, 9:] == -1).all() and quantized[:, 9:].isnan().all()
    assert (rows.grad[:, 9:] == 0).all()
    with torch.no_grad():
        quantized, index, *_ = layer.eval()(bad.movedim(-1, 1) if first else bad)
        assert (index[:, 9:] == -1).all() and (quantized.movedim(1, -1) if first else quantized)[:, 9:].isnan().all()
