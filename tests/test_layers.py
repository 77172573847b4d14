"""The layers on their own: hostile rows, revival, k-means start, determinism, copies, compiling, usage."""

import copy
import io
import pickle

import pytest
import torch

import vqkernels as vq
from vqkernels import ResidualVQ, VectorQuantize

DIM, K = 8, 16


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are so small that threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def unchanged(before, after):
    """Up to the rounding of normalizing a codeword again."""
    return all(torch.allclose(before[key], after[key], rtol=1e-6, atol=1e-6) for key in before)


def layers(**options):
    return (
        VectorQuantize(DIM, K, **options),
        VectorQuantize(DIM, K, use_cosine_sim=True, **options),
        VectorQuantize(DIM, K, codebook_dim=4, heads=2, separate_codebook_per_head=True, **options),
        ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, **options),
        ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, use_cosine_sim=True, **options),
        ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, shared_codebook=True, **options),
    )


# one pass against level by level


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"shared_codebook": True},
        {"rotation_trick": False},
        {"learnable_codebook": True},
        {"commitment_weight": 0.3},
    ),
)
def test_one_pass_equals_level_by_level(options):
    torch.manual_seed(1)
    fused = ResidualVQ(dim=DIM, num_quantizers=4, codebook_size=K, **options)
    stepwise = copy.deepcopy(fused)
    stepwise._one_pass = lambda: False
    assert fused._one_pass()
    for _ in range(3):
        x, mask = torch.randn(2, 50, DIM), torch.rand(2, 50) < 0.8
        grads = []
        for layer in (fused, stepwise):
            v = x.clone().requires_grad_()
            q, index, loss = layer(v, mask=mask)
            (q.square().sum() + loss.sum()).backward()
            grads.append((q.detach(), index, loss.detach(), v.grad))
        (q1, i1, l1, g1), (q2, i2, l2, g2) = grads
        assert torch.equal(q1, q2) and torch.equal(i1, i2)
        torch.testing.assert_close(l1, l2)
        torch.testing.assert_close(g1, g2)
        assert same(state(fused), state(stepwise))


def test_rotation_gradient_against_the_explicit_matrix():
    """dx = sum over levels of gamma R^T g, R = (I - 2 c c^T)(I - 2 r r^T) built densely in float64."""
    layer = ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=K, commitment_weight=0.0)
    x, g = torch.randn(20, DIM, requires_grad=True), torch.randn(20, DIM)
    books = layer.codebooks.double()
    quantized, index, _ = layer(x)
    quantized.backward(g)
    eye, expected, residual = torch.eye(DIM).double(), torch.zeros(20, DIM).double(), x.detach().double()
    for level in range(3):
        for n in range(20):
            z, c = residual[n], books[level, index[n, level]]
            zh, ch = z / z.norm(), c / c.norm()
            r = (zh + ch) / (zh + ch).norm()
            matrix = (eye - 2 * torch.outer(ch, ch)) @ (eye - 2 * torch.outer(r, r)) * (c.norm() / z.norm())
            torch.testing.assert_close(matrix @ z, c)
            expected[n] += matrix.T @ g[n].double()
        residual = residual - books[level, index[:, level]]
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_ema_and_commitment_by_the_formula():
    layer = VectorQuantize(DIM, K, decay=0.7, eps=1e-3, commitment_weight=0.4)
    size, total, codebook = torch.ones(K).double(), layer.codebook.double(), layer.codebook.double()
    for _ in range(3):
        x = torch.randn(1, 100, DIM)
        _, index, loss = layer(x)
        z = x[0].double()
        assert torch.equal(index[0], torch.cdist(z, codebook).argmin(-1))
        torch.testing.assert_close(loss.detach().double(), 0.4 * (z - codebook[index[0]]).square().mean())
        assigned = torch.nn.functional.one_hot(index[0], K).double()
        size = 0.7 * size + 0.3 * assigned.sum(0)
        total = 0.7 * total + 0.3 * assigned.T @ z
        smoothed = (size + 1e-3) / (size.sum() + K * 1e-3) * size.sum()
        codebook = total / smoothed[:, None]
        torch.testing.assert_close(layer.codebook.double(), codebook, rtol=1e-5, atol=1e-6)
        codebook = layer.codebook.double()


@pytest.mark.parametrize("train", (True, False))
def test_topk_by_the_formula(train):
    layer = VectorQuantize(DIM, K, commitment_weight=0.4).train(train)
    before, x = state(layer), torch.randn(2, 30, DIM)
    quantized, index, loss = layer(x, topk=4)
    order = torch.cdist(x.double(), layer.codebook.double().expand(2, K, DIM)).argsort(-1)
    assert torch.equal(index, order[..., :4]) and torch.equal(quantized, layer.codebook[index])
    torch.testing.assert_close(loss, 0.4 * (layer.codebook[index] - x[:, :, None]).square().mean(-1))
    assert torch.equal(index[..., 0], layer(x)[1]) and (train or same(before, state(layer)))


@pytest.mark.parametrize("estimator", ("rotation", "reflection", "ste"))
def test_estimator_option(estimator):
    layer = VectorQuantize(DIM, K, estimator=estimator, commitment_weight=0.0)
    x, g = torch.randn(30, DIM, requires_grad=True), torch.randn(30, DIM)
    codebook = layer.codebook.clone()
    quantized, index, _ = layer(x)
    quantized.backward(g)
    other = x.detach().clone().requires_grad_()
    vq.rotation_trick(other, codebook[index], kind=estimator).backward(g)
    torch.testing.assert_close(x.grad, other.grad)
    assert layer.rotation_trick == (estimator == "rotation")
    with pytest.raises(ValueError, match="disagree"):
        VectorQuantize(DIM, K, estimator=estimator, rotation_trick=estimator != "rotation")


# hostile rows


@pytest.mark.parametrize("number", range(6))
def test_non_finite_rows_poison_nothing(number):
    layer = layers(threshold_ema_dead_code=1)[number]
    clean = copy.deepcopy(layer)
    x = torch.randn(1, 60, DIM)
    bad = x.clone()
    bad[0, 7, 3], bad[0, 11, 0], bad[0, 12, 5] = float("nan"), float("inf"), -float("inf")
    keep = torch.ones(60, dtype=torch.bool)
    keep[[7, 11, 12]] = False
    rows = bad.clone().requires_grad_()
    torch.manual_seed(3)
    quantized, index, loss = layer(rows)
    torch.manual_seed(3)
    _, expected, expected_loss = clean(x, mask=keep[None])
    if number == 2:  # each head drops only its own half
        assert (index[0, 7] >= 0).tolist() == [False, True] and quantized[0, 7, :4].isnan().all()
        assert all(v.isfinite().all() for v in layer.state_dict().values())
        return
    assert (index[0, ~keep] == -1).all() and quantized[0, ~keep].isnan().all()
    assert torch.equal(index[0, keep], expected[0, keep])
    torch.testing.assert_close(loss, expected_loss)
    assert same(state(layer), state(clean))
    (torch.where(keep[None, :, None], quantized, 0.0).sum() + loss.sum()).backward()
    assert rows.grad.isfinite().all() and (rows.grad[0, ~keep] == 0).all()


@pytest.mark.parametrize("number", range(6))
def test_all_masked_batch(number):
    layer = layers(threshold_ema_dead_code=1)[number]
    before = state(layer)
    x = torch.randn(2, 5, DIM, requires_grad=True)
    quantized, index, loss = layer(x, mask=torch.zeros(2, 5, dtype=torch.bool))
    assert (loss == 0).all() and (quantized == 0).all() and (index == -1).all()
    loss.sum().backward()
    assert unchanged(before, state(layer))


@pytest.mark.parametrize("number", range(6))
def test_empty_batch(number):
    layer = layers(threshold_ema_dead_code=1)[number]
    before = state(layer)
    quantized, index, loss = layer(torch.empty(2, 0, DIM))
    assert quantized.shape == (2, 0, DIM) and index.shape[:2] == (2, 0) and (loss == 0).all()
    assert unchanged(before, state(layer))


@pytest.mark.parametrize("cosine", (False, True))
def test_zero_and_opposite_vectors_get_the_straight_through_gradient(cosine):
    layer = VectorQuantize(DIM, 2, use_cosine_sim=cosine, commitment_weight=0.0).eval()
    layer.codebook = torch.stack([torch.eye(DIM)[0], torch.eye(DIM)[0] * (1 if cosine else 3)])
    layer.train()
    x = torch.stack([torch.zeros(DIM), -torch.eye(DIM)[0]]).requires_grad_()
    quantized, index, _ = layer(x)
    g = torch.randn(2, DIM)
    quantized.backward(g)
    assert torch.equal(quantized.detach(), torch.eye(DIM)[[0, 0]]) and (index == 0).all()
    if cosine:  # through the normalization, which is flat along x
        assert x.grad[1, 0] == 0 and torch.equal(x.grad[1, 1:], g[1, 1:]) and x.grad.isfinite().all()
    else:
        assert torch.equal(x.grad, g)


# dead codewords


def test_revived_codewords_come_from_the_batch_and_survive():
    layer = VectorQuantize(DIM, 32, threshold_ema_dead_code=2, decay=0.5)
    layer.codebook = torch.cat([torch.randn(4, DIM), torch.full((28, DIM), 100.0)])
    book = layer._codebook
    book.embed_avg.copy_(book.embed)
    x = torch.randn(1, 500, DIM)
    layer(x)
    revived = book.cluster_size[0] == 2
    assert revived.sum() >= 28
    rows = book.embed[0, revived]
    assert (rows[:, None] == x[0]).all(-1).any(-1).all(), "a revived codeword is a row of the batch"
    assert len(rows.unique(dim=0)) == len(rows), "no row twice"
    assert torch.equal(book.embed_avg[0, revived], rows * 2)
    layer._codebook.threshold_ema_dead_code = 0  # watch the next EMA step alone
    layer(x)
    moved = (book.embed[0, revived] - rows).norm(dim=-1)
    assert (moved < 10).all(), "the sum was reset too, so the codeword does not return to where it died"


def test_more_dead_codewords_than_rows():
    layer = VectorQuantize(DIM, 32, threshold_ema_dead_code=2)
    layer(torch.randn(1, 5, DIM))
    assert (layer._codebook.cluster_size == 2).sum() == 5
    layer(torch.randn(1, 5, DIM), mask=torch.tensor([[True, False, True, False, False]]))
    assert (layer._codebook.cluster_size == 2).sum() <= 5 + 2


def test_shared_codebook_revives_once_per_forward():
    layer = ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=64, shared_codebook=True, threshold_ema_dead_code=2)
    layer(torch.randn(1, 200, DIM))
    size = layer.layers[0]._codebook.cluster_size
    assert (size >= 2).all() and (size == 2).any()
    assert (layer.codebooks[0] == layer.codebooks[2]).all()


def test_expire_codes_by_hand():
    layer = VectorQuantize(DIM, K, threshold_ema_dead_code=5, ema_update=False)
    x = torch.randn(1, 40, DIM)
    layer.expire_codes_(x)
    assert (layer.codebook[:, None] == x[0]).all(-1).any(-1).all()


# k-means start


@pytest.mark.parametrize("cosine", (False, True))
def test_kmeans_start(cosine):
    layer = VectorQuantize(DIM, 10, kmeans_init=True, use_cosine_sim=cosine)
    assert not layer._codebook.initted and (layer.codebook == 0).all()
    centres = torch.nn.functional.normalize(torch.randn(10, DIM), dim=-1)
    x = (centres.repeat(30, 1) + 1e-3 * torch.randn(300, DIM))[None]
    index = layer.eval()(x)[1]
    assert layer._codebook.initted
    assert torch.cdist(centres, layer.codebook).amin(-1).max() < 0.01, "every centre is found"
    assert (layer.usage.counts == 30).all()
    assert torch.equal(layer._codebook.cluster_size[0], torch.full((10,), 30.0))
    assert torch.allclose(layer._codebook.embed_avg, layer._codebook.embed * 30)
    before = state(layer)
    assert torch.equal(layer(x)[1], index) and same(before, state(layer)), "only the first batch seeds"


def test_kmeans_start_with_masks_heads_and_levels():
    x = torch.randn(2, 100, DIM)
    x[1, 50:] = 1e6
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, 50:] = False
    for layer in layers(kmeans_init=True):
        layer(x, mask=mask)
        for name, value in layer.state_dict().items():
            assert value.all() if name.endswith("initted") else value.abs().max() < 1e4, name


def test_kmeans_start_with_fewer_rows_than_codewords():
    layer = VectorQuantize(DIM, K, kmeans_init=True)
    x = torch.randn(1, 3, DIM)
    quantized = layer.eval()(x)[0]
    assert torch.equal(quantized, x), "every row is a codeword"
    assert len(layer.codebook.unique(dim=0)) == K, "no two codewords are the same"
    assert layer.codebook.isfinite().all()


def test_kmeans_start_waits_for_a_usable_row():
    layer = VectorQuantize(DIM, K, kmeans_init=True)
    layer(torch.full((1, 4, DIM), float("nan")))
    assert not layer._codebook.initted
    layer(torch.randn(1, 40, DIM))
    assert layer._codebook.initted


def test_checkpoint_decides_about_the_kmeans_start():
    trained = VectorQuantize(DIM, K, kmeans_init=True)
    trained(torch.randn(1, 100, DIM))
    fresh = VectorQuantize(DIM, K, kmeans_init=True)
    fresh.load_state_dict(trained.state_dict())
    x = torch.randn(1, 50, DIM)
    assert torch.equal(fresh.eval()(x)[1], trained.eval()(x)[1])
    fresh.load_state_dict(VectorQuantize(DIM, K, kmeans_init=True).state_dict())
    fresh(x)
    assert fresh._codebook.initted and not torch.equal(fresh.codebook, trained.codebook)


# determinism, copies, precision


@pytest.mark.parametrize("number", range(6))
def test_bit_equal_across_runs_and_threads(number):
    def train():
        torch.manual_seed(5)
        layer = layers(threshold_ema_dead_code=1, kmeans_init=True)[number]
        out = [layer(torch.randn(1, 300, DIM)) for _ in range(4)]
        return state(layer) | {f"out{i}{j}": t.detach() for i, o in enumerate(out) for j, t in enumerate(o)}

    first = train()
    assert same(first, train())
    torch.set_num_threads(2)
    try:
        assert same(first, train())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("number", range(6))
def test_copies_and_files(number):
    layer = layers()[number]
    x = torch.randn(1, 40, DIM)
    layer(x, accum_ema_update=True) if number < 3 else layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    expected = layer(x)[0], state(layer)
    for other in copies:
        assert torch.equal(other(x)[0], expected[0]) and same(state(other), expected[1])
    shared = ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=K, shared_codebook=True)
    assert len({id(level._codebook) for level in copy.deepcopy(shared).layers}) == 1


@pytest.mark.parametrize("cast", ("half", "bfloat16"))
def test_codebook_state_stays_float32(cast):
    layer = getattr(VectorQuantize(DIM, K, codebook_dim=4, decay=0.999), cast)()
    assert layer.project_in.weight.dtype != torch.float32
    assert all(layer._codebook.get_buffer(n).dtype == torch.float32 for n in ("embed", "embed_avg", "cluster_size"))
    before = layer._codebook.embed_avg.clone()
    x = torch.randn(1, 40, DIM, dtype=layer.project_in.weight.dtype, requires_grad=True)
    quantized, _, loss = layer(x)
    (quantized.sum() + loss).backward()
    assert quantized.dtype == x.dtype and x.grad.dtype == x.dtype and loss.dtype == torch.float32
    change = (layer._codebook.embed_avg - before).abs()
    assert (change > 0).float().mean() > 0.5, "steps far below half precision still count"
    assert VectorQuantize(DIM, K).double()._codebook.embed.dtype == torch.float64


def test_float64_end_to_end():
    layer = VectorQuantize(DIM, K).double()
    x = torch.randn(1, 40, DIM, dtype=torch.float64, requires_grad=True)
    quantized, index, _ = layer.eval()(x)
    assert quantized.dtype == torch.float64 and torch.equal(quantized, layer.codebook[index])
    assert layer.train()(x)[2].dtype == torch.float64


def test_eval_changes_nothing_and_returns_a_fresh_loss():
    for layer in layers(threshold_ema_dead_code=1):
        layer.eval()
        before, x = state(layer), torch.randn(1, 20, DIM)
        loss = layer(x)[2]
        loss += 5
        assert (layer(x)[2] == 0).all() and same(before, state(layer))


def test_backward_after_the_ema_step_uses_the_codewords_of_the_forward():
    layer = VectorQuantize(DIM, K, decay=0.0)
    x, g = torch.randn(1, 50, DIM, requires_grad=True), torch.randn(1, 50, DIM)
    codebook = layer.codebook.clone()
    quantized, index, _ = layer(x)
    assert not torch.equal(codebook, layer.codebook)
    quantized.backward(g)
    other = x.detach().clone().requires_grad_()
    vq.vector_quantize(other, codebook).quantized.backward(g)
    assert torch.equal(x.grad, other.grad) and torch.equal(quantized, codebook[index])


@pytest.mark.parametrize("number", range(6))
def test_compiles_without_graph_breaks_in_eval(number):
    layer = layers(kmeans_init=True)[number]
    layer(torch.randn(1, 100, DIM))
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (30, 40):
        x = torch.randn(2, rows, DIM)
        for a, b in zip(compiled(x), layer(x), strict=True):
            assert torch.equal(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("number", (0, 3))
def test_compiles_in_training(number):
    """One graph for the whole step: search, gradient and EMA update."""
    layer = layers()[number]
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, grads = torch.randn(2, 30, DIM), []
        for module in (layer, compiled):
            v = x.clone().requires_grad_()
            quantized, _, loss = module(v)
            (quantized.square().sum() + loss.sum()).backward()
            grads.append(v.grad)
        torch.testing.assert_close(*grads)
    assert same(state(layer), state(compiled._orig_mod))
    torch._dynamo.reset()


def test_exports():
    layer, x = VectorQuantize(DIM, K).eval(), torch.randn(2, 30, DIM)
    program = torch.export.export(layer, (x,)).module()
    assert all(torch.equal(a, b) for a, b in zip(program(x), layer(x), strict=True))


# statistics


def test_usage():
    layer = VectorQuantize(DIM, K)
    with pytest.raises(RuntimeError, match="there was none with indices"):
        layer.usage  # noqa: B018
    index = layer(torch.randn(2, 30, DIM), mask=torch.rand(2, 30) < 0.7)[1]
    use = layer.usage
    counts = torch.bincount(index[index >= 0], minlength=K)
    assert torch.equal(use.counts, counts) and torch.equal(use.dead, counts == 0)
    share = counts[counts > 0].double() / counts.sum()
    torch.testing.assert_close(use.entropy.double(), -(share * share.log()).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(use.perplexity, use.entropy.exp())
    assert use.used == (counts > 0).float().mean()


def test_usage_per_head_and_level():
    heads = VectorQuantize(DIM, K, heads=2, separate_codebook_per_head=True)
    index = heads(torch.randn(1, 30, DIM))[1]
    assert torch.equal(heads.usage.counts, torch.stack([torch.bincount(i, minlength=K) for i in index[0].T]))
    for options in ({"codebook_size": (4, 9)}, {"codebook_size": K, "num_quantizers": 3, "use_cosine_sim": True}):
        levels = ResidualVQ(dim=DIM, **options)
        index = levels(torch.randn(1, 30, DIM))[1]
        assert len(levels.usage) == levels.num_quantizers
        for level, use in enumerate(levels.usage):
            expected = torch.bincount(index[0, :, level], minlength=levels.codebook_sizes[level])
            assert torch.equal(use.counts, expected)
