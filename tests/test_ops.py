"""The generic matrix over the registry: what every operator owes on every backend that can run here."""

import pytest
import torch

from vqkernels import info, verify
from vqkernels.dispatch import _OVERLOAD, pick, use_backend
from vqkernels.registry import AVAILABLE, BACKENDS, SPECS


def _runnable():
    for name, spec in SPECS.items():
        for backend in BACKENDS:
            if AVAILABLE[name][backend] is True:
                for dtype in spec.dtypes:
                    yield pytest.param(spec, backend, dtype, id=f"{name}-{backend}-{str(dtype)[6:]}")


@pytest.mark.parametrize("spec, backend, dtype", list(_runnable()))
def test_values(spec, backend, dtype):
    """Samples and edges (N=0, N=1, K=1, D=1, odd D, strided, expanded, misaligned, ties, non-finite) equal the float64
    reference."""
    wrong = [
        (case, detail) for case, args in verify.cases(spec, dtype) if (detail := verify.compare(spec, backend, args)[0])
    ]
    assert not wrong


@pytest.mark.skipif(AVAILABLE["nearest_codeword"]["cpu"] is not True, reason="the C++ kernels are not built")
@pytest.mark.parametrize("spec", [s for s in SPECS.values() if "cpu" in s.compiled], ids=lambda s: s.name)
def test_simd_levels(spec):
    """Every SIMD level this processor has gives the same values."""
    simd_level = torch.ops.vqkernels.simd_level
    before = simd_level(-1)
    try:
        for level in info.simd_levels():
            simd_level(info.SIMD.index(level))
            for dtype in spec.dtypes:
                for case, args in verify.cases(spec, dtype):
                    assert verify.compare(spec, "cpu", args)[0] == "", (level, case)
    finally:
        simd_level(before)


@pytest.mark.parametrize("overload", ["reference", "default"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda s: s.name)
def test_opcheck(spec, overload):
    """Schema, fake implementation and dispatch registration agree with what the operator does."""
    if overload == "default" and AVAILABLE[spec.name]["cpu"] is not True:
        pytest.skip(f"no compiled kernel: {AVAILABLE[spec.name]['cpu']}")
    _, args = spec.samples(spec.dtypes[0])[-1]
    torch.library.opcheck(getattr(spec.op, overload), args)


@pytest.mark.parametrize(
    "spec, backend, dtype", [p for p in _runnable() if p.values[2] in (torch.float32, torch.int64)]
)
def test_inputs_are_left_alone(spec, backend, dtype):
    for _, args in spec.samples(dtype):
        copies = verify._map(args, torch.clone)
        getattr(spec.op, _OVERLOAD[backend])(*args)
        for a, b in zip(args, copies, strict=True):
            assert (
                all(torch.equal(x, y) for x, y in zip(a, b))
                if isinstance(a, list) and isinstance(a[0], torch.Tensor)
                else (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
            )


def test_every_kernel_file_belongs_to_a_spec():
    """One word per op at all its stops: every spec has a reference, and a public function's module."""
    from pathlib import Path

    import vqkernels.ops as ops
    import vqkernels.reference as reference

    references = {p.stem for p in Path(reference.__file__).parent.glob("*.py")} - {
        "__init__",
        "onnx",
        "vmap",
    }  # for export, for torch.vmap
    public = {p.stem for p in Path(ops.__file__).parent.glob("*.py")} - {"__init__", "autograd", "checks"}
    words = {name.removesuffix("_backward") for name in SPECS}
    assert references == words
    assert public == words - {"kmeans_plus_plus"} | {"kmeans"}  # kmeans composes three operators


class TestDispatch:
    def test_backends_names_every_reason(self):
        import vqkernels as vq

        table = vq.backends()
        assert set(table) == set(SPECS)
        for row in table.values():
            assert set(row) == set(BACKENDS)
            assert all(v is True or (isinstance(v, str) and len(v) > 10) for v in row.values())

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match="unknown backend 'tpu'; allowed: reference, cpu, cuda, triton"):
            with use_backend("tpu"):
                pass

    def test_a_forced_backend_that_cannot_run_says_why(self, monkeypatch):
        monkeypatch.setitem(AVAILABLE, "trie_topk", {**AVAILABLE["trie_topk"], "cuda": "there is no cuda kernel"})
        with (
            use_backend("cuda"),
            pytest.raises(RuntimeError, match="backend 'cuda' was asked for and cannot run: there is no cuda kernel"),
        ):
            pick("trie_topk", torch.device("cpu"))
        pick("trie_topk", torch.device("cpu"))  # and the choice ends with the block

    def test_backend_serves_its_own_device_only(self, monkeypatch):
        monkeypatch.setitem(AVAILABLE, "fsq", {**AVAILABLE["fsq"], "cuda": True})
        with use_backend("cuda"), pytest.raises(RuntimeError, match="serves cuda tensors, the input is on cpu"):
            pick("fsq", torch.device("cpu"))

    def test_environment_variable(self):
        import subprocess
        import sys

        code = "import vqkernels as vq, torch; vq.backends(); print(vq.dispatch._forced)"
        run = lambda value: subprocess.run(  # noqa: E731
            [sys.executable, "-c", code],
            env={**__import__("os").environ, "VQK_BACKEND": value},
            capture_output=True,
            text=True,
        )
        assert run("reference").stdout.strip() == "reference"
        assert "VQK_BACKEND: unknown backend 'gpu'" in run("gpu").stderr

    def test_fake_cuda_tensors_have_shapes_without_a_gpu(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), use_backend("reference"):
            import vqkernels as vq

            out = vq.residual_quantize(torch.empty(5, 8, device="cuda"), [torch.empty(4, 8, device="cuda")] * 3)
            assert out.indices.shape == (5, 3) and out.indices.device.type == "cuda" and out.quantized.shape == (5, 8)
