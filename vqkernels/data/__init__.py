"""Data sets and formats: item catalogues with user histories, text embeddings, images."""

from .catalogue import Catalogue, DataError, load_folder, save_folder
from .emoji import emoji
from .image_source import ImageSource, image_source, read_image, resize
from .images import fashion_mnist, fashion_mnist_subset
from .importer import Imported, describe, import_data, look_over
from .index_json import read_index, write_index
from .movielens import default_cache_dir, movielens100k
from .text import embed_texts
from .vectors import read_embeddings

__all__ = [
    "Catalogue",
    "DataError",
    "ImageSource",
    "Imported",
    "default_cache_dir",
    "describe",
    "embed_texts",
    "emoji",
    "fashion_mnist",
    "fashion_mnist_subset",
    "image_source",
    "import_data",
    "load_folder",
    "look_over",
    "movielens100k",
    "read_embeddings",
    "read_image",
    "read_index",
    "resize",
    "save_folder",
    "write_index",
]
