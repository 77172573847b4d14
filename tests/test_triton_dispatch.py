"""The Triton backend from outside: reasons, use_backend, torch.compile, one compilation for every N.

Whether Triton interprets or compiles is settled when it is imported, so each side has processes of its own.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def python(*arguments, interpret=False):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VQK_BACKEND")}
    path = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    out = subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stdout[-1000:] + out.stderr[-3000:]
    return out.stdout


def test_every_public_function_in_the_interpreter():
    agreed = python(str(TESTS / "triton_public.py"), interpret=True).splitlines()
    assert len(agreed) == 35 and "VectorQuantize float32" in agreed and "trie_topk bfloat16" in agreed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so Triton runs")
def test_without_gpu_and_interpreter_it_is_refused_with_the_reason():
    code = """
import torch, vqkernels as vq
z, c = torch.randn(5, 8, requires_grad=True), torch.randn(4, 8)
i = torch.zeros(5, dtype=torch.int64)
class Trie: row_offsets, edge_tokens, edge_children = torch.tensor([0, 1, 1]), torch.tensor([0]), torch.tensor([1])
calls = [
    lambda: vq.nearest_codeword(z, c), lambda: vq.vector_quantize(z, c), lambda: vq.residual_quantize(z, [c]),
    lambda: vq.rotation_trick(z, z.detach()).sum().backward(), lambda: vq.codebook_usage(i, 4),
    lambda: vq.codeword_sums(z, i, 4), lambda: vq.fsq(z, [4] * 8), lambda: vq.kmeans(z, 2, init="random"),
    lambda: vq.trie_topk(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), Trie, 1),
    lambda: vq.VectorQuantize(dim=8, codebook_size=4)(z[None]),
]
reasons = {row["triton"] for name, row in vq.backends().items() if name != "kmeans_plus_plus"}
assert len(reasons) == 1, reasons
(reason,) = reasons
assert "no CUDA device" in reason and "TRITON_INTERPRET=1" in reason and torch.__version__ in reason, reason
import os; os.environ["TRITON_INTERPRET"] = "1"  # too late: the kernels' way was settled at import
refused = 0
for call in calls:
    with vq.use_backend("triton"):
        try:
            call()
        except RuntimeError as error:
            assert f"backend 'triton' was asked for and cannot run: {reason}" in str(error), error
            refused += 1
print(refused, len(calls))
"""
    assert python("-c", code).split() == ["10", "10"]


def test_cpu_tensors_are_refused_on_a_machine_with_a_gpu(monkeypatch):
    from vqkernels import dispatch
    from vqkernels.registry import AVAILABLE

    monkeypatch.setitem(AVAILABLE, "fsq", {**AVAILABLE["fsq"], "triton": True})
    with dispatch.use_backend("triton"):
        with pytest.raises(RuntimeError, match="fsq: backend 'triton' serves cuda tensors, the input is on cpu; move"):
            dispatch.pick("fsq", torch.device("cpu"))
        assert dispatch.pick("fsq", torch.device("cuda")) == torch.ops.vqkernels.fsq.triton


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory):
    """tests/cpp/fake_cuda.cpp, compiled for this torch."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler for tests/cpp/fake_cuda.cpp")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch has CUDA of its own")
    library, root = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so", Path(torch.__file__).parent
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
    source = str(TESTS / "cpp" / "fake_cuda.cpp")
    subprocess.run([compiler, *flags, source, "-lc10", "-ltorch_cpu", "-o", str(library)], check=True)
    return library


def test_whole_graphs_on_fake_cuda_tensors(fake_cuda):
    """torch.compile(fullgraph=True): a graph for the first N, one for all others, forward and backward in Triton; the
    launches of the simple operators stand in the graph."""
    traced = json.loads(python(str(TESTS / "trace_on_fake_cuda.py"), str(fake_cuda)).splitlines()[-1])
    assert len(traced) == 16 and {case["graphs"] for case in traced.values()} == {2}, traced
    operators = {name: set(case["operators"]) for name, case in traced.items()}
    seen, copy = "triton_kernel_wrapper_functional", "vqkernels.opaque_copy.default"
    assert all(o.endswith(".triton") or o in (seen, copy) for found in operators.values() for o in found), operators
    quantize = {"vqkernels.residual_quantize.triton", "vqkernels.residual_quantize_backward.triton"}
    for name in ("vector_quantize", "residual_quantize", "VectorQuantize train", "SimVQ train", "use_backend inside"):
        assert operators[name] - {copy} == {*quantize, seen}, name  # seen: codeword_sums
    for name in ("rotation_trick", "trie_topk"):
        assert operators[name] == {seen}, name
    for name in ("codebook_usage", "codeword_sums"):
        assert operators[name] == {seen, "vqkernels.nearest_codeword.triton"}, name
    assert operators["fsq"] == {"vqkernels.fsq.triton", "vqkernels.fsq_backward.triton"}


def test_one_compilation_for_every_length():
    """Per kernel at most the variants of N by divisibility; never one per N."""
    code = """
import json, torch
from vqkernels.registry import SPECS
from vqkernels.triton_kernels import launcher
from vqkernels.triton_kernels.offline import compiled_for
lengths = (7, 33, 47, 64, 95, 160, 1000, 1008)
def rows(args, n, N):  # the sample's tensors with another number of vectors
    return tuple(a[:, :0].new_zeros(a.shape[0], N, *a.shape[2:]) if isinstance(a, torch.Tensor) and a.dim() > 1 and a.shape[1] == n
                 else a.new_zeros(N, *a.shape[1:]) if isinstance(a, torch.Tensor) and a.shape[:1] == (n,) else a for a in args)
axis = {"codebook_usage": 1, "codeword_sums": 1, "fsq": 0, "fsq_backward": 0, "trie_topk": 0, "rotation_trick_backward": 0,
        "nearest_codeword": 1, "residual_quantize": 1, "residual_quantize_backward": 1}
found = {}
for name, spec in SPECS.items():
    if "triton" not in spec.compiled or name not in axis: continue
    _, args = spec.samples(spec.dtypes[0])[0]
    n = args[0].shape[axis[name]]
    variants = {}
    for N in lengths:
        with compiled_for("sm_80") as launches:
            launcher(name)(*rows(args, n, N))
        for launch in launches: variants.setdefault(launch.name, set()).add(id(launch.compiled))
    found[name] = {k: len(v) for k, v in variants.items()}
print(json.dumps(found))
"""
    found = json.loads(python("-c", code).splitlines()[-1])
    assert found and all(count <= 2 for kernels in found.values() for count in kernels.values()), found


def test_launches_go_to_the_device_of_the_tensors(monkeypatch):
    import contextlib

    from vqkernels.triton_kernels import on_device

    seen = []

    @contextlib.contextmanager
    def device_of(tensor):
        seen.append(("in", tensor))
        yield
        seen.append(("out", tensor))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    run = on_device(lambda z, k: seen.append(("launch", k)) or k + 1)
    assert run("z", 3) == 4 and seen == [("in", "z"), ("launch", 3), ("out", "z")]
