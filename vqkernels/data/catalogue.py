"""Items, their texts, and the users' histories over them; the data folder they are kept in.

A data folder holds

* ``sequences.txt`` or ``sequences.txt.gz``: one line a user, ``user item item ...``, oldest item first;
* ``items.csv`` or ``items.csv.gz``: a header, then one row an item, ``item_id`` first and text columns after it. Item
  ids are 1 to the number of items, each once. A column ``title`` names the item (else the first text column does). A
  column ``text`` is the item's whole text (else all text columns together are). A column ``source_id`` keeps what the
  item is called elsewhere, and is no text;
* ``embeddings.npy``, if wanted: a float array [items, D], row = item_id - 1. Without a file of that name, the folder's
  only ``.npy`` file is taken.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import tempfile
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DIGITS = frozenset("0123456789")


class DataError(ValueError):
    """Input that cannot be used. Says where it is, what was given, what is allowed and what to do."""


@dataclass
class Catalogue:
    """Items and the users' histories over them.

    ``sequences``: one int64 array of item ids a user, oldest first, ids from 1. ``users``: their names, in the same
    order. ``num_items``: N. ``item_texts``, ``item_titles``: N strings, index = item id - 1. ``embeddings``: float32
    [N, D] or None. ``source_ids``: what the items were called where they came from, N strings, or None.
    """

    sequences: list[np.ndarray]
    users: list[str]
    num_items: int
    item_texts: list[str]
    item_titles: list[str]
    embeddings: np.ndarray | None = field(default=None, repr=False)
    name: str = "catalogue"
    source_ids: list[str] | None = field(default=None, repr=False)

    @property
    def num_interactions(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.users):,} users, {self.num_items:,} items, {self.num_interactions:,} interactions"
        )


def load_folder(path, items_only: bool = False) -> Catalogue:
    """Read a data folder (see the module's head). With ``items_only`` the sequences may be missing and stay empty.

    Raises DataError, naming file and line, for anything that is missing or malformed. Warns when nearly every sequence
    is sorted by item id: some published files have lost the order in time that way.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder. A data folder holds sequences.txt[.gz] and items.csv[.gz], "
            "and embeddings.npy if wanted"
        )
    texts, titles, source_ids = _read_items(_find(folder, "items.csv"))
    users, sequences = [], []
    if not items_only:
        users, sequences = _read_sequences(_find(folder, "sequences.txt"), len(texts))
        _warn_if_sorted(folder, sequences)
    embeddings = _read_embeddings(folder, len(texts))
    return Catalogue(sequences, users, len(texts), texts, titles, embeddings, folder.resolve().name, source_ids)


def save_folder(catalogue: Catalogue, path, overwrite: bool = False) -> Path:
    """Write a catalogue as a data folder and return its path. Each file appears complete or not at all.

    Refuses a folder that is not empty unless ``overwrite``, which replaces the data files in it and leaves others
    alone.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; a folder is needed. Give another path")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise DataError(f"{folder} is not empty. Give another path, or overwrite=True to replace the data files in it")
    for user in catalogue.users:
        if not user or any(character.isspace() for character in user):
            raise DataError(
                f"user name {user!r}: names in sequences.txt are not empty and hold no white space. Rename the user"
            )
    items = io.StringIO()
    rows = csv.writer(items, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    columns = {"title": catalogue.item_titles, "text": catalogue.item_texts}
    if catalogue.source_ids is not None:
        columns["source_id"] = catalogue.source_ids
    rows.writerow(["item_id", *columns])
    rows.writerows(zip(range(1, catalogue.num_items + 1), *columns.values(), strict=True))
    histories = zip(catalogue.users, catalogue.sequences, strict=True)
    lines = (f"{user} {' '.join(map(str, sequence))}\n" for user, sequence in histories)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "items.csv", items.getvalue().encode())
    write_atomic(folder / "sequences.txt", "".join(lines).encode())
    (folder / "items.csv.gz").unlink(missing_ok=True)
    (folder / "sequences.txt.gz").unlink(missing_ok=True)
    if catalogue.embeddings is None:
        (folder / "embeddings.npy").unlink(missing_ok=True)
    else:
        write_array(folder / "embeddings.npy", np.asarray(catalogue.embeddings, np.float32))
    return folder


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is seen either complete or not at all, whatever happens to this process."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def read_array(path: Path) -> np.ndarray:
    """Read a .npy file; pickled objects are refused, since loading one can run any code."""
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as a .npy array of numbers ({error}). Pickled objects are refused; "
            "write it with numpy.save(path, array, allow_pickle=False)"
        ) from None


def _find(folder: Path, name: str) -> Path:
    found = [file for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
    if not found:
        there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise DataError(f"{folder}: {name} or {name}.gz is missing (the folder holds: {there})")
    if len(found) == 2:
        raise DataError(f"{folder}: both {name} and {name}.gz are there, and only one can be meant. Remove one")
    return found[0]


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file ({error}). Fetch or compress it again") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8. Convert the file to UTF-8"
        ) from None


def _read_items(path: Path) -> tuple[list[str], list[str], list[str] | None]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    texts: dict[int, str] = {}
    titles: dict[int, str] = {}
    sources: dict[int, str] = {}
    line = 1  # where the current row begins; a quoted text may run over several lines
    try:
        header = [column.strip() for column in next(reader, [])]
        if len(set(header) - {"source_id"}) < 2 or header[0] != "item_id" or len(set(header)) != len(header):
            raise DataError(
                f"{path}:1: the header is {','.join(header)!r}; it must be item_id and then at least one text "
                "column, each name once, as in 'item_id,title,brand'"
            )
        source_at = header.index("source_id") if "source_id" in header else None
        words_at = [i for i in range(1, len(header)) if i != source_at]
        title_at = header.index("title") if "title" in header else words_at[0]
        text_at = header.index("text") if "text" in header else None
        line = reader.line_num + 1
        for row in reader:
            if row:
                _check_item(path, line, row, header, texts)
                item = int(row[0])
                whole = row[text_at] if text_at else ". ".join(row[i].strip() for i in words_at if row[i].strip())
                titles[item] = row[title_at] or f"item {item}"
                texts[item] = whole or titles[item]
                if source_at:
                    sources[item] = row[source_at]
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not a CSV row ({error}). Quote fields that hold commas, quotes or line ends"
        ) from None
    if not texts:
        raise DataError(f"{path}: no items. Give at least one row under the header")
    missing = next((item for item in range(1, len(texts) + 1) if item not in texts), None)
    if missing is not None:
        raise DataError(
            f"{path}: {len(texts)} items, so their ids must be 1 to {len(texts)}, but {missing} is missing and "
            f"{max(texts)} is there. Number the items from 1 without gaps"
        )
    every = range(1, len(texts) + 1)
    return [texts[i] for i in every], [titles[i] for i in every], [sources[i] for i in every] if sources else None


def _check_item(path: Path, line: int, row: list[str], header: list[str], seen: dict[int, str]) -> None:
    if len(row) != len(header):
        raise DataError(
            f"{path}:{line}: {len(row)} columns, but the header has {len(header)} ({','.join(header)}). "
            "Quote fields that hold commas"
        )
    if not (row[0] and DIGITS.issuperset(row[0])) or int(row[0]) == 0:
        raise DataError(
            f"{path}:{line}: item_id {row[0]!r} is not a whole number from 1. Number the items from 1 without gaps"
        )
    if int(row[0]) in seen:
        raise DataError(f"{path}:{line}: item_id {row[0]} is there twice. Give each item one row")


def _read_sequences(path: Path, num_items: int) -> tuple[list[str], list[np.ndarray]]:
    users: dict[str, int] = {}
    sequences = []
    lines = _read_text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        user, *items = line.split() or [""]
        if not items:
            given = f"user {user!r} has no items" if user else "the line is empty"
            raise DataError(
                f"{path}:{number}: {given}. A line is 'user item item ...' with at least one item; remove it"
            )
        if user in users:
            raise DataError(
                f"{path}:{number}: user {user!r} was already on line {users[user]}. Give each user one line"
            )
        if not DIGITS.issuperset("".join(items)):
            wrong = next(item for item in items if not DIGITS.issuperset(item))
            raise DataError(
                f"{path}:{number}: item {wrong!r} is not a whole number. A line is 'user item item ...', "
                "with item ids as in items.csv"
            )
        sequence = list(map(int, items))
        if min(sequence) < 1 or max(sequence) > num_items:
            wrong = next(item for item in sequence if not 1 <= item <= num_items)
            raise DataError(
                f"{path}:{number}: item {wrong} is unknown: items.csv has ids 1 to {num_items}. "
                "Add the item there or take it out of the sequence"
            )
        users[user] = number
        sequences.append(np.array(sequence, np.int64))
    if not sequences:
        raise DataError(f"{path}: no users. Give at least one line 'user item item ...'")
    return list(users), sequences


def sorted_sequences(sequences: list[np.ndarray]) -> tuple[int, int]:
    """How many of the sequences of three or more items rise by item id all the way, or fall; and how many there are."""
    steps = [np.diff(sequence) for sequence in sequences if len(sequence) >= 3]
    rising, falling = (sum(bool((sign * step >= 0).all()) for step in steps) for sign in (1, -1))
    return max(rising, falling), len(steps)


def order_lost(sequences: list[np.ndarray]) -> str | None:
    """A warning where nearly every sequence is sorted by item id: some published files have lost the order in time."""
    found, long = sorted_sequences(sequences)
    if long < 20 or found <= 0.9 * long:
        return None
    return (
        f"{found} of {long} sequences are sorted by item id. The order in time seems to be lost; next-item scores on "
        "such data mean little"
    )


def _warn_if_sorted(folder: Path, sequences: list[np.ndarray]) -> None:
    if warning := order_lost(sequences):
        warnings.warn(f"{folder}: {warning}", stacklevel=3)


def _read_embeddings(folder: Path, num_items: int) -> np.ndarray | None:
    path = folder / "embeddings.npy"
    if not path.is_file():
        others = sorted(folder.glob("*.npy"))
        if len(others) > 1:
            raise DataError(
                f"{folder}: {len(others)} .npy files ({', '.join(file.name for file in others)}) and none is called "
                "embeddings.npy. Rename the one to use"
            )
        if not others:
            return None
        path = others[0]
    return check_embeddings(path, read_array(path), num_items)


def check_embeddings(path: Path, array: np.ndarray, num_items: int) -> np.ndarray:
    """Float32 rows, one an item, all finite; DataError otherwise."""
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
        raise DataError(f"{path}: {array.dtype} array of shape {list(array.shape)}; a float array [items, D] is needed")
    if len(array) != num_items:
        raise DataError(
            f"{path}: {len(array)} rows, but items.csv has {num_items} items. Give one row an item, row = item_id - 1"
        )
    array = np.ascontiguousarray(array, np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise DataError(
            f"{path}: row {bad[0]} (item {bad[0] + 1}) holds NaN or infinity, and so do {len(bad) - 1} other rows. "
            "Embeddings must be finite"
        )
    return array
