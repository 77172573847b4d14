"""GroupedResidualVQ and HierarchicalVQ: beside vector-quantize-pytorch's, and on their own."""

import pytest
import torch
from layer_pairs import BATCH, DIM, K, close, close_states, compare, pair, same

TOKENS = 20

GROUPED = {
    "plain": {},
    "one group": {"groups": 1},
    "shared": {"shared_codebook": True},
    "dropout": {"quantize_dropout": True},
    "more dropout": {"quantize_dropout": True, "num_quantizers": 6},
    "dropout in pairs": {"quantize_dropout": True, "num_quantizers": 5, "quantize_dropout_multiple_of": 2},
    "narrow": {"codebook_dim": 3},
    "cosine": {"use_cosine_sim": True},
    "implicit": {"implicit_neural_codebook": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "diveq": {"diveq": True},
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_residual_vq(name):
    options = {"dim": DIM, "groups": 4, "num_quantizers": 3, "codebook_size": K} | GROUPED[name]
    mine, other = pair("GroupedResidualVQ", **options)
    for _ in range(3):
        index = compare(mine, other, torch.randn(BATCH, TOKENS, DIM))
    assert index.shape == (options["groups"], BATCH, TOKENS, options["num_quantizers"])
    close(mine.codebooks, other.codebooks)
    close(mine.get_codes_from_indices(index), other.get_codes_from_indices(index))
    close(mine.get_output_from_indices(index), other.get_output_from_indices(index))
    x = torch.randn(BATCH, TOKENS, DIM)
    torch.manual_seed(1)
    a = mine(x, return_all_codes=True, freeze_codebook=True)
    torch.manual_seed(1)
    b = other(x, return_all_codes=True, freeze_codebook=True)
    assert len(a[3]) == len(b[3]) == options["groups"]
    for u, v in zip(a[3], b[3], strict=True):
        close(u.detach(), v.detach())
    if name != "diveq":
        mine.eval(), other.eval()
        compare(mine, other, x)


def test_grouped_residual_vq_with_a_mask():
    mine, other = pair("GroupedResidualVQ", dim=DIM, groups=2, num_quantizers=3, codebook_size=K)
    for train in (True, False):
        mine.train(train), other.train(train)
        compare(mine, other, torch.randn(BATCH, TOKENS, DIM), mask=torch.rand(BATCH, TOKENS) < 0.6)


HIERARCHICAL = {
    "plain": ({}, (BATCH, DIM, 16)),
    "channels last": ({"channel_first": False}, (BATCH, 16, DIM)),
    "image": ({"accept_image_fmap": True, "scales": (1, (2, 3), 5)}, (BATCH, DIM, 6, 7)),
    "volume": ({"accept_3d_fmap": True, "scales": (1, 2, 3)}, (BATCH, DIM, 4, 5, 3)),
    "not shared": ({"shared_codebook": False, "codebook_size": (8, 16, 24)}, (BATCH, DIM, 16)),
    "two convolutions": ({"share_quant_resi": 2, "rotation_trick": True}, (BATCH, DIM, 16)),
    "convolution per level": ({"share_quant_resi": 0, "commitment_weight": 0.3}, (BATCH, DIM, 16)),
    "no convolution": ({"quant_resi": 0.0}, (BATCH, DIM, 16)),
    "sometimes dropout": ({"nested_dropout": 0.5}, (BATCH, DIM, 16)),
    "always dropout": (
        {"nested_dropout": 1.0, "share_quant_resi": 3, "nested_dropout_min_levels": 2},
        (BATCH, DIM, 16),
    ),
    "sampling": ({"stochastic_sample_codes": True}, (BATCH, DIM, 16)),
    # with a shared codebook, a later level's EMA step changes what the backward pass of theirs reads
    "orthogonal": (
        {"orthogonal_reg_weight": 0.5, "orthogonal_reg_max_codes": None, "shared_codebook": False},
        (BATCH, DIM, 16),
    ),
    "orthogonal few": ({"orthogonal_reg_weight": 0.5, "orthogonal_reg_max_codes": 5}, (BATCH, DIM, 16)),
}


@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_hierarchical_vq(name, masked):
    options, shape = HIERARCHICAL[name]
    defaults = {"scales": (1, 4, 16), "codebook_size": K, "kmeans_init": False, "threshold_ema_dead_code": 0}
    mine, other = pair("HierarchicalVQ", dim=DIM, **(defaults | options))
    spatial = shape[1:-1] if name == "channels last" else shape[2:]
    for seed in range(4):
        mine.train(seed < 3), other.train(seed < 3)
        x, mask = torch.randn(shape), torch.rand(BATCH, *spatial) < 0.6
        results = []
        for layer in (mine, other):
            torch.manual_seed(seed)
            v = x.clone().requires_grad_()
            layer.zero_grad()
            quantized, index, loss, cutoff = layer(v, mask=mask if masked else None, return_cutoff=True)
            if seed < 3:
                (quantized.square().sum() + loss).backward()
            grads = [v.grad, *(p.grad for p in layer.parameters())]
            results.append((quantized, *index, loss, *grads, torch.tensor(-1 if cutoff is None else cutoff)))
        for a, b in zip(*results, strict=True):
            same(a, b, name)
        close_states(mine, other)
    close(mine.get_output_from_indices(index, spatial).detach(), other.get_output_from_indices(index, spatial).detach())
    if not masked:
        close(mine.get_output_from_indices(index, spatial).detach(), quantized.detach())


def test_hierarchical_vq_lens_and_temperature():
    mine, other = pair(
        "HierarchicalVQ",
        dim=DIM,
        codebook_size=K,
        scales=(1, 3, 12),
        kmeans_init=False,
        threshold_ema_dead_code=0,
        stochastic_sample_codes=True,
    )
    x, lens = torch.randn(BATCH, DIM, 16), torch.tensor([16, 5])
    for temperature in (None, 0.0, 2.0):
        results = []
        for layer in (mine, other):
            torch.manual_seed(4)
            quantized, index, loss = layer(x, lens=lens, sample_codebook_temp=temperature)
            results.append((quantized, *index, loss))
        for a, b in zip(*results, strict=True):
            same(a, b)
