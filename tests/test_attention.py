"""Room attention: against scaled_dot_product_attention, its backward formula against autograd, and bad input."""

from __future__ import annotations

import pytest
import torch

from fastdl import BackendError, ops
from fastdl.reference import attention as reference

CASES = [  # batch, heads, kv heads, n_q, n_k, head_dim
    ((), 4, 2, 5, 5, 8),
    ((2,), 3, 1, 1, 9, 16),
    ((), 2, 2, 3, 7, 5),
    ((1, 2), 6, 3, 4, 4, 2),
]


def inputs(batch, heads, kv_heads, n_q, n_k, head_dim, dtype=torch.float32):
    q = torch.randn(*batch, heads, n_q, head_dim, dtype=dtype)
    k, v = torch.randn(2, *batch, kv_heads, n_k, head_dim, dtype=dtype)
    return q, k, v


def oracle(q, k, v, causal, scale=None):
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2]) if causal else None
    groups = q.shape[-3] // k.shape[-3]
    k, v = (t.repeat_interleave(groups, dim=-3) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_torchs_attention(case, causal):
    q, k, v = inputs(*case)
    y = ops.attention(q, k, v, causal=causal)
    torch.testing.assert_close(y, oracle(q, k, v, causal), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ops.attention(q, k, v, causal=causal, scale=0.3), oracle(q, k, v, causal, 0.3), rtol=1e-5, atol=1e-5
    )


def test_half_precision_cache_is_summed_in_float32():
    q, k, v = inputs((), 4, 2, 3, 300, 64)
    k, v = k.half(), v.half()
    y = ops.attention(q, k, v)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), oracle(q.double(), k.double(), v.double(), True), rtol=1e-5, atol=1e-6)


def test_cache_gives_what_the_whole_gives():
    q, k, v = inputs((), 4, 2, 9, 9, 8)
    whole = ops.attention(q, k, v)
    torch.testing.assert_close(ops.attention(q[:, 6:], k, v), whole[:, 6:])


def test_query_without_keys_is_zero_and_has_zero_gradient():
    q, k, v = (t.requires_grad_() for t in inputs((), 2, 1, 5, 3, 4, torch.float64))
    y = ops.attention(q, k, v)
    assert not y[:, :2].any() and y[:, 2:].all()
    y.sum().backward()
    assert not q.grad[:, :2].any() and torch.isfinite(k.grad).all()
    assert ops.attention(q[:, :0], k, v).shape == (2, 0, 4)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], ((), 2, 1, 4, 2, 3)], ids=str)
def test_backward_formula_is_autograd(case, causal):
    q, k, v = (t.requires_grad_() for t in inputs(*case, torch.float64))
    y = ops.attention(q, k, v, causal=causal, scale=0.4)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, (q, k, v), grad)
    for got, want in zip(reference.attention_backward(grad, q, k, v, causal, 0.4), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck_and_compile():
    q, k, v = (t.requires_grad_() for t in inputs((), 2, 1, 2, 3, 2, torch.float64))
    assert torch.autograd.gradcheck(ops.attention, (q, k, v))
    assert torch.autograd.gradgradcheck(ops.attention, (q, k, v))
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), ops.attention(q, k, v))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 3)}, ValueError, "q: expected"),
        ({"k": torch.ones(3, 5, 8), "v": torch.ones(3, 5, 8)}, ValueError, "number of heads that divides"),
        ({"k": torch.ones(2, 5, 7)}, ValueError, "k: expected"),
        ({"v": torch.ones(2, 4, 8)}, ValueError, "v: expected"),
        ({"v": torch.ones(2, 5, 8).half()}, TypeError, "v: expected the dtype"),
        ({"k": torch.ones(2, 5, 8, dtype=torch.int8)}, TypeError, "k: expected a floating"),
        ({"k": torch.ones(2, 5, 8, device="meta")}, ValueError, "k: expected the device"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"q": torch.ones(4, 5, 8), "k": torch.ones(2, 5, 8), "v": torch.ones(2, 5, 8)} | change
    with pytest.raises(error, match=message):
        ops.attention(**arguments)


def test_bad_backend():
    q, k, v = inputs(*CASES[0])
    with pytest.raises(BackendError, match="attention"):
        ops.attention(q, k, v, backend="triton")
