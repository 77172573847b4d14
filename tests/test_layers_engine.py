"""Every layer inside PyTorch's machinery: compile, export, dtypes, copies, functional calls, memory formats, no host sync."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels import layers
from vqkernels.layers import FSP, FSQ, LFQ, SimVQ, VectorQuantize
from vqkernels.layers.codebook import Codebook
from vqkernels.layers.factorized_residual_vq import FactorizedResidualVQ

DIM = 8
TOKENS, CHANNELS, IMAGE = (10, DIM), (DIM, 10), (DIM, 4, 3)  # of one sample


def vq(**options):
    return lambda: VectorQuantize(**({"dim": DIM, "codebook_size": 16} | options))


def residual(**options):
    return lambda: layers.ResidualVQ(**({"dim": DIM, "codebook_size": 16, "num_quantizers": 3} | options))


LEARNABLE = {"learnable_codebook": True, "ema_update": False}
# name: builder, shape of a sample
LAYERS = {
    "vq": (vq(threshold_ema_dead_code=2), TOKENS),
    "vq-projected-heads": (vq(heads=2, codebook_dim=3, separate_codebook_per_head=True), TOKENS),
    "vq-cosine-image": (vq(use_cosine_sim=True, accept_image_fmap=True), IMAGE),
    "vq-learnable": (vq(**LEARNABLE), TOKENS),
    "vq-channels-first-ste": (vq(channel_last=False, rotation_trick=False), CHANNELS),
    "vq-affine": (vq(affine_param=True), TOKENS),
    "vq-affine-learnable": (vq(affine_param=True, **LEARNABLE), TOKENS),
    "vq-bridge": (lambda: VectorQuantize(DIM, 16, vq_bridge=nn.Linear(DIM, DIM)), TOKENS),
    "residual-beam": (residual(beam_size=2), TOKENS),
    "residual-implicit": (residual(implicit_neural_codebook=True), TOKENS),
    "residual": (residual(threshold_ema_dead_code=2), TOKENS),
    "residual-shared-image": (residual(shared_codebook=True, accept_image_fmap=True), IMAGE),
    "residual-projected-cosine": (residual(codebook_dim=4, use_cosine_sim=True), TOKENS),
    "grouped-residual": (
        lambda: layers.GroupedResidualVQ(dim=DIM, groups=2, num_quantizers=2, codebook_size=16),
        TOKENS,
    ),
    "hierarchical-image": (
        lambda: layers.HierarchicalVQ(
            dim=DIM,
            codebook_size=16,
            scales=(1, (4, 3)),
            kmeans_init=False,
            accept_image_fmap=True,
            threshold_ema_dead_code=0,
        ),
        IMAGE,
    ),
    "simvq": (lambda: SimVQ(DIM, 16), TOKENS),
    "simvq-image": (lambda: SimVQ(DIM, 16, channel_first=True, rotation_trick=False), IMAGE),
    "residual-simvq": (lambda: layers.ResidualSimVQ(dim=DIM, num_quantizers=3, codebook_size=16), TOKENS),
    "fsq": (lambda: FSQ([5, 4, 3], dim=DIM), TOKENS),
    "fsq-symmetric-image": (lambda: FSQ([5] * DIM, preserve_symmetry=True), IMAGE),
    "residual-fsq": (lambda: layers.ResidualFSQ(levels=[5, 4, 3], num_quantizers=2, dim=DIM), TOKENS),
    "grouped-residual-fsq": (
        lambda: layers.GroupedResidualFSQ(dim=DIM, groups=2, levels=[5, 4, 3], num_quantizers=2),
        TOKENS,
    ),
    "lfq": (lambda: LFQ(codebook_size=16, dim=DIM), TOKENS),
    "lfq-spherical-image": (lambda: LFQ(codebook_size=2**DIM, spherical=True), IMAGE),
    "residual-lfq": (lambda: layers.ResidualLFQ(dim=DIM, num_quantizers=2, codebook_size=16), TOKENS),
    "grouped-residual-lfq": (
        lambda: layers.GroupedResidualLFQ(dim=DIM, groups=2, num_quantizers=2, codebook_size=16),
        TOKENS,
    ),
    "random-projection": (
        lambda: layers.RandomProjectionQuantizer(dim=DIM, codebook_size=16, codebook_dim=4, num_codebooks=2),
        TOKENS,
    ),
    "latent": (lambda: layers.LatentQuantize([5, 4, 3], dim=DIM), IMAGE),
    "fsp": (lambda: FSP([5, 4, 3], dim=DIM), TOKENS),
    "binary-mapper": (lambda: layers.BinaryMapper(DIM, deterministic_on_eval=True), TOKENS),
    "factorized": (lambda: FactorizedResidualVQ(DIM, 3, 16, 4), CHANNELS),
    "sequential": (lambda: layers.Sequential(nn.Linear(DIM, DIM), VectorQuantize(DIM, 16), nn.GELU()), TOKENS),
}  # fmt: skip

ALL = pytest.mark.parametrize("name", LAYERS)
pytestmark = pytest.mark.filterwarnings("ignore")


def make(name: str, train: bool = True) -> tuple[nn.Module, tuple[int, ...]]:
    build, sample = LAYERS[name]
    torch.manual_seed(4)
    return build().train(train), sample


def tensors(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    return [t for part in result for t in tensors(part)] if isinstance(result, (tuple, list)) else []


def run(layer, x, seed=0):
    torch.manual_seed(seed)
    return tensors(layer(x))


def assert_close(got, expected, **tolerance):
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.detach(), b.detach(), **tolerance)


def objective(out) -> torch.Tensor:
    return sum((t.float().sum() for t in out if t.is_floating_point()), torch.zeros(()))


class Forbid(TorchDispatchMode):
    """Raises at operations that make the host wait for the device, or whose result has a data-dependent shape."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "is_nonzero",
        "equal",
        "_to_copy",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_to_copy":
            device = (kwargs or {}).get("device")
            assert device is None or device == args[0].device, f"a copy to {device}"
        else:
            assert name not in self.WAITS, name
        return func(*args, **(kwargs or {}))


@ALL
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_forward_and_backward_never_wait_for_the_device(name, train):
    layer, sample = make(name, train)
    x = torch.randn(4, *sample, requires_grad=True)
    with Forbid():
        out = tensors(layer(x))
        if train and objective(out).requires_grad:
            objective(out).backward()


# every class once or more: compiling takes seconds
IN_EVALUATION = (
    "vq residual grouped-residual hierarchical-image simvq residual-simvq fsq residual-fsq lfq residual-lfq "
    "random-projection latent fsp binary-mapper factorized"
).split()
IN_TRAINING = [*IN_EVALUATION, "vq-cosine-image", "vq-affine", "residual-shared-image", "residual-beam"]


@pytest.mark.parametrize(
    ("name", "train"),
    [
        *(pytest.param(name, True, id=f"train-{name}") for name in IN_TRAINING),
        *(pytest.param(name, False, id=f"eval-{name}") for name in IN_EVALUATION),
    ],
)
def test_one_graph_for_every_batch_size(name, train):
    """fullgraph=True: no graph break. The gradients are those of the forward pass's codebook, although the same graph
    updates it. By default two graphs: the second batch size makes the batch dynamic; that is
    tried with two layers, the others are told so from the start."""
    torch._dynamo.reset()
    layer, sample = make(name, train)
    eager = copy.deepcopy(layer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager_decomp_partition" if trains else "eager")(graph, inputs)

    trains = train and any(isinstance(module, Codebook) for module in layer.modules())
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    told = name not in ("vq", "fsq")
    for step, batch in enumerate((6, 11, 9)):
        x = torch.randn(batch, *sample)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        if told:
            torch._dynamo.mark_dynamic(mine, 0)
        got, expected = run(compiled, mine, step), run(eager, theirs, step)
        assert_close(got, expected)
        if train and objective(expected).requires_grad:
            objective(got).backward()
            objective(expected).backward()
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)
    assert len(graphs) == (1 if told else 2), f"{len(graphs)} graphs for three batch sizes"
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("name", ["vq-projected-heads", "fsq"])
def test_inductor(name):
    torch._dynamo.reset()
    layer, sample = make(name)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    for step in range(2):
        x = torch.randn(4, *sample)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        got, expected = run(compiled, mine, step), run(eager, theirs, step)
        assert_close(got, expected)
        objective(got).backward()
        objective(expected).backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


# an affine codebook follows its input in evaluation, too; an exported graph keeps the statistics
EXPORTED = [name for name in LAYERS if "affine" not in name]


@pytest.mark.parametrize("name", EXPORTED)
def test_export_with_a_dynamic_batch(name):
    layer, sample = make(name, train=False)
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(layer, (torch.randn(4, *sample),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(9, *sample)
    assert_close(tensors(program(x)), tensors(layer(x)))


@ALL
def test_half_precision(name):
    """bf16 and fp16, by autocast and by casting the layer: finite results and gradients, the results' dtype that of x."""
    for dtype in (torch.bfloat16, torch.float16):
        layer, sample = make(name)
        x = torch.randn(4, *sample, requires_grad=True)
        with torch.autocast("cpu", dtype):
            out = tensors(layer(x))
            loss = objective(out)
        assert all(t.isfinite().all() for t in out)
        if loss.requires_grad:
            loss.backward()
            assert x.grad is None or x.grad.isfinite().all()
        layer, sample = make(name)
        layer = layer.to(dtype)
        x = torch.randn(4, *sample, dtype=dtype, requires_grad=True)
        out = tensors(layer(x))
        if out[0].is_floating_point() and name != "binary-mapper":  # a one-hot vector, float32 also there
            assert out[0].dtype == dtype
        assert all(t.isfinite().all() for t in out)
        loss = objective(out)
        if loss.requires_grad:
            loss.backward()
            assert x.grad is None or x.grad.isfinite().all()


@ALL
def test_double(name):
    layer, sample = make(name)
    x = torch.randn(4, *sample, dtype=torch.float64)
    single = run(copy.deepcopy(layer), x.float())
    out = run(layer.double(), x)
    assert all(t.dtype == torch.float64 for t in out[:1] if t.is_floating_point())
    for a, b in zip(out, single):
        if a.is_floating_point() and name not in ("fsp", "binary-mapper"):  # these draw at random, by dtype
            torch.testing.assert_close(a.detach().float(), b.detach(), rtol=1e-4, atol=1e-5)


@ALL
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(name, how):
    layer, sample = make(name)
    layer(torch.randn(4, *sample))  # with statistics of a forward behind it
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(4, *sample)
    before = copy.deepcopy(layer.state_dict())
    copied = run(other, x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items()), "the copy shares state"
    assert_close(copied, run(layer, x), rtol=0, atol=0)
    for key, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@ALL
def test_functional_call(name):
    """Another layer's parameters and buffers, handed in, give its results; this layer stays as it is."""
    layer, sample = make(name, train=False)
    torch.manual_seed(5)
    other = LAYERS[name][0]().eval()
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, *sample)
    # a module under several names is restored wrongly by torch's tie_weights
    result = torch.func.functional_call(layer, state, (x,), tie_weights="shared" not in name)
    assert_close(tensors(result), tensors(other(x)))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("name", [name for name, (_, sample) in LAYERS.items() if len(sample) == 3])
def test_channels_last_images(name):
    layer, sample = make(name)
    x = torch.randn(4, *sample)
    mine, theirs = x.to(memory_format=torch.channels_last).requires_grad_(), x.clone().requires_grad_()
    assert not mine.is_contiguous()
    got, expected = run(copy.deepcopy(layer), mine), run(layer, theirs)
    assert_close(got, expected)
    objective(got).backward()
    objective(expected).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_all_layers_are_here():
    covered = {type(build()) for build, _ in LAYERS.values()}
    assert set(layers.QUANTIZERS) <= covered, [c.__name__ for c in set(layers.QUANTIZERS) - covered]
