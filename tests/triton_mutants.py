"""The real kernels with one fault each: source changed in a copy of the package, run under the checking layer.

    python tests/triton_mutants.py [WORD ...]      all mutants, or those whose name contains a word

Exit code 1 if a fault passes unnoticed.
"""

import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import triton_check

# isort: split
import torch

from vqkernels import registry, verify

KERNELS = Path(__file__).parents[1] / "triton_kernels"
F32, BF16 = torch.float32, torch.bfloat16

# name: file, what stands there (a regular expression), what replaces it, the operator, dtype and cases that run
MUTANTS = {
    "usage: no mask on the load": (
        "codebook_usage", r"tl\.load\(indices \+ n, mask=n < N, other=-1\)", "tl.load(indices + n)",
        "codebook_usage", torch.int64, ("S3 N777 K10",)),
    "usage: plain read-modify-write": (
        "codebook_usage", r"tl\.atomic_add\(counts \+ k, bins\.to\(tl\.int64\), mask=(.*), sem=.*\)",
        r"tl.store(counts + k, tl.load(counts + k, mask=k < K) + bins, mask=k < K)",
        "codebook_usage", torch.int64, ("one code only", "S3 N777 K10", "S1 N1000 K256", "S2 N20000 K40")),
    "usage: default semantics": (
        "codebook_usage", r', sem="relaxed"', "", "codebook_usage", torch.int64, ("S3 N777 K10",)),
    "usage: negative codes are counted": (
        "codebook_usage", r"valid = \(k >= 0\) & ", "valid = ", "codebook_usage", torch.int64, ("S2 N500 K5000",)),
    "sums: no mask on the load": (
        "codeword_sums", r"mask=inside, other=0\.0\)\.to", "mask=(d < D)[None, :], other=0.0).to", "codeword_sums", F32, ("H3 N200 K10 D17",)),
    "sums: pieces overlap by a row": (
        "codeword_sums", r"end = tl\.minimum\(begin \+ PIECE, last\)", "end = tl.minimum(begin + PIECE + 1, last)",
        "codeword_sums", F32, ("one codeword",)),
    "sums: every piece stores": (
        "codeword_sums", r"    if whole:\n", "    if begin >= 0:\n", "codeword_sums", F32, ("one codeword",)),
    "sums: the last columns are left out": (
        "codeword_sums", r"total\.to\(sums\.dtype\.element_ty\), mask=d < D\)", "total.to(sums.dtype.element_ty), mask=d < D - 1)",
        "codeword_sums", F32, ("H3 N200 K10 D17",)),
    "rotation: R for its transpose": (
        "rotation_trick", r"\(1 \+ SIGN\) \* qg - along\) / nz, -SIGN \* gamma \* along / nq",
        "-along) / nz, gamma * ((1 + SIGN) * zg - along) / nq", "rotation_trick_backward", F32, ("N37 D33 estimator1",)),
    "rotation: reflection for rotation": (
        "rotation_trick", r"sign = 1 if estimator == ROTATION else -1", "sign = -1", "rotation_trick_backward", F32, ("N37 D33 estimator1",)),
    "rotation: no mask on the rows": (
        "rotation_trick", r"inside = \(rows\[:, None\] < N\) & ", "inside = ", "rotation_trick_backward", F32, ("N37 D33 estimator1",)),
    "rotation: tiles a row apart": (
        "rotation_trick", r"tl\.program_id\(0\)\.to\(tl\.int64\) \* ROWS", "tl.program_id(0).to(tl.int64) * (ROWS - 1)",
        "rotation_trick_backward", F32, ("N100 D64 estimator1",)),
    "fsq: thresholds are passed from above": (
        "fsq", r"passed = x >= threshold", "passed = x > threshold", "fsq", F32, ("on a threshold",)),
    "fsq: one step too few": (
        "fsq", r"\(max\(few\) - 1\)\.bit_length\(\)", "(max(few) - 1).bit_length() - 1", "fsq", BF16, ("levels [8, 5, 5, 5]",)),
    "fsq: approximate division": (
        "fsq", r"tl\.div_rn\((.*?), (width.*?)\)\n", r"\1 / \2\n", "fsq", F32, ("levels [7, 4]", "levels [17, 3]")),
    "fsq backward: even levels lose their shift": (
        "fsq", r"tl\.abs\(x \+ tl\.load\(shifts \+ j\)\[None, :\]\)", "tl.abs(x)", "fsq_backward", F32, ("levels [8, 5, 5, 5]",)),
    "trie: tokens of the wrong node": (
        "trie_topk", r"tl\.load\(row_offsets \+ node \+ 1, mask=live, other=0\)", "first + 2", "trie_topk", F32, ("k20",)),
    "trie: ties to the last": (
        "trie_topk", r"0xFFFFFFFF - place\)", "place)", "trie_topk", F32, ("ties",)),
    "search: ties to the higher index": (
        "nearest_codeword", r"\(value == lowest\[:, None\]\), codes\[None, :\], _NO_CODE\), 1\)",
        "(value == lowest[:, None]), -codes[None, :], 0), 1) * -1", "nearest_codeword", F32, ("ties",)),
    "search: no mask on the codewords of a scan": (
        "search", r"tl\.load\(codebook \+ codes \* D \+ d, mask=code_valid, other=0\.0\)", "tl.load(codebook + codes * D + d)",
        "nearest_codeword", F32, ("N13 K17 D33",)),
    "search: the canonical sum is fused": (
        "nearest_codeword", r"enable_fp_fusion=False", "enable_fp_fusion=True", "nearest_codeword", torch.float64,
        ("N13 K17 D33",)),
    "search: no error bound": (
        "search", r"return \(lost \+ rounded \+ canonical \+ subnormal\)", "return 0 * (lost + rounded + canonical + subnormal)",
        "nearest_codeword", F32, ("near ties",)),
    "search: what rounding takes away is forgotten": (
        "search", r"lost = ratio \* \(z_error", "lost = 0 * ratio * (z_error", "nearest_codeword", F32, ("near ties",)),
    "search: the second best is the last seen": (
        "nearest_codeword", r"second = tl\.minimum\(second, tl\.maximum\(best, scores\)\)", "second = tl.maximum(best, scores)",
        "nearest_codeword", F32, ("near ties",)),
    "search: a tile of codewords is left out": (
        "nearest_codeword", r"range\(PADDED_K // CODES\)", "range(1, PADDED_K // CODES)", "nearest_codeword", F32, ("near ties",)),
    "search: lists collide": (
        "nearest_codeword", r"tl\.cumsum\(listing, 0\) - 1", "tl.cumsum(listing, 0)", "nearest_codeword", F32, ("near ties",)),
    "search: the list's counter is not atomic": (
        "nearest_codeword", r"first = tl\.atomic_add\(counts \+ h, tl\.sum\(listing, 0\), sem=\"relaxed\"\)",
        "first = tl.load(counts + h)\n    tl.store(counts + h, first + tl.sum(listing, 0))", "nearest_codeword", F32, ("near ties",)),
    "residual: subtracts the wrong codeword": (
        "residual_quantize", r"tl\.load\(codebooks \+ \(book \* K \+ index\)", "tl.load(codebooks + (book * K + index * 0)",
        "residual_quantize", F32, ("N1 K1 D1", "strided")),
    "residual: no barrier before the rows are read": (
        "residual_quantize", r"tl\.debug_barrier\(\)  # what the rows", "pass  # what the rows", "residual_quantize", F32, ("strided",)),
    "residual: one level only": (
        "residual_quantize", r"for level in range\(1, Q\):", "for level in range(2, Q):", "residual_quantize", F32, ("strided",)),
    "residual: masked rows are quantized": (
        "residual_quantize", r"wanted = inside & \(tl\.load\(mask \+ rows, mask=inside, other=0\) != 0\)", "wanted = inside",
        "residual_quantize", F32, ("mask",)),
    "residual backward: commitment of one level less": (
        "residual_quantize", r"total \+= tl\.load\(scales \+ level\) \* residual", "total += tl.load(scales + level) * quantized",
        "residual_quantize_backward", F32, ("strided",)),
}  # fmt: skip


def own_cases() -> dict:
    """What the registry's cases are too easy for."""
    g = torch.Generator().manual_seed(0)
    codebook = torch.randn(64, 24, generator=g)
    one, other = torch.randint(0, 64, (2, 160), generator=g)
    between = (codebook[one] + codebook[other]) / 2 + torch.randn(160, 24, generator=g) * 1e-6
    between[80:] = codebook[one[80:]] + torch.randn(80, 24, generator=g) * 1e-2  # beside one codeword and its double
    # a lane sees codewords 64 apart: the best, one nearly as good, and two that are far
    near = torch.cat([codebook, codebook * (1 + 1e-6), 3 * codebook, 4 * codebook])
    threshold = torch.atanh(torch.tensor([-0.5 / (2 * 1.001 / 2), 0.5 / (2 * 1.001 / 2)], dtype=torch.float64)).float()
    threshold = torch.cat(
        [threshold, torch.nextafter(threshold, torch.tensor(9.0)), torch.nextafter(threshold, torch.tensor(-9.0))]
    )
    return {
        "near ties": lambda dtype: (between[None].to(dtype), near[None].to(dtype), None, 0, True),
        "one codeword": lambda dtype: (torch.randn(1, 700, 5, generator=g).to(dtype), torch.full((1, 700), 2), 4),
        "S2 N500 K5000": lambda dtype: (torch.randint(-1, 5000, (2, 500), generator=g), 5000),
        "S2 N20000 K40": lambda dtype: (torch.randint(0, 40, (2, 20000), generator=g), 40),
        "on a threshold": lambda dtype: (threshold[:, None].to(dtype), [3]),
    }


OWN = own_cases()


def faults(name: str, run) -> str:
    """What the checks say about a launcher on the mutant's cases; empty if nothing."""
    *_, op, dtype, labels = MUTANTS[name]
    spec = registry.SPECS[op]
    known = dict(verify.cases(spec, dtype))
    for label in labels:
        args = known[label] if label in known else OWN[label](dtype)
        checked = SimpleNamespace(triton=lambda *a: triton_check.in_any_order(lambda: run(*a), (1,)))
        try:
            detail, _ = verify.compare(SimpleNamespace(**vars(spec) | {"op": checked}), "triton", args)
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
        if detail:
            return f"{label}: {detail}"
    return ""


def launcher(package: str, op: str):
    """Where it matters, a program sees several tiles of codewords, as it does on large inputs."""
    importlib.import_module(f"{package}.nearest_codeword").MIN_PROGRAMS = 1
    return importlib.import_module(package).launcher(op)


def copy(folder: Path, number: int):
    """A copy of the kernels, importable as its own package."""
    path = folder / f"mutant_{number}"
    shutil.copytree(KERNELS, path, ignore=shutil.ignore_patterns("__pycache__"))
    return path


def main(words: list[str]) -> int:
    chosen = [name for name in MUTANTS if not words or any(word in name for word in words)]
    sound, survivors = {}, 0
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        sys.path.insert(0, name_of_folder)
        for number, name in enumerate(chosen):
            file, pattern, replacement, op, dtype, labels = MUTANTS[name]
            if (key := (op, dtype, labels)) not in sound:
                sound[key] = faults(name, launcher("vqkernels.triton_kernels", op))
                if sound[key]:
                    sys.exit(f"triton_mutants: the unchanged {op} fails: {sound[key]}")
            path = copy(folder, number) / f"{file}.py"
            source = path.read_text()
            mutant, found = re.subn(pattern, replacement, source)
            if not found:
                sys.exit(
                    f"triton_mutants: {name!r} no longer finds its place in {file}.py; update tests/triton_mutants.py"
                )
            path.write_text(mutant)
            said = faults(name, launcher(f"mutant_{number}", op))
            survivors += not said
            print(f"triton mutant {'found' if said else 'SURVIVED'} | {name} | {said[:240]}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
