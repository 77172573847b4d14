"""nearest_codeword's Triton kernels under the checking layer: every arithmetic, plan and stage, on hostile inputs.

python tests/interpreted_search.py [WORD ...]      all checks, or those whose name contains a word
"""

import sys
import time
from unittest import mock

import triton_check

# isort: split
import numpy as np
import torch
from vqkernels.triton_kernels import nearest_codeword as module
from vqkernels.triton_kernels import search, tuning
from vqkernels.triton_kernels.nearest_codeword import nearest_codeword

from vqkernels import registry, verify
from vqkernels.reference.nearest_codeword import canonical

SPEC = registry.SPECS["nearest_codeword"]
TILES = {"ROWS": 32, "CODES": 32, "FEATURES": 64, "GEMM": 0, "num_warps": 4, "num_stages": 2}
N, K, D = 16, 36, 11


def draw(kind: str, *shape: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    if kind == "lognormal":
        x = (3 * x).exp()
    elif kind == "cauchy":
        x = x / torch.randn(*shape, generator=g, dtype=torch.float64)
    elif kind == "ties":
        x = torch.randint(-1, 2, shape, generator=g).double()
    elif kind == "far":
        x = x + 4096
    elif kind == "clustered":
        x = x * 1e-3 + torch.randint(-2, 3, shape, generator=g)
    elif kind.startswith("scale"):
        x = x * float(kind.split()[1])
    return x.float()


KINDS = "gaussian lognormal cauchy ties far clustered".split() + [f"scale {s}" for s in ("1e-30", "1e30", "1e-42")]


def hostile(N: int, K: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One head a kind. Some rows lie between two codewords, some are codewords, some are zero; some codewords are twice
    there, some one unit in the last place apart."""
    z = torch.stack([draw(kind, N, D, seed=i) for i, kind in enumerate(KINDS)])
    c = torch.stack([draw(kind, K, D, seed=100 + i) for i, kind in enumerate(KINDS)])
    c[:, K // 2 : K // 2 + 4] = c[:, 2:6]
    c[:, K - 3] = torch.nextafter(c[:, 1], torch.tensor(torch.inf))
    tilt = torch.linspace(-1e-6, 1e-6, 6).view(1, 6, 1)
    z[:, :6] = c[:, 7:13] * (0.5 + tilt) + c[:, 13:19] * (0.5 - tilt)
    z[:, 6:9] = c[:, [3, 1, K - 3]]
    z[:, 9] = 0
    unlike = torch.stack([z[0] * 1e25, z[0] * 1e-25, z[0] * 1e5]), torch.stack([c[0] * 1e-20, c[0], c[0]])
    return torch.cat([z, unlike[0]]), torch.cat([c, unlike[1]])


def same(got, want, *what) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape, (what, g.dtype, g.shape)
        difference = verify._first_difference(g, w)
        assert difference is None, (*what, difference)


def agrees(args, *what, seeds=(0,)) -> None:
    """Equal to the reference, in every one of these orders of programs."""
    same(triton_check.in_any_order(lambda: nearest_codeword(*args), seeds), SPEC.reference(*args), *what)


def arithmetic(name: str, **numbers) -> dict:
    return {"nearest_codeword": {"*": TILES | {"ARITHMETIC": search.ARITHMETICS.index(name)} | numbers}}


class Spy:
    """Stands in for a kernel and keeps its launches' arguments."""

    def __init__(self, name: str):
        self.name, self.kernel, self.calls = name, getattr(module, name), []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.calls.append((grid, args))
            return self.kernel[grid](*args, **options)

        return launch

    def __enter__(self):
        setattr(module, self.name, self)
        return self

    def __exit__(self, *_):
        setattr(module, self.name, self.kernel)


class MediumPrecision(torch.overrides.TorchFunctionMode):
    """float32 matrix products as torch.set_float32_matmul_precision("medium") makes them on processors that have
    bfloat16: from rounded factors. Here, whatever the processor."""

    products = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("matmul", "__matmul__", "mm"):
            self.products += 1
            args = tuple(x.bfloat16().float() if x.dtype == torch.float32 else x for x in args)
        return function(*args, **kwargs or {})


def hostile_rows_in_every_arithmetic():
    z, c = hostile(N, K, D)
    for name in search.ARITHMETICS:
        for metric in (0, 1, 2) if name == "fp16" else (0,):
            with tuning.using(arithmetic(name)):
                agrees((z, c, None, metric, True), name, metric)


def sixteen_bit_inputs():
    z, c = hostile(N, K, D)
    for dtype in (torch.bfloat16, torch.float16):
        agrees((z[:6].to(dtype), c[:6].to(dtype), None, 0, True), dtype)


def every_plan():
    """Rows read again for each tile, dot products from torch, one split of the codebook or many, a block of rows beyond
    one chunk of dot products. Codewords 1 and 65, one unit in the last place apart, share a lane of the tile."""
    z, c = (t[[0, 3, 7]] for t in hostile(40, 68, 37))
    with tuning.using(arithmetic("fp16", FEATURES=32)):
        agrees((z, c, None, 0, True), "rows")
    with tuning.using(arithmetic("tf32", GEMM=1)):
        module.GEMM_SCORES = 32 * 128
        agrees((z, c, None, 0, True), "gemm")
        with MediumPrecision() as medium:
            agrees((z, c, None, 0, True), "gemm, medium")
        assert medium.products > 0
    with tuning.using(arithmetic("fma")), Spy("_coarse_kernel") as coarse:
        agrees((z, c, None, 0, True), "splits")
        module.MIN_PROGRAMS = 1
        agrees((z, c, None, 0, True), "no splits")
        assert [grid[2] for grid, _ in coarse.calls] == [3, 1]
    module.MIN_PROGRAMS = 256


def many_features():
    z, c = draw("gaussian", 1, 2, 4096, seed=1), draw("gaussian", 1, 3, 4096, seed=2)
    c[0, 1] = z[0, 1] + 1e-3
    agrees((z, c, None, 0, True))


def order_of_programs():
    z, c = (t[[0, 3, 6]] for t in hostile(70, 40, D))
    agrees((z, c, None, 0, True), seeds=(None, 0, 1, 2))


def edges():
    """One program goes over all rows that the coarse pass leaves open, as on large inputs."""
    with mock.patch.multiple(module, PROGRAMS=1, COMPARED_ROWS=64):
        for case, args in SPEC.edges(torch.float32):
            if args[1].shape[1] <= 128:
                agrees(args, case)


def every_codeword_equal_or_unusable():
    z, c = draw("gaussian", 2, 20, 16, seed=1), draw("gaussian", 2, 70, 16, seed=2)
    c[0] = c[0, :1]
    c[0, :33] = torch.inf
    c[1, ::2] = torch.nan
    z[0, 3, 5], z[1, 4, 0] = torch.nan, -torch.inf
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) < 0.7
    for metric in (0, 1, 2):
        agrees((z, c, mask, metric, True), metric)
        agrees((z, torch.full_like(c, torch.nan), mask, metric, False), metric)


def ties_but_for_rounding():
    """Codewords that are permutations of one another, rows of one value: all distances are equal but for the rounding of
    products and sums, which the canonical order of features settles. Values so unlike that squares of differences and
    differences of squares are rounded otherwise."""
    g = torch.Generator().manual_seed(4)
    values = (10 * torch.randn(23, generator=g)).exp()
    c = torch.stack([values[torch.randperm(23, generator=g)] for _ in range(K)])[None]
    z = 3 * draw("gaussian", 1, N, 1, seed=3).expand(1, N, 23)
    for metric in (0, 2):
        agrees((z, c, None, metric, True), metric)
        agrees((z.double() / 3, c.double() / 7, None, metric, True), metric, "float64")


def scan():
    """float64, alone in taking every codeword canonically whatever the size; overflow there."""
    z, c = (t[[0, 3, 6]].double() for t in hostile(40, 40, D))
    agrees((z, c, None, 0, True))
    agrees((z * 1e160, c * 1e160, None, 2, True), "overflow")
    agrees((z * 1e-160, c * 1e-160, None, 1, True), "underflow")


def most_rows_are_decided():
    """Few Gaussian rows reach the compare kernel, none where the inputs are not rounded and no two scores are close."""
    z, c = draw("gaussian", 1, 256, 64, seed=1), draw("gaussian", 1, 128, 64, seed=2)
    for name, most in (("bf16", 100), ("tf32", 12), ("fp16", 12), ("ieee", 0)):
        with tuning.using(arithmetic(name)), Spy("_compare_kernel") as compare:
            agrees((z, c, None, 0, True), name)
            listed = int(compare.calls[0][1][6])
            assert listed <= most, (name, listed)
    with Spy("_compare_kernel") as compare:
        agrees((z.bfloat16(), c.bfloat16(), None, 0, True))
        assert int(compare.calls[0][1][6]) == 0


def fast():
    """certified=False: the regret is at most 4 eps, and nothing is listed."""
    z, c = draw("gaussian", 1, 64, 40, seed=1), draw("gaussian", 1, 100, 40, seed=2)
    with Spy("_compare_kernel") as compare, triton_check.checked(0):
        indices, distances = nearest_codeword(z, c, None, 0, False)
        assert int(compare.calls[0][1][6]) == 0
    exact = canonical(z[0], c[0], 0)
    chosen = exact.gather(1, indices[0, :, None])[:, 0]
    assert torch.equal(chosen.float(), distances[0])
    bound = 4 * 2.0**-10 * z[0].norm(dim=-1).double() * c[0].norm(dim=-1).max().double()
    assert (chosen - exact.amin(-1) <= bound).all()


def added_as_tensor_cores_do(products: np.ndarray, group: int) -> np.ndarray:
    """float32 sums of [..., D], cutting all that is below 2^-23 of the largest summand of each group."""

    def cut(x, place):
        return np.trunc(x / place) * place

    total = np.zeros(products.shape[:-1])
    for start in range(0, products.shape[-1], group):
        terms = np.concatenate([total[..., None], products[..., start : start + group]], -1)
        place = 2.0 ** (np.frexp(np.abs(terms).max(-1) + 1e-300)[1] - 24)
        total = cut(terms, place[..., None]).sum(-1)
        total = cut(total, 2.0 ** (np.frexp(np.abs(total) + 1e-300)[1] - 24))
    return total


def bound_holds():
    """Scores of the copies that the kernels make, added as the clumsiest hardware that the proof admits, stay within the
    bound; and the bound is not idle: some use a twentieth of it."""
    z, c = hostile(N, K, D)
    for name in search.ARITHMETICS:
        for l2 in (True, False):
            with triton_check.checked(0):
                book = search.prepare_codebook(c, name, l2, 32, 32)
                rows, ratios, margins = search.prepare_rows(z, None, book, 32)
            nearest = 0.0
            for h in range(len(z)):
                coarse_c = book.coarse[h].view(book.padded_D, -1).T if name == "fma" else book.coarse[h].view(-1, 32)
                a, b = rows[h, :N, :D].double().numpy(), coarse_c[:K, :D].double().numpy()
                ratio, margin = ratios[h, :N].double().numpy(), margins[h, :N].double().numpy()
                bounded = np.isfinite(margin)
                assert bounded.any() or h >= len(KINDS)
                largest = float(book.largest[h])
                scale = 2.0 ** (8 - (np.frexp(largest)[1] - 1)) if largest else 2.0**8
                exact_z, exact_c = z[h].double().numpy(), c[h].double().numpy()
                half = (0.5 * (exact_c * scale) ** 2).sum(-1) if l2 else 0.0
                row_scale = scale if l2 else 2.0 ** (8 - (np.frexp(np.abs(exact_z).max(-1))[1] - 1.0))[:, None, None]
                exact = half - ((exact_z[:, None] * row_scale) * (exact_c * scale)).sum(-1)
                products = a[:, None] * b[None]
                for group in (2, 4, 16) if name in ("bf16", "fp16", "tf32") else (1,):
                    if group == 1:
                        dots = np.zeros(products.shape[:-1], np.float32)
                        for d in range(D):
                            dots += products[..., d].astype(np.float32)
                    else:
                        dots = added_as_tensor_cores_do(products, group)
                    score = book.half_norms[h, :K].numpy() - (ratio[:, None] * dots).astype(np.float32)
                    error = np.abs(score.astype(np.float64) - exact)[bounded].max(-1, initial=0)
                    with np.errstate(invalid="ignore"):
                        used = error / (0.5 * margin[bounded])
                    assert not (used > 1).any(), (name, l2, h, group, used.max())
                    nearest = max(nearest, float(np.nan_to_num(used).max(initial=0)))
            assert nearest > 0.05, (name, l2, nearest)


def bound_in_python():
    """The twin for Python's numbers is what the kernel used."""
    z, c = draw("gaussian", 1, 5, D, seed=1), draw("gaussian", 1, 6, D, seed=2)
    with triton_check.checked(0):
        book = search.prepare_codebook(c, "fp16", True, 32, 32)
        rows, ratios, margins = search.prepare_rows(z, None, book, 32)
    for n in range(5):
        scale = 2.0 ** (8 - (np.frexp(float(z[0, n].abs().max()))[1] - 1))
        scaled = z[0, n].double() * scale
        lost = (scaled - rows[0, n, :D].double()).norm()
        eps = search.score_error_bound.fn(
            32, float(scaled.norm()), float(lost), float(book.norm), float(book.error), float(ratios[0, n]), True, True
        )
        assert abs(2 * eps / float(margins[0, n]) - 1) < 1e-5
    assert (margins[0, 5:] == -1).all()


CHECKS = [
    hostile_rows_in_every_arithmetic, sixteen_bit_inputs, every_plan, many_features, order_of_programs, edges,
    every_codeword_equal_or_unusable, ties_but_for_rounding, scan, most_rows_are_decided, fast, bound_holds, bound_in_python,
]  # fmt: skip


def main(words: list[str]) -> int:
    module.SCAN_WORK = 0  # small inputs go through all stages
    for check in CHECKS:
        if not words or any(word in check.__name__ for word in words):
            start = time.process_time()
            check()
            print(f"triton nearest_codeword {check.__name__}: ok, {time.process_time() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
