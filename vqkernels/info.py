"""What is installed, what was built, what can run here."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from . import __version__, _ops
from .registry import AVAILABLE

SIMD = ("portable", "avx2", "avxvnni", "avx512", "vnni", "amx")


def processor() -> str:
    """The processor's model name, as the operating system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def simd_level() -> str:
    """The SIMD level that the CPU kernels use, or why there are none."""
    reason = AVAILABLE["nearest_codeword"]["cpu"]
    return SIMD[torch.ops.vqkernels.simd_level(-1)] if reason is True else f"none ({reason})"


def simd_levels() -> list[str]:
    """The SIMD levels that this build runs on this processor, the default one last; [] without CPU kernels."""
    if AVAILABLE["nearest_codeword"]["cpu"] is not True:
        return []
    level = torch.ops.vqkernels.simd_level
    before, found = level(-1), []
    for i, name in enumerate(SIMD):
        try:
            level(i)
        except RuntimeError:  # it says that the processor does not run this one
            continue
        found.append(name)
    level(before)
    return found


def machine() -> dict[str, str | int]:
    """Everything a published number must name."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "simd": simd_level(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "vqkernels": __version__,
    }


def build() -> dict:
    return _ops.build_info()
