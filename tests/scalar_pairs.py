"""As layer_pairs, for layers of any number of results: scalar quantizers, SimVQ, and their residual kin."""

import layer_pairs
import torch
from layer_pairs import record, theirs


def pair(layer_class, make_options=dict, **options):
    """Both layers from one seed, with equal checkpoints that load strictly in both directions; ``make_options`` makes
    options that the two must not share."""
    made = f", {make_options.__name__}()" if make_options is not dict else ""
    record.configurations.add(f"{layer_class.__name__}({', '.join(f'{k}={v}' for k, v in options.items())}{made})")
    layers = []
    for kind in (layer_class, getattr(theirs, layer_class.__name__)):
        torch.manual_seed(0)
        layers.append(kind(**options, **make_options()))
    mine, other = layers
    a, b = mine.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
    other.load_state_dict(a, strict=True)
    mine.load_state_dict(b, strict=True)
    return mine, other


def close(a, b, tolerance, what=""):
    if a is None or b is None:
        assert a is b, what
        return
    assert a.is_floating_point() or torch.equal(a, b), f"{what} differs"
    layer_pairs.close(a, b, tolerance, what)


def results(layer, x, **kwargs):
    """All outputs, then the gradients of the input and of every parameter, by name. The objective weighs every entry of
    the quantized vectors and of the loss differently."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)  # for layers that draw noise
    quantized, indices, *rest = layer(x, **kwargs)
    named = {"quantized": quantized, "indices": indices}
    for position, value in enumerate(rest):
        named.update(flat(value, f"output {2 + position}"))
    objective = (quantized * torch.linspace(-1.0, 1.0, quantized.numel()).view(quantized.shape)).sum()
    if rest and isinstance(rest[0], torch.Tensor) and rest[0].requires_grad:
        objective = objective + (rest[0] * torch.arange(1.0, rest[0].numel() + 1).view(rest[0].shape)).sum()
    if objective.requires_grad:  # lookup-free layers give no gradient in evaluation
        objective.backward()
    named = {name: None if value is None else value.detach() for name, value in named.items()}
    return named | {"x.grad": x.grad} | {f"{name}.grad": p.grad for name, p in layer.named_parameters()}


def flat(value, name):
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in items for k, v in flat(part, f"{name} {key}").items()}


def compare(mine, other, x, tolerance=1e-5, **kwargs):
    a, b = results(mine, x, **kwargs), results(other, x, **kwargs)
    assert a.keys() == b.keys()
    for name in a:
        close(a[name], b[name], tolerance, name)
    return a["indices"]
