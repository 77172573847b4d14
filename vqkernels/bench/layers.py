"""The layers beside vector-quantize-pytorch's own, the same weights and inputs in both."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import Row

# class, options, shape of the input
LAYERS = (
    ("VectorQuantize", {"dim": 64, "codebook_size": 1024}, (16, 4096, 64)),
    ("ResidualVQ", {"dim": 32, "num_quantizers": 4, "codebook_size": 256}, (16, 4096, 32)),
    ("ResidualVQ", {"dim": 128, "num_quantizers": 8, "codebook_size": 1024}, (8, 2048, 128)),
    ("SimVQ", {"dim": 64, "codebook_size": 8192}, (8, 1024, 64)),
    ("SimVQ", {"dim": 64, "codebook_size": 8192}, (16, 4096, 64)),
    ("FSQ", {"levels": [8, 5, 5, 5]}, (16, 4096, 4)),
    ("LFQ", {"codebook_size": 1024, "dim": 10}, (4, 1024, 10)),
)


def training_step(layer: nn.Module, x: Tensor, upstream: Tensor):
    """Forward, codebook update and backward into the input and every parameter, as inside a model."""
    leaf = x.detach().requires_grad_()
    output = layer(leaf)
    objective = (output[0] * upstream).sum()
    if len(output) > 2:
        objective = objective + output[2].sum()
    objective.backward()
    for parameter in layer.parameters():
        parameter.grad = None
    return output[1]


def rows(layers=LAYERS) -> Iterator[Row]:
    """Evaluation and training step of each layer."""
    from .. import layers as ours

    for name, options, shape in layers:
        x, upstream = torch.randn(shape), torch.randn(shape)

        def build(package, training, name=name, options=options, x=x, upstream=upstream):
            torch.manual_seed(0)  # both draw the same weights
            layer = getattr(package, name)(**options).train(training)
            if training:
                return lambda: training_step(layer, x, upstream)
            return torch.no_grad()(lambda: layer(x)[1])

        def incumbent(training, build=build):
            import vector_quantize_pytorch

            return build(vector_quantize_pytorch, training)

        for training in (True, False):
            want = build(ours, training)()

            def gate(output, want=want):
                off = (output.reshape(want.shape) != want).float().mean().item()
                return "" if off <= 1e-3 else f"{100 * off:.2g} % of the indices differ"

            arguments = ", ".join(f"{key}={value}" for key, value in options.items())
            yield Row(
                f"{name} {'training step' if training else 'evaluation'}",
                f"{'x'.join(map(str, shape))}, {arguments}",
                {
                    "vqkernels": lambda build=build, training=training: build(ours, training),
                    "vector-quantize-pytorch": lambda f=incumbent, training=training: f(training),
                },
                gate,
                roof="",
            )
