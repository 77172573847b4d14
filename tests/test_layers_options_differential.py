"""The options of VectorQuantize against the installed vector-quantize-pytorch: alone, with heads and layouts, and in the
combinations its README shows. Three training steps with the same noise, then evaluation."""

import pytest
import torch
from layer_pairs import BATCH, DIM, HEADS, K, close, close_states, compare, pair
from torch import nn

NARROW = {name: options | ({"codebook_dim": 4} if options else {}) for name, options in HEADS.items()}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
REVIVES = {"threshold_ema_dead_code": 1e-9}  # switched on, with nothing to revive: the draw of rows is ours


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


# name: constructor options, forward arguments
OPTIONS = {
    "cross entropy": ({"commitment_use_cross_entropy_loss": True, "commitment_weight": 0.3}, {}),
    "diversity": ({"codebook_diversity_loss_weight": 0.3, "codebook_diversity_temperature": 10.0}, {}),
    "orthogonal": ({"orthogonal_reg_weight": 2.0}, {}),
    "orthogonal, some": ({"orthogonal_reg_weight": 2.0, "orthogonal_reg_max_codes": 7}, {}),
    "orthogonal, active": ({"orthogonal_reg_weight": 2.0, "orthogonal_reg_active_codes_only": True}, {}),
    "sampled": ({"stochastic_sample_codes": True}, {}),
    "sampled, temperature": ({"stochastic_sample_codes": True, "sample_codebook_temp": 0.3}, {}),
    "sampled, temperature of forward": ({"stochastic_sample_codes": True}, {"sample_codebook_temp": 2.0}),
    "sampled, temperature 0": ({"stochastic_sample_codes": True, "sample_codebook_temp": 0.0}, {}),
    "straight through": ({"straight_through": True, "rotation_trick": False}, {}),
    "soft": ({"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False}, {}),
    "soft, sampled": (
        {
            "straight_through": True,
            "rotation_trick": False,
            "route_gradients_to_input": False,
            "stochastic_sample_codes": True,
            "sample_codebook_temp": 0.7,
        },
        {},
    ),
    "not routed": ({"route_gradients_to_input": False}, {}),
    "not routed, learnable": ({"route_gradients_to_input": False, **LEARNABLE}, {}),
    "directional": ({"directional_reparam": True, **REVIVES}, {}),
    "directional, variance": ({"directional_reparam": True, "directional_reparam_variance": 0.1, **REVIVES}, {}),
    "affine": ({"affine_param": True}, {}),
    "affine, decays": (
        {"affine_param": True, "affine_param_batch_decay": 0.8, "affine_param_codebook_decay": 0.5, **LEARNABLE},
        {},
    ),
    "synchronous": ({"sync_update_v": 0.3, **LEARNABLE}, {}),
    "synchronous, not routed": ({"sync_update_v": 0.3, "route_gradients_to_input": False, **LEARNABLE}, {}),
    "in place": ({"in_place_codebook_optimizer": sgd, **LEARNABLE}, {}),
    "in place by hand": (
        {"in_place_codebook_optimizer": adam, "manual_in_place_optimizer_update": True, **LEARNABLE},
        {},
    ),
}
# theirs changes the codewords between forward and backward, so the gradients of the similarities are those of the wrong
# ones, unless nothing changes
THROUGH_SIMILARITY = ("cross entropy", "diversity", "soft", "soft, sampled")


def train_and_evaluate(mine, other, shape, gradients=True, steps=3, **arguments):
    for train in (True,) * steps + (False,):
        mine.train(train), other.train(train)
        x = torch.randn(shape)
        index = compare(mine, other, x, gradients=gradients, return_loss_breakdown=True, **arguments)
        if mine.manual_in_place_optimizer_update:
            mine.update_in_place_optimizer(), other.update_in_place_optimizer()
            close_states(mine, other)
    return index


FORMS = [
    (name, form)
    for name in OPTIONS
    for form in (*NARROW, "image")
    # theirs refuses the active codes of separate codebooks, and fails for the cross entropy of images
    if (name, form) not in (("orthogonal, active", "separate"), ("cross entropy", "image"))
]


@pytest.mark.parametrize("name, form", FORMS)
def test_option(name, form):
    options, arguments = OPTIONS[name]
    options = options | ({"accept_image_fmap": True} if form == "image" else NARROW[form])
    shape = (BATCH, DIM, 5, 6) if form == "image" else (BATCH, 30, DIM)
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **options)
    train_and_evaluate(mine, other, shape, name not in THROUGH_SIMILARITY, **arguments)
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, freeze_codebook=True, **options)
    train_and_evaluate(mine, other, shape, steps=1, **arguments)


COSINE = (
    "cross entropy",
    "diversity",
    "orthogonal",
    "orthogonal, some",
    "sampled",
    "straight through",
    "soft",
    "not routed",
)


@pytest.mark.parametrize("heads", NARROW)
@pytest.mark.parametrize("name", COSINE)
def test_cosine_option(name, heads):
    options, arguments = OPTIONS[name]
    options = options | {"use_cosine_sim": True, **NARROW[heads]}
    for frozen in (False, True):
        mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **options)
        exact = frozen or name not in THROUGH_SIMILARITY
        train_and_evaluate(mine, other, (BATCH, 30, DIM), exact, freeze_codebook=frozen, **arguments)


MASKED = [name for name in OPTIONS if name != "diversity" and name != "orthogonal, active"]  # padding counts there


@pytest.mark.parametrize("name", MASKED)
def test_masked_option(name):
    options, arguments = OPTIONS[name]
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **options)
    mask = torch.rand(BATCH, 30) < 0.7
    if name == "cross entropy":
        arguments = arguments | {"freeze_codebook": True}
    train_and_evaluate(mine, other, (BATCH, 30, DIM), name not in THROUGH_SIMILARITY, mask=mask, **arguments)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "cross entropy"])  # theirs fails for one token
def test_option_with_one_token_and_projection(name):
    options, arguments = OPTIONS[name]
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, codebook_dim=6, **options)
    train_and_evaluate(mine, other, (40, DIM), name not in THROUGH_SIMILARITY, **arguments)


@pytest.mark.parametrize(
    "options",
    (
        {"heads": 4, "codebook_dim": 4, "separate_codebook_per_head": True, "use_cosine_sim": True,
         "orthogonal_reg_weight": 10.0, "orthogonal_reg_max_codes": 12},
        {"orthogonal_reg_weight": 10.0, "orthogonal_reg_max_codes": 6, "accept_image_fmap": True},
        {"affine_param": True, "sync_update_v": 0.1, "learnable_codebook": True, "ema_update": False},
        {"affine_param": True, "stochastic_sample_codes": True, "sample_codebook_temp": 0.5},
        {"affine_param": True, "in_place_codebook_optimizer": sgd, **LEARNABLE},
        {"affine_param": True, "directional_reparam": True, **REVIVES},
        {"in_place_codebook_optimizer": sgd, "sync_update_v": 0.2, **LEARNABLE, **REVIVES},
        {"in_place_codebook_optimizer": adam, "stochastic_sample_codes": True, **LEARNABLE},
        {"in_place_codebook_optimizer": sgd, "orthogonal_reg_weight": 1.0},
        {"in_place_codebook_optimizer": sgd, "learnable_codebook": True, "ema_update": False, "heads": 4,
         "codebook_dim": 4, "commitment_weight": 0.0},
        {"orthogonal_reg_weight": 1.0, "route_gradients_to_input": False},
        {"orthogonal_reg_weight": 1.0, "learnable_codebook": True, "ema_update": False},
        {"stochastic_sample_codes": True, "sample_codebook_temp": 0.1, "rotation_trick": False, "decay": 0.95},
        {"stochastic_sample_codes": True, "codebook_diversity_loss_weight": 0.1, "freeze_codebook": True},
        {"codebook_diversity_loss_weight": 0.1, "commitment_use_cross_entropy_loss": True, **LEARNABLE},
        {"codebook_diversity_loss_weight": 0.1, "orthogonal_reg_weight": 1.0, "freeze_codebook": True,
         "commitment_weight": 0.0},
    ),
    ids=lambda options: "+".join(options),
)  # fmt: skip
def test_combination(options):
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **options)
    shape = (BATCH, DIM, 5, 6) if "accept_image_fmap" in options else (BATCH, 30, DIM)
    train_and_evaluate(mine, other, shape)


class Bridge(nn.Module):
    def __init__(self, dim=DIM):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, codes):
        return codes + self.mix(self.norm(codes))


@pytest.mark.parametrize("options", ({}, {"heads": 4, "codebook_dim": 4}, {"in_place_codebook_optimizer": sgd}))
def test_bridge(options):
    def bridge():
        return {"vq_bridge": Bridge(options.get("codebook_dim", DIM))}

    train_and_evaluate(*pair("VectorQuantize", bridge, dim=DIM, codebook_size=K, **options), (BATCH, 30, DIM))


@pytest.mark.parametrize("options", ({}, LEARNABLE, {"use_cosine_sim": True}, {"stochastic_sample_codes": True}))
@pytest.mark.parametrize("heads", NARROW)
def test_candidates_of_every_token(heads, options):
    """codebook_transform_fn, with a network whose gradients are compared, too."""
    options = options | NARROW[heads]
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **options)
    dim, samples = options.get("codebook_dim", DIM), BATCH * (4 if heads == "shared" else 1)
    network, condition = nn.Linear(dim, dim), torch.randn(1, samples, 30, 1, dim)

    def transform(codes):
        return network(codes[:, None, None] + condition)

    for train in (True, True, False):
        mine.train(train), other.train(train)
        x, grads = torch.randn(BATCH, 30, DIM), []
        for layer in (mine, other):
            network.zero_grad()
            with torch.random.fork_rng():
                torch.manual_seed(3)
                compare_with = layer(x, codebook_transform_fn=transform)
            (compare_with[0].square().sum() + compare_with[2]).backward()
            grads.append(network.weight.grad.clone())
        close(*grads, what="gradient of the network")
        close_states(mine, other)
        compare(mine, other, x, codebook_transform_fn=transform)


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize(
    "name",
    ("diversity", "orthogonal", "orthogonal, some", "sampled", "not routed", "not routed, learnable", "directional",
     "affine", "synchronous"),
)  # fmt: skip
def test_topk_option(name, train):
    options, arguments = OPTIONS[name]
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **options)
    first = torch.randn(BATCH, 30, DIM)  # before it theirs has no affine statistics
    mine(first, freeze_codebook=True), other(first, freeze_codebook=True)
    mine.train(train), other.train(train)
    x, results = torch.randn(BATCH, 30, DIM), []
    for layer in (mine, other):
        v = x.clone().requires_grad_()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            q, index, loss = layer(v, topk=5, **arguments)
        (q.square().sum() + loss.sum()).backward()
        results.append((q.detach(), index, loss.detach().expand(index.shape), v.grad))
    (q1, i1, l1, g1), (q2, i2, l2, g2) = results
    assert torch.equal(i1, i2)
    close(q1, q2), close(l1, l2)
    assert (g1 is None) == (g2 is None)
    if g1 is not None:
        close(g1, g2)
    close_states(mine, other)


def test_affine_checkpoint():
    """A trained state goes into a fresh layer, with the statistics of the input that it did not have at first."""
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, affine_param=True)
    for _ in range(2):
        compare(mine, other, torch.randn(BATCH, 30, DIM) * 3 + 1)
    fresh, _ = pair("VectorQuantize", dim=DIM, codebook_size=K, affine_param=True)
    assert "_codebook.batch_mean" not in fresh.state_dict()
    fresh.load_state_dict(other.state_dict(), strict=True)
    compare(fresh, other, torch.randn(BATCH, 30, DIM) * 3 + 1)
