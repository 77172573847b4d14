"""Semantic IDs: item embeddings to short sequences of discrete codes."""

from .base import Tokenizer, load_tokenizer
from .collisions import add_digit, collision_report
from .rqvae import RQVAETokenizer
from .tokenizers import HierarchicalKMeansTokenizer, RandomTokenizer, ResidualKMeansTokenizer

__all__ = [
    "HierarchicalKMeansTokenizer",
    "RQVAETokenizer",
    "RandomTokenizer",
    "ResidualKMeansTokenizer",
    "Tokenizer",
    "add_digit",
    "collision_report",
    "load_tokenizer",
]
