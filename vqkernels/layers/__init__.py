"""Quantizer layers with the names, defaults, results and checkpoints of vector-quantize-pytorch."""

from .residual_vq import ResidualVQ
from .vector_quantize import LossBreakdown, VectorQuantize

__all__ = ["LossBreakdown", "ResidualVQ", "VectorQuantize"]
