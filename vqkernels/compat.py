"""Stands in for ``vector_quantize_pytorch``: ``import vqkernels.compat as vector_quantize_pytorch``."""

from __future__ import annotations

from .layers import ResidualVQ, VectorQuantize

__all__ = ["ResidualVQ", "VectorQuantize"]


def __getattr__(name: str):
    raise AttributeError(
        f"vqkernels.compat has no {name!r} in this version; it has: {', '.join(__all__)}. "
        "Import the others from vector_quantize_pytorch; both packages work side by side"
    )
