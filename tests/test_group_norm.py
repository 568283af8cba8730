"""Room group_norm in every lane, against torch's own op by the rule of fastdl.testing."""

from __future__ import annotations

import itertools

import pytest
import torch
from lanes import op_of

from fastdl import BackendError, explain, ops
from fastdl.ops.group_norm import BACKWARD, FORWARD
from fastdl.testing import check

F = torch.nn.functional
# (x, groups): one element, one channel a group, one group, no position beyond the channel, short and long channels, odd
# sizes, zero rows, zero positions, groups that several blocks share.
SHAPES = [
    ((1, 2), 1),
    ((2, 12), 3),
    ((2, 80), 2),
    ((0, 4, 5), 2),
    ((2, 4, 0), 2),
    ((3, 4, 7), 4),
    ((2, 10, 3, 3), 5),
    ((2, 8, 4, 8), 2),
    ((1, 6, 5, 13), 1),
    ((2, 4, 2, 3, 16), 2),
]
LARGE = [((1, 2, 130, 129), 1), ((1, 2, 128, 136), 1)]
NAMES = ("weight", "bias", "scale", "shift")
GIVEN = [tuple(on) for on in itertools.product((False, True), repeat=4)]


def make(shape, dtype, device="cpu", *, parameters=None, given=(True,) * 4, grad=True):
    """x, then those of weight, bias, scale, shift that are given."""
    n, c = shape[:2]
    x = torch.randn(shape, device=device).to(dtype)
    rest = [torch.randn(s, device=device).to(parameters or dtype) for s in ((c,), (c,), (n, c), (n, c))]
    return [x.requires_grad_(grad), *(t.requires_grad_(grad) for t, on in zip(rest, given, strict=True) if on)]


def named(tensors, given=(True,) * 4):
    """x and the parameters by name."""
    return tensors[0], dict(zip(itertools.compress(NAMES, given), tensors[1:], strict=True))


def torch_norm(groups, x, weight=None, bias=None, scale=None, shift=None, *, eps=1e-5):
    """torch's own operations, rounding where they round."""
    if not x.numel() or (x.numel() == x.shape[1] and x.shape[1] == groups):
        return x * 1.0  # torch's function refuses these
    if weight is None and bias is not None:  # torch's gradient fails without a weight
        weight = torch.ones_like(bias)
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None:
        y = y * scale.reshape(*scale.shape, *[1] * (x.dim() - 2))
    return y if shift is None else y + shift.reshape(*shift.shape, *[1] * (x.dim() - 2))


def both(lane, groups, given=(True,) * 4, **options):
    def ours(*tensors):
        x, parameters = named(tensors, given)
        return ops.group_norm(x, groups, backend=lane.backend, **parameters, **options)

    def theirs(*tensors):
        x, parameters = named(tensors, given)
        return torch_norm(groups, x, **parameters, **options)

    return ours, theirs


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_contract(lane, shape, groups):
    """Every option on: outputs and all gradients, in every dtype of the lane."""
    for dtype in lane.dtypes:
        ours, theirs = both(lane, groups)
        tensors = make(shape, dtype, lane.device)
        if not tensors[0].numel():
            y = ours(*tensors)
            y.sum().backward()
            assert y.shape == shape and y.dtype == dtype
            assert all(t.grad.shape == t.shape and not t.grad.any() for t in tensors)
            continue
        check(ours, tensors, peer=theirs)


@pytest.mark.parametrize(("shape", "groups"), LARGE, ids=str)
def test_large_groups(lane, shape, groups):
    ours, theirs = both(lane, groups)
    for dtype in (lane.dtypes[0], lane.dtypes[1]):
        check(ours, make(shape, dtype, lane.device), peer=theirs)


@pytest.mark.parametrize("given", GIVEN, ids=lambda g: "-".join(itertools.compress(NAMES, g)) or "none")
def test_options(lane, given):
    """With and without each parameter, in the dtype of x and in float32."""
    ours, theirs = both(lane, 2, given, eps=1e-3)
    narrow = lane.dtypes[1]
    check(ours, make((2, 4, 3, 8), torch.float32, lane.device, given=given), peer=theirs)
    tensors = make((2, 4, 3, 8), narrow, lane.device, given=given, parameters=torch.float32)

    def peer(*tensors):
        return theirs(*(t.to(narrow) for t in tensors))

    check(ours, tensors, peer=peer, exact=theirs)


def test_one_gradient_at_a_time(lane):
    tensors = make((2, 4, 40), torch.float32, lane.device)
    ours, theirs = both(lane, 2)
    for wanted in range(5):
        for index, t in enumerate(tensors):
            t.requires_grad_(index == wanted)
        check(ours, tensors, peer=theirs)


def test_strided_inputs(lane):
    """Slices of channels, transposed and channels-last images, expanded samples."""
    base = torch.randn(4, 12, 6, 10, device=lane.device)
    ours, theirs = both(lane, 4, (True, False, False, False))
    for x in (
        base[:, 2:10],
        base.transpose(2, 3)[:, :8],
        base.transpose(0, 1)[:8],
        base[:, :8].contiguous(memory_format=torch.channels_last),
        base[:1, :8].expand(3, 8, 6, 10),
    ):
        weight = torch.randn(x.shape[1], device=lane.device)
        check(ours, (x.detach().requires_grad_(), weight.requires_grad_()), peer=theirs)


def test_the_output_may_be_written_to(lane):
    """As ReLU(inplace=True) does behind a norm."""
    x = torch.randn(3, 4, 5, device=lane.device, requires_grad=True)
    ours, theirs = ops.group_norm(x * 1, 2, backend=lane.backend).relu_(), F.group_norm(x, 2).relu_()
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, x, x)), (theirs, *torch.autograd.grad(theirs, x, x)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nan_and_inf_go_through(lane):
    x = torch.randn(3, 4, 8, device=lane.device)
    x[0, 0, 3], x[1, 2, 4], x[2, :2] = float("nan"), float("inf"), 0.0
    y = ops.group_norm(x, 2, backend=lane.backend)
    torch.testing.assert_close(y, F.group_norm(x, 2), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_large_offset_keeps_its_variance(lane):
    """A mean of 10,000 does not drown a variance of 1."""
    for shape in ((2, 4, 128), (1, 2, 6000)):
        x = torch.randn(shape, device=lane.device) + 10000
        y = ops.group_norm(x, 2, backend=lane.backend)
        torch.testing.assert_close(y.double(), F.group_norm(x.double(), 2), rtol=2e-3, atol=2e-3)


def test_explain_says_which_back_end_runs(lane, capsys):
    x = torch.randn(2, 8, 3, device=lane.device)
    assert explain("group_norm", x, 2, backend=lane.backend).choice == lane.backend
    assert "group_norm" in capsys.readouterr().out


def test_threads_do_not_change_results(level):
    tensors = make((3, 70, 9, 11), torch.float32)
    x, parameters = named(tensors)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = ops.group_norm(x, 7, **parameters)
        results.append((y, *torch.autograd.grad(y, tensors, x)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- The maths, and torch's machinery -------------------------------------------------------------------------------


def test_gradcheck():
    tensors = make((2, 4, 3), torch.float64)

    def function(*tensors):
        x, parameters = named(tensors)
        return ops.group_norm(x, 2, **parameters)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    plain = lambda x: ops.group_norm(x, 2)  # noqa: E731
    assert torch.autograd.gradcheck(plain, tensors[:1]) and torch.autograd.gradgradcheck(plain, tensors[:1])


def test_double_backward(lane):
    x, weight = make((2, 4, 10), torch.float32, lane.device, given=(True, False, False, False))

    def second(norm):
        y = norm(x, weight)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    ours = second(lambda x, w: ops.group_norm(x, 2, w, backend=lane.backend))
    theirs = second(lambda x, w: F.group_norm(x, 2, w))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_opcheck(lane):
    x, weight, bias, scale, shift = make((2, 4, 5), torch.float32, lane.device, grad=False)
    forward, backward = op_of(FORWARD, lane), op_of(BACKWARD, lane)
    for given in ((weight, bias, scale, shift), (None,) * 4):
        torch.library.opcheck(forward, (x, *given, 2, 1e-5))
        torch.library.opcheck(forward, (x.detach().requires_grad_(), *given, 2, 1e-5))
        _, mean, rstd = forward(x, *given, 2, 1e-5)
        for needs in ((True,) * 4, (False,) * 4):
            torch.library.opcheck(backward, (x, x, *given[:3], mean, rstd, 2, 1e-5, *needs))


def test_compile(lane):
    tensors = make((2, 4, 3, 5), torch.float32, lane.device)

    def step(*tensors):
        x, parameters = named(tensors)
        return ops.group_norm(x, 2, backend=lane.backend, **parameters) + x

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(*tensors), compiled(*tensors)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_mixed_dtypes():
    x = torch.randn(2, 4, 6, dtype=torch.bfloat16)
    for dtype in (torch.float16, torch.float32, torch.float64):
        parameters = named(make((2, 4, 6), dtype, grad=True))[1]
        y = ops.group_norm(x, 2, **parameters)
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and all(t.grad.dtype == dtype for t in parameters.values())


X = torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], 2), {}, TypeError, "x: expected a tensor, got list"),
        ((X.long(), 2), {}, TypeError, "x: expected a dense floating point"),
        ((X.to(torch.float8_e5m2), 2), {}, TypeError, "x: expected a dense floating point.*convert it"),
        ((torch.nested.nested_tensor([X[0]]), 2), {}, TypeError, "x: expected a dense floating point.*nested"),
        ((X, 2, torch.ones(4).to_sparse()), {}, TypeError, "weight: expected a floating point tensor.*sparse"),
        ((torch.ones(4), 2), {}, ValueError, r"x: expected shape \[N, C, \*\]"),
        ((torch.ones(4, 0), 2), {}, ValueError, "C of at least 1"),
        ((X, 2.0), {}, TypeError, "num_groups: expected an int, got float"),
        ((X, 3), {}, ValueError, "num_groups: expected a divisor of the 4 channels of x, got 3"),
        ((X, 0), {}, ValueError, "num_groups: expected a divisor"),
        ((X, 2, torch.ones(5)), {}, ValueError, r"weight: expected shape \(4,\)"),
        ((X, 2, torch.ones(4).int()), {}, TypeError, "weight: expected a floating point tensor or None, got"),
        ((X, 2, torch.ones(4, device="meta")), {}, ValueError, "weight: expected the device of x"),
        ((X, 2, None, 1.0), {}, TypeError, "bias: expected a floating point tensor or None, got float"),
        ((X, 2), {"scale": torch.ones(4)}, ValueError, r"scale: expected shape \(2, 4\)"),
        ((X, 2), {"shift": torch.ones(2, 4, 3)}, ValueError, r"shift: expected shape \(2, 4\)"),
        ((X, 2), {"eps": 0.0}, ValueError, "eps: expected a number > 0"),
        ((X, 2), {"eps": "1e-5"}, TypeError, "eps: expected a number, got str"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.group_norm(*arguments, **options)


def test_triton_refuses_groups_that_its_counters_cannot_hold():
    kernels = pytest.importorskip("fastdl.kernels.group_norm")
    with pytest.raises(RuntimeError, match=r"more than 2\^31 elements in a group"):
        kernels.group_norm_forward(torch.empty(1, 1, 2**31, device="meta"), None, None, None, None, 1, 1e-5)


def test_back_ends_that_cannot():
    with pytest.raises(BackendError, match=r"group_norm.*CUDA device"):
        ops.group_norm(X, 2, backend="cuda")
    with pytest.raises(BackendError, match="float64"):
        ops.group_norm(X.double(), 2, backend="cpu")
