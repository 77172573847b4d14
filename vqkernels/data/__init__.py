"""Data sets and formats: item catalogues with user histories, text embeddings, images."""

from .catalogue import Catalogue, DataError, load_folder, save_folder
from .emoji import emoji
from .image_source import ImageSource, image_source, read_image, resize
from .images import fashion_mnist, fashion_mnist_subset
from .movielens import default_cache_dir, movielens100k
from .text import embed_texts

__all__ = [
    "Catalogue",
    "DataError",
    "ImageSource",
    "default_cache_dir",
    "embed_texts",
    "emoji",
    "fashion_mnist",
    "fashion_mnist_subset",
    "image_source",
    "load_folder",
    "movielens100k",
    "read_image",
    "resize",
    "save_folder",
]
