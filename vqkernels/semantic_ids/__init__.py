"""Semantic IDs: item embeddings to short sequences of discrete codes."""

from .base import Tokenizer, load_tokenizer
from .collisions import add_digit, collision_report
from .logits_processor import TrieLogitsProcessor
from .methods import METHODS, make_tokenizer
from .neighbours import shared_prefixes
from .rqvae import RQVAETokenizer
from .tokenizers import (
    HierarchicalKMeansTokenizer,
    ProductKMeansTokenizer,
    RandomTokenizer,
    ResidualKMeansTokenizer,
)
from .trie import Trie

__all__ = [
    "METHODS",
    "HierarchicalKMeansTokenizer",
    "ProductKMeansTokenizer",
    "RQVAETokenizer",
    "RandomTokenizer",
    "ResidualKMeansTokenizer",
    "Tokenizer",
    "Trie",
    "TrieLogitsProcessor",
    "add_digit",
    "collision_report",
    "load_tokenizer",
    "make_tokenizer",
    "shared_prefixes",
]
