"""Room norm, Triton back end: what the contract test does not reach. Interpreted without a GPU, for real with one."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastdl import ops
from fastdl.kernels import configs
from fastdl.reference import norm as reference
from fastdl.reference import philox

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.lane("gpu" if DEVICE == "cuda" else "triton interpreted", "norm"),
]


def assert_near(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        if a.numel():
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))


@pytest.mark.parametrize("seed", [0, 5, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("first", [0, 2**31 - 40, 2**32 - 40, 2**40])
def test_dropout_is_that_of_philox(seed, first):
    """Elements far into a large tensor too, where an index of 32 bits has run out."""
    triton = pytest.importorskip("triton")
    tl = triton.language
    from fastdl.kernels._common import dropout

    # Globals of a kernel must be constants to Triton, or functions.
    @triton.jit
    def kernel(x, seed, y, first, dropout: tl.constexpr, p, scale):
        lane = tl.arange(0, 128)
        index = lane.to(tl.int64) + tl.load(first)
        tl.store(y + lane, dropout(tl.load(x + lane), tl.load(seed), index, p, scale))

    x = torch.randn(128, device=DEVICE)
    y, seeds = torch.empty_like(x), torch.tensor([seed], device=DEVICE)
    at = torch.tensor([first], device=DEVICE)
    kernel[(1,)](x, seeds, y, at, dropout, 0.3, 1 / 0.7)
    kept = philox.uniform(seeds, torch.arange(first, first + 128, device=DEVICE)) >= 0.3
    assert torch.equal(y != 0, kept) and 60 < int(kept.sum()) < 115
    torch.testing.assert_close(y, torch.where(kept, x / 0.7, 0.0))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_sums_over_rows(monkeypatch, stream, rms):
    """More rows than programs, in registers and as streams of small tiles; gradients asked for one by one."""
    pytest.importorskip("triton")
    from fastdl.kernels import norm

    if stream:
        for kernel in ("norm_forward", "norm_backward"):
            monkeypatch.setitem(configs._TABLE, kernel, {})
            monkeypatch.setitem(configs._TABLE, f"{kernel}_stream", {64: configs.Config(1, 1)})
        for kernel in ("norm_columns", "norm_partials"):
            monkeypatch.setitem(configs._TABLE, kernel, {64: configs.Config(4, 4)})
    shape, cols = (18, 140), 140
    x, grad, grad_sum = (torch.randn(shape, device=DEVICE) for _ in range(3))
    weight, bias = torch.randn(cols, device=DEVICE), torch.randn(cols, device=DEVICE)
    seed = torch.tensor([9], device=DEVICE)
    arguments = (x, None, weight, bias, seed, 0.25, 1e-5, 0.5, rms)
    _, s, mean, rstd = outputs = norm.norm_forward(*arguments)
    assert_near(outputs, reference.norm_forward(*arguments))
    for need_weight, need_bias in ((True, True), (True, False), (False, True), (False, False)):
        arguments = (grad, grad_sum, s, weight, mean, rstd, seed, 0.25, 1e-5, 0.5, rms, need_weight, need_bias)
        assert_near(norm.norm_backward(*arguments), reference.norm_backward(*arguments))


def test_gradient_without_strides():
    """sum() gives an expanded gradient, all of whose strides are 0."""
    x, weight = torch.randn(4, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    results = []
    for backend in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        y, s = ops.layer_norm(leaf, weight, residual=x, return_sum=True, backend=backend)
        results.append(torch.autograd.grad(y.sum() + s.sum(), leaf))
    assert_near(*results)


def test_everything_dropped():
    x, residual = torch.randn(3, 16, device=DEVICE), torch.randn(3, 16, device=DEVICE)
    s = ops.rms_norm(x, residual=residual, dropout_p=1.0, return_sum=True, backend="triton")[1]
    assert torch.equal(s, residual)


def test_rows_are_copied_only_without_a_distance():
    pytest.importorskip("triton")
    from fastdl.kernels._common import as_rows

    x = torch.randn(6, 3, 90)
    for view, distance in (
        (x, 90),
        (x[..., 8:72], 90),
        (x[::2, 1], 540),
        (x[0, :1], 90),
        (x[:1, 0].expand(6, 90), 0),
        (x[:, 0, 3], 18 * 15),
    ):
        rows, got = as_rows(view if view.dim() > 1 else view[:, None])
        assert rows.data_ptr() == view.data_ptr() and got == distance
    for view in (x.transpose(0, 1), x.transpose(1, 2), x[:, :1].expand(6, 4, 90), x.flip(2)[..., ::2]):
        rows, got = as_rows(view)
        assert rows.is_contiguous() and got == view.shape[-1] and torch.equal(rows, view)


def test_the_table():
    """Known and unknown architectures; a width finds the tile that holds it."""
    assert configs.config("norm_backward", 75, 2048) != configs.config("norm_backward", 80, 2048)
    assert configs.config("norm_backward", 121, 2048) == configs.config("norm_backward", None, 2048)
    assert configs.block_for("norm_forward", 1) == 64 and configs.block_for("norm_forward", 65) == 128
    assert configs.block_for("norm_forward", 16384) == 16384 and configs.block_for("norm_forward", 16385) is None
    for kernel, table in configs._TABLE.items():
        if "_sequence" in kernel or kernel.startswith(("attention_", "additive_attention_")):
            continue  # warps share the weights of all gates or the scores, and a tile is a part of what they hold
        for block, found in table.items():
            elements = block * found.rows / (32 * found.num_warps)
            assert 8 <= elements <= 32, f"{kernel}[{block}]: {elements} elements a thread"
