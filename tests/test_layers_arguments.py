"""What the layers' constructors and ``forward`` accept, and what they say about the rest."""

import pytest
import torch

from vqkernels import ResidualVQ, VectorQuantize

DIM, K = 8, 16


@pytest.mark.parametrize(
    "build, message",
    (
        (lambda: VectorQuantize(DIM, K, learnable_codebook=True, ema_update=True), "trains? one codebook twice"),
        (lambda: VectorQuantize(DIM, K, directional_reparam=True), "threshold_ema_dead_code > 0"),
        (
            lambda: VectorQuantize(DIM, K, directional_reparam=True, threshold_ema_dead_code=2, ema_update=True),
            "trains? one codebook twice",
        ),
        (lambda: VectorQuantize(DIM, K, vq_bridge=torch.nn.Identity(), learnable_codebook=False), "vq_bridge needs"),
        (lambda: VectorQuantize(DIM, K, straight_through=True, learnable_codebook=True), "use EMA"),
        (lambda: VectorQuantize(DIM, K, straight_through=True, rotation_trick=True), "give one of them"),
        (lambda: VectorQuantize(DIM, K, straight_through=True, estimator="gumbel"), "give one of them"),
        (lambda: VectorQuantize(DIM, K, rotation_trick=True, estimator="ste"), "give one of them"),
        (lambda: VectorQuantize(DIM, K, rotation_trick=False, estimator="rotation"), "give one of them"),
        (
            lambda: VectorQuantize(DIM, K, rotation_trick=True, directional_reparam=True, threshold_ema_dead_code=2),
            "give one of them",
        ),
        (lambda: VectorQuantize(DIM, K, sync_update_v=0.5), "only with learnable_codebook=True"),
        (lambda: VectorQuantize(DIM, K, sync_update_v=2.0, learnable_codebook=True), "a value in .0, 1."),
        (lambda: VectorQuantize(DIM, K, affine_param=True, use_cosine_sim=True), "for Euclidean codebooks"),
        (
            lambda: VectorQuantize(DIM, K, in_place_codebook_optimizer=torch.optim.SGD),
            "set learnable_codebook=True",
        ),
        (lambda: VectorQuantize(DIM, K, estimator="gumbel", sample_codebook_temp=0.0)(torch.randn(2, 3, DIM)), "> 0"),
        (lambda: VectorQuantize(DIM, K, heads=2)(torch.randn(2, 3, DIM), topk=2), "heads=1"),
        (
            lambda: VectorQuantize(DIM, K, commitment_use_cross_entropy_loss=True)(torch.randn(2, 3, DIM), topk=2),
            "in training it cannot go with",
        ),
        (
            lambda: VectorQuantize(DIM, K)(torch.randn(2, 3, DIM), codebook_transform_fn=lambda codes: codes[:, None]),
            "codebook_transform_fn gave .1, 1, 16, 8.; expected",
        ),
        (lambda: VectorQuantize(DIM, K, decay=1.5), "decay in"),
        (lambda: VectorQuantize(DIM, K, accept_image_fmap=True, accept_3d_fmap=True), "choose one"),
        (lambda: VectorQuantize(DIM, K, estimator="nothing"), "allowed: 'rotation'"),
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
