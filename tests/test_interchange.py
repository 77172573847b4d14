"""Semantic IDs as index.json, and embeddings that users bring: out, in, and what cannot be used."""

import json

import numpy as np
import pytest

from vqkernels.data import DataError, read_embeddings, read_index, write_index

# ---------------------------------------------------------------- index.json


def test_index_goes_out_and_in(tmp_path):
    ids = np.array([[5, 0, 255], [0, 1, 2], [5, 0, 254]])
    path = write_index(tmp_path / "X.index.json", ids)
    assert json.loads(path.read_text())["1"] == ["<a_5>", "<b_0>", "<c_255>"]
    again, items = read_index(path)
    assert np.array_equal(again, ids) and again.dtype == np.int64 and items == ["1", "2", "3"]
    again, items = read_index(write_index(path, ids, ["10", "B9", "9"]))
    assert np.array_equal(again, ids) and items == ["10", "B9", "9"]
    again, items = read_index(write_index(path, ids, [10, 2, 9]))
    assert items == ["2", "9", "10"] and np.array_equal(again, ids[[1, 2, 0]])
    for bad, items, message in (
        (ids - 1, None, r"integers from 0"),
        (ids.astype(float), None, r"float64 of shape \[3, 3\]"),
        (np.zeros((2, 27), int), None, r"1 to 26"),
        (ids, ["a", "b", "a"], r"2 different names"),
        (ids, ["a", "b"], r"3 semantic IDs, 2 items"),
    ):
        with pytest.raises(DataError, match=message):
            write_index(path, bad, items)


def test_the_semantic_ids_of_another_system_train_tiger(tmp_path):
    tiger = pytest.importorskip("vqkernels.recommend.tiger", reason="TIGER is built on transformers")
    path = write_index(tmp_path / "X.index.json", np.array([[0, 1], [1, 0], [1, 1]]), range(3))
    ids, _ = read_index(path)
    model = tiger.TIGER(ids, d_model=8, d_ff=8, heads=1, layers=1)
    assert len(model.recommend([1, 2], k=2)) == 2


# ---------------------------------------------------------------- embeddings


def test_embeddings_of_all_kinds(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    vectors, items = np.arange(6, dtype=np.float32).reshape(3, 2), ["B1", "B2", "B3"]
    np.save(tmp_path / "e.npy", vectors.astype(np.float16))
    save_file({"embeddings": vectors, "other": vectors[:1]}, tmp_path / "two.safetensors")
    save_file({"any": vectors}, tmp_path / "one.safetensors")
    shuffled = [2, 0, 1]
    names = ["B3", "B1", "B2", "unused"]
    for name, kind in (("list", arrow.list_(arrow.float64())), ("fixed", arrow.list_(arrow.float32(), 2))):
        lists = arrow.array([*vectors[shuffled].tolist(), [9, 9]], kind)
        parquet.write_table(arrow.table({"asin": names, "vector": lists}), tmp_path / f"{name}.parquet")
    for file in ("e.npy", "two.safetensors", "one.safetensors", "list.parquet", "fixed.parquet"):
        read = read_embeddings(tmp_path / file, items)
        assert read.dtype == np.float32 and np.array_equal(read, vectors), file
    parquet.write_table(arrow.table({"id": [2, 1], "v": vectors[:2].tolist()}), tmp_path / "numbers.parquet")
    assert np.array_equal(read_embeddings(tmp_path / "numbers.parquet", ["1", "2"]), vectors[[1, 0]])


def test_embeddings_that_cannot_be_used(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "short.npy", np.zeros((1, 2), np.float32))
    save_file({"a": np.zeros((2, 2), np.float32), "b": np.zeros(1, np.float32)}, tmp_path / "two.safetensors")
    save_file({"a": np.zeros((2, 2), np.int64)}, tmp_path / "whole.safetensors")
    for name, columns in {
        "columns": {"a": ["1", "2"], "b": ["x", "y"], "v": [[1.0], [2.0]]},
        "twice": {"a": ["1", "1"], "v": [[1.0], [2.0]]},
        "missing": {"a": ["1", "3"], "v": [[1.0], [2.0]]},
        "ragged": {"a": ["1", "2"], "v": [[1.0], [2.0, 3.0]]},
        "null": {"a": ["1", "2"], "v": [[1.0], None]},
        "hole": {"a": ["1", "2"], "v": [[1.0], [None]]},
        "infinite": {"a": ["1", "2"], "v": [[1.0], [float("inf")]]},
    }.items():
        parquet.write_table(arrow.table(columns), tmp_path / f"{name}.parquet")
    for name, content in (("damaged.parquet", b"PAR1"), ("damaged.safetensors", b"\x09" + bytes(7) + b"{")):
        (tmp_path / name).write_bytes(content)
    for name in ("x.pt", "x.csv"):
        (tmp_path / name).touch()
    for name, message in {
        "pickled.npy": "Pickled objects are refused",
        "short.npy": "1 rows, but items.csv has 2 items",
        "two.safetensors": "tensors a, b; there must be one, or one called embeddings",
        "whole.safetensors": "a float array",
        "columns.parquet": "columns a: string, b: string, v: list",
        "twice.parquet": "rows 0 and 1 are both item '1'",
        "missing.parquet": "1 of 2 items have no row, such as '2'",
        "ragged.parquet": r"lists of lengths \['1', '2'\]",
        "null.parquet": r"lists of lengths \['1', 'None'\]",
        "hole.parquet": "or empty values",
        "infinite.parquet": r"row 1 \(item 2\) holds NaN or infinity",
        "damaged.parquet": "cannot be read as parquet",
        "damaged.safetensors": "cannot be read as safetensors",
        "x.pt": "Pickles are refused",
        "x.csv": "give one of .npy, .safetensors, .parquet",
        "none.npy": "no such file",
    }.items():
        with pytest.raises(DataError, match=message):
            read_embeddings(tmp_path / name, ["1", "2"])
