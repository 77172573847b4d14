"""torch.vmap and torch.func.grad: the same as a loop over the mapped dimension; clear errors where they make no sense."""

import copy

import pytest
import torch
from test_layers_engine import ALL, make, tensors
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state

import vqkernels as vq
from vqkernels.layers import ResidualVQ, SimVQ, VectorQuantize
from vqkernels.reference.vmap import RULES
from vqkernels.registry import SPECS

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = 3


def variants(argument, generator):
    """Three of a kind: a tensor, a list of tensors, or something that is not mapped."""
    if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
        return [list(t) for t in zip(*(variants(t, generator) for t in argument))]
    if not isinstance(argument, Tensor) or not argument.dim():
        return [argument] * SIZE
    # other rows in another order: same shapes, all values allowed
    return [argument, argument.flip(0), argument[torch.randperm(len(argument), generator=generator)]]


def stacked(values, dim):
    if isinstance(values[0], list):
        return [stacked(t, dim) for t in zip(*values)]
    return torch.stack(values, dim)


def mappable(argument) -> bool:
    return isinstance(argument, Tensor) or (isinstance(argument, list) and argument and isinstance(argument[0], Tensor))


@pytest.mark.parametrize("overload", ["default", "reference"])
@pytest.mark.parametrize("name", RULES)
def test_operators(name, overload):
    spec = SPECS[name]
    op, generator = getattr(spec.op, overload), torch.Generator().manual_seed(0)
    for dtype in {torch.float32, torch.bfloat16} & set(spec.dtypes) or spec.dtypes:
        for label, arguments in spec.samples(dtype)[:4]:
            given = [i for i, argument in enumerate(arguments) if mappable(argument)]
            # everything mapped, each argument alone, each argument left out
            choices = {tuple(given), *((i,) for i in given), *(tuple(j for j in given if j != i) for i in given)}
            for chosen in sorted(choices - {()}):
                values = [variants(a, generator) if i in chosen else [a] * SIZE for i, a in enumerate(arguments)]
                dims = tuple(min(len(chosen) % 2, depth(a)) if i in chosen else None for i, a in enumerate(arguments))
                mapped = [v[0] if d is None else stacked(v, d) for v, d in zip(values, dims, strict=True)]
                got, *expected = (
                    (result,) if isinstance(result, Tensor) else result
                    for result in (torch.vmap(op, dims)(*mapped), *(op(*parts) for parts in zip(*values)))
                )
                check(spec, got, expected, f"{label}, mapped {chosen}")


def depth(argument) -> int:
    return argument.dim() if isinstance(argument, Tensor) else min(t.dim() for t in argument)


def check(spec, got, expected, label):
    for j, (kind, result) in enumerate(zip(spec.outputs, got, strict=True)):
        wanted = torch.stack([e[j] for e in expected])
        assert result.dtype == wanted.dtype
        if kind == "exact" or not result.is_floating_point():
            torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True, msg=f"{spec.name}: {label}")
        else:
            eps = torch.finfo(result.dtype).eps * spec.tolerance
            scale = wanted.nan_to_num().abs().max()
            torch.testing.assert_close(result, wanted, rtol=eps, atol=float(eps * scale), equal_nan=True)


@ALL
def test_layers_in_evaluation(name):
    layer, sample = make(name, train=False)
    x = torch.randn(SIZE, 4, *sample)
    if "affine" in name:  # follows its input in evaluation, too
        with pytest.raises(RuntimeError, match="affine_param: always"):
            torch.vmap(layer)(x)
        return
    layer(x[0])
    before, usage = copy.deepcopy(layer.state_dict()), tensors(getattr(layer, "usage", ()))
    got = tensors(torch.vmap(layer, in_dims=1)(x.transpose(0, 1)))
    for a, b in zip(tensors(getattr(layer, "usage", ())), usage, strict=True):
        assert torch.equal(a, b)  # of the last forward outside
    for i, part in enumerate(x):
        for a, b in zip(got, tensors(layer(part)), strict=True):
            torch.testing.assert_close(a[i].detach(), b.detach())
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def models(build, count=SIZE):
    torch.manual_seed(6)
    parts = [build() for _ in range(count)]
    return parts, copy.deepcopy(parts), copy.deepcopy(parts[0]), *stack_module_state(parts)


@pytest.mark.parametrize(
    "build",
    [
        lambda: VectorQuantize(8, 16),
        lambda: VectorQuantize(8, 16, use_cosine_sim=True, heads=2, codebook_dim=3, separate_codebook_per_head=True),
        lambda: ResidualVQ(dim=8, num_quantizers=3, codebook_size=16),
        lambda: SimVQ(8, 16),
    ],
    ids=["vq", "heads", "residual", "simvq"],
)
def test_an_ensemble_trains_as_its_members_do(build):
    """Every member its own parameters, codebook and batch: losses, gradients and EMA steps."""
    _, alone, base, parameters, buffers = models(build)
    x = torch.randn(SIZE, 20, 8)

    def objective(parameters, buffers, x):
        quantized, indices, loss = functional_call(base, (parameters, buffers), (x,))
        return quantized.square().sum() + loss.sum(), indices

    (gradients, dx), indices = torch.vmap(grad(objective, argnums=(0, 2), has_aux=True))(parameters, buffers, x)
    for i, layer in enumerate(alone):
        part = x[i].clone().requires_grad_()
        quantized, index, loss = layer(part)
        (quantized.square().sum() + loss.sum()).backward()
        assert torch.equal(index, indices[i])
        torch.testing.assert_close(dx[i], part.grad)
        for key, parameter in layer.named_parameters():
            torch.testing.assert_close(gradients[key][i], parameter.grad, msg=key)
        for key, buffer in layer.named_buffers():
            torch.testing.assert_close(buffers[key][i], buffer, msg=key)


@pytest.mark.parametrize("estimator", ["rotation", "reflection", "ste"])
def test_gradients_per_sample(estimator):
    z, codebook, weight = torch.randn(5, 7, 4), torch.randn(9, 4), torch.randn(5, 7, 4)
    z[1, 2], z[2, 3] = torch.nan, 0.0

    def objective(z, codebook, weight):
        out = vq.vector_quantize(z, codebook, estimator)
        rotated = vq.rotation_trick(z, out.quantized.detach(), estimator)
        return ((out.quantized + rotated).nan_to_num() * weight).sum() + out.commitment_loss + 3 * out.codebook_loss

    got = torch.vmap(grad(objective, argnums=(0, 1)), in_dims=(0, None, 0))(z, codebook, weight)
    for i in range(len(z)):
        part, book = z[i].clone().requires_grad_(), codebook.clone().requires_grad_()
        objective(part, book, weight[i]).backward()
        torch.testing.assert_close(got[0][i], part.grad, equal_nan=True)
        torch.testing.assert_close(got[1][i], book.grad)


def test_finite_scalars_per_sample():
    z = torch.randn(5, 7, 3)
    got = torch.vmap(grad(lambda z: vq.fsq(z, [8, 5, 3]).square().sum()))(z)
    mine = z.clone().requires_grad_()
    vq.fsq(mine, [8, 5, 3]).square().sum().backward()
    torch.testing.assert_close(got, mine.grad)


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: grad(lambda x: f(x)[2].sum())], ids=["vmap", "grad"])
def test_a_step_on_a_codebook_that_is_not_handed_in(transform):
    x = torch.randn(SIZE, 5, 8)
    for layer in (VectorQuantize(8, 16), ResidualVQ(dim=8, num_quantizers=2, codebook_size=16)):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError, match=r"eval\(\), set freeze_codebook=True"):
            transform(layer)(x)
        transform(lambda x, layer=layer: layer(x, freeze_codebook=True))(x)
        transform(layer.eval())(x)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="kmeans_init cannot start"):
        transform(VectorQuantize(8, 4, kmeans_init=True))(x)
