"""Tokenizers: the IDs, what is said of them, new items, saving and bad input."""

import json

import numpy as np
import pytest
import torch

from vqkernels import kmeans
from vqkernels.data import DataError
from vqkernels.ops.checks import finite_rows
from vqkernels.semantic_ids import (
    METHODS,
    HierarchicalKMeansTokenizer,
    ProductKMeansTokenizer,
    RandomTokenizer,
    ResidualKMeansTokenizer,
    RQVAETokenizer,
    add_digit,
    base,
    collision_report,
    load_tokenizer,
    make_tokenizer,
    shared_prefixes,
    tokenizers,
)
from vqkernels.semantic_ids.collisions import transport

SMALL = [
    RandomTokenizer(3, 8, seed=1),
    ResidualKMeansTokenizer(3, 8, seed=1),
    HierarchicalKMeansTokenizer(2, 6, seed=1),
    ProductKMeansTokenizer(3, 8, seed=1),
    *(
        RQVAETokenizer(3, 8, seed=1, hidden=[32], epochs=20, lr=5e-3, batch_size=100, **options)
        for options in ({"latent_dim": 8}, {"quantizer": "simvq", "latent_dim": 8}, {"quantizer": "fsq"})
    ),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def x():
    """300 items around 20 centres, two of them equal, one feature dead as in real embedding models."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((20, 16))[generator.integers(20, size=300)] + 0.3 * generator.standard_normal(
        (300, 16)
    )
    x[7] = x[5]
    x[:, 3] *= 1e-33
    return (5 + 0.01 * x).astype(np.float32)


@pytest.fixture(params=SMALL, ids=lambda t: getattr(t, "quantizer", t.kind))
def tokenizer(request, x):
    return type(request.param)(**request.param._config()).fit(x, progress=False)


def test_digit_counts_up_within_equal_codes_in_row_order():
    codes = np.array([[1, 2], [0, 0], [1, 2], [2, 1], [1, 2], [0, 0]])
    assert add_digit(codes)[:, -1].tolist() == [0, 0, 1, 0, 2, 1]
    assert add_digit(codes)[:, :-1].tolist() == codes.tolist()
    assert collision_report(codes) == {
        "unique_fraction": 0.5,
        "collision_rate": 5 / 6,
        "largest_group": 3,
        "group_sizes": [[1, 1], [2, 1], [3, 1]],
    }
    assert add_digit(codes[:1]).tolist() == [[1, 2, 0]]


def test_ids_are_unique_in_range_and_encode_gives_them_back(tokenizer, x):
    ids = tokenizer.semantic_ids
    assert ids.dtype == np.int64 and ids.shape == (300, tokenizer.levels + 1) and len(np.unique(ids, axis=0)) == 300
    assert (ids >= 0).all() and (ids < tokenizer.codebook_sizes).all()
    assert np.array_equal(tokenizer.encode(x), ids) and np.array_equal(tokenizer.codes(x), ids[:, :-1])
    assert np.array_equal(tokenizer.encode(x[:9:-1]), ids[:9:-1])
    row_by_row = np.concatenate([tokenizer.encode(x[i : i + 1]) for i in range(300) if i != 7])
    assert np.array_equal(row_by_row, np.delete(ids, 7, 0))  # item 7 has the embedding of item 5
    as_tensor = tokenizer.encode(torch.from_numpy(x))
    assert isinstance(as_tensor, torch.Tensor) and np.array_equal(as_tensor.numpy(), ids)


def test_a_fit_leaves_its_embeddings_alone_and_takes_read_only_ones(tokenizer, x):
    given = x.copy()
    given.setflags(write=False)
    again = type(tokenizer)(**tokenizer._config()).fit(given, progress=False)
    assert np.array_equal(given, x) and np.array_equal(again.semantic_ids, tokenizer.semantic_ids)


def test_a_catalogue_is_worked_on_in_tiles(tokenizer, x, monkeypatch):
    for module in (base, tokenizers):
        monkeypatch.setattr(module, "CHUNK", 64)
    again = type(tokenizer)(**tokenizer._config()).fit(x, progress=False)
    assert np.array_equal(again.semantic_ids, tokenizer.semantic_ids)
    if again.report()["energy"]:
        assert again.report()["energy"] == pytest.approx(tokenizer.report()["energy"], rel=1e-5)
    if tokenizer.kind != "random":  # what the fit says of its items is what a search says of them
        codes = tokenizer._codes(tokenizer._standardise(torch.from_numpy(x)))
        assert np.array_equal(codes.numpy(), tokenizer.semantic_ids[:, : tokenizer.levels])


def test_new_items_get_the_next_free_digit(tokenizer, x):
    new = np.nextafter(x[:40], np.float32(9))
    new = np.concatenate([new, new[:3]])
    ids = tokenizer.encode(new)
    everything = np.concatenate([tokenizer.semantic_ids, ids])
    assert len(np.unique(everything, axis=0)) == len(everything)
    assert np.array_equal(everything, add_digit(everything[:, :-1]))
    if tokenizer.kind != "random":
        assert np.array_equal(ids[:40, :-1], tokenizer.semantic_ids[:40, :-1])  # so near that the codes are the same
    assert np.array_equal(ids, tokenizer.encode(new))
    mixed = tokenizer.encode(np.concatenate([new, x]))
    assert np.array_equal(mixed[43:], tokenizer.semantic_ids) and np.array_equal(mixed[:43], ids)


def test_report_says_what_the_ids_say(tokenizer, x):
    report, codes = tokenizer.report(), tokenizer.semantic_ids[:, :-1]
    unique, counts = np.unique(codes, axis=0, return_counts=True)
    assert report["unique_fraction"] == len(unique) / 300 and report["largest_group"] == counts.max()
    assert report["collision_rate"] == pytest.approx(counts[counts > 1].sum() / 300)
    assert tokenizer.codebook_sizes == [*report["codebook_sizes"], counts.max()]
    for level, size in enumerate(report["codebook_sizes"]):
        share = np.bincount(codes[:, level], minlength=size) / 300
        assert report["usage"][level] == pytest.approx((share > 0).mean())
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
        assert report["entropy"][level] == pytest.approx(entropy, abs=1e-5)
        assert report["perplexity"][level] == pytest.approx(np.exp(entropy), rel=1e-5)
    assert report["train_seconds"] > 0
    json.dumps([report, tokenizer.history])
    if tokenizer.kind == "random":
        assert report["reconstruction_error"] is None
        return
    assert 0 < report["reconstruction_error"] < 0.5
    if tokenizer.kind != "rqvae":
        assert [record["step"] for record in tokenizer.history] == list(range(1, tokenizer.levels + 1))
        losses = [record["loss"] for record in tokenizer.history]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] == pytest.approx(
            report["reconstruction_error"], rel=1e-4
        )  # the records are of the same thing


def test_seed_decides(tokenizer, x):
    def codes(seed):
        return type(tokenizer)(**tokenizer._config() | {"seed": seed}).fit(x).semantic_ids

    assert np.array_equal(codes(1), tokenizer.semantic_ids) and not np.array_equal(codes(2), tokenizer.semantic_ids)


def test_save_and_load(tokenizer, x, tmp_path):
    folder = tokenizer.save(tmp_path / "a" / "b")
    again = load_tokenizer(folder)
    new = x + np.float32(0.001)
    assert type(again) is type(tokenizer) and repr(again) == repr(tokenizer)
    assert np.array_equal(again.encode(new), tokenizer.encode(new)) and np.array_equal(
        again.encode(x), tokenizer.semantic_ids
    )
    assert again.report() == tokenizer.report() and again.history == tokenizer.history
    with pytest.raises(DataError, match=r"holds a tokenizer already. Give another path, or overwrite=True"):
        tokenizer.save(folder)
    tokenizer.save(folder, overwrite=True)


def test_residual_kmeans_is_kmeans_of_what_is_left(x):
    tokenizer = ResidualKMeansTokenizer(2, 8, seed=3).fit(x)
    centred = x - x.mean(0, dtype=np.float64)
    z = torch.from_numpy((centred / centred.std()).astype(np.float32))
    first = kmeans(z, 8, seed=3)
    second = kmeans(z - first.centroids[first.indices], 8, seed=4)
    agree = (tokenizer.codes(x) == torch.stack([first.indices, second.indices], 1).numpy()).mean()
    assert agree > 0.99  # the last bit of the standardised values may differ


def test_kmeans_starts_from_a_sample_of_many_rows_and_goes_over_all(x):
    tokenizer = ResidualKMeansTokenizer(1, 4, seed=3).fit(x)
    z = tokenizer._standardise(torch.from_numpy(x))
    sample = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:256]
    start = kmeans(z[sample], 4, iters=0, seed=3).centroids
    assert np.array_equal(kmeans(z, 4, start, seed=3).indices[:, None], tokenizer.codes(x))
    assert not np.array_equal(kmeans(z, 4, seed=3).centroids, tokenizer._codebooks[0])


def test_standardisation_ignores_offset_and_unit(x):
    tokenizer = ResidualKMeansTokenizer(2, 8, seed=1).fit(x)
    z = tokenizer._standardise(torch.from_numpy(x))
    assert z.mean(0).abs().max() < 1e-2 and z.square().mean() == pytest.approx(1, rel=1e-3)
    assert np.array_equal(ResidualKMeansTokenizer(2, 8, seed=1).fit(x * 1024).semantic_ids, tokenizer.semantic_ids)


@pytest.mark.parametrize("unit", [2.0**-90, 2.0**100])
def test_standardisation_stays_in_range(x, unit):
    """Squares, or the sum of all values, leave the range of float32."""
    tokenizer = ResidualKMeansTokenizer(2, 8, seed=1).fit(x)
    x = x.astype(np.float64) * unit
    many = ResidualKMeansTokenizer(2, 8, seed=1).fit(x.astype(np.float32))
    assert np.array_equal(many.semantic_ids, tokenizer.semantic_ids)
    assert finite_rows(torch.tensor([[3e38], [3e38], [torch.nan], [torch.inf]])).tolist() == [True, True, False, False]
    assert finite_rows(torch.tensor([[3e38], [3e38]])).all() and not finite_rows(torch.tensor([[-torch.inf]])).any()


def test_hierarchical_codes_depend_on_their_prefix(x):
    tokenizer = HierarchicalKMeansTokenizer(2, 6, seed=0).fit(x)
    z, codes = tokenizer._standardise(torch.from_numpy(x)).numpy(), tokenizer.codes(x)
    for prefix in range(6):
        rows = codes[:, 0] == prefix
        table = tokenizer._codebooks[1][tokenizer._starts[1][prefix] : tokenizer._starts[1][prefix + 1]].numpy()
        nearest = ((z[rows, None] - table) ** 2).sum(-1).argmin(1)
        assert np.array_equal(codes[rows, 1], nearest)


@pytest.mark.parametrize("kind", SMALL[1:3], ids=lambda t: t.kind)
def test_fewer_different_items_than_codewords(kind, x):
    few = np.concatenate([x[:5], x[:2]])
    tokenizer = type(kind)(levels=2, codebook_size=256).fit(few)
    report = tokenizer.report()
    sizes = [5, 1] if kind.kind == "residual-kmeans" else [3, 3]  # 5 different items: 3 branches, 3 on the next level
    assert report["codebook_sizes"] == sizes and report["usage"] == [1, 1] and report["reconstruction_error"] < 1e-10
    assert report["largest_group"] == 2 and ("256" if sizes == [5, 1] else "[3, 3]") in report["notes"][0]
    assert np.array_equal(tokenizer.encode(few), tokenizer.semantic_ids)
    one = type(kind)(levels=2, codebook_size=4).fit(x[:1])
    assert one.semantic_ids.tolist() == [[0, 0, 0]] and one.codebook_sizes == [1, 1, 1]


@pytest.mark.parametrize("estimator", ["rotation", "ste", "reflection", "gumbel"])
def test_rqvae_learns_and_keeps_its_codebooks_in_use(estimator, x):
    tokenizer = RQVAETokenizer(
        3, 16, latent_dim=8, hidden=[32], epochs=20, lr=1e-2, batch_size=100, estimator=estimator
    ).fit(x)
    report, history = tokenizer.report(), tokenizer.history
    assert [record["epoch"] for record in history] == list(range(1, 21))
    assert history[-1]["reconstruction_loss"] < 0.6 * history[0]["reconstruction_loss"]
    assert report["reconstruction_error"] < 0.5 and min(report["usage"]) > 0.8
    assert len(history[-1]["usage"]) == len(history[-1]["perplexity"]) == 3
    state = torch.random.get_rng_state()
    again = RQVAETokenizer(
        3, 16, latent_dim=8, hidden=[32], epochs=20, lr=1e-2, batch_size=100, estimator=estimator
    ).fit(x)
    assert np.array_equal(again.semantic_ids, tokenizer.semantic_ids)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers stay as they were


def test_rqvae_on_few_items_and_bad_settings(x):
    tokenizer = RQVAETokenizer(2, 256, latent_dim=4, hidden=[8], epochs=3).fit(x[:9])
    assert (
        tokenizer.codebook_sizes[:2] == [8, 8]
        and "8 codewords a level instead of 256" in tokenizer.report()["notes"][0]
    )
    assert len(np.unique(tokenizer.semantic_ids, axis=0)) == 9
    with pytest.raises(ValueError, match=r"estimator='soft' is unknown to quantizer='residual'. Use 'rotation' or"):
        RQVAETokenizer(estimator="soft")
    with pytest.raises(
        ValueError, match=r"estimator='gumbel' is unknown to quantizer='simvq'. Use 'rotation' or 'ste'"
    ):
        RQVAETokenizer(quantizer="simvq", estimator="gumbel")
    with pytest.raises(ValueError, match=r"quantizer='lfq' is unknown. Use 'residual' or 'simvq' or 'fsq'"):
        RQVAETokenizer(quantizer="lfq")
    with pytest.raises(ValueError, match=r"epochs=0 is not a whole number"):
        RQVAETokenizer(epochs=0)
    with pytest.raises(FloatingPointError, match=r"Use a smaller lr"):
        RQVAETokenizer(2, 8, latent_dim=4, hidden=[8], epochs=20, lr=1e12).fit(x)


def test_random_codes_are_uniform_and_ignore_the_embedding():
    tokenizer = RandomTokenizer(2, 4, seed=0).fit(np.zeros((4000, 3), np.float32))
    counts = np.bincount(tokenizer.codes(np.zeros((4000, 3), np.float32)).ravel(), minlength=4)
    assert (abs(counts - 2000) < 200).all()


def test_bad_input(x, tmp_path):
    with pytest.raises(ValueError, match=r"levels=0 is not a whole number from 1"):
        ResidualKMeansTokenizer(levels=0)
    with pytest.raises(ValueError, match=r"codebook_size=2.5"):
        ResidualKMeansTokenizer(codebook_size=2.5)
    tokenizer = ResidualKMeansTokenizer(2, 4)
    for use in (
        lambda: tokenizer.encode(x),
        lambda: tokenizer.semantic_ids,
        tokenizer.report,
        lambda: tokenizer.save(tmp_path),
    ):
        with pytest.raises(RuntimeError, match=r"is not fitted. Call fit"):
            use()
    for bad, message in (
        (x[0], r"of shape \[16\]; floats of shape \[N, D\]"),
        (x.astype(int), "torch.int64 of shape"),
        (x[:0], "no rows"),
        (np.where(x == x[4, 4], np.nan, x), "row 4 holds NaN"),
    ):
        with pytest.raises(DataError, match=message):
            tokenizer.fit(bad)
    tokenizer.fit(x)
    with pytest.raises(DataError, match=r"15 features, but the tokenizer was fitted on 16"):
        tokenizer.encode(x[:, :15])
    assert tokenizer.encode(x[:0]).shape == (0, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"is a file; a folder is needed"):
        tokenizer.save(tmp_path / "file")


def test_damaged_files(x, tmp_path):
    folder = ResidualKMeansTokenizer(2, 4).fit(x).save(tmp_path / "t")
    with pytest.raises(DataError, match=r"tokenizer.json and tokenizer.safetensors missing"):
        load_tokenizer(tmp_path)
    config, tensors = folder / "tokenizer.json", folder / "tokenizer.safetensors"
    text, data = config.read_text(), tensors.read_bytes()
    for content, message in (
        ("{", "not a tokenizer's description"),
        ("[]", "not a tokenizer's description"),
        (text.replace('"format": 1', '"format": 9'), "format 9"),
        (text.replace("residual-kmeans", "magic"), "kind 'magic'; this version reads"),
        (text.replace('"levels": 2', '"levels": 3'), "do not describe a residual-kmeans"),
        (text.replace('"levels"', '"layers"'), "do not describe a residual-kmeans"),
    ):
        config.write_text(content)
        with pytest.raises(DataError, match=message):
            load_tokenizer(folder)
    config.write_text(text)
    tensors.write_bytes(data[:-4])
    with pytest.raises(DataError, match=r"damaged, or not the file that belongs to tokenizer.json"):
        load_tokenizer(folder)
    tensors.write_bytes(data)
    load_tokenizer(folder)


def transport_cost(assigned, cost):
    return cost[np.arange(len(cost)), assigned].sum()


@pytest.mark.parametrize("rows, columns", [(1, 5), (4, 6), (7, 7), (40, 64)])
def test_transport_is_near_the_best_assignment(rows, columns):
    optimize = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(rows)
    for _ in range(5):
        cost = generator.random((rows, columns)) + generator.random(columns)  # some columns are wanted by all
        assigned = transport(cost)
        assert len(set(assigned.tolist())) == rows
        best = optimize.linear_sum_assignment(cost)[1]
        nearest_first = cost.argmin(1)  # what would collide
        assert transport_cost(nearest_first, cost) <= transport_cost(best, cost) <= transport_cost(assigned, cost)
        assert transport_cost(assigned, cost) <= 1.1 * transport_cost(best, cost)


def test_transport_shares_out_what_does_not_fit_and_skips_missing_columns():
    cost = np.zeros((7, 3))
    assert sorted(np.bincount(transport(cost), minlength=3).tolist()) in ([1, 3, 3], [2, 2, 3])
    cost[:, 1] = np.inf
    assert np.bincount(transport(cost), minlength=3)[1] == 0 and np.bincount(transport(cost)).max() == 4


def test_sinkhorn_moves_only_colliding_prefixes_and_only_the_last_code(x):
    before = ResidualKMeansTokenizer(2, 16, seed=1, collisions="none").fit(x)
    after = ResidualKMeansTokenizer(2, 16, seed=1, collisions="sinkhorn").fit(x)
    old, new = before.semantic_ids, after.semantic_ids
    assert old.shape == new.shape == (300, 2) and np.array_equal(old[:, 0], new[:, 0])
    assert before.codebook_sizes == after.codebook_sizes == [16, 16]
    assert new.max() < 16 and before.report()["collision_rate"] > 0.5
    for prefix in range(16):
        rows = old[:, 0] == prefix
        groups = np.bincount(new[rows, 1], minlength=16)
        collided = len(np.unique(old[rows, 1])) < rows.sum()
        assert groups.max() <= (-(-rows.sum() // 16) if collided else 1)  # as even as it can be
        assert collided or np.array_equal(old[rows], new[rows])
    share = after.report()["collision_rate"]
    assert share < before.report()["collision_rate"] and after.report()["energy"][1] < before.report()["energy"][1]
    assert f"{round(300 * share)} items share their ID" in after.report()["notes"][-1]


def test_sinkhorn_makes_ids_unique_where_codes_suffice(x):
    for tokenizer in (
        ResidualKMeansTokenizer(3, 24, collisions="sinkhorn"),
        RandomTokenizer(2, 64, collisions="sinkhorn"),
        RQVAETokenizer(3, 32, hidden=[16], epochs=10, lr=5e-3, batch_size=100, collisions="sinkhorn"),
        ProductKMeansTokenizer(3, 32, collisions="sinkhorn"),
    ):
        plain = type(tokenizer)(**tokenizer._config() | {"collisions": "none"}).fit(x)
        assert plain.report()["unique_fraction"] < 1  # rows 5 and 7 are equal, if nothing else
        ids = tokenizer.fit(x).semantic_ids
        assert len(np.unique(ids, axis=0)) == 300 and tokenizer.report()["unique_fraction"] == 1, tokenizer
        assert tokenizer.report()["largest_group"] == 1
        assert not any("share their ID" in note for note in tokenizer.report()["notes"])


def test_new_items_get_a_free_code_under_sinkhorn_and_the_same_under_none(x, tmp_path):
    new = np.nextafter(x[:40], np.float32(9))
    tokenizer = ResidualKMeansTokenizer(3, 8, seed=1, collisions="sinkhorn").fit(x)
    ids = load_tokenizer(tokenizer.save(tmp_path / "t")).encode(new)
    assert ids.shape == (40, 3) and np.array_equal(tokenizer.encode(new), ids)
    everything = np.concatenate([tokenizer.semantic_ids, ids])
    taken, z = set(map(tuple, tokenizer.semantic_ids.tolist())), tokenizer._standardise(torch.from_numpy(new))
    wanted = tokenizer._codes(z).numpy()
    for row, (own, code) in enumerate(zip(wanted.tolist(), ids.tolist())):
        free = [k for k in range(8) if (*own[:2], k) not in taken]
        assert code[:2] == own[:2]
        if tuple(own) not in taken or not free:
            assert code == own
        else:
            error = [float((tokenizer._decode(torch.tensor([[*own[:2], k]])) - z[row]).square().sum()) for k in free]
            assert code[2] == free[int(np.argmin(error))]
        taken.add(tuple(code))
    assert len(np.unique(everything, axis=0)) == len(taken)
    none = ResidualKMeansTokenizer(3, 8, seed=1, collisions="none").fit(x)
    assert np.array_equal(none.encode(new), none.semantic_ids[:40])
    assert np.array_equal(none.encode(x), none.semantic_ids)


def test_decode_gives_embeddings_back_level_by_level(tokenizer, x):
    codes = tokenizer.codes(x)
    if tokenizer.kind == "random":
        with pytest.raises(ValueError, match=r"say nothing about the embedding"):
            tokenizer.decode(codes)
        return
    variance = ((x - x.mean(0)) ** 2).sum()
    energy = [1 - ((x - tokenizer.decode(codes[:, :q])) ** 2).sum() / variance for q in range(1, tokenizer.levels + 1)]
    assert tokenizer.report()["energy"] == pytest.approx(energy, abs=1e-3) and max(energy) == energy[-1]
    assert np.array_equal(tokenizer.decode(tokenizer.semantic_ids), tokenizer.decode(codes))
    bad = codes.copy()
    bad[4, 1] = 99
    with pytest.raises(ValueError, match=r"row 4 is .*; the levels have"):
        tokenizer.decode(bad)
    with pytest.raises(ValueError, match=r"of shape \[300\]; integers of shape"):
        tokenizer.decode(codes[:, 0])


def test_product_codes_are_those_of_their_features(x):
    tokenizer = ProductKMeansTokenizer(3, 8, seed=2).fit(x)
    other = x.copy()
    other[:, :6] = x[::-1, :6]  # 16 features: 6, 5 and 5
    codes, moved = tokenizer._codes(tokenizer._standardise(torch.from_numpy(x))), tokenizer.codes(other)
    assert np.array_equal(moved[:, 1:], codes[:, 1:]) and np.array_equal(moved[:, 0], codes.numpy()[::-1, 0])
    with pytest.raises(DataError, match=r"2 features do not split into levels=3"):
        ProductKMeansTokenizer(3, 8).fit(x[:, :2])


def test_a_tree_divides_its_items_evenly_over_the_levels(x):
    tokenizer = HierarchicalKMeansTokenizer(3, 256).fit(x)  # 299 different items: 7, 7 and 7 branches, or a few more
    assert tokenizer.codebook_sizes[0] == 7 and tokenizer.report()["unique_fraction"] >= 299 / 300
    assert "codebook_size allows more" in tokenizer.report()["notes"][0]
    with pytest.raises(ValueError, match=r"no item has that prefix"):
        tokenizer.decode(np.stack(np.meshgrid(*map(np.arange, tokenizer._level_sizes())), -1).reshape(-1, 3))


def test_dead_codewords_are_told(x):
    tokenizer = RandomTokenizer(1, 5000).fit(x)
    dead = 5000 - len(np.unique(tokenizer.semantic_ids[:, 0]))
    assert tokenizer.report()["notes"] == [f"level 1: {dead} of 5000 codewords belong to no item"]


def test_shared_prefixes_in_words():
    codes = np.array([[1, 2, 3], [1, 2, 4], [0, 2, 3], [1, 5, 5], [1, 2, 3], [1, 6, 3]])
    [zero, two] = shared_prefixes(codes, list("abcdef"), [0, 2], most=1)
    assert zero == {
        "item": 0,
        "title": "a",
        "codes": [1, 2, 3],
        "shared": [
            {"levels": 3, "count": 1, "titles": ["e"]},
            {"levels": 2, "count": 1, "titles": ["b"]},
            {"levels": 1, "count": 2, "titles": ["d"]},
        ],
    }
    assert two["shared"] == []
    with pytest.raises(DataError, match=r"item row 6 does not exist"):
        shared_prefixes(codes, list("abcdef"), [6])
    with pytest.raises(DataError, match=r"and 2 titles"):
        shared_prefixes(codes, ["a", "b"], [0])


def test_every_method_has_a_tokenizer():
    made = {name: make_tokenizer(name, 2, 8, seed=3, collisions="none") for name in METHODS}
    assert len({repr(tokenizer) for tokenizer in made.values()}) == len(METHODS)
    for name, tokenizer in made.items():
        assert (tokenizer.levels, tokenizer.codebook_size, tokenizer.seed, tokenizer.collisions) == (2, 8, 3, "none")
        if name.startswith("rqvae-"):
            assert tokenizer.estimator == name.removeprefix("rqvae-") and tokenizer.quantizer == "residual"
    assert made["simvq"].quantizer == "simvq" and made["fsq"].quantizer == "fsq"
    with pytest.raises(DataError, match=r"unknown method bpe; there are: random"):
        make_tokenizer("bpe")
    with pytest.raises(ValueError, match=r"collisions='retry' is unknown. Use 'digit', 'sinkhorn', 'none'"):
        make_tokenizer("rkmeans", collisions="retry")
