"""What a run is made of: typed dataclasses, and the YAML file that says the same.

A YAML file holds the fields that differ from the defaults, nested as here:

    kind: vqvae
    data: {source: fashion-mnist}
    model: {quantizer: residual, codebook_size: 64, options: {num_quantizers: 2}}
    train: {steps: 2000, lr: 1e-3}
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import DataError

try:
    import yaml
except ImportError:
    raise ImportError("configuration files need pyyaml. Run: pip install 'vqkernels[images]'") from None

NAMES = {"vqvae": "VQ-VAE", "vqgan": "VQ-GAN", "prior": "Prior"}
KINDS = tuple(NAMES)
PRECISIONS = ("no", "bf16", "fp16")


@dataclass
class DataConfig:
    """``source``: fashion-mnist, fashion-mnist-subset, emoji or a folder of images. ``size``: pixels each way; None: as
    the source has them. ``workers``: processes that read images; 0: the training process itself."""

    source: str = "fashion-mnist"
    size: int | None = None
    augment: bool = False
    workers: int = 0


@dataclass
class ModelConfig:
    """Arguments of ``VQVAE``; ``options``: further ones of the quantizer's layer."""

    width: int = 64
    downsample: int = 4
    dim: int = 32
    codebook_size: int = 256
    quantizer: str = "vq"
    estimator: str = "rotation"
    beta: float = 0.25
    options: dict = field(default_factory=dict)


@dataclass
class GANConfig(ModelConfig):
    """Arguments of ``VQGAN``. ``discriminator_start``: the optimizer step from which the discriminator takes part."""

    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.8
    discriminator_width: int = 32
    discriminator_layers: int = 2
    discriminator_start: int = 500


@dataclass
class PriorConfig:
    """Arguments of ``Prior``. ``tokenizer``: the run folder of the VQVAE or VQGAN whose codes are learned, on its own
    data unless others are named; the run keeps a copy. ``condition``: "auto" (what the data have), "class", "text" or
    "none"."""

    tokenizer: str | None = None
    condition: str = "auto"
    width: int = 128
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1


@dataclass
class TrainConfig:
    """``steps``: of the optimizer (AdamW, ``lr`` after ``warmup`` steps, then a cosine down to 0). ``batch_size``:
    images a step and process, in ``accumulate`` parts. ``clip``: largest norm of the gradient; 0: any. ``ema``: decay
    of the average of the weights that is kept in the end; 0: the last weights. ``precision``: no (float32), bf16 or
    fp16. Every ``log_every`` steps a record goes to metrics.jsonl, every ``checkpoint_every`` all state to the disk,
    every ``evaluate_every`` the loss on ``evaluate_images`` held-out images. ``patience``: evaluations without a new
    best after which training stops, and the best weights are kept; 0: never, and the last ones are. ``deterministic``:
    only operations whose result never varies from run to run. ``tensorboard``: event files beside metrics.jsonl."""

    steps: int = 1500
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.99
    precision: str = "no"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    evaluate_every: int = 250
    evaluate_images: int = 1024
    patience: int = 0
    deterministic: bool = False
    tensorboard: bool = False


@dataclass
class RunConfig:
    kind: str = "vqvae"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig | GANConfig | PriorConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        _one_of("kind", self.kind, KINDS)
        _one_of("train.precision", self.train.precision, PRECISIONS)
        counts = (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "evaluate_every",
            "evaluate_images",
        )
        for names, least in ((counts, 1), (("warmup", "weight_decay", "clip", "patience"), 0)):
            for name in names:
                if not getattr(self.train, name) >= least:
                    raise DataError(f"train.{name} is {getattr(self.train, name)}; {least} or more is needed")
        if not 0 < self.train.lr < float("inf"):
            raise DataError(f"train.lr is {self.train.lr}; a number above 0 is needed")
        if self.train.batch_size % self.train.accumulate:
            raise DataError(
                f"train.batch_size is {self.train.batch_size}, no multiple of train.accumulate "
                f"({self.train.accumulate}), which cuts it into equal parts"
            )
        if not 0 <= self.train.ema < 1:
            raise DataError(f"train.ema is {self.train.ema}; 0 (no average) to below 1 is allowed")
        if self.kind == "prior":
            _one_of("model.condition", self.model.condition, ("auto", "class", "text", "none"))


MODELS = {"vqvae": ModelConfig, "vqgan": GANConfig, "prior": PriorConfig}


def default_config(kind: str) -> RunConfig:
    """A run of a few minutes on Fashion-MNIST and two processor cores."""
    return config_from_dict({"kind": kind})


def config_from_dict(values: dict) -> RunConfig:
    """DataError names the key that is unknown or of the wrong type, and what is allowed."""
    if not isinstance(values, dict):
        raise DataError(f"a configuration is a mapping of {', '.join(_names(RunConfig))}, not {values!r}")
    kind = values.get("kind", "vqvae")
    _one_of("kind", kind, KINDS)
    config = convert({"model": {}} | values, RunConfig, "", model=MODELS[kind])
    if kind == "prior" and config.model.tokenizer is not None and "data" not in values:
        data = load_config(Path(config.model.tokenizer) / "config.yaml").data
        config.data = dataclasses.replace(data, augment=False)
    return config


def config_to_dict(config: RunConfig) -> dict:
    return dataclasses.asdict(config)


def read_yaml(path) -> dict:
    """What a YAML file says, not yet checked."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no configuration file {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no YAML file: {error}") from None
    return {} if values is None else values


def load_config(path) -> RunConfig:
    """Reads a YAML file."""
    values = read_yaml(path)
    try:
        return config_from_dict(values)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def with_changes(values: dict, changes: list[str]) -> dict:
    """Sets keys by their dotted names: ``train.lr=1e-3``. The value is read as YAML."""
    for change in changes:
        path, equals, text = change.partition("=")
        *sections, name = path.strip().split(".")
        if not equals or not all((*sections, name)):
            raise DataError(f"{change!r} is no setting; write it as in train.lr=0.001")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise DataError(f"{change!r}: {section} is a value, not a section")
        try:
            inner[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise DataError(f"{change!r}: {error}") from None
    return values


def dump_config(config: RunConfig) -> str:
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def _names(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")


def convert(value: Any, kind: Any, key: str, **nested: type) -> Any:
    """value as the type ``kind``, or a DataError that names ``key``. ``nested``: classes of fields that may have
    several."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise DataError(f"{key} is {value!r}; a mapping of {', '.join(_names(kind))} is needed")
        hints = typing.get_type_hints(kind) | nested
        for name in value:
            if name not in _names(kind):
                where = f" in {key}" if key else ""
                raise DataError(f"unknown key {name!r}{where}; there are: {', '.join(_names(kind))}")
        return kind(**{name: convert(v, hints[name], f"{key}.{name}".lstrip(".")) for name, v in value.items()})
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = kind.__args__[0]  # all are "something | None"
    if kind is float and isinstance(value, str):  # YAML reads 1e-3, without a point, as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", dict: "a mapping"}
        raise DataError(f"{key} is {value!r}; {words[kind]} is needed")
    return value
