"""TIGER, its beam search, the baselines and the evaluation, against exhaustive search and plain loops."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="TIGER is built on transformers; pip install 'vqkernels[models]'")

from vqkernels.data import DataError
from vqkernels.recommend import TIGER, ContentNeighbours, Markov, Popularity, evaluate, leave_one_out, metrics
from vqkernels.recommend.baselines import top_k
from vqkernels.recommend.decoder import BeamDecoder
from vqkernels.recommend.training import batches

SMALL = {"d_model": 16, "d_ff": 32, "heads": 2, "layers": 1, "max_history": 6, "window": 3}


def some_ids(count=20, size=4, seed=0):
    return np.unique(np.random.default_rng(seed).integers(0, size, (count, 3)), axis=0)


@pytest.fixture(scope="module")
def model():
    """Not trained, so that no score is near another's extreme."""
    return TIGER(some_ids(), **SMALL, seed=3)


@pytest.fixture(scope="module")
def histories(model):
    rng = np.random.default_rng(1)
    return [rng.integers(1, model.num_items + 1, length) for length in (0, 1, 2, 3, 5, 9, 9)]


def exhaustive(model, histories):
    """float [B, num_items]: every item's log-probability, without beams, trie or cache."""
    return np.stack([model.score(histories, np.full(len(histories), i)) for i in range(1, model.num_items + 1)], 1)


def test_a_wide_beam_is_exhaustive_search(model, histories):
    n = model.num_items
    items, scores = model.recommend_batch(histories, n, beams=64, exclude_seen=False)
    exact = exhaustive(model, histories)
    assert (items == np.argsort(-exact, axis=1) + 1).all()
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1), atol=1e-5)


def test_beams_that_share_are_rows_of_their_own():
    """Three blocks, three steps, beams that multiply and change places, encoder states of unlike lengths: against T5's
    own decoder, fed every beam's whole sequence."""
    t5 = TIGER(some_ids(), **SMALL | {"layers": 3}, seed=5).t5
    for parameter in t5.decoder.parameters():  # position biases start out too much alike
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 14, (2, 5), generator=draw)
    encoded, mask = torch.randn(2, 6, 16, generator=draw), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0

    def whole(sequences):  # [2, beams, n]
        beams = sequences.shape[1]
        rows = {
            "encoder_hidden_states": encoded.repeat_interleave(beams, 0),
            "encoder_attention_mask": mask.repeat_interleave(beams, 0),
        }
        hidden = t5.decoder(input_ids=sequences.flatten(0, 1), use_cache=False, **rows).last_hidden_state[:, -1]
        return hidden.unflatten(0, (2, beams))

    with torch.inference_mode():
        decoder, sequences = BeamDecoder(t5.decoder, encoded, mask, tokens, 3), tokens.unsqueeze(1)
        torch.testing.assert_close(decoder.states, whole(sequences), atol=1e-5, rtol=1e-5)
        for beams in (3, 7, 2):
            parents = torch.randint(0, sequences.shape[1], (2, beams), generator=draw)
            codes = torch.randint(2, 14, (2, beams), generator=draw)
            own = sequences.gather(1, parents.unsqueeze(-1).expand(-1, -1, sequences.shape[2]))
            sequences = torch.cat([own, codes.unsqueeze(-1)], -1)
            torch.testing.assert_close(decoder.step(codes, parents), whole(sequences), atol=1e-5, rtol=1e-5)


def test_seen_items_are_passed_over_exactly(model, histories):
    n = model.num_items
    items, _ = model.recommend_batch(histories, n, beams=64)
    for row, history, exact in zip(items, histories, exhaustive(model, histories), strict=True):
        want = [i for i in np.argsort(-exact) + 1 if i not in history]
        assert row[: len(want)].tolist() == want and not row[len(want) :].any()
    # seen prefixes give their place to others: a beam of 1 still finds something, even when all but one item is seen
    most = np.arange(1, n)
    assert model.recommend(most, 1, beams=1)[0] == [n]
    assert model.recommend(np.arange(1, n + 1), 3) == ([], [])


def test_allow_and_deny_lists_are_exact(model, histories):
    """Also for narrow beams, whose places prefixes of forbidden items must not take."""
    n, exact = model.num_items, exhaustive(model, histories)
    rng = np.random.default_rng(4)
    stock = rng.random(n) < 0.5
    ids = np.flatnonzero(stock) + 1
    lists = [np.flatnonzero(rng.random(n) < share) + 1 for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)]
    some = [set(x.tolist()) for x in lists]
    every, stocked = set(range(1, n + 1)), set(ids.tolist())
    cases = [
        ({"allow": stock}, [stocked] * 7),
        ({"allow": ids.tolist()}, [stocked] * 7),
        ({"deny": ids}, [every - stocked] * 7),
        ({"allow": lists}, some),
        ({"deny": lists}, [every - x for x in some]),
        ({"allow": stock, "deny": lists}, [stocked - x for x in some]),
        ({"allow": lists, "deny": ids}, [x - stocked for x in some]),
        (
            {"allow": lists, "deny": [x[::2] for x in lists]},
            [x - set(y[::2]) for x, y in zip(some, lists, strict=True)],
        ),
        ({"allow": []}, [set()] * 7),
    ]
    for options, wanted in cases:
        for seen in (False, True):
            items, scores = model.recommend_batch(histories, n, beams=64, exclude_seen=seen, batch_size=3, **options)
            for row, score, history, want, logp in zip(items, scores, histories, wanted, exact, strict=True):
                want = [i for i in np.argsort(-logp) + 1 if i in want and not (seen and i in history)]
                assert row[: len(want)].tolist() == want and not row[len(want) :].any()
                np.testing.assert_allclose(score[: len(want)], logp[np.array(want, int) - 1], atol=1e-5)
    for item in (1, n):  # a beam of one finds the one item that is left
        for options in ({"allow": [item]}, {"deny": [[i for i in range(1, n + 1) if i != item]]}):
            assert model.recommend([2, 3], 1, beams=1, exclude_seen=False, **options)[0] == [item]


def test_invalid_rates_by_level_and_width(model, histories):
    """Against a free search over dictionaries of prefixes, one beam at a time."""
    ids = some_ids()
    prefixes = [{tuple(code[: n + 1]) for code in ids.tolist()} for n in range(3)]
    table = model.invalid_rates(histories, beams=(1, 5, 64), batch_size=2)
    assert list(table) == [1, 5, 64] and all(len(row) == 3 for row in table.values())
    for width, row in table.items():
        counted = np.zeros((3, 2))
        for history in histories:
            beams = [((), 0.0)]
            for level in range(3):
                grown = [
                    ((*codes, c), s + p) for codes, s in beams for c, p in enumerate(next_logp(model, history, codes))
                ]
                beams = sorted(grown, key=lambda beam: -beam[1])[:width]
                counted[level] += [sum(codes not in prefixes[level] for codes, _ in beams) / len(beams), 1]
        assert row == pytest.approx((counted[:, 0] / counted[:, 1]).tolist(), abs=1e-6)
    assert table[64][-1] == pytest.approx(1 - len(ids) / 64) == model.invalid_rate(histories, beams=64)


def next_logp(model, history, codes):
    """Log-probabilities of the next code after these ones."""
    with torch.inference_mode():
        source, tokens = model.context([history])
        low = [low for low, _ in model.level_ranges]
        written = torch.tensor([[c + low[i] for i, c in enumerate(codes)]], dtype=torch.long)
        hidden = model._decode(source, torch.cat([tokens, written], 1))[:, -1]
        return model.level_logits(hidden, len(codes)).log_softmax(-1)[0].tolist()


def test_no_argument_is_on_its_way_out(model, histories, recwarn):
    model.recommend_batch(histories, 5)
    assert not [str(w.message) for w in recwarn if "deprecat" in str(w.message).lower()]


def test_a_batch_is_its_rows(model, histories):
    together, scores = model.recommend_batch(histories, 5, beams=8)
    for row, history in enumerate(histories):
        items, score = model.recommend(history, 5, beams=8)
        assert items == together[row].tolist()
        np.testing.assert_allclose(score, scores[row], atol=1e-5)


def test_free_beams_and_their_invalid_rate(model, histories):
    ids = some_ids()
    assert 0 < len(ids) < 64  # of 4³ possible sequences
    everything = 64
    items, scores = model.recommend_batch(histories, everything, beams=everything, constrained=False)
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    for row in items:  # all sequences come back: each item once, and every other is invalid
        assert sorted(row[row > 0]) == list(range(1, len(ids) + 1))
    assert model.invalid_rate(histories, beams=everything) == pytest.approx(1 - len(ids) / everything)
    np.testing.assert_allclose(np.exp(scores.astype(float)).sum(1), 1, rtol=1e-4)
    full = TIGER(np.array([[a, b] for a in range(3) for b in range(3)]), **SMALL)
    assert full.invalid_rate([[1, 2]], beams=9) == 0


@pytest.mark.parametrize("window", [1, 3, 6])
def test_training_and_scoring_see_the_same(window):
    """The training loss of the last item of a window is its score: encoder, window and targets line up."""
    model = TIGER(some_ids(), **SMALL | {"window": window}, dropout=0.0)
    sequence = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    reach = model.max_history - window + 1
    past, target = torch.from_numpy(sequence[None, :-window][:, -reach:]), torch.from_numpy(sequence[None, -window:])
    with torch.no_grad():
        total = float(model(past, target, None)) * window * model.levels
        shorter = 0.0
        if window > 1:
            padded = torch.cat([target[:, :-1], torch.zeros(1, 1, dtype=torch.long)], 1)
            shorter = float(model(past, padded, None)) * (window - 1) * model.levels
    assert -model.score([sequence[:-1]], sequence[-1:])[0] == pytest.approx(total - shorter, rel=1e-4)


def test_every_item_is_a_target_once_per_epoch():
    model = TIGER(some_ids(), **SMALL)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, model.num_items + 1, n) for n in (1, 2, 3, 7, 20)]
    targets, pairs = [], set()
    for past, target, users in batches(model, sequences, np.arange(5), 4, rng):
        assert past.shape[1] <= model.max_history - model.window + 1 and target.shape[1] <= model.window
        for p, t, u in zip(past, target, users, strict=True):
            p, t = p[p > 0], t[t > 0]
            targets.append(t)
            text = sequences[u].tolist()
            joined = [*p.tolist(), *t.tolist()]
            assert any(text[i : i + len(joined)] == joined for i in range(len(text)))
            pairs.add(len(p))
    assert sorted(torch.cat(targets).tolist()) == sorted(np.concatenate(sequences).tolist())
    assert 0 in pairs


def test_it_learns_a_pattern_and_is_reproducible():
    ids = some_ids()
    n = len(ids)
    sequences = [np.arange(start, start + 8) % n + 1 for start in range(n)]
    split = leave_one_out(sequences)

    def train(epochs):
        model = TIGER(ids, **SMALL, dropout=0.0)
        return model.fit(split.train, epochs=epochs, batch_size=8, lr=2e-2, validation=split.validation)

    model = train(40)
    assert evaluate(model, split.test)["HR@1"] > 0.8
    assert model.history[-1]["loss"] < 0.4 * model.history[0]["loss"]
    model, twin = train(3), train(3)
    assert [h["loss"] for h in model.history] == [h["loss"] for h in twin.history]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    other = TIGER(ids, **SMALL, seed=1)
    assert not torch.equal(other.t5.shared.weight, TIGER(ids, **SMALL, seed=0).t5.shared.weight)


def test_training_leaves_the_global_generator_alone():
    model = TIGER(some_ids(), **SMALL)
    before = torch.get_rng_state()
    model.fit([[1, 2, 3]], epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_saved_and_loaded_it_says_the_same(model, histories, tmp_path):
    model.save(tmp_path / "model")
    loaded = TIGER.load(tmp_path / "model")
    assert all(
        (a == b).all()
        for a, b in zip(loaded.recommend_batch(histories, 5), model.recommend_batch(histories, 5), strict=True)
    )
    (tmp_path / "model" / "tiger.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a whole saved TIGER"):
        TIGER.load(tmp_path / "model")
    with pytest.raises(DataError, match="missing"):
        TIGER.load(tmp_path)


def test_a_digit_that_says_nothing_is_left_out():
    ids = np.concatenate([some_ids(), np.zeros((len(some_ids()), 1), int)], 1)
    assert TIGER(ids, **SMALL).levels == 3


def test_user_tokens(histories):
    model = TIGER(some_ids(), **SMALL, user_bins=4)
    a, b = (model.recommend_batch(histories, 5, users=np.full(len(histories), u))[1] for u in (0, 1))
    assert not np.array_equal(a, b)
    model.fit([[1, 2, 3], [3, 2, 1]], epochs=1)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda m: m.recommend([0]), "unknown item 0; item ids run from 1"),
        (lambda m: m.recommend([1, 999]), "unknown item 999"),
        (lambda m: m.fit([[1, 2], [999]]), "unknown item 999"),
        (lambda m: m.fit([[]]), "0 non-empty sequences"),
        (lambda m: m.fit([[1, 2]], epochs=0), "epochs 0"),
        (lambda m: m.recommend([1.5]), "whole numbers"),
        (lambda m: m.recommend([1], 20, beams=10), "k is 20 and beams is 10"),
        (lambda m: m.recommend([1], 3, allow=[99]), "unknown item 99"),
        (lambda m: m.recommend([1], 3, deny=[[1], [2]]), "deny has 2 lists for 1 histories"),
        (lambda m: TIGER(some_ids(), window=9, max_history=3), "window is 9"),
        (lambda m: TIGER(some_ids(), d_model=10, heads=4), "not a multiple of heads"),
        (lambda m: TIGER(some_ids()[[0, 0]]), "same semantic ID"),
    ],
)
def test_bad_input_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


# Evaluation and baselines.


def test_metrics_are_the_plain_loop():
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(30)[:10] for _ in range(200)])
    targets = rng.integers(1, 30, 200)
    got = metrics(items, targets)
    for k in (1, 5, 10):
        hits = [t in row[:k] for row, t in zip(items.tolist(), targets, strict=True)]
        assert got[f"HR@{k}"] == pytest.approx(np.mean(hits))
        if k > 1:
            gains = [
                1 / np.log2(row.index(t) + 2) if t in row[:k] else 0
                for row, t in zip(items.tolist(), targets, strict=True)
            ]
            assert got[f"NDCG@{k}"] == pytest.approx(np.mean(gains))
    with pytest.raises(ValueError, match="k >= 10"):
        metrics(items[:, :9], targets)


def test_leave_one_out():
    split = leave_one_out([[1, 2, 3, 4], [5, 6], [7, 8, 9]])
    assert [s.tolist() for s in split.train] == [[1, 2], [5, 6], [7]]
    assert [h.tolist() for h in split.validation.histories] == [[1, 2], [7]] and split.validation.targets.tolist() == [
        3,
        8,
    ]
    assert [h.tolist() for h in split.test.histories] == [[1, 2, 3], [7, 8]] and split.test.targets.tolist() == [4, 9]
    assert split.test.users.tolist() == [0, 2]
    with pytest.raises(ValueError, match="no sequence has 3 items"):
        leave_one_out([[1, 2]])


def test_top_k_breaks_ties_by_the_lowest_column():
    scores = np.random.default_rng(0).integers(0, 4, (50, 30)).astype(float)
    for k in (1, 5, 30):
        assert (top_k(scores, k) == np.argsort(-scores, axis=1, kind="stable")[:, :k]).all()


def test_baselines_are_what_they_say():
    sequences = [[1, 2, 3], [1, 2, 4], [1, 3, 2], [4, 2], []]
    sequences = [np.array(s, dtype=np.int64) for s in sequences]
    popular = Popularity(5).fit(sequences)
    assert popular.recommend_batch([[]], 5)[0].tolist() == [[2, 1, 3, 4, 5]]  # ties: the lowest id
    assert popular.recommend_batch([[2, 1]], 5)[0].tolist() == [[3, 4, 5, 0, 0]]  # seen items are left out
    markov = Markov(5).fit(sequences)
    assert markov.recommend_batch([[1]], 3)[0].tolist() == [[2, 3, 4]]  # 1→2 twice, 1→3 once, then by popularity
    assert markov.recommend_batch([[5], []], 2)[0].tolist() == [[2, 1], [2, 1]]  # nothing followed 5: popularity
    content = ContentNeighbours(np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 1], [-1, 0]]))
    assert content.recommend_batch([[3, 1]], 3)[0].tolist() == [[2, 4, 5]]
    assert content.recommend_batch([[]], 2)[0].tolist() == [[0, 0]]
