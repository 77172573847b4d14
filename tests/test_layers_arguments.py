"""What the layers' constructors and ``forward`` accept, and what they say about the rest."""

import pytest
import torch

from vqkernels import ResidualVQ, VectorQuantize, compat

DIM, K = 8, 16


@pytest.mark.parametrize(
    "option, value",
    (
        ("affine_param", True),
        ("sync_affine_param", True),
        ("orthogonal_reg_weight", 10.0),
        ("orthogonal_reg_max_codes", 128),
        ("codebook_diversity_loss_weight", 0.1),
        ("codebook_diversity_temperature", 10.0),
        ("stochastic_sample_codes", True),
        ("sample_codebook_temp", 0.1),
        ("straight_through", True),
        ("directional_reparam", True),
        ("commitment_use_cross_entropy_loss", True),
        ("in_place_codebook_optimizer", torch.optim.SGD),
        ("sync_update_v", 0.1),
        ("vq_bridge", torch.nn.Identity()),
        ("route_gradients_to_input", False),
    ),
)
def test_options_of_later_versions_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option}=.* is not supported yet; leave it at"):
        VectorQuantize(DIM, K, **{option: value})
    with pytest.raises(ValueError, match="is not supported yet"):
        ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=2, **{option: value})


def test_residual_options_of_later_versions_are_refused_by_name():
    for option in (
        {"beam_size": 2},
        {"diveq": True},
        {"implicit_neural_codebook": True},
        {"heads": 2},
        {"mlp_kwargs": {"depth": 2}},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is not supported yet; leave it at"):
            ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=2, **option)
    assert ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=2, mlp_kwargs={}, beam_size=None)


@pytest.mark.parametrize(
    "build, message",
    (
        (lambda: VectorQuantize(DIM, K, learnable_codebook=True, ema_update=True), "trains? one codebook twice"),
        (
            lambda: VectorQuantize(DIM, K, learnable_codebook=True, use_cosine_sim=True),
            "not supported with use_cosine_sim",
        ),
        (lambda: VectorQuantize(DIM, K, decay=1.5), "decay in"),
        (lambda: VectorQuantize(DIM, K, accept_image_fmap=True, accept_3d_fmap=True), "choose one"),
        (lambda: VectorQuantize(DIM, K, estimator="gumbel"), "allowed: 'rotation'"),
        (lambda: ResidualVQ(dim=DIM, codebook_size=K), "num_quantizers is missing"),
        (lambda: ResidualVQ(dim=DIM, codebook_size=(4, 4), num_quantizers=3), "names 2 levels"),
        (lambda: ResidualVQ(dim=DIM, codebook_size=(4, 5), shared_codebook=True), "one codebook size"),
        (lambda: VectorQuantize(DIM, K)(torch.randn(2, 3, DIM + 1)), "expected"),
        (lambda: VectorQuantize(DIM, K, accept_image_fmap=True)(torch.randn(2, DIM, 3)), "expected .B, 8, H, W"),
        (
            lambda: VectorQuantize(DIM, K)(torch.randn(2, 3, DIM), mask=torch.ones(2, 4, dtype=torch.bool)),
            "expected torch.bool",
        ),
        (lambda: VectorQuantize(DIM, K)(torch.randn(2, 3, DIM), mask=torch.ones(2, 3)), "expected torch.bool"),
        (lambda: VectorQuantize(DIM, K)(torch.randn(2, 3, DIM), lens=torch.ones(3)), "one length per sample"),
        (
            lambda: VectorQuantize(DIM, K)(torch.randn(2, 3, DIM), sample_codebook_temp=0.5),
            "sample_codebook_temp=0.5 is not",
        ),
        (lambda: VectorQuantize(DIM, K)(torch.randn(2, 3, DIM), topk=0), "positive"),
        (lambda: VectorQuantize(DIM, K)(torch.randn(2, 3, DIM), ema_update_weight=torch.ones(3)), "allowed"),
        (
            lambda: ResidualVQ(dim=DIM, codebook_size=(4, 4)).get_codes_from_indices(torch.zeros(2, 3).long()),
            "at most 2",
        ),
    ),
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_learnable_alone_switches_ema_off():
    layer = VectorQuantize(DIM, K, learnable_codebook=True)
    assert not layer.ema_update
    layer.codebook = torch.zeros(K, DIM)
    assert isinstance(layer._codebook.embed, torch.nn.Parameter) and (layer.codebook == 0).all()


def test_compat_module():
    assert compat.VectorQuantize is VectorQuantize and compat.ResidualVQ is ResidualVQ
    with pytest.raises(
        AttributeError, match="has no 'HierarchicalVQ' in this version; it has: ResidualVQ, VectorQuantize"
    ):
        compat.HierarchicalVQ  # noqa: B018
