"""The build: what setup.py decides and says, and what the binaries ask for."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vqkernels import info

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vqkernels"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("vqkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(tmp_path):
    """Makes a folder with fake executables; nothing else is on the PATH returned."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.write_text("#!/bin/sh\n")
            path.chmod(0o755)
        return str(tmp_path)

    return make


def binary(pattern):
    found = list(PACKAGE.glob(pattern))
    assert found, f"{pattern} was not built: {json.loads((PACKAGE / '_build_info.json').read_text())['cpu_reason']}"
    return found[0]


def test_torch_library_is_stable_abi():
    # the symbols of C++ classes change with every torch; the stable ABI is C
    symbols = subprocess.run(["nm", "-D", "--undefined-only", binary("_C*.so")], capture_output=True, text=True).stdout
    assert "torch_library_impl" in symbols
    unstable = re.findall(r"\S*_ZNK?(?:2at|3c10|5torch)\S*", symbols)
    assert not unstable


def test_torch_library_needs_only_libtorch_cpu():
    out = subprocess.run(["readelf", "-d", binary("_C*.so")], capture_output=True, text=True).stdout
    needed = {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", out)}
    system = {
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libdl",
        "librt",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert needed - system == {"libtorch_cpu"}
    assert "RUNPATH" not in out and "RPATH" not in out


def test_the_stream_is_looked_up_not_linked():
    # libtorch_cuda has the function, a torch without CUDA does not and must load the library all the same
    name, library = "aoti_torch_get_current_cuda_stream", binary("_C*.so")
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True).stdout
    cuda = json.loads((PACKAGE / "_build_info.json").read_text())["cuda"]
    assert name not in symbols and (name.encode() in library.read_bytes()) == cuda
    # Python loads torch's libraries without RTLD_GLOBAL, so the default scope does not have it either
    assert (b"libtorch_cuda.so" in library.read_bytes()) == cuda


def test_native_module_knows_no_torch():
    out = subprocess.run(["readelf", "-d", binary("_native*.so")], capture_output=True, text=True).stdout
    assert "torch" not in out and "c10" not in out


def test_build_info_says_what_was_built():
    info = json.loads((PACKAGE / "_build_info.json").read_text())
    assert info["cpu"] and info["version"] == "0.1.0"
    assert "-ffp-contract=off" in info["flags"] and "march=native" not in info["flags"]
    assert info["cuda"] == (info["cuda_reason"] is None) == bool(info["cuda_archs"])


def test_cuda_kernels_are_registered_when_built():
    import torch

    import vqkernels.registry

    info = json.loads((PACKAGE / "_build_info.json").read_text())
    for op in ("codebook_usage", "rotation_trick_backward"):
        assert vqkernels.registry.SPECS[op]
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vqkernels::{op}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vqkernels::{op}", "CUDA") == info["cuda"]


def test_compile_time_of_each_cuda_file():
    info = json.loads((PACKAGE / "_build_info.json").read_text())
    seconds = info.get("cuda_seconds", {})
    assert set(seconds) == ({path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} if info["cuda"] else set())
    slow = {op: s for op, s in seconds.items() if s > 60}
    assert not slow, f"nvcc takes more than 60 seconds of one core for {slow}: fewer template instances, or two files"


def test_strict_turns_warnings_into_errors(build, tmp_path):
    for strict in ("0", "1"):
        info, tools = build.make_plan(os.environ | {"VQK_STRICT": strict})
        (tmp_path / "build.ninja").write_text(build.ninja_file(tools, ["_C.so", "_native.so"]))
        rules = re.findall(r"^  command = (.*-c \$in.*)$", (tmp_path / "build.ninja").read_text(), re.M)
        assert len(rules) == 1 + info["cuda"] and all(("-Werror" in rule) == (strict == "1") for rule in rules)
        assert ("--warning-as-error" in rules[-1]) == (strict == "1" and info["cuda"])


def test_cuda_auto_without_nvcc_builds_the_rest(build, tools):
    info, tool = build.make_plan({"PATH": tools("g++")})
    assert info["cpu"] and not info["cuda"] and tool["nvcc"] is None
    assert info["cuda_reason"] == "nvcc was not found on PATH, and CUDA_HOME is not set"
    assert "no CUDA (nvcc was not found" in build.summary(info)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other processors have the portable level alone")
@pytest.mark.parametrize("level, unknown, binutils", [("avxvnni", "vex", "2.36"), ("amx", "tdpbusd", "2.35")])
def test_an_old_assembler_leaves_one_level_out(build, tmp_path, level, unknown, binutils):
    old = tmp_path / "old-g++"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *"-c -"*) ! grep -q {unknown} || {{ echo "Error: no such" >&2; exit 1; }} ;; esac\n'
    )
    old.chmod(0o755)
    built, tool = build.make_plan(os.environ | {"CXX": str(old), "VQK_CUDA": "0"})
    without = f"-DVQK_NO_{level.upper()}"
    assert built["simd"] == [name for name in info.SIMD if name != level] and without in tool["cxx_flags"]
    assert without in built["flags"] and f"{level} is left out" in built["simd_reason"]
    assert f"binutils {binutils}" in built["simd_reason"]
    sources = [ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("simd", "nearest_codeword", f"nearest_codeword_{level}")]
    for flags in ([], [without]):
        command = ["g++", "-std=c++20", "-S", "-o", "-", *flags, "-I", ROOT / "csrc/include"]
        text = "".join(
            subprocess.run([*command, s], capture_output=True, text=True, check=True).stdout for s in sources
        )
        assert (f"{level}_kernel" in text and unknown in text) == (not flags)
        assert f"{level}_kernel" in text or flags


def test_cuda_1_without_nvcc_fails_and_says_what_to_do(build, tools):
    with pytest.raises(SystemExit, match=r"VQK_CUDA=1 .* nvcc was not found .*\n.*Install the CUDA toolkit"):
        build.make_plan({"PATH": tools("g++"), "VQK_CUDA": "1"})
    with pytest.raises(SystemExit, match="under CUDA_HOME=/nowhere"):
        build.make_plan({"PATH": tools("g++"), "VQK_CUDA": "1", "CUDA_HOME": "/nowhere"})


def test_cuda_0_builds_no_cuda(build, tools):
    info, _ = build.make_plan({"PATH": tools("g++", "nvcc"), "VQK_CUDA": "0"})
    assert info["cuda_reason"] == "switched off by VQK_CUDA=0"


def test_unknown_cuda_mode(build):
    with pytest.raises(SystemExit, match="VQK_CUDA='yes' is not one of auto, 0, 1"):
        build.make_plan({"PATH": os.environ["PATH"], "VQK_CUDA": "yes"})


def test_archs(build):
    known = {"75", "80", "90", "100", "120"}
    flags, used = build.arch_flags("8.0;9.0+PTX", known)
    assert used == ["8.0", "9.0+PTX"]
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert build.arch_flags(None, known)[1] == ["8.0", "9.0", "10.0", "12.0+PTX"]
    # an older nvcc drops what it cannot do from the default, but refuses what was asked for
    assert build.arch_flags(None, {"80", "90"})[1] == ["8.0", "9.0"]
    with pytest.raises(SystemExit, match=r"this nvcc does not know 10\.0; it knows 8\.0, 9\.0"):
        build.arch_flags("10.0", {"80", "90"})
    for bad in ("sm_90", "9", "9.0+ptx", ""):
        with pytest.raises(SystemExit, match="is no CUDA architecture; expected"):
            build.arch_flags(bad, known)


def test_without_compiler_the_install_is_pure_python(build, tools):
    info, tool = build.make_plan({"PATH": tools()})
    assert not info["cpu"] and not info["cuda"] and tool["cxx"] is None
    assert info["cpu_reason"].startswith("no C++ compiler (g++ or c++) was found on PATH; install g++")
    assert build.summary(info).startswith(
        "vqkernels: pure Python install, only the reference and Triton backends: no C++"
    )
    info, _ = build.make_plan({"PATH": os.environ["PATH"], "CXX": "/nonexistent"})
    assert info["cpu_reason"].startswith("CXX=/nonexistent is not an executable; unset CXX")
    with pytest.raises(SystemExit, match=r"VQK_CUDA=1 .* no C\+\+ compiler"):
        build.make_plan({"PATH": tools("nvcc"), "VQK_CUDA": "1"})


def test_jobs_fit_into_memory(build):
    assert build.default_jobs(with_cuda=True, cores=64, memory_bytes=24 << 30) == 12
    assert build.default_jobs(with_cuda=False, cores=2, memory_bytes=24 << 30) == 2
    assert build.default_jobs(with_cuda=True, cores=8, memory_bytes=1 << 30) == 1


def test_every_package_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(vqkernels[\w.]*)",$', text, re.M))
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert listed == folders | {"vqkernels.triton_kernels"}


@pytest.mark.parametrize("value", ["sse9", *[name for name in info.SIMD if name not in info.simd_levels()][:1]])
def test_bad_simd_level_is_an_error_in_every_kernel(value):
    levels = info.simd_levels()
    message = f"unknown SIMD level 'sse9'; allowed: {', '.join(info.SIMD)}, auto"
    if value != "sse9":
        message = f"SIMD level {value} was asked for, but this build runs {', '.join(levels)} on this CPU"
    code = (
        "import torch, vqkernels as vq\n"
        "try: vq.nearest_codeword(torch.ones(2, 3), torch.ones(4, 3))\n"
        "except RuntimeError as e: print('torch:', e)\n"
        "import numpy as np, vqkernels.numpy as vqn\n"
        "try: vqn.nearest_codeword(np.ones((2, 3)), np.ones((4, 3)))\n"
        "except ValueError as e: print('numpy:', e)\n"
    )
    env = os.environ | {"VQK_SIMD": value}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert f"torch: nearest_codeword: VQK_SIMD: {message}" in out.stdout, out.stdout + out.stderr
    assert f"numpy: VQK_SIMD: {message}" in out.stdout


def test_simd_level_op():
    from vqkernels import registry

    level = registry._ops.ops.simd_level
    auto = len(info.SIMD)
    best = level(auto)
    assert level() == best
    assert level(0) == 0 == level(-1)
    assert level(auto) == best
    levels = info.simd_levels()
    assert levels[0] == "portable" and levels[-1] == info.SIMD[best] and level() == best
    with pytest.raises(RuntimeError, match=f"{auto + 1} is none of -1"):
        level(auto + 1)
    for missing in set(info.SIMD) - set(levels):
        with pytest.raises(RuntimeError, match=f"{missing} was asked for, but this build runs {', '.join(levels)} on"):
            level(info.SIMD.index(missing))
    assert level() == best


def test_missing_native_module_says_why(tmp_path):
    # a copy of the package without binaries, as an install without a compiler leaves it
    shutil.copytree(PACKAGE, tmp_path / "vqkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "vqkernels" / "_build_info.json").write_text(json.dumps({"cpu_reason": "no C++ compiler was found"}))
    code = (
        "import sys; sys.path.insert(0, '.'); sys.modules['vqkernels._native'] = None\n"
        "try: import vqkernels.numpy\n"
        "except ImportError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "needs the compiled kernels" in out.stdout and "no C++ compiler was found" in out.stdout
    assert "pip install --no-build-isolation -e ." in out.stdout
