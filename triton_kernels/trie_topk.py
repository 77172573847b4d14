"""trie_topk: one step of constrained beam search: log-softmax over V tokens, mask to the children of each beam's trie
node, the k best of all beams of a user. logp = (x - max) - log(sum exp(x - max)), total = score + logp.

    program (b, w):  logits[b,w,:] --max, sum of exp--> logp of the node's children --sort--> k best of the beam
    program b:       the lists of the W beams --merge--> scores, beams, tokens, states of user b

    A candidate is one int64: the total's bits in ascending order above, the bits of ~(w V + slot) below, so the largest
    is the highest total, of equals the lowest beam, then the lowest token; slot counts the node's children. A sorted
    list and the reversed other one have the k best of both in their elementwise maximum.

float64 totals do not fit there: one program a user finds the best, the second best, ... in k passes over the children.
So it does for k > MAX_K and where W V needs more than 32 bits.

Work and bytes: logits read once (the children's again, from the caches), 4 flops a logit: memory bound.
Numerics: exp to about 2 units in the last place, sums in float32, one log a beam in float64. NaN logits make their beam
NaN, and NaN totals come first, as in torch.sort. Determinism: fixed order of sums.
States outside the trie count as dead and tokens outside the logits as no children: the host would have to wait for the
device to report one.
Run in Triton's interpreter only; tuning is open.
"""

import torch
import triton
import triton.language as tl

from .exponential import exp_negative
from .inductor import visible
from .tuning import config

MAX_K = 1024  # beams whose candidates are sorted in registers


@triton.jit
def _exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return exp_negative(x)


@triton.jit
def _normaliser(logits, V, BLOCK: tl.constexpr, T: tl.constexpr):
    """max and log(sum exp(x - max)) of one row; every lane keeps a maximum and a sum of its own until the end."""
    top = tl.full([BLOCK], float("-inf"), T)
    total = tl.zeros([BLOCK], T)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(T)
        higher = tl.maximum(top, x)
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        total = total * _exp(top - origin) + _exp(x - origin)
        top = higher
    highest = tl.max(top, 0)
    total = tl.sum(total * _exp(top - highest), 0)
    return highest, tl.log(total.to(tl.float64)).to(T)


@triton.jit
def _children(row_offsets, state, S):
    """First and last edge of a node; none where there is no such node."""
    live = (state >= 0) & (state < S)
    node = tl.where(live, state, 0)
    first = tl.load(row_offsets + node, mask=live, other=0)
    return first, tl.load(row_offsets + node + 1, mask=live, other=0)


@triton.jit
def _totals(logits, edge_tokens, score, highest, log_sum, edge, last, V, T: tl.constexpr):
    """Totals of the children at ``edge``, -inf where there is none."""
    inside = edge < last
    token = tl.load(edge_tokens + edge, mask=inside, other=-1)
    inside = inside & (token >= 0) & (token < V)
    x = tl.load(logits + token, mask=inside, other=0.0).to(T)
    total = score + ((x - highest) - log_sum)
    return tl.where(inside, total, float("-inf"))


@triton.jit
def _beam_kernel(
    logits, scores, states, row_offsets, edge_tokens, lists, W, V, S, BLOCK: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    lowest = tl.full([KEEP], -0x8000000000000000, tl.int64)  # below every candidate
    best = lowest
    first, last = _children(row_offsets, tl.load(states + row), S)
    if first < last:
        highest, log_sum = _normaliser(logits, V, BLOCK, tl.float32)
        score = tl.load(scores + row).to(tl.float32)
        for start in range(first, last, KEEP):
            edge = start + tl.arange(0, KEEP)
            total = _totals(logits, edge_tokens, score, highest, log_sum, edge, last, V, tl.float32) + 0.0  # no -0
            bits = tl.where(total == total, total.to(tl.int32, bitcast=True), 0x7FC00000)  # one NaN
            ascending = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
            place = (row % W) * V + (edge - first)
            key = tl.where(total == float("-inf"), lowest, (ascending << 32) | (0xFFFFFFFF - place))
            if tl.max(key, 0) > tl.min(best, 0):
                best = tl.sort(tl.maximum(best, tl.sort(key)), descending=True)
    tl.store(lists + row * KEEP + tl.arange(0, KEEP), best)


@triton.jit
def _store(out_scores, out_beams, out_tokens, out_states, at, inside, total, beam, token, child):
    tl.store(out_scores + at, total, mask=inside)
    tl.store(out_beams + at, beam, mask=inside)
    tl.store(out_tokens + at, token, mask=inside)
    tl.store(out_states + at, child, mask=inside)


@triton.jit
def _merge_kernel(
    lists, states, row_offsets, edge_tokens, edge_children, out_scores, out_beams, out_tokens, out_states, W, V, K,
    KEEP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, KEEP)
    best = tl.load(lists + b * W * KEEP + i)
    for w in range(1, W):
        key = tl.load(lists + (b * W + w) * KEEP + (KEEP - 1 - i))
        if tl.max(key, 0) > tl.min(best, 0):
            best = tl.sort(tl.maximum(best, key), descending=True)
    dead = best == -0x8000000000000000
    place = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    beam = tl.where(dead, -1, place // V)
    state = tl.load(states + b * W + beam, mask=~dead, other=0)
    edge = tl.load(row_offsets + state, mask=~dead, other=0) + place % V
    token = tl.load(edge_tokens + edge, mask=~dead, other=-1)
    child = tl.load(edge_children + edge, mask=~dead, other=-1)
    bits = (best >> 32).to(tl.int32)
    total = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    total = tl.where(dead, float("-inf"), total)
    _store(out_scores, out_beams, out_tokens, out_states, b * K + i, i < K, total, beam, token, child)


@triton.jit
def _normaliser_kernel(logits, normalisers, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    highest, log_sum = _normaliser(logits + row * V, V, BLOCK, normalisers.dtype.element_ty)
    tl.store(normalisers + 2 * row, highest)
    tl.store(normalisers + 2 * row + 1, log_sum)


@triton.jit
def _pass_kernel(
    logits, normalisers, scores, states, row_offsets, edge_tokens, edge_children,
    out_scores, out_beams, out_tokens, out_states, W, V, S, K, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    T: tl.constexpr = normalisers.dtype.element_ty
    end = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)  # after every place
    previous, previous_at = tl.full([], float("nan"), T), tl.full([], -1, tl.int64)
    for i in range(K):
        # next of the candidates after (previous, previous_at): NaN first, then by total, then by place w V + slot
        best, best_at = tl.full([], float("-inf"), T), end
        for w in range(W):
            row = b * W + w
            first, last = _children(row_offsets, tl.load(states + row), S)
            score = tl.load(scores + row).to(T)
            highest, log_sum = tl.load(normalisers + 2 * row), tl.load(normalisers + 2 * row + 1)
            for start in range(first, last, BLOCK):
                edge = start + tl.arange(0, BLOCK)
                total = _totals(logits + row * V, edge_tokens, score, highest, log_sum, edge, last, V, T)
                at = w * V + (edge - first)
                later = at > previous_at
                nan = (total != total) & (previous != previous) & later
                first_nan = tl.min(tl.where(nan, at, end), 0)
                after = (previous != previous) | (total < previous) | ((total == previous) & later)
                after = after & (total > float("-inf"))
                most = tl.max(tl.where(after, total, float("-inf")), 0)
                most_at = tl.min(tl.where(after & (total == most), at, end), 0)
                if first_nan < end:
                    if best == best:
                        best, best_at = tl.full([], float("nan"), T), first_nan
                elif most > best:
                    best, best_at = most, most_at
        dead = best_at == end
        place = tl.where(dead, 0, best_at)
        beam = place // V
        edge = tl.load(row_offsets + tl.load(states + b * W + beam, mask=~dead, other=0), mask=~dead, other=0)
        edge += place % V
        token = tl.load(edge_tokens + edge, mask=~dead, other=-1)
        child = tl.load(edge_children + edge, mask=~dead, other=-1)
        beam = tl.where(dead, -1, beam)
        _store(out_scores, out_beams, out_tokens, out_states, b * K + i, True, best, beam, token, child)
        previous, previous_at = best, best_at


def trie_topk(
    logits: torch.Tensor,
    scores: torch.Tensor,
    states: torch.Tensor,
    row_offsets: torch.Tensor,
    edge_tokens: torch.Tensor,
    edge_children: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [B,W,V], scores [B,W], states [B,W] -> scores, beams, tokens, states, each [B,k]."""
    logits, scores, states = logits.contiguous(), scores.contiguous(), states.contiguous()
    trie = row_offsets.contiguous(), edge_tokens.contiguous(), edge_children.contiguous()
    B, W, V = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = [torch.full((B, k), float("-inf"), dtype=dtype, device=logits.device)]
    out += [torch.full((B, k), -1, dtype=torch.int64, device=logits.device) for _ in range(3)]
    if B and W and V:
        S = row_offsets.shape[0] - 1
        tuned = dict(config("trie_topk", "*"))
        block = min(tuned.pop("BLOCK"), max(32, triton.next_power_of_2(V)))
        if dtype == torch.float32 and k <= MAX_K and W * V < 2**32:
            keep = max(16, triton.next_power_of_2(k))
            lists = torch.empty(B * W, keep, dtype=torch.int64, device=logits.device)
            visible(_beam_kernel)[B * W,](logits, scores, states, *trie[:2], lists, W, V, S, block, keep, **tuned)
            visible(_merge_kernel)[B,](lists, states, *trie, *out, W, V, k, keep, **tuned)
        else:
            normalisers = torch.empty(B * W, 2, dtype=dtype, device=logits.device)
            visible(_normaliser_kernel)[B * W,](logits, normalisers, V, block, **tuned)
            visible(_pass_kernel)[B,](logits, normalisers, scores, states, *trie, *out, W, V, S, k, block, **tuned)
    return tuple(out)
