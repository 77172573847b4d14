"""TIGER: a T5 encoder-decoder that writes the semantic ID of the next item, level by level.

Rajput et al. 2023, "Recommender Systems with Generative Retrieval" (arXiv 2305.05065).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.catalogue import DataError, write_atomic
from ..semantic_ids.trie import Trie
from . import beam

PAD, START = 0, 1
CONFIG, WEIGHTS = "tiger.json", "tiger.safetensors"
TIED = ("embed_tokens.weight", "lm_head.weight")  # further names of T5's only embedding


class TIGER(nn.Module):
    """Generative recommendation over semantic IDs.

    The encoder reads older items, the decoder continues the sequence: its window holds the latest ``window - 1`` items
    and then the item to predict, each as its codes. Training scores every item of the window at once, so that one
    encoder pass teaches ``window`` predictions; ``window=1`` is the paper's single target per encoder pass.

    Args:
        semantic_ids: integer codes ``[num_items, L]``, row = item id − 1, all rows different.
        codebook_sizes: how many codes each of the ``L`` levels has; by default what the codes need. Every level has
            its own token range and its own softmax. A level with one code says nothing and is left out.
        d_model, d_ff, heads, layers, dropout: the T5's sizes; ``layers`` in the encoder and as many in the decoder.
        max_history: how many of the latest items the model looks at, encoder and decoder window together.
        window: items in the decoder's window, from 1 to ``max_history``.
        user_bins: with a number above 0, users are hashed into so many tokens at the encoder's start (published
            ablations find no gain, so it is off).
        seed: fixes initial weights, batches and dropout. The same seed, machine, thread count and torch give the same
            model; across machines sums in another order make small differences.

    ``history`` holds one record per epoch of ``fit``.
    """

    def __init__(
        self,
        semantic_ids,
        codebook_sizes=None,
        *,
        d_model: int = 64,
        d_ff: int = 1024,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        max_history: int = 20,
        window: int = 10,
        user_bins: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        try:
            from transformers import T5Config, T5ForConditionalGeneration
        except ImportError:
            raise ImportError("TIGER is built on transformers. Run: pip install 'vqkernels[models]'") from None
        if not 1 <= window <= max_history:
            raise ValueError(f"window is {window}; it must lie between 1 and max_history = {max_history}")
        if d_model % heads:
            raise ValueError(f"d_model {d_model} is not a multiple of heads {heads}")
        ids = np.asarray(semantic_ids)
        Trie(ids, codebook_sizes)  # checks all levels, those that say nothing too
        sizes = ids.max(0) + 1 if codebook_sizes is None else np.asarray(codebook_sizes)
        told = sizes > 1
        told[0] |= not told.any()
        self.trie = Trie(ids[:, told], sizes[told])
        self.levels, self.num_items, self.codebook_sizes = (
            self.trie.depth,
            self.trie.num_items,
            self.trie.codebook_sizes,
        )
        self.max_history, self.window, self.user_bins, self.seed = max_history, window, user_bins, seed
        self.history: list[dict] = []
        self._config = {"d_model": d_model, "d_ff": d_ff, "heads": heads, "layers": layers, "dropout": dropout,
                        "max_history": max_history, "window": window, "user_bins": user_bins, "seed": seed}  # fmt: skip

        offsets = np.cumsum([START + 1 + user_bins, *self.codebook_sizes])
        self.level_ranges = [(int(a), int(b)) for a, b in itertools.pairwise(offsets)]
        tokens = np.full((self.num_items + 1, self.levels), PAD, dtype=np.int64)  # row 0 is padding
        tokens[1:] = ids[:, told] + offsets[:-1]
        self.register_buffer("item_tokens", torch.from_numpy(tokens), persistent=False)
        config = T5Config(
            vocab_size=int(offsets[-1]),
            d_model=d_model,
            d_kv=d_model // heads,
            d_ff=d_ff,
            num_heads=heads,
            num_layers=layers,
            num_decoder_layers=layers,
            dropout_rate=dropout,
            pad_token_id=PAD,
            decoder_start_token_id=START,
            eos_token_id=None,  # every ID has L codes: there is nothing to stop
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.t5 = T5ForConditionalGeneration(config)
        self.eval()

    @property
    def device(self):
        return self.item_tokens.device

    def _apply(self, fn, *args, **kwargs):  # .to(device) takes the trie along
        super()._apply(fn, *args, **kwargs)
        self.trie.to(self.device)
        return self

    # Tokens in, logits out.

    def _source(self, items: Tensor, users: Tensor | None) -> Tensor:
        """Items ``[B, T]`` (0 = padding) → the encoder's tokens ``[B, 1 + T·L]``."""
        first = torch.full((len(items), 1), START, device=self.device)
        if self.user_bins and users is not None:
            first[:, 0] = START + 1 + users.to(self.device) * 2654435761 % (1 << 32) % self.user_bins
        return torch.cat([first, self.item_tokens[items].flatten(1)], 1)

    def _start(self, rows: int) -> Tensor:
        return torch.full((rows, 1), START, device=self.device)

    def context(self, histories: list[np.ndarray], users: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encoder tokens and the decoder's first tokens; histories must fill the window equally far."""
        inside = min(len(histories[0]), self.window - 1)
        reach = self.max_history - (self.window - 1)
        past = [h[max(0, len(h) - inside - reach) : len(h) - inside] for h in histories]
        padded = np.zeros((len(past), max(map(len, past))), dtype=np.int64)
        for row, items in enumerate(past):
            padded[row, : len(items)] = items
        recent = torch.from_numpy(np.stack([h[len(h) - inside :] for h in histories])).to(self.device)
        tokens = torch.cat([self._start(len(histories)), self.item_tokens[recent].flatten(1)], 1)
        return self._source(torch.from_numpy(padded).to(self.device), users), tokens

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Decoder states ``[..., d_model]`` → logits ``[..., codebook_sizes[level]]``."""
        low, high = self.level_ranges[level]
        return hidden @ (self.t5.shared.weight[low:high].T * self.t5.config.d_model**-0.5)  # T5's tied, scaled output

    def _decode(self, source: Tensor, tokens: Tensor) -> Tensor:
        mask = (source != PAD).long()
        encoded = self.t5.encoder(input_ids=source, attention_mask=mask).last_hidden_state
        return self.t5.decoder(
            input_ids=tokens, encoder_hidden_states=encoded, encoder_attention_mask=mask, use_cache=False
        ).last_hidden_state

    def _states(self, past: Tensor, target: Tensor, users: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of items past ``[B, T]`` and target ``[B, window]``, 0 = padding: what the decoder knows before each code of
        the ``n`` real targets, ``[n, levels, d_model]``, and the targets, ``[n]``."""
        labels = self.item_tokens[target].flatten(1)
        hidden = self._decode(self._source(past, users), torch.cat([self._start(len(target)), labels[:, :-1]], 1))
        real = target > 0
        return hidden.unflatten(1, (-1, self.levels))[real], target[real]

    def _code_loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy per code of what ``_states`` returns."""
        codes = self.item_tokens[target]
        losses = [
            nn.functional.cross_entropy(self.level_logits(hidden[:, level], level).float(), codes[:, level] - low)
            for level, (low, _) in enumerate(self.level_ranges)
        ]
        return torch.stack(losses).mean()

    def forward(self, past: Tensor, target: Tensor, users: Tensor | None = None) -> Tensor:
        """The loss of a batch: items past ``[B, T]`` and target ``[B, window]``, 0 = padding behind."""
        return self._code_loss(*self._states(past, target, users))

    # Training.

    def fit(
        self,
        sequences,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: str = "cosine",
        augment: bool = True,
        precision: str = "no",
        validation=None,
        patience: int = 0,
        checkpoint=None,
        checkpoint_every: int = 1000,
        resume: bool = False,
        progress=None,
    ) -> TIGER:
        """Trains on sequences (item ids from 1, oldest first) with AdamW.

        Started by torchrun, each process trains on its part of every batch, and all end with the same model.

        Args:
            epochs: each shows every item of every sequence once as a target.
            batch_size: decoder windows per step and process.
            warmup: the share of all steps during which the learning rate rises.
            schedule: what follows: "cosine", down to 0, or "inverse-sqrt" of the steps, as T5 was trained.
            augment: False takes the latest window of each sequence only (with ``window=1`` its last item), in place of
                every item in turn.
            precision: "no" (float32), "bf16" or "fp16" for the products of training; weights and decoding stay float32.
            validation: ``Queries``, up to 2,000 of which, drawn by the seed, judge every epoch; the weights of the
                epoch with the best NDCG@10 are kept.
            patience: epochs without a better one after which training stops; 0: never.
            checkpoint: a folder for all state, written every ``checkpoint_every`` steps and after each epoch.
            resume: go on from what ``checkpoint`` holds, to the same model as without the interruption; begin where it
                holds nothing. DataError when it is of another training.
            progress: called as ``progress(share_done, loss)`` after each step.

        Returns:
            self, in eval mode. ``history`` has epoch, loss (mean cross entropy per code), seconds, and with
            ``validation`` validation_loss and validation_ndcg.

        FloatingPointError when the loss is no longer finite.
        """
        from .training import Trainer

        Trainer(
            self, sequences, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup=warmup,
            schedule=schedule, augment=augment, precision=precision, validation=validation, patience=patience,
            checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume, progress=progress,
        ).run()  # fmt: skip
        return self

    # Recommending.

    def recommend(self, history, k: int = 10, **options) -> tuple[list[int], list[float]]:
        """The next items after one history: ids and log-probabilities, best first, at most ``k``.

        Options as in :meth:`recommend_batch`. Free beams that are no item's ID are left out.
        """
        items, scores = self.recommend_batch([history], k, **options)
        found = items[0] > 0
        return items[0][found].tolist(), scores[0][found].tolist()

    @torch.inference_mode()
    def recommend_batch(
        self,
        histories,
        k: int = 10,
        *,
        beams: int = 50,
        constrained: bool = True,
        exclude_seen: bool = True,
        allow=None,
        deny=None,
        users=None,
        batch_size: int = 64,
        progress=None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Beam search for many histories.

        Args:
            histories: item ids from 1, oldest first; may be empty.
            k: items per history, at most ``beams``.
            beams: partial IDs kept at each level.
            constrained: walk the trie of valid IDs only; otherwise the search is free and returns 0 for each beam that
                is no item's ID.
            exclude_seen: never return an item of the history. Exact: prefixes whose items were all seen give
                their place to others. A free search ignores it, and the two below.
            allow, deny: items that may be returned (in stock, fresh, ...) and that may not: ids, or a bool mask
                ``[num_items]`` in the order of the ids, for all histories; or a list of lists of ids, one for each.
                Exact like ``exclude_seen``.
            users: numbers of the users, for models with ``user_bins``.
            progress: called as ``progress(share_done)`` after each batch of ``batch_size`` histories.

        Returns:
            items int64 ``[B, k]``, 0 = none, and log-probabilities float32 ``[B, k]``, best first.
        """
        if not 1 <= k <= beams:
            raise ValueError(f"k is {k} and beams is {beams}; k must lie between 1 and beams")
        histories = [self._checked(h) for h in histories]
        items = np.zeros((len(histories), k), dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        done, trie = 0, self.trie
        allow, deny = (self._listed(n, x, len(histories)) for n, x in (("allow", allow), ("deny", deny)))
        if isinstance(allow, Tensor):
            trie, allow = trie.allow(allow), None
        if isinstance(deny, Tensor):
            trie, deny = trie.deny(deny), None
        closed = [h - 1 if exclude_seen else h[:0] for h in histories]
        if deny is not None:
            closed = [np.concatenate(lists) for lists in zip(closed, deny, strict=True)]
        for rows, group, who in self._groups(histories, users, batch_size):
            view = None
            if constrained:
                view = beam.view(trie, allow and [allow[i] for i in rows], [closed[i] for i in rows])
            found, score, _ = beam.search(self, group, beams, view, who)
            items[rows], scores[rows] = found[:, :k].cpu().numpy(), score[:, :k].cpu().numpy()
            done += len(rows)
            if progress:
                progress(done / len(histories))
        return items, scores

    @torch.inference_mode()
    def score(self, histories, items, *, users=None, batch_size: int = 256) -> np.ndarray:
        """Log-probability of one item after each history, float32 ``[B]``: what beam search adds up, directly."""
        histories, items = [self._checked(h) for h in histories], self._checked(items)
        out = np.empty(len(histories), dtype=np.float32)
        for rows, group, who in self._groups(histories, users, batch_size):
            source, tokens = self.context(group, who)
            codes = self.item_tokens[torch.from_numpy(items[rows]).to(self.device)]
            hidden = self._decode(source, torch.cat([tokens, codes[:, :-1]], 1))[:, -self.levels :]
            total = 0.0
            for level, (low, _) in enumerate(self.level_ranges):
                logp = self.level_logits(hidden[:, level], level).float().log_softmax(-1)
                total = total + logp.gather(1, codes[:, level, None] - low)[:, 0]
            out[rows] = total.cpu().numpy()
        return out

    def invalid_rate(self, histories, *, beams: int = 10, **options) -> float:
        """The share of freely searched beams (all ``beams`` of each history) that are no item's semantic ID."""
        return self.invalid_rates(histories, (beams,), **options)[beams][-1]

    @torch.inference_mode()
    def invalid_rates(
        self, histories, beams=(1, 10, 20, 50), *, users=None, batch_size: int = 64, progress=None
    ) -> dict[int, list[float]]:
        """``{beam width: [share of free beams that lead to no item after 1, 2, ... L codes]}``."""
        histories, table = [self._checked(h) for h in histories], {}
        for place, width in enumerate(beams):
            shares, done = [], 0
            for rows, group, who in self._groups(histories, users, batch_size):
                shares.append(beam.search(self, group, width, None, who)[2])
                done += len(rows)
                if progress:
                    progress((place + done / len(histories)) / len(beams))
            table[width] = torch.cat(shares).mean(0).tolist()
        return table

    def _groups(self, histories, users, batch_size):
        """Batches of histories that fill the decoder's window equally far, like lengths together."""
        lengths = np.array([len(h) for h in histories], dtype=np.int64)
        inside = np.minimum(lengths, self.window - 1)
        order = np.lexsort([lengths, inside])
        for group in np.split(order, np.flatnonzero(np.diff(inside[order])) + 1):
            for rows in np.split(group, range(batch_size, len(group), batch_size)):
                if len(rows):
                    who = None if users is None else torch.as_tensor(np.asarray(users)[rows])
                    yield rows, [histories[i] for i in rows], who

    def _listed(self, name: str, items, histories: int):
        """Item ids as rows of the trie: one tensor for all histories (or the mask as it is), or a list for each."""
        if items is None:
            return None
        if beam.per_history(items):
            if len(items) != histories:
                raise ValueError(f"{name} has {len(items)} lists for {histories} histories; give one list or one each")
            return [self._checked(ids) - 1 for ids in items]
        mask = torch.as_tensor(items)
        return mask if mask.dtype == torch.bool else torch.from_numpy(self._checked(items) - 1)

    def _checked(self, items) -> np.ndarray:
        items = np.asarray(items)
        if items.ndim != 1 or (items.size and not np.issubdtype(items.dtype, np.integer)):
            raise ValueError(f"items are {items.dtype} of shape {list(items.shape)}; give one list of whole numbers")
        items = items.astype(np.int64)
        bad = (items < 1) | (items > self.num_items)
        if bad.any():
            raise ValueError(f"unknown item {items[bad][0]}; item ids run from 1 to {self.num_items}")
        return items

    # Files.

    GIVEN: tuple[str, ...] = ()  # the constructor's arrays between semantic_ids and codebook_sizes

    def _given(self) -> dict[str, Tensor]:
        return {}

    def save(self, path) -> Path:
        """Writes ``tiger.json`` and ``tiger.safetensors`` into a folder, each whole or not at all."""
        from safetensors.torch import save

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        ids = self.item_tokens[1:].cpu() - torch.tensor([low for low, _ in self.level_ranges])
        state = {name: value.cpu().contiguous() for name, value in self.state_dict().items() if not name.endswith(TIED)}
        write_atomic(folder / WEIGHTS, save({"semantic_ids": ids.contiguous(), **self._given(), **state}))
        config = {
            "format": 1,
            "codebook_sizes": self.codebook_sizes,
            "arguments": self._config,
            "history": self.history,
        }
        write_atomic(folder / CONFIG, json.dumps(config, indent=1).encode())
        return folder

    @classmethod
    def load(cls, path) -> TIGER:
        """Reads what ``save`` wrote. DataError when a file is missing or damaged."""
        from safetensors.torch import load

        folder = Path(path)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder}: {' and '.join(missing)} missing. Give the folder that TIGER.save() wrote")
        try:
            config = json.loads((folder / CONFIG).read_bytes())
            state = load((folder / WEIGHTS).read_bytes())
            given = {name: state.pop(name).numpy() for name in cls.GIVEN}
            model = cls(
                state.pop("semantic_ids").numpy(), *given.values(), config["codebook_sizes"], **config["arguments"]
            )
            lost = model.load_state_dict(state, strict=False)
            wrong = [name for name in lost.missing_keys if not name.endswith(TIED)]
            if wrong or lost.unexpected_keys:
                raise KeyError(f"tensors missing: {wrong}, unknown: {lost.unexpected_keys}")
            model.history = config["history"]
        except Exception as error:  # safetensors raises its own class for damaged files
            raise DataError(
                f"{folder}: not a whole saved {cls.__name__} model ({error!r}). Train and save it again"
            ) from None
        return model
