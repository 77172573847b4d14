"""The relatives of LFQ on their own: residual layers, random projections, BinaryMapper, EvoLFQ."""

import pytest
import torch
from test_layers_lfq import OPTIONS
from torch import nn

from vqkernels.layers import BinaryMapper, EvoLFQ, GroupedResidualLFQ, RandomProjectionQuantizer, ResidualLFQ

# residual layers


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dim", (4, 9))
def test_residual_round_trip(dim, options):
    options = {key: value for key, value in options.items() if key != "codebook_scale"}
    layer = ResidualLFQ(dim=dim, num_quantizers=3, codebook_size=16, **options).eval()
    x = torch.randn(2, 30, dim)
    quantized, indices, losses, codes = layer(x, return_all_codes=True)
    assert torch.allclose(layer.get_output_from_indices(indices), quantized, atol=1e-6)
    assert codes.shape == (3, 2, 30, 4) and indices.shape == (2, 30, 3) and losses.shape == (3,)
    coarse = layer.get_codes_from_indices(indices[..., :2])
    assert torch.equal(coarse[:2], codes[:2]) and not coarse[2].any()
    assert not layer.get_output_from_indices(torch.full((1, 2, 3), -1)).any()
    with pytest.raises(ValueError, match="at most 3"):
        layer.get_codes_from_indices(torch.zeros(1, 1, 4, dtype=torch.long))


@pytest.mark.parametrize("dim", (4, 9))
@pytest.mark.parametrize("kind", ("residual", "grouped", "grouped, by flag"))
def test_residual_images(kind, dim):
    """With a projection too; quantized has the layout of the input, indices are [..., B, H, W, Q]."""
    torch.manual_seed(0)
    if kind == "residual":
        layer = ResidualLFQ(dim=dim, num_quantizers=3, codebook_size=16, quantize_dropout=True)
    else:
        image = {"accept_image_fmap": True} if kind == "grouped, by flag" else {}
        layer = GroupedResidualLFQ(dim=2 * dim, groups=2, num_quantizers=3, codebook_size=16, **image)
    x = torch.randn(2, layer.dim, 5, 6)
    mask = torch.rand(2, 5, 6) < 0.5
    for train in (True, False):
        quantized, indices, losses = layer.train(train)(x, mask=mask)[:3]
        assert quantized.shape == x.shape and indices.shape[-4:] == (2, 5, 6, 3) and losses.shape[-1] == 3
    assert torch.allclose(layer.get_output_from_indices(indices), quantized, atol=1e-6)
    tokens = x.movedim(1, -1).flatten(1, 2)
    if kind != "grouped, by flag":
        expected = layer(tokens)
        assert torch.equal(expected[1].flatten(-3, -2).flatten(), indices.flatten())
    usage = layer.usage if kind == "residual" else layer.usage[0]
    assert len(usage) == 3 and usage[0].counts.sum() == 60


def test_residual_options_that_do_not_fit():
    for options, message in (
        ({"num_quantizers": 0}, "at least one"),
        ({"num_codebooks": 2}, "belong to LFQ"),
        ({"quantize_dropout_cutoff_index": 5}, "cutoff"),
        ({"codebook_size": 20}, "power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            ResidualLFQ(**{"dim": 4, "num_quantizers": 3, "codebook_size": 16} | options)
    with pytest.raises(ValueError, match="does not split"):
        GroupedResidualLFQ(dim=7, groups=2, num_quantizers=2, codebook_size=16)


def test_a_non_finite_token_in_residual_layers():
    layer = ResidualLFQ(dim=4, num_quantizers=3, codebook_size=16)
    x = torch.randn(1, 6, 4)
    x[0, 2, 0] = torch.nan
    quantized, indices, losses = layer(x)
    assert (indices[0, 2] == -1).all() and quantized[0, 2].isnan().all() and losses.isfinite().all()
    assert quantized[0, [0, 1, 3, 4, 5]].isfinite().all()


# the others


def test_random_projections_are_the_nearest_directions():
    layer = RandomProjectionQuantizer(dim=12, codebook_size=30, codebook_dim=5, num_codebooks=3)
    layer.train()
    assert layer.training and not layer.vq.training
    x = 3.0 + 2.0 * torch.randn(2, 40, 12)
    x[0, 0, 0] = torch.nan
    indices = layer(x)
    z = nn.functional.layer_norm(x, (12,))
    z = layer.vq.project_in(torch.cat([z @ projection for projection in layer.rand_projs], -1)).double()
    for book, part in enumerate(z.chunk(3, -1)):
        cosine = part @ layer.vq._codebook.embed[book].double().mT
        expected = cosine.argmax(-1)
        expected[0, 0] = -1
        assert torch.equal(indices[..., book], expected)
    assert torch.equal(layer(x), indices), "nothing changes"
    assert torch.equal(layer(x[1]), indices[1]), "any number of dimensions"
    assert layer.usage.counts.shape == (3, 30)


@pytest.mark.parametrize("bits", (2, 6))
def test_binary_mapper_gradient_is_that_of_the_probabilities(bits):
    mapper = BinaryMapper(bits)
    logits = torch.randn(5, bits, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 2**bits, dtype=torch.float64)
    one_hot, indices, _ = mapper(logits, return_indices=True)
    assert torch.equal(one_hot.detach(), nn.functional.one_hot(indices, 2**bits).double())
    codes = [torch.full((5,), code) for code in range(2**bits)]
    probability = torch.stack([mapper.log_prob(logits, indices=code) for code in codes], -1).exp()
    assert torch.allclose(probability.sum(-1), torch.ones(5, dtype=torch.float64))
    a = torch.autograd.grad((one_hot * weight).sum(), logits)[0]
    b = torch.autograd.grad((probability * weight).sum(), logits)[0]
    assert torch.allclose(a, b, atol=1e-12)
    assert not mapper(logits, straight_through=False)[0].requires_grad


def test_binary_mapper_draws_by_the_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, -0.5])
    indices = BinaryMapper(2)(logits.expand(40_000, 2), return_indices=True)[1]
    p, q = logits.sigmoid().tolist()  # the first bit is the least significant
    expected = [(1 - p) * (1 - q), p * (1 - q), (1 - p) * q, p * q]
    assert torch.allclose(indices.bincount(minlength=4) / 40_000, torch.tensor(expected), atol=0.01)


def test_binary_mapper_with_hostile_logits():
    mapper = BinaryMapper(3, kl_loss_threshold=0.0)
    logits = torch.randn(6, 3)
    logits[2, 1] = torch.nan
    logits[4] = torch.tensor([torch.inf, -torch.inf, 1e30])
    logits.requires_grad_()
    one_hot, indices, loss = mapper(logits, return_indices=True)
    assert indices[2] == -1 and one_hot[2].isnan().all() and indices[4] == 0b101
    clean = logits.detach()[[0, 1, 3, 4, 5]]
    assert torch.allclose(loss, mapper.calc_aux_loss(clean))
    (one_hot[[0, 1, 3, 4, 5]].square().sum() + loss).backward()
    assert logits.grad[[0, 1, 3, 4, 5]].isfinite().all() and not logits.grad[2].any()
    with pytest.raises(ValueError, match="expected"):
        mapper(torch.randn(2, 4))
    with pytest.raises(ValueError, match="one of"):
        mapper.log_prob(logits)


@pytest.mark.parametrize(
    "options", ({"dim": 8}, {"dim": 8, "codebook_size": 64}, {"dim": 8, "orthogonal_rotation": True})
)
def test_evo_lfq_decodes_what_it_encodes(options):
    layer = EvoLFQ(nn.Linear(5, 8), nn.Linear(8, 5), **options).train()
    for x in (torch.randn(7, 5), torch.randn(3, 4, 5)):
        for signs in (False, True):
            decoded = layer.decode_bits(layer.encode(x, return_signs=signs))
            assert torch.allclose(decoded, layer.eval()(x).reconstructed, atol=1e-5)
        assert layer.train().training


def test_evo_lfq_keeps_the_fittest_it_has_seen():
    torch.manual_seed(0)
    layer = EvoLFQ(nn.Identity(), nn.Identity(), dim=12, pop_size=20, generations=15, mutation_rate=0.05)
    goal = torch.where(torch.rand(12) < 0.5, 1.0, -1.0)

    def fitness(decoded, population):
        return (decoded == goal).float().sum(-1)

    best = []
    for result in layer.evolve(fitness, shape=(12,), return_best_decoded=True):
        assert (result.best_decoded == goal).sum() == result.best_fitness
        assert torch.equal(layer.decode_bits(result.best_gene[None])[0], result.best_decoded)
        best.append(result.best_fitness)
    assert best == sorted(best) and best[-1] > best[0] and len(best) == 15
    for options in ({"dim": 4, "pop_size": 1}, {}):
        with pytest.raises(ValueError):
            EvoLFQ(nn.Identity(), nn.Identity(), **options)
    with pytest.raises(ValueError, match="shape"):
        next(layer.evolve(fitness))
