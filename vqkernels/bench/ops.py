"""The operators beside torch, faiss-cpu and vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import Row, time_call

NEAREST = (
    (65536, 256, 32),
    (65536, 1024, 64),
    (32768, 8192, 64),
    (16384, 8192, 256),
    (65536, 16384, 8),
    (8192, 1024, 768),
)
RESIDUAL = ((65536, 4, 256, 32),)
ROTATION = ((262144, 256),)
USAGE = ((4_194_304, 8192),)
SUMS = ((262144, 1024, 64),)
KMEANS = ((100_000, 256, 32),)
FSQ = ((1_048_576, [8, 5, 5, 5]),)
SHAPES = {
    "nearest_codeword": NEAREST,
    "residual_quantize": RESIDUAL,
    "rotation_trick": ROTATION,
    "codebook_usage": USAGE,
    "codeword_sums": SUMS,
    "fsq": FSQ,
    "kmeans": KMEANS,
}


def _regret_gate(z: Tensor, codebook: Tensor, take: Callable) -> Callable:
    """float32 alternatives may differ on near ties: the chosen codeword may be worse than the best by float32
    rounding, no more."""
    from ..ops import nearest_codeword

    best = nearest_codeword(z, codebook)[1].double()

    def gate(output) -> str:
        indices = take(output).reshape(-1).long()
        chosen = (z.double() - codebook[indices].double()).square().sum(-1)
        slack = 4 * (z.shape[1] + 4) * 2.0**-24 * (z.norm(dim=-1) + codebook.norm(dim=-1).max()).double().square()
        bad = int((chosen - best > slack + 1e-6).sum())
        return f"{bad} of {len(best)} rows are not nearest" if bad else ""

    return gate


def _first(output):
    return torch.as_tensor(output[0] if isinstance(output, tuple) else output)


def _chunked_addmm(z: Tensor, c: Tensor, chunk: int) -> Tensor:
    squares = c.square().sum(-1)
    return torch.cat([torch.addmm(squares, rows, c.T, alpha=-2).argmin(1) for rows in z.split(chunk)])


def _best_chunk(z: Tensor, c: Tensor) -> Callable:
    chunks = [n for n in (256, 1024, 4096, 16384) if n <= z.shape[0]] or [z.shape[0]]
    best = min(chunks, key=lambda n: time_call(lambda: _chunked_addmm(z, c, n), 0.0)[0])
    return lambda: _chunked_addmm(z, c, best)


def _faiss_flat(z: Tensor, c: Tensor) -> Callable:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(z.shape[1])
    index.add(c.numpy())
    rows = z.numpy()
    return lambda: index.search(rows, 1)[1]


def _incumbent(c: Tensor) -> Callable:
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(dim=c.shape[1], codebook_size=c.shape[0]).eval()
    layer._codebook.embed.data.copy_(c[None])
    return layer


def nearest_rows(shapes=NEAREST) -> Iterator[Row]:
    from ..ops import nearest_codeword

    for N, K, D in shapes:
        z, c = torch.randn(N, D), torch.randn(K, D)

        def layer(z=z, c=c):
            vq = _incumbent(c)
            return torch.no_grad()(lambda: vq(z[None])[1])

        yield Row(
            "nearest_codeword",
            f"{N}x{K}x{D}",
            {
                "vqkernels": lambda z=z, c=c: lambda: nearest_codeword(z, c)[0],
                "torch addmm+argmin, chunked": lambda z=z, c=c: _best_chunk(z, c),
                "torch cdist+argmin": lambda z=z, c=c: lambda: torch.cdist(z, c).argmin(1),
                "faiss IndexFlatL2": lambda z=z, c=c: _faiss_flat(z, c),
                "vector-quantize-pytorch": layer,
            },
            _regret_gate(z, c, _first),
            flops=2.0 * N * K * D,
            bytes=4.0 * (N + K) * D + 12 * N,
        )


def residual_rows(shapes=RESIDUAL) -> Iterator[Row]:
    from ..ops import residual_quantize

    for N, Q, K, D in shapes:
        z = torch.randn(N, D)
        books = [torch.randn(K, D) * 0.7**q for q in range(Q)]

        def loop(z=z, books=books):
            residual, out = z, []
            for c in books:
                out.append(_chunked_addmm(residual, c, 4096))
                residual = residual - c[out[-1]]
            return torch.stack(out, -1)

        def layer(z=z, books=books, Q=Q, K=K, D=D):
            from vector_quantize_pytorch import ResidualVQ

            rvq = ResidualVQ(dim=D, num_quantizers=Q, codebook_size=K).eval()
            for level, c in zip(rvq.layers, books, strict=True):
                level._codebook.embed.data.copy_(c[None])
            return torch.no_grad()(lambda: rvq(z[None])[1])

        def faiss_rq(z=z, books=books, Q=Q, K=K, D=D):
            import faiss

            faiss.omp_set_num_threads(torch.get_num_threads())
            rq = faiss.ResidualQuantizer(D, Q, K.bit_length() - 1)
            rq.max_beam_size = 1
            rq.is_trained = True
            faiss.copy_array_to_vector(torch.cat(books).numpy().ravel(), rq.codebooks)
            rows = z.numpy()
            return lambda: rq.compute_codes(rows)[:, :Q]

        exact = residual_quantize(z, books).quantized
        norm = (z - exact).square().sum(-1).mean()

        def gate(output, z=z, books=books, norm=norm, N=N, Q=Q):
            indices = torch.as_tensor(output[1] if isinstance(output, tuple) else output).reshape(N, Q).long()
            decoded = sum(c[indices[:, q]] for q, c in enumerate(books))
            error = (z - decoded).square().sum(-1).mean()
            return (
                ""
                if abs(error / norm - 1) < 1e-3
                else f"mean squared error {error:.6g}, greedy search gives {norm:.6g}"
            )

        yield Row(
            "residual_quantize",
            f"{N}x{Q}x{K}x{D}",
            {
                "vqkernels": lambda z=z, books=books: lambda: residual_quantize(z, books).indices,
                "torch addmm+argmin loop": lambda loop=loop: loop,
                "faiss ResidualQuantizer, beam 1": faiss_rq,
                "vector-quantize-pytorch": layer,
            },
            gate,
            flops=2.0 * N * Q * K * D,
            bytes=8.0 * N * D + 4 * Q * K * D + 8 * N * Q,
        )


def rotation_rows(shapes=ROTATION) -> Iterator[Row]:
    from ..dispatch import pick
    from ..registry import ESTIMATORS

    def eager(z, q, g):
        nz, nq = z.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
        zh, qh = z / nz, q / nq
        r = torch.nn.functional.normalize(zh + qh, dim=-1)
        return (nq / nz) * (g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * zh * (qh * g).sum(-1, keepdim=True))

    def incumbent(z, q, g):
        from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

        leaf = z.clone().requires_grad_()
        out = rotate_to(leaf[None], q[None])
        return lambda: torch.autograd.grad(out, leaf, g[None], retain_graph=True)[0]

    op = pick("rotation_trick_backward", torch.device("cpu"))
    for N, D in shapes:
        z, q, g = (torch.randn(N, D) for _ in range(3))
        want = eager(z[:4096].double(), q[:4096].double(), g[:4096].double())

        def gate(output, want=want):
            error = ((output[:4096].double() - want).norm() / want.norm()).item()
            return "" if error < 1e-4 else f"relative error {error:.3g} against float64"

        yield Row(
            "rotation_trick backward",
            f"{N}x{D}",
            {
                "vqkernels": lambda z=z, q=q, g=g: lambda: op(z, q, g, ESTIMATORS["rotation"]),
                "torch eager formula": lambda z=z, q=q, g=g: lambda: eager(z, q, g),
                "torch.compile of it": lambda z=z, q=q, g=g: (lambda f: lambda: f(z, q, g))(torch.compile(eager)),
                "vector-quantize-pytorch autograd": lambda z=z, q=q, g=g: incumbent(z, q, g),
            },
            gate,
            flops=16.0 * N * D,
            bytes=16.0 * N * D,
            roof="copy",
        )


def usage_rows(shapes=USAGE) -> Iterator[Row]:
    from ..dispatch import pick

    op = pick("codebook_usage", torch.device("cpu"))
    for N, K in shapes:
        indices = torch.randint(0, K, (N,))
        want = torch.bincount(indices, minlength=K)
        yield Row(
            "codebook_usage",
            f"{N}x{K}",
            {
                "vqkernels": lambda i=indices, K=K: lambda: op(i[None], K)[0],
                "torch.bincount": lambda i=indices, K=K: lambda: torch.bincount(i, minlength=K),
            },
            lambda output, want=want: "" if torch.equal(output, want) else "counts differ",
            flops=N,
            bytes=8.0 * (N + K),
            roof="copy",
        )


def sums_rows(shapes=SUMS) -> Iterator[Row]:
    from ..ops import codeword_sums

    for N, K, D in shapes:
        z, indices = torch.randn(N, D), torch.randint(0, K, (N,))
        want = torch.zeros(K, D, dtype=torch.float64).index_add_(0, indices, z.double())

        def one_hot(z=z, indices=indices, K=K):
            return torch.nn.functional.one_hot(indices, K).float().T @ z

        yield Row(
            "codeword_sums",
            f"{N}x{K}x{D}",
            {
                "vqkernels": lambda z=z, i=indices, K=K: lambda: codeword_sums(z, i, K)[0],
                "torch index_add_": lambda z=z, i=indices, K=K, D=D: lambda: torch.zeros(K, D).index_add_(0, i, z),
                "torch one-hot matmul": lambda f=one_hot: f,
            },
            lambda output, want=want: "" if torch.allclose(output.double(), want, atol=1e-2) else "sums differ",
            flops=N * D,
            bytes=4.0 * N * D + 8 * N + 4 * K * D,
            roof="copy",
        )


def fsq_rows(shapes=FSQ) -> Iterator[Row]:
    from ..dispatch import pick

    def eager(z, half, offset, shift, width, basis):
        level = (half * (z + shift).tanh() - offset).round()
        return level / width, ((level + width) * basis).sum(-1).to(torch.int32)

    op = pick("fsq", torch.device("cpu"))
    for N, levels in shapes:
        from ..reference.fsq import bounds

        z = torch.randn(N, len(levels)) * 2
        constants = [torch.tensor(v, dtype=torch.float32) for v in zip(*bounds(levels), strict=True)]
        constants.append(torch.tensor([1, *torch.tensor(levels).cumprod(0)[:-1].tolist()], dtype=torch.float32))
        want = op(z, levels)[1]

        def layer(levels=levels, z=z):
            from vector_quantize_pytorch import FSQ as Incumbent

            fsq = Incumbent(levels).eval()
            return torch.no_grad()(lambda: fsq(z[None]))

        def gate(output, want=want, N=N):
            bad = int((output[1].reshape(-1) != want).sum())  # float32 tanh may fall on the other side of a threshold
            return "" if bad <= 1e-5 * N else f"{bad} of {N} indices differ"

        yield Row(
            "fsq",
            f"{N}x{levels}",
            {
                "vqkernels": lambda z=z, levels=levels: lambda: op(z, levels),
                "torch eager formula": lambda z=z, c=constants: lambda: eager(z, *c),
                "torch.compile of it": lambda z=z, c=constants: (lambda f: lambda: f(z, *c))(torch.compile(eager)),
                "vector-quantize-pytorch": layer,
            },
            gate,
            flops=2.0 * N * sum(levels),
            bytes=8.0 * z.numel() + 4 * N,
            roof="copy",
        )


def kmeans_rows(shapes=KMEANS) -> Iterator[Row]:
    """Twenty iterations; an alternative must reach our inertia within five per cent."""
    from ..ops import kmeans

    for N, K, D in shapes:
        centres = 2 * torch.randn(K, D)
        x = centres[torch.randint(K, (N,))] + torch.randn(N, D)

        def scikit(init, x=x, K=K):
            from sklearn.cluster import KMeans

            options = {"init": init, "n_init": 1, "max_iter": 20, "tol": 0, "random_state": 0, "algorithm": "lloyd"}
            return lambda: KMeans(K, **options).fit(x.numpy()).inertia_

        def faiss_kmeans(x=x, K=K, D=D):
            import faiss

            faiss.omp_set_num_threads(torch.get_num_threads())

            def run():
                found = faiss.Kmeans(D, K, niter=20, seed=1, max_points_per_centroid=10**9)
                found.train(x.numpy())
                return float(found.index.search(x.numpy(), 1)[0].sum())

            return run

        for init in ("k-means++", "random"):
            want = float(kmeans(x, K, init=init).inertia)

            def gate(inertia, want=want):
                return "" if inertia <= 1.05 * want else f"inertia {inertia:.4g}, ours {want:.4g}"

            contenders = {
                "vqkernels": lambda init=init, x=x, K=K: lambda: float(kmeans(x, K, init=init).inertia),
                "scikit-learn KMeans": lambda init=init, f=scikit: f(init),
            }
            if init == "random":
                contenders["faiss Kmeans"] = faiss_kmeans
            yield Row(f"kmeans, {init} start", f"{N}x{K}x{D}", contenders, gate, flops=20 * 2.0 * N * K * D)


ROWS = {
    "nearest_codeword": nearest_rows,
    "residual_quantize": residual_rows,
    "rotation_trick": rotation_rows,
    "codebook_usage": usage_rows,
    "codeword_sums": sums_rows,
    "fsq": fsq_rows,
    "kmeans": kmeans_rows,
}
