"""ONNX: evaluation of every layer, run by onnxruntime with another batch size, against the layer itself."""

import pytest
import torch

pytest.importorskip("onnxscript", reason="pip install onnx onnxruntime onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime onnxscript")

from test_layers_engine import make, tensors  # noqa: E402

import vqkernels as vq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
# every class once: a model is made in seconds
NAMES = (
    "vq-projected-heads vq-cosine-image residual residual-beam residual-implicit grouped-residual hierarchical-image simvq residual-simvq "
    "fsq residual-fsq lfq residual-lfq random-projection latent fsp binary-mapper factorized"
).split()


def run_onnx(layer, example, *inputs, **options):
    batch = torch.export.Dim("batch", min=2, max=512)
    shapes = ({0: batch},) * len(example)
    program = torch.onnx.export(layer, example, dynamo=True, dynamic_shapes=shapes, verbose=False, **options)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), settings)
    names = [node.name for node in session.get_inputs()]
    domains = {node.domain for node in program.model_proto.graph.node}
    assert domains <= {"", "ai.onnx", "pkg.torch.onnx"}, domains
    return [torch.from_numpy(t) for t in session.run(None, dict(zip(names, (t.numpy() for t in inputs))))]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer(name):
    layer, sample = make(name, train=False)
    x = torch.randn(7, *sample)
    got, expected = run_onnx(layer, (torch.randn(4, *sample),), x), tensors(layer(x))
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        if b.is_floating_point():
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(a, b), "indices"


def test_rows_that_do_not_take_part():
    """Masked rows and rows with NaN or infinity, ties, and a codeword that is not finite."""
    layer = vq.VectorQuantize(8, 16, rotation_trick=False).eval()
    layer.codebook[5] = layer.codebook[3]
    layer.codebook[7] = torch.nan
    x = torch.randn(6, 10, 8)
    x[0, :3] = layer.codebook[3]
    x[1, 0, 0], x[1, 1, 2] = torch.nan, torch.inf
    mask = torch.rand(6, 10) < 0.7

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, mask):
            return self.layer(x, mask=mask)

    got = run_onnx(Masked(), (torch.randn(4, 10, 8), torch.ones(4, 10, dtype=torch.bool)), x, mask)
    expected = layer(x, mask=mask)
    assert (expected[1] == -1).any() and (expected[1] == 3).any() and not (expected[1] == 7).any()
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_search_alone(metric):
    """Half precision, double precision and distances."""

    class Search(torch.nn.Module):
        def forward(self, z):
            return vq.nearest_codeword(z, self.codebook, metric=metric)

    for dtype in {"l2": (torch.float32, torch.float64, torch.float16), "cosine": (torch.float32,)}[metric]:
        search = Search()
        search.register_buffer("codebook", torch.randn(16, 8).to(dtype))
        z = torch.randn(30, 8).to(dtype)
        z[0] = 0.0
        (indices, distances), (index, distance) = run_onnx(search, (z[:4],), z), search(z)
        assert torch.equal(indices, index)
        torch.testing.assert_close(distances, distance, rtol=1e-5, atol=1e-6)


def test_training_is_refused():
    class Step(torch.nn.Module):
        def forward(self, z):
            return vq.codeword_sums(z, torch.zeros(z.shape[0], dtype=torch.int64), 4)[0]

    with pytest.raises(Exception, match="codeword_sums"):
        torch.onnx.export(Step(), (torch.randn(3, 2),), dynamo=True, verbose=False)
