"""Published data sets as they come: a reader for each format, all giving the same raw interactions and item texts."""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .catalogue import DataError
from .lines import fail, read_csv, read_json, read_json_lines, read_lines

LATEST = 1e14  # no timestamp in seconds, milliseconds or microseconds of this century is larger
GENRES = (
    "unknown,Action,Adventure,Animation,Children's,Comedy,Crime,Documentary,Drama,Fantasy,Film-Noir,Horror,Musical,"
    "Mystery,Romance,Sci-Fi,Thriller,War,Western"
).split(",")
SCRIPT = re.compile(r"\bfunction\s*\(|\bvar\s+\w+\s*=|\bgetTime\(|\bP\.when\(|\{\s*[\w-]+\s*:[^}]*[;}]")


@dataclass
class Raw:
    """Interactions in the order of the files, ``times`` empty where the format has none; ``titles`` and ``texts`` by
    the items' own ids, for those that have any; ``index``: published semantic IDs by item id."""

    users: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    index: Path | None = None

    def add(self, path: Path, line: int, user, item, time=None) -> None:
        for name, value in (("user", user), ("item", item)):
            if not isinstance(value, str) or not value or any(map(str.isspace, value)):
                fail(path, line, f"{name} {value!r} is not a name without white space", "Give each a name of its own")
        if time is not None:
            try:
                time = float(time) if not isinstance(time, bool) else -1.0
            except (TypeError, ValueError, OverflowError):
                fail(path, line, f"timestamp {time!r} is not a number", "Give seconds or milliseconds since 1970")
            if not 0 <= time < LATEST:
                fail(
                    path,
                    line,
                    f"timestamp {time!r} is not a time since 1970",
                    "Give seconds or milliseconds since 1970",
                )
            self.times.append(time)
        self.users.append(user)
        self.items.append(item)

    def describe(self, path: Path, line: int, item, title: str, *parts: str) -> None:
        """What is known of an item; the first description that says something counts."""
        if not isinstance(item, str) or not item or any(map(str.isspace, item)):
            fail(path, line, f"item {item!r} is not a name without white space", "Give each item a name of its own")
        text = ". ".join(part for part in (title, *parts) if part)
        if text and item not in self.texts:
            self.titles[item], self.texts[item] = title, text


def clean(text: str) -> str:
    """Text of a web page to plain words: entities resolved, also those encoded twice, tags and scripts taken out."""
    text = html.unescape(html.unescape(text))
    text = re.sub(r"<(script|style)\b.*?</\1\s*>|</?[a-zA-Z!][^<>]*>", " ", text, flags=re.S | re.I)
    return "" if SCRIPT.search(text) else " ".join(text.split())


# ---------------------------------------------------------------- Amazon


def amazon2014(raw: Raw, interactions: list[Path], items: list[Path]) -> None:
    for path in interactions:
        if _is_csv(path):
            _ratings(raw, path, user_first=True)
        else:
            _reviews(raw, path, "reviewerID", "asin", "unixReviewTime")
    for path in items:
        _meta(raw, path, ast.literal_eval, "asin", "brand", "categories")


def amazon2018(raw: Raw, interactions: list[Path], items: list[Path]) -> None:
    for path in interactions:
        if _is_csv(path):
            _ratings(raw, path, user_first=False)
        else:
            _reviews(raw, path, "reviewerID", "asin", "unixReviewTime")
    for path in items:
        _meta(raw, path, json.loads, "asin", "brand", "category")


def amazon2023(raw: Raw, interactions: list[Path], items: list[Path]) -> None:
    for path in interactions:
        if _is_csv(path):
            _table(raw, path, read_csv(path), "user_id", "parent_asin", "timestamp")
        else:
            _reviews(raw, path, "user_id", "parent_asin", "timestamp")
    for path in items:
        _meta(raw, path, json.loads, "parent_asin", "store", "categories")


def _is_csv(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".csv")


def _reviews(raw: Raw, path: Path, user: str, item: str, time: str) -> None:
    for line, record in read_json_lines(path):
        missing = [key for key in (user, item, time) if record.get(key) is None]
        if missing:
            fail(path, line, f"{', '.join(missing)} missing (it has {_some(record)})", "Give the format of the file")
        raw.add(path, line, record[user], record[item], record[time])


def _ratings(raw: Raw, path: Path, user_first: bool) -> None:
    order = "user,item,rating,timestamp" if user_first else "item,user,rating,timestamp"
    suspicious = 0
    for line, row in read_csv(path):
        if len(row) != 4:
            fail(path, line, f"{len(row)} columns", f"A row is {order}, without a header")
        user, item = row[:2] if user_first else (row[1], row[0])
        raw.add(path, line, user, item, row[3])
        suspicious += len(user) == 10 < len(item)  # items have 10 characters, users 13 or 14
        if line == 20 and suspicious == 20:
            other = "amazon2018" if user_first else "amazon2014"
            fail(path, line, f"users and items seem to be swapped (user {user!r}, item {item!r})", f"Try {other}")


def _meta(raw: Raw, path: Path, parse: Callable, key: str, brand: str, categories: str) -> None:
    for line, record in read_json_lines(path, parse):
        words = [_words(path, line, record, name) for name in ("title", brand, categories)]
        title, maker, kinds = clean(" ".join(words[0])), clean(" ".join(words[1])), map(clean, words[2])
        kinds = ", ".join(dict.fromkeys(kind for kind in kinds if kind))
        raw.describe(path, line, record.get(key), title, re.sub(r"^by\b\s*", "", maker, flags=re.I), kinds)


def _words(path: Path, line: int, record: dict, name: str) -> list[str]:
    """The strings in a field, however deeply it nests them."""
    found, left = [], [record.get(name)]
    while left:
        value = left.pop(0)
        if isinstance(value, (list, tuple)):
            left[:0] = value
        elif isinstance(value, str):
            found.append(value)
        elif value is not None:
            fail(path, line, f"{name} holds a {type(value).__name__}: {value!r:.50}", "Give text or lists of text")
    return found


# ---------------------------------------------------------------- tables with headers: RecBole, MovieLens


def recbole(raw: Raw, interactions: list[Path], items: list[Path]) -> None:
    for path in interactions:
        _table(raw, path, _atomic(path), "user_id", "item_id", "timestamp", time_needed=False)
    for path in items:
        rows = _atomic(path)
        _, header = next(rows, (1, []))
        if "item_id" not in header:
            fail(path, 1, f"no column item_id:token ({', '.join(header)})", "The header names every column")
        title_at = next((i for i, name in enumerate(header) if "title" in name or "name" in name), None)
        key = header.index("item_id")
        for line, row in rows:
            title = clean(row[title_at]) if title_at is not None else ""
            others = (clean(cell) for i, cell in enumerate(row) if i not in (key, title_at))
            raw.describe(path, line, row[key], title, *others)


def _atomic(path: Path):
    """The header's names, then the rows, tab separated, of a RecBole file."""
    kinds = ("token", "token_seq", "float", "float_seq")
    header: list[str] = []
    for line, text in read_lines(path):
        row = text.rstrip("\r\n").split("\t")
        if not header:
            wrong = [cell for cell in row if cell.partition(":")[2] not in kinds]
            if wrong:
                fail(path, line, f"header column {wrong[0]!r} is not name:type", f"Types are {', '.join(kinds)}")
            header = row
            yield line, [cell.partition(":")[0] for cell in header]
            continue
        if len(row) != len(header):
            fail(path, line, f"{len(row)} columns, but the header has {len(header)}", "Separate columns by one tab")
        numbers = [c for c, h in zip(row, header, strict=True) if h.endswith(":float") and c and not _is_number(c)]
        if numbers:
            fail(path, line, f"{numbers[0]!r} is not a number", "A column of type float holds numbers")
        yield line, row


def _table(raw: Raw, path: Path, rows, user: str, item: str, time: str, time_needed: bool = True) -> None:
    """Interactions in a table whose first row names the columns."""
    line, header = next(rows, (1, []))
    missing = [name for name in (user, item, time) if name not in header and (name != time or time_needed)]
    if missing:
        fail(
            path, line, f"no column {', '.join(missing)} in the header ({', '.join(header)})", "Give the file's format"
        )
    columns = [header.index(name) for name in (user, item)]
    time_at = header.index(time) if time in header else None
    for line, row in rows:
        if len(row) != len(header):
            fail(path, line, f"{len(row)} columns, but the header has {len(header)}", "Give each row all columns")
        raw.add(path, line, *(row[i] for i in columns), None if time_at is None else row[time_at])


def movielens(raw: Raw, interactions: list[Path], items: list[Path]) -> None:
    for path in interactions:
        if path.name == "ratings.csv":
            _table(raw, path, read_csv(path), "userId", "movieId", "timestamp")
            continue
        separator = "\t" if path.name == "u.data" else "::"
        for line, row in _split(path, separator, 4, "user, item, rating, timestamp"):
            raw.add(path, line, row[0], row[1], row[3])
    for path in items:
        if path.name == "movies.csv":
            rows = read_csv(path)
            line, header = next(rows, (1, []))
            if header != ["movieId", "title", "genres"]:
                fail(path, line, f"the header is {','.join(header)!r}", "It must be movieId,title,genres")
        elif path.name == "movies.dat":
            rows = _split(path, "::", 3, "id, title, genres")
        else:
            rows = _split(path, "|", 24, "id, title, two dates, address and 19 genre flags")
        for line, row in rows:
            if len(row) < 3:
                fail(path, line, f"{len(row)} columns", "A row is movieId,title,genres")
            flags = zip(GENRES, row[5:], strict=False)
            genres = [name for name, flag in flags if flag == "1"] if path.name == "u.item" else row[2].split("|")
            raw.describe(path, line, row[0], " ".join(row[1].split()), ", ".join(genres))


def _split(path: Path, separator: str, columns: int, names: str):
    for line, text in read_lines(path, "latin-1"):
        row = text.rstrip("\r\n").split(separator)
        if len(row) != columns:
            fail(path, line, f"{len(row)} columns", f"A row is {names}, separated by {separator!r}")
        yield line, row


# ---------------------------------------------------------------- files of research code: no times, oldest first


def s3rec(raw: Raw, interactions: list[Path], items: list[Path]) -> None:
    seen: dict[str, int] = {}
    for path in interactions:
        for line, text in read_lines(path):
            user, *sequence = text.split()
            if not sequence:
                fail(path, line, f"user {user!r} has no items", "A line is 'user item item ...', oldest item first")
            if user in seen:
                fail(path, line, f"user {user!r} was already on line {seen[user]}", "Give each user one line")
            seen[user] = line
            for item in sequence:
                raw.add(path, line, user, item)


def sasrec(raw: Raw, interactions: list[Path], items: list[Path]) -> None:
    for path in interactions:
        for line, text in read_lines(path):
            row = text.split()
            if len(row) != 2:
                fail(path, line, f"{len(row)} columns", "A line is 'user item', a user's oldest item first")
            raw.add(path, line, *row)


def lcrec(raw: Raw, interactions: list[Path], items: list[Path]) -> None:
    for path in interactions:
        record, lines = read_json(path)
        for user, sequence in record.items():
            if not isinstance(sequence, list) or any(type(item) not in (int, str) for item in sequence):
                fail(path, lines.of(user), f"user {user!r} has no list of items", "A value is [item, item, ...]")
            for item in sequence:
                raw.add(path, lines.of(user), user, str(item))
    for path in items:
        if path.name.endswith(".index.json"):
            raw.index = path
            continue
        record, lines = read_json(path)
        for item, fields in record.items():
            if not isinstance(fields, dict):
                fail(path, lines.of(item), f"item {item!r} has no object", 'A value is {"title": ..., "brand": ...}')
            words = [" ".join(_words(path, lines.of(item), fields, name)) for name in ("title", "brand", "categories")]
            raw.describe(path, lines.of(item), item, *map(clean, words))


FORMATS: dict[str, tuple[Callable, str, str]] = {
    # name: (reader, pattern of the files with interactions, pattern of those with items)
    "amazon2014": (amazon2014, r"(?!meta_).*\.(json|csv)(\.gz)?", r"meta_.*\.json(\.gz)?"),
    "amazon2018": (amazon2018, r"(?!meta_).*\.(json|csv)(\.gz)?", r"meta_.*\.json(\.gz)?"),
    "amazon2023": (amazon2023, r"(?!meta_).*\.(jsonl|csv)(\.gz)?", r"meta_.*\.jsonl(\.gz)?"),
    "recbole": (recbole, r".*\.inter", r".*\.item"),
    "movielens": (movielens, r"u\.data|ratings\.(dat|csv)", r"u\.item|movies\.(dat|csv)"),
    "s3rec": (s3rec, r".*\.txt(\.gz)?", r"$^"),
    "sasrec": (sasrec, r".*\.txt(\.gz)?", r"$^"),
    "lcrec": (lcrec, r".*\.inter\.json", r".*\.(item|index)\.json"),
}


def read_raw(sources: list, format: str) -> Raw:
    """Read files, or all files of a folder that the format knows by name."""
    if format not in FORMATS:
        raise DataError(f"format {format!r} is unknown. Use one of {', '.join(FORMATS)}")
    read, interactions, items = FORMATS[format]
    paths = [Path(source) for source in sources]
    for path in paths:
        if path.suffix in (".pkl", ".pickle", ".pt", ".pth"):
            raise DataError(f"{path}: pickles are refused, since loading one can run any code. Convert it first")
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    found = [file for path in paths for file in (sorted(path.iterdir(), key=_split_order) if path.is_dir() else [path])]
    chosen = [[file for file in found if re.fullmatch(pattern, file.name)] for pattern in (interactions, items)]
    odd = [path for path in paths if path.is_file() and path not in chosen[0] + chosen[1]]
    if odd or not chosen[0]:
        given = ", ".join(str(path) for path in odd or paths)
        raise DataError(
            f"{given}: no file with interactions in format {format} is there by its name. Such files match "
            f"{interactions}" + ("" if items == "$^" else f", those with items {items}")
        )
    if len({_is_csv(path) for path in chosen[0]}) > 1 or (format in ("movielens", "lcrec") and len(chosen[0]) > 1):
        raise DataError(f"{', '.join(map(str, chosen[0]))}: the same interactions in two files. Give one of them")
    raw = Raw()
    read(raw, *chosen)
    if not raw.users:
        raise DataError(f"{', '.join(map(str, chosen[0]))}: no interactions")
    return raw


def _split_order(path: Path) -> tuple:
    """What was split off for testing comes last: where times are equal, the order of the files decides."""
    return ".test." in path.name, ".valid." in path.name, path.name


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def _some(record: dict) -> str:
    return ", ".join(map(str, list(record)[:8])) or "nothing"
