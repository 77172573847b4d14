"""SASRec, LIGER and the split with cold items, on data whose answer is known."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="TIGER is built on transformers; pip install 'vqkernels[models]'")

from vqkernels.data import Catalogue, DataError, save_folder
from vqkernels.recommend import LIGER, SASRec, cold_split, leave_one_out, metrics
from vqkernels.recommend.cold_start import ROWS, cold_start, summary
from vqkernels.recommend.compare import Settings

ITEMS = 24
TINY = {"d_model": 16, "heads": 2, "max_history": 6}


def rounds(users=80, length=7, seed=0):
    """Walks over a circle of items: after i comes i + 1, and i + 2 in one case of five."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 2], (users, length), p=[0.8, 0.2])
    return list((rng.integers(0, ITEMS, (users, 1)) + np.cumsum(steps, 1)) % ITEMS + 1)


def circle():
    """Embeddings in which neighbours on the circle are near each other."""
    angle = 2 * np.pi * np.arange(ITEMS) / ITEMS
    waves = [f(n * angle) for n in (1, 2, 3) for f in (np.cos, np.sin)]
    return np.stack(waves, 1).astype(np.float32)


def ids_of(count=ITEMS):
    return np.stack([np.arange(count) // 6, np.arange(count) % 6], 1)


# SASRec.


@pytest.fixture(scope="module")
def sasrec():
    split = leave_one_out(rounds())
    return SASRec(ITEMS, **TINY, dropout=0.1).fit(split.train, epochs=30, batch_size=16, lr=1e-2), split


def test_sasrec_learns_what_follows(sasrec):
    model, split = sasrec
    assert model.history[-1]["loss"] < 1.2 < model.history[0]["loss"]  # the entropy is .5 nats
    top, scores = model.recommend_batch(split.test.histories)
    assert metrics(top, split.test.targets)["HR@5"] > 0.9
    assert np.mean(top[:, 0] == [h[-1] % ITEMS + 1 for h in split.test.histories]) > 0.9
    assert (np.diff(scores[:, :3], axis=1) <= 0).all()


def test_sasrec_sees_the_order_and_nothing_after(sasrec):
    model, _ = sasrec
    one, other = model.scores([np.array([3, 5, 9])]), model.scores([np.array([5, 3, 9])])
    assert not np.allclose(one, other, atol=1e-4)
    assert not np.allclose(model.scores([np.array([7])]), model.scores([np.array([7, 7])]), atol=1e-4)  # places count
    items = torch.tensor([[3, 5, 9, 11], [3, 5, 9, 2]])
    with torch.no_grad():
        states = model.net(items)
    assert torch.allclose(states[0, :3], states[1, :3], atol=1e-6) and not torch.allclose(states[0, 3], states[1, 3])
    # only the latest items count, whatever the batch is filled up with
    long = np.arange(1, 21)
    batch = model.scores([long, np.array([7]), long[-6:], np.array([], dtype=np.int64)])
    np.testing.assert_allclose(batch[0], batch[2], atol=1e-5)
    np.testing.assert_allclose(batch[1], model.scores([np.array([7])])[0], atol=1e-5)
    assert not batch[3].any()


def test_sasrec_repeats_itself_and_keeps_the_best_epoch():
    split = leave_one_out(rounds(40))
    fit = lambda seed: SASRec(ITEMS, **TINY, seed=seed).fit(  # noqa: E731
        split.train, epochs=60, batch_size=16, lr=5e-2, patience=3, validation=split.validation
    )
    one, two, other = fit(0), fit(0), fit(1)
    same = [torch.equal(a, b) for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True)]
    assert all(same) and not torch.equal(one.net.items.weight, other.net.items.weight)
    judged = [record["validation_ndcg"] for record in one.history]
    best = max(judged)
    assert len(judged) < 60 and judged.index(best) == len(judged) - 4  # stopped by its patience
    top, _ = one.recommend_batch(split.validation.histories)
    assert metrics(top, split.validation.targets)["NDCG@10"] == pytest.approx(best)


def test_sasrec_says_what_is_wrong():
    with pytest.raises(ValueError, match="d_model 10 a multiple of heads 4"):
        SASRec(5, d_model=10, heads=4)
    with pytest.raises(ValueError, match="0 sequences of two items and more"):
        SASRec(5).fit([[1], [2]])


# The split.


def test_cold_items_vanish_from_everything_but_the_cold_targets():
    sequences = rounds()
    split = cold_split(sequences, share=0.2, seed=3)
    cold = set(split.cold_items.tolist())
    assert len(cold) == round(0.2 * len({int(s[-1]) for s in sequences}))
    seen = [*split.train, *split.validation.histories, *split.in_set.histories, *split.cold.histories]
    assert not cold & set(np.concatenate(seen).tolist())
    assert not cold & {*split.validation.targets.tolist(), *split.in_set.targets.tolist()}
    assert set(split.cold.targets.tolist()) <= cold
    for queries in (split.in_set, split.cold):
        for history, target, user in zip(*queries, strict=True):
            assert target == sequences[user][-1]
            assert history.tolist() == [i for i in sequences[user][:-1].tolist() if i not in cold]
    assert len(split.in_set.targets) + len(split.cold.targets) == len(sequences)
    for history, target, user in zip(*split.validation, strict=True):  # nothing of the test is in it
        known = [
            i for i in sequences[user][: -1 if sequences[user][-1] not in cold else None].tolist() if i not in cold
        ]
        assert [*history, target] == known and split.train[user].tolist() == known[:-1]
    assert cold_split(sequences, share=0.2, seed=3).cold_items.tolist() == split.cold_items.tolist()
    assert cold_split(sequences, share=0.2, seed=4).cold_items.tolist() != split.cold_items.tolist()
    assert cold_split(sequences, cold_items=[5, 5, 2]).cold_items.tolist() == [2, 5]


@pytest.mark.parametrize(
    "options", [{"share": 0.0}, {"share": 1.5}, {"cold_items": range(1, ITEMS + 1)}, {"cold_items": []}]
)
def test_splits_without_queries_are_refused(options):
    with pytest.raises(ValueError, match=r"between 0 and 1|both kinds are needed"):
        cold_split(rounds(10), **options)


# LIGER.


@pytest.fixture(scope="module")
def liger():
    split = cold_split(rounds(150), cold_items=[4, 13, 20])
    small = {"d_model": 16, "d_ff": 32, "heads": 2, "layers": 1, "max_history": 6, "window": 3, "dropout": 0.0}
    model = LIGER(ids_of(), circle(), **small).fit(split.train, epochs=12, batch_size=16, lr=1e-2)
    return model, split


def test_only_the_dense_head_finds_cold_items(liger):
    model, split = liger
    rate = {
        (way, part): metrics(
            model.recommend_batch(queries.histories, way=way, cold_items=split.cold_items, beams=12)[0], queries.targets
        )["HR@1"]
        for way in ("generative", "dense", "hybrid")
        for part, queries in (("in_set", split.in_set), ("cold", split.cold))
    }
    assert (
        min(rate[way, "in_set"] for way in ("generative", "dense", "hybrid")) > 0.4
    )  # .8 is the most there is, .04 chance
    # the query is like what comes next, not like what came last (a tenth at most where this has run)
    items, _ = model.recommend_batch(split.in_set.histories, 1, way="dense", exclude_seen=False)
    last = np.array([h[-1] for h in split.in_set.histories])
    assert np.mean(items[:, 0] == last) < 0.2 and np.mean((items[:, 0] - last) % ITEMS <= 2) > 0.6
    assert rate["generative", "cold"] < 0.1 and min(rate["dense", "cold"], rate["hybrid", "cold"]) > 0.3, rate


def test_hybrid_candidates_are_beams_and_cold_items(liger):
    model, split = liger
    histories = split.in_set.histories[:9]
    written, _ = model.recommend_batch(histories, 4, way="generative", beams=4)
    items, scores = model.recommend_batch(histories, 7, way="hybrid", cold_items=split.cold_items, beams=4)
    dense, cosine = model.recommend_batch(histories, ITEMS, way="dense", exclude_seen=False)
    for row, history in enumerate(histories):
        allowed = ({*written[row], *split.cold_items.tolist()} - set(history.tolist())) - {0}
        assert set(items[row][items[row] > 0].tolist()) == allowed
        exact = dict(zip(dense[row].tolist(), cosine[row].tolist(), strict=True))
        np.testing.assert_allclose(scores[row][items[row] > 0], [exact[i] for i in items[row] if i > 0], atol=1e-5)
    unseen, _ = model.recommend_batch(histories, ITEMS, way="dense")
    assert all(not set(row.tolist()) & set(h.tolist()) for row, h in zip(unseen, histories, strict=True))
    assert (np.diff(cosine, axis=1) <= 0).all() and sorted(dense[0]) == list(range(1, ITEMS + 1))
    assert (np.abs(cosine) <= 1 + 1e-5).all()


def test_liger_is_saved_whole(liger, tmp_path):
    model, split = liger
    again = LIGER.load(model.save(tmp_path / "model"))
    for way in ("generative", "dense", "hybrid"):
        options = {"way": way, "cold_items": split.cold_items, "beams": 10}
        items, scores = model.recommend_batch(split.cold.histories[:5], **options)
        same, equal = again.recommend_batch(split.cold.histories[:5], **options)
        assert (items == same).all() and np.allclose(scores, equal, atol=1e-6)


def test_liger_says_what_is_wrong(liger):
    with pytest.raises(ValueError, match=r"embeddings are \[3, 2\]; finite \[num_items = 24, D\]"):
        LIGER(ids_of(), np.zeros((3, 2)), d_model=16, heads=2)
    with pytest.raises(ValueError, match="temperature 0"):
        LIGER(ids_of(), circle(), temperature=0, d_model=16, heads=2)
    with pytest.raises(ValueError, match="way is 'both'; allowed: 'hybrid', 'dense', 'generative'"):
        liger[0].recommend_batch([[1]], way="both")
    with pytest.raises(ValueError, match="unknown item 99"):
        liger[0].recommend_batch([[1]], cold_items=[99])


# The table.


def small_catalogue(embeddings=True):
    texts = [f"item {i}" for i in range(1, ITEMS + 1)]
    users = [f"u{i}" for i in range(60)]
    return Catalogue(rounds(60), users, ITEMS, texts, texts, circle() if embeddings else None, "circle")


def test_every_row_of_the_table(tmp_path):
    settings = Settings(levels=2, codebook_size=4, epochs=1, d_model=16, d_ff=32, window=3, max_history=6, beams=10)
    heard = []
    results = cold_start(
        small_catalogue(), tmp_path, settings, share=0.2, seeds=2, progress=lambda s, n: heard.append(s)
    )
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "cold_start.png").stat().st_size > 1000
    assert {(r["row"], r["seed"]) for r in results["rows"]} == {(name, seed) for name in ROWS for seed in (0, 1)}
    assert heard == sorted(heard) and 0.9 < heard[-1] <= 1
    means = summary(results)
    for never in ("popularity", "markov", "sasrec"):  # they cannot name what they have not seen
        assert means[never]["cold"]["HR@10"][0] <= means["content"]["cold"]["HR@10"][0]
    assert means["content"]["cold"]["HR@10"][0] > 0.8
    with pytest.raises(DataError, match="has no embeddings"):
        cold_start(small_catalogue(embeddings=False), tmp_path, settings)


def test_command(tmp_path):
    from typer.testing import CliRunner

    from vqkernels.cli import app

    save_folder(small_catalogue(), tmp_path / "data")
    options = ["--levels", "2", "--codebook-size", "4", "--epochs", "1", "--share", "0.2", "--beams", "10"]
    words = ["cold-start", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *options]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert "LIGER, dense head alone" in first.output and "items hidden from training" in first.output
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "not empty" in again.output
