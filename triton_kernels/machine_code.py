"""What a compiled kernel is made of, read from its machine code: no GPU and no toolkit, only what triton ships.

NVIDIA: cuobjdump -res-usage and nvdisasm on the cubin. AMD: the assembly that LLVM printed, and its metadata.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class MachineCode:
    """``spills``: instructions that go to thread-local memory (AMD: vector registers spilled; scalar ones go to lanes
    of vector registers instead). ``tensor``: the matrix instruction within a loop, or ""; ``tensor_anywhere`` outside
    too. ``load``, ``store``: the widest global access in bits, 0 for none. ``fences``: device-wide memory fences and
    cache invalidations. ``fp64``: instructions that compute in float64. ``arithmetic``: the rate of the matrix
    instructions: "tf32", "half" or "fp32"."""

    registers: int
    stack: int
    spills: int
    static_shared: int
    tensor: str
    tensor_anywhere: str
    load: int
    store: int
    fences: int
    fp64: int
    arithmetic: str
    instructions: int
    loops: frozenset[str] = field(default=frozenset(), compare=False)


def machine_code(compiled) -> MachineCode:
    """Of a CompiledKernel, for NVIDIA or AMD."""
    if "amdgcn" in compiled.asm:
        return _amd(compiled.asm["amdgcn"])
    # the machine code of sm_100 keeps the type of a matrix product in a descriptor, PTX in the instruction's name
    tf32 = re.search(r"mma[^\n;]*tf32", compiled.asm["ptx"]) is not None
    return _nvidia(compiled.asm["cubin"], compiled.metadata.target.arch, "tf32" if tf32 else "half")


@functools.lru_cache(maxsize=4096)
def _nvidia(cubin: bytes, arch: int, arithmetic: str) -> MachineCode:
    (code,) = nvidia(cubin, arch, arithmetic).values()
    return code


def nvidia(cubin: bytes, arch: int, arithmetic: str = "half") -> dict[str, MachineCode]:
    """{mangled name: what it is made of} of every function in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        listing = tool("nvdisasm", "-c", file.name)
    # after the preamble, a name and its listing take turns
    _, *parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+).*$", listing, flags=re.MULTILINE)
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    found = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    return {name: _nvidia_kernel(texts[name], *map(int, numbers), arch, arithmetic) for name, *numbers in found}


def _nvidia_kernel(listing: str, registers: int, stack: int, shared: int, arch: int, arithmetic: str) -> MachineCode:
    # from sm_90 on the compiler itself lists the 1 KB that the driver keeps of a block's shared memory
    if arch >= 90:
        shared = max(0, shared - 1024)
    code = re.findall(
        r"^(\.L\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*);", listing, re.MULTILINE
    )
    loops = _within_loops(code, r"BRA|BRX|JMP")
    return MachineCode(
        registers=registers,
        stack=stack,
        spills=_count(code, r"LDL|STL"),
        static_shared=shared,
        tensor=_tensor(loops, r"HGMMA|UTC\w*MMA|HMMA|DMMA|IMMA|QMMA"),
        tensor_anywhere=_tensor([op for _, op, _ in code], r"HGMMA|UTC\w*MMA|HMMA|DMMA|IMMA|QMMA"),
        load=_widest(code, r"LDGSTS|LDG", r"\.(32|64|128|256)\b", bulk=r"UTMALDG|UBLKCP"),
        store=_widest(code, r"STG", r"\.(32|64|128|256)\b", bulk=r"UTMASTG"),
        fences=_count(code, r"MEMBAR(?!.*\.CTA)|CCTL|ERRBAR"),
        fp64=_count(code, r"DFMA|DADD|DMUL|DSETP"),
        arithmetic=arithmetic,
        instructions=sum(bool(op) for _, op, _ in code),
        loops=frozenset(loops),
    )


@functools.lru_cache(maxsize=4096)
def _amd(assembly: str) -> MachineCode:
    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    text = assembly.split(".amdgpu_metadata")[0]
    code = re.findall(r"^(\.L\w+):|^\t([a-z]\w+)([^\n]*)", text, re.MULTILINE)
    return MachineCode(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count"),
        static_shared=number("group_segment_fixed_size"),
        tensor=_tensor(_within_loops(code, r"s_c?branch"), r"v_mfma|v_smfma"),
        tensor_anywhere=_tensor([op for _, op, _ in code], r"v_mfma|v_smfma"),
        load=_widest(code, r"(global|buffer|flat)_load", r"dwordx?(\d?)$"),
        store=_widest(code, r"(global|buffer|flat)_store", r"dwordx?(\d?)$"),
        fences=_count(code, r"buffer_wbl2|buffer_inv"),
        fp64=_count(code, r"v_(fma|add|mul|cmp_\w+)_f64"),
        arithmetic="tf32" if "xf32" in text else "half" if re.search(r"v_mfma\w+_b?f16", text) else "fp32",
        instructions=sum(op.startswith(("v_", "s_", "global_", "buffer_", "flat_", "ds_")) for _, op, _ in code),
    )


def tool(name: str, *arguments: str, folder: str | None = None) -> str:
    """What cuobjdump or nvdisasm prints; run in ``folder``."""
    out = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, cwd=folder)
    if out.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed: {out.stderr.strip()}")
    return out.stdout


def _count(code, pattern: str) -> int:
    return sum(re.match(pattern, op) is not None for _, op, _ in code)


def _within_loops(code, branch: str) -> list[str]:
    """The instructions between a label and a branch back to it."""
    labels = {label: i for i, (label, _, _) in enumerate(code) if label}
    inside = [False] * len(code)
    for i, (_, op, operands) in enumerate(code):
        if op and re.match(branch, op) and (goal := re.search(r"\.L\w+", operands)):
            start = labels.get(goal[0], i)
            inside[start:i] = [True] * max(0, i - start)
    return [op for (_, op, _), here in zip(code, inside, strict=True) if here and op]


def _tensor(ops: list[str], pattern: str) -> str:
    """The matrix instruction with the longest name: "HGMMA.64x128x16.F32.BF16", "v_mfma_f32_32x32x8_bf16_1k"."""
    return max((op for op in ops if re.match(pattern, op)), key=len, default="")


def _widest(code, access: str, width: str, bulk: str = "$^") -> int:
    """Bits; an access without a width moves 32 of them (or fewer), the tensor memory accelerator whole tiles: 128."""
    widest = 0
    for _, op, _ in code:
        if not op:
            continue
        if re.match(bulk, op):
            widest = max(widest, 128)
        elif re.match(access, op):
            found = re.search(width, op)
            bits = 32 if not found else int(found[1] or 1) * (32 if "dword" in op else 1)
            widest = max(widest, bits)
    return widest
