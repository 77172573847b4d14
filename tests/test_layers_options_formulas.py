"""The options of VectorQuantize, each by its formula."""

import copy
import math

import pytest
import torch
from test_layers_options import DIM, K, build, step

from vqkernels import VectorQuantize
from vqkernels.layers import search


def test_sampled_codes_follow_the_softmax():
    layer = VectorQuantize(DIM, 5, stochastic_sample_codes=True, sample_codebook_temp=0.5, decay=1.0)
    z = torch.randn(DIM)
    index = layer(z.expand(1, 20_000, DIM), freeze_codebook=True)[1]
    expected = (-torch.cdist(z[None], layer.codebook)[0] / 0.5).softmax(-1)
    torch.testing.assert_close(torch.bincount(index[0], minlength=5) / 20_000, expected, atol=0.015, rtol=0)


def test_sampling_in_chunks_makes_the_same_draw(monkeypatch):
    layer, x = VectorQuantize(DIM, K, stochastic_sample_codes=True), torch.randn(2, 40, DIM)
    torch.manual_seed(1)
    whole = layer(x, freeze_codebook=True)[1]
    monkeypatch.setattr(search, "_CHUNK", 7 * K)
    torch.manual_seed(1)
    assert torch.equal(layer(x, freeze_codebook=True)[1], whole)


def test_topk_of_sampled_codes_has_no_code_twice():
    index = VectorQuantize(DIM, K, stochastic_sample_codes=True)(torch.randn(2, 30, DIM), topk=K)[1]
    assert (index.sort(-1).values == torch.arange(K)).all()


@pytest.mark.parametrize("learnable", (False, True))
@pytest.mark.parametrize("temperature", (0.3, 2.0))
def test_gumbel_estimator(temperature, learnable):
    """The value is the codeword of argmax(s + g), the gradient that of the relaxed mean, written out in float64."""
    layer = VectorQuantize(DIM, K, estimator="gumbel", learnable_codebook=learnable, commitment_weight=0.0)
    x, g = torch.randn(30, DIM, requires_grad=True), torch.randn(30, DIM)
    book = layer.codebook.detach().clone()
    torch.manual_seed(4)
    quantized, index, _ = layer(x, sample_codebook_temp=temperature)
    quantized.backward(g)
    torch.manual_seed(4)
    noise = -(-torch.rand(1, 30, K).clamp(min=1e-20).log()).clamp(min=1e-20).log()
    z, c = x.detach().double().requires_grad_(), book.double().requires_grad_()
    scores = -torch.cdist(z, c, compute_mode="donot_use_mm_for_euclid_dist") + noise[0].double()
    assert torch.equal(index, scores.argmax(-1)) and torch.equal(quantized, book[index])
    share = (scores / temperature).softmax(-1)
    ((share @ c.detach()) * g.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-4, atol=1e-5)
    if learnable:
        expected = c.grad.index_add(0, index, g.double())
        torch.testing.assert_close(layer._codebook.embed.grad[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.eval()(x)[1], torch.cdist(x, layer.codebook).argmin(-1)), "no noise in evaluation"


def test_gumbel_estimator_with_a_low_temperature_trains_like_the_argmax():
    """A sanity check of the direction: gradient steps on the input bring the output to the target."""
    layer = VectorQuantize(2, 4, estimator="gumbel", commitment_weight=0.0)
    layer.codebook = torch.tensor([[0.0, 0], [4, 0], [0, 4], [4, 4]])
    x = torch.nn.Parameter(torch.full((200, 2), 0.5))
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(150):
        loss = (layer(x, freeze_codebook=True)[0] - 4.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (layer.eval()(x)[1] == 3).float().mean() > 0.9


def test_straight_through_alone_switches_the_rotation_off():
    layer = VectorQuantize(DIM, K, straight_through=True)
    x, g = torch.randn(30, DIM, requires_grad=True), torch.randn(30, DIM)
    layer(x)[0].backward(g)
    assert not layer.rotation_trick and torch.equal(x.grad, g)


@pytest.mark.parametrize("max_codes", (None, 5))
def test_orthogonal_loss_of_active_codes(max_codes):
    """Per head, by the sum over pairs; with a maximum, that many of the active ones."""
    layer = build("orthogonal, heads", orthogonal_reg_max_codes=max_codes, ema_update=False)
    index, _, parts = layer(torch.randn(1, 6, DIM), return_loss_breakdown=True)[1:]
    expected = 0.0
    for head in range(2):
        active = index[0, :, head].unique()
        unit = torch.nn.functional.normalize(layer.codebook[head, active].double(), dim=-1)
        expected += ((unit @ unit.T).square().sum() / len(active) ** 2 - 1 / len(active)).item() / 2
    if max_codes is None or max_codes >= 6:
        assert parts.orthogonal_reg.item() == pytest.approx(expected, abs=1e-6)
    layer.orthogonal_reg_max_codes = 1
    assert layer(torch.randn(1, 6, DIM), return_loss_breakdown=True)[3].orthogonal_reg.item() == pytest.approx(
        0, abs=1e-6
    )


def test_diversity_loss_by_the_formula():
    layer = VectorQuantize(DIM, K, codebook_diversity_loss_weight=0.5, codebook_diversity_temperature=3.0)
    x, book = torch.randn(4, 5, DIM), layer.codebook.clone()
    mask = torch.rand(4, 5) < 0.7
    loss, parts = layer(x, mask=mask, return_loss_breakdown=True)[2:]
    share = (-3 * torch.cdist(x, book.expand(4, K, DIM)).double()).softmax(-1)
    terms = []
    for n in range(5):
        if mask[:, n].any():
            mean = share[mask[:, n], n].mean(0)
            terms.append((mean * mean.clamp(min=1e-5).log()).sum())
    torch.testing.assert_close(parts.codebook_diversity.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, parts.commitment + 0.5 * parts.codebook_diversity)


@pytest.mark.parametrize("form", ("image", "one token", "masked"))
def test_cross_entropy_commitment(form):
    options = {"accept_image_fmap": True} if form == "image" else {}
    layer = VectorQuantize(DIM, K, commitment_use_cross_entropy_loss=True, commitment_weight=0.5, **options)
    x = {"image": torch.randn(2, DIM, 3, 4), "one token": torch.randn(9, DIM), "masked": torch.randn(2, 6, DIM)}[form]
    mask = torch.rand(2, 6) < 0.5 if form == "masked" else None
    book = layer.codebook.clone()
    _, index, loss = layer(x, mask=mask)
    rows = (x.movedim(1, -1) if form == "image" else x).reshape(-1, DIM)
    expected = torch.nn.functional.cross_entropy(-torch.cdist(rows, book), index.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss.detach(), 0.5 * expected, rtol=1e-5, atol=1e-6)


def test_directional_output_lies_beside_the_codeword():
    layer = VectorQuantize(DIM, K, directional_reparam=True, threshold_ema_dead_code=1)
    assert layer.learnable_codebook and not layer.ema_update and not layer.rotation_trick
    x = torch.randn(2, 30, DIM, requires_grad=True)
    book = layer.codebook.detach().clone()
    quantized, index, loss = layer(x)
    away, error = quantized - book[index], (book[index] - x).norm(dim=-1)
    torch.testing.assert_close((quantized - x).norm(dim=-1), error)
    assert 0 < away.norm(dim=-1).mean() < error.mean() / 2 and loss == 0
    quantized.sum().backward()
    assert layer._codebook.embed.grad.abs().sum() > 0 and x.grad.abs().sum() > 0
    assert torch.equal(layer.eval()(x)[0], layer.codebook[layer(x)[1]]), "evaluation returns the codeword itself"


def test_learnable_cosine_codewords_stay_on_the_sphere():
    layer = VectorQuantize(DIM, K, learnable_codebook=True, use_cosine_sim=True)
    optimizer, x = torch.optim.SGD(layer.parameters(), lr=30.0), torch.randn(2, 100, DIM)
    losses = []
    for _ in range(20):
        quantized, _, loss = layer(x)
        torch.testing.assert_close(quantized.norm(dim=-1), torch.ones(2, 100))
        optimizer.zero_grad()
        loss.backward()
        embed = layer._codebook.embed
        assert (embed.grad * embed).sum(-1).abs().max() < 1e-6, "no gradient along the codeword"
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_affine_codewords_follow_the_input():
    """A shifted and stretched input gets the codes of the plain one; without a batch the map is the identity."""
    layer = VectorQuantize(DIM, K, affine_param=True, affine_param_batch_decay=0.0, affine_param_codebook_decay=0.0)
    fresh = layer._codebook.codewords(torch.float32, snapshot=False)
    torch.testing.assert_close(fresh[0], layer.codebook)
    x, scale, shift = torch.randn(2, 50, DIM), torch.rand(DIM) * 5 + 1, torch.randn(DIM) * 20
    plain = layer(x, freeze_codebook=True)
    moved = layer(x * scale + shift, freeze_codebook=True)
    codes = layer._codebook.codewords(torch.float32, snapshot=False)[0]
    torch.testing.assert_close(codes.mean(0), (x * scale + shift).mean((0, 1)), rtol=1e-4, atol=1e-4)
    spread = (x * scale + shift).flatten(0, 1).var(0, correction=0)
    torch.testing.assert_close(codes.var(0, correction=0), spread, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved[0], plain[0] * scale + shift, rtol=0.7, atol=30.0)


def test_affine_statistics_are_shared_only_among_several_processes():
    torch.manual_seed(0)
    alone = VectorQuantize(DIM, K, affine_param=True, sync_affine_param=True)
    plain = VectorQuantize(DIM, K, affine_param=True)
    plain.load_state_dict(alone.state_dict())
    x = torch.randn(2, 30, DIM)
    assert torch.equal(alone(x)[0], plain(x)[0])


def test_affine_revival_lands_on_rows_of_the_batch():
    layer = VectorQuantize(DIM, 32, affine_param=True, threshold_ema_dead_code=2, decay=0.5)
    x = torch.randn(1, 300, DIM) * 3 + 5
    layer(x)
    revived = layer._codebook.cluster_size[0] == 2
    assert revived.any()
    rows = layer._codebook.codewords(torch.float32, snapshot=False)[0, revived]
    assert (rows[:, None] - x[0]).norm(dim=-1).amin(-1).max() < 1e-4


def test_bridge_learns():
    layer = build("bridge")
    assert {"_codebook.vq_bridge.weight", "_codebook.vq_bridge.bias"} <= layer.state_dict().keys()
    grads = step(layer, torch.randn(2, 30, DIM))[5]
    assert all(g.abs().sum() > 0 for g in grads)


def test_synchronous_update_adds_to_the_gradient_alone():
    torch.manual_seed(0)
    plain = VectorQuantize(DIM, K, learnable_codebook=True, commitment_weight=0.0)
    other = VectorQuantize(DIM, K, learnable_codebook=True, commitment_weight=0.0, sync_update_v=0.25)
    other.load_state_dict(plain.state_dict())
    x, grads = torch.randn(30, DIM), []
    for layer in (plain, other):
        v = x.clone().requires_grad_()
        quantized = layer(v)[0]
        quantized.backward(torch.ones_like(quantized))
        grads.append(v.grad)
    torch.testing.assert_close(grads[1], 1.25 * grads[0])
    assert torch.equal(plain(x)[0], other(x)[0])


@pytest.mark.parametrize("manual", (False, True))
def test_in_place_optimizer(manual):
    layer = build("in place", manual_in_place_optimizer_update=manual, commitment_weight=0.0)
    x = torch.randn(2, 30, DIM)
    before = layer.codebook.detach().clone()
    quantized, index, _, parts = layer(x, return_loss_breakdown=True)
    book = before.clone().requires_grad_()
    chosen = torch.cdist(x, before.expand(2, K, DIM)).argmin(-1)
    (book[chosen] - x).square().mean().backward()
    torch.testing.assert_close(parts.inplace_optimize, (before[chosen] - x).square().mean())
    assert not parts.inplace_optimize.requires_grad
    if manual:
        assert torch.equal(layer.codebook, before)
        layer.update_in_place_optimizer()
    torch.testing.assert_close(layer.codebook.detach(), before - 0.1 * book.grad)
    if not manual:
        assert torch.equal(quantized.detach(), layer.codebook.detach()[index]), "quantized again after the step"
    other = copy.deepcopy(layer)
    other(torch.randn(2, 30, DIM)), other.update_in_place_optimizer()
    assert not torch.equal(other.codebook, layer.codebook), "the copy's optimizer trains the copy"
    before = layer.codebook.detach().clone()
    layer(x, freeze_codebook=True), layer.eval()(x)
    with torch.no_grad():
        layer(x)
    assert torch.equal(layer.codebook, before)


@pytest.mark.parametrize("train", (True, False))
@pytest.mark.parametrize("estimator", ("rotation", "gumbel"))
def test_topk_of_every_tokens_own_candidates(estimator, train):
    """Beam search with implicit codebooks: candidates, k of them, their errors, and the gradient to the candidates."""
    layer = VectorQuantize(DIM, K, learnable_codebook=True, estimator=estimator).train(train)
    x, condition = torch.randn(2, 30, DIM), torch.randn(1, 2, 30, 1, DIM, requires_grad=True)
    quantized, index, loss = layer(x, topk=4, codebook_transform_fn=lambda codes: codes[:, None, None] + condition)
    candidates = layer.codebook + condition[0]
    error = (candidates - x[:, :, None]).square().mean(-1)
    assert quantized.shape == (2, 30, 4, DIM) and index.shape == loss.shape == (2, 30, 4)
    torch.testing.assert_close(quantized, candidates.gather(2, index[..., None].expand(2, 30, 4, DIM)))
    torch.testing.assert_close(loss, error.gather(-1, index))
    if estimator == "rotation" or not train:
        assert torch.equal(index, error.argsort(-1)[..., :4])
    loss.sum().backward()
    assert condition.grad.abs().sum() > 0


def test_topk_error_without_a_weight_is_reported_in_evaluation():
    layer = VectorQuantize(DIM, K, commitment_weight=0.0).eval()
    loss, parts = layer(torch.randn(2, 30, DIM), topk=3, return_loss_breakdown=True)[2:]
    assert (loss > 0).all() and torch.equal(loss, parts.commitment)
    loss = layer.train()(torch.randn(2, 30, DIM), topk=3)[2]
    assert loss.shape == (2, 30, 3) and (loss == 0).all()


def test_diversity_raises_the_entropy():
    """The sign: gradient steps on the loss spread the codes."""
    layer = VectorQuantize(DIM, K, codebook_diversity_loss_weight=1.0, commitment_weight=0.0, learnable_codebook=True,
                           codebook_diversity_temperature=5.0)  # fmt: skip
    layer._codebook.embed.data[:, 1:] += 2.0  # nearly all vectors choose the first
    optimizer, x = torch.optim.Adam(layer.parameters(), lr=0.02), torch.randn(64, 1, DIM)
    first = None
    for _ in range(60):
        loss, parts = layer(x, return_loss_breakdown=True)[2:]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = parts.codebook_diversity.item() if first is None else first
    assert parts.codebook_diversity < first - 0.05 and parts.codebook_diversity > -math.log(K)
