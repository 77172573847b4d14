"""PTX text -> Kernel: parameters, memory symbols, labels, instructions. Knows the syntax and no instruction."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .values import PtxError, kind

_STATEMENT = re.compile(r"[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*;|[{}]")
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s](?:[^,{\[]*[^,\s{\[])?")
_VARIABLE = re.compile(r"\.(?:align\s+(\d+)\s+)?\.?(\w+)\s+([\w$%]+)((?:\[\d*\])*)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@[!]predicate op operands``; ``parts`` is op split at its dots."""

    line: int
    text: str
    negated: bool
    predicate: str | None
    op: str
    operands: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Kernel:
    """One .entry. Offsets are in bytes from the start of their own space."""

    name: str
    params: list[tuple[str, str, int]] = field(default_factory=list)  # name, type, bytes
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name or prefix -> type
    shared: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_size: int = 0
    constants: dict[str, bytes] = field(default_factory=dict)  # .global and .const of the module
    threads: int | None = None  # .reqntid

    def register_type(self, name: str) -> str | None:
        return self.registers.get(name) or self.registers.get(name.rstrip("0123456789"))


def operands_of(text: str) -> list[str]:
    """The elements of a vector operand, or the operand itself."""
    return [part.strip() for part in text.strip().strip("{}").split(",")]


def _space(text: str, word: str, symbols: dict[str, int], size: int) -> int:
    """Adds the variables that ``text`` declares in .shared or .local to ``symbols``; returns the size of the space."""
    pattern = rf"(\.extern\s+)?\.{word}\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*;"
    for extern, align, type_, name, count in re.findall(pattern, text):
        if extern:
            symbols[name] = -1  # dynamic: after the static ones
            continue
        width = kind(type_)[0]
        align = int(align or width)
        size = (size + align - 1) // align * align
        symbols[name] = size
        size += width * int(count or 1)
    return size


def _module_constants(text: str) -> dict[str, bytes]:
    pattern = (
        r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*(?:=\s*(\{[^}]*\}|[^;]*))?;"
    )
    found = {}
    for type_, name, count, value in re.findall(pattern, text):
        width = kind(type_)[0]
        numbers = [int(v, 0) % (1 << 8 * width) for v in re.findall(r"-?\w+", value)] if value else []
        data = b"".join(n.to_bytes(width, "little") for n in numbers)
        found[name] = data.ljust(width * int(count or 1), b"\0")
    return found


def parse(text: str, name: str | None = None) -> Kernel:
    """The entry whose name contains ``name``, or the first one."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", text, re.S))
    entry = next((m for m in entries if name is None or name in m[1]), None)
    if entry is None:
        raise PtxError(f"no entry {name!r}; there are: {', '.join(m[1] for m in entries)}")
    kernel = Kernel(entry[1])
    for param in filter(str.strip, (entry[2] or "").split(",")):
        type_ = re.search(r"\.([busf](?:8|16|32|64))\b", param)[1]
        label, count = re.search(r"([\w$]+)(?:\[(\d+)\])?\s*$", param.strip()).groups()
        kernel.params.append((label, type_, kind(type_)[0] * int(count or 1)))
    if threads := re.search(r"\.reqntid\s+([\d,\s]+)", entry[3]):
        kernel.threads = 1
        for part in threads[1].split(","):
            kernel.threads *= int(part)
    depth, end = 1, entry.end()
    for brace in re.finditer(r"[{}]", text[entry.end() :]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            end = entry.end() + brace.start()
            break
    outside = re.sub(r"(?s)\.(?:entry|func)\b.*?\n\}", "", text)
    _body(kernel, text[entry.end() : end], text.count("\n", 0, entry.end()) + 1)
    static = _space(outside, "shared", kernel.shared, 0)
    kernel.static_shared = (_space(text[entry.end() : end], "shared", kernel.shared, static) + 15) // 16 * 16
    for symbol, offset in kernel.shared.items():
        kernel.shared[symbol] = kernel.static_shared if offset < 0 else offset
    kernel.local_size = _space(text[entry.end() : end], "local", kernel.local, 0)
    kernel.constants = _module_constants(outside)
    return kernel


def _body(kernel: Kernel, body: str, line: int) -> None:
    body = re.sub(r"(?m)^\s*\.(loc|file|pragma|section)\b.*$", "", body)
    body = re.sub(r"(?m)(^|;)(\s*)([\w$]+):(?!:)", r"\1\2.label \3;", body)
    position = 0
    for match in _STATEMENT.finditer(body):
        statement = " ".join(match[0].rstrip(";").split())
        start = match.start() + len(match[0]) - len(match[0].lstrip())
        line += body.count("\n", position, start)
        position = start
        if not statement or statement in "{}":
            continue
        if statement.startswith(".label "):
            kernel.labels[statement[7:]] = len(kernel.instructions)
        elif statement.startswith(".reg "):
            type_, names = re.fullmatch(r"\.reg \.(\w+) (.*)", statement).groups()
            for register in names.split(","):
                kernel.registers[re.sub(r"<\d+>", "", register).strip()] = type_
        elif not statement.startswith("."):
            parts = _INSTRUCTION.fullmatch(statement)
            if not parts:
                raise PtxError(f"{kernel.name}: not an instruction: {statement}")
            operands = tuple(o.strip() for o in _OPERAND.findall(parts[4]))
            kernel.instructions.append(Instruction(line, statement, parts[1] == "!", parts[2], parts[3], operands))
    targets = {i.operands[0] for i in kernel.instructions if i.parts[0] == "bra"}
    unknown = targets - set(kernel.labels)
    kernel.labels = {label: at for label, at in kernel.labels.items() if label in targets}
    if unknown:
        raise PtxError(f"{kernel.name}: branch to a label that is not there: {', '.join(sorted(unknown))}")
