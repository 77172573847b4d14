"""Every supported option against the installed vector-quantize-pytorch: same weights in, same results out.

Index rule: equal, or the two distances differ by less than float32 arithmetic can tell apart (ours are certified,
theirs come from a rounded float32 matrix).
"""

import pytest
import torch
from layer_pairs import BATCH, DIM, HEADS, LAYOUTS, K, close, close_states, compare, pair, same_choice


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are so small that threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("rotation", (True, False), ids=("rotation", "ste"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", ("same", "narrow"))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cosine", (False, True), ids=("euclid", "cosine"))
def test_vector_quantize(cosine, heads, width, layout, rotation, train):
    count = HEADS[heads].get("heads", 1)
    codebook_dim = DIM // count if width == "same" else 6
    options, shape = LAYOUTS[layout]
    mine, other = pair(
        "VectorQuantize",
        dim=DIM,
        codebook_size=K,
        codebook_dim=codebook_dim,
        use_cosine_sim=cosine,
        rotation_trick=rotation,
        **HEADS[heads],
        **options,
    )
    mine.train(train), other.train(train)
    for _ in range(3):
        index = compare(mine, other, torch.randn(shape))
    if heads != "shared":  # theirs leaves the heads apart there, so the result has another shape than quantized
        close(mine.get_codes_from_indices(index), other.get_codes_from_indices(index))
        if layout == "last" or width == "same":  # theirs projects the wrong dimension of a channels-first layout
            close(mine.get_output_from_indices(index), other.get_output_from_indices(index))
    quantized, index, _ = mine.eval()(torch.randn(shape))
    close(mine.get_output_from_indices(index), quantized, 1e-6, "round trip")


@pytest.mark.parametrize("cosine", (False, True), ids=("euclid", "cosine"))
def test_index_rule_on_many_rows(cosine):
    mine, other = pair("VectorQuantize", dim=8, codebook_size=500, use_cosine_sim=cosine)
    mine.eval(), other.eval()
    x = torch.randn(1, 20_000, 8)
    z = torch.nn.functional.normalize(x[0], dim=-1) if cosine else x[0]
    agree = same_choice(mine(x)[1][0], other(x)[1][0], z, mine.codebook, cosine)
    assert agree.float().mean() > 0.999


@pytest.mark.parametrize("zeros", (True, False), ids=("zeros", "input"))
@pytest.mark.parametrize("by", ("mask", "lens"))
@pytest.mark.parametrize("rotation", (True, False), ids=("rotation", "ste"))
def test_masks(by, rotation, zeros):
    mine, other = pair(
        "VectorQuantize", dim=DIM, codebook_size=K, rotation_trick=rotation, return_zeros_for_masked_padding=zeros
    )
    masks = {"mask": torch.rand(BATCH, 30) < 0.6, "lens": torch.tensor([30, 11])}
    for train in (True, True, False):
        mine.train(train), other.train(train)
        index = compare(mine, other, torch.randn(BATCH, 30, DIM), **{by: masks[by]})
    assert (index[1, 11:] == -1).all() if by == "lens" else ((index == -1) == ~masks["mask"]).all()


def test_one_token_per_sample():
    for options in ({}, {"codebook_dim": 6}, {"heads": 4, "codebook_dim": 4}, {"channel_last": False}):
        compare(*pair("VectorQuantize", dim=DIM, codebook_size=K, **options), torch.randn(40, DIM))


@pytest.mark.parametrize("steps, tolerance", ((1, 1e-6), (10, 2e-6), (100, 5e-6)))
@pytest.mark.parametrize("cosine", (False, True), ids=("euclid", "cosine"))
def test_ema_trajectory(cosine, steps, tolerance):
    mine, other = pair("VectorQuantize", dim=8, codebook_size=12, decay=0.9, use_cosine_sim=cosine)
    centres = torch.randn(12, 8) * 2
    for _ in range(steps):
        x = centres[torch.randint(12, (1, 200))] + 0.3 * torch.randn(1, 200, 8)
        assert torch.equal(mine(x)[1], other(x)[1])
    close_states(mine, other, tolerance)


@pytest.mark.parametrize("options", ({}, {"heads": 4, "codebook_dim": 4}, {"codebook_dim": 6}))
def test_learnable_codebook(options):
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, learnable_codebook=True, ema_update=False, **options)
    x = torch.randn(BATCH, 30, DIM)
    compare(mine, other, x)
    compare(mine, other, x, freeze_codebook=True)
    if mine.has_projections:
        return  # ours then still routes the gradient into project_in
    # without an input gradient the reconstruction trains the codewords
    for training in (True, False):
        grads = []
        for layer in (mine, other):
            layer.train(training).zero_grad()
            layer(x)[0].square().sum().backward()
            grads.append(layer._codebook.embed.grad)
        close(*grads, what="codebook gradient")


def test_loss_options():
    x = torch.randn(BATCH, 30, DIM)
    for weight in (0.0, 0.25, 3.0):
        mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, commitment_weight=weight)
        compare(mine, other, x)
        a, b = mine(x, return_loss_breakdown=True), other(x, return_loss_breakdown=True)
        assert a[3]._fields == b[3]._fields
        for part, expected in zip(a[3], b[3], strict=True):
            close(part.detach(), expected.detach())
        a[2].backward(), b[2].backward()  # a loss may be used even when x needs no gradient


def test_frozen_ema_and_forward_overrides():
    x = torch.randn(BATCH, 30, DIM)
    for constructor, arguments in (
        ({"freeze_codebook": True}, {}),
        ({"freeze_codebook": True}, {"freeze_codebook": False}),
        ({}, {"freeze_codebook": True}),
        ({"ema_update": False}, {}),
        ({"ema_update": False}, {"ema_update": True}),
        ({}, {"ema_update": False}),
        ({"manual_ema_update": True}, {}),
        ({}, {"ema_update_weight": torch.rand(K)}),
        ({}, {"ema_update_weight": lambda sums, counts: (counts > 1).float()}),
    ):
        mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **constructor)
        compare(mine, other, x, **arguments)
        mine._codebook.update_ema(), other._codebook.update_ema()
        close_states(mine, other)


def test_accumulated_ema_update():
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K)
    before = mine.codebook.clone()
    for last in (False, False, True, True):
        if not last:
            assert torch.equal(mine.codebook, before)
        compare(mine, other, torch.randn(BATCH, 30, DIM), accum_ema_update=not last)


@pytest.mark.parametrize("options", ({}, {"codebook_dim": 6}, {"use_cosine_sim": True}, {"accept_image_fmap": True}))
def test_topk(options):
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **options)
    x = torch.randn((BATCH, DIM, 5, 6) if "accept_image_fmap" in options else (BATCH, 30, DIM))
    for train in (True, False):
        mine.train(train), other.train(train)
        results = []
        for layer in (mine, other):
            v = x.clone().requires_grad_()
            q, index, loss = layer(v, topk=5)
            (q.square().sum() + loss.sum()).backward()
            results.append((q.detach(), index, loss.detach(), v.grad))
        (q1, i1, l1, g1), (q2, i2, l2, g2) = results
        assert torch.equal(i1, i2)
        close(q1, q2), close(l1, l2), close(g1, g2)
    close_states(mine, other)


def test_topk_with_mask_and_update_indices():
    x, mask = torch.randn(BATCH, 30, DIM), torch.rand(BATCH, 30) < 0.5
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K)
    (q1, i1, l1), (q2, i2, l2) = mine(x, mask=mask, topk=2), other(x, mask=mask, topk=2)
    assert torch.equal(i1, i2)
    close(q1, q2), close(l1, l2)
    for layer, index in ((mine, i1), (other, i2)):
        layer.update_indices(x, index[..., 0], mask=mask)
    close_states(mine, other)
    for options, shape in (
        ({"heads": 4, "codebook_dim": 4}, (2, 30, DIM)),
        ({"accept_image_fmap": True}, (2, DIM, 5, 6)),
    ):
        mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **options)
        x = torch.randn(shape)
        index = mine.eval()(x)[1]
        mine.train().update_ema_indices(x, index), other.update_ema_indices(x, index)
        close_states(mine, other)


@pytest.mark.parametrize(
    "options",
    ({}, {"use_cosine_sim": True}, {"heads": 4, "codebook_dim": 4}, {"heads": 2, "separate_codebook_per_head": True}),
)
def test_cross_entropy_against_given_codes(options):
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K, **options)
    heads = options.get("heads", 1)
    targets = torch.randint(-1, K, (BATCH, 30, heads) if heads > 1 else (BATCH, 30))
    x, grads = torch.randn(BATCH, 30, DIM), []
    for layer in (mine, other):
        v = x.clone().requires_grad_()
        quantized, loss = layer(v, indices=targets, freeze_codebook=True)
        loss.backward()
        grads.append((quantized.detach() if heads == 1 else torch.zeros(()), loss.detach(), v.grad))
    for a, b in zip(*grads, strict=True):
        close(a, b)
    close_states(mine, other)


def test_dead_codeword_revival_resets_the_same_state():
    mine, other = pair("VectorQuantize", dim=8, codebook_size=40, threshold_ema_dead_code=2)
    x = torch.randn(1, 300, 8)
    mine(x), other(x)
    a, b = mine._codebook, other._codebook
    assert torch.equal(a.cluster_size == 2, b.cluster_size == 2) and (a.cluster_size == 2).any()
    kept = a.cluster_size[0] != 2
    close(a.embed[:, kept], b.embed[:, kept]), close(a.embed_avg[:, kept], b.embed_avg[:, kept])


RESIDUAL = {
    "1": {"num_quantizers": 1, "codebook_size": K},
    "3": {"num_quantizers": 3, "codebook_size": K},
    "8": {"num_quantizers": 8, "codebook_size": K},
    "sizes": {"codebook_size": (5, 12, 24)},
    "shared": {"num_quantizers": 3, "codebook_size": K, "shared_codebook": True},
}


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("rotation", (True, False), ids=("rotation", "ste"))
@pytest.mark.parametrize("width", ("same", "narrow"))
@pytest.mark.parametrize("cosine", (False, True), ids=("euclid", "cosine"))
@pytest.mark.parametrize("levels", RESIDUAL)
def test_residual_vq(levels, cosine, width, rotation, train):
    mine, other = pair(
        "ResidualVQ",
        dim=DIM,
        codebook_dim=None if width == "same" else 6,
        use_cosine_sim=cosine,
        rotation_trick=rotation,
        **RESIDUAL[levels],
    )
    mine.train(train), other.train(train)
    for _ in range(3):
        index = compare(mine, other, torch.randn(BATCH, 30, DIM))
    close(mine.get_codes_from_indices(index), other.get_codes_from_indices(index))
    close(mine.get_output_from_indices(index), other.get_output_from_indices(index))
    a, b = mine(torch.ones(1, 3, DIM), return_all_codes=True), other(torch.ones(1, 3, DIM), return_all_codes=True)
    close(a[3], b[3])


@pytest.mark.parametrize("options", ({"quant_grad_frac": 0.3}, {"learnable_codebook": True, "ema_update": False}))
def test_residual_options(options):
    compare(*pair("ResidualVQ", dim=DIM, num_quantizers=3, codebook_size=K, **options), torch.randn(BATCH, 30, DIM))


def test_residual_mask():
    mine, other = pair("ResidualVQ", dim=DIM, num_quantizers=3, codebook_size=K)
    for train in (True, False):
        mine.train(train), other.train(train)
        compare(mine, other, torch.randn(BATCH, 30, DIM), mask=torch.rand(BATCH, 30) < 0.6)


@pytest.mark.parametrize("multiple", (1, 2, 4))
def test_quantize_dropout(multiple):
    mine, other = pair(
        "ResidualVQ",
        dim=DIM,
        num_quantizers=6,
        codebook_size=K,
        quantize_dropout=True,
        quantize_dropout_cutoff_index=1,
        quantize_dropout_multiple_of=multiple,
    )
    x, used = torch.randn(BATCH, 30, DIM), set()
    for seed in range(12):
        index = compare(mine, other, x, rand_quantize_dropout_fixed_seed=seed)
        used.add(int((index[0, 0] >= 0).sum()))
    assert len(used) > 1
    torch.manual_seed(7)
    a = mine(x)[1]
    torch.manual_seed(7)
    assert torch.equal(a, other(x)[1])
    coarse = a[..., :2]
    close(mine.get_output_from_indices(coarse), other.get_output_from_indices(coarse))


def test_residual_ema_trajectory():
    mine, other = pair("ResidualVQ", dim=8, codebook_size=(8, 8, 8), decay=0.9)
    for _ in range(100):
        x = torch.randn(1, 200, 8)
        a, b = mine(x)[1], other(x)[1]
        if not torch.equal(a, b):
            agree = same_choice(a[0, :, 0], b[0, :, 0], x[0], mine.codebooks[0], False)
            assert agree.float().mean() > 0.98
    close_states(mine, other, 1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_half_precision_input(dtype):
    """The output has the dtype of the input; float32 inside, so the choice is theirs."""
    mine, other = pair("VectorQuantize", dim=DIM, codebook_size=K)
    mine.eval(), other.eval()
    x = torch.randn(BATCH, 30, DIM).to(dtype)
    (q1, i1, _), (q2, i2, _) = mine(x), other(x)
    assert torch.equal(i1, i2) and q1.dtype == q2.dtype == dtype
    close(q1, q2, torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "name, options",
    (
        ("VectorQuantize", {}),
        ("VectorQuantize", {"codebook_dim": 6}),
        ("ResidualVQ", {"num_quantizers": 2}),
        ("ResidualVQ", {"num_quantizers": 2, "codebook_dim": 6}),
    ),
)
def test_autocast_dtypes(name, options):
    mine, other = pair(name, dim=DIM, codebook_size=K, **options)
    for x in (torch.randn(BATCH, 30, DIM), torch.randn(BATCH, 30, DIM).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            a, b = mine(x), other(x)
        assert a[0].dtype == b[0].dtype and a[1].dtype == b[1].dtype
    assert a[2].dtype == torch.float32
