"""The public functions: shapes in plain words, checks, autograd. One module per op, named after it."""

from .codebook_usage import CodebookUsage, codebook_usage
from .codeword_sums import codeword_sums
from .fsq import fsq, fsq_indices
from .kmeans import KMeans, kmeans
from .nearest_codeword import nearest_codeword
from .residual_quantize import Quantized, residual_quantize, vector_quantize
from .rotation_trick import rotation_trick
from .trie_topk import trie_topk

__all__ = [
    "CodebookUsage",
    "KMeans",
    "Quantized",
    "codebook_usage",
    "codeword_sums",
    "fsq",
    "fsq_indices",
    "kmeans",
    "nearest_codeword",
    "residual_quantize",
    "rotation_trick",
    "trie_topk",
    "vector_quantize",
]
