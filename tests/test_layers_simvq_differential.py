"""SimVQ and ResidualSimVQ against the installed vector-quantize-pytorch."""

import copy

import pytest
import torch
from scalar_pairs import close, compare, pair
from torch import nn

from vqkernels.layers.residual_sim_vq import ResidualSimVQ
from vqkernels.layers.sim_vq import SimVQ

DIM, K = 12, 24


def mlp():
    return {"codebook_transform": nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, DIM))}


TRANSFORMS = {
    "linear": ({}, dict),
    "from 6": ({"frozen_codebook_dim": 6}, dict),
    "perceptron": ({"frozen_codebook_dim": 6}, mlp),
    "init_fn": ({"init_fn": lambda codebook: codebook * 3 + 0.1}, dict),
}
LAYOUTS = {
    "last": ({}, (2, 30, DIM)),
    "last image": ({}, (2, 5, 6, DIM)),
    "first": ({"channel_first": True}, (2, DIM, 30)),
    "image": ({"channel_first": True}, (2, DIM, 5, 6)),
    "volume": ({"channel_first": True}, (2, DIM, 2, 3, 5)),
}
WEIGHTS = {"default": {}, "weights": {"commitment_weight": 3.0, "input_to_quantize_commit_loss_weight": 0.6}}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotation", (True, False), ids=("rotation", "ste"))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_sim_vq(transform, rotation, layout, weights):
    (options, make), (layout_options, shape) = TRANSFORMS[transform], LAYOUTS[layout]
    options = options | layout_options | WEIGHTS[weights]
    mine, other = pair(SimVQ, make, dim=DIM, codebook_size=K, rotation_trick=rotation, **options)
    for train in (True, False):
        mine.train(train), other.train(train)
        index = compare(mine, other, torch.randn(shape), 2e-6)
    close(mine.indices_to_codes(index), other.indices_to_codes(index), 1e-6)
    close(mine.codebook, other.codebook, 0)


@pytest.mark.parametrize("rotation", (True, False), ids=("rotation", "ste"))
def test_training_goes_the_same_way(rotation):
    """Weights after 30 steps of an optimizer on encoder and layer."""
    pairs = []
    for layer in pair(SimVQ, dim=DIM, codebook_size=K, rotation_trick=rotation):
        torch.manual_seed(2)
        encoder = nn.Linear(DIM, DIM)
        optimizer = torch.optim.Adam([*encoder.parameters(), *layer.parameters()], lr=1e-3)
        for _ in range(30):
            x = torch.randn(2, 40, DIM)
            quantized, _, loss = layer(encoder(x))
            optimizer.zero_grad()
            ((quantized - x).square().mean() + loss).backward()
            optimizer.step()
        pairs.append([p.detach() for p in (*encoder.parameters(), *layer.parameters())])
    for a, b in zip(*pairs, strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("channel_first", (False, True), ids=("last", "first"))
@pytest.mark.parametrize("rotation", (True, False), ids=("rotation", "ste"))
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("levels", (1, 3, 8))
def test_residual_sim_vq(levels, transform, rotation, channel_first):
    options, make = TRANSFORMS[transform]
    options = options | {"rotation_trick": rotation, "channel_first": channel_first, "num_quantizers": levels}
    mine, other = pair(ResidualSimVQ, make, dim=DIM, codebook_size=K, **options)
    for train in (True, False):
        mine.train(train), other.train(train)
        x = torch.randn((2, DIM, 30) if channel_first else (2, 30, DIM))
        index = compare(mine, other, x, 5e-6, return_all_codes=True)
    close(mine.get_codes_from_indices(index), other.get_codes_from_indices(index), 1e-6)
    close(mine.get_output_from_indices(index), other.get_output_from_indices(index), 1e-6)
    close(mine.codebooks, other.codebooks, 0)


@pytest.mark.parametrize("multiple", (1, 2, 4))
@pytest.mark.parametrize("channel_first", (False, True), ids=("last", "first"))
def test_residual_dropout(multiple, channel_first):
    options = {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": multiple}
    mine, other = pair(
        ResidualSimVQ, dim=DIM, codebook_size=K, num_quantizers=6, channel_first=channel_first, **options
    )
    x, used = torch.randn((2, DIM, 5, 6) if channel_first else (2, 30, DIM)), set()
    for seed in (*range(10), None):
        index = compare(mine, other, x, 5e-6, rand_quantize_dropout_fixed_seed=seed, return_all_codes=True)
        used.add(int((index.flatten(0, -2)[0] >= 0).sum()))
    assert len(used) > 1
    coarse = mine.eval()(x)[1][..., :2]
    close(mine.get_output_from_indices(coarse), other.get_output_from_indices(coarse), 1e-6)


def test_attributes():
    mine, other = pair(SimVQ, dim=DIM, codebook_size=K)
    for (
        name
    ) in "codebook_size channel_first rotation_trick input_to_quantize_commit_loss_weight commitment_weight".split():
        assert getattr(mine, name) == getattr(other, name)
    mine, other = pair(ResidualSimVQ, dim=DIM, codebook_size=K, num_quantizers=2)
    for name in (
        "codebook_size channel_first num_quantizers quantize_dropout quantize_dropout_cutoff_index "
        "quantize_dropout_multiple_of"
    ).split():
        assert getattr(mine, name) == getattr(other, name)


def test_one_transform_shared_by_all_levels():
    shared = nn.Linear(DIM, DIM)
    mine, other = pair(
        ResidualSimVQ, lambda: {"codebook_transform": copy.deepcopy(shared)}, dim=DIM, codebook_size=K, num_quantizers=3
    )
    compare(mine, other, torch.randn(2, 30, DIM), 5e-6)
    assert len(list(mine.parameters())) == len(list(other.parameters())) == 2


def test_float64():
    mine, other = pair(SimVQ, dim=DIM, codebook_size=K)
    compare(mine.double(), other.double(), torch.randn(2, 30, DIM).double(), 1e-13)
