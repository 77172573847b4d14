"""A prior over image codes: a small GPT that says p(s_i | s_<i, condition), one code after the other, row by row (Esser
et al. 2021, arXiv 2012.09841)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.progress import progress_bar

try:
    from transformers import DynamicCache, GPT2Config, GPT2Model
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
except ImportError:
    raise ImportError("the prior is built on transformers. Run: pip install 'vqkernels[images]'") from None


class PriorOutput(NamedTuple):
    """``loss``: mean cross entropy in nats per code; ``logits`` [B, codes, K]."""

    loss: Tensor
    logits: Tensor


class Prior(nn.Module):
    """Codes [B, h, w], or [B, h, w, Q] of a residual quantizer, given a class, a text or nothing.

    ``codebook_size``: K. ``shape``: (h, w) or (h, w, Q); each of the Q levels has embeddings of its own. ``classes``:
    how many, for a class as the condition; ``text_dim``: features of a text's embedding, for a text as the condition;
    with neither there is none. ``width``, ``depth``, ``heads``: of the transformer. ``dropout``: in training.
    """

    def __init__(
        self,
        codebook_size: int,
        shape: tuple[int, ...],
        *,
        classes: int | None = None,
        text_dim: int | None = None,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        shape = tuple(shape)
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"Prior: shape={shape}; (h, w) or (h, w, levels) is needed, as VQVAE.encode gives codes")
        if classes is not None and text_dim is not None:
            raise ValueError("Prior: classes and text_dim exclude each other; a condition is a class or a text")
        if min(width, heads, depth) < 1 or width % heads:
            raise ValueError(
                f"Prior: width={width}, depth={depth}, heads={heads}; 1 or more each, and width a multiple of heads"
            )
        self.codebook_size, self.shape = codebook_size, shape
        self.classes, self.text_dim = classes, text_dim
        self.levels, self.codes = shape[2] if len(shape) == 3 else 1, torch.Size(shape).numel()
        self.condition = nn.Linear(text_dim, width) if text_dim else nn.Embedding(classes or 1, width)
        self.gpt = GPT2Model(
            GPT2Config(
                vocab_size=self.levels * codebook_size,
                n_positions=self.codes,
                n_embd=width,
                n_layer=depth,
                n_head=heads,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        if not text_dim:
            nn.init.normal_(self.condition.weight, 0.0, 0.02)

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> PriorOutput:
        """codes int64 [B, *shape]; condition int64 [B] (classes), float [B, text_dim] (texts) or None."""
        if tuple(codes.shape[1:]) != self.shape:
            raise ValueError(f"Prior: codes of shape {list(codes.shape)}; [B, {', '.join(map(str, self.shape))}] fits")
        flat = codes.flatten(1)
        tokens = self.gpt.wte(flat[:, :-1] + self._offset(flat.device)[: self.codes - 1])
        start = self._start(condition, len(flat), flat.device)
        hidden = self.gpt(inputs_embeds=torch.cat([start, tokens], 1), use_cache=False).last_hidden_state
        by_level = hidden.unflatten(1, (-1, self.levels))
        logits = torch.stack([self._logits(by_level[:, :, i], i) for i in range(self.levels)], 2).flatten(1, 2)
        return PriorOutput(nn.functional.cross_entropy(logits.flatten(0, 1), flat.flatten()), logits)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor | None = None,
        count: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        progress=None,
    ) -> Tensor:
        """Codes int64 [B, *shape], one per row of ``condition``, or ``count`` without a condition.

        ``temperature``: below 1 likelier codes, above 1 more varied ones. ``top_k``: draw from the k likeliest codes
        only; 0: all. ``top_p``: draw from the likeliest codes that together have this probability. ``seed`` decides the
        draws. ``progress`` as in ``progress_bar``. The keys and values of earlier codes are kept, not computed again.
        """
        if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature={temperature}, top_k={top_k}, top_p={top_p}; temperature > 0, top_k >= 0 (0: all codes) "
                "and 0 < top_p <= 1 are allowed. For the likeliest code alone use top_k=1"
            )
        device = self.gpt.wte.weight.device
        count = count if condition is None else len(condition)
        if count is None:
            raise ValueError("Prior.sample: give condition or count")
        warp = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k:
            warp.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warp.append(TopPLogitsWarper(float(top_p)))
        generator = torch.Generator(device).manual_seed(seed)
        training, offset = self.training, self._offset(device)
        self.eval()
        inputs, cache, drawn = self._start(condition, count, device), DynamicCache(), []
        with progress_bar(progress, "Sampling", self.codes) as advance:
            for place in range(self.codes):
                # the cache by its place: its name differs between versions of transformers
                out = self.gpt(None, cache, inputs_embeds=inputs, use_cache=True)
                scores = warp(None, self._logits(out.last_hidden_state[:, -1], place % self.levels).float())
                drawn.append(torch.multinomial(scores.softmax(-1), 1, generator=generator))
                inputs = self.gpt.wte(drawn[-1] + offset[place])
                advance()
        self.train(training)
        return torch.cat(drawn, 1).unflatten(1, self.shape)

    def _offset(self, device) -> Tensor:
        """Where in the embedding the codebook of each place begins, [codes]."""
        return torch.arange(self.codes, device=device) % self.levels * self.codebook_size

    def _start(self, condition: Tensor | None, count: int, device) -> Tensor:
        """[B, 1, width]: what the first code is predicted from."""
        if condition is None:
            if self.classes or self.text_dim:
                what = f"int64 [B], 0 to {self.classes - 1}" if self.classes else f"float [B, {self.text_dim}]"
                raise ValueError(f"Prior: condition is missing; this prior was made for one, {what}")
            condition = torch.zeros(count, dtype=torch.int64, device=device)
        return self.condition(condition.to(device)).unsqueeze(1)

    def _logits(self, hidden: Tensor, level: int) -> Tensor:
        low = level * self.codebook_size
        return hidden @ self.gpt.wte.weight[low : low + self.codebook_size].T
