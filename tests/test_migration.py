"""``from_pretrained_layer``: every layer of vector-quantize-pytorch with its options, encodec's and DAC's quantizers."""

import copy

import pytest
import torch
from torch import nn

import vqkernels
from vqkernels import from_pretrained_layer
from vqkernels.layers.factorized_residual_vq import FactorizedResidualVQ

theirs = pytest.importorskip("vector_quantize_pytorch", reason="pip install vector-quantize-pytorch")
transformers = pytest.importorskip("transformers", reason="pip install 'vqkernels[models]'")

from torch.optim import SGD, Adam  # noqa: E402

DIM = 8


def sgd(parameters):
    return SGD(parameters, lr=0.1, momentum=0.9)


def vq(**options):
    return lambda: theirs.VectorQuantize(**({"dim": DIM, "codebook_size": 12} | options))


def rvq(**options):
    return lambda: theirs.ResidualVQ(**({"dim": DIM, "codebook_size": 12, "num_quantizers": 3} | options))


TOKENS, CHANNELS, IMAGE, VOLUME = (4, 20, DIM), (4, DIM, 20), (4, DIM, 5, 4), (2, DIM, 3, 4, 5)

# name: (their layer, shape of the input, how many values of a training forward are random)
LAYERS = {
    "plain": (vq(), TOKENS),
    "projected": (vq(codebook_dim=4, layernorm_after_project_in=True), TOKENS),
    "heads": (vq(heads=2, codebook_dim=4, decay=0.7, eps=1e-3), TOKENS),
    "separate heads": (vq(heads=2, codebook_dim=4, separate_codebook_per_head=True), TOKENS),
    "cosine, straight-through": (vq(use_cosine_sim=True, rotation_trick=False), TOKENS),
    "image, weights": (vq(accept_image_fmap=True, commitment_weight=0.3), IMAGE),
    "volume": (vq(accept_3d_fmap=True), VOLUME),
    "channels first, frozen": (vq(channel_last=False, freeze_codebook=True), CHANNELS),
    "learnable": (vq(learnable_codebook=True, ema_update=False, sync_update_v=0.2), TOKENS),
    "in-place optimizer": (
        vq(learnable_codebook=True, ema_update=False, in_place_codebook_optimizer=sgd, codebook_dim=4),
        TOKENS,
    ),
    "manual EMA": (vq(manual_ema_update=True), TOKENS),
    "affine": (vq(affine_param=True, affine_param_batch_decay=0.9, affine_param_codebook_decay=0.8), TOKENS),
    "orthogonal": (vq(orthogonal_reg_weight=0.5, learnable_codebook=True, ema_update=False), TOKENS),
    "diversity": (vq(codebook_diversity_loss_weight=0.5, codebook_diversity_temperature=3.0), TOKENS),
    "cross entropy commitment": (vq(commitment_use_cross_entropy_loss=True), TOKENS),
    "gradient not routed": (
        vq(route_gradients_to_input=False, learnable_codebook=True, ema_update=False), TOKENS),
    "bridge": (vq(vq_bridge=nn.Linear(DIM, DIM), learnable_codebook=True, ema_update=False), TOKENS),
    "residual": (rvq(), TOKENS),
    "residual, projected, fraction": (rvq(codebook_dim=4, quant_grad_frac=0.1), TOKENS),
    "residual, shared": (rvq(shared_codebook=True), TOKENS),
    "residual, sizes": (rvq(codebook_size=(5, 9, 12), num_quantizers=None), TOKENS),
    "residual, neural": (rvq(implicit_neural_codebook=True, mlp_kwargs={"dim_hidden": 6, "depth": 2}), TOKENS),
    # theirs makes the EMA step of the first level only, so none is compared
    "residual, beam": (
        rvq(beam_size=3, eval_beam_size=2, beam_score_quantizer_weights=[1.0, 0.5, 2.0], ema_update=False), TOKENS),
    "grouped residual": (lambda: theirs.GroupedResidualVQ(
        dim=DIM, groups=2, num_quantizers=2, codebook_size=12), TOKENS),
    "SimVQ": (lambda: theirs.SimVQ(
        DIM, 12, rotation_trick=False, input_to_quantize_commit_loss_weight=0.4, commitment_weight=0.6,
        frozen_codebook_dim=5), TOKENS),
    "SimVQ, transform": (lambda: theirs.SimVQ(
        DIM, 12, codebook_transform=nn.Sequential(nn.Linear(DIM, 6), nn.GELU(), nn.Linear(6, DIM)), channel_first=True),
        IMAGE),
    "residual SimVQ": (lambda: theirs.ResidualSimVQ(
        dim=DIM, num_quantizers=3, codebook_size=12, channel_first=True), CHANNELS),
    "residual SimVQ, one transform": (lambda: theirs.ResidualSimVQ(
        dim=DIM, num_quantizers=2, codebook_size=12, codebook_transform=nn.Linear(DIM, DIM)), TOKENS),
    "FSQ": (lambda: theirs.FSQ([5, 4, 3], dim=DIM, projection_has_bias=False), TOKENS),
    "FSQ, symmetric": (lambda: theirs.FSQ(
        [5, 5], num_codebooks=4, preserve_symmetry=True, bound_hard_clamp=True, orthogonal_rotation=True), TOKENS),
    "FSQ, no indices": (lambda: theirs.FSQ([3] * DIM, return_indices=False, channel_first=True), CHANNELS),
    "residual FSQ": (lambda: theirs.ResidualFSQ(levels=[5, 4, 3], num_quantizers=2, dim=DIM), TOKENS),
    "residual FSQ, soft": (lambda: theirs.ResidualFSQ(
        levels=[3] * DIM, num_quantizers=2, bound_hard_clamp=False, soft_clamp_input_value=2.0), TOKENS),
    "grouped residual FSQ": (lambda: theirs.GroupedResidualFSQ(
        dim=DIM, groups=2, levels=[5, 4, 3], num_quantizers=2), TOKENS),
    "LFQ": (lambda: theirs.LFQ(
        codebook_size=2**DIM, entropy_loss_weight=0.2, commitment_loss_weight=0.3, diversity_gamma=0.8,
        soft_clamp_input_value=3.0), TOKENS),
    "LFQ, spherical image": (lambda: theirs.LFQ(
        codebook_size=16, dim=DIM, spherical=True, projection_has_bias=False, codebook_scale=0.5), IMAGE),
    "LFQ, cosine projection": (lambda: theirs.LFQ(
        codebook_size=16, dim=DIM, num_codebooks=2, cosine_sim_project_in=True, has_projections=True), TOKENS),
    "residual LFQ": (lambda: theirs.ResidualLFQ(
        dim=DIM, num_quantizers=2, codebook_size=16, soft_clamp_input_value=2.0), TOKENS),
    "grouped residual LFQ": (lambda: theirs.GroupedResidualLFQ(
        dim=DIM, groups=2, num_quantizers=2, codebook_size=16), TOKENS),
    "random projection": (lambda: theirs.RandomProjectionQuantizer(
        dim=DIM, codebook_size=12, codebook_dim=4, num_codebooks=2), TOKENS),
    "latent": (lambda: theirs.LatentQuantize(
        [5, 4, 3], dim=DIM, commitment_loss_weight=0.2, quantization_loss_weight=0.3), IMAGE),
    "latent, fixed values": (lambda: theirs.LatentQuantize(
        5, codebook_dim=DIM, dim=DIM, optimize_values=False), IMAGE),
    "hierarchical": (lambda: theirs.HierarchicalVQ(
        dim=DIM, codebook_size=12, scales=(1, 2, 4), kmeans_init=False, accept_image_fmap=True, quant_resi=0.3,
        threshold_ema_dead_code=0), (2, DIM, 4, 4)),
    "FSP": (lambda: theirs.FSP([5, 4, 3], dim=DIM, act_name="sigmoid", need_inv_act=True, vector_norm="var_sigmoid"),
            TOKENS),
    "Sequential": (lambda: theirs.Sequential(
        nn.Linear(DIM, DIM), theirs.VectorQuantize(DIM, 12, decay=0.5), nn.GELU()), TOKENS),
}  # fmt: skip


def tensors(result):
    """Every tensor of a layer's result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    return [t for part in result for t in tensors(part)] if isinstance(result, (tuple, list)) else []


def assert_same(ours, expected, message):
    ours, expected = tensors(ours), tensors(expected)
    assert len(ours) == len(expected) > 0, message
    for mine, other in zip(ours, expected):
        torch.testing.assert_close(
            mine.detach(), other.detach(), rtol=1e-4, atol=1e-5, check_dtype=False, msg=lambda m: f"{message}: {m}"
        )


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_of_the_incumbent(name):
    build, shape = LAYERS[name]
    torch.manual_seed(3)
    other = build()
    x = torch.randn(shape)
    other(x)  # some training behind it
    before = torch.get_rng_state()
    ours = from_pretrained_layer(other)
    assert torch.equal(before, torch.get_rng_state()), "converting draws random numbers"
    assert type(ours).__name__ == type(other).__name__ and ours.training
    assert type(ours).__module__.startswith("vqkernels.")
    state = other.state_dict()
    assert set(ours.state_dict()) == set(state)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, msg=key)
    for step in range(3):
        x = torch.randn(shape)
        torch.manual_seed(step)
        expected = other(x)
        torch.manual_seed(step)
        assert_same(ours(x), expected, f"training step {step}")
    assert_same(ours.eval()(x), other.eval()(x), "evaluation")


def test_training_state_comes_along():
    torch.manual_seed(0)
    other = vq(learnable_codebook=True, ema_update=False, in_place_codebook_optimizer=sgd)().double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    other(x)
    other.eval().project_in.requires_grad_(False)
    other._codebook.embed.requires_grad_(False)
    ours = from_pretrained_layer(other)
    assert not ours.training and ours.codebook.dtype == torch.float64 and not ours._codebook.embed.requires_grad
    mine, expected = ours.in_place_codebook_optimizer, other.in_place_codebook_optimizer
    assert isinstance(mine, SGD) and mine.defaults == expected.defaults
    assert torch.equal(*(next(iter(o.state.values()))["momentum_buffer"] for o in (mine, expected)))
    assert mine.param_groups[0]["params"][0] is ours._codebook.embed
    assert len({next(iter(o.state.values()))["momentum_buffer"].data_ptr() for o in (mine, expected)}) == 2

    other = vq()()
    other(x.float(), accum_ema_update=True)
    ours = from_pretrained_layer(other)
    assert_same(ours(x.float()), other(x.float()), "step after an accumulated one")
    assert_same(ours.codebook, other.codebook, "codebook after an accumulated step")

    other = vq(kmeans_init=True)()
    ours = from_pretrained_layer(other)
    assert not ours._codebook.initted and ours._codebook.needs_init
    ours(torch.randn(1, 40, DIM))
    assert ours._codebook.initted

    other = vq(learnable_codebook=True, ema_update=False, in_place_codebook_optimizer=Adam)()
    assert isinstance(from_pretrained_layer(other).in_place_codebook_optimizer, Adam)


def test_quantizers_of_a_model():
    """The loop of docs/migrating.md."""
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.ModuleDict({"quantizer": rvq()(), "norm": nn.LayerNorm(DIM)}))
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("GroupedResidualVQ", "ResidualVQ"):
            model.set_submodule(name, from_pretrained_layer(module))
    assert isinstance(model[1]["quantizer"], vqkernels.ResidualVQ)


def test_source_is_only_read():
    other = vq()()
    before = copy.deepcopy(other.state_dict())
    ours = from_pretrained_layer(other)
    ours(torch.randn(TOKENS))
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


# encodec


@pytest.fixture
def encodec():
    sizes = {"codebook_size": 32, "codebook_dim": DIM, "hidden_size": DIM, "num_filters": 2}
    config = transformers.EncodecConfig(target_bandwidths=[1.5], **sizes)
    quantizer = transformers.EncodecModel(config).quantizer.eval()
    generator = torch.Generator().manual_seed(1)
    for layer in quantizer.layers:
        for name, scale in (("embed", 1.0), ("embed_avg", 3.0)):
            getattr(layer.codebook, name).copy_(scale * torch.randn(32, DIM, generator=generator))
        layer.codebook.cluster_size.copy_(5 * torch.rand(32, generator=generator))
    return quantizer


def test_encodec(encodec):
    ours = from_pretrained_layer(encodec)
    assert isinstance(ours, vqkernels.ResidualVQ) and not ours.training
    x = torch.randn(3, DIM, 50)
    quantized, indices, _ = ours(x)
    codes = encodec.encode(x)  # [Q, B, N]
    assert len(codes) > 1 and torch.equal(indices.permute(2, 0, 1), codes)
    assert torch.equal(quantized, encodec.decode(codes))
    torch.testing.assert_close(ours.get_output_from_indices(indices), encodec.decode(codes))
    for theirs, mine in zip(encodec.layers, ours.layers):
        for key in ("cluster_size", "embed_avg", "embed"):
            assert torch.equal(getattr(mine._codebook, key)[0], getattr(theirs.codebook, key)), key
    assert ours.layers[0]._codebook.decay == 0.99 and ours.layers[0]._codebook.threshold_ema_dead_code == 2


def test_encodec_gradient_passes_straight_through(encodec):
    """There, the gradient reaches the input once, not once per level; so it does here after the conversion."""
    ours = from_pretrained_layer(encodec).train()
    x, upstream = torch.randn(2, DIM, 30, requires_grad=True), torch.randn(2, DIM, 30)
    (ours(x)[0] * upstream).sum().backward()
    torch.testing.assert_close(x.grad, upstream)


def test_encodec_state_and_single_level(encodec):
    x = torch.randn(2, DIM, 30)
    expected = from_pretrained_layer(encodec)(x)
    # the names of encodec's own package
    state = {f"vq.{key}".replace(".codebook.", "._codebook."): value for key, value in encodec.state_dict().items()}
    assert_same(from_pretrained_layer(state).eval()(x), expected, "state_dict")
    one = encodec.layers[0]
    ours = from_pretrained_layer(one)
    assert isinstance(ours, vqkernels.VectorQuantize)
    assert torch.equal(ours(x)[1], one.encode(x)) and torch.equal(ours(x)[0], one.decode(one.encode(x)))
    with pytest.raises(ValueError, match="without embed_avg"):
        from_pretrained_layer({key: value for key, value in one.state_dict().items() if "avg" not in key})


# DAC


def dac_config(**options):
    sizes = {"n_codebooks": 4, "codebook_size": 32, "codebook_dim": 6, "hidden_size": 16}
    return transformers.DacConfig(encoder_hidden_size=4, downsampling_ratios=[2, 2], **(sizes | options))


@pytest.fixture
def dac():
    torch.manual_seed(5)
    model = transformers.DacModel(dac_config())
    return model.quantizer.eval()


def test_dac(dac):
    ours = from_pretrained_layer(dac)
    assert isinstance(ours, FactorizedResidualVQ) and not ours.training
    x = torch.randn(3, 16, 40)
    expected, codes, _, commitment, codebook_loss = dac(x)
    quantized, indices, losses = ours(x)
    assert torch.equal(indices.movedim(-1, 1), codes)
    torch.testing.assert_close(quantized, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.sum(), 0.25 * commitment.mean() + codebook_loss.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.get_output_from_indices(indices), dac.from_codes(codes)[0], rtol=1e-5, atol=1e-6)
    quantized, indices, losses = ours(x, num_quantizers=2)
    torch.testing.assert_close(quantized, dac(x, n_quantizers=2)[0], rtol=1e-5, atol=1e-6)
    assert indices.shape[-1] == len(losses) == 2
    assert ours.usage.counts.shape == (2, 32)
    with pytest.raises(ValueError, match="4 levels"):
        ours(x, num_quantizers=5)


def test_dac_gradients(dac):
    dac.train()
    ours = from_pretrained_layer(dac)
    x = torch.randn(3, 16, 40)
    upstream = torch.randn(3, 16, 40)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, _, _, commitment, codebook_loss = dac(a)
    ((expected * upstream).sum() + 0.25 * commitment.mean() + codebook_loss.mean()).backward()
    quantized, _, losses = ours(b)
    ((quantized * upstream).sum() + losses.sum()).backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)
    for theirs, mine in zip(dac.quantizers, ours.layers):
        torch.testing.assert_close(mine.codebook.grad, theirs.codebook.weight.grad, rtol=1e-4, atol=1e-5)
        for projection in ("in", "out"):
            gradient = getattr(theirs, f"{projection}_proj").weight.grad.squeeze(-1)
            torch.testing.assert_close(
                getattr(mine, f"project_{projection}").weight.grad, gradient, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("norm", ["weight_norm", "parametrizations"])
def test_dac_with_weight_norms(dac, norm):
    x = torch.randn(2, 16, 30)
    apply = nn.utils.weight_norm if norm == "weight_norm" else nn.utils.parametrizations.weight_norm
    for quantizer in dac.quantizers:
        apply(quantizer.in_proj)
        apply(quantizer.out_proj)
    state = dac.state_dict()
    assert not any(key.endswith("in_proj.weight") for key in state)
    for key, value in state.items():
        if key.endswith(("weight_g", "original0")):
            value.mul_(0.5 + torch.rand_like(value))
    quantized, codes, *_ = dac(x)
    for source in (dac, state):
        got, indices, _ = from_pretrained_layer(source).eval()(x)
        assert torch.equal(indices.movedim(-1, 1), codes)
        torch.testing.assert_close(got, quantized, rtol=1e-5, atol=1e-6)


def test_dac_dropout_is_per_sample():
    torch.manual_seed(1)
    ours = from_pretrained_layer(transformers.DacModel(dac_config(quantizer_dropout=0.5)).quantizer).train()
    assert ours.quantize_dropout == 0.5
    x = torch.randn(8, 16, 10)
    quantized, indices, losses = ours(x)
    used = (indices >= 0).all(1)
    assert used[:, 0].all() and used[4:].all() and not used[:4].all()
    assert (used.int().diff(dim=-1) <= 0).all(), "only the last levels are left out"
    torch.testing.assert_close(quantized, ours.get_output_from_indices(indices))
    full = [ours.eval()(x[i : i + 1], num_quantizers=int(n)) for i, n in enumerate(used.sum(-1))]
    torch.testing.assert_close(quantized, torch.cat([out[0] for out in full]))
    padded = [torch.nn.functional.pad(out[2], (0, 4 - len(out[2]))) for out in full]
    torch.testing.assert_close(losses, torch.stack(padded).mean(0))


def test_errors():
    with pytest.raises(ValueError, match="attribute 'quantizer'"):
        from_pretrained_layer(transformers.DacModel(dac_config()))
    with pytest.raises(ValueError, match="layer of this package already"):
        from_pretrained_layer(vqkernels.VectorQuantize(4, 8))
    with pytest.raises(ValueError, match="call load_state_dict"):
        from_pretrained_layer(vq()().state_dict())
    with pytest.raises(ValueError, match=r"torch.nn.modules.linear.Linear \(with weight, bias\)"):
        from_pretrained_layer(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="not str"):
        from_pretrained_layer("encodec")
    mlp = theirs.residual_vq.MLP(4)
    with pytest.raises(ValueError, match="MLP is no quantizer that is known; known: BinaryMapper"):
        from_pretrained_layer(mlp)
    missing = {"codebook.weight": torch.zeros(4, 2), "in_proj.weight": torch.zeros(2, 4, 1)}
    with pytest.raises(ValueError, match="in_proj or codebook is missing"):
        from_pretrained_layer(missing)
    for options in ({"codebook_dim": (4, 4)}, {"num_quantizers": 0}, {"quantize_dropout": 2.0}):
        with pytest.raises(ValueError, match="FactorizedResidualVQ"):
            FactorizedResidualVQ(**({"dim": 8, "num_quantizers": 3, "codebook_size": 4} | options))
