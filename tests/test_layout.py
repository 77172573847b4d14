"""The floors of the package: imports go down only, and the NumPy module stands without torch."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# a module may import its own floor and everything below; data stands on the ground, usable by all
FLOORS = [
    {"reference", "_ops"},
    {"registry", "triton_kernels", "samples"},
    {"dispatch"},
    {"ops", "verify", "info", "cuda_report"},
    {"layers", "compat"},
    {"models"},
    {"semantic_ids"},
    {"recommend", "images", "bench"},
    {"cli"},
]
GROUND = {"data", "pages", "numpy", "_native", "__version__"}


def floor_of(part: str) -> int | None:
    return next((i for i, floor in enumerate(FLOORS) if part in floor), None)


def imported_parts(path: Path, package: list[str]):
    """The first component below vqkernels of everything a file imports from vqkernels."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                full = base + (node.module.split(".") if node.module else [])
            elif node.module and node.module.split(".")[0] == "vqkernels":
                full = node.module.split(".")
            else:
                continue
            names = [full[1]] if len(full) > 1 else [alias.name for alias in node.names]
            yield from ((name, node.lineno) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((a.name.split(".")[1], node.lineno) for a in node.names if a.name.startswith("vqkernels."))


def test_imports_go_down():
    wrong = []
    for folder, root in (("vqkernels", ROOT / "vqkernels"), ("vqkernels.triton_kernels", ROOT / "triton_kernels")):
        for path in root.rglob("*.py"):
            parts = folder.split(".") + list(path.relative_to(root).with_suffix("").parts)
            if len(parts) < 2 or parts[1] == "__init__" or "triton_kernels" in path.relative_to(root).parts:
                continue
            package, own = parts[:-1], parts[1]
            for name, line in imported_parts(path, package):
                if name in GROUND or name == own:
                    continue
                mine, theirs = floor_of(own), floor_of(name)
                if own in GROUND or mine is None or theirs is None or theirs > mine:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} ({own}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_numpy_module_does_not_import_torch():
    code = "import sys, vqkernels.numpy; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_stay_short():
    sources = [
        p
        for pattern in ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
        for top in ("vqkernels", "csrc", "triton_kernels", "tests", "bench")
        for p in (ROOT / top).rglob(pattern)
    ]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_public_names():
    import vqkernels as vq

    for name in vq.__all__:
        assert getattr(vq, name) is not None, name
    for name in (
        "nearest_codeword",
        "vector_quantize",
        "residual_quantize",
        "rotation_trick",
        "codebook_usage",
        "codeword_sums",
        "fsq",
        "kmeans",
    ):
        assert getattr(vq, name).__doc__, name
