"""The trie against sets of prefixes, and one beam step against brute force."""

import itertools

import numpy as np
import pytest
import torch

import vqkernels as vq
from vqkernels.data import DataError
from vqkernels.semantic_ids import Trie


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
        (np.array([[0, 2**62]]), None, "do not fit into 62 bits"),
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


@pytest.mark.parametrize("size", [3, 2**16, 2**31, 2**52])
def test_codes_that_fill_one_key_or_several_are_in_order(size):
    rng = np.random.default_rng(0)
    values = np.unique(rng.integers(0, size, 3))
    ids = rng.permutation(np.array(list(itertools.product(values, repeat=4)))[::2])
    trie = Trie(ids, (size,) * 4)
    assert torch.equal(trie.leaf_items, torch.from_numpy(np.lexsort(ids.T[::-1])))
    assert torch.equal(trie.codes(), torch.from_numpy(ids))
    assert torch.equal(trie.lookup(trie.codes()), torch.arange(len(ids)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64])
def test_any_whole_number_will_do(dtype):
    assert torch.equal(Trie(some_ids().astype(dtype)).codes(), Trie(some_ids()).codes())


def reachable(trie, root: int, depth: int) -> set[int]:
    """Item rows found by walking every edge that a view leaves."""
    nodes = [root] if root >= 0 else []
    for _ in range(depth):
        nodes = [
            int(trie.edge_children[e])
            for s in nodes
            for e in range(int(trie.row_offsets[s]), int(trie.row_offsets[s + 1]))
            if trie.edge_tokens[e] >= 0
        ]
        assert all(trie.row_offsets[s] < trie.row_offsets[s + 1] for s in nodes) or _ == depth - 1
    return set(trie.items(torch.tensor(nodes, dtype=torch.int64)).tolist())


def test_a_view_is_the_trie_of_its_items():
    """Every path of a view leads to an allowed item, and there are no others."""
    ids = some_ids()
    trie, rng = Trie(ids), np.random.default_rng(2)
    before = trie.edge_tokens.clone()
    for share in (0.0, 0.1, 0.5, 1.0):
        mask = rng.random(len(ids)) < share
        rows = np.flatnonzero(mask)
        for view in (
            trie.allow(mask),
            trie.allow(rows),
            trie.deny(~mask),
            trie.deny(np.flatnonzero(~mask)),
            trie.allow(rows.tolist()),
        ):
            edges = int((view.edge_tokens >= 0).sum())
            assert reachable(view, 0, 3) == set(rows.tolist())
            assert edges == (Trie(ids[mask]).num_nodes - 1 if len(rows) else 0)  # no path that ends in nothing
            want = torch.where(torch.from_numpy(mask), torch.arange(len(ids)), -1)
            assert torch.equal(view.lookup(torch.from_numpy(ids)), want)
            nodes = torch.arange(-1, view.num_nodes)
            for token in (-1, 6, 7):  # no code, also where one is masked
                assert (view.walk(nodes, torch.full_like(nodes, token)) == -1).all()
            assert view.row_offsets is trie.row_offsets and view.edge_children is trie.edge_children
        other = rng.random(len(ids)) < 0.5  # a view of a view
        assert reachable(trie.allow(mask).deny(other), 0, 3) == set(np.flatnonzero(mask & ~other).tolist())
        assert reachable(trie.deny(other).allow(mask), 0, 3) == set(np.flatnonzero(mask & ~other).tolist())
    assert torch.equal(trie.edge_tokens, before)


def test_lists_for_each_history():
    ids = some_ids()
    rng, stock = np.random.default_rng(3), np.random.default_rng(4).random(len(ids)) < 0.6
    lists = [rng.permutation(len(ids))[:n].tolist() for n in (5, 0, 1, 40, len(ids))]
    for trie, kept in (
        (Trie(ids), set(range(len(ids)))),
        (Trie(ids).allow(stock), set(np.flatnonzero(stock).tolist())),
    ):
        view = trie.allow(lists)
        assert view.histories == len(view.roots) == 5
        for root, rows in zip(view.roots.tolist(), lists, strict=True):
            assert reachable(view, root, 3) == set(rows) & kept
        assert trie.allow([[], []]).roots.tolist() == [-1, -1]
        view = trie.deny(lists)
        for history, rows in enumerate(lists):
            states = torch.zeros(len(ids), dtype=torch.int64)
            for level in range(3):
                states = trie.walk(states, torch.from_numpy(ids[:, level].copy()))
                closed = view.closed(torch.tensor(history), states, level)
                # a node is closed when all items of the trie below it are in the list, one of them at least
                for row, (state, got) in enumerate(zip(states.tolist(), closed.tolist(), strict=True)):
                    below = {i for i in kept if (ids[i, : level + 1] == ids[row, : level + 1]).all()}
                    assert got == (state >= 0 and below <= set(rows)), (history, row, level)


def test_appended_items_are_found_and_old_rows_stay():
    ids = some_ids(count=100, size=7)
    trie = Trie(ids[:50]).append(ids[50:])
    assert torch.equal(trie.lookup(torch.from_numpy(ids)), torch.arange(len(ids)))
    assert torch.equal(trie.edge_tokens, Trie(ids).edge_tokens) and torch.equal(trie.leaf_items, Trie(ids).leaf_items)
    assert trie.append(np.array([[0, 0, 99]])).codebook_sizes == (7, 7, 100)
    assert trie.append(ids[:0]) is trie
    with pytest.raises(ValueError, match=rf"rows 4 and {len(ids)} have the same semantic ID"):
        trie.append(ids[4:5])


def test_saved_and_loaded(tmp_path):
    trie = Trie(some_ids(), (9, 9, 9))
    stocked = trie.allow([1, 2])
    for saved in (trie, stocked):  # the file holds the trie, not what a view takes from it
        loaded = Trie.load(saved.save(tmp_path / "a" / "trie.safetensors"))
        for name in ("row_offsets", "edge_tokens", "edge_children", "leaf_items", "codebook_sizes", "depth", "roots"):
            assert np.array_equal(getattr(loaded, name), getattr(trie, name)), name
        assert torch.equal(loaded.lookup(trie.codes()), torch.arange(trie.num_items))
    data = (tmp_path / "a" / "trie.safetensors").read_bytes()
    for damaged in (b"", data[:-9], b"x" * 100):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(DataError, match=r"not a saved trie .*Give the file that Trie\.save"):
            Trie.load(tmp_path / "damaged")
    with pytest.raises(DataError, match="not a saved trie"):
        Trie.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda t: t.allow([0, 999]), "allow: unknown item row 999; rows run from 0"),
        (lambda t: t.deny([[0], [-1]]), "deny: unknown item row -1"),
        (lambda t: t.allow(np.ones(3, bool)), r"allow: the mask has shape \[3\]; bool \["),
        (lambda t: t.deny([0.5]), "whole numbers"),
        (lambda t: t.deny([[0]]).allow([1]), "allow: this trie has a list for each history already"),
        (lambda t: t.allow([[0]]).deny([1]), "deny: this trie has a list for each history already"),
        (lambda t: t.append(np.zeros((2, 2), int)), r"append: .* shape \[2, 2\]; integer codes \[M, 3\]"),
    ],
)
def test_bad_lists_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Trie(some_ids()))


def test_the_benchmark_compares_equals():
    """All contenders pass the gate, and answers to another question do not."""
    pytest.importorskip("transformers")
    from vqkernels.bench import trie as bench

    for row in [*bench.step_rows((700,), ((2, 7),)), *bench.trie_rows((700,))]:
        for name, factory in row.contenders.items():
            assert row.gate(factory()()) == "", (row.op, name)
    row = next(bench.step_rows((700,), ((2, 7),)))
    scores, states = row.contenders["vqkernels"]()()
    assert "differ" in row.gate((scores + 0.01, states)) and "differ" in row.gate((scores, states.flip(1)))
    row, ids = next(bench.trie_rows((700,))), bench.semantic_ids(700)
    assert "not found" in row.gate(Trie(ids[::-1]))
    assert "missing" in row.gate(bench.dictionary(ids[:-1]))
