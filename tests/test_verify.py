"""``vqkernels verify``: what it reports and admits on a machine without a GPU, and its timing of contenders with a clock
that needs none."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vqkernels import verify
from vqkernels.bench import gpu
from vqkernels.cli import app
from vqkernels.registry import AVAILABLE, SPECS

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@no_gpu
def test_it_says_what_was_not_run_and_why(tmp_path):
    file = tmp_path / "new folder" / "verify.json"
    out = CliRunner().invoke(app, ["verify", "--op", "kmeans_plus_plus", "--op", "codebook_usage", "--json", str(file)])
    assert out.exit_code == 0, out.output
    text = " ".join(out.output.split())
    assert "Not run: kmeans_plus_plus cuda: there is no cuda kernel for it in this release" in text
    assert "Speed not measured: no CUDA device for torch" in text and "cases passed" in text
    content = json.loads(file.read_text())
    assert {"op", "backend", "dtype", "case", "passed", "error", "detail"} == set(content["records"][0])
    left_out = {where for places in content["not_run"].values() for where in places}
    ran = {f"{r['op']} {r['backend']}" for r in content["records"]}
    assert ran | left_out == {f"{o} {b}" for o in ("kmeans_plus_plus", "codebook_usage") for b in AVAILABLE["fsq"]}
    assert not ran & left_out
    assert content["speed"] == [] and "no CUDA device" in content["speed_not_run"]


def test_speed_can_be_switched_off():
    out = CliRunner().invoke(app, ["verify", "--op", "codebook_usage", "--no-speed"])
    assert "Speed not measured: switched off by --no-speed" in out.output


def test_a_wrong_kernel_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "judge", lambda *_: ("output 0: 1 of 2 differ [red]", float("inf")))
    file = tmp_path / "verify.json"
    out = CliRunner().invoke(app, ["verify", "--op", "fsq", "--no-speed", "--json", str(file)])
    assert out.exit_code == 1 and "FAILED fsq reference float32 [levels [8, 5, 5, 5]]" in " ".join(out.output.split())
    assert not any(r["passed"] for r in json.loads(file.read_text())["records"])


def small(op, dtype, device):
    """A sample of the operator with what only ours can do left out: skipped rows, other estimators."""
    samples = SPECS[op].samples(dtype)
    label, args = next((s for s in samples if s[1][-1] == 1), samples[0]) if "rotation" in op else samples[0]
    if op in ("codebook_usage", "codeword_sums"):
        args = tuple(a.clamp(min=0) if isinstance(a, torch.Tensor) and a.dtype == torch.int64 else a for a in args)
    return [(label, tuple(a[:1] if op == "codeword_sums" and isinstance(a, torch.Tensor) else a for a in args))]


TIMED = [name for name in gpu.EAGER if "cpu" in SPECS[name].compiled or name == "trie_topk"]


@pytest.mark.skipif(AVAILABLE["fsq"]["cpu"] is not True, reason="the C++ kernels are not built")
@pytest.mark.parametrize("op", TIMED)
def test_contenders_agree_and_are_timed(op, monkeypatch):
    """On CPU tensors the overload of the CUDA kernels is the C++ kernel; the clock is fake, the answers are not."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    kernel = "cuda" if op != "trie_topk" else "triton"
    monkeypatch.setitem(AVAILABLE, op, {**AVAILABLE[op], "cuda": kernel == "cuda", "triton": kernel == "triton"})
    if op == "trie_topk":
        monkeypatch.setitem(gpu._OVERLOAD, "triton", "reference")
    spec = SPECS[op]
    results = list(gpu.speed(op, lambda call: [1.0, 2.0, 3.0, 4.0, 5.0], "cpu", small))
    dtypes = [d for d in gpu.DTYPES if d in spec.dtypes]
    names = [kernel, "torch eager", "torch.compile"] + ["flash-kmeans", "cuVS"] * (op == "nearest_codeword")
    assert [r.backend for r in results] == names * len(dtypes)
    for r in results:
        if r.backend in ("flash-kmeans", "cuVS"):
            assert r.error.startswith("not installed (") or r.error
        else:
            assert (r.error, r.median_ms, r.p20_ms, r.p80_ms) == ("", 3.0, 2.0, 5.0), r


def test_a_contender_with_another_answer_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setitem(AVAILABLE, "codebook_usage", {**AVAILABLE["codebook_usage"], "cuda": True, "triton": "none"})
    monkeypatch.setitem(gpu.EAGER, "codebook_usage", lambda indices, K: torch.zeros(indices.shape[0], K))
    ours, eager, compiled = gpu.speed("codebook_usage", lambda call: [1.0], "cpu", small)
    assert ours.median_ms == 1.0
    assert "of its answers differ from ours" in eager.error and eager.median_ms != eager.median_ms
    assert compiled.error == eager.error
