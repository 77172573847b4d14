"""``vqkernels.compat`` in the place of ``vector_quantize_pytorch``: names, submodules, signatures, ``Sequential``."""

import inspect
import pkgutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from vqkernels import compat

theirs = pytest.importorskip(
    "vector_quantize_pytorch", reason="compares with vector-quantize-pytorch, which is not installed"
)
LAYERS = sorted(name for name, value in vars(theirs).items() if inspect.isclass(value))
SUBMODULES = sorted(module.name for module in pkgutil.iter_modules(theirs.__path__))


def test_every_layer_is_there_and_is_ours():
    assert set(LAYERS) <= set(compat.__all__)
    for name in compat.__all__:
        assert getattr(compat, name).__module__.startswith("vqkernels.layers."), name


@pytest.mark.parametrize("name", SUBMODULES)
def test_every_submodule_is_there(name):
    mine, other = getattr(compat, name), getattr(theirs, name)
    layers = {key for key in LAYERS if getattr(theirs, key).__module__ == other.__name__}
    assert layers <= set(vars(mine)), "the layers that the submodule defines"
    public = {key for key in vars(mine) if not key.startswith("_")}
    assert public <= set(vars(other)), "nothing that is not there"


def parameters(function):
    return list(inspect.signature(function).parameters.values())[1:]


def same_default(mine, other):
    if isinstance(other.default, (nn.Module, dict)):
        return mine.default is None  # made anew for every layer
    if other.name == "freeze_codebook" and mine.default is None:
        return True  # that of the constructor holds unless the call says otherwise
    return mine.default == other.default or (callable(mine.default) and callable(other.default))


@pytest.mark.parametrize("method", ("__init__", "forward"))
@pytest.mark.parametrize("name", LAYERS)
def test_signatures(name, method):
    """The same parameters in the same order with the same defaults; ours may have more, by keyword only."""
    mine, other = (parameters(getattr(getattr(package, name), method)) for package in (compat, theirs))
    # what theirs takes by **kwargs and hands on may be written out here
    keywords = next((p.name for p in other if p.kind is p.VAR_KEYWORD), None)
    by_name = {p.name: p for p in mine}
    for parameter in other:
        if parameter.name == keywords:
            continue
        found = by_name.get(parameter.name)
        assert found is not None, parameter.name
        assert found.kind is parameter.kind, parameter.name
        assert same_default(found, parameter), (parameter.name, found.default, parameter.default)
    positional = [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in other if p.kind is p.POSITIONAL_OR_KEYWORD]
    extra = [p for p in mine if p.name not in {q.name for q in other} and p.kind is not p.VAR_KEYWORD]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extra)


PROGRAM = """
from vector_quantize_pytorch import LFQ, Sequential, VectorQuantize
from vector_quantize_pytorch.residual_vq import GroupedResidualVQ, ResidualVQ
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to
from vector_quantize_pytorch.finite_scalar_quantization import FSQ, round_ste
import vector_quantize_pytorch.lookup_free_quantization
import vector_quantize_pytorch as package
import torch, vqkernels
assert VectorQuantize is vqkernels.VectorQuantize and ResidualVQ is vqkernels.ResidualVQ
assert package.lookup_free_quantization.LFQ is LFQ is vqkernels.LFQ
assert ResidualVQ(dim=4, num_quantizers=2, codebook_size=8)(torch.randn(1, 5, 4))[1].shape == (1, 5, 2)
for bad in ("vector_quantize_pytorch.no_such_module", "residual_vq"):
    try:
        __import__(bad)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{bad} was imported")
"""
ALIASES = {
    "sys.modules": """
import sys, vqkernels.compat
sys.modules["vector_quantize_pytorch"] = vqkernels.compat
""",
    "finder": """
import importlib, importlib.abc, importlib.util, sys
class Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vector_quantize_pytorch":
            return importlib.util.spec_from_loader(name, self, is_package="." not in name)
    def create_module(self, spec):
        return importlib.import_module("vqkernels.compat" + spec.name[len("vector_quantize_pytorch"):])
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Alias())
""",
}


@pytest.mark.parametrize("alias", ALIASES)
def test_programs_run_under_an_alias(alias):
    subprocess.run([sys.executable, "-c", ALIASES[alias] + PROGRAM], check=True)


def test_names_that_are_missing_are_named():
    with pytest.raises(AttributeError, match="no 'NoSuchLayer'; it has: FSP, FSQ"):
        compat.NoSuchLayer  # noqa: B018
    with pytest.raises(ImportError, match="no_such_name"):
        from vqkernels.compat.residual_vq import no_such_name  # noqa: F401


def test_straight_through_rounding():
    z = torch.randn(20, requires_grad=True)
    for name in ("round_ste", "floor_ste"):
        a, b = (getattr(package.finite_scalar_quantization, name)(z) for package in (compat, theirs))
        assert torch.equal(a, b)
        assert torch.equal(torch.autograd.grad(a.sum(), z)[0], torch.ones(20))


def test_rotate_to():
    source, target, weight = torch.randn(3, 20, 6)
    grads = []
    for package in (compat, theirs):
        leaf = source.clone().requires_grad_()
        rotated = package.vector_quantize_pytorch.rotate_to(leaf, target)
        assert torch.allclose(rotated, target, atol=1e-5)
        grads.append(torch.autograd.grad((rotated * weight).sum(), leaf)[0])
    assert torch.allclose(*grads, atol=1e-5)


@pytest.mark.parametrize(
    "name, options",
    (
        ("VectorQuantize", {"dim": 6, "codebook_size": 16}),
        ("FSQ", {"levels": [5, 5], "dim": 6}),
        ("LFQ", {"dim": 6, "codebook_size": 16}),
    ),
)
def test_sequential(name, options):
    outputs, x = [], torch.randn(2, 10, 4)
    for package in (compat, theirs):
        torch.manual_seed(0)
        quantizer = getattr(package, name)(**options)
        layer = package.Sequential(nn.Linear(4, 6), nn.GELU(), quantizer, nn.Linear(6, 4))
        outputs.append((layer.state_dict().keys(), *layer(x)))
        assert isinstance(quantizer, package.utils.QUANTIZE_KLASSES)
    assert outputs[0][0] == outputs[1][0] and len(outputs[0]) == len(outputs[1])
    for a, b in zip(outputs[0][1:], outputs[1][1:], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_sequential_hands_arguments_to_the_quantizer():
    layer = compat.Sequential(nn.Linear(4, 6), compat.VectorQuantize(dim=6, codebook_size=16), nn.Linear(6, 4))
    mask = torch.tensor([[True, False, True]])
    quantized, indices, loss = layer(torch.randn(1, 3, 4), mask=mask)
    assert quantized.shape == (1, 3, 4) and (indices == -1).tolist() == (~mask).tolist() and loss.shape == ()
    for modules in ((nn.Linear(4, 4),), (compat.LFQ(dim=4), compat.LFQ(dim=4))):
        with pytest.raises(ValueError, match="exactly one"):
            compat.Sequential(*modules)
