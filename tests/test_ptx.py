"""The PTX emulator's instructions against numpy, the C library and plain loops; the kernels are in
test_ptx_kernels.py, the faults that it must see in test_ptx_checks.py."""

import ctypes
import ctypes.util
import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from ptx import emulated, operations, run_ptx
from ptx.values import fma, fma_odd, kind, narrow

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"


def entry(body: str, pointers: int, registers: str = "", threads: int = 256) -> str:
    """A kernel whose parameters are pointers p0, p1, ...; %tid.x times 8 is in %t8."""
    params = ", ".join(f".param .u64 p{n}" for n in range(pointers))
    loads = "".join(f"ld.param.u64 %p{n}, [p{n}];\n" for n in range(pointers))
    return f"""{HEADER}.visible .entry kernel({params}) .reqntid {threads} {{
.reg .b64 %p<{max(pointers, 1)}>, %t8, %a; .reg .b32 %tid; .reg .pred %q<9>; {registers}
mov.u32 %tid, %tid.x; mul.wide.u32 %t8, %tid, 8;
{loads}{body}
ret;
}}"""


def execute(instructions: str, inputs: list[tuple[str, np.ndarray]], output: str, threads: int = 256) -> np.ndarray:
    """Runs ``instructions`` on every thread: %i0, %i1, ... are its inputs and %o what it gives."""
    body, registers = "", ""
    for n, (type_, _) in enumerate([*inputs, (output, None)]):
        name, size = ("o" if n == len(inputs) else f"i{n}"), 8 * kind(type_)[0]
        registers += f".reg .pred %{name}; " if type_ == "pred" else f".reg .b{max(size, 16)} %{name}; "
    for n, (type_, _) in enumerate(inputs):
        size = 8 * kind(type_)[0]
        body += f"add.s64 %a, %p{n}, %t8; ld.global.b{size} %i{n}, [%a];\n"
    size = 8 * kind(output)[0]
    body += instructions + f"\nadd.s64 %a, %p{len(inputs)}, %t8; st.global.b{size} [%a], %o;"
    arguments = {}
    for n, (type_, values) in enumerate(inputs):
        memory = np.zeros((threads, 8 // kind(type_)[0]), kind(type_)[1])
        memory[:, 0] = values
        arguments[f"p{n}"] = torch.from_numpy(memory.view(np.uint8))
    out = np.zeros((threads, 8), np.uint8)
    arguments["out"] = torch.from_numpy(out)
    run_ptx(entry(body, len(arguments), registers, threads), None, (1,), (threads,), arguments)
    return out[:, : kind(output)[0]].copy().view(kind(output)[1]).ravel()


def sample(type_: str, seed: int, n: int = 256) -> np.ndarray:
    """Edge values of a type, then random ones."""
    rng = np.random.default_rng(seed)
    size, dtype = kind(type_)
    if type_[0] != "f":
        values = rng.integers(0, 1 << (8 * size - 1), n, np.uint64) * np.uint64(2) + rng.integers(0, 2, n, np.uint64)
        values >>= rng.integers(0, 8 * size, n, np.uint64)
        values = values.astype(kind("b" + type_[1:])[1])
        edges = [0, 1, (1 << 8 * size) - 1, 1 << 8 * size - 1, (1 << 8 * size - 1) - 1]
        values[: 2 * len(edges) : 2] = edges
        return values.view(dtype)
    with np.errstate(all="ignore"):
        values = (rng.standard_normal(n) * 2.0 ** rng.integers(-40, 40, n)).astype(dtype)
    info = np.finfo(dtype)
    edges = [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, info.tiny, info.smallest_subnormal, info.max, 0.5, 1.5, 2.5]
    values[rng.permutation(64)[: len(edges)]] = edges
    return values


def same(got: np.ndarray, want: np.ndarray) -> bool:
    if got.dtype.kind == "f":
        nan = np.isnan(got) & np.isnan(want)
        return bool((nan | (got.view(f"u{got.itemsize}") == want.view(f"u{want.itemsize}"))).all())
    return bool((got == want).all())


def exactly(function, dtype):
    """A function of Python integers, applied to each element and wrapped."""
    wrap = 1 << 8 * np.dtype(dtype).itemsize
    return lambda *arrays: np.array(
        [function(*map(int, row)) % wrap for row in zip(*arrays)], f"u{wrap.bit_length() // 8}"
    ).view(dtype)


def toward_zero(a, b):
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = [
    ("add.s32", "s32", lambda a, b: a + b),
    ("sub.u64", "u64", lambda a, b: a - b),
    ("mul.lo.s64", "s64", lambda a, b: a * b),
    ("mul.hi.u32", "u32", lambda a, b: a * b >> 32),
    ("mul.hi.s64", "s64", lambda a, b: a * b >> 64),
    ("mul.hi.u64", "u64", lambda a, b: a * b >> 64),
    ("div.s32", "s32", toward_zero),
    ("div.u64", "u64", lambda a, b: a // b if b else -1),
    ("rem.s64", "s64", lambda a, b: a - b * toward_zero(a, b) if b else a),
    ("rem.u32", "u32", lambda a, b: a % b if b else a),
    ("min.s32", "s32", min),
    ("max.u64", "u64", max),
    ("and.b64", "b64", lambda a, b: a & b),
    ("xor.b32", "b32", lambda a, b: a ^ b),
]


@pytest.mark.parametrize("op, type_, function", INTEGER, ids=lambda x: x if isinstance(x, str) else "")
def test_integers(op, type_, function):
    a, b = sample(type_, 1), sample(type_, 2)
    got = execute(f"{op} %o, %i0, %i1;", [(type_, a), (type_, b)], type_)
    assert same(got, exactly(function, kind(type_)[1])(a, b))


BITS = [
    ("shl.b32 %o, %i0, %i1;", "b32", lambda a, n: a << n if n < 32 else 0),
    ("shr.u32 %o, %i0, %i1;", "b32", lambda a, n: a >> n),
    ("shr.s32 %o, %i0, %i1;", "s32", lambda a, n: a >> min(n & 0xFFFFFFFF, 31)),
    ("popc.b32 %o, %i0;", "b32", lambda a, n: a.bit_count()),
    ("clz.b32 %o, %i0;", "b32", lambda a, n: 32 - a.bit_length()),
    ("bfind.u32 %o, %i0;", "b32", lambda a, n: a.bit_length() - 1),
    ("brev.b32 %o, %i0;", "b32", lambda a, n: int(f"{a:032b}"[::-1], 2)),
    ("bfe.u32 %o, %i0, 3, 7;", "b32", lambda a, n: a >> 3 & 127),
    ("bfe.s32 %o, %i0, 3, 7;", "s32", lambda a, n: (a >> 3 & 127) - (128 if a >> 9 & 1 else 0)),
    ("bfi.b32 %o, %i0, %i1, 4, 8;", "b32", lambda a, b: (b & ~0xFF0) | (a & 0xFF) << 4),
    ("shf.l.wrap.b32 %o, %i0, %i1, 9;", "b32", lambda a, b: b << 9 | a >> 23),
    ("shf.r.wrap.b32 %o, %i0, %i1, 9;", "b32", lambda a, b: (b << 32 | a) >> 9),
    ("prmt.b32 %o, %i0, %i1, 0x5410;", "b32", lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16),
    ("lop3.b32 %o, %i0, %i1, %i0, 0x3c;", "b32", lambda a, b: a ^ b),
    ("mad.lo.s32 %o, %i0, %i1, 7;", "s32", lambda a, b: a * b + 7),
    ("not.b32 %o, %i0;", "b32", lambda a, b: ~a),
    ("setp.lt.s32 %q1, %i0, %i1; selp.b32 %o, 5, 6, %q1;", "s32", lambda a, b: 5 if a < b else 6),
    ("setp.hi.u32 %q1, %i0, %i1; selp.b32 %o, 5, 6, %q1;", "u32", lambda a, b: 5 if a > b else 6),
]


@pytest.mark.parametrize(
    "text, type_, function", BITS, ids=lambda x: x.split()[0] if isinstance(x, str) and " " in x else ""
)
def test_bits(text, type_, function):
    a, b = sample(type_, 3), sample(type_, 4)
    if text.startswith(("shl", "shr")):
        b = (b.view(np.uint32) % 40).view(b.dtype)
    assert same(execute(text, [(type_, a), (type_, b)], type_), exactly(function, kind(type_)[1])(a, b))


def test_wide_products_and_moves():
    a, b = sample("s32", 5), sample("s32", 6)
    wide = execute("mul.wide.s32 %o, %i0, %i1;", [("s32", a), ("s32", b)], "s64")
    assert same(wide, a.astype(np.int64) * b)
    pair = execute("mov.b64 %o, {%i0, %i1};", [("s32", a), ("s32", b)], "b64")
    assert same(pair, a.view(np.uint32) | b.view(np.uint32).astype(np.uint64) << 32)
    high = execute("mov.b64 {_, %o}, %i0;", [("b64", pair)], "b32")
    assert same(high, b.view(np.uint32))


FLOATS = [
    ("add.f32", np.add), ("sub.rn.f64", np.subtract), ("mul.rn.f32", np.multiply), ("div.rn.f64", np.divide),
    ("div.rn.f32", np.divide), ("min.f32", np.fmin), ("max.NaN.f32", np.maximum), ("min.f64", np.fmin),
]  # fmt: skip


@pytest.mark.parametrize("op, function", FLOATS, ids=lambda x: x if isinstance(x, str) else "")
def test_floats(op, function):
    type_ = op.split(".")[-1]
    a, b = sample(type_, 7), sample(type_, 8)
    with np.errstate(all="ignore"):
        want = function(a, b)
    zeros = (a == 0) & (b == 0)
    got = execute(f"{op} %o, %i0, %i1;", [(type_, a), (type_, b)], type_)
    assert same(np.where(zeros, 0, got), np.where(zeros, 0, want))


def test_square_roots_are_rounded_correctly_and_approximations_are_not():
    a = np.abs(sample("f64", 9))
    assert same(execute("sqrt.rn.f64 %o, %i0;", [("f64", a)], "f64"), np.sqrt(a))
    x = np.abs(sample("f32", 10))
    approximate = execute("sqrt.approx.ftz.f32 %o, %i0;", [("f32", x)], "f32")
    normal = np.isfinite(x) & (x >= np.finfo(np.float32).tiny)
    ulps = np.abs(approximate[normal].view(np.int32) - np.sqrt(x[normal]).view(np.int32))
    assert ulps.max() == 1 and 0.2 < (ulps > 0).mean() < 0.8


class TestFusedMultiplyAdd:
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fma.restype, libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3

    def test_float64(self):
        for seed in range(4):
            a, b, c = (sample("f64", 11 + 3 * seed + n) for n in range(3))
            want = np.array([self.libm.fma(*row) for row in zip(a, b, c)])
            assert same(fma(a, b, c), want)
            assert same(execute("fma.rn.f64 %o, %i0, %i1, %i2;", [("f64", x) for x in (a, b, c)], "f64"), want)

    def test_float64_where_the_sum_cancels(self):
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((2, 20000))
        c = -(a * b) * rng.choice([1, 1 + 2**-52, 1 - 2**-53, 2**-50], a.size)
        assert same(fma(a, b, c), np.array([self.libm.fma(*row) for row in zip(a, b, c)]))

    def test_float64_at_the_ends_of_the_range(self):
        rng = np.random.default_rng(1)
        a, b, c = rng.standard_normal((3, 3000)) * 2.0 ** rng.integers(-1070, 1020, (3, 3000))
        assert same(fma(a, b, c), np.array([self.libm.fma(*row) for row in zip(a, b, c)]))

    def test_float32(self):
        for seed in range(8):
            a, b, c = (sample("f32", 30 + 3 * seed + n) for n in range(3))
            want = np.array([self.libm.fmaf(*row) for row in zip(a, b, c)], np.float32)
            assert same(narrow(fma_odd(a, b, c), "f32"), want)
            assert same(execute("fma.rn.f32 %o, %i0, %i1, %i2;", [("f32", x) for x in (a, b, c)], "f32"), want)

    def test_differs_from_a_product_and_a_sum(self):
        rng = np.random.default_rng(2)
        a, b, c = rng.standard_normal((3, 256))
        fused = execute("fma.rn.f64 %o, %i0, %i1, %i2;", [("f64", x) for x in (a, b, c)], "f64")
        apart = execute("mul.rn.f64 %o, %i0, %i1; add.rn.f64 %o, %o, %i2;", [("f64", x) for x in (a, b, c)], "f64")
        assert same(apart, a * b + c) and not same(fused, apart)


class TestConversions:
    @pytest.mark.parametrize("target, origin", [("f64", "f32"), ("f32", "f64"), ("f16", "f32"), ("f16", "f64")])
    def test_floats(self, target, origin):
        x = sample(origin, 60)
        with np.errstate(all="ignore"):
            want = x.astype(kind(target)[1])
        rounding = "" if target == "f64" else ".rn"
        assert same(execute(f"cvt{rounding}.{target}.{origin} %o, %i0;", [(origin, x)], target), want)

    def test_bf16_rounds_to_nearest_even(self):
        x = sample("f32", 61)
        x[100:103] = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(
            np.float32
        )  # two ties and one above
        want = torch.from_numpy(x).bfloat16()
        got = execute("cvt.rn.bf16.f32 %o, %i0;", [("f32", x)], "b16")
        assert torch.equal(torch.from_numpy(got.view(np.int16)).view(torch.bfloat16).nan_to_num(7), want.nan_to_num(7))
        back = execute("cvt.f32.bf16 %o, %i0;", [("b16", got)], "f32")
        assert same(back, want.float().numpy())
        cut = execute("cvt.rz.bf16.f32 %o, %i0;", [("f32", x)], "b16")
        keep = ~np.isnan(x)
        assert (cut[keep] == (x.view(np.uint32)[keep] >> 16)).all()

    def test_bf16_of_float64_is_rounded_once(self):
        x = np.full(256, 1 + 2.0**-8 + 2.0**-40)  # above the tie, but float32 rounds it onto the tie
        assert (execute("cvt.rn.bf16.f64 %o, %i0;", [("f64", x)], "b16") == 0x3F81).all()

    def test_pairs(self):
        a, b = sample("f32", 62), sample("f32", 63)
        a, b = (np.where(np.isfinite(v), v, 1).astype(np.float32) for v in (a, b))
        halves = torch.stack([torch.from_numpy(b), torch.from_numpy(a)], 1)
        for name, dtype in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
            got = execute(f"cvt.rn.{name}.f32 %o, %i0, %i1;", [("f32", a), ("f32", b)], "b32")
            assert (got.view(np.int16).reshape(-1, 2) == halves.to(dtype).view(torch.int16).numpy()).all()
        packed = execute("cvt.rn.bf16x2.f32 %o, %i0, %i1; add.bf16x2 %o, %o, %o;", [("f32", a), ("f32", b)], "b32")
        want = (halves.bfloat16() + halves.bfloat16()).view(torch.int16).numpy()
        assert (packed.view(np.int16).reshape(-1, 2) == want).all()

    def test_comparisons_of_pairs_give_two_predicates(self):
        a, b = sample("f16", 68), sample("f16", 69)
        one = np.float16(1).view(np.uint16).astype(np.uint32) * np.uint32(0x10001)
        pairs = a.view(np.uint16) | b.view(np.uint16).astype(np.uint32) << 16
        text = "setp.lt.f16x2 %q1|%q2, %i0, %i1; selp.b32 %o, 1, 0, %q1; selp.b32 %i0, 2, 0, %q2; or.b32 %o, %o, %i0;"
        got = execute(text, [("b32", pairs), ("b32", np.full(256, one))], "b32")
        assert same(got, ((a < 1) + 2 * (b < 1)).astype(np.uint32))

    def test_tf32(self):
        x = sample("f32", 64)
        got = execute("cvt.rna.tf32.f32 %o, %i0;", [("f32", x)], "b32").view(np.float32)
        finite = np.isfinite(x) & (np.abs(x) < 1e38) & (np.abs(x) > 1e-37)
        assert (np.abs(got[finite] - x[finite]) <= np.abs(x[finite]) * 2.0**-11).all()
        assert (got.view(np.uint32) & 0x1FFF == 0).all()

    @pytest.mark.parametrize("target", ["s32", "u32", "s64", "u64", "s16"])
    def test_floats_to_integers_saturate(self, target):
        x, info = sample("f64", 65), np.iinfo(kind(target)[1])
        want = [0 if np.isnan(v) else max(info.min, min(info.max, int(np.clip(np.trunc(v), -1e30, 1e30)))) for v in x]
        assert same(execute(f"cvt.rzi.{target}.f64 %o, %i0;", [("f64", x)], target), np.array(want, kind(target)[1]))

    @pytest.mark.parametrize("origin", ["s32", "u64", "s64"])
    def test_integers_to_floats(self, origin):
        x = sample(origin, 66)
        want = np.array([np.float32(v) for v in x], np.float32)
        assert same(execute(f"cvt.rn.f32.{origin} %o, %i0;", [(origin, x)], "f32"), want)

    def test_signs_extend(self):
        x = sample("s16", 67)
        assert same(execute("cvt.s64.s16 %o, %i0;", [("s16", x)], "s64"), x.astype(np.int64))
        assert same(
            execute("cvt.u32.u16 %o, %i0;", [("u16", x.view(np.uint16))], "u32"), x.view(np.uint16).astype(np.uint32)
        )


class TestWarps:
    @pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
    def test_shuffle(self, mode):
        value, by = sample("b32", 70), np.random.default_rng(0).integers(0, 32, 256).astype(np.uint32)
        clamp = 0 if mode == "up" else 31
        got = execute(f"shfl.sync.{mode}.b32 %o, %i0, %i1, {clamp}, -1;", [("b32", value), ("b32", by)], "b32")
        for lane in range(256):
            own, first = lane % 32, lane - lane % 32
            by_lane = int(by[lane])
            other = {"up": own - by_lane, "down": own + by_lane, "bfly": own ^ by_lane, "idx": by_lane}[mode]
            assert got[lane] == value[first + (other if 0 <= other < 32 else own)]

    def test_votes_matches_and_reductions(self):
        value = np.random.default_rng(1).integers(0, 3, 256).astype(np.uint32)
        rows = value.reshape(8, 32)
        i = [("b32", value)]
        mask = lambda bits: sum(1 << n for n in range(32) if bits[n])  # noqa: E731
        ballot = execute("setp.eq.u32 %q1, %i0, 1; vote.sync.ballot.b32 %o, %q1, -1;", i, "b32")
        assert (ballot.reshape(8, 32) == np.array([[mask(r == 1)] for r in rows])).all()
        match = execute("match.any.sync.b32 %o, %i0, -1;", i, "b32").reshape(8, 32)
        assert all(match[w, n] == mask(rows[w] == rows[w, n]) for w in range(8) for n in range(32))
        total = execute("redux.sync.add.u32 %o, %i0, -1;", i, "u32").reshape(8, 32)
        assert (total == rows.sum(1)[:, None]).all()

    def test_divergent_threads_meet_again(self):
        value = sample("s32", 71)
        text = """setp.lt.s32 %q1, %i0, 0; @%q1 bra NEGATIVE; add.s32 %o, %i0, 1; bra END;
NEGATIVE: sub.s32 %o, %i0, 1;
END: shfl.sync.bfly.b32 %o, %o, 0, 31, -1;"""
        assert same(execute(text, [("s32", value)], "s32"), np.where(value < 0, value - 1, value + 1))

    def test_loop_with_a_count_of_each_thread(self):
        count = (np.arange(256) % 7 + 1).astype(np.int32)
        text = """mov.b32 %o, 0;
LOOP: add.s32 %o, %o, %i0; sub.s32 %i0, %i0, 1; setp.gt.s32 %q1, %i0, 0; @%q1 bra LOOP;"""
        assert same(execute(text, [("s32", count)], "s32"), (count * (count + 1) // 2).astype(np.int32))


class TestAtomics:
    @pytest.mark.parametrize("word", ["add", "min", "max", "and", "or", "xor"])
    def test_returned_values_are_an_order_of_the_operations(self, word):
        """64-bit atomics of all threads on three places: each old value is seen once, and the last one stays."""
        value = np.random.default_rng(3).integers(0, 1 << 40, 256).astype(np.uint64)
        place = torch.zeros(3, dtype=torch.int64) if word != "and" else torch.full((3,), -1)
        text = f"""rem.u32 %r, %tid, 3; mul.wide.u32 %b, %r, 8; add.s64 %b, %p1, %b;
add.s64 %a, %p0, %t8; ld.global.b64 %i, [%a]; atom.global.relaxed.gpu.{word}.{"b" if word in ("and", "or", "xor") else "u"}64 %o, [%b], %i;
add.s64 %a, %p2, %t8; st.global.b64 [%a], %o;"""
        ptx = entry(text, 3, ".reg .b32 %r; .reg .b64 %b, %i, %o;")
        old = torch.zeros(256, dtype=torch.int64)
        before = place.clone()
        run_ptx(ptx, None, (1,), (256,), {"x": torch.from_numpy(value.view(np.int64)), "place": place, "old": old})
        reduce = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        for p in range(3):
            own = value[p::3]
            want = reduce[word].reduce(np.append(own, before.numpy().view(np.uint64)[p]))
            assert place.numpy().view(np.uint64)[p] == want
        if word == "add":
            assert len(np.unique(old.numpy()[0::3])) == len(value[0::3])

    def test_without_a_result(self):
        place = torch.zeros(1, dtype=torch.int64)
        run_ptx(
            entry("mov.b64 %v, 3; red.global.gpu.relaxed.add.u64 [%p0], %v;", 1, ".reg .b64 %v;"),
            None,
            (5,),
            (256,),
            {"x": place},
        )
        assert place.item() == 5 * 256 * 3

    def test_compare_and_swap(self):
        place, won = torch.zeros(1, dtype=torch.int32), torch.zeros(256, 2, dtype=torch.int32)
        text = """add.s32 %v, %tid, 1; atom.global.cas.b32 %o, [%p0], 0, %v;
add.s64 %a, %p1, %t8; st.global.b32 [%a], %o;"""
        run_ptx(entry(text, 2, ".reg .b32 %v, %o;"), None, (1,), (256,), {"x": place, "won": won})
        assert (won[:, 0] == 0).sum() == 1 and won[place.item() - 1, 0] == 0


def test_predicated_vector_loads_leave_the_other_registers():
    x = torch.arange(256, dtype=torch.int64)
    out = torch.zeros(256, dtype=torch.int64)
    text = """mov.b32 %r0, -5; mov.b32 %r1, -6; setp.lt.u32 %q1, %tid, 100; add.s64 %a, %p0, %t8;
@%q1 ld.global.v2.b32 {%r0, %r1}, [%a + 0]; add.s64 %a, %p1, %t8; st.global.v2.b32 [%a], {%r0, %r1};"""
    run_ptx(entry(text, 2, ".reg .b32 %r<2>;"), None, (1,), (256,), {"x": x, "out": out})
    rest = out[100:].view(torch.int32).view(-1, 2)
    assert torch.equal(out[:100], x[:100]) and (rest == torch.tensor([-5, -6], dtype=torch.int32)).all()


def test_matrices_through_shared_memory():
    """ldmatrix gives thread t of a warp elements 2 (t % 4) and the next of row t // 4; .trans the transpose's; stmatrix
    undoes it."""
    words = torch.randint(0, 1 << 15, (8, 8), dtype=torch.int16)
    for trans in ("", ".trans"):
        back, fragment = torch.zeros(8, 8, dtype=torch.int16), torch.zeros(32, 2, dtype=torch.int32)
        text = f"""and.b32 %r0, %tid, 7; shl.b32 %r0, %r0, 4; cvt.u64.u32 %b, %r0; add.s64 %b, %p0, %b;
ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%b]; st.shared.v4.b32 [%r0], {{%r1, %r2, %r3, %r4}}; bar.sync 0;
ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r5}}, [%r0]; bar.sync 0;
add.s64 %a, %p2, %t8; st.global.b32 [%a], %r5;
stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r0 + 128], {{%r5}}; bar.sync 0;
ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r0 + 128]; cvt.u64.u32 %b, %r0; add.s64 %b, %p1, %b;
setp.lt.u32 %q1, %tid, 8; @%q1 st.global.v4.b32 [%b], {{%r1, %r2, %r3, %r4}};"""
        ptx = entry(text, 3, ".reg .b32 %r<9>; .reg .b64 %b; .shared .align 16 .b8 tile[256];", 32)
        run_ptx(ptx, None, (1,), (32,), {"x": words, "back": back, "fragment": fragment})
        matrix = words.T if trans else words
        assert torch.equal(back, words)
        for t in range(32):
            pair = fragment[t, :1].view(torch.int16)
            assert torch.equal(pair, matrix[t // 4, 2 * (t % 4) : 2 * (t % 4) + 2])


@triton.jit
def product_kernel(
    a, b, c, M, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x = tl.load(a + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        if TRANSPOSED:
            y = tl.load(b + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
            y = tl.trans(y)
        else:
            y = tl.load(b + k[:, None] * N + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


def product(a, b, precision="ieee", transposed=True, warps=4):
    M, K, N = *a.shape, b.shape[0 if transposed else 1]
    c = torch.empty(M, N)
    product_kernel[triton.cdiv(M, 64), triton.cdiv(N, 64)](
        a, b, c, M, N, K, 64, 64, 32, precision, transposed, num_warps=warps, num_stages=3
    )
    return c


@pytest.mark.parametrize("target, instruction", [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async")])
@pytest.mark.parametrize(
    "dtype, precision, tolerance",
    [
        (torch.bfloat16, "ieee", 2e-6), (torch.float16, "ieee", 2e-6), (torch.float32, "tf32", 4e-3),
        (torch.float32, "tf32x3", 2e-6),
    ],
    ids=["bf16", "f16", "tf32", "tf32x3"],
)  # fmt: skip
def test_tensor_cores(target, instruction, dtype, precision, tolerance):
    """Triton's own code, whose layouts run on hardware: the emulator's layouts give the same product. Even seeds end
    background work as late as it may, odd ones at once and with sums cut off; warps in any order."""
    for (M, N, K), transposed, warps in (((64, 64, 64), True, 4), ((70, 130, 45), False, 8)):
        a, b = torch.randn(M, K).to(dtype), torch.randn(*((N, K) if transposed else (K, N))).to(dtype)
        want = a.double() @ (b.double().T if transposed else b.double())
        scale = a.double().norm(dim=1)[:, None] * (b.double().norm(dim=1 if transposed else 0))[None, :]
        for seed, racecheck in ((0, False), (1, False), (2, True)):
            with emulated(target, racecheck, seed) as launches:
                got = product(a, b, precision, transposed, warps)
            assert ((got - want).abs() / scale).max() < tolerance, (M, seed, racecheck)
            assert any(op.startswith(instruction) for op in operations(launches[0].program))


def test_tensor_cores_cut_their_sums_with_odd_seeds():
    """What lies more than a bit below the last one of the largest product is lost, as hardware may do."""
    a, b = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16)
    a[:, 0], a[:, 1:8], b[:, :8] = 1.0, 2.0**-25, 1.0
    with emulated("sm_80", seed=1):
        assert (product(a, b)[:8, :8] == 1.0).all()
    a[:, 1:8] = 2.0**-24  # the bit that is kept; then cut to float32
    with emulated("sm_80", seed=1):
        assert (product(a, b)[:8, :8] == 1.0 + 3 * 2.0**-23).all()
