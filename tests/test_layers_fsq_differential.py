"""FSQ, ResidualFSQ and GroupedResidualFSQ against the installed vector-quantize-pytorch.

A level may differ only where a value lies within float32 rounding of the border between two levels: theirs rounds a
tanh, ours compares with the exact border. None of the values here does.
"""

import pytest
import torch
from scalar_pairs import close, compare, pair

from vqkernels.layers.fsq import FSQ
from vqkernels.layers.residual_fsq import GroupedResidualFSQ, ResidualFSQ

LEVELS = [8, 5, 6]
MODES = {
    "tanh": {},
    "clamp": {"bound_hard_clamp": True},
    "symmetric": {"preserve_symmetry": True},
    "symmetric clamp": {"preserve_symmetry": True, "bound_hard_clamp": True},
    "noise": {"preserve_symmetry": True, "noise_dropout": 0.5},
    "rotation": {"orthogonal_rotation": True, "levels": [5, 5, 5]},
    "symmetric rotation": {"preserve_symmetry": True, "orthogonal_rotation": True, "levels": [4, 4, 4]},
}
WIDTHS = {
    "own": {},
    "two groups": {"num_codebooks": 2},
    "kept": {"keep_num_codebooks_dim": True},
    "projected": {"dim": 7},
    "without bias": {"dim": 7, "num_codebooks": 2, "projection_has_bias": False},
}
LAYOUTS = {
    "last": ({}, lambda d: (2, 30, d)),
    "first": ({"channel_first": True}, lambda d: (2, d, 30)),
    "image": ({}, lambda d: (2, d, 5, 6)),
    "volume": ({"channel_first": True}, lambda d: (2, d, 2, 3, 5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", MODES)
def test_fsq(mode, width, layout):
    options, shape = LAYOUTS[layout]
    mine, other = pair(FSQ, **{"levels": LEVELS} | MODES[mode] | WIDTHS[width] | options)
    assert torch.equal(mine.implicit_codebook, other.implicit_codebook)
    for train in (True, False):
        mine.train(train), other.train(train)
        x = 1.5 * torch.randn(shape(mine.dim))
        index = compare(mine, other, x)
        if not mine.has_projections and "rotation" not in mode:
            assert torch.equal(mine(x)[0], other(x)[0]) or mode == "noise", "the same bits"
    assert torch.equal(mine(x)[0], mine.indices_to_codes(index))
    if not (width == "kept" and layout in ("image", "volume")) and layout != "volume":
        close(mine.indices_to_codes(index), other.indices_to_codes(index), 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_codes_and_indices(mode):
    mine, other = pair(FSQ, **{"levels": [7, 4, 5]} | MODES[mode])
    index = torch.arange(mine.codebook_size).view(-1, 4 if mine.codebook_size % 4 == 0 else 5)
    for function in ("indices_to_codes", "indices_to_level_indices"):
        close(getattr(mine, function)(index), getattr(other, function)(index), 1e-6)
    codes = mine.implicit_codebook
    close(mine.codes_to_indices(codes), other.codes_to_indices(codes), 0)
    x = torch.randn(2, 30, 3)
    close(mine.quantize(x), other.quantize(x), 0)
    close(mine.bound(x, hard_clamp=True), other.bound(x, hard_clamp=True), 0)
    close(mine.bound(x), other.bound(x), 0)
    close(mine.symmetry_preserving_bound(x), other.symmetry_preserving_bound(x), 0)


@pytest.mark.parametrize("levels", ([3], [5, 4], [8, 5, 5, 5], [8, 6, 5], [7, 5, 5, 5, 5], [16, 16], [33], [64], [255]))
def test_levels(levels):
    mine, other = pair(FSQ, levels=levels)
    compare(mine, other, 2 * torch.randn(2, 300, len(levels)))
    close(mine.implicit_codebook, other.implicit_codebook, 0)
    with_two = pair(FSQ, levels=[2, *levels], preserve_symmetry=True)
    compare(*with_two, torch.randn(2, 300, len(levels) + 1))


def test_without_indices_and_attributes():
    mine, other = pair(FSQ, levels=LEVELS, dim=7, return_indices=False, scale=2.0)
    compare(mine, other, torch.randn(2, 30, 7))
    mine, other = pair(FSQ, levels=tuple(LEVELS), num_codebooks=2, allowed_dtypes=(torch.float32,))
    for name in (
        "scale dim codebook_dim codebook_size num_codebooks effective_codebook_dim keep_num_codebooks_dim channel_first "
        "has_projections return_indices allowed_dtypes force_quantization_f32 preserve_symmetry noise_dropout "
        "bound_hard_clamp orthogonal_rotation"
    ).split():
        assert getattr(mine, name) == getattr(other, name), name
    assert torch.equal(mine._levels, other._levels) and torch.equal(mine._basis, other._basis)
    assert len(list(mine.children())) == len(list(other.children())) == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_dtypes(dtype, mode):
    mine, other = pair(FSQ, **{"levels": LEVELS} | MODES[mode])
    if mode == "noise" or ("rotation" in mode and dtype != torch.float64):
        # theirs rounds its outermost code beyond 1, where the clamp after the noise stops the gradient; and it
        # multiplies float32 codes by a half-precision matrix
        return
    mine, other, x = mine.to(dtype), other.to(dtype), torch.randn(2, 30, 3).to(dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps  # their constants are float32
    compare(mine, other, x, tolerance)


def test_autocast_dtypes():
    for options in ({}, {"dim": 7}):
        mine, other = pair(FSQ, levels=LEVELS, **options)
        x = torch.randn(2, 30, mine.dim)
        with torch.autocast("cpu", torch.bfloat16):
            a, b = mine(x), other(x)
        assert a[0].dtype == b[0].dtype and a[1].dtype == b[1].dtype


RESIDUAL = {
    "default": {},
    "one": {"num_quantizers": 1},
    "eight": {"num_quantizers": 8, "levels": [5, 4]},
    "projected": {"dim": 7},
    "channels first": {"dim": 7, "is_channel_first": True},
    "tanh": {"bound_hard_clamp": False},
    "soft clamp": {"bound_hard_clamp": False, "soft_clamp_input_value": 2.0},
    "soft clamps": {"bound_hard_clamp": False, "soft_clamp_input_value": [1.0, 2.0, 3.0]},
    "noise": {"noise_dropout": 0.5},
    "rotation": {"orthogonal_rotation": True, "levels": [5, 5, 5]},
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_fsq(name):
    mine, other = pair(ResidualFSQ, **{"levels": LEVELS, "num_quantizers": 3} | RESIDUAL[name])
    first = mine.is_channel_first
    for train in (True, False):
        mine.train(train), other.train(train)
        x = 1.5 * torch.randn((2, mine.dim, 30) if first else (2, 30, mine.dim))
        kwargs = {} if first or name == "rotation" else {"return_all_codes": True}
        index = compare(mine, other, x, 1e-5, **kwargs)
    quantized = mine(x)[0]
    assert torch.equal(mine.get_output_from_indices(index), quantized)
    close(mine.codebooks, other.codebooks, 0), close(mine.scales, other.scales, 0)
    if not first and name != "rotation":  # theirs decodes neither
        close(mine.get_output_from_indices(index), other.get_output_from_indices(index), 1e-5)
        close(mine.get_codes_from_indices(index), other.get_codes_from_indices(index), 1e-6)


@pytest.mark.parametrize("multiple", (1, 2, 4))
def test_residual_dropout(multiple):
    options = {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": multiple}
    mine, other = pair(ResidualFSQ, levels=LEVELS, num_quantizers=6, dim=7, **options)
    x, used = torch.randn(2, 30, 7), set()
    for seed in (*range(10), None):
        a = results_with_int32(mine, x, seed)
        b = results_with_int32(other, x, seed)
        for u, v in zip(a, b, strict=True):
            close(u, v, 1e-5)
        used.add(int((a[1][0, 0] >= 0).sum()))
    assert len(used) > 1
    coarse = a[1][..., :1]
    close(mine.get_output_from_indices(coarse), other.get_output_from_indices(coarse), 1e-6)


def results_with_int32(layer, x, seed):
    """Theirs returns int64 when a level was dropped, and int32 otherwise."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    quantized, index = layer(x, rand_quantize_dropout_fixed_seed=seed)
    quantized.square().sum().backward()
    return quantized.detach(), index.int(), x.grad


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"noise_dropout": 0.5},
        {"quantize_dropout": True},
        {"quantize_dropout": True, "noise_dropout": 0.5},
        {"accept_image_fmap": True, "is_channel_first": True},
        {"bound_hard_clamp": False},
    ),
)
def test_grouped_residual_fsq(options):
    mine, other = pair(GroupedResidualFSQ, dim=8, groups=2, levels=LEVELS, num_quantizers=3, **options)
    image = "accept_image_fmap" in options
    for train in (True, False):
        mine.train(train), other.train(train)
        x = torch.randn((2, 8, 5, 6) if image else (2, 30, 8))
        if train and "quantize_dropout" in options:
            torch.manual_seed(1), (a := mine(x)), torch.manual_seed(1), (b := other(x))
            close(a[0], b[0], 1e-6), close(a[1], b[1].int(), 0)
            continue
        index = compare(mine, other, x, 1e-5, **({} if image else {"return_all_codes": True}))
    close(mine.codebooks, other.codebooks, 0)
    assert torch.equal(mine.get_output_from_indices(index), mine(x)[0])
    if not image:
        close(mine.get_output_from_indices(index), other.get_output_from_indices(index), 1e-5)
        close(mine.get_codes_from_indices(index), other.get_codes_from_indices(index), 1e-6)
