"""Training state on disk: tensors and numbers in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .catalogue import DataError, write_atomic

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save
except ImportError:
    raise ImportError("models are saved with safetensors. Run: pip install 'vqkernels[models]'") from None

STATE = "checkpoint/state.safetensors"


def save_state(folder: Path, tensors: dict[str, dict[str, Tensor]], numbers: dict) -> None:
    """``tensors``: groups of them by name."""
    flat = {f"{group}|{name}": value for group, values in tensors.items() for name, value in values.items()}
    (folder / STATE).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / STATE, flat, "numbers", numbers)


def load_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
    """What ``save_state`` wrote, or None where it did not come to that."""
    if not (folder / STATE).is_file():
        return None
    flat, numbers = read_tensors(folder / STATE, "numbers")
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        group, name = key.split("|", 1)
        tensors.setdefault(group, {})[name] = value
    return tensors, numbers


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{place}.{name}": value for place, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        place, name = key.split(".", 1)
        state.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_tensors(path: Path, tensors: dict[str, Tensor], key: str, facts: dict) -> None:
    """Tensors and, under ``key``, what JSON can say of them."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomic(path, save(plain, {key: json.dumps(facts)}))


def read_tensors(path: Path, key: str) -> tuple[dict[str, Tensor], dict]:
    """What ``write_tensors`` wrote. DataError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()[key])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged or not from vqkernels train ({error!r}). Train again") from None
