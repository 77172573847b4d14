"""Item embeddings that users bring: .npy, .safetensors and .parquet. Pickles are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .catalogue import DataError, check_embeddings, read_array


def read_embeddings(path, items: Sequence[str]) -> np.ndarray:
    """Embeddings of N items, float32 [N, D].

    ``.npy`` and ``.safetensors`` (its only tensor, or the one called ``embeddings``) hold N rows in the items' order;
    ``.parquet`` one row an item, with a column of lists of numbers and a column of ids, among them all of ``items``.
    DataError for another kind of file, another number of rows, missing items and numbers that are not finite.
    """
    path = Path(path)
    readers = {".npy": _numpy, ".safetensors": _safetensors, ".parquet": _parquet}
    if path.suffix not in readers:
        pickle = "Pickles are refused, since loading one can run any code; " if path.suffix in PICKLES else ""
        raise DataError(f"{path}: not a file of embeddings by its name. {pickle}give one of {', '.join(readers)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return check_embeddings(path, readers[path.suffix](path, items), len(items))


PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


def _numpy(path: Path, items: Sequence[str]) -> np.ndarray:
    return read_array(path)


def _safetensors(path: Path, items: Sequence[str]) -> np.ndarray:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading .safetensors needs safetensors. Run: pip install safetensors") from None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error}). Write it again") from None
    if len(tensors) != 1 and "embeddings" not in tensors:
        raise DataError(f"{path}: tensors {', '.join(tensors) or 'none'}; there must be one, or one called embeddings")
    tensor = tensors.get("embeddings", next(iter(tensors.values())))
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _parquet(path: Path, items: Sequence[str]) -> np.ndarray:
    try:
        import pyarrow as arrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise ImportError("reading .parquet needs pyarrow. Run: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}). Write it again") from None
    kinds = arrow.types
    lists = [f.name for f in table.schema if kinds.is_list(f.type) or kinds.is_fixed_size_list(f.type)]
    names = [f.name for f in table.schema if kinds.is_string(f.type) or kinds.is_integer(f.type)]
    if len(lists) != 1 or len(names) != 1:
        columns = ", ".join(f"{f.name}: {f.type}" for f in table.schema)
        raise DataError(
            f"{path}: columns {columns}; one of ids (string or integer) and one of lists of numbers are needed"
        )
    rows: dict[str, int] = {}
    for row, item in enumerate(table[names[0]].to_pylist()):
        if rows.setdefault(str(item), row) != row:
            raise DataError(f"{path}: rows {rows[str(item)]} and {row} are both item {item!r}. Give each item one row")
    if missing := [item for item in items if item not in rows]:
        raise DataError(
            f"{path}: {len(missing)} of {len(items)} items have no row, such as {missing[0]!r}. Embed them too"
        )
    vectors = table[lists[0]].combine_chunks()
    width = set(arrow.compute.list_value_length(vectors).unique().to_pylist())
    if len(width) != 1 or None in width or vectors.flatten().null_count:
        raise DataError(f"{path}: lists of lengths {sorted(map(str, width))}, or empty values. Give all one length")
    values = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return values[[rows[item] for item in items]]
