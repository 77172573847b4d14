"""LatentQuantize and FSP against the installed vector-quantize-pytorch."""

import pytest
import torch
from scalar_pairs import close, compare, pair, theirs

from vqkernels.layers.finite_scalar_perturbation import CDFS, FSP, PRESETS, VectorNorm, batch_stats, build_cdf_act
from vqkernels.layers.latent_quantization import LatentQuantize

LEVELS = [5, 6, 8]
SHAPES = {"token": (), "sequence": (30,), "image": (5, 6), "volume": (2, 3, 5)}

# theirs truncates (digit + rounding error) to an index, which is off by one for numbers of levels such as 6
EXACT = [5, 4, 8]
LATENT = {
    "own": {"dim": 3},
    "projected": {"dim": 7},
    "four groups": {"dim": 12, "num_codebooks": 4},
    "projected groups": {"dim": 16, "num_codebooks": 4},
    "kept": {"dim": 3, "keep_num_codebooks_dim": True},
    "one number": {"dim": 7, "levels": 5, "codebook_dim": 4},
    "fixed": {"dim": 3, "optimize_values": False},
    "weights": {"dim": 7, "commitment_loss_weight": 0.7, "quantization_loss_weight": 0.3},
    "no commitment": {"dim": 3, "commitment_loss_weight": 0.0},
    "no loss": {"dim": 3, "commitment_loss_weight": 0.0, "quantization_loss_weight": 0.0},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LATENT)
def test_latent_quantize(name, shape):
    mine, other = pair(LatentQuantize, **{"levels": EXACT} | LATENT[name])
    for train in (True, False):
        mine.train(train), other.train(train)
        x = 0.5 * torch.randn(4, mine.dim, *SHAPES[shape])
        index = compare(mine, other, x, 2e-6)
        close(mine.indices_to_codes(index), other.indices_to_codes(index), 1e-6)
        close(mine.indices_to_codes(index, False), other.indices_to_codes(index, False), 1e-6)
        assert torch.equal(mine.indices_to_codes(index), mine(x)[0])
    close(mine.implicit_codebook, other.implicit_codebook, 1e-6)


def test_latent_parts():
    mine, other = pair(LatentQuantize, levels=[3, 4, 5, 9], dim=4)
    codes = mine.implicit_codebook
    close(mine.codes_to_indices(codes), other.codes_to_indices(codes), 0)
    x = 0.5 * torch.randn(40, 4)
    close(mine.quantize(x), other.quantize(x), 1e-6)
    close(mine.commitment_loss(x, codes[:40]), other.commitment_loss(x, codes[:40]), 1e-6)
    close(mine.quantization_loss(x, codes[:40]), other.quantization_loss(x, codes[:40]), 1e-6)
    for a, b in zip(mine.values_per_latent, other.values_per_latent, strict=True):
        close(a.detach(), b.detach(), 0)
    for name in ("dim codebook_dim codebook_size num_codebooks effective_codebook_dim has_projections").split():
        assert getattr(mine, name) == getattr(other, name)
    fixed = LatentQuantize(levels=[3, 4], dim=2, optimize_values=False).values_per_latent
    assert len(fixed) == 2 and torch.equal(fixed[-1], torch.arange(4) / 4 - 0.5) and len(list(fixed)) == 2


FSPS = {
    "default": {},
    "projected": {"dim": 7},
    "without bias": {"dim": 7, "projection_has_bias": False},
    "half the values": {"quantize_rate": 0.5},
    "all values": {"quantize_rate": 1.0},
    "inverse": {"need_inv_act": True, "quantize_rate": 0.3},
    "inverse, projected": {"need_inv_act": True, "dim": 7},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channel_first", (False, True), ids=("last", "first"))
@pytest.mark.parametrize("name", FSPS)
def test_fsp(name, channel_first, shape):
    mine, other = pair(FSP, **{"levels": LEVELS, "channel_first": channel_first} | FSPS[name])
    lengths = SHAPES[shape]
    for train in (True, False):
        mine.train(train), other.train(train)
        x = torch.randn((4, mine.dim, *lengths) if channel_first else (4, *lengths, mine.dim))
        index = compare(mine, other, x)
    close(mine.indices_to_codes(index), other.indices_to_codes(index), 1e-6)
    assert torch.equal(mine.indices_to_codes(index), mine(x)[0])


@pytest.mark.parametrize("inverse", (False, True))
@pytest.mark.parametrize("act", CDFS)
@pytest.mark.parametrize("norm", PRESETS)
def test_fsp_functions_and_norms(norm, act, inverse):
    mine, other = pair(
        FSP, levels=LEVELS, act_name=act, need_inv_act=inverse, vector_norm=norm, quantize_rate=0.4
    )  # fmt: skip
    compare(mine, other, torch.randn(2, 50, 3))
    compare(mine, other, torch.randn(2, 50, 3), eps=1e-3)


def test_fsp_parts():
    mine, other = pair(FSP, levels=LEVELS)
    digits = torch.stack([torch.randint(0, count, (20,)) for count in LEVELS], -1)
    index = mine.level_indices_to_indices(digits)
    close(index, other.level_indices_to_indices(digits), 0)
    close(mine.indices_to_level_indices(index), other.indices_to_level_indices(index), 0)
    close(mine.indices_to_act_value(index), other.indices_to_act_value(index), 0)
    p = torch.rand(20, 3)
    for a, b in zip(mine.quantize_act_value(p, 1e-6), other.quantize_act_value(p, 1e-6), strict=True):
        close(a, b, 1e-6)
    for name in ("dim codebook_dim codebook_size channel_first act_name need_inv_act quantize_rate").split():
        assert getattr(mine, name) == getattr(other, name)
    module = theirs.finite_scalar_perturbation
    for name in CDFS:
        for a, b, v in zip(
            build_cdf_act(name), module.build_cdf_act(name), (torch.randn(50), torch.rand(50)), strict=True
        ):
            close(a(v), b(v), 1e-6)
        act, inverse = build_cdf_act(name)
        assert (mine_act := FSP(LEVELS, act_name=name)).act_func is act and mine_act.inv_act_func is inverse
    x = torch.randn(50, 3)
    for a, b in zip(batch_stats(x), module.batch_stats(x), strict=True):
        close(a, b, 1e-5)
    options = {f"l{i}_{kind}": 0.1 * i for i in (1, 2, 3, 4) for kind in ("target", "weight")}
    close(VectorNorm(**options)(x)[0], module.VectorNorm(**options)(x)[0], 1e-5)
