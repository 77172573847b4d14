"""Semantic IDs: item embeddings to short sequences of discrete codes."""

from .base import Tokenizer, load_tokenizer
from .collisions import add_digit, collision_report
from .logits_processor import TrieLogitsProcessor
from .rqvae import RQVAETokenizer
from .tokenizers import HierarchicalKMeansTokenizer, RandomTokenizer, ResidualKMeansTokenizer
from .trie import Trie

__all__ = [
    "HierarchicalKMeansTokenizer",
    "RQVAETokenizer",
    "RandomTokenizer",
    "ResidualKMeansTokenizer",
    "Tokenizer",
    "Trie",
    "TrieLogitsProcessor",
    "add_digit",
    "collision_report",
    "load_tokenizer",
]
