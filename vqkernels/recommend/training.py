"""How a TIGER is trained: on one device or, started by torchrun, on several; in steps that can be resumed."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.catalogue import DataError
from ..data.checkpoint import load_state, optimizer_tensors, restore_optimizer, save_state
from .evaluation import JUDGED, drawn, metrics

SCHEDULES = ("cosine", "inverse-sqrt")
PRECISIONS = ("no", "bf16", "fp16")
JUDGED_BEAMS = 20


def schedule(name: str, done: float, warmup: float) -> float:
    """The share of the learning rate when a share ``done`` of all steps is behind: a linear rise over ``warmup`` of
    them, then a cosine down to 0, or the inverse square root of the steps (Raffel et al. 2020, section 3.1.2)."""
    if done < warmup:
        return done / warmup
    if name == "inverse-sqrt":
        return math.sqrt(warmup / done)
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))


def batches(model, sequences: list[np.ndarray], users: np.ndarray, batch_size: int, rng, parts: int = 1, last=False):
    """Cuts every sequence into windows at a random phase, so that each item is a target once, or takes the ``last``
    window alone. Yields (past [B, T], target [B, window], users [B]), 0 = padding, examples of like length together;
    with several ``parts`` a list of so many of these, which share a batch of ``parts`` times ``batch_size``."""
    window, max_history = model.window, model.max_history
    lengths = np.array([len(s) for s in sequences])
    flat, base = np.concatenate(sequences), np.cumsum(lengths) - lengths
    phase = -lengths % window if last else rng.integers(0, window, len(sequences))
    count = -(-(lengths + phase) // window)
    owner = np.repeat(np.arange(len(sequences)), count)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    if last:
        owner, number = np.arange(len(sequences)), count - 1
    start = number * window - phase[owner]
    stop = np.minimum(start + window, lengths[owner])
    start = np.maximum(start, 0)  # the first window may begin before the sequence does
    reach = np.minimum(start, max_history - window + 1)  # items that the encoder sees

    def gather(first, size):
        columns = np.arange(size.max())
        inside = columns < size[:, None]
        return torch.from_numpy(np.where(inside, flat[np.where(inside, first[:, None] + columns, 0)], 0))

    def examples(rows):
        first = base[owner[rows]] + start[rows]
        past = gather(first - reach[rows], reach[rows])
        return past, gather(first, stop[rows] - start[rows]), torch.from_numpy(users[owner[rows]])

    order = np.lexsort([rng.random(len(owner)), stop - start, reach])
    whole = batch_size * parts
    cut = np.split(order, range(whole, len(order), whole))
    for rows in (cut[i] for i in rng.permutation(len(cut))):
        if parts == 1:
            yield examples(rows)
        else:
            rows = np.resize(rows, max(len(rows), parts))  # every part needs a row
            yield [examples(rows[part::parts]) for part in range(parts)]


class Trainer:
    """One call of ``TIGER.fit``; the arguments are explained there."""

    def __init__(
        self, model, sequences, *, epochs, batch_size, lr, weight_decay, warmup, schedule, augment, precision, patience,
        validation, checkpoint, checkpoint_every, resume, progress,
    ):  # fmt: skip
        users = np.array([i for i, s in enumerate(sequences) if len(s)], dtype=np.int64)
        self.users, self.sequences = users, [model._checked(sequences[i]) for i in users]
        if not len(users) or epochs < 1 or batch_size < 1 or checkpoint_every < 1:
            raise ValueError(
                f"{len(users)} non-empty sequences, epochs {epochs}, batch_size {batch_size}, checkpoint_every "
                f"{checkpoint_every}; each must be at least 1"
            )
        if schedule not in SCHEDULES or precision not in PRECISIONS:
            raise ValueError(
                f"schedule {schedule!r} and precision {precision!r}; allowed: {', '.join(map(repr, SCHEDULES))} and "
                f"{', '.join(map(repr, PRECISIONS))}"
            )
        if not 0 < warmup < 1 or not lr > 0 or patience < 0:
            raise ValueError(
                f"warmup {warmup} must lie between 0 and 1, lr {lr} above 0 and patience {patience} not be below 0"
            )
        if patience and validation is None:
            raise ValueError(f"patience is {patience}, but there is no validation to tell which epoch is better")
        if resume and checkpoint is None:
            raise ValueError("resume needs the checkpoint folder to go on from")
        self.settings = {
            "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
            "warmup": warmup, "schedule": schedule, "augment": augment, "precision": precision,
        }  # fmt: skip
        self.model, self.patience, self.progress = model, patience, progress
        self.folder = None if checkpoint is None else Path(checkpoint)
        self.every, self.resume = checkpoint_every, resume
        self.judged = None if validation is None else drawn(validation, JUDGED, np.random.default_rng(model.seed))
        self.epoch, self.step, self.losses, self.seconds, self.best, self.waited = 0, 0, [], 0.0, -math.inf, 0
        self.best_state = None

    def run(self) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        theirs = bool(AcceleratorState._shared_state)  # the caller has an Accelerator of its own, which must live on
        distributed = torch.distributed.is_torchelastic_launched()
        self.accelerator = Accelerator(
            cpu=self.model.device.type == "cpu" and not (distributed and torch.accelerator.is_available()),
            mixed_precision=self.settings["precision"],
            device_placement=distributed,  # alone the model stays where it is
        )
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                self._go()
        finally:
            if not theirs:
                AcceleratorState._reset_state()  # the next training in this process may use another precision
        self.model.eval()

    def _go(self) -> None:
        model, s, accelerator = self.model, self.settings, self.accelerator
        groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == matrix]} for matrix in (True, False)]
        groups[1]["weight_decay"] = 0.0
        optimizer = torch.optim.AdamW(groups, lr=s["lr"], weight_decay=s["weight_decay"], fused=True)
        torch.manual_seed(model.seed + 1_000_003 * accelerator.process_index)  # dropout's; weights are the first's
        wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        model.history = []
        try:
            self._epochs(wrapped)
        finally:
            accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes its changes to forward away
        if self.best_state is not None:
            model.load_state_dict(self.best_state, strict=False)

    def _epochs(self, wrapped) -> None:
        model, s, accelerator = self.model, self.settings, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        if self.resume:
            self._restore()
        while self.epoch < s["epochs"] and not (self.patience and self.waited >= self.patience):
            model.train()
            rng = np.random.default_rng([model.seed, self.epoch])
            found = list(batches(model, self.sequences, self.users, s["batch_size"], rng, world, not s["augment"]))
            began = time.perf_counter() - self.seconds
            for step in range(self.step, len(found)):
                parts = [found[step]] if world == 1 else found[step]
                past, target, who = parts[rank]
                rate = schedule(s["schedule"], (self.epoch + (step + 0.5) / len(found)) / s["epochs"], s["warmup"])
                for group in self.optimizer.param_groups:
                    group["lr"] = s["lr"] * rate
                loss = wrapped(past.to(model.device), target.to(model.device), who)
                if world > 1:  # every target counts alike, in whichever process it is
                    loss = loss * (int((target > 0).sum()) * world / sum(int((part[1] > 0).sum()) for part in parts))
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.losses.append(self._finite(float(accelerator.reduce(loss.detach(), "mean"))))
                if self.progress:
                    self.progress((self.epoch + (step + 1) / len(found)) / s["epochs"], self.losses[-1])
                self.step = step + 1
                if self.folder and self.step % self.every == 0 and self.step < len(found):
                    self.seconds = time.perf_counter() - began
                    self._save()
            self._end_epoch(time.perf_counter() - began)

    def _end_epoch(self, seconds: float) -> None:
        model = self.model
        record = {"epoch": self.epoch + 1, "loss": float(np.mean(self.losses)), "seconds": seconds}
        model.eval()
        if self.judged is not None:
            record |= self._judge()
            self.waited += 1
            if record["validation_ndcg"] > self.best:
                self.best, self.waited = record["validation_ndcg"], 0
                self.best_state = {name: value.clone() for name, value in _own(model.state_dict()).items()}
        model.history.append(record)
        self.epoch, self.step, self.losses, self.seconds = self.epoch + 1, 0, [], 0.0
        if self.folder:
            self._save()

    def _judge(self) -> dict[str, float]:
        """Loss per code and NDCG@10 on the validation queries; every process takes its share of them."""
        rank, world, q = self.accelerator.process_index, self.accelerator.num_processes, self.judged
        rows, sums = range(rank, len(q.targets), world), np.zeros(2)
        if len(rows):
            histories, targets, users = [q.histories[i] for i in rows], q.targets[rank::world], q.users[rank::world]
            loss = -self.model.score(histories, targets, users=users).mean() / self.model.levels
            top, _ = self.model.recommend_batch(histories, 10, beams=JUDGED_BEAMS, users=users)
            sums = np.array([loss, metrics(top, targets)["NDCG@10"]]) * len(rows)
        total = torch.from_numpy(sums).to(self.model.device, torch.float32)
        loss, ndcg = (self.accelerator.reduce(total, "sum") / len(q.targets)).tolist()
        return {"validation_loss": loss, "validation_ndcg": ndcg}

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} in epoch {self.epoch + 1} at lr={self.settings['lr']}. Use a smaller one"
            )
        return loss

    # What a killed training goes on from.

    def _run(self) -> dict:
        """What a resumed training must share."""
        digest = hashlib.sha256(self.model.item_tokens.cpu().numpy().tobytes())
        for sequence in self.sequences:
            digest.update(sequence.tobytes() + b"\n")
        return {**self.settings, **self.model._config, "processes": self.accelerator.num_processes,
                "data": digest.hexdigest()[:16]}  # fmt: skip

    def _save(self) -> None:
        accelerator, cuda = self.accelerator, self.model.device.type == "cuda"
        random = {"cpu": self._gathered(torch.get_rng_state())}
        if cuda:
            random["cuda"] = self._gathered(torch.cuda.get_rng_state(self.model.device))
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
            numbers = {"run": self._run(), "history": self.model.history, "scaler": scaler}
            numbers |= {name: getattr(self, name) for name in PROGRESS}
            tensors = {"model": _own(self.model.state_dict()), "best": self.best_state or {},
                       "optimizer": optimizer_tensors(self.optimizer), "random": random}  # fmt: skip
            save_state(self.folder, tensors, numbers)
        accelerator.wait_for_everyone()

    def _gathered(self, state: Tensor) -> Tensor:
        """The generator's state of every process, [processes, bytes]."""
        return self.accelerator.gather(state.to(self.model.device).unsqueeze(0)).cpu()

    def _restore(self) -> None:
        state = load_state(self.folder)
        if state is None:
            return
        tensors, numbers = state
        mine, theirs = json.loads(json.dumps(self._run())), numbers["run"]
        differ = [f"{k}: {theirs.get(k)!r} then, {v!r} now" for k, v in mine.items() if theirs.get(k) != v]
        if differ:
            raise DataError(
                f"{self.folder} holds another training and cannot be resumed ({'; '.join(differ)}). Give the same data "
                "and settings, or another folder"
            )
        self.model.load_state_dict(tensors["model"], strict=False)  # what T5 calls by several names is there once
        self.best_state = tensors.get("best")
        restore_optimizer(self.optimizer, tensors["optimizer"])
        for name in PROGRESS:
            setattr(self, name, numbers[name])
        self.model.history = numbers["history"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])
        rank = self.accelerator.process_index
        torch.set_rng_state(tensors["random"]["cpu"][rank])
        if "cuda" in tensors["random"]:
            torch.cuda.set_rng_state(tensors["random"]["cuda"][rank], self.model.device)


PROGRESS = ("epoch", "step", "losses", "seconds", "best", "waited")


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every tensor under one name."""
    from .tiger import TIED

    return {name: value for name, value in state.items() if not name.endswith(TIED)}
