"""What the operators with a gradient of their own are made of."""

from __future__ import annotations

import torch


class Function(torch.autograd.Function):
    """An autograd function with ``setup_context`` that ``torch.vmap`` and ``torch.func.grad`` can transform.

    torch looks its signature up at every call, in the time of a small kernel; here only inside a transformation.
    """

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *arguments):
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*arguments)
