"""One z, one codebook, three backends: reference, cpu and triton (interpreter, under the checking layer) must agree to
the bit in indices and distances, on 10^5 hostile rows.

    python tests/three_backends.py      one line a kind of rows and number of features; exit code 1 where they differ

Kinds are heads of one call. Tiles are larger than on a GPU, so that the interpreter has fewer programs to run.
"""

import sys

import triton_check

# isort: split
import torch
from vqkernels.triton_kernels import nearest_codeword as kernels
from vqkernels.triton_kernels import search

from vqkernels.registry import SPECS

ROWS, SHAPES = 5000, ((24, 4), (48, 16))  # per kind; K, D
OP = SPECS["nearest_codeword"].op
TILES = {"ROWS": 1024, "CODES": 32, "FEATURES": 16, "GEMM": 0, "num_warps": 8, "num_stages": 2}


def hostile(kind: str, N: int, K: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(sum(map(ord, kind)) + D)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def pick(*shape):
        return torch.randint(0, K, shape, generator=g)

    z, c = randn(N, D), randn(K, D)
    if kind == "ties":  # small integers: many distances are equal
        z, c = torch.randint(-2, 3, (N, D), generator=g), torch.randint(-2, 3, (K, D), generator=g)
    elif kind == "duplicates":
        c = c[pick(K) // 4]
    elif kind == "one-ulp gaps":
        c = c[:1].float().expand(K, D).clone()
        c[torch.arange(K), torch.arange(K) % D] = torch.nextafter(c[0], torch.tensor(9e9))[torch.arange(K) % D]
        z = z + c[0].double()
    elif kind == "halfway":  # between two codewords, to within a few units in the last place
        z = (c[pick(N)] + c[pick(N)]) / 2 * (1 + 1e-7 * randn(N, 1))
    elif kind.startswith("scale"):
        z, c = z * float(kind.split()[1]), c * float(kind.split()[1])
    elif kind == "subnormal":
        z, c = z * 1e-41, c * 1e-41
    elif kind == "lognormal":
        z, c = (4 * z).exp(), (4 * c).exp()
    elif kind == "Cauchy":
        z, c = z / randn(N, D), c / randn(K, D)
    elif kind == "not finite":
        z[::3, 0], z[1::7, -1], z[2::11, 1] = float("nan"), float("inf"), float("-inf")
        c[3, 0], c[7, 1] = float("nan"), float("inf")
    elif kind == "clustered":
        c = c[pick(K) // 8] + 1e-5 * randn(K, D)
        z = c[pick(N)] + 1e-5 * randn(N, D)
    return z.float(), c.float()


KINDS = (
    "ties",
    "duplicates",
    "one-ulp gaps",
    "halfway",
    "scale 1e30",
    "scale 1e-30",
    "subnormal",
    "lognormal",
    "Cauchy",
    "not finite",
    "clustered",
)


def same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | ((a != a) & (b != b))


def main() -> int:
    kernels.config, kernels.COMPARED_ROWS, search._ROWS = lambda op, key: TILES, 512, 1024
    rows = wrong = 0
    for K, D in SHAPES:
        z, c = (torch.stack(x) for x in zip(*(hostile(kind, ROWS, K, D) for kind in KINDS)))
        want = OP.reference(z, c, None, 0, True)
        with triton_check.checked(seed=1) as seen:
            triton = OP.triton(z, c, None, 0, True)
        results = {"cpu": OP.default(z, c, None, 0, True), "triton": triton}
        for h, kind in enumerate(KINDS):
            bad = {
                name: int((~(same(got[0][h], want[0][h]) & same(got[1][h], want[1][h]))).sum())
                for name, got in results.items()
            }
            wrong += sum(bad.values())
            rows += ROWS
            codes = int(want[0][h].unique().numel())
            print(f"triton = cpu = reference: {kind:13s} K{K} D{D} {ROWS} rows, {codes:2d} codes: ", end="")
            print("ok" if not any(bad.values()) else f"WRONG {bad}")
        print(f"triton = cpu = reference: D{D}: {seen}")
    print(f"triton = cpu = reference: {rows} rows, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
