"""Stands in for ``vector_quantize_pytorch``, its submodules included.

Either ``import vqkernels.compat as vector_quantize_pytorch``, or, for code that imports the package by name,
``sys.modules["vector_quantize_pytorch"] = vqkernels.compat`` before that code is imported.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader
from types import ModuleType

from torch import Tensor

from .layers import (
    FSP,
    FSQ,
    LFQ,
    QUANTIZERS,
    BinaryMapper,
    EvoLFQ,
    GroupedResidualFSQ,
    GroupedResidualLFQ,
    GroupedResidualVQ,
    HierarchicalVQ,
    LatentQuantize,
    RandomProjectionQuantizer,
    ResidualFSQ,
    ResidualLFQ,
    ResidualSimVQ,
    ResidualVQ,
    Sequential,
    SimVQ,
    VectorQuantize,
    binary_mapper,
    bit_entropy,
    evo_lfq,
    finite_scalar_perturbation,
    lfq,
    vector_quantize,
)
from .ops import rotation_trick


def round_ste(z: Tensor) -> Tensor:
    return z + (z.round() - z).detach()


def floor_ste(z: Tensor) -> Tensor:
    return z + (z.floor() - z).detach()


def _named(*objects, **others) -> dict[str, object]:
    return {thing.__name__: thing for thing in objects} | others


# every submodule there, with the names that users import from it
_SUBMODULES = {
    "vector_quantize_pytorch": _named(VectorQuantize, vector_quantize.LossBreakdown, rotate_to=rotation_trick),
    "residual_vq": _named(ResidualVQ, GroupedResidualVQ),
    "random_projection_quantizer": _named(RandomProjectionQuantizer),
    "finite_scalar_quantization": _named(FSQ, round_ste, floor_ste),
    "finite_scalar_perturbation": _named(
        FSP,
        finite_scalar_perturbation.VectorNorm,
        finite_scalar_perturbation.batch_stats,
        finite_scalar_perturbation.build_cdf_act,
    ),
    "lookup_free_quantization": _named(LFQ, lfq.Return, lfq.LossBreakdown, lfq.CosineSimLinear, bit_entropy.entropy),
    "evo_lookup_free_quantization": _named(EvoLFQ, evo_lfq.Return, evo_lfq.Result),
    "residual_lfq": _named(ResidualLFQ, GroupedResidualLFQ),
    "residual_fsq": _named(ResidualFSQ, GroupedResidualFSQ),
    "latent_quantization": _named(LatentQuantize),
    "sim_vq": _named(SimVQ),
    "residual_sim_vq": _named(ResidualSimVQ),
    "binary_mapper": _named(BinaryMapper, binary_mapper.binary_entropy),
    "hierarchical_vq": _named(HierarchicalVQ),
    "utils": _named(Sequential, QUANTIZE_KLASSES=QUANTIZERS),
}

__all__ = [
    "FSP",
    "FSQ",
    "LFQ",
    "BinaryMapper",
    "EvoLFQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "LatentQuantize",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "Sequential",
    "SimVQ",
    "VectorQuantize",
]


class _Submodules(MetaPathFinder, Loader):
    """Finds the submodules below this module, under whatever name it was imported: by its ``__path__``."""

    def find_spec(self, fullname, path=None, target=None):
        known = path is __path__ and fullname.rpartition(".")[2] in _SUBMODULES
        return spec_from_loader(fullname, self) if known else None

    def create_module(self, spec):
        return globals()[spec.name.rpartition(".")[2]]

    def exec_module(self, module):
        pass


__path__: list[str] = []
for _name, _names in _SUBMODULES.items():
    globals()[_name] = ModuleType(f"{__name__}.{_name}", f"The public names of ``vector_quantize_pytorch.{_name}``.")
    vars(globals()[_name]).update(_names)
sys.meta_path.append(_Submodules())


def __getattr__(name: str):
    raise AttributeError(
        f"vqkernels.compat has no {name!r}; it has: {', '.join(__all__)} and the submodules {', '.join(_SUBMODULES)}"
    )
