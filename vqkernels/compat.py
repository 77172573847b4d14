"""Stands in for ``vector_quantize_pytorch``, its submodules included.

Either ``import vqkernels.compat as vector_quantize_pytorch``, or, for code that imports the package by name,
``sys.modules["vector_quantize_pytorch"] = vqkernels.compat`` before that code is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader
from types import ModuleType

from .layers import QUANTIZERS, ResidualVQ, Sequential, VectorQuantize
from .ops import rotation_trick

__all__ = ["ResidualVQ", "Sequential", "VectorQuantize"]

# submodule there: {module of vqkernels.layers: the public names that users import from it}
_SUBMODULES = {
    "vector_quantize_pytorch": {"vector_quantize": "VectorQuantize LossBreakdown"},
    "residual_vq": {"residual_vq": "ResidualVQ"},
    "utils": {"sequential": "Sequential"},
}


def _submodule(name: str) -> ModuleType:
    module = ModuleType(f"{__name__}.{name}", f"The public names of ``vector_quantize_pytorch.{name}``.")
    for source, names in _SUBMODULES[name].items():
        found = import_module(f".layers.{source}", __package__)
        vars(module).update({public: getattr(found, public) for public in names.split()})
    return module


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
globals().update({name: _submodule(name) for name in _SUBMODULES})
globals()["vector_quantize_pytorch"].rotate_to = rotation_trick
globals()["utils"].QUANTIZE_KLASSES = QUANTIZERS
sys.meta_path.append(_Submodules())


def __getattr__(name: str):
    raise AttributeError(
        f"vqkernels.compat has no {name!r}; it has: {', '.join(__all__)} and the submodules {', '.join(_SUBMODULES)}"
    )
