"""Room activation: SwiGLU's product against torch, its backward formula against autograd, and bad input."""

from __future__ import annotations

import pytest
import torch

from fastdl import BackendError, ops
from fastdl.reference import activation as reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (0, 4)], ids=str)
def test_is_silu_times_up(shape, dtype):
    gate, up = (4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    y = ops.swiglu(gate, up)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    assert y.dtype == dtype and y.shape == gate.shape
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_extremes_stay_finite():
    gate = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30])
    assert torch.isfinite(ops.swiglu(gate, torch.ones(5))).all()


def test_backward_formula_is_autograd():
    gate, up = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True).unbind(0)
    grad = torch.randn(5, 9, dtype=torch.float64)
    expected = torch.autograd.grad(ops.swiglu(gate, up), (gate, up), grad)
    for got, want in zip(reference.swiglu_backward(grad, gate, up), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck_and_compile():
    gate, up = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(ops.swiglu, (gate, up))
    assert torch.autograd.gradgradcheck(ops.swiglu, (gate, up))
    compiled = torch.compile(ops.swiglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, up), ops.swiglu(gate, up))


def test_bad_input():
    with pytest.raises(ValueError, match="one shape"):
        ops.swiglu(torch.ones(2), torch.ones(3))
    with pytest.raises(TypeError, match="dtype"):
        ops.swiglu(torch.ones(2), torch.ones(2, dtype=torch.float16))
    with pytest.raises(TypeError, match="dtype"):
        ops.swiglu(torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="one device"):
        ops.swiglu(torch.ones(2), torch.ones(2, device="meta"))
    with pytest.raises(BackendError, match="swiglu"):
        ops.swiglu(torch.ones(2), torch.ones(2), backend="cuda")
