"""How TIGER is trained: its options, what a killed training goes on from, and several processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="TIGER is built on transformers; pip install 'vqkernels[models]'")

from vqkernels.data import DataError
from vqkernels.recommend import LIGER, TIGER, evaluate, leave_one_out
from vqkernels.recommend.training import batches, schedule

SMALL = {"d_model": 16, "d_ff": 32, "heads": 2, "layers": 1, "max_history": 6, "window": 3}
IDS = np.unique(np.random.default_rng(0).integers(0, 4, (20, 3)), axis=0)
N = len(IDS)
CIRCLE = [np.arange(start, start + 8) % N + 1 for start in range(N)]
SPLIT = leave_one_out(CIRCLE)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


class Killed(Exception):
    pass


def killed_after(steps):
    count = [0]

    def progress(share, loss):
        count[0] += 1
        if count[0] == steps:
            raise Killed

    return progress


@pytest.mark.parametrize("make", [TIGER, LIGER])
@pytest.mark.parametrize("steps", [2, 7, 11, 12])  # 6 steps are an epoch: within one, and at its end
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, make, steps):
    def new():
        given = (IDS, np.random.default_rng(1).normal(size=(N, 5))) if make is LIGER else (IDS,)
        return make(*given, **SMALL, dropout=0.2)

    options = {"epochs": 3, "batch_size": 8, "validation": SPLIT.validation}
    whole = new().fit(SPLIT.train, **options)
    kept = {"checkpoint": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(Killed):
        new().fit(SPLIT.train, **options, **kept, progress=killed_after(steps))
    seen = []
    model = new().fit(SPLIT.train, **options, **kept, resume=True, progress=lambda share, loss: seen.append(share))
    assert same(weights(whole), weights(model))
    total = sum(1 for _ in batches(whole, SPLIT.train, np.arange(N), 8, np.random.default_rng([0, 0])))
    assert len(seen) == 3 * total - (steps - 1)  # what was behind is not done again
    for one, other in zip(whole.history, model.history, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_a_finished_training_is_kept(tmp_path):
    fit = lambda progress: TIGER(IDS, **SMALL).fit(  # noqa: E731
        SPLIT.train, epochs=2, validation=SPLIT.validation, checkpoint=tmp_path, resume=True, progress=progress
    )
    first, steps = fit(None), []
    again = fit(lambda *step: steps.append(step))
    assert not steps and same(weights(first), weights(again))


def test_another_training_is_not_resumed(tmp_path):
    fit = lambda model, **options: model.fit(  # noqa: E731
        SPLIT.train, epochs=1, checkpoint=tmp_path, resume=True, **options
    )
    fit(TIGER(IDS, **SMALL))
    with pytest.raises(DataError, match=r"lr: 0\.003 then, 0\.01 now"):
        fit(TIGER(IDS, **SMALL), lr=0.01)
    with pytest.raises(DataError, match="seed: 0 then, 1 now"):
        fit(TIGER(IDS, **SMALL, seed=1))
    with pytest.raises(DataError, match="data: "):
        fit(TIGER(IDS[::-1].copy(), **SMALL))
    state = tmp_path / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged"):
        fit(TIGER(IDS, **SMALL))


TWO = """
import sys, torch
from test_recommend_training import *
model = TIGER(IDS, **SMALL, dropout=0.0)
model.fit(SPLIT.train, epochs=3, batch_size=4, validation=SPLIT.validation, checkpoint=sys.argv[1], resume=True)
model.save(f"{sys.argv[1]}/model-{torch.distributed.get_rank()}")
"""


def test_two_processes_train_what_one_does(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    both = [TIGER.load(tmp_path / f"model-{rank}") for rank in (0, 1)]
    assert same(weights(both[0]), weights(both[1]))
    alone = TIGER(IDS, **SMALL, dropout=0.0).fit(SPLIT.train, epochs=3, batch_size=8, validation=SPLIT.validation)
    for one, other in zip(alone.history, both[0].history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-4)
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], abs=2e-3)
    with pytest.raises(DataError, match="processes: 2 then, 1 now"):
        TIGER(IDS, **SMALL, dropout=0.0).fit(SPLIT.train, epochs=3, batch_size=4, checkpoint=tmp_path, resume=True)


def test_every_process_has_a_part_of_every_batch():
    model, rng = TIGER(IDS, **SMALL), np.random.default_rng(0)
    sequences = [rng.integers(1, N + 1, n) for n in (1, 2, 3, 7, 20)]
    seen = []
    for parts in batches(model, sequences, np.arange(5), 2, rng, parts=2):
        assert len(parts) == 2 and all(len(target) for _, target, _ in parts)
        seen += [target[target > 0] for _, target, _ in parts]
    repeated = len(torch.cat(seen)) - sum(map(len, sequences))
    assert 0 <= repeated <= model.window  # at most one example, where the last batch had but one
    assert set(torch.cat(seen).tolist()) == set(np.concatenate(sequences).tolist())


def test_schedules():
    assert schedule("cosine", 0.025, 0.05) == schedule("inverse-sqrt", 0.025, 0.05) == 0.5
    assert schedule("cosine", 0.05, 0.05) == schedule("inverse-sqrt", 0.05, 0.05) == 1.0
    assert schedule("cosine", 0.525, 0.05) == pytest.approx(0.5) and schedule("cosine", 1.0, 0.05) == 0.0
    assert schedule("inverse-sqrt", 0.2, 0.05) == pytest.approx(0.5)


def test_the_schedule_and_the_precision_are_used():
    fit = lambda **options: TIGER(IDS, **SMALL, dropout=0.0).fit(SPLIT.train, epochs=4, lr=1e-2, **options)  # noqa: E731
    plain, slow, half = fit(), fit(schedule="inverse-sqrt"), fit(precision="bf16")
    assert not same(weights(plain), weights(slow)) and not same(weights(plain), weights(half))
    assert half.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], abs=0.05)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert half(*(torch.tensor([[1, 2, 3]]),) * 2).dtype == torch.float32  # forward is itself again


@pytest.mark.parametrize("window", [1, 3])
def test_without_augmentation_only_the_latest_items_are_targets(window):
    model = TIGER(IDS, **SMALL | {"window": window})
    sequences = [np.array([1, 2, 3, 4, 5]), np.array([6, 7]), np.array([8])]
    rng, found = np.random.default_rng(0), {}
    for past, target, users in batches(model, sequences, np.arange(3), 2, rng, last=True):
        for p, t, u in zip(past, target, users, strict=True):
            found[int(u)] = p[p > 0].tolist(), t[t > 0].tolist()
    for user, sequence in enumerate(sequences):
        past, target = found[user]
        assert target == sequence[-window:].tolist() and past + target == sequence.tolist()
    fit = lambda augment: TIGER(IDS, **SMALL, dropout=0.0).fit(SPLIT.train, epochs=1, augment=augment)  # noqa: E731
    assert not same(weights(fit(True)), weights(fit(False)))


def test_the_best_epoch_is_kept_and_patience_ends_the_training():
    model = TIGER(IDS, **SMALL, dropout=0.0)
    model.fit(SPLIT.train, epochs=60, batch_size=8, lr=0.1, patience=3, validation=SPLIT.validation)
    scores = [record["validation_ndcg"] for record in model.history]
    best = int(np.argmax(scores))  # the first of the best
    assert len(scores) == best + 4 < 60
    assert evaluate(model, SPLIT.validation, beams=20)["NDCG@10"] == pytest.approx(scores[best], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "schedule 'linear'.*'cosine', 'inverse-sqrt'"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"warmup": 0.0}, "warmup 0.0"),
        ({"patience": 2}, "no validation"),
        ({"resume": True}, "checkpoint folder"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TIGER(IDS, **SMALL).fit(SPLIT.train, epochs=1, **options)


def test_an_infinite_loss_is_said(recwarn):
    with pytest.raises(FloatingPointError, match="lr=1e"):
        TIGER(IDS, **SMALL).fit(SPLIT.train, epochs=50, lr=1e30)


def test_the_callers_accelerator_lives_on():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    mine = Accelerator(cpu=True)
    TIGER(IDS, **SMALL).fit(SPLIT.train, epochs=1)
    assert mine.state.mixed_precision == "no" and mine.num_processes == 1
    AcceleratorState._reset_state()
