"""One OpSpec per raw operator. It drives registration, the test matrix, ``vqkernels verify``, the bench and the tables.

Dimensions, always in this order: H heads, N vectors, K codewords, D features, Q levels. Raw operators take
contiguous-or-not tensors with explicit heads; the public functions in :mod:`vqkernels.ops` check and reshape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _ops, samples
from .reference.codebook_usage import codebook_usage
from .reference.codeword_sums import codeword_sums
from .reference.fsq import fsq, fsq_backward
from .reference.kmeans_plus_plus import kmeans_plus_plus
from .reference.nearest_codeword import accumulate_dtype, nearest_codeword
from .reference.residual_quantize import residual_quantize, residual_quantize_backward
from .reference.rotation_trick import rotation_trick_backward
from .reference.trie_topk import trie_topk
from .reference.vmap import register as register_vmap

METRICS = {"l2": 0, "cosine": 1, "dot": 2}
ESTIMATORS = {"ste": 0, "rotation": 1, "reflection": 2}
BACKENDS = ("reference", "cpu", "cuda", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OpSpec:
    """Everything the project knows about one raw operator.

    ``outputs`` says how each output compares with the reference: "exact" (bit equal) or "close" (``tolerance``,
    relative to the largest value, per dtype). ``flops`` and ``bytes`` give the minimum work of a call from its
    arguments.
    """

    name: str
    schema: str
    reference: Callable
    fake: Callable
    outputs: tuple[str, ...]
    samples: Callable  # (dtype) -> [(label, args)]
    edges: Callable  # (dtype) -> [(label, args)]
    flops: Callable  # (*args) -> int
    bytes: Callable  # (*args) -> int
    compiled: tuple[str, ...] = ()  # backends that have a kernel in this release
    dtypes: tuple[torch.dtype, ...] = DTYPES
    tolerance: float = 4.0  # in units of the dtype's eps

    @property
    def op(self):
        """The overload packet ``torch.ops.vqkernels.<name>``."""
        return getattr(_ops.ops, self.name)


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _fake_nearest(z, codebook, mask, metric, certified):
    return z.new_empty(z.shape[:2], dtype=torch.int64), z.new_empty(z.shape[:2], dtype=accumulate_dtype(z))


def _fake_residual(z, codebooks, mask, metric):
    H, N, _ = z.shape
    return (
        z.new_empty((H, N, len(codebooks)), dtype=torch.int64),
        torch.empty_like(z, memory_format=torch.contiguous_format),
        z.new_empty((len(codebooks),), dtype=accumulate_dtype(z)),
        z.new_empty((), dtype=torch.int64),
    )


def _fake_like_first(z, *_):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _fake_usage(indices, codebook_size):
    return indices.new_empty((indices.shape[0], codebook_size))


def _fake_sums(z, indices, codebook_size):
    sums = z.new_empty((z.shape[0], codebook_size, z.shape[2]), dtype=accumulate_dtype(z))
    return sums, indices.new_empty((z.shape[0], codebook_size))


def _fake_fsq(z, levels):
    return _fake_like_first(z), z.new_empty(z.shape[:1], dtype=torch.int32)


def _fake_trie(logits, scores, states, row_offsets, edge_tokens, edge_children, k):
    B = logits.shape[0]
    return logits.new_empty((B, k), dtype=accumulate_dtype(logits)), *(states.new_empty((B, k)) for _ in range(3))


def _nearest_flops(z, codebook, *_):
    return 2 * z.shape[0] * z.shape[1] * codebook.shape[1] * z.shape[2]


SPECS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec(
            name="nearest_codeword",
            schema="(Tensor z, Tensor codebook, Tensor? mask, int metric, bool certified)"
            " -> (Tensor indices, Tensor distances)",
            reference=nearest_codeword,
            fake=_fake_nearest,
            outputs=("exact", "exact"),
            samples=samples.nearest_codeword,
            edges=samples.nearest_codeword_edges,
            flops=_nearest_flops,
            bytes=lambda z, codebook, *_: _size(z, codebook) + 12 * z.shape[0] * z.shape[1],
            compiled=("cpu", "cuda", "triton"),
        ),
        OpSpec(
            name="residual_quantize",
            schema="(Tensor z, Tensor[] codebooks, Tensor? mask, int metric)"
            " -> (Tensor indices, Tensor quantized, Tensor losses, Tensor valid)",
            reference=residual_quantize,
            fake=_fake_residual,
            outputs=("exact", "exact", "close", "exact"),
            samples=samples.residual_quantize,
            edges=samples.residual_quantize_edges,
            flops=lambda z, codebooks, *_: sum(_nearest_flops(z, c) for c in codebooks),
            bytes=lambda z, codebooks, *_: (
                2 * _size(z) + _size(*codebooks) + 8 * len(codebooks) * z.shape[0] * z.shape[1]
            ),
            compiled=("cpu", "cuda", "triton"),
        ),
        OpSpec(
            name="residual_quantize_backward",
            schema="(Tensor z, Tensor[] codebooks, Tensor indices, Tensor grad, Tensor commitment_scale, int estimator,"
            " bool per_level) -> Tensor",
            reference=residual_quantize_backward,
            fake=_fake_like_first,
            outputs=("close",),
            samples=samples.residual_quantize_backward,
            edges=samples.residual_quantize_backward_edges,
            flops=lambda z, codebooks, *_: 18 * len(codebooks) * z.numel(),
            bytes=lambda z, codebooks, indices, *_: 3 * _size(z) + _size(indices, *codebooks),
            compiled=("cpu", "cuda", "triton"),
            tolerance=16.0,
        ),
        OpSpec(
            name="rotation_trick_backward",
            schema="(Tensor z, Tensor q, Tensor grad, int estimator) -> Tensor",
            reference=rotation_trick_backward,
            fake=_fake_like_first,
            outputs=("close",),
            samples=samples.rotation_trick_backward,
            edges=samples.rotation_trick_backward_edges,
            flops=lambda z, *_: 16 * z.numel(),
            bytes=lambda z, *_: 4 * _size(z),
            compiled=("cpu", "cuda", "triton"),
            tolerance=16.0,
        ),
        OpSpec(
            name="codebook_usage",
            schema="(Tensor indices, int codebook_size) -> Tensor",
            reference=codebook_usage,
            fake=_fake_usage,
            outputs=("exact",),
            samples=samples.codebook_usage,
            edges=samples.codebook_usage_edges,
            flops=lambda indices, *_: indices.numel(),
            bytes=lambda indices, codebook_size: _size(indices) + 8 * indices.shape[0] * codebook_size,
            compiled=("cpu", "cuda", "triton"),
            dtypes=(torch.int64,),
        ),
        OpSpec(
            name="codeword_sums",
            schema="(Tensor z, Tensor indices, int codebook_size) -> (Tensor sums, Tensor counts)",
            reference=codeword_sums,
            fake=_fake_sums,
            outputs=("close", "exact"),
            samples=samples.codeword_sums,
            edges=samples.codeword_sums_edges,
            flops=lambda z, *_: z.numel(),
            bytes=lambda z, indices, K: _size(z, indices) + z.shape[0] * K * (8 + 4 * z.shape[2]),
            compiled=("cpu", "cuda", "triton"),
        ),
        OpSpec(
            name="kmeans_plus_plus",
            schema="(Tensor x, Tensor draws) -> Tensor",
            reference=kmeans_plus_plus,
            fake=lambda x, draws: x.new_empty(draws.shape[:1], dtype=torch.int64),
            outputs=("exact",),
            samples=samples.kmeans_plus_plus,
            edges=samples.kmeans_plus_plus_edges,
            flops=lambda x, draws: 3 * x.numel() * draws.numel(),
            bytes=lambda x, draws: _size(x) + 8 * draws.numel(),
            compiled=("cpu",),
            dtypes=(torch.float32, torch.float64),
        ),
        OpSpec(
            name="fsq",
            schema="(Tensor z, int[] levels) -> (Tensor quantized, Tensor indices)",
            reference=fsq,
            fake=_fake_fsq,
            outputs=("exact", "exact"),
            samples=samples.fsq,
            edges=samples.fsq_edges,
            flops=lambda z, levels: 2 * z.shape[0] * sum(levels),
            bytes=lambda z, *_: 2 * _size(z) + 4 * z.shape[0],
            compiled=("cpu", "cuda", "triton"),
        ),
        OpSpec(
            name="fsq_backward",
            schema="(Tensor z, Tensor grad, int[] levels) -> Tensor",
            reference=fsq_backward,
            fake=_fake_like_first,
            outputs=("close",),
            samples=samples.fsq_backward,
            edges=samples.fsq_backward_edges,
            flops=lambda z, *_: 8 * z.numel(),
            bytes=lambda z, *_: 3 * _size(z),
            compiled=("cpu", "cuda", "triton"),
            tolerance=16.0,
        ),
        OpSpec(
            name="trie_topk",
            schema="(Tensor logits, Tensor scores, Tensor states, Tensor row_offsets, Tensor edge_tokens,"
            " Tensor edge_children, int k) -> (Tensor scores, Tensor beams, Tensor tokens, Tensor states)",
            reference=trie_topk,
            fake=_fake_trie,
            outputs=("close", "exact", "exact", "exact"),
            samples=samples.trie_topk,
            edges=samples.trie_topk_edges,
            flops=lambda logits, *_: 4 * logits.numel(),
            bytes=lambda logits, *_: _size(logits),
            compiled=("cpu", "cuda", "triton"),
            tolerance=16.0,  # score and log-probability may cancel
        ),
    )
}


def _register() -> dict[str, dict[str, bool | str]]:
    """Defines every overload, loads the kernels and finds which can run: {op: {backend: True or the reason}}."""
    lib = _ops.library
    for spec in SPECS.values():
        for overload in ("", ".reference", ".triton"):
            lib.define(spec.name + overload + spec.schema)
            lib._register_fake(spec.name + overload, spec.fake)
            register_vmap(lib, spec.name, overload)
        lib.impl(spec.name + ".reference", spec.reference, "CompositeExplicitAutograd")
    lib.define("simd_level(int level=-1) -> int")
    lib.define("fma_peak_gflops() -> float")
    no_library = _ops.load()
    no_triton = _ops.triton_reason()
    if no_triton is None:
        from .triton_kernels import register

        register(lib, [spec.name for spec in SPECS.values() if "triton" in spec.compiled])
    no_cuda = no_library or (None if torch.cuda.is_available() else f"no CUDA device for torch {torch.__version__}")

    def reason(spec: OpSpec, backend: str) -> bool | str:
        if backend == "reference":
            return True
        if backend not in spec.compiled:
            return f"there is no {backend} kernel for {spec.name} in this release"
        missing = {"cpu": no_library, "cuda": no_cuda, "triton": no_triton}[backend]
        if missing:
            return missing
        if backend == "triton":
            return True
        key = backend.upper()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{_ops.NAMESPACE}::{spec.name}", key):
            return True
        return _ops.build_info().get("cuda_reason") or f"the {backend} kernels were not built; see vqkernels info"

    return {name: {backend: reason(spec, backend) for backend in BACKENDS} for name, spec in SPECS.items()}


AVAILABLE = _register()
