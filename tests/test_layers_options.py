"""What every option of VectorQuantize keeps true: masks, hostile rows, copies, precision, one graph, k-means start."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels import VectorQuantize

DIM, K = 8, 16


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are so small that threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Bridge(nn.Linear):
    """Codewords from codewords."""

    def __init__(self, dim=DIM):
        super().__init__(dim, dim)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


HEADS = {"heads": 2, "codebook_dim": 4}
OPTIONS = {
    "cross entropy": {"commitment_use_cross_entropy_loss": True},
    "diversity": {"codebook_diversity_loss_weight": 0.3},
    "orthogonal": {"orthogonal_reg_weight": 2.0},
    "orthogonal, active": {"orthogonal_reg_weight": 2.0, "orthogonal_reg_active_codes_only": True},
    "orthogonal, heads": {
        "orthogonal_reg_weight": 2.0,
        "orthogonal_reg_active_codes_only": True,
        "separate_codebook_per_head": True,
        **HEADS,
    },
    "sampled": {"stochastic_sample_codes": True},
    "sampled, heads": {"stochastic_sample_codes": True, **HEADS},
    "straight through": {"straight_through": True, "route_gradients_to_input": False},
    "gumbel": {"estimator": "gumbel"},
    "gumbel, learnable": {"estimator": "gumbel", "learnable_codebook": True},
    "gumbel, cosine": {"estimator": "gumbel", "use_cosine_sim": True},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1},
    "affine": {"affine_param": True},
    "affine, heads": {"affine_param": True, "separate_codebook_per_head": True, **HEADS},
    "learnable cosine": {"learnable_codebook": True, "use_cosine_sim": True},
    "synchronous": {"sync_update_v": 0.3, "learnable_codebook": True},
    "not routed": {"route_gradients_to_input": False},
    "bridge": {"vq_bridge": True},
    "bridge, cosine": {"vq_bridge": True, "use_cosine_sim": True},
    "in place": {"in_place_codebook_optimizer": sgd, "learnable_codebook": True},
    "in place, heads": {"in_place_codebook_optimizer": sgd, "learnable_codebook": True, **HEADS},
}
RANDOM = [name for name in OPTIONS if any(word in name for word in ("sampled", "gumbel", "directional"))]
EXACT = [name for name in OPTIONS if name not in RANDOM]


def build(name, **more):
    options = OPTIONS[name] | more
    if options.get("vq_bridge"):
        options = options | {"vq_bridge": Bridge()}
    return VectorQuantize(DIM, K, **options)


def state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


def step(layer, x, autocast=False, **arguments):
    """One forward and backward -> results, gradient of x, gradients of the parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        quantized, index, loss, parts = layer(x, return_loss_breakdown=True, **arguments)
    (quantized.nan_to_num().square().sum() + loss).backward()
    return quantized.detach(), index, loss.detach(), parts, x.grad, [p.grad for p in layer.parameters()]


# every option


@pytest.mark.parametrize("name", EXACT)
def test_a_padded_batch_equals_the_unpadded_one(name):
    padded = build(name)
    plain = copy.deepcopy(padded)
    x, fill = torch.randn(2, 20, DIM), torch.full((2, 7, DIM), 1e3)
    fill[0, 3] = torch.nan
    mask = (torch.arange(27) < 20).expand(2, 27)
    for _ in range(2):
        q1, i1, l1, b1, g1, p1 = step(padded, torch.cat([x, fill], 1), mask=mask)
        q2, i2, l2, b2, g2, p2 = step(plain, x)
        assert torch.equal(i1[:, :20], i2) and (i1[:, 20:] == -1).all() and (q1[:, 20:] == 0).all()
        assert g1 is None or (g1[:, 20:] == 0).all()
        for a, b in ((q1[:, :20], q2), (l1, l2), *zip(b1, b2, strict=True), *zip(p1, p2, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(g1[:, :20], g2, rtol=1e-5, atol=1e-6)
        for a, b in zip(state(padded).values(), state(plain).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_hostile_rows(name):
    """NaN and infinity stay in their rows; with heads, in the head they are in."""
    layer = build(name)
    x = torch.randn(2, 30, DIM)
    x[0, 7], x[0, 11, 0], x[1, 12, 5] = torch.nan, torch.inf, -torch.inf
    x[1, 3] = 0.0
    for _ in range(2):
        quantized, index, loss, parts, grad, grads = step(layer, x)
        assert quantized[0, 7].isnan().all() and (index[0, 7] == -1).all()
        bad = ~x.isfinite().all(-1)
        assert quantized[~bad].isfinite().all() and loss.isfinite() and all(part.isfinite() for part in parts)
        assert grad is None or (grad.isfinite().all() and (grad[0, 7] == 0).all())
        assert all(g is None or g.isfinite().all() for g in grads)
        assert all(v.isfinite().all() for v in layer.state_dict().values())


@pytest.mark.parametrize("rows", (0, 5), ids=("empty", "all masked"))
@pytest.mark.parametrize("name", OPTIONS)
def test_batch_without_a_usable_row(name, rows):
    layer = build(name)
    step(layer, torch.randn(2, 30, DIM))
    before = state(layer)
    mask = torch.zeros(2, rows, dtype=torch.bool)
    quantized, index, loss, parts, grad, grads = step(layer, torch.randn(2, rows, DIM), mask=mask)
    assert quantized.shape == (2, rows, DIM) and (quantized == 0).all() and (index == -1).all()
    orthogonal = 0.0 if "active" in name or "heads" in name else parts.orthogonal_reg
    assert loss == orthogonal * layer.orthogonal_reg_weight
    assert parts.commitment == 0 and parts.codebook_diversity == 0 and parts.inplace_optimize == 0
    assert all(g is None or g.isfinite().all() for g in (grad, *grads))
    for (key, a), b in zip(before.items(), state(layer).values(), strict=True):
        if name.startswith("affine") and "codebook_" in key:
            continue  # these statistics are of the codebook, which is there
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_output_from_indices(name):
    """The codewords of the indices are what evaluation returned, mapped, bridged and normalized as there."""
    layer = build(name)
    for _ in range(3):
        step(layer, torch.randn(2, 30, DIM) * 2 + 1)
    layer.eval()
    x = torch.randn(2, 30, DIM)
    before = state(layer)
    quantized, index, loss = layer(x)
    torch.testing.assert_close(layer.get_output_from_indices(index), quantized, rtol=1e-6, atol=1e-6)
    assert loss == 0 and layer(x)[2] is not loss
    if not name.startswith("affine"):  # where the statistics of the input follow in evaluation, too
        assert all(torch.equal(a, b) for a, b in zip(before.values(), state(layer).values(), strict=True))
        again = layer(x)
        assert torch.equal(again[0], quantized) and torch.equal(again[1], index), "nothing random in evaluation"


@pytest.mark.parametrize("name", OPTIONS)
def test_copies_and_files(name):
    layer = build(name)
    x = torch.randn(2, 30, DIM)
    step(layer, x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    torch.manual_seed(1)
    quantized, *_ = step(layer, x)
    for other in copies:
        torch.manual_seed(1)
        assert torch.equal(step(other, x)[0], quantized)
        assert all(torch.equal(a, b) for a, b in zip(state(layer).values(), state(other).values(), strict=True))


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", OPTIONS)
def test_precisions(name, dtype):
    layer = build(name).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(
        v.dtype == wide for k, v in layer.state_dict().items() if k.startswith("_codebook") and v.is_floating_point()
    )
    for _ in range(2):
        quantized, _, loss, _, grad, _ = step(layer, torch.randn(2, 30, DIM, dtype=dtype))
        assert quantized.dtype == dtype and loss.dtype == wide and (grad is None or grad.dtype == dtype)
    assert layer.eval()(torch.randn(2, 30, DIM, dtype=dtype))[0].dtype == dtype


@pytest.mark.parametrize("name", OPTIONS)
def test_autocast_changes_no_choice(name):
    """Search, losses and sampling run in float32 whatever the autocast; the layers without projection are not touched."""
    layer = build(name)
    other, x = copy.deepcopy(layer), torch.randn(2, 30, DIM)
    torch.manual_seed(1)
    a = step(layer, x)
    torch.manual_seed(1)
    b = step(other, x, autocast=True)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    torch.testing.assert_close(a[2], b[2]), torch.testing.assert_close(a[4], b[4])


ONE_GRAPH = (
    "cross entropy",
    "diversity",
    "orthogonal, active",
    "sampled, heads",
    "gumbel, learnable",
    "directional",
    "affine",
)


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_one_graph_for_all_batch_sizes(name):
    """In training; an optimizer step inside forward is the one thing that no graph holds."""
    layer = build(name)
    step(layer, torch.randn(2, 30, DIM))
    torch._dynamo.reset()
    whole = name == "gumbel, learnable"  # the backward pass traced, too
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager" if whole else "eager")
    for rows in (30, 40, 50):
        x, results = torch.randn(2, rows, DIM), []
        for module in (layer, compiled):
            torch.manual_seed(1)
            v = x.clone().requires_grad_()
            torch._dynamo.mark_dynamic(v, 1)
            with torch._dynamo.config.patch(error_on_recompile=rows > 30):
                quantized, index, loss = module(v)
            (quantized.square().sum() + loss).backward()
            results.append((quantized, index, loss, v.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(state(layer).values(), state(compiled._orig_mod).values(), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ("gumbel, cosine", "affine", "learnable cosine", "bridge", "in place, heads"))
def test_exports(name):
    layer = build(name)
    step(layer, torch.randn(2, 30, DIM))
    layer.eval()
    x = torch.randn(2, 30, DIM)
    program = torch.export.export(layer, (x,)).module()
    # exported statistics stand still
    expected = torch.export.export(layer, (x,)).module()(x) if name.startswith("affine") else layer(x)
    assert all(torch.equal(a, b) for a, b in zip(program(x), expected, strict=True))


class NoHostSync(TorchDispatchMode):
    """Fails on the operators that make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_never_waits_for_the_device(name):
    layer = build(name)
    step(layer, torch.randn(2, 30, DIM))
    x, mask = torch.randn(2, 30, DIM, requires_grad=True), torch.rand(2, 30) < 0.5
    with NoHostSync():
        quantized, _, loss = layer(x, mask=mask)
        (quantized.sum() + loss).backward()
        layer.eval()(x)
        if layer.heads == 1:
            layer(x, topk=3)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "learnable cosine"])
def test_kmeans_start(name):
    """k-means++ on the first batch, and fewer rows than codewords, with every option."""
    for rows in (60, 3):
        layer = build(name, kmeans_init=True)
        layer.eval()(torch.randn(1, rows, DIM))
        layer.train()
        assert layer._codebook.initted and layer.codebook.isfinite().all()
        codes = layer.codebook.reshape(-1, K, layer.codebook_dim)
        assert all(len(book.unique(dim=0)) == K for book in codes)
        step(layer, torch.randn(1, rows, DIM))
