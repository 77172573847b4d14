"""Training throughput of TIGER: this project's ``TIGER.fit``, and the same T5 under the transformers ``Trainer``.

python bench/tiger.py [--data FOLDER] [--targets 9600] [--batch 64] [--windows 1,10] [--threads 1]

Both get the same sequences (MovieLens-100k without --data), IDs (random, 3 x 256 and the digit: what they say does not
change the speed), sizes, batch size, AdamW and cosine schedule. The Trainer's data set has one example for each target
item, the 20 items before it as tokens, and its collator pads to the longest example of a batch; with ``--window 1``
TIGER does the same work. A wider window teaches so many targets by one encoder pass. Two epochs, of which the second is
measured: processor time for each target item. "loss": mean cross entropy per code, over the level's own codes, of each
test user's last item after both epochs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from vqkernels.data import load_folder, movielens100k
from vqkernels.info import machine
from vqkernels.recommend import TIGER
from vqkernels.semantic_ids import add_digit

LR, WEIGHT_DECAY, WARMUP = 3e-3, 0.01, 0.05


def second_half(times: list[float]) -> float:
    """Seconds of the second of two epochs, from the processor times at the ends of all steps."""
    return times[-1] - times[len(times) // 2 - 1]


def tiger(ids: np.ndarray, sequences, batch: int, window: int) -> tuple[TIGER, float]:
    model, times = TIGER(ids, window=window), []
    model.fit(
        sequences,
        epochs=2,
        batch_size=batch,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        warmup=WARMUP,
        progress=lambda *_: times.append(time.process_time()),
    )
    return model, second_half(times)


class Examples(torch.utils.data.Dataset):
    """One example a target item: the tokens of at most 20 items before it, and its own."""

    def __init__(self, tokens: torch.Tensor, start: int, sequences):
        self.tokens, self.start, self.sequences = tokens, start, sequences
        self.places = [(i, j) for i, sequence in enumerate(sequences) for j in range(len(sequence))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        i, j = self.places[index]
        past = self.tokens[self.sequences[i][max(0, j - 20) : j]].flatten()
        return {
            "input_ids": torch.cat([past.new_tensor([self.start]), past]),
            "labels": self.tokens[self.sequences[i][j]],
        }


def collate(examples: list[dict]) -> dict:
    tokens = torch.nn.utils.rnn.pad_sequence([example["input_ids"] for example in examples], batch_first=True)
    labels = torch.stack([example["labels"] for example in examples])
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": labels}


def trainer(ids: np.ndarray, sequences, batch: int) -> tuple[TIGER, float]:
    model, times = TIGER(ids, window=1), []  # for its T5, tokens and score; Trainer trains the T5

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=batch,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARMUP * 2 * sum(map(len, sequences)) / batch),
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        examples = Examples(model.item_tokens, model.t5.config.decoder_start_token_id, sequences)
        callbacks = [Clock()]
        Trainer(model.t5, arguments, data_collator=collate, train_dataset=examples, callbacks=callbacks).train()
    return model.eval(), second_half(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data folder; by default MovieLens-100k")
    parser.add_argument("--windows", default="1,10", help="of TIGER, one run each")
    for name, default in (("targets", 9600), ("batch", 64), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    catalogue = load_folder(args.data) if args.data else movielens100k()
    ids = add_digit(np.random.default_rng(0).integers(256, size=(catalogue.num_items, 3)))
    users = np.random.default_rng(0).permutation(len(catalogue.sequences))
    everything = [np.asarray(catalogue.sequences[user]) for user in users]
    count = int(np.searchsorted(np.cumsum([len(sequence) for sequence in everything]), args.targets)) + 1
    sequences, tests = everything[:count], everything[-500:]
    targets = sum(map(len, sequences))
    size = f"{count:,} users, {targets:,} targets, batch {args.batch}, {args.threads} threads"
    print(f"{catalogue.name}: {size}; {machine()}")

    def told(name: str, model: TIGER, seconds: float) -> float:
        score = model.score([test[:-1] for test in tests], np.array([test[-1] for test in tests]))
        loss = -float(np.mean(score)) / model.levels
        print(f"{name}: {targets / seconds:,.0f} targets a second, loss {loss:.3f}", flush=True)
        return targets / seconds

    theirs = told("transformers Trainer", *trainer(ids, sequences, args.batch))
    for window in map(int, args.windows.split(",")):
        # a step of a wider window holds more targets: fewer windows make it as many
        ours = told(f"TIGER, window {window}", *tiger(ids, sequences, max(1, args.batch // window), window))
        print(f"window {window}: {ours / theirs:.2f} times as fast")


if __name__ == "__main__":
    main()
