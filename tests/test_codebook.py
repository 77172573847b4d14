"""codebook_usage, codeword_sums, kmeans and trie_topk."""

import math
from types import SimpleNamespace

import pytest
import torch

import vqkernels as vq


def test_usage_statistics():
    use = vq.codebook_usage(torch.tensor([[0, 0, 1], [1, 3, -1]]), 5)
    assert use.counts.tolist() == [2, 2, 0, 1, 0]
    assert use.used.item() == pytest.approx(0.6)
    entropy = -(0.4 * math.log(0.4) * 2 + 0.2 * math.log(0.2))
    assert use.entropy.item() == pytest.approx(entropy, rel=1e-6)
    assert use.perplexity.item() == pytest.approx(math.exp(entropy), rel=1e-6)
    assert use.dead.tolist() == [False, False, True, False, True]


def test_usage_of_all_codewords_alike_and_of_nothing():
    assert vq.codebook_usage(torch.arange(64).repeat(3), 64).perplexity.item() == pytest.approx(64, rel=1e-5)
    empty = vq.codebook_usage(torch.full((4,), -1), 8)
    assert (
        empty.counts.sum() == 0
        and empty.used == 0
        and empty.entropy == 0
        and empty.perplexity == 0
        and empty.dead.all()
    )


def test_usage_per_level():
    indices = torch.randint(0, 7, (5, 11, 3))
    per = vq.codebook_usage(indices, 7, dim=-1)
    assert per.counts.shape == (3, 7) and per.perplexity.shape == (3,)
    for level in range(3):
        assert torch.equal(per.counts[level], vq.codebook_usage(indices[..., level], 7).counts)


@pytest.mark.parametrize("op", [lambda i: vq.codebook_usage(i, 4), lambda i: vq.codeword_sums(torch.zeros(3, 2), i, 4)])
def test_index_out_of_range(op):
    with pytest.raises(
        RuntimeError, match=r"index 9 is out of range for codebook_size 4; allowed: -1 \(skipped\) .. 3"
    ):
        op(torch.tensor([0, 9, 1]))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: vq.codebook_usage(torch.zeros(3), 4), TypeError, "integer indices are expected"),
        (
            lambda: vq.codebook_usage(torch.zeros(3, dtype=torch.long), 0),
            ValueError,
            "codebook_size=0; a positive integer",
        ),
        (lambda: vq.codebook_usage(torch.zeros(3, dtype=torch.long), 4, dim=1), ValueError, "dim=1 is not a dimension"),
        (
            lambda: vq.codeword_sums(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), 4),
            ValueError,
            r"expected \[N, D\] with \[N\]",
        ),
        (
            lambda: vq.kmeans(torch.zeros(3, 2), 4),
            ValueError,
            "k=4 centroids need at least 4 finite rows, x has 3 of 3",
        ),
        (lambda: vq.kmeans(torch.zeros(3, 2), 2, init="kmeans||"), ValueError, "allowed: 'k-means\\+\\+', 'random'"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("K", [50, 3000])  # in runs of rows, and by codeword
def test_codeword_sums_do_not_depend_on_threads(K):
    z, indices = torch.randn(20_000, 200), torch.randint(-1, K, (20_000,))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 20):  # the last are more than there are runs of rows, which are cut into columns then
        torch.set_num_threads(threads)
        results.append(vq.codeword_sums(z, indices, K))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0]))
    rows = indices >= 0
    want = torch.zeros(K, 200, dtype=torch.float64).index_add_(0, indices[rows], z[rows].double())
    assert torch.equal(results[0][0], want.float())
    assert torch.equal(results[0][1], indices[rows].bincount(minlength=K))


class TestKMeans:
    def blobs(self):
        centres = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)) * 20
        return torch.cat([c + 0.1 * torch.randn(40, 5) for c in centres]), centres

    def test_finds_separated_blobs(self):
        x, centres = self.blobs()
        km = vq.kmeans(x, 12)
        assert sorted(torch.bincount(km.indices).tolist()) == [40] * 12
        assert vq.nearest_codeword(centres, km.centroids)[1].max() < 0.1

    def test_result_is_consistent_and_reproducible(self):
        x = torch.randn(500, 7)
        a, b = vq.kmeans(x, 20, seed=5), vq.kmeans(x, 20, seed=5)
        assert all(torch.equal(p, q) for p, q in zip(a, b))
        indices, distances = vq.nearest_codeword(x, a.centroids)
        assert torch.equal(indices, a.indices) and torch.allclose(distances.double().sum(), a.inertia)
        assert not torch.equal(vq.kmeans(x, 20, seed=6).centroids, a.centroids)

    def test_converges_to_a_fixed_point(self):
        x = torch.randn(400, 4, dtype=torch.float64)
        km = vq.kmeans(x, 8, iters=200)
        sums, counts = vq.codeword_sums(x, km.indices, 8)
        assert torch.allclose(sums / counts.unsqueeze(-1), km.centroids)

    def test_plus_plus_beats_random_start(self):
        x, _ = self.blobs()
        mean = lambda init: sum(vq.kmeans(x, 12, init=init, iters=0, seed=s).inertia for s in range(10))  # noqa: E731
        assert mean("k-means++") < 0.25 * mean("random")

    def test_as_good_as_scikit_learn(self):
        cluster = pytest.importorskip(
            "sklearn.cluster", reason="scikit-learn is not installed: pip install scikit-learn"
        )
        x = torch.randn(2000, 8)
        ours = min(vq.kmeans(x, 32, seed=s, iters=100).inertia.item() for s in range(3))
        theirs = cluster.KMeans(32, n_init=3, random_state=0).fit(x.numpy()).inertia_
        assert ours < 1.02 * theirs

    def test_non_finite_rows_duplicates_and_given_start(self):
        x = torch.randn(30, 3)
        x[4, 1] = float("nan")
        km = vq.kmeans(x, 5)
        assert km.indices[4] == -1 and km.centroids.isfinite().all() and (km.indices[5:] >= 0).all()
        same = vq.kmeans(torch.ones(10, 3), 4)
        assert same.inertia == 0
        start = torch.randn(5, 3)
        assert torch.equal(vq.kmeans(x[5:], 5, init=start, iters=0).centroids, start)


class TestTrieTopk:
    """The trie of (0,1) (0,3) (2,0) (2,1) (2,4)."""

    trie = SimpleNamespace(
        row_offsets=torch.tensor([0, 2, 4, 7, 7, 7, 7, 7, 7]),
        edge_tokens=torch.tensor([0, 2, 1, 3, 0, 1, 4]),
        edge_children=torch.tensor([1, 2, 3, 4, 5, 6, 7]),
    )

    def test_against_brute_force(self):
        logits, scores, states = torch.randn(6, 3, 5), torch.randn(6, 3), torch.randint(-1, 3, (6, 3))
        got = vq.trie_topk(logits, scores, states, self.trie, 4)
        logp = logits.log_softmax(-1)
        for b in range(6):
            options = []
            for w in range(3):
                s = int(states[b, w])
                for e in range(*self.trie.row_offsets[[s, s + 1]].tolist()) if s >= 0 else ():
                    t = int(self.trie.edge_tokens[e])
                    options.append((-float(scores[b, w] + logp[b, w, t]), w, t, int(self.trie.edge_children[e])))
            options = sorted(options)[:4]
            n = len(options)
            assert got[0][b, :n].tolist() == pytest.approx([-o[0] for o in options])
            assert [got[i][b, :n].tolist() for i in (1, 2, 3)] == [[o[i] for o in options] for i in (1, 2, 3)]
            assert (got[0][b, n:] == -torch.inf).all() and all((got[i][b, n:] == -1).all() for i in (1, 2, 3))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"expected \[B, W, V\], \[B, W\], \[B, W\]"):
            vq.trie_topk(torch.zeros(2, 5), torch.zeros(2), torch.zeros(2, dtype=torch.long), self.trie, 1)
        with pytest.raises(ValueError, match="k=0; a positive integer"):
            vq.trie_topk(torch.zeros(1, 2, 5), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long), self.trie, 0)
