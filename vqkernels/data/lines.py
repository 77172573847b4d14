"""Files read line by line; every complaint names file and line."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from .catalogue import DataError


def fail(path: Path, line: int, problem: str, advice: str) -> NoReturn:
    raise DataError(f"{path}:{line}: {problem}. {advice}") from None


def read_lines(path: Path, encoding: str = "utf-8", empty: bool = False) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a plain or gzip file, empty lines left out unless ``empty``. Lines end
    at \\n alone."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, data in enumerate(file, 1):
                if number == 1:
                    data = data.removeprefix(codecs.BOM_UTF8)
                try:
                    line = data.decode(encoding)
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{data[error.start]:02x} is not {encoding.upper()}"
                    fail(path, number, byte, f"Convert the file to {encoding.upper()}")
                if "\0" in line:
                    fail(path, number, "holds a zero byte", "Fetch the file again; it is damaged or not a text")
                if empty or line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fail(path, number + 1, f"not a whole gzip file ({error})", "Fetch or compress it again")


def read_csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """(line number where the row begins, fields); quoted fields may run over several lines."""
    start = 0

    def lines():
        nonlocal start
        for number, line in read_lines(path):
            start = start or number
            yield line

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        start = 0
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            fail(path, start, f"not a CSV row ({error})", "Quote fields that hold commas, quotes or line ends")
        yield start, row


def read_json_lines(path: Path, parse=json.loads) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a file with one JSON object a line."""
    for number, line in read_lines(path):
        try:
            record = parse(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
            what = "Python literal" if parse is not json.loads else "JSON"
            fail(path, number, f"not {what} ({_short(error)})", "Each line is one object; remove or repair the line")
        if not isinstance(record, dict):
            fail(path, number, f"a {type(record).__name__}, not an object", "Each line is one object in braces")
        yield number, record


def read_json(path: Path) -> tuple[dict, JsonLines]:
    """A file that is one JSON object, and where its keys stand."""
    text = "".join(line for _, line in read_lines(path, empty=True))
    lines = JsonLines(text)

    def unique(pairs):
        record = dict(pairs)
        if len(record) < len(pairs):
            seen: set = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            fail(path, lines.of(twice, -1), f"{twice!r} is there twice", "Give each key one value")
        return record

    try:
        record = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        fail(path, error.lineno, f"not JSON ({error.msg})", "The file is one JSON object")
    except RecursionError:
        fail(path, 1, "not JSON that can be read (nested too deeply)", "The file is one JSON object")
    if not isinstance(record, dict):
        fail(path, 1, f"a {type(record).__name__}, not an object", "The file is one JSON object in braces")
    return record, lines


class JsonLines:
    """The line on which a key of a JSON text stands, by its first or its last place."""

    def __init__(self, text: str):
        self.text, self.places = text, None

    def of(self, key: str, which: int = 0) -> int:
        if self.places is None:
            self.places, line, end = {}, 1, 0
            for match in re.finditer(r'"((?:[^"\\]|\\.)*)"\s*:', self.text):
                line, end = line + self.text.count("\n", end, match.start()), match.start()
                self.places.setdefault(json.loads(f'"{match[1]}"'), []).append(line)
        return self.places[key][which]


def _short(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) < 100 else text[:97] + "..."
