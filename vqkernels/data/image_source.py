"""Images for training from one call, whatever they come from, read from disk when they are asked for."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .catalogue import DataError
from .emoji import emoji
from .images import CLASSES, fashion_mnist, fashion_mnist_subset

NAMES = ("fashion-mnist", "fashion-mnist-subset", "emoji")
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "test")
EVERY = 10  # of a source without splits, one image in ten is for the test


def image_source(source, split: str = "train", size: int | None = None, augment=False, seed: int = 0) -> ImageSource:
    """A data set of images: ``[i]`` is ``{"image": float32 [C, H, W] in [0, 1], "label": ...}``.

    Args:
        source: "fashion-mnist" (label: class), "fashion-mnist-subset" (800 images that come with this package, class),
            "emoji" (label: the Unicode name), a folder (of images, or of subfolders named after their classes; with
            subfolders ``train`` and ``test`` if it brings its own split), or a data set object as torchvision makes
            them: ``len()`` and ``[i]`` -> (PIL image, array or tensor; label).
        split: "train" or "test". Of a source without splits one image in ten is for the test. A data set object is
            taken whole, whatever the split.
        size: images are scaled, short side to ``size``, and their middle cut out. None: as they are; a folder's images
            are then to be of one shape.
        augment: True: flips, and slight turns, shifts and changes of scale; emoji are not flipped, for their names say
            left and right. Or a function of a batch [B, C, H, W] in [0, 1] that returns one.
        seed: of the augmentation.

    Images are decoded when asked for, so a folder may be larger than memory. Raises DataError, which names the file,
    for a folder without images and for a file that is not an image.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown. Use {' or '.join(map(repr, SPLITS))}")
    if not isinstance(source, (str, os.PathLike)):
        return _Wrapped(source, size, augment, seed)
    if source == "fashion-mnist":
        pixels, labels = fashion_mnist(split=split)
        return _Arrays(pixels, labels, CLASSES, size, augment, seed)
    if source == "fashion-mnist-subset":
        pixels, labels = fashion_mnist_subset()
        mine = _split(len(pixels), split)
        return _Arrays(pixels[mine], labels[mine], CLASSES, size, augment, seed)
    if source == "emoji":
        pictures, names = emoji()
        mine = _split(len(pictures), split)
        return _Pictures([pictures[i] for i in mine], [names[i] for i in mine], size, augment, seed)
    return _Folder(Path(source), split, size, augment, seed)


class ImageSource(Dataset):
    """What ``image_source`` returns.

    ``channels``: 1 or 3. ``condition``: what a label is, "class" (an int), "text" (a str) or None (always 0).
    ``classes``: the classes' names, where ``condition`` is "class". Augmentation is a function of seed, epoch
    (``set_epoch``) and the indices asked for, so a run that is resumed sees what an unbroken one would have seen.
    """

    channels: int = 3
    classes: tuple[str, ...] | None = None
    condition: str | None = None

    def __init__(self, size: int | None, augment, seed: int):
        if size is not None and size < 1:
            raise DataError(f"size is {size}; give the pixels of a side, 1 or more, or None")
        self.size, self.seed, self.epoch = size, seed, 0
        self.augment = (_Augmentation(flip=self.condition != "text") if augment is True else augment) or None

    def read(self, index: int) -> tuple[Tensor, int | str]:
        """One image, not scaled and not augmented, and its label."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """Several at once, as a DataLoader asks for them: augmentation then runs on the batch."""
        images, labels = zip(*map(self.read, indices), strict=True)
        if self.size is not None:
            images = [resize(image, self.size) for image in images]
        if self.augment is not None:
            if len({image.shape for image in images}) > 1:
                raise DataError(
                    "images of different shapes cannot be augmented together. Give a size, to which all are scaled"
                )
            key = hashlib.sha256(repr((self.seed, self.epoch, [int(i) for i in indices])).encode()).digest()
            with torch.random.fork_rng([]):
                torch.default_generator.manual_seed(int.from_bytes(key[:7], "big"))
                images = self.augment(torch.stack(images)).clamp(0, 1)
        return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]


class _Augmentation:
    """kornia's transforms, which take tensors of any number of channels and draw from torch's generator."""

    def __init__(self, flip: bool):
        try:
            from kornia import augmentation as K
        except ImportError:
            raise ImportError("augmentation is kornia's. Run: pip install 'vqkernels[images]'") from None
        transforms = [K.RandomHorizontalFlip(p=0.5)] if flip else []
        self.transforms = K.AugmentationSequential(
            *transforms,
            K.RandomAffine(degrees=5.0, translate=(0.05, 0.05), scale=(0.9, 1.1), padding_mode="border", p=0.8),
        )

    def __call__(self, images: Tensor) -> Tensor:
        return self.transforms(images)


class _Arrays(ImageSource):
    condition, channels = "class", 1

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], *options):
        self.pixels, self.labels, self.classes = pixels, labels, classes
        super().__init__(*options)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> tuple[Tensor, int]:
        return _tensor(self.pixels[index][..., None]), int(self.labels[index])


class _Pictures(ImageSource):
    condition = "text"

    def __init__(self, pictures: list[bytes], names: list[str], *options):
        self.pictures, self.names = pictures, names
        super().__init__(*options)

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> tuple[Tensor, str]:
        return _as_channels(_decode(io.BytesIO(self.pictures[index]), f"emoji {index}"), 3), self.names[index]


class _Folder(ImageSource):
    def __init__(self, folder: Path, split: str, *options):
        if not folder.is_dir():
            there = "is a file" if folder.exists() else "does not exist"
            raise DataError(f"{folder} {there}. Give a folder of images, or one of {', '.join(NAMES)}")
        own = all((folder / name).is_dir() for name in SPLITS)
        top = folder / split if own else folder
        folders = sorted(p for p in top.iterdir() if p.is_dir() and _has_images(p))
        loose = any(p.suffix.lower() in ENDINGS for p in top.iterdir())
        if folders and not loose:
            self.condition, self.classes = "class", tuple(p.name for p in folders)
            if own and self.classes != _class_names(folder / SPLITS[0]):
                raise DataError(
                    f"{folder}: train has the classes {', '.join(_class_names(folder / SPLITS[0]))}, {split} has "
                    f"{', '.join(self.classes)}. Give both the same subfolders"
                )
        files = sorted(p for p in top.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
        if not files:
            raise DataError(f"{top} holds no images. Files ending in {', '.join(ENDINGS)} are read, subfolders too")
        self.files = files if own else [files[i] for i in _split(len(files), split)]
        if not self.files:
            raise DataError(
                f"{top} holds one image, too few to keep one in {EVERY} for the test. Add more, or make subfolders "
                "train and test"
            )
        self.top, self.channels = top, 1 if read_image(self.files[0]).shape[0] == 1 else 3
        super().__init__(*options)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        label = self.classes.index(file.relative_to(self.top).parts[0]) if self.classes else 0
        return _as_channels(read_image(file), self.channels), label


class _Wrapped(ImageSource):
    def __init__(self, dataset, *options):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or not len(dataset):
            raise DataError(
                f"source is {type(dataset).__name__}; give one of {', '.join(NAMES)}, a folder, or a data set object "
                "with len() > 0 and [i] -> (image, label)"
            )
        self.dataset = dataset
        image, label = self._pair(0)
        self.channels = 1 if image.shape[0] == 1 else 3
        self.condition = "text" if isinstance(label, str) else "class"
        names = getattr(dataset, "classes", None)
        if self.condition == "class":
            if names is None:
                names = map(str, range(1 + max(int(self.dataset[i][1]) for i in range(len(dataset)))))
            self.classes = tuple(names)
        super().__init__(*options)

    def _pair(self, index: int) -> tuple[Tensor, int | str]:
        image, label = self.dataset[index]
        if isinstance(image, Tensor):
            image = image.float() / 255 if image.dtype == torch.uint8 else image
        else:
            array = np.asarray(image)
            image = _tensor(array if array.ndim == 3 else array[..., None])
        if image.dim() != 3 or image.shape[0] not in (1, 3, 4):
            raise DataError(
                f"{type(self.dataset).__name__}[{index}]: an image of shape {list(image.shape)}; a PIL image, an array "
                "[H, W(, C)] or a tensor [C, H, W] with 1, 3 or 4 channels is needed"
            )
        return image, label if isinstance(label, str) else int(label)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Tensor, int | str]:
        image, label = self._pair(index)
        return _as_channels(image, self.channels), label


def read_image(path) -> Tensor:
    """An image file as float32 [C, H, W] in [0, 1]: C is 1 (grey, of 8 or 16 bits), 3, or 4 (with transparency). Turned
    upright as its EXIF data says. DataError, which names the file, where it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}. Give an image file")
    return _decode(path, str(path))


def resize(image: Tensor, size: int) -> Tensor:
    """[C, H, W] to [C, size, size]: the short side is scaled to ``size``, with antialiasing, and the middle cut out."""
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    height, width = max(size, round(height * scale)), max(size, round(width * scale))
    if (height, width) != tuple(image.shape[-2:]):
        image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    return image[:, top : top + size, left : left + size]


def _decode(file, name: str) -> Tensor:
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise ImportError("images are read with Pillow. Run: pip install 'vqkernels[images]'") from None
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                return torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)[None]
            if image.mode == "I":  # how 16-bit grey PNGs opened before Pillow 11
                return torch.from_numpy(np.asarray(image).clip(0, 65535).astype(np.float32) / 65535)[None]
            if image.mode in ("1", "L"):
                mode = "L"
            else:
                mode = "RGBA" if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info else "RGB"
            return _tensor(np.asarray(image.convert(mode)).reshape(image.height, image.width, -1))
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image, or of a kind that Pillow does not read. Remove or replace it") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: cannot be read as an image ({error}). Remove or replace it") from None


def _tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, C] to float32 [C, H, W] in [0, 1]."""
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def _as_channels(image: Tensor, channels: int) -> Tensor:
    """Transparent parts become white; grey and colour turn into each other."""
    if image.shape[0] == 4:
        image = 1 + image[3:] * (image[:3] - 1)
    if channels == 1 and image.shape[0] == 3:  # luma as in ITU-R BT.601
        return (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    return image.expand(channels, -1, -1)


def _split(count: int, split: str) -> list[int]:
    """Every tenth of ``count``, or the last of fewer than ten, is for the test."""
    test = range(min(count, EVERY) - 1, count, EVERY)
    return [i for i in range(count) if (i in test) == (split == "test")]


def _has_images(folder: Path) -> bool:
    return any(p.suffix.lower() in ENDINGS for p in folder.rglob("*"))


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and _has_images(p)))
