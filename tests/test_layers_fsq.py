"""FSQ, ResidualFSQ and GroupedResidualFSQ on their own: round trips, gradients by the formula, dtypes, hostile input."""

import copy
import math
import pickle

import pytest
import torch

from vqkernels.layers.fsq import FSQ
from vqkernels.layers.residual_fsq import GroupedResidualFSQ, ResidualFSQ

LEVELS = [8, 5, 6]
MODES = {
    "tanh": {},
    "clamp": {"bound_hard_clamp": True},
    "symmetric": {"preserve_symmetry": True},
    "symmetric clamp": {"preserve_symmetry": True, "bound_hard_clamp": True},
}
LAYERS = {
    "fsq": lambda: FSQ(LEVELS),
    "projected": lambda: FSQ(LEVELS, dim=7, num_codebooks=2),
    "symmetric": lambda: FSQ(LEVELS, preserve_symmetry=True),
    "clamp": lambda: FSQ(LEVELS, bound_hard_clamp=True),
    "rotated": lambda: FSQ([5, 5, 5], orthogonal_rotation=True),
    "residual": lambda: ResidualFSQ(levels=LEVELS, num_quantizers=2, dim=7),
    "residual tanh": lambda: ResidualFSQ(levels=LEVELS, num_quantizers=3, bound_hard_clamp=False),
    "residual rotated": lambda: ResidualFSQ(levels=[5, 5, 5], num_quantizers=3, orthogonal_rotation=True),
    "grouped": lambda: GroupedResidualFSQ(dim=8, groups=2, levels=LEVELS, num_quantizers=3),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def decoder(layer):
    return layer.indices_to_codes if isinstance(layer, FSQ) else layer.get_output_from_indices


# codes and indices


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("levels", ([3], [4, 3], [8, 5, 5, 5], [16, 7], [257], [1000], [2, 9, 2]))
def test_every_code_survives_the_round_trip(levels, mode):
    if 2 in levels and "symmetric" not in mode:
        return
    layer = FSQ(levels, **MODES[mode])
    index = torch.arange(layer.codebook_size, dtype=torch.int32)
    codes = layer.indices_to_codes(index)
    assert torch.equal(codes, layer.implicit_codebook) and len(codes.unique(dim=0)) == len(codes)
    assert codes.abs().max() <= 1.0 + 1e-6
    assert torch.equal(layer.codes_to_indices(codes), index)
    digits = layer.indices_to_level_indices(index)
    assert torch.equal((digits * layer._basis).sum(-1), index.long()) and (digits < layer._levels).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_every_level_is_reached_in_every_dtype(mode, dtype):
    for count in (3, 4, 5, 8, 16, 33, 64):
        layer = FSQ([count], **MODES[mode]).to(dtype)
        quantized, index = layer(torch.linspace(-6.0, 6.0, 20_001).unsqueeze(-1).to(dtype))
        assert quantized.dtype == dtype and torch.equal(index.unique(), torch.arange(count, dtype=torch.int32))
        assert len(quantized.unique()) == count, "levels that fell together"
        assert torch.equal(layer.indices_to_codes(index), quantized)
        order = index.diff()
        assert (order >= 0).all(), "levels follow the value"


def test_half_precision_quantizes_as_float32_does():
    for mode in MODES.values():
        layer, x = FSQ([32, 33], **mode), torch.randn(500, 2).bfloat16()
        quantized, index = layer(x)
        expected = layer(x.float())
        assert torch.equal(index, expected[1]) and torch.equal(quantized, expected[0].bfloat16())
        exact = FSQ([32, 33], force_quantization_f32=False, **mode)(x)
        assert torch.equal(exact[1], index)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_decoding_gives_what_forward_gave(layer, dtype):
    layer = layer.to(dtype).eval()
    quantized, index, *_ = layer(torch.randn(2, 30, layer.dim, dtype=dtype))
    assert index.dtype == torch.int32 and quantized.dtype == dtype
    assert torch.equal(decoder(layer)(index), quantized)


@pytest.mark.parametrize("shape", ((2, 30), (2, 5, 6), (2, 2, 3, 5)))
def test_channels_first(layer, shape):
    channels = layer.dim
    first = copy.deepcopy(layer)
    for module in first.modules():
        for name in ("channel_first", "is_channel_first"):
            if hasattr(module, name) and not (module is not first and isinstance(module, FSQ)):
                setattr(module, name, True)
    x = torch.randn(2, channels, *shape[1:])
    quantized, index = first(x)
    rows = x.movedim(1, -1).reshape(2, -1, channels)
    expected, expected_index = layer(rows)
    assert torch.equal(quantized.movedim(1, -1).reshape(rows.shape), expected)
    if isinstance(layer, GroupedResidualFSQ):
        index = index.movedim(2, -1)
    elif isinstance(layer, ResidualFSQ):
        index = index.movedim(1, -1)
    assert torch.equal(index.reshape(expected_index.shape), expected_index)
    assert torch.equal(decoder(first)(first(x)[1]), quantized)


def test_any_number_of_dimensions():
    layer = FSQ(LEVELS)
    x = torch.randn(4, 3)
    assert torch.equal(layer(x)[1], layer(x[None])[1][0]) and torch.equal(layer(x)[0], layer(x[None])[0][0])
    residual = ResidualFSQ(levels=LEVELS, num_quantizers=2)
    x = torch.randn(2, 4, 5, 3)  # a map with the channels last
    quantized, index = residual(x)
    expected = residual(x.reshape(2, 20, 3))
    assert torch.equal(quantized.reshape(2, 20, 3), expected[0]) and index.shape == (2, 4, 5, 2)
    assert torch.equal(residual.get_output_from_indices(index), quantized)


def test_grouped_map():
    layer = GroupedResidualFSQ(dim=8, groups=2, levels=LEVELS, num_quantizers=3, accept_image_fmap=True)
    x = torch.randn(2, 8, 4, 5)
    quantized, index, codes = layer(x, return_all_codes=True)
    assert quantized.shape == x.shape and index.shape == (2, 2, 3, 4, 5)
    assert torch.equal(layer.get_output_from_indices(index), quantized)
    assert torch.equal(layer.get_codes_from_indices(index), torch.stack(codes)) and codes[0].shape == (3, 2, 4, 5, 3)


def test_indices_stay_exact_beyond_float32():
    layer = FSQ([16] * 7)
    index = layer(torch.randn(1, 500, 7))[1]
    digits = layer.indices_to_level_indices(index).long()
    assert index.max() > 2**24 and torch.equal((digits * 16 ** torch.arange(7)).sum(-1), index.long())
    assert torch.equal(layer.codes_to_indices(layer.indices_to_codes(index)), index)
    symmetric = FSQ([16] * 7, preserve_symmetry=True)
    index = symmetric(torch.randn(1, 500, 7))[1]
    assert torch.equal(symmetric.codes_to_indices(symmetric.indices_to_codes(index)), index)


def test_borders_between_levels_are_exact():
    """One float32 to either side of every border falls on its own side, as in float64."""
    for count in (3, 4, 5, 8, 16, 100):
        half, offset = (count - 1) * 1.001 / 2, 0.0 if count % 2 else 0.5
        shift = math.atanh(offset / half)
        for level in range(1, count):
            border = math.atanh((level - count // 2 - 0.5 + offset) / half) - shift
            below = torch.tensor(border, dtype=torch.float32)
            while below.item() >= border:
                below = below.nextafter(torch.tensor(-torch.inf))
            above = below.nextafter(torch.tensor(torch.inf))
            x = torch.stack([below, above]).view(1, 2, 1)
            assert FSQ([count])(x)[1].tolist() == [[level - 1, level]]


def test_more_codes_than_an_index_holds():
    levels = [8] * 32
    with pytest.raises(ValueError, match="return_indices=False"):
        FSQ(levels)
    layer, x = FSQ(levels, return_indices=False), torch.randn(20, 32, requires_grad=True)
    quantized, index = layer(x)
    quantized.sum().backward()
    y = x.detach().clone().requires_grad_()
    expected = FSQ([8])(y.reshape(1, -1, 1))[0]
    expected.sum().backward()
    assert index is None and torch.equal(quantized.flatten(), expected.flatten()) and torch.equal(x.grad, y.grad)
    with pytest.raises(ValueError, match="return_indices=False"):
        layer.indices_to_codes(torch.zeros(2, dtype=torch.int32))
    assert layer.codebook_size == 8**32 and not hasattr(layer, "implicit_codebook")


# gradients


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_the_bound(mode):
    layer = FSQ(LEVELS, **MODES[mode])
    x, g = (4 * torch.randn(200, 3)).requires_grad_(), torch.randn(200, 3)
    layer(x)[0].backward(g)
    levels, z = torch.tensor(LEVELS).double(), x.detach().double()
    half = (levels - 1) * 1.001 / 2
    shift = torch.where(levels % 2 == 0, 0.5, 0.0) / half
    if "symmetric" in mode:
        slope = (z.abs() <= 1).double() if "clamp" in mode else 1 / z.cosh().square()
    elif mode == "clamp":
        slope = ((z + shift).abs() <= 1) * half / (levels // 2)
    else:
        slope = half / (levels // 2) / (z + shift.atanh()).cosh().square()
    torch.testing.assert_close(x.grad.double(), g * slope, rtol=2e-5, atol=2e-7)


def test_residual_gradient_is_the_sum_of_the_levels():
    layer = ResidualFSQ(levels=[5, 5, 5], num_quantizers=3)
    x, g = torch.randn(200, 3, requires_grad=True), torch.randn(200, 3)
    layer(x)[0].backward(g)
    z, clamp, residual, expected = x.detach().double(), 1.25, None, 0.0
    bounded = (z / clamp).tanh() * clamp
    residual = bounded
    for level in range(3):
        scale = 5.0**-level
        v = residual / scale
        expected = expected + g * (v.abs() <= 1) / (z / clamp).cosh().square()
        residual = residual - scale * ((4 * (v.clamp(-1, 1) + 1) / 2 + 0.5).floor() / 2 - 1)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_levels_refine():
    x = torch.rand(500, 4) * 2 - 1
    errors = []
    for levels in (1, 2, 3):
        layer = ResidualFSQ(levels=[5] * 4, num_quantizers=levels)
        bounded = (x / 1.25).tanh() * 1.25
        errors.append((layer(x)[0] - bounded).abs().max())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_noise():
    layer = FSQ([8, 8, 8], preserve_symmetry=True, noise_dropout=0.3)
    x = torch.randn(1, 4000, 3)
    clean, index = layer.eval()(x)
    noisy, same_index = layer.train()(x)
    moved = (noisy != clean)[clean.abs() < 0.9]  # noise outwards of the outermost levels is clamped away
    assert torch.equal(index, same_index) and (moved.float().mean() - 0.3).abs() < 0.05
    assert 0.4 < (noisy - clean).abs().max() <= 0.5 and noisy.abs().max() <= 1


def test_orthogonal_rotation():
    layer = FSQ([5, 5, 5], orthogonal_rotation=True)
    rotation = layer.orthogonal_rot
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), rtol=0, atol=1e-6)
    x = torch.randn(1, 50, 3)
    torch.testing.assert_close(layer(x)[0], FSQ([5, 5, 5])(x @ rotation)[0] @ rotation.T)
    with pytest.warns(UserWarning, match="orthogonal_rotation mixes"):
        FSQ([5, 6], orthogonal_rotation=True)


# hostile input, copies, graphs, statistics


def test_nan_stays_alone():
    for mode in MODES.values():
        layer, x = FSQ(LEVELS, **mode), torch.randn(1, 10, 3)
        bad = x.clone()
        bad[0, 4, 1] = torch.nan
        bad.requires_grad_()
        (a, i), (b, j) = layer(bad), layer(x)
        others = torch.ones(1, 10, 3, dtype=torch.bool)
        others[0, 4, 1] = False
        assert a[0, 4, 1].isnan() and torch.equal(a[others], b[others])
        assert i[0, 4] == -1 and torch.equal(i[0, :4], j[0, :4]) and torch.equal(i[0, 5:], j[0, 5:])
        assert torch.equal(layer.indices_to_codes(i)[0, 4], torch.zeros(3))
        a[others].sum().backward()
        assert bad.grad[others].isfinite().all()
        layer(bad)
        assert layer.usage.counts.sum() == 9


def test_infinite_values_take_the_outermost_levels():
    for mode in MODES.values():
        layer = FSQ(LEVELS, **mode)
        index = layer(torch.tensor([[[torch.inf] * 3, [-torch.inf] * 3]]))[1]
        assert index.tolist() == [[layer.codebook_size - 1, 0]]


def test_empty_batch(layer):
    quantized, index, *_ = layer(torch.zeros(2, 0, layer.dim))
    assert quantized.shape == (2, 0, layer.dim) and index.numel() == 0


def test_copies(layer):
    x = torch.randn(2, 5, layer.dim)
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)


@pytest.mark.parametrize("name", ("clamp", "rotated"))
def test_compiles_once_for_all_batch_sizes(name):
    layer = LAYERS[name]()
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for rows in (33, 47, 21):
        x, results = torch.randn(2, rows, layer.dim), []
        for module in (compiled, layer):
            v = x.clone().requires_grad_()
            quantized, index, *_ = module(v)
            quantized.square().sum().backward()
            results.append((quantized.detach(), index, v.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) <= 2


def test_usage():
    layer = FSQ(LEVELS)
    with pytest.raises(RuntimeError, match="there was none"):
        layer.usage  # noqa: B018
    index = layer(torch.randn(2, 30, 3))[1]
    assert torch.equal(layer.usage.counts, torch.bincount(index.flatten(), minlength=240))
    groups = FSQ(LEVELS, num_codebooks=2)
    index = groups(torch.randn(2, 30, 6))[1].flatten(0, 1)
    assert torch.equal(groups.usage.counts, torch.stack([torch.bincount(i, minlength=240) for i in index.T]))
    residual = ResidualFSQ(levels=LEVELS, num_quantizers=2)
    index = residual(torch.randn(2, 30, 3))[1]
    for level, use in enumerate(residual.usage):
        assert torch.equal(use.counts, torch.bincount(index[..., level].flatten(), minlength=240))


def test_quantize_dropout_draws_every_number_of_levels():
    layer = ResidualFSQ(
        levels=LEVELS, num_quantizers=6, quantize_dropout=True, quantize_dropout_cutoff_index=1,
        quantize_dropout_multiple_of=2,
    )  # fmt: skip
    x, used = torch.randn(1, 4, 3), set()
    for _ in range(60):
        quantized, index = layer(x)
        assert index.dtype == torch.int32 and torch.equal(layer.get_output_from_indices(index), quantized)
        used.add(int((index[0, 0] >= 0).sum()))
    assert used == {2, 4, 6}
    assert (layer.eval()(x)[1] >= 0).all()
    with torch.no_grad():
        assert all((layer.train()(x)[1] >= 0).all() for _ in range(10))
    coarse = layer(x)[1][..., :2]
    padded = torch.nn.functional.pad(coarse, (0, 4), value=-1)
    assert torch.equal(layer.get_output_from_indices(coarse), layer.get_output_from_indices(padded))


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: FSQ([]), "non-empty"),
        (lambda: FSQ([8, 2]), "preserve_symmetry"),
        (lambda: FSQ([8, 1], preserve_symmetry=True), ">= 2"),
        (lambda: FSQ([8], num_codebooks=2, keep_num_codebooks_dim=False), "keep_num_codebooks_dim"),
        (lambda: FSQ([8], noise_dropout=0.5), "noise_dropout"),
        (lambda: FSQ([8, 8])(torch.randn(2, 5, 3)), r"expected \[\.\.\., 2\]"),
        (lambda: FSQ([8, 8], channel_first=True)(torch.randn(2, 3, 5)), r"expected \[B, 2, \.\.\.\]"),
        (lambda: FSQ([8, 8]).codes_to_indices(torch.randn(2, 3)), "codes_to_indices"),
        (lambda: ResidualFSQ(levels=[8], num_quantizers=0), "num_quantizers"),
        (lambda: ResidualFSQ(levels=[8], num_quantizers=2, soft_clamp_input_value=1.0), "bound_hard_clamp"),
        (lambda: ResidualFSQ(levels=[8], num_quantizers=2, num_codebooks=2), "num_codebooks"),
        (lambda: ResidualFSQ(levels=[8], num_quantizers=2, quantize_dropout_cutoff_index=2), "cutoff"),
        (lambda: ResidualFSQ(levels=[8], num_quantizers=2).get_codes_from_indices(torch.zeros(1, 3).int()), "3 levels"),
        (lambda: GroupedResidualFSQ(dim=7, groups=2, levels=[8], num_quantizers=2), "groups=2"),
        (lambda: GroupedResidualFSQ(dim=8, groups=2, levels=[8], num_quantizers=2)(torch.randn(1, 4, 7)), "8 features"),
    ),
)
def test_errors_say_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
