"""Where the layers differ on purpose from vector-quantize-pytorch: one test per row of the table in docs/migrating.md
that tests/test_layers.py does not have already."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels import ResidualVQ, VectorQuantize

DIM, K = 8, 16


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


MASKED = {
    "projection": lambda: VectorQuantize(DIM, K, codebook_dim=4),
    "heads": lambda: VectorQuantize(DIM, K, codebook_dim=4, heads=2),
    "projected heads": lambda: VectorQuantize(DIM, K, heads=2),
    "separate heads": lambda: VectorQuantize(DIM, K, codebook_dim=4, heads=2, separate_codebook_per_head=True),
    "cosine": lambda: VectorQuantize(DIM, K, use_cosine_sim=True),
    "residual": lambda: ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3),
    "projected residual": lambda: ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, codebook_dim=4),
    "cosine residual": lambda: ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, use_cosine_sim=True),
}


@pytest.mark.parametrize("by", ("mask", "lens"))
@pytest.mark.parametrize("build", MASKED.values(), ids=MASKED)
def test_a_padded_batch_equals_the_unpadded_one(build, by):
    """Results, loss, gradients and codebook state, whatever lies in the padding."""
    torch.manual_seed(0)
    padded = build()
    torch.manual_seed(0)
    plain = build()
    x = torch.randn(1, 20, DIM)
    a = torch.cat([x, torch.full((1, 7, DIM), 1e4)], 1).requires_grad_()
    b = x.clone().requires_grad_()
    mask = {"mask": (torch.arange(27) < 20)[None], "lens": torch.tensor([20])}[by]
    (q1, i1, l1), (q2, i2, l2) = padded(a, **{by: mask}), plain(b)
    (q1.square().sum() + l1.sum()).backward()
    (q2.square().sum() + l2.sum()).backward()
    close(q1[:, :20], q2), close(l1, l2), close(a.grad[:, :20], b.grad)
    assert torch.equal(i1[:, :20], i2) and (i1[:, 20:] == -1).all()
    assert (q1[:, 20:] == 0).all() and (a.grad[:, 20:] == 0).all()
    for (name, v), w in zip(padded.state_dict().items(), plain.state_dict().values(), strict=True):
        close(v.float(), w.float()), name
    for p, r in zip(padded.parameters(), plain.parameters(), strict=True):
        close(p.grad, r.grad)


@pytest.mark.parametrize("codebook_dim", (None, 4))
@pytest.mark.parametrize(
    "options, shape",
    (
        ({"channel_last": False}, (2, DIM, 30)),
        ({"accept_image_fmap": True}, (2, DIM, 5, 6)),
        ({"accept_3d_fmap": True}, (2, DIM, 2, 3, 5)),
    ),
)
def test_residual_layouts(options, shape, codebook_dim):
    """Channels first is channels last, transposed; the round trip gives the layout of the input."""
    torch.manual_seed(0)
    first = ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, codebook_dim=codebook_dim, **options)
    last = ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, codebook_dim=codebook_dim)
    last.load_state_dict(first.state_dict())
    x = torch.randn(shape)
    (q1, i1, l1, codes), (q2, i2, l2) = first(x, return_all_codes=True), last(x.movedim(1, -1))
    assert torch.equal(q1, q2.movedim(-1, 1)) and torch.equal(i1, i2) and torch.equal(l1, l2)
    assert codes.shape == (3, *i1.shape[:-1], codebook_dim or DIM)
    quantized, index, _ = first.eval()(x)
    close(first.get_output_from_indices(index), quantized)


@pytest.mark.parametrize("options", ({"channel_last": False}, {"accept_image_fmap": True}, {"heads": 2}))
def test_output_from_indices_is_the_output(options):
    layer = VectorQuantize(DIM, K, codebook_dim=3, **options).eval()
    image = "accept_image_fmap" in options
    x = torch.randn((2, DIM, 5, 6) if image else (2, DIM, 30) if "channel_last" in options else (2, 30, DIM))
    mask = None if image else torch.rand(2, 30) < 0.5
    quantized, index, _ = layer(x, mask=mask)
    close(layer.get_output_from_indices(index), quantized)
    codes = layer.get_codes_from_indices(index)
    assert codes.shape[1 if image or "channel_last" in options else -1] == 3 * options.get("heads", 1)


def test_frozen_residual_codebooks_stay_as_they_are():
    for options in ({}, {"shared_codebook": True, "threshold_ema_dead_code": 2}):
        by_constructor = ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=2, freeze_codebook=True, **options)
        by_argument = ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=2, **options)
        for layer, arguments in ((by_constructor, {}), (by_argument, {"freeze_codebook": True})):
            before = {k: v.clone() for k, v in layer.state_dict().items()}
            layer(torch.randn(1, 30, DIM), **arguments)
            assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_residual_cross_entropy():
    layer = ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3)
    x = torch.randn(2, 30, DIM, requires_grad=True)
    targets = layer.eval()(x)[1]
    quantized, own = layer(x, indices=targets)
    close(quantized, layer(x)[0])
    by_list = layer(x, indices=list(targets.unbind(-1)))[1]
    other = layer(x, indices=(targets + 1) % K)[1]
    assert own < other and own == by_list
    own.backward()
    assert x.grad.abs().sum() > 0


def test_cross_entropy_gradient_and_layout():
    """The gradient belongs to the codewords that gave the loss, not to those after the EMA step."""
    layer = VectorQuantize(DIM, K, codebook_dim=3, decay=0.1)
    x, targets = torch.randn(2, 30, DIM, requires_grad=True), torch.randint(K, (2, 30))
    codebook = layer.codebook.clone()
    quantized, loss = layer(x, indices=targets)
    loss.backward()
    v = x.detach().clone().requires_grad_()
    logits = -torch.cdist(layer.project_in(v), codebook, compute_mode="donot_use_mm_for_euclid_dist")
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(x.grad, v.grad, rtol=1e-4, atol=1e-6)
    assert quantized.shape == x.shape


def test_projection_learns_without_an_input_gradient():
    layer = VectorQuantize(DIM, K, codebook_dim=4, commitment_weight=0.0)
    layer(torch.randn(1, 30, DIM))[0].square().sum().backward()
    assert layer.project_in.weight.grad.abs().sum() > 0


def test_half_precision_residuals_are_kept_in_float32():
    layer = ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=4).eval()
    x = torch.randn(1, 200, DIM).bfloat16()
    quantized, index, _ = layer(x)
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(index, layer(x.float())[1]), "the choice of the exact values of x, at every level"


class NoHostSync(TorchDispatchMode):
    """Fails on the operators that make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", ({}, {"use_cosine_sim": True}))
def test_forward_never_waits_for_the_device(options):
    options = options | {"threshold_ema_dead_code": 2, "kmeans_init": True}
    for layer in (
        VectorQuantize(DIM, K, **options),
        VectorQuantize(DIM, K, codebook_dim=3, heads=2, **options),
        ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, **options),
        ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, shared_codebook=True, **options),
    ):
        x, mask = torch.randn(1, 60, DIM, requires_grad=True), torch.rand(1, 60) < 0.5
        layer(x)  # the k-means start
        with NoHostSync():
            quantized, _, loss = layer(x, mask=mask)
            (quantized.sum() + loss.sum()).backward()
            layer.eval()(x)
