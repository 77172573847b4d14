"""Quantizer layers with the names, defaults, results and checkpoints of vector-quantize-pytorch."""

from .binary_mapper import BinaryMapper
from .evo_lfq import EvoLFQ
from .factorized_residual_vq import FactorizedResidualVQ
from .finite_scalar_perturbation import FSP
from .fsq import FSQ
from .grouped_residual_vq import GroupedResidualVQ
from .hierarchical_vq import HierarchicalVQ
from .latent_quantization import LatentQuantize
from .lfq import LFQ
from .migration import from_pretrained_layer
from .random_projection_quantizer import RandomProjectionQuantizer
from .residual_fsq import GroupedResidualFSQ, ResidualFSQ
from .residual_lfq import GroupedResidualLFQ, ResidualLFQ
from .residual_sim_vq import ResidualSimVQ
from .residual_vq import ResidualVQ
from .sequential import Sequential
from .sim_vq import SimVQ
from .vector_quantize import LossBreakdown, VectorQuantize

# what counts as the quantizer of a Sequential
QUANTIZERS = (
    VectorQuantize,
    ResidualVQ,
    GroupedResidualVQ,
    FactorizedResidualVQ,
    RandomProjectionQuantizer,
    FSQ,
    LFQ,
    SimVQ,
    ResidualSimVQ,
    ResidualLFQ,
    GroupedResidualLFQ,
    ResidualFSQ,
    GroupedResidualFSQ,
    FSP,
    LatentQuantize,
    HierarchicalVQ,
)

__all__ = [
    "FSP",
    "FSQ",
    "LFQ",
    "QUANTIZERS",
    "BinaryMapper",
    "EvoLFQ",
    "FactorizedResidualVQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "LatentQuantize",
    "LossBreakdown",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "Sequential",
    "SimVQ",
    "VectorQuantize",
    "from_pretrained_layer",
]
