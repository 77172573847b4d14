"""The PTX emulator sees what is wrong: faults planted in kernels and in their PTX, and layouts, instructions and roundings
of the emulator itself changed on purpose, each of which must be reported or give a wrong result."""

import importlib.util
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import ptx
import triton
import triton.language as tl
from ptx import PtxError, emulated, matrix, operations, run_ptx, tensor, warps
from test_ptx import entry, product

REGISTERS = ".reg .b32 %r<9>; .reg .b64 %b; .shared .align 16 .b8 tile[1024];"


def run(body: str, threads: int = 64, grid: int = 1, racecheck: bool = True, seed: int = 0, **tensors):
    tensors = tensors or {"x": torch.zeros(256, dtype=torch.int64)}
    ptx_text = entry(body, len(tensors), REGISTERS, threads)
    return run_ptx(ptx_text, None, (grid,), (threads,), tensors, racecheck=racecheck, seed=seed)


SHARE = "mul.lo.u32 %r0, %tid, 4; st.shared.b32 [%r0], %tid;"
READ_NEIGHBOUR = "xor.b32 %r1, %r0, 128; ld.shared.b32 %r2, [%r1]; add.s64 %a, %p0, %t8; st.global.b32 [%a], %r2;"

FAULTS = {
    "out of bounds": ("add.s64 %a, %p0, %t8; st.global.b64 [%a + 1544], %a;", "st.global.b64.*out of bounds: 8 bytes at .* = x \\+ 2048 bytes, which has 2048; 1 threads, first: thread 63 of block"),
    "before the start": ("ld.global.b64 %b, [%p0 + -8];", "out of bounds"),
    "null pointer": ("mov.b64 %b, 0; ld.global.b64 %b, [%b];", "out of bounds: 8 bytes at 0x0"),
    "out of bounds of shared memory": ("mul.lo.u32 %r0, %tid, 32; st.shared.b32 [%r0], %tid;", "out of bounds: 4 bytes at 1024 of 1024 bytes of shared memory"),
    "misaligned": ("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%p0 + 8];", "misaligned: address .* no multiple of 16"),
    "misaligned copy": ("cp.async.cg.shared.global [%tid], [%p0], 16;", "misaligned"),
    "uninitialised": ("ld.shared.b32 %r0, [tile + 64];", "ld.shared.b32.*uninitialised: reads shared memory at 64"),
    "copy not waited for": ("cp.async.ca.shared.global [tile], [%p0], 8; cp.async.commit_group; ld.shared.b32 %r0, [tile];", "uninitialised|race"),
    "copy with a lax wait": ("setp.eq.u32 %q1, %tid, 0; @%q1 cp.async.ca.shared.global [tile], [%p0], 8; cp.async.commit_group; cp.async.wait_group 1; bar.sync 0; ld.shared.b32 %r0, [tile];", "uninitialised"),
    "ended before a barrier": ("setp.eq.u32 %q1, %tid, 5; @%q1 ret; bar.sync 0;", "bar.sync 0.*barrier divergence: 1 threads have already ended"),
    "two barriers": ("setp.lt.u32 %q1, %tid, 32; @%q1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:", "barrier divergence: threads of one block wait at different barriers"),
    "exchange after a part has ended": ("setp.eq.u32 %q1, %tid, 3; @%q1 ret; shfl.sync.bfly.b32 %r0, %tid, 1, 31, -1;", "shfl.*warp divergence: threads 0x8 of the membermask"),
    "exchange in one path": ("and.b32 %r0, %tid, 1; setp.eq.u32 %q1, %r0, 0; @%q1 bra A; shfl.sync.bfly.b32 %r0, %tid, 1, 31, -1; A:", "warp divergence"),
    "race in shared memory": (SHARE + "bar.sync 0; st.shared.b32 [%r0], 9;" + READ_NEIGHBOUR, "race: (read|write) of a byte after a (read|write) by another warp"),
    "two warps write one place": ("st.shared.b32 [tile], %tid;", "race: (two warps write|write of a byte after a write)"),
    "blocks write one place": ("st.global.b32 [%p0], %tid;", "race"),
    "read, add, write": ("ld.global.b32 %r0, [%p0]; add.s32 %r0, %r0, 1; setp.eq.u32 %q1, %tid, 0; @%q1 st.global.b32 [%p0], %r0;", "race"),
    "atomic and store": ("atom.global.add.u32 %r0, [%p0], 1; setp.eq.u32 %q1, %tid, 40; @%q1 st.global.b32 [%p0], %tid;", "race"),
    "unknown instruction": ("tcgen05.alloc.cta_group::1.b32 [%p0], 32;", "no such instruction in the emulator: tcgen05.alloc"),
    "unknown type": ("add.f8 %r0, %r0, %r0;", "not supported: add.f8"),
    "unknown branch": ("bra NOWHERE;", "branch to a label that is not there: NOWHERE"),
    "assertion": ("trap;", "the kernel stopped itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    body, message = FAULTS[name]
    with pytest.raises(PtxError, match=message) as error:
        run(body, grid=2 if "blocks" in name else 1)
    assert str(error.value).startswith("kernel: ")


def test_the_same_in_order_is_clean():
    for seed in range(6):
        run(SHARE + "bar.sync 0;" + READ_NEIGHBOUR, seed=seed)
        run(
            "cp.async.ca.shared.global [tile], [%p0], 8; cp.async.wait_all; bar.sync 0; ld.shared.b32 %r0, [tile];",
            32,
            seed=seed,
        )
        run("red.global.add.u32 [%p0], 1;", grid=3, seed=seed)
        run("st.shared.b32 [tile], 7; bar.sync 0; ld.shared.b32 %r0, [tile];", seed=seed)  # one value by two warps


@triton.jit
def copy_kernel(x, y, N, BLOCK: tl.constexpr, MASKED: tl.constexpr, STORE: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + n, mask=n < N) if MASKED else tl.load(x + n)
    tl.store(y + n + STORE, v, mask=n + STORE < N)


@triton.jit
def count_kernel(x, counts, N, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(x + n, mask=n < N, other=0)
    if ATOMIC:
        tl.atomic_add(counts + k, 1, mask=n < N, sem="relaxed")
    else:
        tl.store(counts + k, tl.load(counts + k, mask=n < N) + 1, mask=n < N)


class TestTritonKernels:
    def test_a_missing_mask(self):
        x = torch.randn(100)
        with emulated("sm_80"):
            copy_kernel[1,](x, y := torch.zeros(100), 100, 128, True, 0)
        assert torch.equal(x, y)
        message = "copy_kernel: .*ld.global.*out of bounds: 4 bytes at .* = x \\+ 400 bytes, which has 400"
        with emulated("sm_80"), pytest.raises(PtxError, match=message):
            copy_kernel[1,](x, y, 100, 128, False, 0)

    def test_the_extent_of_a_view_and_not_of_its_storage(self):
        storage = torch.zeros(200)
        with emulated("sm_80"), pytest.raises(PtxError, match="out of bounds"):
            copy_kernel[1,](storage[:100], torch.zeros(128), 100, 128, False, 0)

    def test_a_promise_of_divisibility_that_is_broken(self):
        """The code for N divisible by 16 loads 16 bytes at a time; with another N it goes beyond the end."""
        with emulated("sm_80") as launches:
            copy_kernel[1,](torch.zeros(512), torch.zeros(512), 512, 512, True, 0)
        assert any("v2" in op or "v4" in op or "b128" in op for op in operations(launches[0].program))
        text = next(text for (text, _), program in ptx.launch._programs.items() if program is launches[0].program)
        arguments = {"x": torch.zeros(102), "y": torch.zeros(102), "N": 102}
        with pytest.raises(PtxError, match="out of bounds"):
            run_ptx(text, None, (1,), (128,), arguments)

    def test_programs_that_write_over_each_other(self):
        x = torch.randint(0, 9, (512,))
        for atomic in (True, False):
            counts = torch.zeros(9, dtype=torch.int32)
            with emulated("sm_80", racecheck=True):
                if atomic:
                    count_kernel[4,](x, counts, 512, 128, True)
                    assert torch.equal(counts.long(), x.bincount(minlength=9))
                else:
                    with pytest.raises(PtxError, match="race"):
                        count_kernel[4,](x, counts, 512, 128, False)

    def test_stores_of_two_programs_that_overlap(self):
        with emulated("sm_80", racecheck=True), pytest.raises(PtxError, match="race: write of a byte after a write"):
            copy_kernel[3,](torch.randn(256), torch.zeros(384), 256, 128, True, 0)
            overlapping_kernel[3,](torch.zeros(384), 128)


@triton.jit
def overlapping_kernel(y, BLOCK: tl.constexpr):
    n = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y + n, n.to(tl.float32))


# ----------------------------------------------------------------------------- what Triton made, with something removed

REMOVED = {
    "barriers": (r"bar\.sync\s+0;", "", "race|uninitialised", True),
    "waits for copies": (r"cp\.async\.wait_group\s+\w+;", "", "race|uninitialised", False),
    "waits for wgmma": (r"wgmma\.wait_group[^;]*;", "", "wrong", False),
    "a wait that is too lax": (r"cp\.async\.wait_group\s+[1-9];", "cp.async.wait_group 9;", "uninitialised", False),
}  # fmt: skip


@pytest.mark.parametrize(
    "target, name", [(t, n) for t in ("sm_80", "sm_90") for n in REMOVED if t == "sm_90" or "wgmma" not in n]
)
def test_synchronisation_removed_from_a_kernel(name, target, monkeypatch):
    pattern, replacement, expected, racecheck = REMOVED[name]
    found = changed(monkeypatch, pattern, replacement)
    a, b = torch.randn(70, 80).bfloat16(), torch.randn(70, 80).bfloat16()
    outcome = "right"
    try:
        with emulated(target, racecheck):
            got = product(a, b)
        if not ((got - a.float() @ b.float().T).abs() < 1e-3).all():
            outcome = "wrong"
    except PtxError as error:
        outcome = str(error)
    assert found, "the kernel has none of these"
    assert re.search(expected, outcome), outcome


def changed(monkeypatch, pattern: str, replacement: str, count: int = 0) -> list[int]:
    """From now on every kernel runs with its PTX changed; returns a list that gets the number of changes."""
    found, run_unchanged = [], ptx.run_ptx

    def run_changed(text, *arguments, **options):
        text, n = re.subn(pattern, replacement, text, count=count)
        found.extend([n] if n else [])
        return run_unchanged(text, *arguments, **options)

    monkeypatch.setattr(ptx, "run_ptx", run_changed)
    return found


# ------------------------------------------------------------------------ an emulator that is wrong fails the kernels


def nearest(target: str, dtype=torch.bfloat16, seed: int = 0) -> str:
    """What is wrong with nearest_codeword on the hostile case; empty if nothing is."""
    from vqkernels import triton_kernels, verify
    from vqkernels.registry import SPECS

    _, args = matrix.hostile_search(dtype)["nearest_codeword"][0]
    try:
        with matrix.few_programs(True), emulated(target, seed=seed):
            out = triton_kernels.launcher("nearest_codeword")(*args)
        return verify.judge(SPECS["nearest_codeword"], out, args)[0]
    except PtxError as error:
        return str(error)


LAYOUTS = {
    "rows of A": ("sm_80", tensor, "a_places", lambda f: lambda r, e, w: ((f(r, e, w)[0] + 8) % 16, f(r, e, w)[1])),
    "columns of A": ("sm_80", tensor, "a_places", lambda f: lambda r, e, w: (f(r, e, w)[0], f(r, e, w)[1] ^ 1)),
    "rows of B": ("sm_80", tensor, "b_places", lambda f: lambda r, e, w: (f(r, e, w)[0] ^ 1, f(r, e, w)[1])),
    "columns of B": ("sm_80", tensor, "b_places", lambda f: lambda r, e, w: (f(r, e, w)[0], f(r, e, w)[1] ^ 1)),
    "rows of C": ("sm_80", tensor, "c_places", lambda f: lambda r: (f(r)[0] ^ 8, f(r)[1])),
    "columns of C": ("sm_90", tensor, "c_places", lambda f: lambda r: (f(r)[0], f(r)[1] ^ 1)),
    "ldmatrix": ("sm_80", warps, "fragment", lambda f: lambda m: f(m.swapaxes(-1, -2))),
    "swizzle": ("sm_90", tensor, "swizzled", lambda f: lambda address, mode: address),
    "descriptor": ("sm_90", tensor, "descriptor_places", lambda f: lambda d, r, k, s, t: f(d, r, k, s, not t)),
    "sum of the products": ("sm_80", tensor, "tensor_sum", lambda f: lambda a, b, c, rough: f(a, b, 0 * c, rough)),
}  # fmt: skip


def test_the_kernel_is_right_on_the_unchanged_emulator():
    for target in ("sm_80", "sm_90"):
        assert nearest(target) == ""


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_wrong_layout_fails_the_kernel(name, monkeypatch):
    target, module, function, change = LAYOUTS[name]
    monkeypatch.setattr(module, function, change(getattr(module, function)))
    assert nearest(target)


INSTRUCTIONS = {
    "minimum": (r"min\.f32", "max.f32"),
    "comparison of tiles": (r"setp\.lt\.f32", "setp.gt.f32"),
    "comparison with the bound": (r"setp\.le\.f32", "setp.gt.f32"),
    "sum in float64": (r"add(\.rn)?\.f64", r"sub\1.f64"),
    "shuffle": (r"(shfl\.sync\.bfly\.b32[^;]*), 1, 31, -1;", r"\1, 2, 31, -1;"),
    "one codeword too far": (r"min\.s(32|64)", r"max.s\1"),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_wrong_instruction_fails_the_kernel(name, monkeypatch):
    found = changed(monkeypatch, *INSTRUCTIONS[name])
    wrong = nearest("sm_80")
    assert found, "the kernel has no such instruction"
    assert wrong


def test_fused_arithmetic_fails_the_kernel(monkeypatch):
    """The canonical distance rounds product and sum apart. Code in which the compiler may fuse them gives others."""
    from vqkernels import triton_kernels
    from vqkernels.reference.nearest_codeword import nearest_codeword

    z, codebook = torch.randn(1, 40, 24, dtype=torch.float64), torch.randn(1, 9, 24, dtype=torch.float64)
    args = (z, codebook, None, 0, True)
    search = triton_kernels.launcher("nearest_codeword")
    want = nearest_codeword(*args)
    with emulated("sm_80") as launches:
        got = search(*args)
    assert all(map(torch.equal, got, want))
    assert not any(op.startswith("fma.rn.f64") for launch in launches for op in operations(launch.program))
    fuse(monkeypatch)
    with emulated("sm_80") as launches:
        got = search(*args)
    assert any(op.startswith("fma.rn.f64") for launch in launches for op in operations(launch.program))
    assert not torch.equal(got[1], want[1])


def fuse(monkeypatch):
    """Launches lose their enable_fp_fusion=False."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: run(self, *a, **{**k, "enable_fp_fusion": True}))
