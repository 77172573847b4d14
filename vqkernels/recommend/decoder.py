"""The T5 decoder as beam search runs it: what the beams of one history share is held and read once."""

from __future__ import annotations

import torch
from torch import Tensor


class BeamDecoder:
    """Decoder states of many beams of many histories.

    The beams of a history are queries of one attention over the encoder's states and over the tokens they all begin
    with; beside it each looks at the few codes of its own. Nothing that is shared is repeated or moved when beams
    multiply or change places, which transformers' cache, a row per beam, must do. The modules are T5's own, in
    evaluation; dropout has no part in it.

    Args:
        decoder: the ``decoder`` of a T5ForConditionalGeneration.
        encoded, mask: the encoder's last states ``[B, S, d_model]``; 0 where a position is padding, ``[B, S]``.
        tokens: with what all beams of a history begin, ``[B, n]``.
        steps: how many codes a beam may get.

    ``states`` are those behind the last of ``tokens``, ``[B, 1, d_model]``; ``step`` returns the next ones.
    """

    def __init__(self, decoder, encoded: Tensor, mask: Tensor, tokens: Tensor, steps: int):
        self.decoder, self.length, self.done = decoder, tokens.shape[1], 0
        whole = self.length + steps
        self.bias = decoder.block[0].layer[0].SelfAttention.compute_bias(whole, whole)  # [1, heads, query, key]
        self.padding = torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, -torch.inf)[:, None, None]
        self.shared, self.own = [], []
        future = torch.full((self.length, self.length), -torch.inf, device=mask.device).triu(1)
        bias = self.bias[..., : self.length, : self.length] + future
        hidden = decoder.embed_tokens(tokens)
        for block in decoder.block:
            attention, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
            normed = block.layer[0].layer_norm(hidden)
            self.shared.append((*_keys(attention, normed), *_keys(cross, encoded)))
            keys, values = self.shared[-1][:2]
            if block is decoder.block[-1]:  # of the last block nobody asks for more than the last position
                normed, hidden, bias = normed[:, -1:], hidden[:, -1:], bias[..., -1:, :]
            weights = (_heads(attention, attention.q(normed)) @ keys.mT + bias).softmax(-1)
            hidden = hidden + _joined(attention, weights @ values)
            hidden = self._rest(block, hidden, *self.shared[-1][2:])
        self.states = decoder.final_layer_norm(hidden)

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """The states of beams that each got a code more.

        Args:
            tokens: that code, ``[B, beams]``.
            parents: the beam of the last step that it continues, ``[B, beams]``.
        """
        at, start = self.length + self.done, self.length
        hidden = self.decoder.embed_tokens(tokens)
        chosen = parents[:, None, :, None, None]
        before, self.own = self.own, []
        for place, (block, (keys, values, *encoded)) in enumerate(zip(self.decoder.block, self.shared, strict=True)):
            attention = block.layer[0].SelfAttention
            normed = block.layer[0].layer_norm(hidden)
            own = [x.unsqueeze(-2) for x in _keys(attention, normed)]  # [B, heads, beams, codes, d_kv]
            if before:
                own = [
                    torch.cat([old.gather(2, chosen.expand(-1, old.shape[1], -1, *old.shape[3:])), new], -2)
                    for old, new in zip(before[place], own, strict=True)
                ]
            self.own.append(own)
            query = _heads(attention, attention.q(normed))
            scores = [query @ keys.mT + self.bias[..., at, None, :start]]
            scores.append((own[0] @ query.unsqueeze(-1)).squeeze(-1) + self.bias[..., at, None, start : at + 1])
            weights = torch.cat(scores, -1).softmax(-1)
            mine = (weights[..., None, start:] @ own[1]).squeeze(-2)
            hidden = hidden + _joined(attention, weights[..., :start] @ values + mine)
            hidden = self._rest(block, hidden, *encoded)
        self.done += 1
        return self.decoder.final_layer_norm(hidden)

    def _rest(self, block, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A block behind its self-attention."""
        attention = block.layer[1].EncDecAttention
        query = _heads(attention, attention.q(block.layer[1].layer_norm(hidden)))
        weights = (query @ keys.mT + self.padding).softmax(-1)  # T5 does not scale its scores
        return block.layer[2](hidden + _joined(attention, weights @ values))


def _heads(attention, x: Tensor) -> Tensor:
    """``[B, n, heads * d_kv]`` → ``[B, heads, n, d_kv]``"""
    return x.unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)


def _keys(attention, x: Tensor) -> tuple[Tensor, Tensor]:
    return _heads(attention, attention.k(x)).contiguous(), _heads(attention, attention.v(x)).contiguous()


def _joined(attention, x: Tensor) -> Tensor:
    return attention.o(x.transpose(1, 2).flatten(2))
