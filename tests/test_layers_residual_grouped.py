"""GroupedResidualVQ and HierarchicalVQ: beside vector-quantize-pytorch's, and on their own."""

import pytest
import torch
from layer_pairs import BATCH, DIM, K, close, close_states, compare, pair, same

from vqkernels import GroupedResidualVQ, HierarchicalVQ, ResidualVQ

TOKENS = 20

GROUPED = {
    "plain": {},
    "one group": {"groups": 1},
    "shared": {"shared_codebook": True},
    "dropout": {"quantize_dropout": True},
    "more dropout": {"quantize_dropout": True, "num_quantizers": 6},
    "dropout in pairs": {"quantize_dropout": True, "num_quantizers": 5, "quantize_dropout_multiple_of": 2},
    "narrow": {"codebook_dim": 3},
    "cosine": {"use_cosine_sim": True},
    "implicit": {"implicit_neural_codebook": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "diveq": {"diveq": True},
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_residual_vq(name):
    options = {"dim": DIM, "groups": 4, "num_quantizers": 3, "codebook_size": K} | GROUPED[name]
    mine, other = pair("GroupedResidualVQ", **options)
    for _ in range(3):
        index = compare(mine, other, torch.randn(BATCH, TOKENS, DIM))
    assert index.shape == (options["groups"], BATCH, TOKENS, options["num_quantizers"])
    close(mine.codebooks, other.codebooks)
    close(mine.get_codes_from_indices(index), other.get_codes_from_indices(index))
    close(mine.get_output_from_indices(index), other.get_output_from_indices(index))
    x = torch.randn(BATCH, TOKENS, DIM)
    torch.manual_seed(1)
    a = mine(x, return_all_codes=True, freeze_codebook=True)
    torch.manual_seed(1)
    b = other(x, return_all_codes=True, freeze_codebook=True)
    assert len(a[3]) == len(b[3]) == options["groups"]
    for u, v in zip(a[3], b[3], strict=True):
        close(u.detach(), v.detach())
    if name != "diveq":
        mine.eval(), other.eval()
        compare(mine, other, x)


def test_grouped_residual_vq_with_a_mask():
    mine, other = pair("GroupedResidualVQ", dim=DIM, groups=2, num_quantizers=3, codebook_size=K)
    for train in (True, False):
        mine.train(train), other.train(train)
        compare(mine, other, torch.randn(BATCH, TOKENS, DIM), mask=torch.rand(BATCH, TOKENS) < 0.6)


HIERARCHICAL = {
    "plain": ({}, (BATCH, DIM, 16)),
    "channels last": ({"channel_first": False}, (BATCH, 16, DIM)),
    "image": ({"accept_image_fmap": True, "scales": (1, (2, 3), 5)}, (BATCH, DIM, 6, 7)),
    "volume": ({"accept_3d_fmap": True, "scales": (1, 2, 3)}, (BATCH, DIM, 4, 5, 3)),
    "not shared": ({"shared_codebook": False, "codebook_size": (8, 16, 24)}, (BATCH, DIM, 16)),
    "two convolutions": ({"share_quant_resi": 2, "rotation_trick": True}, (BATCH, DIM, 16)),
    "convolution per level": ({"share_quant_resi": 0, "commitment_weight": 0.3}, (BATCH, DIM, 16)),
    "no convolution": ({"quant_resi": 0.0}, (BATCH, DIM, 16)),
    "sometimes dropout": ({"nested_dropout": 0.5}, (BATCH, DIM, 16)),
    "always dropout": (
        {"nested_dropout": 1.0, "share_quant_resi": 3, "nested_dropout_min_levels": 2},
        (BATCH, DIM, 16),
    ),
    "sampling": ({"stochastic_sample_codes": True}, (BATCH, DIM, 16)),
    # with a shared codebook, a later level's EMA step changes what the backward pass of theirs reads
    "orthogonal": (
        {"orthogonal_reg_weight": 0.5, "orthogonal_reg_max_codes": None, "shared_codebook": False},
        (BATCH, DIM, 16),
    ),
    "orthogonal few": ({"orthogonal_reg_weight": 0.5, "orthogonal_reg_max_codes": 5}, (BATCH, DIM, 16)),
}


@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_hierarchical_vq(name, masked):
    options, shape = HIERARCHICAL[name]
    defaults = {"scales": (1, 4, 16), "codebook_size": K, "kmeans_init": False, "threshold_ema_dead_code": 0}
    mine, other = pair("HierarchicalVQ", dim=DIM, **(defaults | options))
    spatial = shape[1:-1] if name == "channels last" else shape[2:]
    for seed in range(4):
        mine.train(seed < 3), other.train(seed < 3)
        x, mask = torch.randn(shape), torch.rand(BATCH, *spatial) < 0.6
        results = []
        for layer in (mine, other):
            torch.manual_seed(seed)
            v = x.clone().requires_grad_()
            layer.zero_grad()
            quantized, index, loss, cutoff = layer(v, mask=mask if masked else None, return_cutoff=True)
            if seed < 3:
                (quantized.square().sum() + loss).backward()
            grads = [v.grad, *(p.grad for p in layer.parameters())]
            results.append((quantized, *index, loss, *grads, torch.tensor(-1 if cutoff is None else cutoff)))
        for a, b in zip(*results, strict=True):
            same(a, b, name)
        close_states(mine, other)
    close(mine.get_output_from_indices(index, spatial).detach(), other.get_output_from_indices(index, spatial).detach())
    if not masked:
        close(mine.get_output_from_indices(index, spatial).detach(), quantized.detach())


def test_hierarchical_vq_lens_and_temperature():
    mine, other = pair(
        "HierarchicalVQ",
        dim=DIM,
        codebook_size=K,
        scales=(1, 3, 12),
        kmeans_init=False,
        threshold_ema_dead_code=0,
        stochastic_sample_codes=True,
    )
    x, lens = torch.randn(BATCH, DIM, 16), torch.tensor([16, 5])
    for temperature in (None, 0.0, 2.0):
        results = []
        for layer in (mine, other):
            torch.manual_seed(4)
            quantized, index, loss = layer(x, lens=lens, sample_codebook_temp=temperature)
            results.append((quantized, *index, loss))
        for a, b in zip(*results, strict=True):
            same(a, b)


# on their own


def grouped(**options):
    torch.manual_seed(0)
    return GroupedResidualVQ(**({"dim": 8, "groups": 2, "num_quantizers": 3, "codebook_size": K} | options))


@pytest.mark.parametrize("options", ({}, {"beam_size": 3}, {"codebook_dim": 3}, {"codebook_size": (4, 8, 16)}))
@pytest.mark.parametrize(
    "layout, shape",
    (
        ({"channel_last": False}, (2, 8, 12)),
        ({"accept_image_fmap": True}, (2, 8, 3, 4)),
        ({"accept_3d_fmap": True}, (2, 8, 3, 2, 2)),
    ),
    ids=("first", "image", "volume"),
)
def test_grouped_layouts(layout, shape, options):
    first, last = grouped(**layout, **options), grouped(**options)
    x = torch.randn(shape)
    for train in (True, False):
        first.train(train), last.train(train)
        (q1, i1, l1), (q2, i2, l2) = first(x), last(x.movedim(1, -1).flatten(1, -2))
        close(q1.movedim(1, -1).flatten(1, -2).detach(), q2.detach()), close(l1.detach(), l2.detach())
        assert i1.shape == (2, 2, *shape[2:], 3) and torch.equal(i1.flatten(2, -2), i2)
    close(first.get_output_from_indices(i1).detach(), q1.detach())
    assert first.get_codes_from_indices(i1).shape == (2, 3, 2, *shape[2:], options.get("codebook_dim", 4))
    books = first.codebooks
    if "codebook_size" in options:
        assert [[len(book) for book in group] for group in books] == [[4, 8, 16]] * 2
    else:
        assert books.shape == (2, 3, K, options.get("codebook_dim", 4))


def test_groups_are_residual_layers_side_by_side():
    layer = grouped(quantize_dropout=True)
    parts = [ResidualVQ(dim=4, num_quantizers=3, codebook_size=K, quantize_dropout=True) for _ in range(2)]
    for part, rvq in zip(parts, layer.rvqs, strict=True):
        part.load_state_dict(rvq.state_dict())
    x, mask, lens = torch.randn(2, 12, 8), torch.rand(2, 12) < 0.6, torch.tensor([12, 5])
    for seed in range(4):
        for arguments in ({"mask": mask}, {"lens": lens}):
            whole = layer(x, rand_quantize_dropout_fixed_seed=seed, **arguments)
            halves = [
                part(half, rand_quantize_dropout_fixed_seed=seed, **arguments)
                for part, half in zip(parts, x.chunk(2, -1), strict=True)
            ]
            assert torch.equal(whole[0], torch.cat([h[0] for h in halves], -1))
            for number in (1, 2):
                assert torch.equal(whole[number], torch.stack([h[number] for h in halves]))
    torch.manual_seed(3)
    index = layer(x)[1]
    assert torch.equal(index[0] < 0, index[1] < 0), "all groups keep the same levels"


def test_grouped_usage_cross_entropy_and_single_tokens():
    layer = grouped().eval()
    x = torch.randn(2, 12, 8)
    quantized, index, _ = layer(x)
    usage = layer.usage
    assert len(usage) == 2 and len(usage[0]) == 3
    assert torch.equal(usage[1][2].counts.cpu(), torch.bincount(index[1, ..., 2].flatten(), minlength=K))
    again, entropy = layer(x, indices=index)
    close(again, quantized)
    parts = [rvq(h, indices=i)[1] for rvq, h, i in zip(layer.rvqs, x.chunk(2, -1), index, strict=True)]
    close(entropy, sum(parts))
    close(layer(x[:, 0])[0], quantized[:, 0])
    first = grouped(channel_last=False).eval()
    close(first(x[:, 0])[0], quantized[:, 0])
    close(first.get_output_from_indices(index[:, :, 0]), quantized[:, 0])
    with pytest.raises(ValueError, match="for 3 groups; expected 2"):
        layer.get_codes_from_indices(torch.zeros(3, 1, 1, 3, dtype=torch.long))


def hierarchical(**options):
    torch.manual_seed(0)
    return HierarchicalVQ(**({"dim": 8, "codebook_size": K, "scales": (1, 3, 12)} | options))


def test_hierarchical_vq_by_the_formula():
    """One dimension, the last scale that of the input, no convolution: residuals of averages."""
    layer = hierarchical(kmeans_init=False, quant_resi=0.0).eval()
    x = torch.randn(2, 8, 12)
    quantized, index, loss = layer(x)
    book, rest = layer.vq.codebook, x
    for level, scale in enumerate((1, 3, 12)):
        cells = rest.unflatten(-1, (scale, 12 // scale)).mean(-1)
        assert torch.equal(torch.cdist(cells.mT, book).argmin(-1), index[level])
        rest = rest - torch.nn.functional.interpolate(book[index[level]].mT, size=12, mode="linear")
    close(quantized, x - rest)
    assert loss == 0 and [i.shape for i in index] == [(2, 1), (2, 3), (2, 12)]
    assert len(layer.usage) == 3 and layer.usage[2].counts.sum() == 24


@pytest.mark.parametrize("shared", (True, False))
def test_hierarchical_vq_trains_from_its_default_start(shared):
    layer = hierarchical(shared_codebook=shared, codebook_size=8)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    x = torch.randn(16, 8, 12).cumsum(-1) * 0.3
    errors = []
    for _ in range(30):
        quantized, _, loss = layer(x)
        errors.append((quantized - x).square().mean())
        optimizer.zero_grad()
        (errors[-1] + loss).backward()
        optimizer.step()
    assert errors[-1] < 0.7 * x.square().mean() and errors[-1] < errors[1]
    quantized, index, _ = layer.eval()(x)
    close(layer.get_output_from_indices(index).detach(), quantized.detach())


def test_hierarchical_vq_ignores_what_is_masked():
    layer, other = hierarchical(kmeans_init=False), hierarchical(kmeans_init=False)
    x, lens = torch.randn(3, 8, 12), torch.tensor([12, 4, 0])
    mask = torch.arange(12) < lens[:, None]
    hostile = torch.where(mask.unsqueeze(1), x, torch.nan)
    results = []
    for module, v, by in ((layer, x, {"lens": lens}), (other, hostile, {"mask": mask})):
        torch.manual_seed(1)
        v = v.clone().requires_grad_()
        quantized, index, loss = module(v, **by)
        (quantized.square().sum() + loss).backward()
        assert (quantized.mT[~mask] == 0).all() and (v.grad.mT[~mask] == 0).all()
        results.append((quantized, *index, loss, torch.where(mask.unsqueeze(1), v.grad, 0.0)))
    for a, b in zip(*results, strict=True):
        same(a, b)
    assert (results[0][1][2] == -1).all(), "a sample without a token has no code at all"
    close_states(layer, other)


def test_hierarchical_vq_keeps_other_samples_and_its_state_from_nan():
    layer, plain = hierarchical(kmeans_init=False).eval(), hierarchical(kmeans_init=False).eval()
    x = torch.randn(3, 8, 12)
    bad = x.clone()
    bad[1, 2, 5] = torch.nan
    a, b = layer(bad), plain(x)
    assert a[0][1].isnan().any()
    close(a[0][[0, 2]].detach(), b[0][[0, 2]].detach())
    layer.train()(bad)
    assert all(value.isfinite().all() for value in layer.state_dict().values())


def test_hierarchical_vq_under_autocast_and_in_half_precision():
    layer = hierarchical(kmeans_init=False).eval()
    x = torch.randn(2, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, message",
    (
        ({"scales": (4, 2)}, "none that shrinks"),
        ({"scales": ()}, "at least one"),
        ({"scales": (0, 2)}, "a positive number"),
        ({"scales": ((1, 1), 2)}, "a positive number, or 1"),
        ({"codebook_size": (4, 4)}, "for 3 scales"),
        ({"codebook_size": (4, 4, 5)}, "shared_codebook=False"),
        ({"nested_dropout": 1.5}, "a probability"),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "choose one"),
    ),
)
def test_hierarchical_vq_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        hierarchical(**options)


def test_hierarchical_vq_says_what_is_wrong_with_inputs():
    layer = hierarchical(kmeans_init=False)
    for arguments, message in (
        ((torch.randn(2, 7, 12),), "expected .B, 8. and 1 spatial"),
        ((torch.randn(2, 8, 3, 4),), "expected .B, 8. and 1 spatial"),
        ((torch.randn(2, 8, 12), torch.zeros(1)), "get_output_from_indices"),
        ((torch.randn(2, 8, 12), None, torch.ones(2, 11, dtype=torch.bool)), "expected torch.bool"),
        ((torch.randn(2, 8, 12), None, torch.ones(2, 12, dtype=torch.bool), torch.ones(2)), "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
    with pytest.raises(ValueError, match="indices of 2 levels; expected 3"):
        layer.get_output_from_indices([torch.zeros(1, 1).long()] * 2)
