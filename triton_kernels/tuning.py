"""Tile sizes, warps and stages of the Triton kernels: by chip, operator and key.

    config("nearest_codeword", "bfloat16 D64") -> {"ROWS": 128, "CODES": 64, ..., "num_warps": 8, "num_stages": 3}

A table is {op: {key: {name: number}}}; a launcher makes the key from its dtype and its classes of D and K, never from
N, and "*" serves every other key of the op. The first table that has the op with the key, or with "*", wins:

    1. what `vqkernels tune` measured on this very card, in user_file(): $VQK_TUNING, or vqkernels/tuning.json in the
       user's cache folder ($XDG_CACHE_HOME, else ~/.cache)
    2. configs/<chip>.json: sm_80, sm_89, sm_90, sm_100, sm_120, gfx942
    3. configs/default.json: small enough for every chip; other chips, the interpreter, tracing without a GPU

NOTHING in the shipped tables has been timed. They were chosen from what the compiler reports for each chip: no spills,
shared memory within the chip, registers that leave room for the stated number of blocks (docs/triton-report.md).
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDER = Path(__file__).parent / "configs"
FORMAT = "vqkernels-tuning-1"
_override: list[dict] = []


def config(op: str, key: str) -> dict[str, int]:
    """The numbers that the launcher of ``op`` should use for ``key``, on the current device."""
    if _override:
        return dict(_find((*reversed(_override), _shipped("default")), op, key))
    return dict(_config(_device(), op, key))


def registers(most: int) -> dict[str, int]:
    """The launch option that lets a lane have ``most`` registers; {} without one: AMD, the interpreter, tracing.
    Left to itself, NVIDIA's assembler gives blocks of one or two warps few of them and spills."""
    device = _device()
    return {"maxnreg": most} if device is not None and _chip(device).startswith("sm_") else {}


@contextmanager
def using(table: dict) -> Iterator[None]:
    """Inside, ``config`` answers from ``table``, and from the default table where that has no row for an op."""
    _override.append(table)
    try:
        yield
    finally:
        _override.remove(table)


def default() -> dict:
    """The table that suits every chip."""
    return _shipped("default")


@functools.cache
def preference(op: str) -> tuple[str, ...]:
    """The backends of ``op`` from fastest to slowest as `vqkernels tune` measured them on this process's card; () where
    it did not run. Needs no triton."""
    name = card()
    return tuple(load().get(name, {}).get("preference", {}).get(op, ())) if name else ()


def user_file() -> Path:
    """Where `vqkernels tune` writes and this module reads."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VQK_TUNING") or Path(cache) / "vqkernels" / "tuning.json")


def load() -> dict:
    """{card: {"configs": table, "preference": {op: [backend, ...]}}} of the user's file; {} where there is none."""
    path = user_file()
    if not path.is_file():
        return {}
    advice = "delete it, point VQK_TUNING elsewhere, or write it anew with: vqkernels tune"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {advice}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'{path} is no tuning file of vqkernels: it has no "format": "{FORMAT}"; {advice}')
    cards = content.get("cards")
    try:
        for card in cards.values():
            if not all(isinstance(backend, str) for order in card["preference"].values() for backend in order):
                raise TypeError
            for rows in card["configs"].values():
                for row in rows.values():
                    if not row or not all(type(value) is int for value in row.values()):
                        raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: its cards do not have the form that tune writes; {advice}") from None
    return cards


def save(cards: dict) -> Path:
    """Writes the user's file in one step: a reader, and an interrupted write, see the old file or the new one."""
    path = user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"format": FORMAT, "cards": cards}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    for cached in (_config, _measured, preference):
        cached.cache_clear()
    return path


def card(device=None) -> str | None:
    """The name of the GPU that ``device`` is, as the user's file keeps it; None without one."""
    import torch

    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else None


def _device():
    """The current device's number; the chip's name inside offline.compiled_for; None where nothing is launched."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    import triton

    try:
        return triton.runtime.driver.active.get_current_device()
    except RuntimeError:  # no driver: a graph is traced on a machine without a GPU
        return None


@functools.cache
def _chip(device) -> str:
    import triton

    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


@functools.cache
def _shipped(name: str) -> dict:
    path = _FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def _measured(device) -> dict:
    return load().get(card(device), {}) if isinstance(device, int) else {}


@functools.cache
def _config(device, op: str, key: str) -> dict[str, int]:
    tables = [_shipped("default")]
    if device is not None:
        measured, chip = _measured(device).get("configs", {}), _shipped(_chip(device))
        tables = [measured, chip, *tables]
        if not measured and not chip:
            _say_untuned(_chip(device))
    return _find(tables, op, key)


def _find(tables, op: str, key: str) -> dict[str, int]:
    for table in tables:
        rows = table.get(op, {})
        row = rows.get(key) or rows.get("*")
        if row:
            return row
    raise KeyError(f"no tuning table has a row for {op} {key!r}; configs/default.json needs one with the key '*'")


@functools.cache
def _say_untuned(chip: str) -> None:
    warnings.warn(
        f"vqkernels: no tuning table for {chip}, its Triton kernels run with safe default tiles;"
        " `vqkernels tune` measures better ones on this card",
        stacklevel=4,
    )
