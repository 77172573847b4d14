"""Gradients: losses by gradcheck, estimators against their definition, and the two properties the rotation trick is
built on."""

import pytest
import torch

import vqkernels as vq


def rotation_matrix(z, q):
    """(|q|/|z|) (I - 2 q^ q^T)(I - 2 r^ r^T), r = z^ + q^, built explicitly in float64."""
    z, q = z.double(), q.double()
    zh, qh = z / z.norm(), q / q.norm()
    r = (zh + qh) / (zh + qh).norm()
    eye = torch.eye(len(z), dtype=torch.float64)
    return (q.norm() / z.norm()) * (eye - 2 * torch.outer(qh, qh)) @ (eye - 2 * torch.outer(r, r))


def reflection_matrix(z, q):
    z, q = z.double(), q.double()
    r = z / z.norm() - q / q.norm()
    r = r / r.norm()
    return (q.norm() / z.norm()) * (torch.eye(len(z), dtype=torch.float64) - 2 * torch.outer(r, r))


MATRICES = {
    "rotation": rotation_matrix,
    "reflection": reflection_matrix,
    "ste": lambda z, q: torch.eye(len(z), dtype=torch.float64),
}


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_trick_is_the_transposed_matrix(kind, dtype):
    z, q, g = (torch.randn(30, 11, dtype=dtype) for _ in range(3))
    z.requires_grad_()
    y = vq.rotation_trick(z, q, kind=kind)
    assert torch.equal(y, q)
    y.backward(g)
    want = torch.stack([MATRICES[kind](a, b).T @ c.double() for a, b, c in zip(z.detach(), q, g)])
    assert torch.allclose(
        z.grad.double(),
        want,
        rtol=1e-5 if dtype == torch.float32 else 1e-10,
        atol=1e-5 if dtype == torch.float32 else 1e-10,
    )


def test_matrices_carry_z_onto_q():
    z, q = torch.randn(7).double(), torch.randn(7).double()
    for kind in ("rotation", "reflection"):
        assert torch.allclose(MATRICES[kind](z, q) @ z, q)


def test_rotation_keeps_angle_and_inner_product():
    """angle(z, dz) = angle(q, dq) and <dz, z> = <dq, q> (arXiv 2410.06424)."""
    z, q, g = (torch.randn(200, 16, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    vq.rotation_trick(z, q).backward(g)
    cosine = torch.nn.functional.cosine_similarity
    assert torch.allclose(cosine(z.detach(), z.grad, dim=-1), cosine(q, g, dim=-1))
    assert torch.allclose((z.grad * z.detach()).sum(-1), (g * q).sum(-1))


@pytest.mark.parametrize("kind", ["rotation", "reflection"])
def test_degenerate_rows_are_straight_through(kind):
    z = torch.randn(6, 8)
    q = torch.randn(6, 8)
    z[0] = 0
    q[1] = 0
    q[2] = -z[2] if kind == "rotation" else z[2]
    z[3] = q[3] * 1e-8
    z.requires_grad_()
    g = torch.randn(6, 8)
    vq.rotation_trick(z, q, kind=kind).backward(g)
    assert torch.equal(z.grad[:4], g[:4])
    assert not torch.allclose(z.grad[4:], g[4:])


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_losses_gradcheck(metric):
    """commitment_loss as a function of z and codebook_loss as a function of the codebooks are smooth between decision
    boundaries."""
    z = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    books = [torch.randn(k, 5, dtype=torch.float64) for k in (7, 4)]
    assert torch.autograd.gradcheck(
        lambda z: vq.residual_quantize(z, books, metric=metric, beta=0.3).commitment_loss, (z,)
    )
    first = books[0].clone().requires_grad_()
    # level 2 quantizes what level 1 leaves, and treats it as a constant: only the level's own loss is differentiated
    assert torch.autograd.gradcheck(
        lambda c: vq.residual_quantize(z.detach(), [c, books[1]], metric=metric).codebook_loss[0], (first,)
    )
    assert torch.autograd.gradcheck(lambda c: vq.vector_quantize(z.detach(), c, metric=metric).codebook_loss, (first,))


def reference_loss(z, books, estimator, beta, per_level, weight):
    """Plain autograd: detached matrices, detached codewords."""
    residual, total, commitment, codebook_loss, surrogate = z, 0, [], [], 0
    for book in books:
        code = book[vq.nearest_codeword(residual.detach(), book.detach())[0]]
        commitment.append(beta * (residual - code.detach()).square().mean())
        codebook_loss.append((residual.detach() - code).square().mean())
        if per_level:
            surrogate = surrogate + jacobian(residual, code.detach(), residual, estimator)
        residual = residual - code.detach()
        total = total + code.detach()
    if not per_level:
        surrogate = jacobian(z, total, z, estimator)
    return (
        (surrogate * weight).sum()
        + torch.stack(commitment).sum() * 3
        + (torch.stack(codebook_loss) * torch.arange(1, len(books) + 1)).sum()
    )


def jacobian(z, q, x, estimator):
    return torch.stack([MATRICES[estimator](a.detach(), b) @ c for a, b, c in zip(z, q, x)])


@pytest.mark.parametrize("estimator", MATRICES)
@pytest.mark.parametrize("per_level", [False, True])
def test_residual_quantize_against_plain_autograd(estimator, per_level):
    z = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    books = [torch.randn(k, 6, dtype=torch.float64, requires_grad=True) for k in (9, 5, 12)]
    weight = torch.randn(40, 6, dtype=torch.float64)
    out = vq.residual_quantize(z, books, estimator=estimator, beta=0.4, per_level=per_level)
    loss = (
        (out.quantized * weight).sum() + out.commitment_loss.sum() * 3 + (out.codebook_loss * torch.arange(1, 4)).sum()
    )
    got = torch.autograd.grad(loss, [z, *books])
    want = torch.autograd.grad(reference_loss(z, books, estimator, 0.4, per_level, weight), [z, *books])
    for g, w in zip(got, want):
        assert torch.allclose(g, w, atol=1e-10)
    assert torch.equal(
        out.quantized, books[0][out.indices[:, 0]] + books[1][out.indices[:, 1]] + books[2][out.indices[:, 2]]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vector_quantize_values(dtype):
    z, c = torch.randn(3, 50, 16).to(dtype), torch.randn(20, 16).to(dtype)
    out = vq.vector_quantize(z, c)
    assert out.quantized.dtype == dtype and torch.equal(out.quantized, c[out.indices])
    mse = (z.float() - c[out.indices].float()).square().mean()
    assert torch.allclose(out.codebook_loss, mse, rtol=1e-5) and torch.allclose(
        out.commitment_loss, 0.25 * mse, rtol=1e-5
    )


def test_masked_and_non_finite_rows_take_no_part():
    z, c = torch.randn(30, 6), torch.randn(8, 6, requires_grad=True)
    mask = torch.rand(30) < 0.6
    mask[:2] = True
    z[1, 2] = float("nan")
    keep = mask.clone()
    keep[1] = False
    z.requires_grad_()
    out = vq.vector_quantize(z, c, mask=mask)
    (out.quantized[keep].sum() + out.commitment_loss + out.codebook_loss).backward()
    sub = z.detach()[keep].requires_grad_()
    c2 = c.detach().clone().requires_grad_()
    want = vq.vector_quantize(sub, c2)
    (want.quantized.sum() + want.commitment_loss + want.codebook_loss).backward()
    assert torch.equal(out.indices[keep], want.indices) and (out.indices[~keep] == -1).all()
    assert torch.allclose(out.commitment_loss, want.commitment_loss)
    assert torch.allclose(z.grad[keep], sub.grad) and (z.grad[~keep] == 0).all()
    assert torch.allclose(c.grad, c2.grad)
    assert out.quantized[1].isnan().all() and (out.quantized[~mask] == 0).all()


def test_all_masked_batch_has_zero_loss():
    out = vq.vector_quantize(torch.randn(5, 3), torch.randn(4, 3), mask=torch.zeros(5, dtype=torch.bool))
    assert out.commitment_loss == 0 and out.codebook_loss == 0 and (out.quantized == 0).all()


def test_fsq():
    levels = [8, 5, 4]
    z = (torch.randn(400, 3, dtype=torch.float64) * 2).requires_grad_()
    y = vq.fsq(z, levels)
    count = torch.tensor(levels)
    assert y.abs().max() <= 1 and [len(y[:, i].unique()) for i in range(3)] == levels
    indices = vq.fsq_indices(y, levels)
    assert indices.min() >= 0 and indices.max() < 160
    # the same index means the same values, and the number of distinct values is the number of distinct indices
    assert len(torch.unique(indices)) == len(torch.unique(y.detach(), dim=0))
    half = (count - 1) * 1.001 / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0).double()
    bound = lambda z: (half * (z + (offset / half).atanh()).tanh() - offset) / (count // 2)  # noqa: E731
    assert ((y - bound(z)).abs() <= 0.5 / (count // 2) + 1e-9).all()
    weight = torch.randn_like(y)
    got, want = torch.autograd.grad((y * weight).sum(), z)[0], torch.autograd.grad((bound(z) * weight).sum(), z)[0]
    assert torch.allclose(got, want)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: vq.fsq(torch.zeros(3, 2), [3, 1]), ValueError, "integers >= 2"),
        (lambda: vq.fsq(torch.zeros(3, 2), [3, 3, 3]), ValueError, "must be the number of levels, 3"),
        (lambda: vq.fsq(torch.zeros(3, 4), [2**8] * 4), ValueError, "multiply to 4294967296 codes, more than an int32"),
        (lambda: vq.rotation_trick(torch.zeros(3, 2), torch.zeros(2, 2)), ValueError, "of the same shape"),
        (lambda: vq.rotation_trick(torch.zeros(3, 2), torch.zeros(3, 2), kind="householder"), ValueError, "allowed: 'ste', 'rotation', 'reflection'"),
        (lambda: vq.vector_quantize(torch.zeros(3, 2), torch.zeros(4, 2), estimator="gumbel"), ValueError, "estimator='gumbel' is unknown"),
        (lambda: vq.residual_quantize(torch.zeros(3, 2), []), ValueError, "codebooks is empty"),
        (lambda: vq.residual_quantize(torch.zeros(3, 2), torch.zeros(4, 2)), ValueError, r"expected \[Q, K, D\]"),
        (lambda: vq.residual_quantize(torch.zeros(3, 2), [torch.zeros(4, 2), torch.zeros(4, 3)]), ValueError, r"codebooks\[1\] is \(4, 3\)"),
        (lambda: vq.residual_quantize(torch.zeros(1, 3, 2), [torch.zeros(1, 4, 2), torch.zeros(4, 2)]), ValueError, "heads differ"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
