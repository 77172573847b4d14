"""Builds the two extension modules of vqkernels with ninja.

    vqkernels/_C.abi3.so    PyTorch operators on LibTorch's stable ABI: csrc/bindings, csrc/cpu, csrc/cuda
    vqkernels/_native*.so   the same CPU kernels on NumPy arrays (pybind11):  csrc/bindings/native.cpp, csrc/cpu

The kernels are compiled once and linked into both. Environment:

    CXX        C++ compiler (default: g++, else c++). Without one the package installs as pure Python and says so
    VQK_CUDA   auto (default): CUDA kernels when nvcc is found; 0: never; 1: fail without nvcc
    VQK_ARCHS  CUDA architectures, default "8.0;9.0;10.0;12.0+PTX"
    CUDA_HOME  where the CUDA toolkit is, when nvcc is not on PATH
    MAX_JOBS   parallel compilations; default from cores and memory
    VQK_STRICT 1: the compilers' warnings are errors, those of ptxas about spills and local memory too. For tests: a
               compiler of another version may find something new to say

What was built, and why something was not, is recorded in vqkernels/_build_info.json.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
INFO = ROOT / "vqkernels" / "_build_info.json"
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"

CXX_FLAGS = "-O3 -std=c++20 -fPIC -ffp-contract=off -fno-math-errno -fvisibility=hidden -Wall -Wextra".split()
# Vectors wider than a level's registers never cross files; GCC 12 and 13 misjudge their own AVX-512 headers.
CXX_FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]  # torch 2.10, Python 3.10
NVCC_FLAGS = [
    *"-O3 -std=c++17 --expt-relaxed-constexpr -lineinfo".split(),  # profilers and sanitizers then name source lines
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage",
]
STRICT_CXX, STRICT_NVCC = ["-Werror"], ["-Werror=all-warnings", "-Xptxas=--warning-as-error"]


def find_compiler(env):
    """(command, None), or (None, why there is no C++ compiler)."""
    if sys.platform != "linux":
        return None, f"the C++ kernels are built on Linux only, this is {sys.platform}"
    if env.get("CXX"):
        command = shlex.split(env["CXX"])
        if shutil.which(command[0], path=env.get("PATH")):
            return command, None
        return None, f"CXX={env['CXX']} is not an executable; unset CXX or set it to a C++20 compiler (g++ 10 or newer)"
    for name in ("g++", "c++"):
        if shutil.which(name, path=env.get("PATH")):
            return [name], None
    return None, "no C++ compiler (g++ or c++) was found on PATH; install g++ 10 or newer, or set CXX"


def find_nvcc(env):
    """(path of nvcc or None, why there are no CUDA kernels or None). VQK_CUDA=1 without nvcc is an error."""
    mode = env.get("VQK_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"vqkernels: VQK_CUDA={mode!r} is not one of auto, 0, 1 (auto builds CUDA when nvcc is found)")
    if mode == "0":
        return None, "switched off by VQK_CUDA=0"
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else env.get("PATH"))
    if nvcc:
        return nvcc, None
    where = f"under CUDA_HOME={home}" if home else "on PATH, and CUDA_HOME is not set"
    if mode == "1":
        raise SystemExit(
            f"vqkernels: VQK_CUDA=1 asks for the CUDA kernels, but nvcc was not found {where}.\n"
            "Install the CUDA toolkit (12.1 or newer), or set CUDA_HOME to where it is, or drop VQK_CUDA=1."
        )
    return None, f"nvcc was not found {where}"


def arch_flags(archs, supported):
    """VQK_ARCHS as (-gencode flags, architectures). `supported`: compute capabilities nvcc knows, e.g. {"80", "90"}."""
    explicit = archs is not None
    flags, used = [], []
    for arch in re.split(r"[;,\s]+", (archs if explicit else DEFAULT_ARCHS).strip()):
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", arch)
        if not match:
            raise SystemExit(
                f"vqkernels: VQK_ARCHS={archs!r}: {arch!r} is no CUDA architecture; expected compute capabilities "
                f'separated by ";", each with +PTX or without, for example "{DEFAULT_ARCHS}"'
            )
        number = match[1] + match[2]
        if number not in supported:
            if explicit:
                known = ", ".join(f"{c[:-1]}.{c[-1]}" for c in sorted(supported, key=int))
                raise SystemExit(f"vqkernels: VQK_ARCHS={archs!r}: this nvcc does not know {arch}; it knows {known}")
            continue
        target = number + match[3]
        flags.append(f"-gencode=arch=compute_{target},code=sm_{target}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{target},code=compute_{target}")
        used.append(arch)
    return flags, used


def default_jobs(with_cuda, cores, memory_bytes):
    """As many compilations as there are cores, but 2 GB of memory for each nvcc and 1 GB for each g++."""
    return max(1, min(cores, memory_bytes // ((2 if with_cuda else 1) << 30)))


# SIMD levels that an old assembler (as of g++ 10) may not know: an instruction, the first GNU binutils with it.
NEW_LEVELS = {"avxvnni": ("{vex} vpdpbusd %ymm0, %ymm1, %ymm2", "2.36"), "amx": ("tdpbusd %tmm0, %tmm1, %tmm2", "2.35")}


def assembles(cxx, instruction):
    command = [*cxx, "-x", "c++", "-c", "-", "-o", os.devnull]
    source = f'asm("{instruction}");\n'
    return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0


def run_output(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def make_plan(env):
    """What will be built on this machine, and why not the rest: the contents of _build_info.json, and the commands."""
    info = {"cpu": False, "cpu_reason": None, "cuda": False, "cuda_reason": None, "cuda_archs": []}
    strict = env.get("VQK_STRICT") == "1"
    tools = {"cxx": None, "nvcc": None, "gencode": []}
    tools |= {"cxx_flags": CXX_FLAGS + STRICT_CXX * strict, "nvcc_flags": NVCC_FLAGS + STRICT_NVCC * strict}
    nvcc, info["cuda_reason"] = find_nvcc(env)
    cxx, info["cpu_reason"] = find_compiler(env)
    if cxx is None:
        if env.get("VQK_CUDA") == "1":
            raise SystemExit(f"vqkernels: VQK_CUDA=1 asks for the CUDA kernels, but {info['cpu_reason']}")
        info["cuda_reason"] = info["cpu_reason"]
        return info, tools
    tools["cxx"] = cxx
    info |= {"cpu": True, "compiler": run_output(*cxx, "--version").split("\n")[0]}
    info["simd"] = ["portable"]
    if os.uname().machine == "x86_64":
        info["simd"] += ["avx2", "avxvnni", "avx512", "vnni", "amx"]
        reasons = []
        for level, (instruction, binutils) in NEW_LEVELS.items():
            if not assembles(cxx, instruction):
                info["simd"].remove(level)
                reasons.append(f"{level} is left out: the assembler does not know it; it takes GNU binutils {binutils}")
                tools["cxx_flags"] += [f"-DVQK_NO_{level.upper()}"]
        if reasons:
            info["simd_reason"] = "; ".join(reasons)
    info["flags"] = " ".join(tools["cxx_flags"])
    if nvcc:
        known = {code.removeprefix("sm_") for code in run_output(nvcc, "--list-gpu-code").split()}
        tools["nvcc"], (tools["gencode"], info["cuda_archs"]) = nvcc, arch_flags(env.get("VQK_ARCHS"), known)
        info |= {"cuda": True, "nvcc": run_output(nvcc, "--version").split("\n")[-2]}
        info["nvcc_flags"] = " ".join(tools["nvcc_flags"])
    return info, tools


def summary(info):
    """The one line that says what is built and what is not."""
    if not info["cpu"]:
        return f"vqkernels: pure Python install, only the reference and Triton backends: {info['cpu_reason']}"
    cuda = f"CUDA ({' '.join(info['cuda_archs'])})" if info["cuda"] else f"no CUDA ({info['cuda_reason']})"
    return f"vqkernels: built for CPU ({', '.join(info['simd'])}) and {cuda}"


def package_folder(name, why):
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"vqkernels: building {why} needs {name}; pip install {name}, or drop --no-build-isolation")
    return Path(spec.origin).parent


def ninja_file(tools, outputs):
    """build.ninja: one object per kernel, shared by both modules. `outputs`: paths of the two .so files."""
    cuda = bool(tools["nvcc"])
    torch = package_folder("torch", "vqkernels._C")
    pybind = package_folder("pybind11", "vqkernels._native") / "include"
    import sysconfig

    include = ["-I", str(ROOT / "csrc/include")]
    torch_flags = [*STABLE_ABI, "-isystem", str(torch / "include"), *["-DVQK_WITH_CUDA"] * cuda]
    native_flags = ["-isystem", str(pybind), "-isystem", sysconfig.get_paths()["include"]]
    # no rpath: the library is loaded after torch, whose libtorch_cpu is then already there
    torch_link = ["-L" + str(torch / "lib"), "-Wl,-z,defs", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]

    def quote(words):
        return shlex.join(words).replace("$", "$$")

    def path(p):
        return str(p).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    cxx, link = tools["cxx"], [*tools["cxx"], "-shared", "-Wl,--exclude-libs,ALL"]
    flags = quote(tools["cxx_flags"] + include)
    lines = [
        f"rule cxx\n  command = {quote(cxx)} -MMD -MF $out.d {flags} $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $out",
        f"rule link\n  command = {quote(link)} $in -o $out $flags\n  description = link $out",
    ]
    if cuda:
        host = next(filter(None, map(shutil.which, reversed(cxx))))  # the compiler itself in "ccache g++"
        nvcc = [tools["nvcc"], "-ccbin", host]
        compile_cuda = quote(nvcc + tools["nvcc_flags"] + tools["gencode"] + include)
        link_cuda = quote([*nvcc, "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"])
        lines += [
            f"rule nvcc\n  command = {compile_cuda} -MMD -MF $out.d -c $in -o $out && times > $out.times",
            "  depfile = $out.d\n  deps = gcc\n  description = nvcc $out",
            f"rule link_cuda\n  command = {link_cuda} $in -o $out $flags\n  description = link $out",
        ]
        torch_link = [flag.replace("-Wl,", "-Xlinker=") for flag in torch_link]

    def objects(pattern, rule="cxx", flags=(), skip=()):
        result = []
        for source in sorted(ROOT.glob(pattern)):
            if source.name in skip:
                continue
            result.append(f"{source.parent.name}/{source.name}.o")
            lines.append(f"build {result[-1]}: {rule} {path(source)}\n  flags = {quote(flags)}")
        return result

    kernels = objects("csrc/cpu/*.cpp")
    ops = objects("csrc/bindings/*.cpp", flags=torch_flags, skip={"native.cpp"})
    native = objects("csrc/bindings/native.cpp", flags=native_flags)
    if cuda:
        ops += objects("csrc/cuda/*.cu", rule="nvcc")
    rule = "link_cuda" if cuda else "link"
    lines.append(f"build {path(outputs[0])}: {rule} {' '.join(kernels + ops)}\n  flags = {quote(torch_link)}")
    lines.append(f"build {path(outputs[1])}: link {' '.join(kernels + native)}\n  flags = -pthread")
    return "\n".join(lines) + "\n"


class BuildPy(build_py):
    def run(self):
        if not PLAN["cpu"]:
            for stale in [*ROOT.glob("vqkernels/_C*.so"), *ROOT.glob("vqkernels/_native*.so")]:
                stale.unlink()
        write_info(self.distribution.get_version())
        super().run()


class BuildExt(build_ext):
    """Hands everything to ninja; setuptools only chooses the output paths."""

    def build_extensions(self):
        print(summary(PLAN), file=sys.stderr, flush=True)
        folder = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        names = [Path(self.get_ext_filename(extension.name)).name for extension in self.extensions]
        content = ninja_file(TOOLS, names)
        (folder / "build.ninja").write_text(content)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = os.environ.get("MAX_JOBS") or default_jobs(PLAN["cuda"], len(os.sched_getaffinity(0)), memory)
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        if subprocess.run([*ninja, "-C", str(folder), "-j", str(jobs)]).returncode != 0:
            raise SystemExit("vqkernels: compiling the kernels failed, see the compiler's message above")
        for extension, name in zip(self.extensions, names, strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target)
        PLAN["cuda_seconds"] = compile_seconds(folder)
        write_info(self.distribution.get_version())


def compile_seconds(folder):
    """{op: seconds of one core that nvcc took for its file, for all architectures}, from what the shell noted."""
    return {
        path.name.split(".")[0]: round(sum(60 * int(m) + float(s) for m, s in re.findall(r"(\d+)m([\d.]+)s", text)), 1)
        for path in sorted(folder.glob("cuda/*.times"))
        for text in [path.read_text()]
    }


def write_info(version):
    INFO.write_text(json.dumps({"version": version, "summary": summary(PLAN), **PLAN}, indent=2) + "\n")


if __name__ == "__main__":
    PLAN, TOOLS = make_plan(os.environ)
    if not PLAN["cpu"]:
        print(summary(PLAN), file=sys.stderr, flush=True)
    setup(
        ext_modules=[Extension("vqkernels._C", [], py_limited_api=True), Extension("vqkernels._native", [])]
        if PLAN["cpu"]
        else [],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    )
