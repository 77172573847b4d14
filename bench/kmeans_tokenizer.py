"""Residual k-means IDs of many embeddings: this project's tokenizer, faiss, scikit-learn. The same rows, sizes, Lloyd
iterations and number of threads; faiss without its subsampling, and with it ("faiss-sampled").

python bench/kmeans_tokenizer.py --who vqkernels,faiss,faiss-sampled,scikit-learn [--rows 1000000] [--iters 20]

Rows are drawn around 20,000 centres of unit length, themselves around 500 topics. Every system clusters the
standardised rows, then what is left of them. Energy: share of the energy around the mean that the codes reconstruct.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from vqkernels.info import machine
from vqkernels.semantic_ids import ResidualKMeansTokenizer


def rows(n: int, features: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    normal = lambda *shape: generator.standard_normal(shape, np.float32)  # noqa: E731
    centres = normal(500, features)[generator.integers(500, size=20_000)] + 0.7 * normal(20_000, features)
    x = normal(n, features)
    x *= 0.5
    x += centres[generator.integers(len(centres), size=n)]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def faiss_kmeans(x: np.ndarray, k: int, iters: int, seed: int, sampled: bool):
    import faiss

    limits = {} if sampled else {"max_points_per_centroid": len(x)}
    km = faiss.Kmeans(x.shape[1], k, niter=iters, seed=seed + 1, verbose=False, **limits)
    km.train(x)
    return km.centroids, km.index.search(x, 1)[1][:, 0]


def sklearn_kmeans(x: np.ndarray, k: int, iters: int, seed: int):
    from sklearn.cluster import KMeans

    km = KMeans(k, init="k-means++", n_init=1, max_iter=iters, tol=0, random_state=seed, copy_x=False).fit(x)
    return km.cluster_centers_, km.labels_


def residual(x: np.ndarray, levels: int, kmeans) -> float:
    z = x - x.mean(0)
    z /= np.sqrt(np.square(z).mean())
    for level in range(levels):
        centroids, labels = kmeans(z, level)
        for start in range(0, len(z), 1 << 16):
            z[start : start + (1 << 16)] -= centroids[labels[start : start + (1 << 16)]]
    return 1 - float(np.square(z).mean(dtype=np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", default="vqkernels,faiss,faiss-sampled,scikit-learn")
    for name, default in (("rows", 1_000_000), ("features", 384), ("levels", 3), ("size", 256), ("iters", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x, size, iters = rows(args.rows, args.features), args.size, args.iters
    print(
        f"{args.rows:,} x {args.features}, {args.levels} x {size}, {iters} iterations, {args.threads} threads; "
        f"{machine()}"
    )

    def ours() -> float:
        return ResidualKMeansTokenizer(args.levels, size, iters=iters).fit(x, progress=False).report()["energy"][-1]

    def faiss(sampled: bool) -> float:
        import faiss

        faiss.omp_set_num_threads(args.threads)
        return residual(x, args.levels, lambda z, level: faiss_kmeans(z, size, iters, level, sampled))

    def sklearn() -> float:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(args.threads):
            return residual(x, args.levels, lambda z, level: sklearn_kmeans(z, size, iters, level))

    systems = {
        "vqkernels": ours,
        "faiss": lambda: faiss(False),
        "faiss-sampled": lambda: faiss(True),
        "scikit-learn": sklearn,
    }
    for name in args.who.split(","):
        wall, cpu = time.perf_counter(), time.process_time()
        energy = systems[name]()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{name}: {wall:.1f} s, processor {cpu:.1f} s, energy {energy:.2%}, peak memory so far {peak:.1f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
