"""What is trained on what: a VQVAE or VQGAN on images, a prior on the codes that one of them gives to images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data import DataError, embed_texts, image_source
from ..data.catalogue import write_atomic
from ..data.progress import progress_bar
from .config import RunConfig
from .runs import CONFIG, METRICS, WEIGHTS, build_model, load_run

ENCODE_IMAGES = 256  # at a time


class Losses(NamedTuple):
    """``loss`` () to be minimised, named scalars for the record, and the codes whose use it shows."""

    loss: Tensor
    scalars: dict[str, Tensor]
    indices: Tensor | None


class ImageTask:
    """Reconstruct images."""

    def __init__(self, config: RunConfig, source, folder: Path, device: torch.device, progress=None):
        self.config = config
        self.train, self.test = open_sources(config, source)
        self.facts = {"channels": self.train.channels, "classes": self.train.classes}
        self.model = build_model(config, self.facts)
        image = self.train[0]["image"]
        step = config.model.downsample
        if image.shape[1] % step or image.shape[2] % step:
            raise DataError(
                f"images of {image.shape[2]} x {image.shape[1]} pixels do not divide by model.downsample={step}. "
                f"Set data.size to a multiple of {step}"
            )

    def losses(self, model: nn.Module, batch: dict, step: int) -> Losses:
        options = {}
        if self.config.kind == "vqgan":
            options["adversarial"] = step >= self.config.model.discriminator_start
        out = model(batch["image"], **options)._asdict()
        indices = out["indices"]
        scalars = {name: value.detach() for name, value in out.items() if value.dim() == 0}
        return Losses(out["loss"], scalars, indices)

    def usage(self, indices: Tensor) -> dict[str, float]:
        use = self.model.usage(indices)
        return {"usage": float(use.used.mean()), "perplexity": float(use.perplexity.mean())}


class PriorTask:
    """Predict the codes of images, given their classes or texts."""

    def __init__(self, config: RunConfig, source, folder: Path, device: torch.device, progress=None):
        tokenizer = tokenizer_of(config, folder)
        train, test = open_sources(config, source)
        condition = train.condition if config.model.condition == "auto" else config.model.condition
        if condition not in (None, "none", train.condition):
            raise DataError(
                f"model.condition is {condition!r}, but {config.data.source} has "
                f"{'labels of kind ' + repr(train.condition) if train.condition else 'no labels'}"
            )
        condition = None if condition == "none" else condition
        self.train, self.test = (
            encoded(tokenizer.to(device), images, condition, config, progress) for images in (train, test)
        )
        codes, conditions = self.train.codes, self.train.conditions
        self.facts = {
            "codebook_size": tokenizer.codebook_size,
            "shape": list(codes.shape[1:]),
            "classes": list(train.classes) if condition == "class" else None,
            "text_dim": conditions.shape[1] if condition == "text" else None,
        }
        self.model = build_model(config, self.facts)

    def losses(self, model: nn.Module, batch: dict, step: int) -> Losses:
        loss = model(batch["codes"], batch.get("condition")).loss
        return Losses(loss, {"loss": loss.detach()}, None)


def open_sources(config: RunConfig, source=None):
    """The images to train on and those held out. ``source``: a data set object in place of the configuration's."""
    data = config.data
    make = lambda split, augment: image_source(  # noqa: E731
        data.source if source is None else source, split, data.size, augment, config.train.seed
    )
    return make("train", data.augment), make("test", False)


def tokenizer_of(config: RunConfig, folder: Path) -> nn.Module:
    """The tokenizer of a prior's run; the first call copies it into the folder, so that the run stands alone."""
    own = folder / "tokenizer"
    if not (own / WEIGHTS).is_file():
        if config.model.tokenizer is None:
            raise DataError(
                "a prior needs the run of a trained VQVAE or VQGAN, whose codes it learns. Train one with 'vqkernels "
                "train vqvae --out DIR' and give --tokenizer DIR, or set model.tokenizer"
            )
        given = Path(config.model.tokenizer)
        model, tokenizer_config = load_run(given)
        if tokenizer_config.kind == "prior":
            raise DataError(f"{given} is the run of a prior. Give that of a VQVAE or VQGAN as the tokenizer")
        own.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, METRICS, WEIGHTS):  # the weights last: where they are, all is
            write_atomic(own / name, (given / name).read_bytes())
        return model
    return load_run(own)[0]


class Codes(Dataset):
    """Codes int64 [N, ...] and, if there are any, conditions [N] or [N, D]."""

    def __init__(self, codes: Tensor, conditions: Tensor | None):
        self.codes, self.conditions = codes, conditions

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict:
        item = {"codes": self.codes[index]}
        return item if self.conditions is None else item | {"condition": self.conditions[index]}


def encoded(tokenizer: nn.Module, images, condition: str | None, config: RunConfig, progress=None) -> Codes:
    if images[0]["image"].shape[0] != tokenizer.channels:
        raise DataError(
            f"{config.data.source} has images of {images[0]['image'].shape[0]} channels, the tokenizer was trained on "
            f"{tokenizer.channels}. Give it images like those"
        )
    device = next(tokenizer.parameters()).device
    codes, labels = [], []
    with progress_bar(progress, "Encoding images", len(images)) as advance:
        for batch in DataLoader(images, ENCODE_IMAGES, num_workers=config.data.workers, generator=torch.Generator()):
            codes.append(tokenizer.encode(batch["image"].to(device)).cpu())
            labels.extend(batch["label"])
            advance(len(batch["image"]))
    conditions = None
    if condition == "class":
        conditions = torch.stack(labels)
    elif condition == "text":
        conditions = embed(labels, progress)
    return Codes(torch.cat(codes), conditions)


def embed(texts: list[str], progress=None) -> Tensor:
    """Vectors of texts, float32 [N, D], the same for a text whatever stands beside it."""
    return torch.from_numpy(embed_texts(texts, "minilm", progress=progress)[0])
