"""The products over all steps in training (fastdl/ops/_recurrent_products.py) at every CPU level, against torch's."""

from __future__ import annotations

import pytest
import torch

from fastdl.ops._recurrent_products import OUTER, PRODUCT
from fastdl.testing import check, poisoned

# rows, inputs, outputs: one, odd, around a panel, a tile, a pass over rows and over depth, sums of sums
SIZES = [
    (1, 1, 1),
    (5, 7, 17),
    (3, 33, 16),
    (7, 1, 97),
    (193, 40, 70),
    (20, 130, 200),
    (800, 9, 103),
    (1600, 5, 6),
    (20, 2600, 33),
]
EMPTY = [(0, 4, 5), (3, 4, 0)]


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_product(level, sizes, transposed):
    """With and without bias; gradients are the outer product and the product with the other side."""
    rows, inputs, outputs = sizes
    x = torch.randn(rows, inputs, requires_grad=True)
    w = torch.randn((inputs, outputs) if transposed else (outputs, inputs), requires_grad=True)
    bias = torch.randn(outputs, requires_grad=True)
    for tensors in ((x, w), (x, w, bias)):
        ours, theirs = (
            lambda x, w, b=None, twin=twin: PRODUCT[twin](x, w, b, transposed) for twin in ("native", "torch")
        )
        with poisoned():
            check(ours, tensors, peer=theirs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outer(level, sizes):
    depth, rows, cols = sizes
    tensors = torch.randn(depth, rows, requires_grad=True), torch.randn(depth, cols, requires_grad=True)
    with poisoned():
        check(OUTER["native"], tensors, peer=OUTER["torch"])


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(level, sizes):
    rows, inputs, outputs = sizes
    y = PRODUCT["native"](torch.randn(rows, inputs), torch.randn(outputs, inputs), None, False)
    assert y.shape == (rows, outputs)
    c = OUTER["native"](torch.randn(rows, inputs), torch.randn(rows, outputs))
    assert torch.equal(c, torch.zeros(inputs, outputs))


def test_strided(level):
    """Halves of directions, an expanded gradient, a weight that is a transposed view, more dimensions."""
    both, w = torch.randn(6, 40, 2, 21), torch.randn(21, 35)
    x = both[:, :, 1]
    torch.testing.assert_close(PRODUCT["native"](x, w.t(), None, False), x @ w)
    torch.testing.assert_close(PRODUCT["native"](x, w.t(), None, False), PRODUCT["native"](x, w, None, True))
    flat = both.flatten(0, 1)
    ones = torch.ones(()).expand(240, 5)
    torch.testing.assert_close(OUTER["native"](flat[:, 1], ones), flat[:, 1].t() @ ones, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(OUTER["native"](ones, flat[:, 0]), ones.t() @ flat[:, 0], rtol=1e-5, atol=1e-4)


def test_threads_do_not_change_results(level):
    x, w, g = torch.randn(850, 70), torch.randn(90, 70), torch.randn(850, 90)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((PRODUCT["native"](x, w, None, False), OUTER["native"](g, x)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivatives(native):
    x, w, g = (torch.randn(*shape, requires_grad=True) for shape in ((9, 4), (5, 4), (9, 5)))
    found = []
    for twin in ("native", "torch"):
        (dw,) = torch.autograd.grad(PRODUCT[twin](x, w, None, False), w, g, create_graph=True)
        found.append(torch.autograd.grad(dw.square().sum(), (x, g)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(native):
    x, w, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 9, 4), (5, 4), (5,)))
    torch.library.opcheck(torch.ops.fastdl.recurrent_product.default, (x, w, bias, False))
    torch.library.opcheck(torch.ops.fastdl.recurrent_product.default, (x, w.t(), None, True))
    torch.library.opcheck(torch.ops.fastdl.recurrent_outer.default, (x[0], x[1]))


def test_bad_arguments(native):
    """What the wrappers check for memory safety; the readable errors are those of lstm, gru and rnn."""
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=r"w: expected .outputs, inputs."):
        torch.ops.fastdl.recurrent_product(x, w, None, True)
    with pytest.raises(RuntimeError, match="x: expected float32"):
        torch.ops.fastdl.recurrent_product(x.double(), w, None, False)
    with pytest.raises(RuntimeError, match="bias: expected float32"):
        torch.ops.fastdl.recurrent_product(x, w, torch.ones(4), False)
    with pytest.raises(RuntimeError, match="b: expected as many rows"):
        torch.ops.fastdl.recurrent_outer(x, w)


@pytest.mark.parametrize("frozen", ["x", "w", "both"])
def test_only_what_a_gradient_needs_is_kept(native, frozen):
    x, w = torch.randn(3, 4, requires_grad=frozen == "w"), torch.randn(5, 4, requires_grad=frozen == "x")
    bias = torch.randn(5, requires_grad=True)
    y = PRODUCT["native"](x, w, bias, False)
    with torch.no_grad():  # torch's own product does not mind either
        if frozen in ("w", "both"):
            x.mul_(2)
        if frozen in ("x", "both"):
            w.mul_(2)
    assert torch.equal(torch.autograd.grad(y.sum(), bias)[0], torch.full((5,), 3.0))
