"""vqkernels: exact, fast and small-in-memory vector quantization for PyTorch.

Public names load on first use, so ``import vqkernels.numpy`` never imports torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_OPS = {
    "nearest_codeword": "nearest_codeword",
    "vector_quantize": "residual_quantize",
    "residual_quantize": "residual_quantize",
    "rotation_trick": "rotation_trick",
    "codebook_usage": "codebook_usage",
    "codeword_sums": "codeword_sums",
    "fsq": "fsq",
    "fsq_indices": "fsq",
    "kmeans": "kmeans",
    "trie_topk": "trie_topk",
}
_LAYERS = (
    "VectorQuantize",
    "ResidualVQ",
    "GroupedResidualVQ",
    "FactorizedResidualVQ",
    "HierarchicalVQ",
    "SimVQ",
    "ResidualSimVQ",
    "FSQ",
    "ResidualFSQ",
    "GroupedResidualFSQ",
    "FSP",
    "LatentQuantize",
    "LFQ",
    "ResidualLFQ",
    "GroupedResidualLFQ",
    "EvoLFQ",
    "BinaryMapper",
    "RandomProjectionQuantizer",
    "Sequential",
    "from_pretrained_layer",
)
_SOURCES = {name: f".ops.{module}" for name, module in _OPS.items()}
_SOURCES |= dict.fromkeys(("backends", "use_backend"), ".dispatch")
_SOURCES |= dict.fromkeys(_LAYERS, ".layers")
_SOURCES |= {"from_pretrained_layer": ".layers.migration"}
_SUBMODULES = ("compat", "data", "layers", "models", "numpy", "recommend", "semantic_ids")

__all__ = [*_SOURCES, "__version__"]


def __getattr__(name: str):
    if name in _SOURCES:
        value = getattr(importlib.import_module(_SOURCES[name], __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'vqkernels' has no attribute {name!r}; it has: {', '.join(sorted(__all__))}")


def __dir__():
    return sorted({*globals(), *__all__, *_SUBMODULES})
