"""VQ-VAE, VQ-GAN and a prior over their codes on images: train, reconstruct, generate. Needs the extra ``images``."""

from .config import RunConfig, config_from_dict, default_config, load_config
from .pictures import load_tokenizer, reconstruct, sample
from .runs import load_run, read_metrics
from .train import train

__all__ = [
    "RunConfig",
    "config_from_dict",
    "default_config",
    "load_config",
    "load_run",
    "load_tokenizer",
    "read_metrics",
    "reconstruct",
    "sample",
    "train",
]
