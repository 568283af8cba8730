"""QRNN and S4D against loops written from the papers' formulas; lengths; states; torch.compile; bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastdl.nn import QRNN, S4D


def qrnn_loop(layer, x, h0=None):
    """x [length, batch, features] by the formulas of Bradbury et al., a step at a time."""
    directions, last = 2 if layer.bidirectional else 1, []
    for k in range(layer.num_layers):
        outputs = []
        for d, suffix in enumerate(layer._suffixes(k)):
            steps = list(x.unbind(0))[:: -1 if d else 1]
            weight, bias = getattr(layer, f"weight_{suffix}"), getattr(layer, f"bias_{suffix}")
            c = x.new_zeros(x.shape[1], layer.hidden_size) if h0 is None else h0[k * directions + d]
            before, found = torch.zeros_like(x[0]), []
            for now in steps:
                seen = now if layer.window == 1 else torch.cat((before, now), -1)
                z, f, *rest = (seen @ weight.T + bias).chunk(2 + len(layer.pooling[1:]), -1)
                z, f = torch.tanh(z), torch.sigmoid(f)
                c = f * c + (torch.sigmoid(rest[1]) if layer.pooling == "ifo" else 1 - f) * z
                found.append(c if layer.pooling == "f" else torch.sigmoid(rest[0]) * c)
                before = now
            outputs.append(torch.stack(found[:: -1 if d else 1]))
            last.append(c)
        x = torch.cat(outputs, -1)
    return x, torch.stack(last)


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
@pytest.mark.parametrize("window", [1, 2])
def test_qrnn_is_the_papers(lane, window, pooling):
    layer = QRNN(5, 7, 2, window=window, pooling=pooling, bidirectional=True, backend=lane.backend).to(lane.device)
    x = torch.randn(6, 3, 5, device=lane.device, requires_grad=True)
    h0 = torch.randn(4, 3, 7, device=lane.device, requires_grad=True)
    leaves = (x, h0, *layer.parameters())
    for given in ((x,), (x, h0)):
        ours, theirs = layer(*given), qrnn_loop(layer, *given)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        grads = [
            torch.autograd.grad(sum(y.square().sum() for y in out), leaves, allow_unused=True) for out in (ours, theirs)
        ]
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_qrnn_lengths_equal_each_sequence_alone(lane):
    lengths = torch.tensor([6, 1, 0, 4], device=lane.device)
    windows = (2,) if lane.name == "triton interpreted" else (1, 2)
    for window, pooling, batch_first in itertools.product(windows, ("fo", "ifo"), (False, True)):
        options = {"window": window, "pooling": pooling, "bidirectional": True, "batch_first": batch_first}
        layer = QRNN(5, 6, 2, **options, backend=lane.backend).to(lane.device)
        x, h0 = torch.randn(4, 6, 5, device=lane.device), torch.randn(4, 4, 6, device=lane.device)
        y, last = layer(x if batch_first else x.transpose(0, 1), h0, lengths=lengths)
        y = y if batch_first else y.transpose(0, 1)
        for n, steps in enumerate(lengths.tolist()):
            alone = x[n, :steps]
            one, state = layer(alone, h0[:, n]) if steps else (y.new_zeros(0, 12), h0[:, n])
            torch.testing.assert_close(y[n, :steps], one, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(last[:, n], state, rtol=1e-5, atol=1e-6)
            assert not y[n, steps:].any()


def test_qrnn_segments_and_empty_input():
    layer = QRNN(4, 5, 2)
    x = torch.randn(9, 2, 4)
    whole, last = layer(x)
    first, state = layer(x[:5])
    second, state = layer(x[5:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(state, last)
    for window in (1, 2):
        layer = QRNN(4, 5, window=window)
        y, state = layer(x[:0], h0 := torch.randn(1, 2, 5))
        assert y.shape == (0, 2, 5) and torch.equal(state, h0)
        assert layer(x[:, :0])[0].shape == (9, 0, 5)


def test_qrnn_dropout_and_zoneout():
    layer = QRNN(4, 64, 2, zoneout=0.5, dropout=0.5)
    x = torch.randn(20, 3, 4)
    torch.manual_seed(1)
    y, _ = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x)[0], y) and not torch.equal(layer(x)[0], y)
    layer.eval()
    torch.testing.assert_close(layer(x)[0], qrnn_loop(layer, x)[0])
    kept = QRNN(4, 64, pooling="f", zoneout=0.5)
    c = kept(x)[0]
    same = (c[1:] == c[:-1]).float().mean()
    assert 0.4 < same < 0.6


def test_qrnn_gradcheck():
    layer = QRNN(3, 4, window=2, bidirectional=True).double()
    x, h0 = torch.randn(3, 2, 3).double().requires_grad_(), torch.randn(2, 2, 4).double().requires_grad_()
    lengths = torch.tensor([3, 2])
    function = lambda x, h0: layer(x, h0, lengths=lengths)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, h0)) and torch.autograd.gradgradcheck(function, (x, h0))


def test_modules_compile(lane):
    x = torch.randn(5, 3, 4, device=lane.device)
    qrnn = QRNN(4, 6, 2, window=2, bidirectional=True, backend=lane.backend).to(lane.device)
    s4d = S4D(4, 8, mode="scan", backend=lane.backend).to(lane.device)
    lengths = torch.tensor([5, 2, 0], device=lane.device)
    for module, options in ((qrnn, {"lengths": lengths}), (s4d, {"return_state": True})):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got, expected = compiled(x, **options), module(x, **options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        parameter = next(module.parameters())
        for a, b in zip(
            torch.autograd.grad(got[0].sum(), parameter), torch.autograd.grad(expected[0].sum(), parameter), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_modules_in_16_bits(lane):
    dtype = lane.dtypes[1]
    x = torch.randn(5, 3, 4, device=lane.device, dtype=dtype)
    qrnn = QRNN(4, 6, backend=lane.backend).to(lane.device)
    expected = qrnn(x.float())
    for got, want in zip(qrnn.to(dtype)(x), expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.03)
    s4d = S4D(4, 8, mode="scan", backend=lane.backend).to(lane.device)
    torch.testing.assert_close(s4d(x).float(), s4d(x.float()), rtol=0.02, atol=0.02)


def s4d_loop(layer, u):
    """y by the continuous system of Gu et al., discretised with matrices' formulas for one state, complex128."""
    A = torch.complex(-layer.log_A_real.double().exp(), layer.A_imag.double())
    C, dt = torch.view_as_complex(layer.C.double()), layer.log_dt.double().exp()[:, None]
    if layer.discretization == "zoh":
        a, b = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        a, b = (1 + dt / 2 * A) / (1 - dt / 2 * A), dt / (1 - dt / 2 * A)
    h, found = torch.zeros(u.shape[0], *A.shape, dtype=torch.complex128, device=u.device), []
    for now in u.double().unbind(1):
        h = a * h + b * now[..., None]
        found.append(2 * (C * h).sum(-1).real + layer.D.double() * now)
    return torch.stack(found, 1), h


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv"])
def test_s4d_is_the_papers(lane, init, discretization):
    layer = S4D(3, 8, init=init, discretization=discretization, glu=False, backend=lane.backend).to(lane.device)
    u = torch.randn(2, 11, 3, device=lane.device)
    expected, last = s4d_loop(layer, u)
    for mode in ("scan", "convolution"):
        layer.mode = mode
        torch.testing.assert_close(layer(u).double(), expected, rtol=1e-4, atol=1e-4)
    first, state = layer(u[:, :6], return_state=True)
    second, state = layer(u[:, 6:], state, return_state=True)
    torch.testing.assert_close(torch.cat((first, second), 1).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.to(torch.complex128), last, rtol=1e-4, atol=1e-4)
    state = None
    for t in range(u.shape[1]):
        y, state = layer.step(u[:, t], state)
        torch.testing.assert_close(y.double(), expected[:, t], rtol=1e-4, atol=1e-4)


def test_s4d_initial_values_are_the_papers():
    lin, inverse = S4D(2, 64), S4D(2, 64, init="inv")
    assert torch.allclose(lin.A_imag[1], math.pi * torch.arange(32))
    n = torch.arange(32)
    assert torch.allclose(inverse.A_imag[0], 64 / math.pi * (64 / (2 * n + 1) - 1))
    assert torch.allclose(lin.log_A_real.exp(), torch.tensor(0.5)) and lin(torch.randn(1, 4, 2)).shape == (1, 4, 2)


def test_s4d_gradients_of_both_modes():
    layer = S4D(3, 4, dropout=0.0).double()
    u = torch.randn(2, 6, 3).double().requires_grad_()
    leaves, grads = (u, *layer.parameters()), []
    for mode in ("scan", "convolution"):
        layer.mode = mode
        grads.append(torch.autograd.grad(layer(u).square().sum(), leaves))
        assert torch.autograd.gradcheck(layer, (u,))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: QRNN(0, 4), ValueError, "input_size: expected an int of at least 1, got 0"),
        (lambda: QRNN(4, 4, window=3), ValueError, "window: expected 1 or 2, got 3"),
        (lambda: QRNN(4, 4, pooling="o"), ValueError, "pooling: expected 'f', 'fo' or 'ifo', got 'o'"),
        (lambda: QRNN(4, 4, zoneout=1.5), ValueError, "zoneout: expected 0 <= p < 1, got 1.5"),
        (lambda: QRNN(4, 4)(torch.zeros(3, 2, 5)), ValueError, r"input: expected shape \[length, batch, 4\], got"),
        (lambda: QRNN(4, 4)(None), TypeError, "input: expected a tensor, got NoneType"),
        (
            lambda: QRNN(4, 4, 2)(torch.zeros(3, 2, 4), torch.zeros(1, 2, 4)),
            ValueError,
            r"hx: expected shape \(2, 2, 4\), got \(1, 2, 4\)",
        ),
        (
            lambda: QRNN(4, 4)(torch.zeros(3, 2, 4), lengths=torch.tensor([4, 1])),
            ValueError,
            r"lengths: expected 0 .. 3, got 4",
        ),
        (
            lambda: QRNN(4, 4)(torch.zeros(3, 2, 4), lengths=torch.tensor([-1, 1])),
            ValueError,
            r"lengths: expected 0 .. 3, got -1",
        ),
        (
            lambda: QRNN(4, 4)(torch.zeros(3, 2, 4), lengths=torch.tensor([1])),
            ValueError,
            r"lengths: expected shape \(2,\), a number for each sequence, got \(1,\)",
        ),
        (lambda: QRNN(4, 4)(torch.zeros(3, 2, 4), lengths=[1, 2]), TypeError, "lengths: expected an int64 or int32"),
        (lambda: S4D(4, 3), ValueError, "d_state: expected an even number of at least 2, got 3"),
        (lambda: S4D(4, init="legs"), ValueError, "init: expected 'lin' or 'inv', got 'legs'"),
        (lambda: S4D(4, dt_min=0.0), ValueError, "dt_min, dt_max: expected 0 < dt_min <= dt_max"),
        (lambda: S4D(4)(torch.zeros(2, 4)), ValueError, r"u: expected shape \[batch, length, 4\], got \(2, 4\)"),
        (
            lambda: S4D(4, 8)(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)),
            ValueError,
            r"state: expected a complex tensor of shape \(2, 4, 4\), got torch.float32",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
