"""Models on top of the quantizer layers; none of them knows how a kernel works. ``Prior`` needs transformers."""

from .rqvae import RQVAE, RQVAEOutput
from .vqgan import VQGAN, VQGANOutput
from .vqvae import VQVAE, VQVAEOutput

__all__ = ["RQVAE", "VQGAN", "VQVAE", "Prior", "PriorOutput", "RQVAEOutput", "VQGANOutput", "VQVAEOutput"]


def __getattr__(name: str):
    if name in ("Prior", "PriorOutput"):  # imported when used: transformers is an extra
        from . import prior

        return getattr(prior, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
