"""``Sequential`` with one quantizer among its modules, as in vector-quantize-pytorch."""

from __future__ import annotations

from torch import Tensor, nn


class Sequential(nn.Module):
    """Modules one after the other, exactly one of them a quantizer of this package.

    ``forward(x, **kwargs)`` hands ``kwargs`` to the quantizer and returns ``(x, *rest)``: the last module's result,
    then what the quantizer returned after its quantized vectors. ``state_dict`` keys are ``fns.{i}.*``.

    Raises:
        ValueError: no quantizer, or more than one.
    """

    def __init__(self, *fns: nn.Module):
        from . import QUANTIZERS  # the package imports this file

        super().__init__()
        positions = [i for i, fn in enumerate(fns) if isinstance(fn, QUANTIZERS)]
        if len(positions) != 1:
            kinds = ", ".join(type(fn).__name__ for fn in fns)
            raise ValueError(f"Sequential: {len(positions)} quantizers among ({kinds}); exactly one is expected")
        self.position = positions[0]
        self.fns = nn.ModuleList(fns)

    def forward(self, x: Tensor, **kwargs):
        for fn in self.fns[: self.position]:
            x = fn(x)
        x, *rest = self.fns[self.position](x, **kwargs)
        for fn in self.fns[self.position + 1 :]:
            x = fn(x)
        return (x, *rest)
