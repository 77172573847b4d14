"""All tokenizers on one catalogue: what their IDs are like, and what they took.

python bench/semantic_ids.py --data FOLDER [--methods rkmeans,fsq] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from vqkernels.data import load_folder
from vqkernels.info import machine
from vqkernels.semantic_ids import METHODS, make_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder with embeddings")
    parser.add_argument("--methods", default=",".join(METHODS), help="by default all")
    parser.add_argument("--collisions", default="none", help="digit, sinkhorn or none (the default: what the codes do)")
    parser.add_argument("--threads", type=int, default=1, help="1: processor time is then the time of the work")
    parser.add_argument("--json", type=Path, help="write the reports here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    catalogue = load_folder(args.data, items_only=True)
    print(f"{catalogue.num_items:,} items of {catalogue.name}, collisions={args.collisions}; {machine()}\n")
    columns = ("tokenizer", "unique", "largest group", "usage, %", "entropy, bits", "energy, %", "s")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    reports = {}
    for method in args.methods.split(","):
        tokenizer = make_tokenizer(method, collisions=args.collisions)
        began = time.process_time()
        report = tokenizer.fit(catalogue.embeddings, progress=False).report()
        report["processor_seconds"] = time.process_time() - began
        reports[method] = report
        bits = " ".join(f"{entropy / 0.6931471805599453:.2f}" for entropy in report["entropy"])
        usage = " ".join(f"{100 * used:.1f}" for used in report["usage"])
        energy = " ".join(f"{100 * part:.1f}" for part in report["energy"] or []) or "none"
        print(
            f"| {METHODS[method]} | {100 * report['unique_fraction']:.1f} % | {report['largest_group']} | {usage} | "
            f"{bits} | {energy} | {report['processor_seconds']:.1f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "reports": reports}, indent=1))


if __name__ == "__main__":
    main()
