"""The evaluation operators in operations that ONNX has, for ``torch.onnx.export``: vectorised, any number of rows.

The same results as the kernels but for codewords whose distances differ by less than float64 can tell apart; the N x K
distances are held in memory, since ONNX has nothing that would avoid it.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .fsq import fsq
from .nearest_codeword import COSINE, L2, accumulate_dtype
from .residual_quantize import gather, residual_quantize


def nearest_codeword(z: Tensor, codebook: Tensor, mask: Tensor | None, metric: int, certified: bool):
    """z [H,N,D], codebook [H,K,D], mask [H,N] -> indices [H,N], distances [H,N]."""
    x, c = z.double(), codebook.double()
    if metric == COSINE:
        x, c = (_normalize(t, accumulate_dtype(z)) for t in (x, c))
    usable = c.isfinite().all(-1)
    valid = x.isfinite().all(-1) & usable.any(-1, keepdim=True)
    score = -(x @ c.mT)
    if metric == L2:
        score = 2.0 * score + c.square().sum(-1).unsqueeze(-2)
    index = score.masked_fill(~usable.unsqueeze(-2), float("inf")).argmin(-1)
    chosen = gather(c, index)
    distance = (x - chosen).square().sum(-1) if metric == L2 else float(metric == COSINE) - (x * chosen).sum(-1)
    index, distance = index.masked_fill(~valid, -1), distance.masked_fill(~valid, float("nan"))
    if mask is not None:
        index, distance = index.masked_fill(~mask, -1), distance.masked_fill(~mask, 0.0)
    return index, distance.to(accumulate_dtype(z))


def _normalize(t: Tensor, dtype) -> Tensor:
    norm = t.square().sum(-1, keepdim=True).sqrt()
    return (t / norm.masked_fill(norm == 0.0, 1.0)).to(dtype).double()


OPS = {
    "nearest_codeword": nearest_codeword,
    "residual_quantize": partial(residual_quantize, nearest=nearest_codeword),
    "fsq": fsq,
}
