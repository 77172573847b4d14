"""Options of ``VectorQuantize`` that exclude or need each other."""

from __future__ import annotations


def check_options(
    *,
    learnable: bool,
    ema_update: bool,
    bridged: bool,
    decay: float,
    threshold_ema_dead_code: float,
    directional_reparam: bool,
    straight_through: bool,
    sync_update_v: float,
    affine_param: bool,
    use_cosine_sim: bool,
    has_parameter: bool,
    in_place: bool,
) -> None:
    """Raises ValueError for the first rule that the options break."""
    for wrong, message in (
        (
            learnable and ema_update,
            "learnable_codebook=True and ema_update=True train one codebook twice; choose one (vq_bridge and "
            "directional_reparam need a learnable codebook)",
        ),
        (bridged and not learnable, "vq_bridge needs learnable_codebook=True or None"),
        (
            not 0.0 <= decay <= 1.0 or threshold_ema_dead_code < 0,
            f"decay={decay!r}, threshold_ema_dead_code={threshold_ema_dead_code!r}; expected decay in [0, 1] and a "
            "threshold >= 0",
        ),
        (
            directional_reparam and not threshold_ema_dead_code,
            "directional_reparam=True has no loss that moves a codeword which no vector chooses; "
            "set threshold_ema_dead_code > 0",
        ),
        (straight_through and learnable, "straight_through=True is not for a learnable codebook; use EMA"),
        (
            not 0.0 <= sync_update_v <= 1.0 or (sync_update_v and not learnable),
            f"sync_update_v={sync_update_v!r}; expected a value in [0, 1], above 0 only with learnable_codebook=True",
        ),
        (affine_param and use_cosine_sim, "affine_param=True is for Euclidean codebooks, not for use_cosine_sim=True"),
        (in_place and not has_parameter, "in_place_codebook_optimizer trains a parameter; set learnable_codebook=True"),
    ):
        if wrong:
            raise ValueError(f"VectorQuantize: {message}")


def estimator_name(
    estimator: str | None, rotation_trick: bool | None, straight_through: bool, directional: bool, dim: int
) -> str:
    """The gradient estimator that the options ask for: "rotation", "reflection", "ste", "gumbel" or "directional"."""
    allowed = ("rotation", "reflection", "ste", "gumbel")
    if estimator is not None and estimator not in allowed:
        raise ValueError(
            f"VectorQuantize: estimator={estimator!r} is unknown; allowed: {', '.join(map(repr, allowed))}"
        )
    given = {
        "estimator": estimator is not None and estimator != "rotation",
        "rotation_trick": bool(rotation_trick),
        "straight_through": straight_through,
        "directional_reparam": directional,
    }
    if sum(given.values()) > 1 or (estimator == "rotation" and rotation_trick is False):
        raise ValueError(
            f"VectorQuantize: estimator={estimator!r}, rotation_trick={rotation_trick}, "
            f"straight_through={straight_through}, directional_reparam={directional} disagree; give one of them"
        )
    if directional:
        return "directional"
    if estimator is not None:
        return estimator
    # a rotation of one feature is at most a change of sign
    rotates = not straight_through and dim > 1 if rotation_trick is None else rotation_trick
    return "rotation" if rotates else "ste"
