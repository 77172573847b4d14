"""Training from a configuration: on any device that accelerate knows, in a folder that can be resumed.

Everything that decides a step is a function of the seed and the step, or is in the checkpoint; so a run that is killed
and resumed goes on as if nothing had happened.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import DataError
from ..data.catalogue import write_atomic
from ..data.checkpoint import load_state, optimizer_tensors, restore_optimizer, save_state
from ..data.progress import progress_bar
from .config import NAMES, RunConfig, TrainConfig, config_to_dict
from .runs import (
    CONFIG,
    METRICS,
    read_config,
    read_metrics,
    save_model,
    write_config,
)
from .tasks import ImageTask, PriorTask

try:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
except ImportError:
    raise ImportError("training is built on accelerate. Run: pip install 'vqkernels[images]'") from None


def train(config: RunConfig, out, *, resume: bool = False, source=None, progress=None) -> list[dict]:
    """Trains what ``config`` says and keeps it in the folder ``out``; returns the records of metrics.jsonl.

    Args:
        resume: go on from the last checkpoint of the same configuration in ``out``; without one, begin.
        source: a data set object, as ``image_source`` takes it, in place of ``config.data.source``.
        progress: as in ``progress_bar``.

    Records of training have ``step``, ``loss`` and its parts (means since the record before), ``learning_rate``,
    ``seconds`` and, of a VQVAE or VQGAN, ``usage`` and ``perplexity`` of the codes given meanwhile. Records of an
    evaluation of the averaged weights have ``step`` and ``validation_*``. Start several processes with torchrun or
    ``accelerate launch``; each then takes ``batch_size`` images a step.

    DataError says what is wrong with the configuration, the data or the folder; FloatingPointError that the loss became
    infinite.
    """
    out = Path(out)
    if resume and (out / CONFIG).is_file():
        _check_same(read_config(out), config, out)
    elif out.is_dir() and any((out / name).exists() for name in (CONFIG, METRICS)):
        raise DataError(f"{out} holds a run. Choose another folder, or resume it")
    kwargs = [DistributedDataParallelKwargs(find_unused_parameters=True)] if config.kind == "vqgan" else []
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes of torchrun without a GPU would not find each other
        mixed_precision=config.train.precision,
        gradient_accumulation_steps=config.train.accumulate,
        kwargs_handlers=kwargs,
    )
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with _deterministic(config.train.deterministic), torch.random.fork_rng(devices):
            run = _Run(config, out, accelerator, source, progress)
            run.restore(resume)
            run.go(progress)
        return read_metrics(out)
    finally:
        AcceleratorState._reset_state()  # the next run in this process may use another precision


class _Run:
    def __init__(self, config: RunConfig, out: Path, accelerator: Accelerator, source, progress):
        self.config, self.out, self.accelerator = config, out, accelerator
        settings = config.train
        torch.manual_seed(settings.seed)
        make = PriorTask if config.kind == "prior" else ImageTask
        self.task = make(config, source, out, accelerator.device, progress)
        parameters = [p for p in self.task.model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in parameters if (p.dim() > 1) == matrix]} for matrix in (True, False)]
        groups[1]["weight_decay"] = 0.0
        optimizer = torch.optim.AdamW(groups, settings.lr, weight_decay=settings.weight_decay)
        # what is evaluated is a model of its own: a quantizer that a forward pass starts must not be the trained one
        self.judged = copy.deepcopy(self.task.model).to(accelerator.device).eval()
        self.model, self.optimizer = accelerator.prepare(self.task.model, optimizer)
        self.average = _Average(self.task.model, settings.ema)
        self.step, self.best, self.waited, self.seconds = 0, math.inf, 0, 0.0
        torch.manual_seed(settings.seed + accelerator.process_index)  # dropout and the codebook's draws

    # What a killed run goes on from.

    def restore(self, resume: bool) -> None:
        found = load_state(self.out) if resume else None
        if found:
            tensors, numbers = found
            self.task.model.load_state_dict(tensors["model"])
            self.average.load(tensors["average"])
            restore_optimizer(self.optimizer, tensors["optimizer"])
            self.step, self.best, self.waited = numbers["step"], numbers["best"], numbers["waited"]
            self.seconds = numbers["seconds"]
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(numbers["scaler"])
            if len(tensors["random"]["cpu"]) != self.accelerator.num_processes:
                raise DataError(
                    f"{self.out} was trained by {len(tensors['random']['cpu'])} processes, not "
                    f"{self.accelerator.num_processes}. Resume it with as many"
                )
            self._set_random(tensors["random"])
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            write_config(self.out, self.config)
            kept = [record for record in read_metrics(self.out) if record["step"] <= self.step]
            write_atomic(self.out / METRICS, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> None:
        random = {"cpu": self._gathered(torch.get_rng_state())}
        if self.accelerator.device.type == "cuda":
            random["cuda"] = self._gathered(torch.cuda.get_rng_state(self.accelerator.device))
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        numbers = {"step": self.step, "best": self.best, "waited": self.waited, "seconds": self.seconds}
        tensors = {
            "model": self.task.model.state_dict(),
            "average": self.average.state,
            "optimizer": optimizer_tensors(self.optimizer),
            "random": random,
        }
        save_state(self.out, tensors, numbers | {"scaler": scaler.state_dict() if scaler else None})

    def _gathered(self, state: Tensor) -> Tensor:
        """The generator's state of every process, [processes, bytes]."""
        return self.accelerator.gather(state.to(self.accelerator.device).unsqueeze(0)).cpu()

    def _set_random(self, states: dict[str, Tensor]) -> None:
        mine = self.accelerator.process_index
        torch.set_rng_state(states["cpu"][mine])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"][mine], self.accelerator.device)

    # Training.

    def go(self, progress) -> None:
        settings, accelerator = self.config.train, self.accelerator
        micro = self._batches(self.step * settings.accumulate)
        window: list[tuple[dict[str, Tensor], Tensor | None]] = []
        began = time.perf_counter() - self.seconds
        name = NAMES[self.config.kind]
        bar = progress if accelerator.is_main_process else False
        with self._writer() as write, progress_bar(bar, name, settings.steps) as advance:
            advance(self.step)
            while self.step < settings.steps and not (settings.patience and self.waited >= settings.patience):
                self.task.model.train()
                rate = settings.lr * schedule(self.step, settings)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                for batch in itertools.islice(micro, settings.accumulate):
                    with accelerator.accumulate(self.model):
                        losses = self.task.losses(self.model, _to(batch, accelerator.device), self.step)
                        accelerator.backward(losses.loss)
                        if accelerator.sync_gradients and settings.clip:
                            accelerator.clip_grad_norm_(self.model.parameters(), settings.clip)
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                    window.append((losses.scalars, losses.indices))
                self.step += 1
                self.average.update(self.task.model, self.step)
                last, self.seconds = self.step == settings.steps, time.perf_counter() - began
                saves = last or self.step % settings.checkpoint_every == 0
                # a record never spans a checkpoint, so that a resumed run writes the same ones
                if saves or self.step % settings.log_every == 0:
                    record = {"step": self.step, **self._means(window), "learning_rate": rate, "seconds": self.seconds}
                    write(record)
                    advance(0, f"{name} loss {record['loss']:.4f}")
                    window = []
                if last or self.step % settings.evaluate_every == 0:
                    write({"step": self.step, **self._evaluate()})
                if saves:
                    self.checkpoint()
                advance()

    def _means(self, window) -> dict[str, float]:
        names = list(window[0][0])
        scalars = torch.stack([torch.stack([s[name].float() for name in names]) for s, _ in window]).mean(0)
        scalars = self.accelerator.reduce(scalars, "mean").tolist()
        means = dict(zip(names, scalars, strict=True))
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss became {means['loss']} before step {self.step} at train.lr={self.config.train.lr}. Use a "
                "smaller one"
            )
        if window[0][1] is not None:
            means |= self.task.usage(self.accelerator.gather(torch.cat([indices for _, indices in window])))
        return means

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Losses of the averaged weights on held-out images; keeps the weights as the run's model, or only if they are
        the best where the run has a patience."""
        settings, device, totals, count, indices = self.config.train, self.accelerator.device, {}, 0, []
        self.judged.load_state_dict(self.average.state)
        images = torch.utils.data.Subset(self.task.test, range(min(settings.evaluate_images, len(self.task.test))))
        size = settings.batch_size // settings.accumulate
        for batch in DataLoader(images, size, num_workers=self.config.data.workers, generator=torch.Generator()):
            batch = _to(batch, device)
            with self.accelerator.autocast():
                losses = self.task.losses(self.judged, batch, self.step)
            many = len(next(iter(batch.values())))
            for name, value in losses.scalars.items():
                totals[name] = totals.get(name, 0.0) + float(value) * many
            count += many
            indices.append(losses.indices)
        means = {name: total / count for name, total in totals.items()}
        if indices[0] is not None:
            means |= self.task.usage(torch.cat(indices))
        record = {f"validation_{name}": value for name, value in means.items()}
        best = record["validation_loss"] < self.best
        self.waited = 0 if best else self.waited + 1
        self.best = min(self.best, record["validation_loss"])
        if (best or not settings.patience) and self.accelerator.is_main_process:
            save_model(self.out, self.average.state, self.task.facts)
        return record

    def _batches(self, first: int):
        """Parts of batches from number ``first`` on, without end: a new order every epoch, the same for one seed."""
        data, settings, world = self.task.train, self.config.train, self.accelerator.num_processes
        size = settings.batch_size // settings.accumulate
        each = max(len(data) // (size * world), 1)
        for epoch in itertools.count(first // each):
            order = torch.randperm(
                len(data), generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
            )
            order = order.repeat(-(-size * world // len(data)))  # where the data do not fill one batch
            mine = range(self.accelerator.process_index * size, each * size * world, size * world)
            parts = [order[start : start + size].tolist() for start in mine][first % each :]
            first = 0
            if hasattr(data, "set_epoch"):
                data.set_epoch(epoch)
            workers = self.config.data.workers
            yield from DataLoader(data, batch_sampler=parts, num_workers=workers, generator=torch.Generator())

    @contextmanager
    def _writer(self):
        """Yields ``write(record)``: into metrics.jsonl and, if wanted, TensorBoard's files; by the first process."""
        if not self.accelerator.is_main_process:
            yield lambda record: None
            return
        board = None
        if self.config.train.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("train.tensorboard needs tensorboard. Run: pip install tensorboard") from None
            board = SummaryWriter(self.out / "tensorboard", purge_step=self.step + 1)
        with open(self.out / METRICS, "a", encoding="utf-8") as file:

            def write(record: dict) -> None:
                file.write(json.dumps(record) + "\n")
                file.flush()
                for name, value in record.items():
                    if board and name != "step":
                        board.add_scalar(name, value, record["step"])

            yield write
        if board:
            board.close()


class _Average:
    """An exponential moving average of a model's state: weights, codewords, statistics. Its decay rises to the given
    one over the first steps; 0 keeps the state as it is."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, step / (step + 10))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.state[name].copy_(value)


def schedule(step: int, settings: TrainConfig) -> float:
    """The share of the learning rate at a step, counted from 0: a linear rise, then a cosine down to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    left = max(settings.steps - settings.warmup, 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - settings.warmup) / left)


def _to(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


def _check_same(before: RunConfig, now: RunConfig, out: Path) -> None:
    old, new = config_to_dict(before), config_to_dict(now)
    if old == new:
        return
    differing = [
        f"{section}.{name} was {old[section].get(name)!r} and is {value!r}"
        for section in ("data", "model", "train")
        for name, value in new[section].items()
        if old["kind"] == new["kind"] and old[section].get(name) != value
    ]
    what = "; ".join(differing) or f"kind was {old['kind']!r} and is {new['kind']!r}"
    raise DataError(
        f"{out} holds a run of another configuration: {what}. Resume it as it was, or choose another folder"
    )


@contextmanager
def _deterministic(wanted: bool):
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with a fixed workspace
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
