"""Traces every public function and several layers with the Triton backend on fake cuda tensors: no GPU, no execution.

    python tests/trace_on_fake_cuda.py FAKE_CUDA.so     (tests/cpp/fake_cuda.cpp, loaded before torch)

Prints JSON: {case: {"graphs": number of graphs, "operators": those of the last graphs, forward and backward}}. Each
case is compiled with fullgraph=True and called, backward included, for several N.
"""

import ctypes
import json
import sys

ctypes.CDLL(sys.argv[1])
import torch  # noqa: E402
from test_compile import CASES  # noqa: E402
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from vqkernels.triton_kernels import register  # noqa: E402
from vqkernels.triton_kernels.offline import compiled_for  # noqa: E402

import vqkernels as vq  # noqa: E402
from vqkernels import _ops  # noqa: E402
from vqkernels.registry import AVAILABLE, SPECS  # noqa: E402

LENGTHS = (33, 47, 20)
LAYERS = {
    "VectorQuantize": {"dim": 8, "codebook_size": 16},
    "ResidualVQ": {"dim": 8, "codebook_size": 16, "num_quantizers": 3},
    "SimVQ": {"dim": 8, "codebook_size": 16},
    "FSQ": {"levels": [4] * 8},
}


class Trie:
    def __init__(self):
        offsets = [0, 2, 3, 3, 3]
        self.row_offsets, self.edge_tokens, self.edge_children = (
            torch.tensor(values, device="cuda") for values in (offsets, [0, 2, 1], [1, 2, 3])
        )


def trace(function, arguments, backward: bool) -> dict:
    torch._dynamo.reset()
    graphs, operators = [], []

    def note(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        graphs.append(graph)
        operators.clear()
        return aot_module_simplified(graph, inputs, fw_compiler=note, bw_compiler=note)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for N in LENGTHS:
        out = compiled(*arguments(N))
        if backward:
            out.sum().backward()
    return {"graphs": len(graphs), "operators": sorted({o for o in operators if "vqkernels" in o or "triton" in o})}


def leaf(*shape):
    return torch.empty(*shape, device="cuda", requires_grad=True)


def cases():
    for name, function in CASES.items():
        yield name, function, lambda N: (leaf(N, 8), leaf(16, 8)), True
    trie = Trie()
    yield (
        "trie_topk",
        lambda logits, scores, states: vq.trie_topk(logits, scores, states, trie, 4)[0],
        lambda N: (
            leaf(N, 2, 8),
            torch.empty(N, 2, device="cuda"),
            torch.zeros(N, 2, dtype=torch.int64, device="cuda"),
        ),
        False,
    )
    for name, options in LAYERS.items():
        for mode in ("train", "eval") if name != "FSQ" else ("train",):
            with torch.device("cuda"):
                layer = getattr(vq, name)(**options).train(mode == "train")
            yield f"{name} {mode}", lambda z, layer=layer: layer(z)[0], lambda N: (leaf(1, N, 8),), mode == "train"

    def inside(z, c):
        with vq.use_backend("triton"):
            return vq.vector_quantize(z, c).quantized

    yield "use_backend inside", inside, lambda N: (leaf(N, 8), leaf(16, 8)), True


def main():
    names = [name for name, spec in SPECS.items() if "triton" in spec.compiled]
    register(_ops.library, names)  # as on a machine with a GPU
    for name in names:
        AVAILABLE[name]["triton"] = True
    with compiled_for("sm_80"), FakeTensorMode(allow_non_fake_inputs=True), vq.use_backend("triton"):
        print(json.dumps({name: trace(*case) for name, *case in cases()}))


main()
