"""Data sets and formats: item catalogues with user histories, text embeddings, Fashion-MNIST images."""

from .catalogue import Catalogue, DataError, load_folder, save_folder
from .images import fashion_mnist, fashion_mnist_subset
from .movielens import default_cache_dir, movielens100k
from .text import embed_texts

__all__ = [
    "Catalogue",
    "DataError",
    "default_cache_dir",
    "embed_texts",
    "fashion_mnist",
    "fashion_mnist_subset",
    "load_folder",
    "movielens100k",
    "save_folder",
]
