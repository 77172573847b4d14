"""RQ-VAE and VQ-VAE: losses, codes, training on small data."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqkernels.data import fashion_mnist_subset
from vqkernels.layers import VectorQuantize
from vqkernels.models import RQVAE, VQVAE
from vqkernels.semantic_ids import RQVAETokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(fashion_mnist_subset()[0][:96].copy()).unsqueeze(1) / 255


def clusters(n=256, dim=12):
    centres = torch.randn(10, dim)
    return centres[torch.randint(10, (n,))] + 0.1 * torch.randn(n, dim)


def test_rqvae_losses_are_what_they_are_called():
    x, model = clusters(), RQVAE(12, hidden=[16], latent_dim=4, levels=3, codebook_size=8, beta=0.5)
    out = model(x)
    assert out.indices.shape == (256, 3) and out.indices.dtype == torch.int64 and out.reconstruction.shape == x.shape
    torch.testing.assert_close(out.reconstruction_loss, (out.reconstruction - x).square().mean())
    torch.testing.assert_close(out.loss, out.reconstruction_loss + out.commitment_loss)
    z, codebooks, expected = (
        model.encoder(x),
        model.quantizer.codebooks.clone(),
        0.0,
    )  # of the codewords before they move
    out, residual = model(x), z
    for level in range(3):
        index = torch.cdist(residual, codebooks[level]).argmin(1)
        assert torch.equal(index, out.indices[:, level])
        expected = expected + 0.5 * (residual - codebooks[level][index]).square().mean()
        residual = residual - codebooks[level][index]
    torch.testing.assert_close(out.commitment_loss, expected)
    torch.testing.assert_close(out.reconstruction, model.decoder(z - residual))


@pytest.mark.parametrize("estimator", ["rotation", "reflection", "ste"])
def test_rqvae_gradient_reaches_the_encoder_by_the_estimator(estimator):
    torch.manual_seed(1)
    x, model = clusters(), RQVAE(12, hidden=[16], latent_dim=4, codebook_size=8, estimator=estimator)
    model(x)  # seeds the codebooks
    model.eval().requires_grad_(True)
    model.train()
    model(x).reconstruction_loss.backward()
    gradient = model.encoder[0].weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    if estimator != "ste":
        torch.manual_seed(1)
        clusters()
        other = RQVAE(12, hidden=[16], latent_dim=4, codebook_size=8, estimator="ste")
        other.load_state_dict(model.state_dict())
        other(x).reconstruction_loss.backward()
        assert not torch.allclose(gradient, other.encoder[0].weight.grad, rtol=1e-2)


def test_rqvae_encode_and_decode_move_nothing():
    x, model = clusters(), RQVAE(12, hidden=[16], latent_dim=4, codebook_size=8)
    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    codes = model.encode(x)
    assert model.training and torch.equal(codes, model.eval()(x).indices)
    torch.testing.assert_close(model.decode(codes), model(x).reconstruction)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    coarse = [(model.decode(codes[:, :levels]) - model(x).reconstruction).square().mean() for levels in (1, 2, 3)]
    assert coarse[2] < 1e-9 < coarse[0]


@pytest.mark.parametrize(
    "options", [{"quantizer": "simvq"}, {"quantizer": "fsq"}, {"estimator": "gumbel"}], ids=lambda o: str(o)
)
def test_other_rqvaes_learn_encode_and_decode(options):
    x = clusters()
    model = RQVAE(12, hidden=[16], levels=2, codebook_size=8, **options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with torch.no_grad():
        model.quantizer(model.encoder(x))
    first = None
    for _ in range(150):
        out = model(x)
        first = first or out.reconstruction_loss.item()
        optimizer.zero_grad()
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.encoder[0].weight.grad.abs().max() > 0
        optimizer.step()
    out, codes = model.eval()(x), model.encode(x)
    assert out.reconstruction_loss < 0.5 * first and len(torch.unique(codes, dim=0)) > 8
    assert torch.equal(codes, out.indices) and codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < 8
    torch.testing.assert_close(model.decode(codes), out.reconstruction)
    coarse, fine = (model.decode(codes[:, :levels]) for levels in (1, 2))
    assert (coarse - x).square().mean() > (fine - x).square().mean()


@pytest.mark.parametrize(
    ("hidden", "latent", "carried"),
    [((16,), 4, 4), ((40, 20), 6, 6), ((), 5, 5), ((9, 7), 6, 3), ((1,), 4, 0), ((64,), 20, 12)],
)
def test_rqvae_starts_as_the_best_linear_autoencoder(hidden, latent, carried):
    torch.manual_seed(0)
    x = torch.randn(200, 12) @ torch.randn(12, 12) + 3
    model = RQVAE(12, hidden=hidden, latent_dim=latent, codebook_size=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.init_pca_(x) is model
    z = model.encoder(x)
    lost = torch.linalg.svdvals(x - x.mean(0))[carried:].square().sum()
    if carried == 0:  # no layer has room for a component
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    torch.testing.assert_close((model.decoder(z) - x).square().sum(), lost, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(z[:, :carried].square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(z[:, :carried].mean(0), torch.zeros(carried), atol=1e-4, rtol=0)
    # what carries no component can learn: the other units and latent features are there, and change with x
    assert (z[:, carried:].amax(0) > z[:, carried:].amin(0)).all()
    (model.decoder(torch.sin(z)) - x).square().sum().backward()
    used = model.decoder[-1].weight.grad.abs().sum(0) > 0
    assert used[: 2 * carried].all() and (used[2 * carried :].float().mean() > 0.5 or used[2 * carried :].numel() < 2)


def test_rqvae_start_on_equal_rows_changes_nothing():
    model = RQVAE(12, hidden=[16], latent_dim=4, codebook_size=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_pca_(torch.zeros(5, 12))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("quantizer", ["residual", "simvq", "fsq"])
def test_rqvae_tokenizer_starts_as_pca_and_kmeans(quantizer):
    torch.manual_seed(0)
    x = clusters(300, 16)
    tokenizer = RQVAETokenizer(2, 16, hidden=[32], epochs=1, lr=1e-9, batch_size=100, quantizer=quantizer).fit(x)
    z, model = tokenizer._standardise(x), tokenizer._model
    count = min(model.encoder[-1].out_features, 16)
    with torch.no_grad():
        left = (model.decoder(model.encoder(z)) - z).square().sum()
    torch.testing.assert_close(left, torch.linalg.svdvals(z)[count:].square().sum(), rtol=1e-3, atol=1e-2)
    if quantizer == "residual":
        assert tokenizer.report()["energy"][-1] > 0.9
        for layer in model.quantizer.layers:  # counts of a batch, so that a codeword without one is soon dead
            counts, sums = layer._codebook.cluster_size, layer._codebook.embed_avg
            assert counts.sum() == pytest.approx(100, rel=0.02)
            torch.testing.assert_close(sums / counts.unsqueeze(-1), layer._codebook.embed, rtol=0.1, atol=0.1)


def test_rqvae_settings():
    model = RQVAE(12, hidden=[16], quantizer="fsq", codebook_size=300)
    assert model.quantizer.codebook_size == 256 and model.encoder[-1].out_features == 8
    with pytest.raises(ValueError, match=r"latent_dim=32 with quantizer='fsq': codebook_size=256 gives 8"):
        RQVAE(12, quantizer="fsq", latent_dim=32)
    assert RQVAE(12, quantizer="fsq", latent_dim=8).encoder[-1].out_features == 8


@pytest.mark.parametrize("estimator", ["rotation", "ste"])
def test_vqvae_learns_images_and_is_seeded(images, estimator):
    def trained():
        torch.manual_seed(0)
        model = VQVAE(width=16, dim=8, codebook_size=32, estimator=estimator)
        return model, model.fit(images, steps=60, batch_size=32, lr=3e-3, progress=False)

    model, history = trained()
    assert [record["step"] for record in history] == [50, 60]
    assert history[-1]["reconstruction_loss"] < 0.6 * images.var()
    result = model.evaluate(images)
    assert model.training and result["reconstruction_error"] < 0.6 * images.var()
    assert result["usage"] > 0.5 and 1 < result["perplexity"] <= 32
    again, same = trained()
    assert same == history and again.evaluate(images) == result


def test_vqvae_takes_other_quantizers_and_sizes():
    quantizer = VectorQuantize(6, 16, codebook_dim=3, use_cosine_sim=True, accept_image_fmap=True)
    model = VQVAE(3, width=8, dim=6, quantizer=quantizer)
    out = model(torch.rand(2, 3, 12, 20))
    assert out.reconstruction.shape == (2, 3, 12, 20) and out.indices.shape == (2, 3, 5)
    torch.testing.assert_close(out.loss, out.reconstruction_loss + out.commitment_loss)
    with pytest.raises(ValueError, match=r"decay belong to the default quantizer"):
        VQVAE(dim=6, quantizer=quantizer, decay=0.5)
    with pytest.raises(ValueError, match=r"\[2, 3, 13, 20\].*multiples of 4. Pad or crop"):
        model(torch.rand(2, 3, 13, 20))


def test_diverging_training_is_told(images):
    with pytest.raises(FloatingPointError, match=r"lr=1e\+20. Use a smaller lr"):
        VQVAE(width=8, dim=4, codebook_size=8).fit(images, steps=10, batch_size=16, lr=1e20, progress=False)


def test_example_prints_the_table_and_saves_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    script = Path(__file__).parents[1] / "examples" / "vqvae_fashion_mnist.py"
    result = subprocess.run(
        [sys.executable, script, "--steps", "3", "--codebook-size", "16", "--out", tmp_path],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (
        "ste" in result.stdout
        and "rotation" in result.stdout
        and (tmp_path / "reconstructions.png").stat().st_size > 5000
    )
