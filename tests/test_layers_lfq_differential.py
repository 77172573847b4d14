"""LFQ, its residual forms, RandomProjectionQuantizer, BinaryMapper and EvoLFQ against the installed
vector-quantize-pytorch.

Most of it in float64, where both compute the same thing to many digits: at the default inverse temperature of 100 the
float32 softmax over all codes there loses half of them.
"""

import pytest
import torch
from scalar_pairs import close, compare, pair, theirs
from torch import nn

from vqkernels.layers import (
    LFQ,
    BinaryMapper,
    EvoLFQ,
    GroupedResidualLFQ,
    RandomProjectionQuantizer,
    ResidualLFQ,
)

WIDTHS = {
    "own": {},
    "two codebooks": {"num_codebooks": 2},
    "kept": {"keep_num_codebooks_dim": True},
    "projected": {"dim": 9},
    "without bias": {"dim": 9, "num_codebooks": 2, "projection_has_bias": False},
    "cosine projection": {"dim": 9, "cosine_sim_project_in": True},
    "scaled cosine projection": {"dim": 9, "cosine_sim_project_in": True, "cosine_sim_project_in_scale": 3.0},
    "square projection": {"has_projections": True},
}
MODES = {
    "plain": {},
    "no entropy": {"entropy_loss_weight": 0.0},
    "commitment": {"commitment_loss_weight": 0.3, "codebook_scale": 0.5},
    "gamma": {"diversity_gamma": 0.4, "entropy_loss_weight": 2.0},
    "softplus": {"experimental_softplus_entropy_loss": True, "entropy_loss_offset": 0.5},
    "soft clamp": {"soft_clamp_input_value": 1.5},
    "spherical": {"spherical": True, "commitment_loss_weight": 0.3, "codebook_scale": 0.7},
    "rotation": {"orthogonal_rotation": True, "commitment_loss_weight": 0.3},
    "spherical rotation": {"spherical": True, "orthogonal_rotation": True},
    "half of the tokens": {"frac_per_sample_entropy": 0.5, "commitment_loss_weight": 0.3},
}
LAYOUTS = {
    "last": ({}, lambda d: (2, 30, d)),
    "first": ({"channel_first": True}, lambda d: (2, d, 30)),
    "image": ({}, lambda d: (2, d, 5, 6)),
    "video": ({}, lambda d: (2, d, 2, 3, 5)),
}


def doubles(layer_class, **options):
    options = {"force_quantization_f32": False} | options
    mine, other = pair(layer_class, **options)
    return mine.double(), other.double()


def breakdown_from_seed(layer, x):
    torch.manual_seed(2)
    return layer(x, return_loss_breakdown=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", WIDTHS)
def test_lfq(width, mode, layout):
    options, shape = LAYOUTS[layout]
    bits = 4 if layout in ("last", "image") else 7  # one table, and two halves
    mine, other = doubles(LFQ, **{"codebook_size": 2**bits} | WIDTHS[width] | MODES[mode] | options)
    for train, temperature in ((True, 100.0), (True, 0.5), (False, 100.0)):
        mine.train(train), other.train(train)
        x = torch.randn(shape(mine.dim)).double()
        index = compare(mine, other, x, 1e-9, inv_temperature=temperature)
        a, b = (breakdown_from_seed(layer, x) for layer in (mine, other))
        assert a[0]._fields == b[0]._fields and a[1]._fields == b[1]._fields
        for part, expected in zip(a[1], b[1], strict=True):
            assert abs(part.item() - expected.item()) < 1e-9
    close(mine(x)[0], mine.indices_to_codes(index), 1e-12)
    if not (width in ("kept", "two codebooks", "without bias") and layout == "first"):
        close(mine.indices_to_codes(index), other.indices_to_codes(index), 1e-7)
        close(mine.indices_to_codes(index, project_out=False), other.indices_to_codes(index, project_out=False), 1e-7)


@pytest.mark.parametrize("bits", (1, 2, 5, 6, 8, 11))
@pytest.mark.parametrize("temperature", (0.01, 1.0, 10.0, 100.0))
def test_entropies_of_all_sizes(bits, temperature):
    mine, other = doubles(LFQ, dim=bits, entropy_loss_weight=1.0, diversity_gamma=0.3)
    for scale in (0.01, 1.0, 30.0):
        compare(mine, other, scale * torch.randn(3, 20, bits).double(), 1e-9, inv_temperature=temperature)


@pytest.mark.parametrize("mode", MODES)
def test_float32(mode):
    """Their float32 gradient is that far from their float64 one, ours is closer."""
    for bits, temperature, tolerance in ((4, 100.0, 5e-4), (8, 100.0, 5e-4), (8, 1.0, 1e-4)):
        mine, other = pair(LFQ, dim=bits, **MODES[mode])
        compare(mine, other, torch.randn(2, 50, bits), tolerance, inv_temperature=temperature)


def gradient(layer, x, temperature):
    x = x.clone().requires_grad_()
    layer(x, inv_temperature=temperature).entropy_aux_loss.backward()
    return x.grad.double()


@pytest.mark.parametrize("bits", (4, 10))
@pytest.mark.parametrize("temperature", (10.0, 100.0))
def test_float32_is_no_less_exact(bits, temperature):
    mine, other = pair(LFQ, dim=bits, force_quantization_f32=False)
    x = torch.randn(4, 100, bits)
    a, b = gradient(mine, x, temperature), gradient(other, x, temperature)
    exact = gradient(other.double(), x.double(), temperature)
    assert (a - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (a - exact).abs().max() <= (b - exact).abs().max()


@pytest.mark.parametrize("mode", ("plain", "commitment", "softplus", "rotation", "spherical"))
def test_masked_samples(mode):
    mask = torch.tensor([True, False, True])
    for bits, shape in ((4, (3, 20, 4)), (7, (3, 20, 7)), (4, (3, 4, 4, 5))):
        mine, other = doubles(LFQ, dim=bits, **MODES[mode])
        compare(mine, other, torch.randn(shape).double(), 1e-9, mask=mask)


def losses_and_gradient(layer, x, **kwargs):
    x = x.clone().requires_grad_()
    (_, _, loss), breakdown = layer(x, return_loss_breakdown=True, **kwargs)
    loss.backward()
    return loss.detach(), *(part.detach() for part in breakdown), x.grad


@pytest.mark.parametrize("mode", ("plain", "commitment", "softplus", "rotation", "spherical"))
def test_masked_tokens(mode):
    """As if the other tokens were not there. (Given such a mask, theirs takes every token for a codebook.)"""
    mask = torch.rand(3, 20) < 0.6
    for bits in (4, 7):
        mine, other = doubles(LFQ, dim=bits, **MODES[mode])
        x = torch.randn(3, 20, bits).double()
        *a, grad = losses_and_gradient(mine, x, mask=mask)
        *b, expected = losses_and_gradient(other, x[mask].unsqueeze(0))
        for mine_value, other_value in zip(a, b, strict=True):
            assert abs(mine_value.item() - other_value.item()) < 1e-9
        close(grad[mask], expected[0], 1e-9)
        assert not grad[~mask].any()
        assert torch.equal(mine(x, mask=mask)[1], other(x)[1]), "masked tokens are quantized too"


def test_activation():
    mine, other = doubles(LFQ, dim=5, straight_through_activation=nn.Tanh())
    compare(mine, other, torch.randn(2, 30, 5).double(), 1e-9)


def test_codebook():
    mine, other = pair(LFQ, dim=5, codebook_scale=0.5)
    close(mine.codebook, other.codebook, 0.0)
    close(mine.bits_to_codes(torch.eye(5)), other.bits_to_codes(torch.eye(5)), 0.0)
    assert mine.dtype == other.dtype and mine.codebook_dim == other.codebook_dim


RESIDUAL = {
    "plain": {},
    "projected": {"dim": 9},
    "commitment": {"commitment_loss_weight": 0.5},
    "soft clamp": {"soft_clamp_input_value": 2.0},
    "gamma": {"diversity_gamma": 0.2, "entropy_loss_weight": 0.7},
    "spherical": {"spherical": True},
    "rotation": {"orthogonal_rotation": True},
}


@pytest.mark.parametrize("mode", RESIDUAL)
@pytest.mark.parametrize("levels", (1, 4))
def test_residual_lfq(levels, mode):
    options = {"dim": 6, "num_quantizers": levels, "codebook_size": 64} | RESIDUAL[mode]
    mine, other = doubles(ResidualLFQ, **options)
    for train in (True, False):
        mine.train(train), other.train(train)
        x = torch.randn(2, 30, options["dim"]).double()
        index = compare(mine, other, x, 1e-7)
        compare(mine, other, x, 1e-7, mask=torch.tensor([True, False]))
    close(mine.codebooks, other.codebooks, 0.0)
    if mode not in ("spherical", "rotation"):  # theirs decodes these as if they were plain
        close(mine.get_codes_from_indices(index), other.get_codes_from_indices(index), 1e-12)
        close(mine.get_output_from_indices(index), other.get_output_from_indices(index), 1e-12)
        a, b = mine(x, return_all_codes=True), other(x, return_all_codes=True)
        close(a[3], b[3], 1e-12)
    close(mine.get_output_from_indices(index), mine(x)[0], 1e-12)


@pytest.mark.parametrize("multiple", (1, 2, 4))
def test_quantize_dropout(multiple):
    mine, other = doubles(
        ResidualLFQ,
        dim=4,
        num_quantizers=6,
        codebook_size=16,
        quantize_dropout=True,
        quantize_dropout_cutoff_index=1,
        quantize_dropout_multiple_of=multiple,
    )
    x, used = torch.randn(2, 30, 4).double(), set()
    for seed in range(8):
        index = compare(mine, other, x, 1e-9, rand_quantize_dropout_fixed_seed=seed)
        used.add(int((index[0, 0] >= 0).sum()))
    assert len(used) > 1
    compare(mine, other, x, 1e-9)  # the number drawn is the same too
    close(mine.get_output_from_indices(index[..., :2]), other.get_output_from_indices(index[..., :2]), 1e-12)


@pytest.mark.parametrize("options", ({"groups": 2, "dim": 8}, {"groups": 2, "dim": 14}, {"groups": 1, "dim": 4}))
def test_grouped_residual_lfq(options):
    mine, other = doubles(GroupedResidualLFQ, num_quantizers=3, codebook_size=16, quantize_dropout=True, **options)
    for train in (True, False):
        mine.train(train), other.train(train)
        x = torch.randn(2, 20, options["dim"]).double()
        index = compare(mine, other, x, 1e-9)
        compare(mine, other, x, 1e-9, mask=torch.tensor([False, True]))
    close(mine.get_codes_from_indices(index), other.get_codes_from_indices(index), 1e-12)
    close(mine.get_output_from_indices(index), other.get_output_from_indices(index), 1e-12)
    a, b = mine(x, return_all_codes=True), other(x, return_all_codes=True)
    assert type(a[3]) is type(b[3]) and len(a[3]) == len(b[3])
    for mine_codes, other_codes in zip(a[3], b[3], strict=True):
        close(mine_codes, other_codes, 1e-12)
    close(mine.codebooks, other.codebooks, 0.0)


@pytest.mark.parametrize("norm", (True, False))
@pytest.mark.parametrize("codebooks", (1, 4))
def test_random_projection_quantizer(codebooks, norm):
    options = {"dim": 24, "codebook_size": 40, "codebook_dim": 6, "num_codebooks": codebooks, "norm": norm}
    mine, other = pair(RandomProjectionQuantizer, **options)
    x = 2.0 + torch.randn(2, 200, 24)
    for train in (True, False):
        mine.train(train), other.train(train)
        index = mine(x)
        assert index.dtype == torch.int64 and torch.equal(index, other(x))
        close(mine(x, indices=index), other(x, indices=index), 1e-5)
    leaf = [x.clone().requires_grad_() for _ in range(2)]
    for layer, v in zip((mine, other), leaf, strict=True):
        layer(v, indices=index).backward()
    close(leaf[0].grad, leaf[1].grad, 1e-5)


@pytest.mark.parametrize("bits", (1, 3, 8))
@pytest.mark.parametrize("reduce", (True, False))
@pytest.mark.parametrize("temperature", (1.0, 0.3))
def test_binary_mapper(bits, reduce, temperature):
    mine, other = (kind(bits, kl_loss_threshold=0.1) for kind in (BinaryMapper, theirs.BinaryMapper))
    assert mine.state_dict().keys() == other.state_dict().keys()
    weight = torch.randn(3, 20, 2**bits)
    for train in (True, False):
        for deterministic in (None, True, False):
            results = []
            for layer in (mine.train(train), other.train(train)):
                torch.manual_seed(5)
                logits = torch.randn(3, 20, bits, requires_grad=True)
                hot, index, loss = layer(
                    logits,
                    temperature,
                    straight_through=True,
                    deterministic=deterministic,
                    return_indices=True,
                    reduce_aux_kl_loss=reduce,
                )
                ((hot * weight).sum() + loss.sum()).backward()
                results.append((hot.detach(), loss.detach(), logits.grad, index))
                for sum_bits in (True, False):
                    by_index = layer.log_prob(logits, indices=index, sum_bits=sum_bits)
                    by_hot = layer.log_prob(logits, one_hot=hot, sum_bits=sum_bits)
                    results[-1] += (by_index.detach(), by_hot.detach())
                results[-1] += (layer.binary_entropy(logits).detach(),)
            for a, b in zip(*results, strict=True):
                close(a, b, 1e-5)
            assert torch.equal(results[0][0].argmax(-1), results[0][3])


def test_binary_mapper_defaults():
    for options in ({}, {"deterministic_on_eval": True}):
        mine, other = (kind(4, **options) for kind in (BinaryMapper, theirs.BinaryMapper))
        for train in (True, False):
            outputs = []
            for layer in (mine.train(train), other.train(train)):
                torch.manual_seed(3)
                logits = torch.randn(7, 4, requires_grad=True)
                outputs.append(layer(logits))
            assert len(outputs[0]) == len(outputs[1]) == 2
            assert outputs[0][0].requires_grad == outputs[1][0].requires_grad
            for a, b in zip(*outputs, strict=True):
                close(a.detach(), b.detach(), 1e-6)


@pytest.mark.parametrize("codebooks", (1, 2))
@pytest.mark.parametrize("sign", (False, True))
def test_evo_lfq(sign, codebooks):
    def layer(kind):
        torch.manual_seed(0)
        return kind(
            nn.Linear(6, 8), nn.Linear(8, 6), dim=8, codebook_size=2 ** (8 // codebooks), num_codebooks=codebooks
        )

    mine, other = layer(EvoLFQ), layer(theirs.EvoLFQ)
    assert mine.state_dict().keys() == other.state_dict().keys()
    x, target = torch.randn(10, 6), torch.randn(6)
    for a, b in zip(mine(x), other(x), strict=True):
        close(a.detach(), b.detach(), 1e-4)
    bits = mine.encode(x, return_signs=sign)
    close(bits, other.encode(x, return_signs=sign), 0.0)
    close(mine.decode_bits(bits), other.decode_bits(bits), 1e-6)

    def fitness(decoded, population):
        return -(decoded - target).square().sum(-1)

    runs = []
    for model in (mine, other):
        torch.manual_seed(1)
        start = model.init_population_from_data(x, pop_size=16, is_sign=sign)
        runs.append([start] + [result.pop_bits for result in model.evolve(fitness, start, generations=5, is_sign=sign)])
        runs[-1].append(model.init_random_population(5, (8,), is_sign=sign))
        runs[-1].append(model.tournament_selection(start, fitness(model.decode_bits(start), start)))
        runs[-1] += model.step(start, fitness, batch_size=5, elitism_count=3, tournament_size=4, is_sign=sign)
    for a, b in zip(*runs, strict=True):
        close(a, b, 1e-6)
