"""Writes the README's tables from the registry and from committed results, so that no figure is typed by hand."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def _note(conditions: dict) -> str:
    return f" ({conditions['peak_note']})" if "peak_note" in conditions else ""


def _clone(conditions: dict) -> str:
    if "clone_gbps" not in conditions:
        return ""
    return f" ({conditions['clone_gbps']} into new memory, as a clone and an operator of tensors copy)"


def _limit(record: dict, conditions: dict) -> str:
    """Share of the machine's limit; of a clone, too, where the result is large enough to be new memory every time."""
    share = f"{100 * record['limit']:.0f} %"
    bound_by_memory = math.isclose(record["limit"], record["gbps"] / conditions["copy_gbps"], rel_tol=1e-3)
    if "clone_gbps" in conditions and record["extra_mb"] > 32 and bound_by_memory:
        share += f", of a clone {100 * record['gbps'] / conditions['clone_gbps']:.0f} %"
    return share


def bench_table(machine: str) -> str:
    path = RESULTS / f"cpu-{machine}.json"
    data = json.loads(path.read_text())
    c = data["conditions"]
    rows: dict[tuple[str, str], dict[str, dict]] = {}
    for r in data["records"]:
        rows.setdefault((r["op"], r["shape"]), {})[r["backend"]] = r
    rows = {key: group for key, group in rows.items() if not math.isnan(group["vqkernels"]["limit"])}  # no layers
    lines = [
        f"{c['processor']}, {c['threads']} threads, {c['simd']}; measured limits {c['peak_gflops']} GFLOP/s fp32{_note(c)} and {c['copy_gbps']} GB/s copy{_clone(c)}; "
        f"torch {c['torch']}, faiss-cpu {c['faiss-cpu']}, vector-quantize-pytorch {c['vector-quantize-pytorch']}; commit {c['commit']}; "
        f"`vqkernels bench --seconds 1 --json bench/results/{path.name}` with `--op` for each. The limit is the fp32 peak for searches, copy bandwidth for the others.",
        "",
        "| operator | shape | vqkernels | of the limit | extra memory | fastest alternative | we are | vector-quantize-pytorch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (op, shape), group in rows.items():
        ours = group["vqkernels"]
        others = [r for b, r in group.items() if b != "vqkernels" and not r["error"]]
        best = min(others, key=lambda r: r["median_ms"])
        incumbent = next(
            (r for b, r in group.items() if b.startswith("vector-quantize-pytorch") and not r["error"]), None
        )
        lines.append(
            f"| {op} | {shape.replace('x', '×')} | **{ours['median_ms']:.1f} ms** | {_limit(ours, c)} | {ours['extra_mb']:.0f} MB "
            f"| {best['backend']}: {best['median_ms']:.1f} ms | {_ratio(best, ours)} | {_time_and_memory(incumbent)} |"
        )
    return "\n".join(lines)


def layers_table(machine: str) -> str:
    """Layers: their records have no limit to be held against."""
    path = RESULTS / f"layers-{machine}.json"
    data = json.loads(path.read_text())
    c = data["conditions"]
    lines = [
        f"{c['processor']}, {c['threads']} threads, {c['simd']}; torch {c['torch']}, vector-quantize-pytorch {c['vector-quantize-pytorch']}; commit "
        f"{c['commit']}; `vqkernels bench --op layers --seconds 1 --json bench/results/{path.name}`. A training step is forward, codebook update and backward; "
        "beside each time the memory beyond the inputs.",
        "",
        "| layer | input, options | vqkernels | vector-quantize-pytorch | we are |",
        "|---|---|---|---|---|",
    ]
    theirs = {(r["op"], r["shape"]): r for r in data["records"] if r["backend"] == "vector-quantize-pytorch"}
    for r in data["records"]:
        if r["backend"] == "vqkernels":
            other = theirs[r["op"], r["shape"]]
            lines.append(
                f"| {r['op']} | {r['shape']} | **{r['median_ms']:.1f} ms**, {r['extra_mb']:.0f} MB | {other['median_ms']:.1f} ms, {other['extra_mb']:.0f} MB "
                f"| {_ratio(other, r)} |"
            )
    return "\n".join(lines)


def trie_tables(machine: str) -> str:
    """Constrained decoding by catalogue and beams, then the trie itself."""
    steps, trie, said = {}, {}, {}
    for op, rows in (("trie_topk", steps), ("trie", trie)):
        data = json.loads((RESULTS / f"{op}-{machine}.json").read_text())
        c = data["conditions"]
        said[op] = (
            f"{c['processor']}, {c['threads']} thread, {c['simd']}; torch {c['torch']}; commit {c['commit']}; "
            f"`vqkernels bench --op {op} --threads 1 --seconds 0.3 --json bench/results/{op}-{machine}.json`."
        )
        for r in data["records"]:
            rows.setdefault((r["op"], r["shape"]), {})[r["backend"]] = r
    lines = [
        f"{said['trie_topk']} Milliseconds a step: log-softmax, mask, the best beams, without the model.",
        "",
        "| items, histories × beams | trie_topk | TrieLogitsProcessor and top-k | prefix_allowed_tokens_fn and top-k | trie_topk is |",
        "|---|---|---|---|---|",
    ]
    for (op, shape), group in steps.items():
        count = int(op.split(", ")[1].split()[0])
        ours, processor, theirs = (
            group[name] for name in ("vqkernels", "TrieLogitsProcessor", "transformers prefix_allowed_tokens_fn")
        )
        cells = [f"{r['median_ms'] / count:.3g}" if not r["error"] else r["error"] for r in (ours, processor, theirs)]
        ratio = _ratio(theirs, ours) if not theirs["error"] else "–"
        lines.append(f"| {shape.replace('x', '×')} | **{cells[0]}** | {cells[1]} | {cells[2]} | {ratio} |")
    lines += ["", f"{said['trie']} Beside each time the most memory it took beyond the IDs, the result included.", ""]
    lines += ["| the trie | items | vqkernels | dictionary of prefixes |", "|---|---|---|---|"]
    for (op, shape), group in trie.items():
        cells = [
            f"{r['median_ms'] / 1e3:.3g} s, {r['extra_mb']:.0f} MB" if r else "–"
            for r in (group["vqkernels"], group.get("dictionary of prefixes"))
        ]
        lines.append(f"| {op} | {shape} | **{cells[0]}** | {cells[1]} |")
    return "\n".join(lines)


def _ratio(other: dict, ours: dict) -> str:
    ratio = other["median_ms"] / ours["median_ms"]
    return f"{ratio:.1f}× {'faster' if ratio >= 1 else '(slower)'}"


def _time_and_memory(record: dict | None) -> str:
    return f"{record['median_ms']:.0f} ms, {record['extra_mb']:.0f} MB" if record else "–"


def comparison_table(name: str) -> str:
    """A comparison of semantic IDs as its own report prints it."""
    from vqkernels.recommend.compare import summary
    from vqkernels.recommend.report import COLUMNS, HEADS, LABELS, cell

    rows = summary(json.loads((RESULTS / f"{name}.json").read_text()))
    lines = ["| semantic IDs | " + " | ".join(HEADS.get(c, c) for c in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    lines += [f"| {LABELS[r['method']]} | " + " | ".join(cell(r, c) for c in COLUMNS) + " |" for r in rows]
    return "\n".join(lines)


def ops_table() -> str:
    from vqkernels.registry import BACKENDS, SPECS

    lines = ["| operator | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    for name, spec in SPECS.items():
        lines.append(
            f"| {name} | " + " | ".join("✓" if b == "reference" or b in spec.compiled else "" for b in BACKENDS) + " |"
        )
    return "\n".join(lines)


TABLES = {
    "README.md": {
        "bench": lambda: bench_table("zen4"),
        "layers": lambda: layers_table("zen4"),
        "demo": lambda: comparison_table("demo"),
        "ops": ops_table,
    },
    "docs/recommend.md": {
        "movielens": lambda: comparison_table("compare-movielens100k"),
        "games": lambda: comparison_table("compare-games2018"),
    },
    "bench/README.md": {
        "bench-amx": lambda: bench_table("amx"),
        "layers-amx": lambda: layers_table("amx"),
        "bench": lambda: bench_table("zen3"),
        "layers": lambda: layers_table("zen3"),
        "trie": lambda: trie_tables("zen4"),
    },
}


def render(name: str) -> str:
    text = (ROOT / name).read_text()
    for mark, table in TABLES[name].items():
        block = f"<!-- {mark}:begin -->\n\n{table()}\n\n<!-- {mark}:end -->"
        text = re.sub(rf"<!-- {mark}:begin -->.*<!-- {mark}:end -->", lambda _, block=block: block, text, flags=re.S)
    return text


if __name__ == "__main__":
    stale = [name for name in TABLES if render(name) != (ROOT / name).read_text()]
    if "--check" in sys.argv:
        sys.exit(f"stale tables in {', '.join(stale)}; run: python bench/readme.py" if stale else 0)
    for name in stale:
        (ROOT / name).write_text(render(name))
