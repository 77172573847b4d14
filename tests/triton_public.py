"""Every public function and layers with ``use_backend("triton")`` on CPU tensors in Triton's interpreter, beside the
reference backend, gradients included. Prints the cases that agreed; run by test_triton_dispatch.py."""

import triton_check  # noqa: F401  before triton: bfloat16 as a GPU computes it

# isort: split
import torch
from torch import Tensor

import vqkernels as vq
from vqkernels.registry import AVAILABLE
from vqkernels.semantic_ids.trie import Trie


def same(got, want, eps: float) -> bool:
    if not isinstance(got, Tensor):
        return got == want
    if not got.is_floating_point():
        return torch.equal(got, want)
    return torch.allclose(got.double(), want.double(), rtol=16 * eps, atol=16 * eps, equal_nan=True)


def flat(out) -> list:
    return [out] if isinstance(out, Tensor) else [t for item in out for t in flat(item)]


def run(function, *inputs):
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(1)
    out = flat(function(*leaves))
    total = sum((t.double() * (i + 1)).sum() for i, t in enumerate(out) if t.requires_grad)
    if isinstance(total, Tensor):
        total.backward()
    return out + [x.grad for x in leaves if x.grad is not None]


def cases(dtype):
    draw = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    z, c = draw(37, 8), draw(16, 8)
    indices = torch.randint(-1, 16, (37,))
    trie = Trie([[a, b] for a in range(4) for b in range(a + 1)])
    for metric in ("l2", "cosine", "dot"):
        yield f"nearest_codeword {metric}", lambda z, c, m=metric: vq.nearest_codeword(z, c, metric=m), (z, c)
    yield "nearest_codeword heads", vq.nearest_codeword, (draw(2, 9, 8), draw(2, 16, 8))
    for estimator in ("rotation", "reflection", "ste"):
        function = lambda z, c, e=estimator: vq.vector_quantize(z, c, estimator=e)  # noqa: E731
        yield f"vector_quantize {estimator}", function, (z, c)
        yield f"rotation_trick {estimator}", lambda z, q, e=estimator: vq.rotation_trick(z, q, e), (z, draw(37, 8))
    yield "residual_quantize", lambda z, a, b: vq.residual_quantize(z, [a, b]), (z, c, draw(5, 8))
    yield "codebook_usage", lambda i: vq.codebook_usage(i, 16), (indices,)
    yield "codeword_sums", lambda z: vq.codeword_sums(z, indices, 16), (z,)
    yield "kmeans", lambda z: vq.kmeans(z, 4, init="random", iters=3), (z,)
    yield "fsq", lambda z: vq.fsq(z, [8, 5, 5, 5, 3, 2, 4, 7], return_indices=True), (z,)
    scores, states = (
        torch.randn(3, 2).to(torch.float64 if dtype == torch.float64 else torch.float32),
        torch.tensor([[0, 1], [2, -1], [3, 4]]),
    )
    yield "trie_topk", lambda x: vq.trie_topk(x, scores, states, trie, 5), (draw(3, 2, 4),)


def layers():
    for name, options in {
        "VectorQuantize": {"dim": 8, "codebook_size": 16},
        "ResidualVQ": {"dim": 8, "codebook_size": 16, "num_quantizers": 2},
        "FSQ": {"levels": [8, 5, 5, 5, 3, 3, 4, 7]},
    }.items():

        def step(x, name=name, options=options):
            layer = getattr(vq, name)(**options)
            return layer(x)[:2], list(layer.buffers())

        yield name, step, (torch.randn(1, 37, 8),)


def main():
    agreed = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, function, inputs in [*cases(dtype), *(layers() if dtype == torch.float32 else ())]:
            with vq.use_backend("reference"):
                want = run(function, *inputs)
            with vq.use_backend("triton"):
                got = run(function, *inputs)
            wrong = [
                i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not same(a, b, torch.finfo(dtype).eps)
            ]
            assert not wrong, f"{name} {dtype}: outputs {wrong} differ: {got[wrong[0]]} {want[wrong[0]]}"
            agreed.append(f"{name} {str(dtype)[6:]}")
    without = [name for name, row in AVAILABLE.items() if row["triton"] is not True]
    assert without == ["kmeans_plus_plus"], AVAILABLE  # kmeans starts with it unless told otherwise
    print("\n".join(agreed))


main()
