"""LFQ on its own: entropies by brute force, memory, round trips, hostile input, compilation."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from test_layers_distributed import in_processes
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels.layers import LFQ
from vqkernels.layers.bit_entropy import BitEntropies, bits_of, entropy


class Sizes(TorchDispatchMode):
    """The numbers in the largest tensor that anything makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


# entropies


def by_table(logits, weight):
    """The definition: softmax over all codes, logarithms of clamped probabilities."""
    codes = bits_of(torch.arange(2 ** logits.shape[-1]), logits.shape[-1]).to(logits.dtype)
    table = (logits @ codes.mT).softmax(-1)
    return (entropy(table) @ weight).mean(), weight @ table


@pytest.mark.parametrize("bits", (1, 3, 5, 6, 7, 10))
@pytest.mark.parametrize("spread", (0.0, 0.3, 3.0, 30.0, 300.0))
def test_entropies_by_brute_force(bits, spread):
    weight = torch.rand(40).double()
    logits = (spread * torch.randn(2, 40, bits).double()).requires_grad_()
    upstream = torch.randn(2, 2**bits).double()
    grads = []
    for function in (BitEntropies(bits).double(), by_table):
        rows, mean = function(logits, weight)
        grads.append((rows, mean, torch.autograd.grad(rows * 3.0 + (mean * upstream).sum(), logits)[0]))
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-9 * max(1.0, b.abs().max())


@pytest.mark.parametrize("bits", (4, 7))
def test_entropy_gradient_by_differences(bits):
    logits = torch.randn(1, 3, bits, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    entropies = BitEntropies(bits).double()
    assert torch.autograd.gradcheck(lambda v: entropies(v, weight), logits)


def test_confident_and_undecided_bits():
    layer = LFQ(dim=8, entropy_loss_weight=1.0)
    for x, per_sample, batch in (
        (torch.zeros(1, 5, 8), 8.0, 8.0),  # undecided: every code alike
        (torch.ones(1, 5, 8), 0.0, 0.0),  # one code
        (layer.codebook.unsqueeze(0), 0.0, 8.0),  # every code once, in bits
    ):
        found = layer(x, return_loss_breakdown=True)[1]
        assert abs(found.per_sample_entropy.item() - per_sample * 0.6931472) < 1e-4
        assert abs(found.batch_entropy.item() - batch * 0.6931472) < 1e-4


@pytest.mark.parametrize("bits", (4, 7))
def test_huge_features_are_only_confident(bits):
    layer = LFQ(dim=bits)
    x = (torch.randn(1, 4, bits).sign() * 1e38).requires_grad_()
    out = layer(x)
    (out.quantized.sum() + out.entropy_aux_loss).backward()
    assert out.entropy_aux_loss.isfinite() and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("bits", (10, 16))
def test_no_table_of_tokens_times_codes(bits):
    layer, tokens = LFQ(dim=bits, commitment_loss_weight=0.1), 2000
    x = torch.randn(1, tokens, bits, requires_grad=True)
    with Sizes() as sizes:
        out = layer(x)
        (out.quantized.sum() + out.entropy_aux_loss).backward()
    assert sizes.largest <= max(tokens * (2 ** (bits // 2) + 4), 2**bits)
    layer.entropy_loss_weight = 0.0
    with Sizes() as sizes:
        layer(x)
        layer.eval()(x)
    assert sizes.largest <= 2 * tokens * bits, "no work on codes at all in evaluation, or without that loss"


def test_as_many_codes_as_an_index_holds():
    for bits in (20, 24, 25, 32):
        layer = LFQ(dim=bits).eval()
        x = torch.randn(2, 50, bits)
        quantized, indices, _ = layer(x)
        assert indices.max() < 2**bits and indices.max() > 2 ** (bits - 1)
        assert torch.equal(layer.indices_to_codes(indices), quantized) and torch.equal(quantized > 0, x > 0)


# codes and indices

OPTIONS = {
    "plain": {},
    "scaled": {"codebook_scale": 0.3},
    "spherical": {"spherical": True, "codebook_scale": 2.0},
    "rotated": {"orthogonal_rotation": True},
    "both": {"orthogonal_rotation": True, "spherical": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_code_survives_the_round_trip(options):
    layer = LFQ(dim=6, **options).eval()
    index = torch.arange(64).unsqueeze(0)
    codes = layer.indices_to_codes(index)
    quantized, again, _ = layer(codes)
    assert torch.equal(again, index) and torch.allclose(quantized, codes, atol=1e-6)
    assert len(codes[0].unique(dim=0)) == 64
    if layer.spherical:
        assert torch.allclose(codes.norm(dim=-1), torch.full((1, 64), layer.codebook_scale))


LAYOUTS = {
    "single tokens": ({}, (7, 9)),
    "sequence": ({}, (2, 7, 9)),
    "channel first": ({"channel_first": True}, (2, 9, 7)),
    "image": ({}, (2, 9, 3, 4)),
    "image, channel last": ({"channel_first": False}, (2, 3, 4, 9)),
    "video": ({"channel_first": True}, (2, 9, 2, 3, 4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codebooks", (1, 2))
def test_layouts(codebooks, layout):
    """Every layout gives what the tokens alone give."""
    options, shape = LAYOUTS[layout]
    torch.manual_seed(0)
    layer = LFQ(dim=9, codebook_size=16, num_codebooks=codebooks, **options)
    plain = LFQ(dim=9, codebook_size=16, num_codebooks=codebooks, channel_first=False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    first = shape[1] == 9 and len(shape) > 2
    tokens = x.movedim(1, -1) if first else x
    (quantized, indices, loss), expected = layer(x), plain(tokens)
    assert torch.allclose(quantized.movedim(1, -1) if first else quantized, expected.quantized, atol=1e-6)
    assert torch.equal(indices, expected.indices) and torch.allclose(loss, expected.entropy_aux_loss, atol=1e-6)
    assert indices.shape == tokens.shape[:-1] + ((2,) if codebooks == 2 else ())
    if x.dim() > 2 or not first:
        assert torch.allclose(layer.eval().indices_to_codes(indices), quantized, atol=1e-6) or layout == "single tokens"
    mask = torch.rand(tokens.shape[:-1]) < 0.5
    masked = layer.train()(x, mask=mask)
    assert torch.allclose(masked.entropy_aux_loss, plain(tokens[mask]).entropy_aux_loss, atol=1e-5)
    if x.is_contiguous() and x.dim() == 4:
        assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)).indices, indices)


def test_index_minus_one_is_zero():
    for options in ({}, {"dim": 9}):
        layer = LFQ(codebook_size=16, **options)
        codes = layer.indices_to_codes(torch.tensor([[3, -1]]))
        assert codes[0, 0].any() and not codes[0, 1].any()


# hostile input


@pytest.mark.parametrize("poison", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("bits", (4, 7))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_non_finite_token_is_loud_but_alone(options, bits, poison):
    layer = LFQ(dim=bits, commitment_loss_weight=0.5, **options)
    clean = torch.randn(1, 11, bits)
    x = clean.clone()
    x[0, 4, 1] = poison
    rest = [i for i in range(11) if i != 4]
    x, alone = x.requires_grad_(), clean[:, rest].requires_grad_()
    results = []
    for leaf in (x, alone):
        quantized, indices, loss = layer(leaf)
        (loss * 3.0 + quantized[quantized.isfinite()].sum()).backward()
        results.append((quantized, indices, loss))
    (quantized, indices, loss), (q, i, expected) = results
    assert indices[0, 4] == -1 and quantized[0, 4].isnan().all()
    assert torch.equal(indices[:, rest], i) and torch.allclose(quantized[:, rest], q)
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(x.grad[:, rest], alone.grad, atol=1e-6)
    assert layer.eval()(x).quantized[0, 4].isnan().all()


@pytest.mark.parametrize("options", ({}, {"frac_per_sample_entropy": 0.5}, {"spherical": True}))
def test_nothing_to_learn_from(options):
    for bits in (4, 7):
        layer = LFQ(dim=bits, commitment_loss_weight=0.5, **options)
        x = torch.randn(2, 6, bits, requires_grad=True)
        (out, parts) = layer(x, mask=torch.zeros(2, 6, dtype=torch.bool), return_loss_breakdown=True)
        out.entropy_aux_loss.backward()
        assert out.entropy_aux_loss == 0.0 and not any(parts) and not x.grad.any()
        out = layer(torch.randn(2, 0, bits))
        assert out.quantized.shape == (2, 0, bits) and out.entropy_aux_loss == 0.0


def test_zero_is_negative():
    out = LFQ(dim=4).eval()(torch.zeros(1, 1, 4))
    assert out.indices.item() == 0 and (out.quantized == -1.0).all()


def test_a_share_of_the_valid_tokens():
    layer = LFQ(dim=5, frac_per_sample_entropy=0.3)
    drawn = set()
    for seed in range(30):
        torch.manual_seed(seed)
        valid = torch.rand(50) < 0.7
        rows, counted = layer._sample(valid)
        assert counted.sum() == int(valid.sum() * 0.3)
        assert valid[rows[counted]].all() and len(set(rows.tolist())) == len(rows)
        drawn |= set(rows[counted].tolist())
    assert len(drawn) == 50, "each has its chance"


def test_losses_in_evaluation_are_fresh():
    layer = LFQ(dim=4).eval()
    for _ in range(2):
        out, parts = layer(torch.randn(1, 3, 4), return_loss_breakdown=True)
        assert out.entropy_aux_loss == 0.0 and not any(parts)
        out.entropy_aux_loss.add_(1.0)
        parts.commitment.add_(1.0)


@pytest.mark.parametrize(
    "options, message",
    (
        ({}, "dim and codebook_size are both missing"),
        ({"codebook_size": 20}, "for example 32"),
        ({"dim": 40}, "above the largest"),
        ({"codebook_size": 16, "num_codebooks": 2, "keep_num_codebooks_dim": False}, "one codebook only"),
        ({"dim": 4, "frac_per_sample_entropy": 0.0}, "above 0"),
        ({"dim": 4, "soft_clamp_input_value": 0.5}, "under codebook_scale"),
        ({"dim": 5, "codebook_size": 16, "has_projections": False}, "needs projections"),
    ),
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        LFQ(**options)


def test_shapes_that_do_not_fit():
    layer = LFQ(dim=4)
    for x, mask in (
        (torch.randn(2, 3, 5), None),
        (torch.randn(4), None),
        (torch.randn(2, 3, 4), torch.ones(3, dtype=torch.bool)),
        (torch.randn(2, 3, 4), torch.ones(2, 3)),
    ):
        with pytest.raises(ValueError, match="expected"):
            layer(x, mask=mask)


# PyTorch's machinery


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_dtypes(dtype):
    for options in OPTIONS.values():
        layer, x = LFQ(dim=7, **options), torch.randn(2, 20, 7).to(dtype)
        cast = copy.deepcopy(layer).to(dtype)
        for model in (layer, cast):
            out = model(x)
            assert out.quantized.dtype == dtype
            assert out.entropy_aux_loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(cast(x).indices, layer(x.to(torch.promote_types(dtype, torch.float32))).indices)
    with torch.autocast("cpu", torch.bfloat16):
        out = LFQ(dim=9, codebook_size=128)(torch.randn(2, 20, 9))
    assert out.quantized.dtype == torch.bfloat16 and out.entropy_aux_loss.dtype == torch.float32


COMPILED = {
    "halves": {"dim": 8, "commitment_loss_weight": 0.1},
    "a share": {"dim": 4, "frac_per_sample_entropy": 0.5},
    "two codebooks": {"dim": 9, "codebook_size": 16, "num_codebooks": 2, "spherical": True},
}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_one_graph_with_a_mask(options):
    torch._dynamo.reset()
    layer = LFQ(**options)
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (20, 33, 50):
        x, mask = torch.randn(2, tokens, options["dim"]), torch.rand(2, tokens) < 0.7
        torch.manual_seed(1)
        a = compiled(x, mask=mask)
        torch.manual_seed(1)
        b = layer(x, mask=mask)
        assert torch.equal(a.indices, b.indices) and torch.allclose(a.entropy_aux_loss, b.entropy_aux_loss, atol=1e-6)
    assert counter.frame_count == 1


def test_copies_and_usage():
    layer = LFQ(dim=10, codebook_size=16, num_codebooks=2, straight_through_activation=nn.Tanh())
    with pytest.raises(RuntimeError, match="last forward"):
        layer.usage  # noqa: B018
    out = layer(torch.randn(3, 50, 10))
    usage = layer.usage
    assert usage.counts.shape == (2, 16) and torch.equal(
        usage.counts[0], out.indices[..., 0].flatten().bincount(minlength=16)
    )
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(3, 50, 10)
        assert torch.equal(twin.eval()(x).quantized, layer.eval()(x).quantized)


def entropy_of_a_share(rank, world, join=lambda: None):
    layer = LFQ(dim=7)  # built before the processes know of one another
    join()
    x = torch.randn(1, 30, 7, generator=torch.Generator().manual_seed(9)).double()
    mine = x[:, [slice(0, 30), slice(0, 12), slice(12, 30)][rank + (world > 1)]].requires_grad_()
    entropy = layer(mine, return_loss_breakdown=True)[1].batch_entropy
    entropy.backward()
    return entropy.detach(), mine.grad


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo backend")
def test_two_processes_share_the_entropy_of_the_batch(tmp_path):
    """Of unequal shares too; averaged as DistributedDataParallel does, the gradient is that of the joined batch."""
    ((expected, grad),) = in_processes(1, entropy_of_a_share, tmp_path)
    (a, grad_a), (b, grad_b) = in_processes(2, entropy_of_a_share, tmp_path)
    assert torch.allclose(a, expected) and torch.allclose(b, expected)
    assert torch.allclose(torch.cat([grad_a, grad_b], 1) / 2, grad)
