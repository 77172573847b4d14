"""A layer of this package beside its namesake in the installed vector-quantize-pytorch: helpers of the differential tests.

``pair``, ``close`` and ``compare`` keep count; ``conftest.py`` prints the sum at the end of a run.
"""

import os

import pytest
import torch

from vqkernels import compat as ours

theirs = pytest.importorskip(
    "vector_quantize_pytorch", reason="compares with vector-quantize-pytorch, which is not installed"
)

DIM, K, BATCH = 16, 24, 2


class Record:
    """What a run compared: the configurations, and the largest deviation relative to max(1, largest value)."""

    def __init__(self):
        self.configurations, self.comparisons = set(), 0
        self.largest, self.where = 0.0, "nowhere"

    def add(self, deviation, what):
        self.comparisons += 1
        if deviation > self.largest:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].removesuffix(" (call)")
            self.largest, self.where = deviation, f"{what or 'tensor'} in {test}"

    def state(self):
        return {**vars(self), "configurations": sorted(self.configurations)}

    @classmethod
    def of(cls, states):
        """What several processes compared together."""
        record = cls()
        for state in states:
            record.configurations.update(state["configurations"])
            record.comparisons += state["comparisons"]
            if state["largest"] > record.largest:
                record.largest, record.where = state["largest"], state["where"]
        return record

    def summary(self):
        return (
            f"{len(self.configurations)} configurations compared with vector-quantize-pytorch, {self.comparisons} "
            f"tensors; largest deviation {self.largest:.1e}: {self.where}"
        )


record = Record()


def pair(name, make_options=dict, **options):
    """Both layers from one seed, with equal checkpoints that load strictly in both directions. ``make_options``: more
    options, made anew for each layer."""
    record.configurations.add(f"{name}({', '.join(f'{k}={v}' for k, v in sorted(options.items()))})")
    layers = []
    for package in (ours, theirs):
        torch.manual_seed(0)
        layers.append(getattr(package, name)(**options, **make_options()))
    mine, other = layers
    a, b = mine.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        uninitialised = key.endswith(("codebook_mean", "codebook_variance"))  # theirs is torch.empty
        assert a[key].dtype == b[key].dtype and (uninitialised or torch.equal(a[key], b[key])), key
    other.load_state_dict(a, strict=True)
    mine.load_state_dict(b, strict=True)
    return mine, other


def close(a, b, tolerance=1e-5, what=""):
    assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    error = (a - b).abs().max().item() if b.numel() else 0.0
    record.add(error / scale, what)
    assert error <= tolerance * scale, f"{what}: differs by {error}, allowed {tolerance * scale}"


def same(a, b, what=""):
    """Both tensors or None: numbers close, indices equal."""
    if a is None or b is None:
        assert a is b, what
    elif a.is_floating_point():
        close(a.detach(), b.detach(), what=what)
    else:
        assert torch.equal(a, b), what


def close_states(mine, other, tolerance=1e-5):
    a, b = mine.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        close(a[key].float(), b[key].float(), tolerance, key)


def same_choice(a, b, z, codebook, cosine):
    """The index rule for z [N, D], codebook [K, D]; returns which rows agree."""
    agree = a == b
    for row in (~agree).nonzero().flatten().tolist():
        v, c1, c2 = z[row].double(), codebook[a[row]].double(), codebook[b[row]].double()
        gap = (v @ c1 - v @ c2) if cosine else ((v - c1).square().sum() - (v - c2).square().sum())
        bound = (
            torch.finfo(torch.float32).eps * z.shape[-1] * (v.square().sum() + c1.square().sum() + c2.square().sum())
        )
        assert gap.abs() <= bound, f"row {row}: {a[row]} against {b[row]}, gap {gap}, bound {bound}"
    return agree


def run(layer, x, weight, **kwargs):
    """-> outputs, gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the same noise for both layers
        out = layer(x, **kwargs)
    if layer.training:
        ((out[0] * weight).sum() + (out[2] * torch.arange(1.0, out[2].numel() + 1).view(out[2].shape)).sum()).backward()
    return out, x.grad, {n: p.grad for n, p in layer.named_parameters()}


def compare(mine, other, x, tolerance=1e-5, gradients=True, **kwargs):
    """``gradients``: False where theirs are those of the codewords after the EMA step."""
    weight = torch.randn_like(x)
    (q1, i1, l1, *more1), g1, p1 = run(mine, x, weight, **kwargs)
    (q2, i2, l2, *more2), g2, p2 = run(other, x, weight, **kwargs)
    assert i1.dtype == i2.dtype and i1.shape == i2.shape
    assert torch.equal(i1, i2), "indices differ; check the rows by same_choice"
    close(q1, q2, tolerance, "quantized")
    close(l1, l2, tolerance, "loss")
    if kwargs.get("return_loss_breakdown"):
        for part, a, b in zip(more1[0]._fields, more1[0], more2[0], strict=True):
            close(a.detach(), b.detach(), tolerance, part)
    if mine.training and gradients:
        close(g1, g2, tolerance, "gradient of x")
    for name in p1 if gradients else ():
        assert (p1[name] is None) == (p2[name] is None), name
        if p1[name] is not None:
            close(p1[name], p2[name], tolerance, name)
    close_states(mine, other, tolerance)
    return i1


LAYOUTS = {
    "last": ({}, (BATCH, 30, DIM)),
    "first": ({"channel_last": False}, (BATCH, DIM, 30)),
    "image": ({"accept_image_fmap": True}, (BATCH, DIM, 5, 6)),
    "volume": ({"accept_3d_fmap": True}, (BATCH, DIM, 2, 3, 5)),
}
HEADS = {"one": {}, "shared": {"heads": 4}, "separate": {"heads": 4, "separate_codebook_per_head": True}}
