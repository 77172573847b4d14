"""The tokenizers by the names that commands and comparisons use."""

from __future__ import annotations

from ..data.catalogue import DataError
from .base import Tokenizer
from .rqvae import RQVAETokenizer
from .tokenizers import HierarchicalKMeansTokenizer, ProductKMeansTokenizer, RandomTokenizer, ResidualKMeansTokenizer

METHODS = {
    "random": "random codes",
    "rkmeans": "residual k-means",
    "hkmeans": "hierarchical k-means",
    "pkmeans": "product k-means",
    "rqvae-ste": "RQ-VAE, straight-through",
    "rqvae-rotation": "RQ-VAE, rotation trick",
    "rqvae-reflection": "RQ-VAE, reflection",
    "rqvae-gumbel": "RQ-VAE, Gumbel-softmax",
    "simvq": "RQ-VAE on SimVQ",
    "fsq": "RQ-VAE on FSQ",
}
_CLASSES = {
    "random": RandomTokenizer,
    "rkmeans": ResidualKMeansTokenizer,
    "hkmeans": HierarchicalKMeansTokenizer,
    "pkmeans": ProductKMeansTokenizer,
}


def make_tokenizer(
    method: str, levels: int = 3, codebook_size: int = 256, seed: int = 0, collisions: str = "digit"
) -> Tokenizer:
    """The tokenizer behind a method's name, not fitted. Raises DataError for an unknown name, ValueError for settings
    that the tokenizer refuses."""
    if method not in METHODS:
        raise DataError(f"unknown method {method}; there are: {', '.join(METHODS)}")
    options = {"levels": levels, "codebook_size": codebook_size, "seed": seed, "collisions": collisions}
    if method in _CLASSES:
        return _CLASSES[method](**options)
    quantizer = method if method in ("simvq", "fsq") else "residual"
    estimator = method.partition("-")[2] or "rotation"
    return RQVAETokenizer(quantizer=quantizer, estimator=estimator, **options)
