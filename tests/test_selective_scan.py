"""Room selective_scan in every lane, against a loop of torch's operations by the rule of fastdl.testing."""

from __future__ import annotations

import itertools

import lanes
import pytest
import torch
import torch.nn.functional as F

from fastdl import BackendError, explain, ops
from fastdl.ops.selective_scan import BACKWARD, FORWARD
from fastdl.testing import check

# batch, length, dim, state: odd, one of each, none; more channels than a range has, more steps than a chunk.
SHAPES = [(7, 5, 4, 1), (3, 5, 1, 6), (2, 1, 7, 5), (0, 4, 8, 4), (2, 16, 16, 16), (1, 37, 70, 4), (3, 18, 33, 8)]
SHAPES += [(1, 18, 5, 40), (1, 6, 3, 100), (1, 200, 6, 3)]  # many states; steps enough for segments of time
NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0")


def loop(x, delta, A, B, C, D=None, z=None, delta_bias=None, h0=None, *, softplus=False):
    """By the formulas; dtypes mix as torch promotes them, y has that of x. Returns (y, h)."""
    wide = torch.promote_types(A.dtype, torch.float32)
    batch, _, dim = x.shape
    dt = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias
    dt = F.softplus(dt, threshold=80) if softplus else dt
    h = x.new_zeros(batch, dim, A.shape[1], dtype=wide) if h0 is None else h0
    found = []
    steps = (t.unbind(1) for t in (x.to(wide), dt, B.to(wide), C.to(wide)))
    for now, step, b, c in zip(*steps, strict=True):
        h = torch.exp(step[..., None] * A) * h + (step * now)[..., None] * b[:, None]
        found.append((h * c[:, None]).sum(-1))
    y = torch.stack(found, 1)
    y = y if D is None else y + D * x.to(wide)
    y = y if z is None else y * F.silu(z.to(wide))
    return y.to(x.dtype), h * 1


def make(shape, dtype, device="cpu", *, grad=True):
    """The nine tensors of the op, A, D, delta_bias and h0 in float32 (float64 for float64)."""
    batch, length, dim, state = shape
    wide = torch.promote_types(dtype, torch.float32)
    x, z = (torch.randn(batch, length, dim, device=device) for _ in range(2))
    delta = torch.rand(batch, length, dim, device=device) * 0.5 + 0.2  # above 0 without the softplus too
    B, C = (torch.randn(batch, length, state, device=device) for _ in range(2))
    A, D, bias = (
        -0.2 - torch.rand(dim, state, device=device) * 2,
        torch.randn(dim, device=device),
        torch.rand(dim) * 0.3,
    )
    h0 = torch.randn(batch, dim, state, device=device)
    narrow = [t.to(dtype) for t in (x, delta, B, C, z)]
    others = [t.to(device, wide) for t in (A, D, bias, h0)]
    found = (narrow[0], narrow[1], others[0], narrow[2], narrow[3], others[1], narrow[4], others[2], others[3])
    return tuple(t.requires_grad_(grad) for t in found)


def ours(lane, x, delta, A, B, C, D=None, z=None, delta_bias=None, h0=None, *, softplus=False):
    options = {"z": z, "delta_bias": delta_bias, "h0": h0, "delta_softplus": softplus}
    return ops.selective_scan(x, delta, A, B, C, D, **options, return_state=True, backend=lane.backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(lane, shape):
    """Every option on: outputs and all gradients, in every dtype of the lane; without hardware one, in turn."""
    index, dtypes = SHAPES.index(shape), lane.dtypes[:2] if shape[1] > 20 else lane.dtypes
    if lane.name in ("emulated cuda", "triton interpreted"):
        dtypes = (dtypes[index % len(dtypes)],)
    if lane.name == "triton interpreted":  # some milliseconds a step
        shape = (shape[0], min(shape[1], 34), *shape[2:])
    for dtype in dtypes:
        check(
            lambda *t: ours(lane, *t, softplus=True),
            make(shape, dtype, lane.device),
            peer=lambda *t: loop(*t, softplus=True),
        )


@pytest.mark.parametrize("softplus", [False, True], ids=["plain", "softplus"])
def test_options(lane, softplus):
    """With and without each of D, z, delta_bias and h0."""
    for given in itertools.product((False, True), repeat=4):
        tensors = make((2, 5, 9, 3), lane.dtypes[0], lane.device)
        present = [t for t, has in zip(tensors[5:], given, strict=True) if has]

        def spread(tensors, given=given):
            rest = list(tensors[5:])
            return *tensors[:5], *(rest.pop(0) if has else None for has in given)

        check(
            lambda *t, spread=spread: ours(lane, *spread(t), softplus=softplus),
            (*tensors[:5], *present),
            peer=lambda *t, spread=spread: loop(*spread(t), softplus=softplus),
        )


def test_strided_views(lane):
    """Halves of a projection, as a Mamba block passes them; time first; B and C side by side."""
    for dtype in (lane.dtypes[0], lane.dtypes[1]):
        both = torch.randn(2, 6, 20, device=lane.device).to(dtype)
        x, z = both.chunk(2, -1)
        delta = torch.rand(6, 2, 10, device=lane.device).to(dtype).transpose(0, 1)
        B, C = torch.randn(2, 6, 9, device=lane.device).to(dtype)[..., 1:].chunk(2, -1)
        A = -torch.rand(4, 10, device=lane.device).T
        y = ops.selective_scan(x, delta, A, B, C, z=z, backend=lane.backend)
        expected, _ = loop(x, delta, A, B, C, z=z)
        torch.testing.assert_close(y, expected, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)


def test_inference_gives_the_same_bits(lane):
    tensors = make((2, 35, 20, 4), lane.dtypes[1], lane.device)
    trained = ours(lane, *tensors, softplus=True)
    with torch.no_grad():
        for a, b in zip(ours(lane, *tensors, softplus=True), trained, strict=True):
            assert torch.equal(a, b)


def test_only_one_output_has_a_gradient(lane):
    tensors = make((2, 18, 6, 3), torch.float32, lane.device)
    for index in (0, 1):
        got = torch.autograd.grad(ours(lane, *tensors)[index].sum(), tensors, allow_unused=True)
        expected = torch.autograd.grad(loop(*tensors)[index].sum(), tensors, allow_unused=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-4)


def test_softplus_far_from_zero(lane):
    delta = torch.tensor([-200.0, -60.0, -20.0, -1.0, 0.0, 1.0, 20.0, 60.0], device=lane.device).reshape(1, 1, 8)
    one = torch.ones(1, 1, 1, device=lane.device)
    A = torch.zeros(8, 1, device=lane.device)
    y = ops.selective_scan(torch.ones_like(delta), delta, A, one, one, delta_softplus=True, backend=lane.backend)
    exact = F.softplus(delta.double(), threshold=200)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-37)


def test_nan_goes_through(lane):
    x, delta, A, B, C, *_ = make((1, 40, 20, 3), torch.float32, lane.device, grad=False)
    x[0, 20, 7] = float("nan")
    y = ops.selective_scan(x, delta.abs(), A, B, C, backend=lane.backend)
    bad = y.isnan()
    assert bad[0, 20:, 7].all() and int(bad.sum()) == 20


def test_explain_says_which_back_end_runs(lane, capsys):
    x = torch.randn(2, 3, 8, device=lane.device)
    assert explain("selective_scan", x, backend=lane.backend).choice == lane.backend
    assert "selective_scan" in capsys.readouterr().out


def test_threads_do_not_change_results(level):
    tensors = make((2, 40, 150, 4), torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = ops.selective_scan(*tensors[:6], z=tensors[6], delta_bias=tensors[7], delta_softplus=True)
        results.append((y, *torch.autograd.grad(y, tensors[:8], tensors[0])))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- The maths, and torch's machinery -------------------------------------------------------------------------------


@pytest.mark.parametrize("softplus", [False, True])
def test_gradcheck(softplus):
    tensors = make((2, 3, 2, 2), torch.float64)

    def function(x, delta, A, B, C, D=None, z=None, delta_bias=None, h0=None):
        options = {"z": z, "delta_bias": delta_bias, "h0": h0, "delta_softplus": softplus, "return_state": True}
        return ops.selective_scan(x, delta, A, B, C, D, **options)

    assert torch.autograd.gradcheck(function, tensors) and torch.autograd.gradgradcheck(function, tensors)
    assert torch.autograd.gradcheck(function, tensors[:5])
    for a, b in zip(function(*tensors), loop(*tensors, softplus=softplus), strict=True):
        torch.testing.assert_close(a, b)


def test_double_backward(lane):
    tensors = make((2, 18, 5, 3), torch.float32, lane.device)

    def second(function):
        grads = torch.autograd.grad(function(*tensors)[0].square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    for a, b in zip(second(lambda *t: ours(lane, *t)), second(loop), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_opcheck(lane):
    tensors = make((2, 18, 5, 3), torch.float32, lane.device, grad=False)
    forward, backward = lanes.op_of(FORWARD, lane), lanes.op_of(BACKWARD, lane)
    torch.library.opcheck(forward, (tensors[0].clone().requires_grad_(), *tensors[1:], True, True))
    torch.library.opcheck(forward, (*tensors[:5], None, None, None, None, False, False))
    _, last, states = forward(*tensors, True, True)
    torch.library.opcheck(backward, (tensors[0], last, *tensors, states, True))
    torch.library.opcheck(backward, (tensors[0], None, *tensors[:5], None, None, None, None, states, False))


def test_compile(lane):
    tensors = make((2, 18, 5, 3), torch.float32, lane.device)
    step = lambda *t: ours(lane, *t, softplus=True)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(*tensors), compiled(*tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(got[0].sum(), tensors), torch.autograd.grad(expected[0].sum(), tensors), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_empty(lane):
    """No steps: the state passes through, and so does its gradient."""
    tensors = make((2, 0, 5, 3), torch.float32, lane.device)
    y, last = ours(lane, *tensors, softplus=True)
    assert y.shape == (2, 0, 5) and torch.equal(last, tensors[-1])
    grads = torch.autograd.grad((y, last), tensors, (torch.ones_like(y), torch.ones_like(last)))
    assert torch.equal(grads[-1], torch.ones_like(last)) and not any(g.any() for g in grads[:-1])


GOOD = {"x": (2, 3, 4), "delta": (2, 3, 4), "A": (4, 5), "B": (2, 3, 5), "C": (2, 3, 5)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
        ({"x": torch.zeros(3, 4)}, ValueError, r"x: expected shape \[batch, length, dim\], got \(3, 4\)"),
        ({"A": torch.zeros(3, 5)}, ValueError, r"A: expected shape \[4, state\] for x of shape \(2, 3, 4\)"),
        ({"delta": torch.zeros(2, 3, 5)}, ValueError, r"delta: expected shape \(2, 3, 4\) for x"),
        ({"B": torch.zeros(2, 3, 4)}, ValueError, r"B: expected shape \(2, 3, 5\) for x"),
        ({"C": torch.zeros(2, 3, 5).int()}, TypeError, "C: expected a dense floating point tensor"),
        ({"D": torch.zeros(5)}, ValueError, r"D: expected shape \(4,\) for x"),
        ({"z": torch.zeros(2, 3)}, ValueError, r"z: expected shape \(2, 3, 4\) for x"),
        ({"delta_bias": 1.0}, TypeError, "delta_bias: expected a floating point tensor or None, got float"),
        ({"h0": torch.zeros(2, 4)}, ValueError, r"h0: expected shape \(2, 4, 5\) for x"),
        ({"h0": torch.zeros(2, 4, 5, device="meta")}, ValueError, "h0: expected the device of x, cpu, got meta"),
        ({"x": torch.zeros(2, 3, 4).double(), "backend": "cpu"}, BackendError, "float64: its kernels keep states"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.selective_scan(**{**{name: torch.zeros(shape) for name, shape in GOOD.items()}, **change})
