"""SimVQ and ResidualSimVQ on their own: gradients by the formula, one transform a step, masks, dtypes, hostile rows."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vqkernels as vq
from vqkernels.layers.residual_sim_vq import ResidualSimVQ
from vqkernels.layers.sim_vq import SimVQ

DIM, K = 8, 16
LAYERS = {
    "one": lambda: SimVQ(DIM, K),
    "ste": lambda: SimVQ(DIM, K, rotation_trick=False),
    "from 5": lambda: SimVQ(DIM, K, frozen_codebook_dim=5),
    "residual": lambda: ResidualSimVQ(dim=DIM, codebook_size=K, num_quantizers=3),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def decoder(layer):
    return layer.indices_to_codes if isinstance(layer, SimVQ) else layer.get_output_from_indices


def step(layer, x, **kwargs):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    quantized, index, loss = layer(x, **kwargs)
    (quantized.nan_to_num().square().sum() + loss.sum()).backward()
    return quantized.detach(), index, loss.detach(), x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.parametrize("rotation", (True, False))
def test_loss_and_gradients_by_the_formula(rotation):
    """loss = w (|sg(x) - c|^2 + b |x - sg(c)|^2), c = W f, in float64; the estimator's part is rotation_trick's."""
    layer = SimVQ(DIM, K, rotation_trick=rotation, commitment_weight=0.7, input_to_quantize_commit_loss_weight=0.4)
    x, g = torch.randn(1, 60, DIM, requires_grad=True), torch.randn(1, 60, DIM)
    quantized, index, loss = layer(x)
    (quantized * g).sum().add(loss).backward()
    z, frozen = x.detach()[0].double(), layer.frozen_codebook.double()
    weight = layer.code_transform.weight.detach().double().requires_grad_()
    codebook = frozen @ weight.T
    assert torch.equal(index[0], torch.cdist(z, codebook.detach()).argmin(-1))
    assert torch.equal(quantized, layer.codebook[index])
    error = codebook[index[0]] - z
    torch.testing.assert_close(loss.detach().double(), 0.7 * 1.4 * error.detach().square().mean(), rtol=1e-5, atol=1e-7)
    (0.7 * error.square().mean()).backward()
    torch.testing.assert_close(layer.code_transform.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)
    passed = z.clone().requires_grad_()
    kind = "rotation" if rotation else "ste"
    vq.rotation_trick(passed, codebook.detach()[index[0]], kind=kind).backward(g[0].double())
    expected = passed.grad - 0.7 * 0.4 * 2 * error.detach() / error.numel()
    torch.testing.assert_close(x.grad[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_codebook_is_transformed_once_a_step():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    layer = SimVQ(DIM, K, codebook_transform=Counting(DIM, DIM))
    step(layer, torch.randn(1, 30, DIM))
    assert calls == [K]
    calls.clear()
    residual = ResidualSimVQ(
        dim=DIM, codebook_size=K, num_quantizers=4, codebook_transform=Counting(DIM, DIM), quantize_dropout=True
    )
    residual(torch.randn(1, 30, DIM), rand_quantize_dropout_fixed_seed=1, return_all_codes=True)
    used = sum(1 for level in residual.layers if level._last_indices is not None)
    assert calls == [K] * used and used < 4


def test_no_matrix_of_vectors_by_codewords():
    """Nothing of N x K is made, forward or backward."""
    layer, rows = SimVQ(4, 512), 1000
    x, sizes = torch.randn(1, rows, 4, requires_grad=True), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(v.numel() for v in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(v))
            return out

    with Sizes():
        quantized, _, loss = layer(x)
        (quantized.sum() + loss).backward()
    assert sizes and max(sizes) < rows * 512 / 10


def test_levels_are_those_of_single_layers():
    residual = ResidualSimVQ(dim=DIM, codebook_size=K, num_quantizers=3)
    x = torch.randn(2, 40, DIM)
    a = step(residual, x)
    grads = a[4:]
    v = x.clone().requires_grad_()
    rest, total, losses, indices = v, 0.0, [], []
    residual.zero_grad()
    for level in residual.layers:
        quantized, index, loss = level(rest)
        rest, total = rest - quantized.detach(), total + quantized
        losses.append(loss), indices.append(index)
    (total.square().sum() + sum(losses)).backward()
    assert torch.equal(a[0], total.detach()) and torch.equal(a[1], torch.stack(indices, -1))
    torch.testing.assert_close(a[2], torch.stack(losses).detach())
    torch.testing.assert_close(a[3], v.grad)
    for p, expected in zip(residual.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_dtypes_on_the_cpu(layer, dtype):
    layer = layer.to(dtype)
    x = torch.randn(2, 30, DIM).to(dtype)
    quantized, index, loss, *grads = step(layer, x)
    assert quantized.dtype == dtype and index.dtype == torch.int64 and all(g.dtype == dtype for g in grads)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(decoder(layer)(index), quantized)
    if isinstance(layer, SimVQ):
        book = layer.codebook.double()
        assert torch.equal(index.flatten(), torch.cdist(x.flatten(0, 1).double(), book).argmin(-1))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_does_not_change_the_codes(layer, dtype):
    x = torch.randn(2, 30, DIM)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        got = layer(x)
        decoded = decoder(layer)(got[1])
        half = layer(x.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and torch.equal(decoded, expected[0])
    assert half[0].dtype == dtype and half[2].dtype == torch.float32


def test_channels_first_equals_channels_last(layer):
    first = copy.deepcopy(layer)
    for module in (first, *getattr(first, "layers", ())):
        module.channel_first = True
    for shape in ((2, DIM, 12), (2, DIM, 3, 4), (2, DIM, 2, 2, 3), (5, DIM)):
        x = torch.randn(shape)
        a, b = step(first, x), step(layer, x.movedim(1, -1))
        assert torch.equal(a[0].movedim(1, -1), b[0]) and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        torch.testing.assert_close(a[3].movedim(1, -1), b[3])
        assert torch.equal(decoder(first)(a[1]), a[0])


def test_mask(layer):
    """A padded batch gives what the unpadded one gives."""
    x, mask = torch.randn(2, 20, DIM), torch.rand(2, 20) < 0.6
    padded, plain = step(layer, x, mask=mask), step(layer, x[mask][None])
    assert torch.equal(padded[0][mask], plain[0][0]) and (padded[0][~mask] == 0).all()
    assert torch.equal(padded[1][mask], plain[1][0]) and (padded[1][~mask] == -1).all()
    torch.testing.assert_close(padded[2], plain[2])
    torch.testing.assert_close(padded[3][mask], plain[3][0])
    assert (padded[3][~mask] == 0).all()
    for a, b in zip(padded[4:], plain[4:], strict=True):
        torch.testing.assert_close(a, b)


def test_hostile_rows_stay_alone(layer):
    x = torch.randn(1, 20, DIM)
    bad = x.clone()
    bad[0, 3, 2], bad[0, 7, 0] = torch.nan, torch.inf
    keep = torch.ones(20, dtype=torch.bool)
    keep[3] = keep[7] = False
    got, expected = step(layer, bad), step(layer, x[:, keep])
    assert got[0][0, ~keep].isnan().all() and (got[1][0, ~keep] == -1).all()
    assert torch.equal(got[0][:, keep], expected[0]) and torch.equal(got[1][:, keep], expected[1])
    for a, b in zip((got[2], *got[4:]), (expected[2], *expected[4:]), strict=True):
        torch.testing.assert_close(a, b)
    assert got[3][0, keep].isfinite().all()


def test_batches_without_a_usable_row(layer):
    for x, mask in (
        (torch.randn(1, 5, DIM), torch.zeros(1, 5, dtype=torch.bool)),
        (torch.full((1, 5, DIM), torch.nan), None),
        (torch.randn(1, 0, DIM), None),
    ):
        quantized, index, loss, *grads = step(layer, x, mask=mask)
        assert quantized.shape == x.shape and (index == -1).all() and (loss == 0).all()
        assert all((g == 0).all() for g in grads)


def test_zero_and_opposite_vectors():
    """Rotation is singular there: the value is the codeword, the gradient straight-through."""
    layer = SimVQ(DIM, 2, commitment_weight=0.0, codebook_transform=nn.Identity())
    layer.frozen_codebook = torch.stack([0.1 * torch.eye(DIM)[0], 5 * torch.eye(DIM)[1]])
    x = torch.stack([torch.zeros(DIM), -0.01 * torch.eye(DIM)[0]])[None].requires_grad_()
    quantized, index, _ = layer(x)
    quantized.backward(g := torch.randn(1, 2, DIM))
    assert (index == 0).all() and torch.equal(quantized.detach(), layer.codebook[index]) and torch.equal(x.grad, g)


def test_copies(layer):
    x = torch.randn(2, 5, DIM)
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)


def test_usage_and_sizes():
    layer = SimVQ(DIM, K)
    with pytest.raises(RuntimeError, match="there was none"):
        layer.usage  # noqa: B018
    index = layer(torch.randn(2, 30, DIM))[1]
    assert torch.equal(layer.usage.counts, torch.bincount(index.flatten(), minlength=K))
    residual = ResidualSimVQ(dim=DIM, codebook_size=K, num_quantizers=2, frozen_codebook_dim=5)
    assert (residual.codebook_dim, residual.codebook_size, residual.codebooks.shape) == (DIM, K, (2, K, DIM))
    index = residual(torch.randn(2, 30, DIM))[1]
    for level, use in enumerate(residual.usage):
        assert torch.equal(use.counts, torch.bincount(index[..., level].flatten(), minlength=K))


def test_dropout_on_a_map_with_channels_last():
    layer = ResidualSimVQ(dim=DIM, codebook_size=K, num_quantizers=4, quantize_dropout=True)
    quantized, index, losses = layer(torch.randn(2, 3, 5, DIM), rand_quantize_dropout_fixed_seed=1)
    assert index.shape == (2, 3, 5, 4) and (index[..., -1] == -1).all() and losses[-1] == 0
    assert torch.equal(layer.get_output_from_indices(index), quantized)


def test_negative_indices_decode_to_zeros():
    layer = SimVQ(DIM, K)
    assert torch.equal(
        layer.indices_to_codes(torch.tensor([[-1, 3]]))[0], torch.stack([torch.zeros(DIM), layer.codebook[3]])
    )


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: SimVQ(DIM, K)(torch.randn(2, 5, DIM + 1)), r"expected \[\.\.\., 8\]"),
        (lambda: SimVQ(DIM, K, channel_first=True)(torch.randn(2, 5, DIM)), r"expected \[B, 8, \.\.\.\]"),
        (lambda: SimVQ(DIM, K)(torch.randn(2, 5, DIM), mask=torch.ones(2, 4, dtype=torch.bool)), "mask"),
        (lambda: ResidualSimVQ(dim=DIM, codebook_size=K, num_quantizers=2, heads=2), "heads=2"),
        (lambda: ResidualSimVQ(dim=DIM, codebook_size=K, num_quantizers=0), "num_quantizers=0"),
        (lambda: ResidualSimVQ(dim=DIM, codebook_size=K, num_quantizers=2, quantize_dropout_cutoff_index=2), "cutoff"),
        (
            lambda: ResidualSimVQ(dim=DIM, codebook_size=K, num_quantizers=2).get_codes_from_indices(
                torch.zeros(1, 3, dtype=torch.int64)
            ),
            "at most 2",
        ),
    ),
)
def test_errors_say_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
