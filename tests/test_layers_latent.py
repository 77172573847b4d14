"""LatentQuantize and FSP on their own: round trips, trained values, dtypes, hostile rows, graphs."""

import copy
import pickle

import pytest
import torch

from vqkernels.layers.finite_scalar_perturbation import FSP, VectorNorm, build_cdf_act
from vqkernels.layers.latent_quantization import LatentQuantize

LEVELS = [5, 6, 8]
LAYERS = {
    "latent": lambda: LatentQuantize(LEVELS, dim=3),
    "latent fixed": lambda: LatentQuantize(LEVELS, dim=3, optimize_values=False),
    "latent projected": lambda: LatentQuantize(LEVELS, dim=7, num_codebooks=2),
    "fsp": lambda: FSP(LEVELS, channel_first=True),
    "fsp inverse": lambda: FSP(LEVELS, channel_first=True, need_inv_act=True, vector_norm="kurt"),
    "fsp projected": lambda: FSP(LEVELS, dim=7, channel_first=True, quantize_rate=1.0),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


@pytest.mark.parametrize("levels", ([3], [7, 4], [5, 5, 8], [2, 9, 16]))
def test_every_code_survives_the_round_trip(levels):
    layer = LatentQuantize(levels, dim=len(levels))
    index = torch.arange(layer.codebook_size, dtype=torch.int32)
    codes = layer.implicit_codebook
    assert len(codes.unique(dim=0)) == len(codes) and torch.equal(layer.codes_to_indices(codes), index)
    assert torch.equal(layer.indices_to_codes(index[None]), codes.T[None])
    quantized, found, _ = layer(codes.T[None])
    assert torch.equal(quantized[0].T, codes) and torch.equal(found[0], index)
    fsp = FSP(levels).eval()
    quantized, found, *_ = fsp(fsp.inv_act_func(fsp.indices_to_act_value(index)))
    assert torch.equal(found, index) and torch.equal(fsp.indices_to_codes(index), quantized)


def test_trained_values_keep_their_indices():
    """The index says which value was nearest, also after the values have moved."""
    layer = LatentQuantize(LEVELS, dim=3)
    with torch.no_grad():
        for values in layer.values_per_latent:
            values.add_(0.3 * torch.randn_like(values))
    x = torch.randn(2, 3, 40)
    quantized, index, _ = layer(x)
    for feature, values in enumerate(layer.values_per_latent):
        nearest = (x[:, feature, :, None] - values).abs().argmin(-1)
        assert torch.equal(quantized[:, feature].detach(), values[nearest])
    assert torch.equal(layer.indices_to_codes(index), quantized)


def test_values_move_by_their_own_optimizer():
    layer = LatentQuantize(LEVELS, dim=3, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=3.0))
    x = 0.2 + 0.2 * torch.randn(4, 3, 100)
    before = [v.detach().clone() for v in layer.values_per_latent]
    errors = [(layer.eval()(x)[0] - x).square().mean()]
    for _ in range(20):
        quantized, index, _ = layer.train()(x)
        assert torch.equal(layer.indices_to_codes(index), quantized), "quantized with the moved values"
        errors.append((quantized - x).square().mean())
    assert errors[-1] < 0.7 * errors[0] and not torch.equal(before[0], layer.values_per_latent[0])
    assert all(v.grad is None for v in layer.values_per_latent)
    reference = torch.stack([(x[:, 0, :, None] - before[0]).abs().argmin(-1)]).flatten()
    target = x[:, 0].flatten()
    moved = before[0].clone()
    for k in range(LEVELS[0]):  # the first step by hand: gradient 2 (v - x) / (tokens * features)
        moved[k] -= 0.5 * (2 * (before[0][k] - target[reference == k]) / x.numel()).sum()
    again = LatentQuantize(LEVELS, dim=3, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    again(x)
    torch.testing.assert_close(again.values_per_latent[0].detach(), moved)
    frozen = [v.detach().clone() for v in layer.values_per_latent]
    layer.eval()(x)
    assert all(torch.equal(a, b) for a, b in zip(frozen, layer.values_per_latent, strict=True))


@pytest.mark.parametrize("optimize", (True, False))
def test_loss_by_the_formula(optimize):
    layer = LatentQuantize(
        LEVELS, dim=3, commitment_loss_weight=0.3, quantization_loss_weight=0.7, optimize_values=optimize
    )
    x = torch.randn(2, 3, 40, requires_grad=True)
    quantized, _, loss = layer(x)
    loss.backward()
    error = (x - quantized).detach()
    torch.testing.assert_close(loss.detach(), error.square().mean())
    # the commitment draws the output, which is the input straight through, to the input; the other the input to it
    torch.testing.assert_close(x.grad, (0.7 - 0.3) * 2 * error / error.numel())
    assert layer.eval()(x)[2] == 0 and LatentQuantize(LEVELS, 3, None, None)(x)[2] == 0


@pytest.mark.parametrize("act", ("tanh", "sigmoid", "normal", "laplace", "cauchy"))
def test_functions_are_distribution_functions(act):
    function, inverse = build_cdf_act(act)
    z = torch.linspace(-3, 3, 101).double()
    p = function(z)
    assert (
        (p.diff() > 0).all() and (p > 0).all() and (p < 1).all() and abs(function(torch.zeros(1)).item() - 0.5) < 1e-6
    )
    torch.testing.assert_close(inverse(p), z)


def test_perturbation_stays_within_a_level_width():
    layer = FSP([8], quantize_rate=0.25)
    x = torch.randn(1, 20_000, 1)
    noisy, index, _, info = layer(x)
    clean = layer.eval()(x)[0]
    probability, width = layer.act_func(x), 1 / 8
    p = noisy * 12**-0.5 + 0.5
    quantized = (noisy - clean).abs() < 1e-6
    assert (
        abs(quantized.float().mean() - 0.25) < 0.02 and ((p - probability)[~quantized].abs() <= width / 2 + 1e-6).all()
    )
    assert 0.8 < info["p_accept_prob"] <= 1 and (p >= 0).all() and (p <= 1).all()
    assert torch.equal(index, (probability * 8).floor().int().squeeze(-1)), "indices are those of evaluation"


def test_norm_loss_reaches_zero_on_its_targets():
    x = torch.randn(100_000, 2) * 0.8225**0.5
    assert VectorNorm.build("var_tanh")(x)[0] < 1e-4 < VectorNorm.build("var")(x)[0]
    assert VectorNorm.build("none")(x)[0] == 0
    constant = torch.ones(5, 2, requires_grad=True)  # no spread: the scores must not divide by it
    VectorNorm.build("kurt")(constant)[0].backward()
    assert constant.grad.isfinite().all()


# dtypes, hostile rows, copies, graphs


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_dtypes(layer, dtype):
    layer = layer.to(dtype).eval()
    x = torch.randn(2, layer.dim, 30).to(dtype).requires_grad_()
    quantized, index, *_ = layer(x)
    quantized.sum().backward()
    assert quantized.dtype == x.grad.dtype == dtype and index.dtype == torch.int32
    decoded = layer.indices_to_codes(index).to(dtype)
    torch.testing.assert_close(decoded, quantized, rtol=0, atol=1e-6 if dtype == torch.float64 else 0)


def test_half_precision_loses_no_level():
    for kind in (FSP, LatentQuantize):
        layer = kind([100], dim=1, **({"channel_first": True} if kind is FSP else {})).eval()
        x = torch.linspace(-0.6, 0.6, 5001) if kind is LatentQuantize else torch.linspace(-4, 4, 5001)
        exact = layer(x.bfloat16().float().view(-1, 1))[1]
        assert torch.equal(layer(x.bfloat16().view(-1, 1))[1], exact)


def test_nan_stays_alone(layer):
    x = torch.randn(2, layer.dim, 10)
    bad = x.clone()
    bad[0, 1, 4] = torch.nan
    bad.requires_grad_()
    layer.train()
    if isinstance(layer, FSP):
        layer.quantize_rate = 1.0
    (a, i, loss, *_), (b, j, *_) = layer(bad), layer(x)
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[0, 4] = False
    assert a.movedim(1, -1)[~keep].isnan().any() and (i[~keep] == -1).any()
    assert torch.equal(a.movedim(1, -1)[keep], b.movedim(1, -1)[keep]) and torch.equal(i[keep], j[keep])
    rest = layer(x.movedim(1, -1)[keep].T[None])[2]
    torch.testing.assert_close(loss, rest)
    loss.backward() if loss.requires_grad else None
    if not layer.has_projections:
        assert bad.grad is None or bad.grad.movedim(1, -1)[keep].isfinite().all()


def test_few_rows(layer):
    layer.train()
    for rows in (0, 1):
        x = torch.randn(1, layer.dim, rows, requires_grad=True)
        quantized, _, loss, *_ = layer(x)
        (quantized.sum() + loss).backward()
        assert quantized.shape == x.shape and loss.isfinite() and x.grad.isfinite().all()
        assert rows or loss == 0


def test_copies(layer):
    layer.eval()
    x = torch.randn(2, layer.dim, 5)
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)


def test_usage():
    for name, codebooks in (("latent", None), ("latent projected", 2), ("fsp", None)):
        layer = LAYERS[name]()
        index = layer(torch.randn(2, layer.dim, 30))[1]
        if codebooks is None:
            assert torch.equal(layer.usage.counts, torch.bincount(index.flatten(), minlength=240))
        else:
            assert layer.usage.counts.shape == (codebooks, 240) and layer.usage.counts.sum() == index.numel()


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: LatentQuantize(5, dim=3), "codebook_dim"),
        (lambda: LatentQuantize([5, 1], dim=2), ">= 2"),
        (lambda: LatentQuantize([1000] * 4, dim=4), "2\\^31"),
        (lambda: LatentQuantize([5, 5], dim=2, codebook_dim=3), "codebook_dim=3"),
        (
            lambda: LatentQuantize([5], 1, optimize_values=False, in_place_codebook_optimizer=torch.optim.SGD),
            "optimize",
        ),
        (lambda: LatentQuantize([5, 5], dim=2)(torch.randn(2, 3, 4)), r"\[B, 2, \.\.\.\]"),
        (lambda: LatentQuantize([5, 5], dim=2).codes_to_indices(torch.randn(2, 3)), "codes_to_indices"),
        (lambda: FSP([]), "levels"),
        (lambda: FSP([8], quantize_rate=1.5), "quantize_rate"),
        (lambda: FSP([8], act_name="relu"), "'laplace'"),
        (lambda: FSP([8], vector_norm="l5"), "'var_tanh'"),
        (lambda: FSP([8, 8])(torch.randn(2, 3)), r"\[\.\.\., 2\]"),
    ),
)
def test_errors_say_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_error_for_one_number_of_levels_is_a_runtime_error_too():
    with pytest.raises(RuntimeError):
        LatentQuantize(5, dim=3)
