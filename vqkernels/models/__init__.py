"""Models on top of the quantizer layers; none of them knows how a kernel works."""

from .rqvae import RQVAE, RQVAEOutput
from .vqvae import VQVAE, VQVAEOutput

__all__ = ["RQVAE", "VQVAE", "RQVAEOutput", "VQVAEOutput"]
