"""Quantizer layers with the names, defaults, results and checkpoints of vector-quantize-pytorch."""

from .residual_vq import ResidualVQ
from .sequential import Sequential
from .vector_quantize import LossBreakdown, VectorQuantize

# what counts as the quantizer of a Sequential
QUANTIZERS = (ResidualVQ, VectorQuantize)

__all__ = ["QUANTIZERS", "LossBreakdown", "ResidualVQ", "Sequential", "VectorQuantize"]
