"""Room norm: RMS norm against torch's own op, its backward formula against autograd, and bad input."""

from __future__ import annotations

import pytest
import torch

from fastdl import BackendError, ops
from fastdl.reference import norm as reference

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (0, 8), (4, 33)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_torch_rms_norm(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    y = ops.rms_norm(x, weight, eps=1e-5)
    assert y.dtype == dtype and y.shape == x.shape
    exact = torch.nn.functional.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
    theirs = torch.nn.functional.rms_norm(x, shape[-1:], weight, 1e-5)
    floor = 4 * torch.finfo(dtype).eps * float(exact.abs().max() if exact.numel() else 0)
    assert not y.numel() or (y - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor


def test_without_weight_and_with_other_dtype_of_weight():
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(ops.rms_norm(x), ops.rms_norm(x, torch.ones(16)), rtol=0, atol=0)
    assert ops.rms_norm(x, torch.ones(16)).dtype == torch.bfloat16


def test_backward_formula_is_autograd():
    x, weight = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True), torch.randn(16, dtype=torch.float64)
    weight.requires_grad_()
    grad = torch.randn(2, 3, 16, dtype=torch.float64)
    expected = torch.autograd.grad(ops.rms_norm(x, weight), (x, weight), grad)
    for got, want in zip(reference.rms_norm_backward(grad, x, weight, 1e-6), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert reference.rms_norm_backward(grad, x, None, 1e-6)[1] is None


def test_gradcheck_and_compile():
    x, weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(ops.rms_norm, (x, weight))
    assert torch.autograd.gradgradcheck(ops.rms_norm, (x, weight))
    compiled = torch.compile(lambda a: ops.rms_norm(a, eps=1e-5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.float()), ops.rms_norm(x.float(), eps=1e-5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 4, dtype=torch.int64),), TypeError, "x: expected a floating point"),
        ((torch.ones(()),), ValueError, "x: expected"),
        ((torch.ones(2, 4), torch.ones(5)), ValueError, r"weight: expected shape \(4,\)"),
        ((torch.ones(2, 4), torch.ones(4, dtype=torch.int32)), TypeError, "weight: expected a floating point"),
        ((torch.ones(2, 4), torch.ones(4, device="meta")), ValueError, "weight: expected the device"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(*arguments)


def test_bad_eps_and_backend():
    with pytest.raises(ValueError, match="eps"):
        ops.rms_norm(torch.ones(1, 4), eps=float("nan"))
    with pytest.raises(BackendError, match="rms_norm"):
        ops.rms_norm(torch.ones(1, 4), backend="cpu")
