"""The trie against sets of prefixes, and one beam step against brute force."""

import itertools

import numpy as np
import pytest
import torch

import vqkernels as vq
from vqkernels.semantic_ids.trie import Trie


def some_ids(count=60, levels=3, size=6, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.unique(rng.integers(0, size, (count, levels)), axis=0)
    return rng.permutation(ids)


@pytest.mark.parametrize("levels,size", [(1, 50), (2, 8), (3, 6), (4, 3)])
def test_every_code_sequence_is_looked_up_right(levels, size):
    ids = some_ids(levels=levels, size=size)
    trie = Trie(ids)
    rows = {tuple(code): row for row, code in enumerate(ids.tolist())}
    every = torch.tensor(list(itertools.product(range(size), repeat=levels)))
    assert trie.lookup(every).tolist() == [rows.get(tuple(code), -1) for code in every.tolist()]
    assert trie.num_items == len(ids) and trie.depth == levels
    prefixes = {tuple(code[:n]) for code in ids.tolist() for n in range(levels + 1)}
    assert trie.num_nodes == len(prefixes)


def test_children_are_ascending_and_leaves_have_none():
    trie = Trie(some_ids())
    for node in range(trie.num_nodes):
        first, last = trie.row_offsets[node], trie.row_offsets[node + 1]
        tokens = trie.edge_tokens[first:last].tolist()
        assert tokens == sorted(set(tokens))
        leaf = trie.items(torch.tensor(node)) >= 0
        assert (last == first) == bool(leaf)
    assert sorted(trie.items(torch.arange(trie.num_nodes)).tolist())[-trie.num_items :] == list(range(trie.num_items))


def test_walking_off_the_trie_stays_dead():
    trie = Trie(np.array([[0, 1], [2, 0]]))
    states = torch.tensor([0, 0, 0, -1, 0])
    assert trie.walk(states, torch.tensor([0, 1, 7, 0, -3])).tolist()[1:] == [-1, -1, -1, -1]
    assert trie.items(torch.tensor([-1, 0])).tolist() == [-1, -1]
    assert trie.lookup(torch.tensor([[[0, 1], [2, 1]], [[2, 0], [9, 9]]])).tolist() == [[0, -1], [1, -1]]


@pytest.mark.parametrize(
    "ids,sizes,message",
    [
        (np.array([[0, 1], [1, 0], [0, 1]]), None, "rows 0 and 2 have the same semantic ID"),
        (np.array([[0, 1], [1, 4]]), (2, 4), "row 1 has code 4 at level 1; allowed are 0 to 3"),
        (np.array([[0, -1]]), None, "row 0 has code -1"),
        (np.array([[0.5]]), None, "integer codes"),
        (np.zeros((0, 3), int), None, "at least one item"),
        (np.array([1, 2]), None, r"\[N, L\]"),
        (np.array([[0, 1]]), (2,), "1 numbers for 2 levels"),
    ],
)
def test_bad_ids_are_refused(ids, sizes, message):
    with pytest.raises(ValueError, match=message):
        Trie(ids, sizes)


def brute_force_step(logits, scores, states, trie, k):
    """Every (score, beam, token, state) of a user, sorted: what trie_topk must return."""
    logp = logits.double().log_softmax(-1)
    rows = []
    for b in range(len(logits)):
        found = []
        for w in range(logits.shape[1]):
            for token in range(logits.shape[2]):
                state = int(trie.walk(states[b, w, None], torch.tensor([token]))[0])
                if state >= 0:
                    found.append((-(scores[b, w].double() + logp[b, w, token]).item(), w, token, state))
        found = sorted(found)[:k]
        rows.append([(-s, w, t, n) for s, w, t, n in found] + [(-np.inf, -1, -1, -1)] * (k - len(found)))
    return rows


@pytest.mark.parametrize("k", [1, 7, 100])
def test_one_step_is_brute_force(k):
    trie = Trie(some_ids())
    generator = torch.Generator().manual_seed(1)
    states = torch.tensor([[0, 1, 2], [3, -1, 4], [-1, -1, -1], [0, 0, 5]])
    scores = torch.randn(4, 3, generator=generator)
    logits = 3 * torch.randn(4, 3, 6, generator=generator)
    got = vq.trie_topk(logits, scores, states, trie, k)
    for b, want in enumerate(brute_force_step(logits, scores, states, trie, k)):
        for field, column in zip(got[1:], list(zip(*want, strict=True))[1:], strict=True):
            assert field[b].tolist() == list(column)
        np.testing.assert_allclose(got[0][b].numpy(), [row[0] for row in want], rtol=1e-5)


def test_ties_go_to_the_lowest_beam_then_token():
    trie = Trie(np.array([[0], [1], [2], [3]]))
    scores, beams, tokens, _ = vq.trie_topk(
        torch.zeros(1, 2, 4), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long), trie, 6
    )
    assert beams.tolist() == [[0, 0, 0, 0, 1, 1]] and tokens.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert scores.unique().numel() == 1


def test_a_large_trie_is_built_in_a_moment():
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.integers(0, 256, (200_000, 3)), np.arange(200_000)[:, None] % 4096], 1)
    ids = np.unique(ids, axis=0)
    trie = Trie(ids)
    assert (trie.lookup(torch.from_numpy(ids)) == torch.arange(len(ids))).all()
