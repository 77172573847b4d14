"""Calls of few rows: the same codebook every time, one that changes from call to call, faiss, addmm + argmin.

python bench/small_calls.py [--threads 2] [--calls 200]

Microseconds, the best of so many calls.
"""

from __future__ import annotations

import argparse
import time

import faiss
import torch

import vqkernels as vq
from vqkernels.info import machine


def best(call, calls: int, before=lambda: None) -> float:
    least = float("inf")
    for _ in range(calls):
        before()
        began = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - began)
    return least * 1e6


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--calls", type=int, default=200)
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    faiss.omp_set_num_threads(a.threads)
    torch.manual_seed(0)
    print(machine())
    for codes, features in ((16, 32), (256, 32), (1024, 64), (4096, 64)):
        for rows in (1, 8, 64, 512):
            z, codebook = torch.randn(rows, features), torch.randn(codes, features)
            index = faiss.IndexFlatL2(features)
            index.add(codebook.numpy())
            search = lambda z=z, c=codebook: vq.nearest_codeword(z, c)  # noqa: E731
            times = {
                "same": best(search, a.calls),
                "changed": best(search, a.calls, lambda c=codebook: c[0, :1].add_(1)),
                "faiss": best(lambda z=z, i=index: i.search(z.numpy(), 1), a.calls),
                "addmm": best(
                    lambda z=z, c=codebook: torch.addmm(c.square().sum(1), z, c.T, alpha=-2).argmin(1), a.calls
                ),
            }
            print(f"{rows}×{codes}×{features}: " + ", ".join(f"{k} {v:.0f}" for k, v in times.items()), flush=True)


if __name__ == "__main__":
    main()
