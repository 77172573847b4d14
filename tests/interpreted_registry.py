"""Operators' Triton kernels under the checking layer, on the registry's samples and edges, against the reference.

    python tests/interpreted_registry.py OP [...]       one line an operator and dtype; exit code 1 if one is wrong

Every case runs in two random orders of programs, which must agree to the bit.
"""

import sys
import time
from types import SimpleNamespace

import triton_check

# isort: split
from vqkernels import registry, verify

ORDERS = (1, 2)


def under_check(spec, counts):
    """The operator's spec with a ``.triton`` overload that checks."""

    def triton(*args):
        return triton_check.in_any_order(lambda: spec.op.triton(*args), ORDERS, counts)

    return SimpleNamespace(**vars(spec) | {"op": SimpleNamespace(triton=triton)})


def run(name: str, dtype) -> tuple[int, list[str], str]:
    """Runs an operator's cases: how many, what is wrong, and what was counted."""
    spec, wrong, counts = registry.SPECS[name], [], triton_check.Counts()
    cases = verify.cases(spec, dtype)
    for case, args in cases:
        try:
            detail, _ = verify.compare(under_check(spec, counts), "triton", args)
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
        if detail:
            wrong.append(f"{name} {dtype}, {case}: {detail}")
    return len(cases), wrong, str(counts)


def main(names: list[str]) -> int:
    failed = 0
    for name in names:
        for dtype in registry.SPECS[name].dtypes:
            start = time.perf_counter()
            cases, wrong, counted = run(name, dtype)
            verdict = f"{len(wrong)} WRONG" if wrong else "ok"
            print(
                f"triton {name:27s} {str(dtype).removeprefix('torch.'):9s}{cases:4d} cases x {len(ORDERS)} orders, "
                f"{counted}, {time.perf_counter() - start:.1f} s: {verdict}",
                flush=True,
            )
            for line in wrong:
                print(f"  {line}")
            failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
