"""Operators' Triton kernels under the checking layer, on the registry's samples and edges, against the reference.

    python tests/interpreted_registry.py OP [...]       one line an operator and dtype; exit code 1 if one is wrong

Every case runs in a random order of programs; those of an operator's first dtype in two, which must agree to the bit.
"""

import sys
import time
from types import SimpleNamespace
from unittest import mock

import triton_check

# isort: split
from vqkernels.triton_kernels import nearest_codeword

from vqkernels import registry, verify


def orders(spec, dtype) -> tuple[int, ...]:
    """Seeds of the orders of programs; what depends on them does so in every dtype."""
    place = spec.dtypes.index(dtype)
    return (1, 2) if place == 0 else (2 + place,)


def under_check(spec, seeds, counts):
    """The operator's spec with a ``.triton`` overload that checks. Where the scan of all codewords has much to do, its
    tiles are larger than on a GPU, so that the interpreter has fewer to go through."""

    def triton(*args):
        large = spec.name == "nearest_codeword" and args[0].shape[1] * args[1].shape[1] > 1 << 16
        size = 128 if large else 32
        with mock.patch.multiple(nearest_codeword, SCAN_ROWS=size, SCAN_CODES=size):
            return triton_check.in_any_order(lambda: spec.op.triton(*args), seeds, counts)

    return SimpleNamespace(**vars(spec) | {"op": SimpleNamespace(triton=triton)})


def run(name: str, dtype) -> tuple[int, list[str], str]:
    """Runs an operator's cases: how many, what is wrong, and what was counted."""
    spec, wrong, counts = registry.SPECS[name], [], triton_check.Counts()
    cases, seeds = verify.cases(spec, dtype), orders(spec, dtype)
    for case, args in cases:
        try:
            detail, _ = verify.compare(under_check(spec, seeds, counts), "triton", args)
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
        if detail:
            wrong.append(f"{name} {dtype}, {case}: {detail}")
    return len(cases), wrong, str(counts)


def main(names: list[str]) -> int:
    failed = 0
    for name in names:
        for dtype in registry.SPECS[name].dtypes:
            start = time.process_time()
            cases, wrong, counted = run(name, dtype)
            verdict = f"{len(wrong)} WRONG" if wrong else "ok"
            print(
                f"triton {name:27s} {str(dtype).removeprefix('torch.'):9s}{cases:4d} cases, {len(orders(registry.SPECS[name], dtype))} orders of programs, "
                f"{counted}, {time.process_time() - start:.1f} s: {verdict}",
                flush=True,
            )
            for line in wrong:
                print(f"  {line}")
            failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
