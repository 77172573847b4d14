"""``layer.usage``: how the codes of the last forward are spread."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import CodebookUsage, codebook_usage
from .tokens import transformed


class RemembersIndices:
    """Mixin of a layer with ``codebook_size``: keeps the indices of its last forward, no copy and no computation.

    They are no part of the layer's state: copies and pickles start without.
    """

    usage_dim: int | None = None  # the dimension of the indices that separates codebooks
    _last_indices: Tensor | None = None

    def __getstate__(self):
        return self.__dict__ | {"_last_indices": None}

    def _remember(self, indices: Tensor | None) -> None:
        """Not inside ``torch.vmap``, where the indices stand for many, nor while a graph is exported."""
        if not torch.compiler.is_exporting() and (indices is None or not transformed(indices)):
            self._last_indices = indices

    @property
    def usage(self) -> CodebookUsage:
        """Counts, used fraction, entropy, perplexity and dead codewords of the last forward, computed when asked for.

        Raises:
            RuntimeError: there was no forward yet, or one without indices.
        """
        if self._last_indices is None:
            raise RuntimeError(
                f"{type(self).__name__}.usage describes the last forward, and there was none with indices; "
                "call the layer first"
            )
        return codebook_usage(self._last_indices, self.codebook_size, dim=self.usage_dim)
