"""Whether generated images are recognisable: a small classifier that has only seen real ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import ImageSource
from ..data.progress import progress_bar


def train_classifier(
    source: ImageSource, *, steps: int = 1000, batch_size: int = 128, lr: float = 1e-2, seed: int = 0, progress=None
) -> nn.Module:
    """A convolutional network, images [B, C, H, W] in [0, 1] -> logits [B, classes], trained on a source whose labels
    are classes. Twice halved, so H and W are 4 or more."""
    if source.condition != "class":
        raise ValueError("a classifier needs images with classes; this source has none")
    with torch.random.fork_rng([]), progress_bar(progress, "Classifier on real images", steps) as advance:
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(source.channels, 32, 5, 2, 2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(5),
            nn.Flatten(),
            nn.Linear(64 * 25, len(source.classes)),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < min(batch_size, len(source)):
                order = torch.randperm(len(source))
            batch, order = order[:batch_size], order[batch_size:]
            items = source.__getitems__(batch.tolist())
            images = torch.stack([item["image"] for item in items])
            loss = F.cross_entropy(model(images), torch.tensor([item["label"] for item in items]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance()
    return model.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, C, H, W] that are given their label [N]."""
    found = torch.cat([classifier(batch).argmax(1) for batch in images.split(256)])
    return float((found == labels).float().mean())
