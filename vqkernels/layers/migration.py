"""``from_pretrained_layer``: other libraries' quantizers, with weights, options and training state, as layers here."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import layers
from .factorized_residual_vq import FactorizedResidualVQ
from .residual_vq import ResidualVQ
from .vector_quantize import VectorQuantize


def from_pretrained_layer(source: nn.Module | Mapping[str, Tensor]) -> nn.Module:
    """The layer of this package that does what ``source`` does; ``source`` is only read.

    Args:
        source: a live quantizer of vector-quantize-pytorch (every layer class, also inside its ``Sequential``);
            encodec's or DAC's quantizer, from their packages or from transformers; or the ``state_dict`` of one of the
            latter two. The state of a vector-quantize-pytorch layer alone does not say its options: build the layer of
            the same name and call ``load_state_dict``.

    Returns:
        The same class of ours, on the same device, in the same dtype and mode, with the weights, buffers, options, the
        state of in-place optimizers and accumulated EMA steps. encodec becomes a :class:`ResidualVQ` with
        ``channel_last=False`` and the straight-through gradient, DAC a :class:`FactorizedResidualVQ` with its weight
        norms folded; both take ``[B, dim, N]`` as there and return indices ``[B, N, Q]``.

    Raises:
        TypeError: source is neither a module nor a state_dict.
        ValueError: nothing known; the message says what was found.
    """
    if isinstance(source, nn.Module):
        kind = type(source)
        if kind.__module__.split(".")[0] == "vector_quantize_pytorch":
            return _incumbent(source)
        if kind.__module__.split(".")[0] == "vqkernels":
            raise ValueError(f"from_pretrained_layer: {kind.__qualname__} is a layer of this package already")
        layer = _codec(source.state_dict(), source)
        return layer.train(source.training)
    if isinstance(source, Mapping) and all(isinstance(value, Tensor) for value in source.values()):
        return _codec(source, None)
    raise TypeError(f"from_pretrained_layer: a module or a state_dict is expected, not {type(source).__qualname__}")


# vector-quantize-pytorch: most options are attributes of the same name, each class adds where the others are kept


def _incumbent(module: nn.Module) -> nn.Module:
    name = type(module).__name__
    if name == "Sequential":
        fns = (_incumbent(fn) if type(fn).__name__ in OPTIONS else copy.deepcopy(fn) for fn in module.fns)
        return layers.Sequential(*fns).train(module.training)
    if name not in OPTIONS:
        raise ValueError(
            f"from_pretrained_layer: {type(module).__module__}.{name} is no quantizer that is known; "
            f"known: {', '.join(sorted(OPTIONS))}, Sequential"
        )
    with torch.random.fork_rng(
        devices=[]
    ):  # the initial weights are overwritten; the caller's draws go on as they were
        layer = getattr(layers, name)(**_options(module))
    floating = next((t for t in module.state_dict().values() if t.is_floating_point()), None)
    if floating is not None:
        layer.to(device=floating.device, dtype=floating.dtype)
    layer.load_state_dict(module.state_dict(), strict=True)
    _training_state(module, layer)
    return layer.train(module.training)


def _training_state(module: nn.Module, layer: nn.Module) -> None:
    ours = dict(layer.named_modules())
    for name, theirs in module.named_modules():
        mine = ours.get(name)
        if mine is None:
            continue
        for key, value in theirs.named_parameters(recurse=False):
            getattr(mine, key).requires_grad_(value.requires_grad)
        if isinstance(getattr(theirs, "in_place_codebook_optimizer", None), torch.optim.Optimizer):
            state = copy.deepcopy(theirs.in_place_codebook_optimizer.state_dict())  # it would be shared
            mine.in_place_codebook_optimizer.load_state_dict(state)
        if type(theirs).__name__ == "Codebook" and theirs.cluster_size.grad is not None:  # accum_ema_update
            mine._pending = theirs.cluster_size.grad.clone(), theirs.embed_avg.grad.clone()
        if type(theirs).__name__ == "VectorNorm":
            vars(mine).update({key: value for key, value in vars(theirs).items() if re.fullmatch(r"l\d_\w+|eps", key)})


def _options(module: nn.Module) -> dict:
    """The constructor arguments that make the like of a module of vector-quantize-pytorch."""
    name = type(module).__name__
    parameters = inspect.signature(type(module).__init__).parameters
    options = {key: getattr(module, key) for key in list(parameters)[1:] if hasattr(module, key)}
    return options | OPTIONS[name](module)


def _without(options: dict, *names: str) -> dict:
    return {key: value for key, value in options.items() if key not in names}


def _has_bias(module: nn.Module) -> bool:
    return not isinstance(module.project_in, nn.Linear) or module.project_in.bias is not None


def _outer_dim(module: nn.Module, inner: int) -> int:
    return module.project_in.in_features if module.has_projections else inner


def _optimizer_factory(optimizer) -> Callable | None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    known = inspect.signature(type(optimizer).__init__).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in known}
    return lambda parameters: type(optimizer)(parameters, **settings)


def _vector_quantize(module) -> dict:
    book = module._codebook
    return {
        "codebook_dim": book.embed.shape[-1],
        "kmeans_init": not bool(book.initted),
        "sync_kmeans": not book.use_ddp or book.kmeans_all_reduce_fn.__name__ != "noop",
        # there, False also when the layer was built before the process group; here this is decided at run time
        "sync_codebook": book.use_ddp or None,
        "layernorm_after_project_in": isinstance(module.project_in, nn.Sequential),
        "stochastic_sample_codes": book.gumbel_sample.keywords["stochastic"],
        "straight_through": book.gumbel_sample.keywords["straight_through"],
        "in_place_codebook_optimizer": _optimizer_factory(module.in_place_codebook_optimizer),
        "vq_bridge": copy.deepcopy(book.vq_bridge),
        "affine_param": book.affine_param,
        "sync_affine_param": book.sync_affine_param,
        "affine_param_batch_decay": getattr(book, "affine_param_batch_decay", 0.99),
        "affine_param_codebook_decay": getattr(book, "affine_param_codebook_decay", 0.9),
    } | {
        key: getattr(book, key)
        for key in (
            "decay",
            "eps",
            "kmeans_iters",
            "threshold_ema_dead_code",
            "sample_codebook_temp",
            "manual_ema_update",
        )
    }


def _residual_vq(module) -> dict:
    first = module.layers[0]
    level = _without(_options(first), "dim", "codebook_dim", "codebook_size", "heads", "separate_codebook_per_head")
    if module.implicit_neural_codebook or module.diveq:
        level = _without(level, "learnable_codebook", "ema_update")
    if module.diveq:
        level = _without(level, "route_gradients_to_input", "commitment_weight")
    if module.shared_codebook:
        level = _without(level, "manual_ema_update", "manual_in_place_optimizer_update")
    mlp = module.mlps[0] if module.implicit_neural_codebook and len(module.mlps) else None
    return level | {
        "dim": _outer_dim(module, module.codebook_dim),
        "num_quantizers": module.num_quantizers,
        "codebook_size": tuple(module.codebook_sizes),
        "beam_score_quantizer_weights": module.beam_score_weights.tolist() if module.beam_size is not None else None,
        "mlp_kwargs": {"dim_hidden": mlp.layers[0][0].out_features, "depth": len(mlp.layers)} if mlp else {},
    }


def _grouped(module) -> dict:
    return _without(_options(module.rvqs[0]), "dim", "accept_image_fmap")


def _sim_vq(module) -> dict:
    return {
        "dim": module.codebook.shape[-1],
        "codebook_transform": copy.deepcopy(module.code_transform),
        "frozen_codebook_dim": module.frozen_codebook.shape[-1],
    }


def _residual_sim_vq(module) -> dict:
    level = _options(module.layers[0])
    transforms = [layer.code_transform for layer in module.layers]
    one_for_all = all(transform is transforms[0] for transform in transforms)
    return level if one_for_all else level | {"codebook_transform": None}


def _fsq(module) -> dict:
    return {"levels": module._levels.tolist(), "projection_has_bias": _has_bias(module)}


def _residual_fsq(module) -> dict:
    first = module.layers[0]
    level = _without(_options(first), "dim", "preserve_symmetry", "bound_hard_clamp", "projection_has_bias")
    clamp = None if first.bound_hard_clamp else module.soft_clamp_input_value
    return level | {
        "levels": list(module.levels),
        "dim": _outer_dim(module, len(module.levels)),
        "bound_hard_clamp": first.bound_hard_clamp,
        "soft_clamp_input_value": clamp,
    }


def _lfq(module) -> dict:
    cosine = type(module.project_in).__name__ == "CosineSimLinear"
    return {
        "straight_through_activation": copy.deepcopy(module.activation),
        "projection_has_bias": _has_bias(module) if not cosine else module.project_out.bias is not None,
        "cosine_sim_project_in": cosine,
        "cosine_sim_project_in_scale": module.project_in.scale if cosine else None,
        "spherical": module.maybe_l2norm.__name__ == "<lambda>",
    }


def _residual_lfq(module) -> dict:
    first = module.layers[0]
    level = _without(_options(first), "dim", "codebook_scale", "has_projections", "projection_has_bias")
    return level | {
        "dim": _outer_dim(module, first.dim),
        "codebook_size": first.codebook_size,
        "soft_clamp_input_value": first.soft_clamp_input_value,
    }


def _random_projection(module) -> dict:
    fixed = ("dim", "heads", "codebook_size", "codebook_dim", "use_cosine_sim", "separate_codebook_per_head")
    return _without(_options(module.vq), *fixed) | {
        "dim": module.rand_projs.shape[1],
        "codebook_dim": module.rand_projs.shape[2],
        "codebook_size": module.vq.codebook_size,
        "norm": isinstance(module.norm, nn.LayerNorm),
    }


def _latent_quantize(module) -> dict:
    return {
        "levels": module._levels.tolist(),
        "commitment_loss_weight": float(module.commitment_loss_weight),
        "quantization_loss_weight": float(module.quantization_loss_weight),
        "optimize_values": isinstance(module.values_per_latent, nn.ParameterList),
        "in_place_codebook_optimizer": _optimizer_factory(module.in_place_codebook_optimizer),
    }


def _hierarchical_vq(module) -> dict:
    level = _options(module.get_vq(0))
    names = inspect.signature(type(module).__init__).parameters
    phi = module.choose_phi(0)
    return {key: value for key, value in level.items() if key in names} | {
        "codebook_size": module.codebook_sizes,
        "scales": module.scales,
        "shared_codebook": module.vq is not None,
        "channel_first": module.channel_first,
        "accept_image_fmap": module.spatial_dims == 2,
        "accept_3d_fmap": module.spatial_dims == 3,
        "quant_resi": phi.resi_ratio,
        "share_quant_resi": 1 if module.phi_shared is not None else len(module.phi_levels),
    }


def _fsp(module) -> dict:
    preset = "none" if module.vector_norm is None else "kurt"  # its numbers are copied afterwards
    return {"levels": module._levels.tolist(), "projection_has_bias": _has_bias(module), "vector_norm": preset}


def _evo_lfq(module) -> dict:
    return {
        "encoder": copy.deepcopy(module.encoder),
        "decoder": copy.deepcopy(module.decoder),
        "lfq": _incumbent(module.lfq),
    }


OPTIONS: dict[str, Callable[[nn.Module], dict]] = {
    "VectorQuantize": _vector_quantize,
    "ResidualVQ": _residual_vq,
    "GroupedResidualVQ": _grouped,
    "SimVQ": _sim_vq,
    "ResidualSimVQ": _residual_sim_vq,
    "FSQ": _fsq,
    "ResidualFSQ": _residual_fsq,
    "GroupedResidualFSQ": _grouped,
    "LFQ": _lfq,
    "ResidualLFQ": _residual_lfq,
    "GroupedResidualLFQ": _grouped,
    "RandomProjectionQuantizer": _random_projection,
    "LatentQuantize": _latent_quantize,
    "BinaryMapper": lambda module: {},
    "HierarchicalVQ": _hierarchical_vq,
    "FSP": _fsp,
    "EvoLFQ": _evo_lfq,
}


# encodec and DAC: recognized by the names of their tensors, which both packages share with transformers

_ENCODEC = re.compile(
    r"(?:vq\.)?(?:layers\.(?P<level>\d+)\.)?(?:_?codebook\.)?(?P<key>inited|cluster_size|embed|embed_avg)"
)
_DAC = re.compile(r"(?:quantizers\.(?P<level>\d+)\.)?(?P<key>codebook\.weight|(?:in|out)_proj\..+)")


def _codec(state: Mapping[str, Tensor], module: nn.Module | None) -> nn.Module:
    for pattern, build in ((_ENCODEC, _encodec), (_DAC, _dac)):
        found = [pattern.fullmatch(name) for name in state]
        if found and all(found):
            levels: dict[int, dict[str, Tensor]] = {}
            for match, value in zip(found, state.values(), strict=True):
                levels.setdefault(int(match["level"] or 0), {})[match["key"]] = value
            return build([levels[level] for level in sorted(levels)], module)
    what = "the state_dict" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"
    names = ", ".join(list(state)[:4]) or "no tensors"
    advice = ""
    if isinstance(getattr(module, "quantizer", None), nn.Module):
        advice = "; convert its attribute 'quantizer' and put the result in its place"
    elif any("initted" in name for name in state):
        advice = "; for vector-quantize-pytorch give the live layer, or build the layer here and call load_state_dict"
    raise ValueError(
        f"from_pretrained_layer: {what} (with {names}{', ...' if len(state) > 4 else ''}) is no quantizer of "
        f"vector-quantize-pytorch, encodec or DAC{advice}"
    )


def _encodec(levels: list[dict[str, Tensor]], module: nn.Module | None) -> nn.Module:
    """Codebooks ``[K, D]`` with counts and sums; its own defaults where the module keeps no options (transformers)."""
    missing = {"inited", "cluster_size", "embed", "embed_avg"} - set(levels[0])
    if missing:
        raise ValueError(f"from_pretrained_layer: an encodec codebook without {', '.join(sorted(missing))}")
    books = [] if module is None else [m for m in module.modules() if hasattr(m, "embed_avg")]
    option = lambda name, default: getattr(books[0], name, default) if books else default  # noqa: E731
    K, D = levels[0]["embed"].shape
    options = {
        "decay": option("decay", 0.99),
        "eps": option("epsilon", 1e-5),
        "kmeans_iters": option("kmeans_iters", 50),
        "threshold_ema_dead_code": option("threshold_ema_dead_code", 2),
        "kmeans_init": not all(bool(level["inited"]) for level in levels),
        "rotation_trick": False,
        "channel_last": False,
    }
    with torch.random.fork_rng(devices=[]):
        if any(".layers." in f".{name}" for name in ([] if module is None else module.state_dict())) or len(levels) > 1:
            # there, a level's output carries the gradient of its input, so what is left for the next level carries none
            layer = ResidualVQ(dim=D, codebook_size=K, num_quantizers=len(levels), quant_grad_frac=1.0, **options)
            books = [level._codebook for level in layer.layers]
        else:
            layer = VectorQuantize(D, K, **options)
            books = [layer._codebook]
    layer.to(levels[0]["embed"].device)
    for book, level in zip(books, levels, strict=True):
        state = {key: level[key].unsqueeze(0) for key in ("cluster_size", "embed", "embed_avg")}
        book.load_state_dict(state | {"initted": level["inited"].bool().reshape(())})
    return layer


def _dac(levels: list[dict[str, Tensor]], module: nn.Module | None) -> nn.Module:
    projections = [{side: _projection(level, side) for side in ("in_proj", "out_proj")} for level in levels]
    books = [level["codebook.weight"] for level in levels]
    with torch.random.fork_rng(devices=[]):
        layer = FactorizedResidualVQ(
            dim=projections[0]["in_proj"][0].shape[1],
            num_quantizers=len(levels),
            codebook_size=books[0].shape[0],
            codebook_dim=tuple(book.shape[1] for book in books),
            quantize_dropout=float(getattr(module, "quantizer_dropout", 0.0)),
        )
    layer.to(device=books[0].device, dtype=books[0].dtype)
    with torch.no_grad():
        for level, book, projection in zip(layer.layers, books, projections, strict=True):
            level.codebook.copy_(book)
            for linear, (weight, bias) in zip((level.project_in, level.project_out), projection.values(), strict=True):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
    return layer


def _projection(level: dict[str, Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Weight ``[out, in]`` and bias of a 1x1 convolution, its weight norm (either spelling) folded."""
    for norm, direction in (("weight_g", "weight_v"), tuple(f"parametrizations.weight.original{i}" for i in (0, 1))):
        if f"{side}.{norm}" in level:
            weight = torch._weight_norm(level[f"{side}.{direction}"], level[f"{side}.{norm}"], 0)
            break
    else:
        weight = level.get(f"{side}.weight")
    bias = level.get(f"{side}.bias")
    if weight is None or bias is None or "codebook.weight" not in level:
        raise ValueError(
            f"from_pretrained_layer: a DAC level with {', '.join(sorted(level))}; {side} or codebook is missing"
        )
    return weight.squeeze(-1), bias
