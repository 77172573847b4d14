"""torch.compile sees whole graphs: fullgraph=True, no recompilation for a second N, the same numbers."""

import pytest
import torch

import vqkernels as vq

CASES = {
    "nearest_codeword": lambda z, c: vq.nearest_codeword(z, c)[1].sum() + (z * 2).sum(),
    "vector_quantize": lambda z, c: (lambda o: o.quantized.square().sum() + o.commitment_loss + o.codebook_loss)(vq.vector_quantize(z * 2, c)),
    "residual_quantize": lambda z, c: (lambda o: (o.quantized * z).sum() + o.commitment_loss.sum() + o.codebook_loss.sum())(vq.residual_quantize(z * 2, [c, c * 0.5])),
    "rotation_trick": lambda z, c: (vq.rotation_trick(z * 2, z.detach() + c[:1]) * z).sum(),
    "codebook_usage": lambda z, c: vq.codebook_usage(vq.nearest_codeword(z, c)[0], 16).perplexity + z.sum(),
    "codeword_sums": lambda z, c: vq.codeword_sums(z, vq.nearest_codeword(z, c)[0], 16)[0].sum() + z.sum(),
    "fsq": lambda z, c: (vq.fsq(z * 2, [4] * 8) * z).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_fullgraph_without_recompilation(name):
    torch._dynamo.reset()
    function = CASES[name]
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=None)
    for n, N in enumerate((33, 47, 95, 20)):
        z = torch.randn(N, 8, requires_grad=True)
        c = torch.randn(16, 8, requires_grad=True)
        got, want = compiled(z, c), function(z, c)
        assert torch.allclose(got, want)
        grads = [torch.autograd.grad(v, [z, c], allow_unused=True) for v in (got, want)]
        assert all(a is b or torch.allclose(a, b) for a, b in zip(*grads))
        if n == 1:  # the second N makes the size dynamic, once
            settled = len(compilations)
    assert len(compilations) == settled <= 2


def test_inductor_end_to_end():
    torch._dynamo.reset()
    function = CASES["vector_quantize"]
    z, c = torch.randn(40, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    got, want = torch.compile(function, fullgraph=True)(z, c), function(z, c)
    assert torch.allclose(got, want)
    for a, b in zip(torch.autograd.grad(got, [z, c]), torch.autograd.grad(want, [z, c])):
        assert torch.allclose(a, b)


def test_export():
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codebook", torch.randn(16, 8))

        def forward(self, z):
            return vq.nearest_codeword(z, self.codebook)[0]

    module = Encoder()
    program = torch.export.export(module, (torch.randn(10, 8),), dynamic_shapes=({0: torch.export.Dim("N", min=2)},))
    z = torch.randn(31, 8)
    assert torch.equal(program.module()(z), module(z))
