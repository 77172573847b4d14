"""ResidualVQ's search, implicit codebooks and DiVeQ on their own: oracles, formulas, hostile rows, masks, layouts."""

import itertools

import pytest
import torch

from vqkernels import GroupedResidualVQ, HierarchicalVQ, ResidualVQ
from vqkernels.layers import search
from vqkernels.layers.beam_search import beam_search
from vqkernels.layers.choice import Sampling

DIM, K = 8, 16


def make(**options):
    torch.manual_seed(0)
    return ResidualVQ(**({"dim": DIM, "codebook_size": K, "num_quantizers": 3} | options))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def every_code(books):
    """All codes ``[K^Q, Q]`` and, for each, the sum of its codewords level by level ``[K^Q, Q, D]``."""
    codes = torch.tensor(list(itertools.product(*(range(len(book)) for book in books))))
    chosen = torch.stack([book[index] for book, index in zip(books, codes.unbind(-1), strict=True)], 1)
    return codes, chosen.cumsum(1)


# beam search


@pytest.mark.parametrize("weights", (None, [0.0, 0.0, 1.0], [3.0, 0.2, 1.0]))
@pytest.mark.parametrize("sizes", ((5, 5, 5), (3, 6, 4)))
def test_a_wide_beam_finds_the_best_of_all_codes(sizes, weights):
    layer = make(codebook_size=sizes, beam_size=2, beam_score_quantizer_weights=weights).eval()
    x = torch.randn(1, 60, DIM) * 0.3
    codes, sums = every_code(layer.codebooks)
    errors = (x[0, :, None, None] - sums).double().square().sum(-1)  # [N, K^Q, Q]
    scores = errors @ torch.tensor([1.0] * 3 if weights is None else weights, dtype=torch.float64)
    best = codes[scores.argmin(-1)]
    wide = layer(x, beam_size=sizes[0] * sizes[1])
    assert torch.equal(wide[1][0], best)
    close(wide[0][0], sums[scores.argmin(-1), -1])
    greedy = layer(x, beam_size=1)[1][0]
    assert not torch.equal(greedy, best), "the test would not see a greedy search"
    found = [scores[:, (codes[:, None] == index).all(-1).int().argmax(0)] for index in (greedy, best)]
    assert found[0].diagonal().ge(found[1].diagonal()).all()


def test_a_beam_of_one_is_greedy():
    layer, plain = make(beam_size=1, eval_beam_size=1), make()
    x = torch.randn(2, 30, DIM, requires_grad=True)
    for a, b in zip(layer(x), plain(x), strict=True):
        assert torch.equal(a, b)
    levels = [plain._proposals(level, torch.float32, 1, Sampling()) for level in range(3)]
    assert torch.equal(
        beam_search(x.detach().flatten(0, 1), levels, torch.ones(3), 1), plain.eval()(x)[1].flatten(0, 1)
    )


def test_a_wider_beam_helps():
    layer = make(num_quantizers=4, beam_size=2, beam_score_quantizer_weights=[0.0, 0.0, 0.0, 1.0]).eval()
    x = torch.randn(1, 300, DIM) * 0.3
    errors = [(layer(x, beam_size=beam)[0] - x).square().mean().item() for beam in (1, 4, 64)]
    assert errors[0] > errors[1] > errors[2]


def test_beam_against_faiss():
    """With two levels both searches keep the nearest codewords, then the least error of the result."""
    faiss = pytest.importorskip("faiss", reason="compares with faiss, which is not installed")
    layer = make(num_quantizers=2, beam_size=4, beam_score_quantizer_weights=[1e-9, 1.0]).eval()
    x = torch.randn(1, 200, DIM) * 0.3
    other = faiss.ResidualQuantizer(DIM, 2, 4)
    other.max_beam_size, other.is_trained = 4, True
    faiss.copy_array_to_vector(layer.codebooks.detach().numpy().ravel(), other.codebooks)
    codes = torch.from_numpy(other.compute_codes(x[0].numpy())[:, 0].astype("int64"))
    theirs = torch.stack([codes % 16, codes // 16], -1)
    mine = layer(x)
    error = [(x[0] - layer.get_output_from_indices(i)).square().sum(-1) for i in (mine[1][0], theirs)]
    assert (error[0] <= error[1] + 1e-6).all() and (mine[1][0] == theirs).all(-1).float().mean() > 0.98


def test_beam_in_chunks_and_with_small_codebooks(monkeypatch):
    layer = make(codebook_size=(2, 3, 16), eval_beam_size=5).eval()
    x = torch.randn(2, 30, DIM)
    whole = layer(x)
    monkeypatch.setattr(search, "_CHUNK", 1000)
    for a, b in zip(layer(x), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", ({"beam_size": 3}, {"implicit_neural_codebook": True}))
def test_search_respects_a_frozen_codebook(options):
    options = options | {"threshold_ema_dead_code": 2}
    for layer, arguments in ((make(freeze_codebook=True, **options), {}), (make(**options), {"freeze_codebook": True})):
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        layer(torch.randn(1, 30, DIM), **arguments)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_beam_trains_every_level():
    layer = make(beam_size=3, threshold_ema_dead_code=1e-6)
    before = layer.codebooks
    x = torch.randn(2, 50, DIM)
    index = layer(x)[1]
    for level in range(3):
        counts = torch.bincount(index[..., level].flatten(), minlength=K)
        close(layer.layers[level]._codebook.cluster_size[0], 0.8 + 0.2 * counts)
    assert (layer.codebooks != before).any(-1).any(-1).all()


def test_shared_codebook_steps_its_in_place_optimizer_once():
    def sgd(parameters):
        return torch.optim.SGD(parameters, 0.5)

    options = {"learnable_codebook": True, "ema_update": False, "commitment_weight": 0.0}
    layer = make(shared_codebook=True, in_place_codebook_optimizer=sgd, **options)
    book = layer.codebooks[0].detach().clone().requires_grad_()
    x = torch.randn(1, 40, DIM)
    residual, loss = x[0], 0.0
    for _ in range(3):
        index = torch.cdist(residual, book).argmin(-1)
        loss = loss + (book[index] - residual).square().mean()
        residual = residual - book[index].detach()
    loss.backward()
    layer(x)
    close(layer.codebooks[0].detach(), (book - 0.5 * book.grad).detach())


@pytest.mark.parametrize("input_grad", (True, False))
@pytest.mark.parametrize("train", (True, False))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"learnable_codebook": True, "ema_update": False},
        {"learnable_codebook": True, "ema_update": False, "shared_codebook": True, "threshold_ema_dead_code": 2},
        {"learnable_codebook": True, "ema_update": False, "route_gradients_to_input": False},
        {"learnable_codebook": True, "ema_update": False, "freeze_codebook": True},
        {"route_gradients_to_input": False},
        {"diveq": True},
        {"quantize_dropout": True},
    ),
)
def test_one_pass_equals_level_by_level(options, train, input_grad):
    fused, stepwise = make(**options).train(train), make(**options).train(train)
    stepwise._one_pass = lambda: False
    fused._level_by_level = None
    for seed in range(2):
        x, mask, results = torch.randn(2, 20, DIM), torch.rand(2, 20) < 0.8, []
        for layer in (fused, stepwise):
            torch.manual_seed(seed)
            v = x.clone().requires_grad_(input_grad)
            layer.zero_grad()
            quantized, index, loss = layer(v, mask=mask)
            if (total := quantized.square().sum() + loss.sum()).requires_grad:
                total.backward()
            results.append((quantized, index, loss, v.grad, *(p.grad for p in layer.parameters())))
        for number, (a, b) in enumerate(zip(*results, strict=True)):
            assert (a is None) == (b is None), number
            if a is not None:
                close(a, b)
        for a, b in zip(fused.state_dict().values(), stepwise.state_dict().values(), strict=True):
            close(a.float(), b.float())


GROUPED, HIERARCHICAL = {"dim": DIM, "groups": 2, "codebook_size": K}, {"dim": DIM, "codebook_size": K}


@pytest.mark.parametrize(
    "build, drawn",
    (
        (lambda: make(quantize_dropout=True), lambda layer, x: (layer(x)[1] >= 0).flatten().tolist()),
        (
            lambda: GroupedResidualVQ(num_quantizers=3, quantize_dropout=True, **GROUPED),
            lambda layer, x: (layer(x)[1] >= 0).flatten().tolist(),
        ),
        (
            lambda: HierarchicalVQ(scales=(1, 2, 5), kmeans_init=False, nested_dropout=0.7, **HIERARCHICAL),
            lambda layer, x: layer(x.mT, return_cutoff=True)[3],
        ),
    ),
    ids=("residual", "grouped", "hierarchical"),
)
def test_dropout_draws_anew_in_a_compiled_layer(build, drawn):
    """The host decides how many levels run, which is a graph break; a seed draws the same as in eager mode."""
    torch._dynamo.reset()
    layer, x, draws = build(), torch.randn(2, 5, DIM), []
    compiled = torch.compile(layer, backend="eager")
    for seed in range(8):
        torch.manual_seed(seed)
        draws.append(drawn(compiled, x))
        if type(layer) is HierarchicalVQ:  # revival has drawn before
            continue
        torch.manual_seed(seed)
        assert drawn(layer, x) == draws[-1]
    assert any(draw != draws[0] for draw in draws)


# what lies outside the mask, and what is no number, never matters

SEARCHED = {
    "beam": {"beam_size": 3},
    "cosine beam": {"beam_size": 3, "use_cosine_sim": True},
    "narrow beam": {"beam_size": 3, "codebook_dim": 4},
    "implicit": {"implicit_neural_codebook": True},
    "implicit cosine": {"implicit_neural_codebook": True, "use_cosine_sim": True},
    "implicit cosine diversity": {
        "implicit_neural_codebook": True,
        "use_cosine_sim": True,
        "codebook_diversity_loss_weight": 0.1,
    },
    "implicit beam": {"implicit_neural_codebook": True, "beam_size": 2, "codebook_dim": 4},
    "implicit diversity": {"implicit_neural_codebook": True, "codebook_diversity_loss_weight": 0.1},
    "diveq": {"diveq": True},
    "diversity": {"codebook_diversity_loss_weight": 0.1},
}


@pytest.mark.parametrize("name", SEARCHED)
def test_a_padded_batch_equals_the_unpadded_one(name):
    padded, plain = make(**SEARCHED[name]), make(**SEARCHED[name])
    x = torch.randn(1, 20, DIM)
    a = torch.cat([x, torch.full((1, 7, DIM), 1e4)], 1).requires_grad_()
    b = x.clone().requires_grad_()
    results = []
    for layer, v, mask in ((padded, a, (torch.arange(27) < 20)[None]), (plain, b, None)):
        torch.manual_seed(1)
        results.append(layer(v, mask=mask))
        (results[-1][0].square().sum() + results[-1][2].sum()).backward()
    (q1, i1, l1), (q2, i2, l2) = results
    assert torch.equal(i1[:, :20], i2) and (i1[:, 20:] == -1).all() and (q1[:, 20:] == 0).all()
    assert (a.grad[:, 20:] == 0).all()
    if name != "diveq":  # the noise is drawn for the padding, too
        close(q1[:, :20], q2), close(a.grad[:, :20], b.grad)
        for p, r in zip(padded.parameters(), plain.parameters(), strict=True):
            close(p.grad, r.grad)
    close(l1, l2)
    for value, expected in zip(padded.state_dict().values(), plain.state_dict().values(), strict=True):
        close(value.float(), expected.float())


@pytest.mark.parametrize("name", SEARCHED)
def test_non_finite_rows_are_loud_but_alone(name):
    hostile, plain = make(**SEARCHED[name]), make(**SEARCHED[name])
    x = torch.randn(1, 20, DIM)
    bad = x.clone()
    bad[0, 3, 2], bad[0, 7] = torch.nan, torch.inf
    a, b = bad.requires_grad_(), x.clone().requires_grad_()
    keep = torch.ones(1, 20, dtype=torch.bool)
    keep[0, [3, 7]] = False
    results = []
    for layer, v, mask in ((hostile, a, None), (plain, b, keep)):
        torch.manual_seed(1)
        results.append(layer(v, mask=mask))
        (results[-1][0][keep].square().sum() + results[-1][2].sum()).backward()
    (q1, i1, l1), (q2, i2, l2) = results
    assert torch.equal(i1, i2) and q1[~keep].isnan().all() and l1.isfinite().all()
    close(q1[keep], q2[keep]), close(l1, l2), close(a.grad[keep], b.grad[keep])
    for (key, value), expected in zip(hostile.state_dict().items(), plain.state_dict().values(), strict=True):
        assert value.isfinite().all(), key
        close(value.float(), expected.float())


@pytest.mark.parametrize("name", SEARCHED)
def test_batches_without_a_row(name):
    layer = make(**SEARCHED[name])
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for x, mask in ((torch.randn(2, 5, DIM), torch.zeros(2, 5, dtype=torch.bool)), (torch.randn(2, 0, DIM), None)):
        x.requires_grad_()
        quantized, index, loss = layer(x, mask=mask)
        (quantized.sum() + loss.sum()).backward()
        assert (index == -1).all() and (loss == 0).all() and (quantized == 0).all() and (x.grad == 0).all()
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("name", ("narrow beam", "implicit", "diveq", "diversity"))
@pytest.mark.parametrize(
    "options, shape",
    (({"channel_last": False}, (2, DIM, 12)), ({"accept_image_fmap": True}, (2, DIM, 3, 4))),
    ids=("first", "image"),
)
def test_layouts(name, options, shape):
    first, last = make(**SEARCHED[name], **options), make(**SEARCHED[name])
    x = torch.randn(shape)
    results = []
    for layer, v in ((first, x), (last, x.movedim(1, -1).flatten(1, -2))):
        torch.manual_seed(1)
        results.append(layer(v))
    (q1, i1, l1), (q2, i2, l2) = results
    close(q1.movedim(1, -1).flatten(1, -2), q2), close(l1, l2)
    assert torch.equal(i1.flatten(1, -2), i2)
    quantized, index, _ = first.eval()(x)
    close(first.get_output_from_indices(index), quantized)


@pytest.mark.parametrize("name", SEARCHED)
def test_kmeans_start(name):
    layer = make(kmeans_init=True, **SEARCHED[name])
    x = torch.randn(2, 100, DIM)
    first = layer(x)[0]
    assert layer.layers[2]._codebook.initted and not layer.layers[2]._codebook.needs_init
    assert (layer.codebooks.flatten(1).std(-1) > 0).all() and first.isfinite().all()
    if "cosine" not in name and "implicit" not in name:
        error = (layer.project_out(layer.project_in(x)) - layer.eval()(x)[0]).square().mean()
        assert error < 0.5 * layer.project_out(layer.project_in(x)).square().mean()


@pytest.mark.parametrize("name", SEARCHED)
def test_one_token_per_sample(name):
    one, many = make(**SEARCHED[name]), make(**SEARCHED[name])
    x = torch.randn(12, DIM)
    results = []
    for layer, v in ((one, x), (many, x[:, None])):
        torch.manual_seed(1)
        results.append(layer(v))
    (q1, i1, l1), (q2, i2, l2) = results
    assert torch.equal(i1, i2[:, 0])
    close(q1, q2[:, 0]), close(l1, l2)


# implicit neural codebooks


def test_implicit_codebook_by_the_formula():
    """Every candidate computed and kept, the nearest taken, autograd through it all: the same loss and gradients."""
    layer = make(implicit_neural_codebook=True, mlp_kwargs={"depth": 2, "dim_hidden": 5}, rotation_trick=False)
    x = torch.randn(3, 10, DIM, requires_grad=True)
    quantized, index, losses = layer(x)
    (quantized.square().sum() + losses.sum()).backward()
    got = [x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    z = x.detach().clone().requires_grad_()
    total, residual = torch.zeros_like(z), z
    for level, vq in enumerate(layer.layers):
        candidates = vq.codebook.expand(3, 10, K, DIM)
        if level:
            mlp = layer.mlps[level - 1]
            h = mlp.proj_in(torch.cat([total.unsqueeze(-2).expand_as(candidates), candidates], -1))
            for block in mlp.layers:
                h = h + block(h)
            candidates = h
        choice = (residual.unsqueeze(-2) - candidates).square().sum(-1).argmin(-1)
        assert torch.equal(choice, index[..., level])
        code = candidates.gather(-2, choice[..., None, None].expand(3, 10, 1, DIM)).squeeze(-2)
        loss = (code - residual).square().mean()
        close(losses[level], loss)
        passed = residual + (code - residual).detach()
        total, residual = total + passed, residual - passed.detach()
        loss.backward(retain_graph=True)
    total.square().sum().backward()
    close(quantized, total)
    for a, b in zip(got, [z.grad, *(p.grad for p in layer.parameters())], strict=True):
        close(a, b, 2e-4)


def test_implicit_codebook_keeps_only_what_was_chosen(monkeypatch):
    """The search is done in chunks and without a graph: nothing of size N K D waits for the backward pass."""
    layer = make(implicit_neural_codebook=True, codebook_size=64)
    x = torch.randn(1, 200, DIM, requires_grad=True)
    whole = layer(x, freeze_codebook=True)
    monkeypatch.setattr(search, "_CHUNK", 5000)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.numel()) or t, lambda t: t):
        chunked = layer(x, freeze_codebook=True)
    for a, b in zip(whole, chunked, strict=True):
        close(a, b) if a.is_floating_point() else None
    assert torch.equal(whole[1], chunked[1])
    assert max(largest) <= 64 * 200


def test_implicit_codebook_round_trip_of_coarse_codes():
    layer = make(implicit_neural_codebook=True, quantize_dropout=True, num_quantizers=4)
    x = torch.randn(1, 40, DIM)
    for seed in range(5):
        quantized, index, _ = layer(x, rand_quantize_dropout_fixed_seed=seed)
        used = int((index[0, 0] >= 0).sum())
        close(layer.get_output_from_indices(index[..., :used]), quantized)
        close(layer.get_output_from_indices(index), quantized)


@pytest.mark.parametrize("cosine", (False, True))
def test_dense_candidates_equal_the_search(cosine):
    """Options that need all candidates at once go through VectorQuantize; with weight 1e-12 they change nothing."""
    options = {"implicit_neural_codebook": True, "use_cosine_sim": cosine}
    searched, dense = make(**options), make(**options, codebook_diversity_loss_weight=1e-12)
    assert searched.layers[0].plain and not dense.layers[0].plain
    x = torch.randn(2, 20, DIM)
    results = []
    for layer in (searched, dense):
        v = x.clone().requires_grad_()
        quantized, index, loss = layer(v)
        (quantized.square().sum() + loss.sum()).backward()
        results.append((index, quantized, loss, v.grad, *(p.grad for p in layer.parameters())))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        close(a, b)
    if cosine:
        close(searched.get_codes_from_indices(results[0][0]).norm(dim=-1), torch.ones(3, 2, 20))


# DiVeQ


def test_diveq_moves_towards_the_code():
    layer = make(diveq=True)
    x = torch.randn(1, 500, DIM, requires_grad=True)
    torch.manual_seed(1)
    quantized, index, loss = layer(x)
    assert (loss == 0).all() and not layer.layers[0].ema_update
    code = layer.get_output_from_indices(index)
    close((quantized - x).norm(dim=-1), (code - x).norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(quantized - x, code - x, dim=-1)
    assert 0.8 < cosine.mean() < 0.9999
    (quantized - x.detach()).square().mean().backward()
    assert x.grad.abs().sum() > 0
    for vq in layer.layers:
        used = torch.bincount(index[..., 0].flatten(), minlength=K) > 0
        assert vq._codebook.embed.grad.abs().sum() > 0 and used.any()
    before = layer.state_dict()["layers.0._codebook.cluster_size"].clone()
    layer(x)
    assert torch.equal(layer.layers[0]._codebook.cluster_size, before)
    quantized, index, _ = layer.eval()(x)
    close(quantized, layer.get_output_from_indices(index))


# cross entropy


@pytest.mark.parametrize("options", ({}, {"implicit_neural_codebook": True}, {"use_cosine_sim": True}))
def test_cross_entropy_follows_the_target_codes(options):
    layer = make(**options)
    x, targets = torch.randn(2, 10, DIM, requires_grad=True), torch.randint(K, (2, 10, 3))
    targets[0, :3, 1] = -1
    mask = torch.rand(2, 10) < 0.7
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    quantized, entropy = layer(x, indices=targets, mask=mask)
    entropy.backward()
    got = x.grad
    layer.load_state_dict(state)
    v = x.detach().clone().requires_grad_()
    residual, total, expected = v, torch.zeros_like(v), 0.0
    for level, target in enumerate(targets.unbind(-1)):
        book = layer.layers[level].codebook.expand(2, 10, K, DIM)
        if level and layer.mlps is not None:
            book = layer.mlps[level - 1](book, total.unsqueeze(-2))
        if layer.layers[level].use_cosine_sim:
            logits = (torch.nn.functional.normalize(residual, dim=-1).unsqueeze(-2) * book).sum(-1)
        else:
            logits = -(residual.unsqueeze(-2) - book).norm(dim=-1)
        counted = torch.where(mask, target, -1).flatten()
        expected = expected + torch.nn.functional.cross_entropy(logits.flatten(0, 1), counted, ignore_index=-1)
        code = book.gather(-2, target.clamp(min=0)[..., None, None].expand(2, 10, 1, DIM)).squeeze(-2)
        code = torch.where((target >= 0).unsqueeze(-1), code, 0.0)
        residual, total = residual - code.detach(), total + code
    expected.backward()
    close(entropy, expected), close(got, v.grad, 1e-4)
    layer.load_state_dict(state)
    close(quantized, layer(x, mask=mask)[0])


@pytest.mark.parametrize(
    "build, message",
    (
        (lambda: make(heads=2), "one head"),
        (lambda: make(beam_score_quantizer_weights=[1.0]), "1 numbers for 3 levels"),
        (lambda: make()(torch.randn(1, 3, DIM), beam_size=0), "beam_size=0; expected a number >= 1"),
        (lambda: make(straight_through=True, beam_size=2)(torch.randn(1, 3, DIM)), "cannot go with straight_through"),
        (lambda: make(affine_param=True, beam_size=2)(torch.randn(1, 3, DIM)), "cannot go with affine_param"),
        (
            lambda: make(commitment_use_cross_entropy_loss=True, beam_size=2)(torch.randn(1, 3, DIM)),
            "cannot go with commitment_use_cross_entropy_loss",
        ),
        (lambda: make()(torch.randn(1, 3, DIM), indices=torch.zeros(1, 3, 2).long()), "expected .1, 3, 3."),
        (lambda: GroupedResidualVQ(dim=9, groups=2, num_quantizers=2, codebook_size=4), "does not split"),
        (
            lambda: GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=4)(torch.randn(1, 3, 9)),
            "expected 8 features",
        ),
    ),
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
