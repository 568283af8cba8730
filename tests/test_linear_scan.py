"""Room linear_scan in every lane, against a loop of torch's operations by the rule of fastdl.testing."""

from __future__ import annotations

import itertools

import lanes
import pytest
import torch

from fastdl import BackendError, explain, ops
from fastdl.ops.linear_scan import BACKWARD, FORWARD
from fastdl.testing import check

# Odd, one of each, no batch, no steps, no channels; wide rows; few channels and many steps, where time is cut.
SHAPES = [(1, 1, 1), (2, 3, 7), (0, 4, 8), (3, 0, 5), (2, 4, 0), (2, 9, 64), (3, 33, 40), (1, 70, 17), (2, 5, 1030)]
LONG = [(1, 2500, 5), (2, 1100, 3), (1, 1300, 70)]


def loop(a, b, h0=None, reverse=False):
    """The recurrence as one writes it, rounding where torch rounds."""
    if not b.shape[1]:
        return a * b if h0 is None else a * b * h0[:, None]
    state = torch.zeros_like(b[:, 0]) if h0 is None else h0.to(b.dtype)
    a, b = a.unbind(1), b.unbind(1)
    found = [state] * len(b)
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        state = found[t] = a[t] * state + b[t]
    return torch.stack(found, 1)


def make(shape, dtype, device="cpu", *, grad=True):
    """a in (0, 1) as a forget gate's, complex ones in the unit disc; b; h0."""
    batch, _, channels = shape
    parts = (2,) if dtype.is_complex else ()
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
    a = torch.randn(*shape, *parts, device=device)
    b = torch.randn(*shape, *parts, device=device)
    h0 = torch.randn(batch, channels, *parts, device=device)
    a = torch.tanh(a) * 0.7 if parts else torch.sigmoid(a + 1)
    found = (t.to(real) for t in (a, b, h0))
    return tuple((torch.view_as_complex(t) if parts else t).requires_grad_(grad) for t in found)


def small(lane, shape):
    """Triton's interpreter composes maps one element at a time, 0.1 ms each; its tiles and chunks are small too."""
    batch, length, channels = shape
    return shape if lane.name != "triton interpreted" else (min(batch, 2), min(length, 40), min(channels, 11))


def compare(lane, tensors, *, reverse=False, view=lambda t: t):
    """ours and the loop; complex numbers are passed as pairs, because float64 is made of real tensors only."""
    is_complex = tensors[0].is_complex()
    if is_complex:
        tensors = [torch.view_as_real(t.detach()).clone().requires_grad_(t.requires_grad) for t in tensors]

    def wrapped(function):
        def call(*given):
            given = [view(torch.view_as_complex(t)) if is_complex else view(t) for t in given]
            y = function(*given)
            return torch.view_as_real(y) if is_complex else y

        return call

    peer = wrapped(lambda *given: loop(*given, reverse=reverse))
    ours = wrapped(lambda *given: ops.linear_scan(*given, reverse=reverse, backend=lane.backend))
    return check(ours, tensors, peer=peer)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(lane, shape, reverse):
    """Outputs and all gradients in every dtype of the lane, complex numbers too, with and without h0; without hardware
    in two of them, in turn."""
    index, dtypes = SHAPES.index(shape) + reverse, (*lane.dtypes, torch.complex64)
    if lane.name in ("emulated cuda", "triton interpreted"):
        dtypes = [dtypes[(index + i) % len(dtypes)] for i in range(2)]
    shape = small(lane, shape)
    for dtype in dtypes:
        tensors = make(shape, dtype, lane.device)
        compare(lane, tensors, reverse=reverse)
        compare(lane, tensors[:2], reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_sequences(lane, shape, reverse):
    """Time is cut into chunks where there are few channels."""
    shape = small(lane, shape)
    for dtype in (lane.dtypes[0], lane.dtypes[1], torch.complex64):
        compare(lane, make(shape, dtype, lane.device), reverse=reverse)


def test_time_first_costs_no_copy(lane):
    """Strided views: time first, slices of channels, steps apart; gradients come back in the view's shape."""
    for dtype in (lane.dtypes[0], torch.complex64):
        base = make((6, 5, 30), dtype, lane.device, grad=False)[0]
        views = [
            base.transpose(0, 1),
            base[..., 3:20],
            base[:, ::2],
            base[:, :, 4:5],
            base.transpose(1, 2),
            base.flip(1).transpose(0, 1)[::2, 1:],
        ]
        for view in views:
            b = torch.randn_like(view)
            a = view.clone().requires_grad_()
            expected = ops.linear_scan(a, b, backend="torch")
            got = ops.linear_scan(view.detach().requires_grad_(), b, backend=lane.backend)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_expanded_coefficients(lane):
    """a constant over time, over the batch, over channels: strides of 0; its gradient is summed."""
    _, b, h0 = make((3, 20, 24), torch.float32, lane.device)
    for shape in ((1, 1, 24), (3, 1, 24), (1, 20, 24), (1, 1, 1), (3, 20, 1)):
        a = torch.rand(shape, device=lane.device).requires_grad_()
        y = ops.linear_scan(a, b, h0, backend=lane.backend)
        tensors = [t.detach().double().requires_grad_() for t in (a, b, h0)]
        exact = loop(tensors[0].expand(b.shape), *tensors[1:])
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(y, (a, b, h0), b)
        # Sums of up to 1440 numbers that cancel: a few units of float32 of the largest partial sum.
        for ours, theirs in zip(grads, torch.autograd.grad(exact, tensors, b.double()), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-3 if ours is grads[0] else 1e-5)


def test_dtypes_are_promoted(lane):
    a, b, h0 = make((2, 6, 8), torch.float32, lane.device)
    half = lane.dtypes[1]
    assert ops.linear_scan(a.to(half), b, backend=lane.backend).dtype == torch.float32
    assert ops.linear_scan(a.to(half), b.to(half), h0, backend=lane.backend).dtype == half
    y = ops.linear_scan(a, torch.complex(b, b), h0, backend=lane.backend)
    torch.testing.assert_close(y, loop(a, torch.complex(b, b), h0))
    conjugate = torch.complex(a, b).conj()  # a view that says so, without a copy
    torch.testing.assert_close(
        ops.linear_scan(conjugate, torch.complex(b, b), backend=lane.backend), loop(conjugate, torch.complex(b, b))
    )


def test_states_in_float32(lane):
    """16-bit steps of 2^-12 add up, though a 16-bit sum stands still at 16 and 2."""
    steps = 4000 if lane.name != "triton interpreted" else 500
    b = torch.full((1, steps, 3), 2.0**-8, device=lane.device, dtype=lane.dtypes[1])
    y = ops.linear_scan(torch.ones_like(b), b, torch.full((1, 3), 16.0, device=lane.device), backend=lane.backend)
    torch.testing.assert_close(
        y[0, -1].float(), torch.full((3,), 16 + steps / 256, device=lane.device), rtol=4e-3, atol=0
    )


def test_nan_and_inf_go_through(lane):
    """From the step on where they stand, in their channel alone; an overflowing product meets a state of 0."""
    steps = 400 if lane.name == "triton interpreted" else 1200
    a, b, _ = make((1, steps, 3), torch.float32, lane.device, grad=False)
    b[0, 200, 1], a[0, 300, 2] = float("nan"), float("inf")
    y = ops.linear_scan(a, b, backend=lane.backend)
    assert y[0, :200].isfinite().all() and y[..., 0].isfinite().all()
    assert y[0, 200:, 1].isnan().all() and not y[0, 300:, 2].isfinite().any()
    grown = ops.linear_scan(torch.full_like(a, 2.0), torch.zeros_like(b), backend=lane.backend)
    assert not grown.any()


def test_explain_says_which_back_end_runs(lane, capsys):
    x = torch.randn(2, 3, 8, device=lane.device)
    assert explain("linear_scan", x, x, backend=lane.backend).choice == lane.backend
    assert "linear_scan" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(3, 50, 96), (1, 3000, 20), (1, 1500, 5)], ids=str)
def test_threads_do_not_change_results(level, shape):
    before, results = torch.get_num_threads(), []
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        a, b, h0 = make(shape, dtype)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = ops.linear_scan(a, b, h0)
            results.append((y, *torch.autograd.grad(y, (a, b, h0), b)))
        for other in results[-2:]:
            assert all(torch.equal(x, y) for x, y in zip(results[-3], other, strict=True))
    torch.set_num_threads(before)


# ---- The maths, and torch's machinery -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse, dtype):
    tensors = make((2, 4, 3), dtype)
    function = lambda a, b, h0=None: ops.linear_scan(a, b, h0, reverse=reverse)  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors) and torch.autograd.gradgradcheck(function, tensors)
    assert torch.autograd.gradcheck(function, tensors[:2])
    exact = loop(*tensors, reverse=reverse)
    torch.testing.assert_close(function(*tensors), exact)
    grad = torch.randn_like(exact)
    for ours, theirs in zip(
        torch.autograd.grad(function(*tensors), tensors, grad), torch.autograd.grad(exact, tensors, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_double_backward(lane):
    tensors = make((2, 12, 5), torch.float32, lane.device)

    def second(function):
        grads = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    ours = second(lambda *t: ops.linear_scan(*t, backend=lane.backend))
    for a, b in zip(ours, second(loop), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_opcheck(lane):
    for dtype, reverse in itertools.product((torch.float32, torch.complex64), (False, True)):
        a, b, h0 = make((2, 6, 8), dtype, lane.device, grad=False)
        forward, backward = lanes.op_of(FORWARD, lane), lanes.op_of(BACKWARD, lane)
        torch.library.opcheck(forward, (a.requires_grad_(), b, h0, reverse))
        torch.library.opcheck(forward, (a, b, None, reverse))
        a = a.detach()
        for need in (False, True):
            torch.library.opcheck(backward, (b, a, forward(a, b, h0, reverse), h0, reverse, need))


def test_compile(lane):
    a, b, h0 = make((2, 6, 8), torch.float32, lane.device)

    def step(a, b, h0):
        return ops.linear_scan(a, b, h0, backend=lane.backend) + ops.linear_scan(
            a, b, reverse=True, backend=lane.backend
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(a, b, h0), compiled(a, b, h0)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), (a, b, h0)), torch.autograd.grad(expected.sum(), (a, b, h0)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_transforms_take_the_reference():
    a, b, _ = make((4, 5, 3), torch.float32, grad=False)
    torch.testing.assert_close(
        torch.func.vmap(lambda a, b: ops.linear_scan(a[None], b[None])[0])(a, b), ops.linear_scan(a, b)
    )
    with pytest.raises(BackendError, match="kernels have no rules"):
        torch.func.vmap(lambda a, b: ops.linear_scan(a[None], b[None], backend="cpu")[0])(a, b)


def test_empty(lane):
    b = torch.randn(2, 0, 3, device=lane.device, requires_grad=True)
    h0 = torch.randn(2, 3, device=lane.device, requires_grad=True)
    y = ops.linear_scan(b, b, h0, backend=lane.backend)
    assert y.shape == (2, 0, 3)
    grads = torch.autograd.grad(y.sum(), (b, h0))
    assert grads[0].shape == b.shape and not grads[1].any()


GOOD = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, GOOD), {}, TypeError, "a: expected a tensor, got NoneType"),
        ((GOOD, GOOD.int()), {}, TypeError, "b: expected a dense floating point or complex tensor, got torch.int32"),
        ((GOOD, GOOD[0]), {}, ValueError, r"b: expected shape \[batch, length, channels\], got \(3, 4\)"),
        ((GOOD[:, :2], GOOD), {}, ValueError, r"a: expected shape \(2, 3, 4\) as b, or one that expands"),
        ((GOOD, GOOD, GOOD[:, 0, :2]), {}, ValueError, r"h0: expected shape \(2, 4\) for b of shape \(2, 3, 4\)"),
        ((GOOD, GOOD, GOOD[:, 0].to(torch.complex64)), {}, TypeError, "h0: expected a real tensor for real a and b"),
        ((GOOD.to("meta"), GOOD), {}, ValueError, "a: expected the device of b, cpu, got meta"),
        ((GOOD, GOOD), {"reverse": 1}, TypeError, "reverse: expected True or False, got int"),
        ((GOOD, GOOD), {"backend": "gpu"}, BackendError, "'gpu' is no back end"),
        ((GOOD.double(), GOOD), {"backend": "cpu"}, BackendError, "float64: its kernels keep states in float32"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.linear_scan(*arguments, **options)
