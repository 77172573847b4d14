"""A run's folder: config.yaml, metrics.jsonl, model.safetensors and, to go on with, checkpoint/state.safetensors.

Every file is written whole or not at all, so a process that is killed leaves a folder that can be read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from torch import Tensor, nn

from ..data import DataError
from ..data.catalogue import write_atomic
from ..data.checkpoint import read_tensors, write_tensors
from ..models import VQGAN, VQVAE
from .config import RunConfig, dump_config, load_config

CONFIG, METRICS, WEIGHTS = "config.yaml", "metrics.jsonl", "model.safetensors"


def build_model(config: RunConfig, facts: dict) -> nn.Module:
    """The model of a configuration, with new weights. ``facts``: what the data say of it: ``channels``, or of a prior
    ``codebook_size``, ``shape``, ``classes`` (their names) and ``text_dim``."""
    options = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)}
    if config.kind == "prior":
        from ..models import Prior

        del options["tokenizer"], options["condition"]
        names = facts["classes"]
        options |= {"classes": len(names) if names else None, "text_dim": facts["text_dim"]}
        return Prior(facts["codebook_size"], facts["shape"], **options)
    options.pop("discriminator_start", None)
    extra = options.pop("options")
    both = sorted(set(extra) & (set(options) | {"channels"}))
    if both:
        raise DataError(f"model.options holds {', '.join(both)}, a key of model itself. Set it there")
    return (VQGAN if config.kind == "vqgan" else VQVAE)(facts["channels"], **options, **extra)


def save_model(folder: Path, state: dict[str, Tensor], facts: dict) -> None:
    write_tensors(folder / WEIGHTS, state, "facts", facts)


def load_run(folder) -> tuple[nn.Module, RunConfig]:
    """The model of a run folder, in eval mode on the CPU, and its configuration. ``model.facts`` holds what
    ``build_model`` was told by the data. DataError where files are missing or damaged."""
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise DataError(
            f"{folder} has no {WEIGHTS} yet. Let the training come to its first evaluation, or go on with "
            f"vqkernels train {config.kind} --out {folder} --resume"
        )
    state, facts = read_tensors(folder / WEIGHTS, "facts")
    model = build_model(config, facts)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {error}") from None
    model.facts = facts
    return model.eval(), config


def read_config(folder: Path) -> RunConfig:
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder} is no run: it has no {CONFIG}. Give the folder that vqkernels train wrote")
    return load_config(folder / CONFIG)


def write_config(folder: Path, config: RunConfig) -> None:
    write_atomic(folder / CONFIG, dump_config(config).encode())


def read_metrics(folder) -> list[dict]:
    """The records of metrics.jsonl; a last line that was cut off is left out."""
    path = Path(folder) / METRICS
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")  # what follows the last line end was not written to its end
    return [json.loads(line) for line in lines[:-1]]
