"""Room batch_norm in every lane, against torch's own ops by the rule of fastdl.testing."""

from __future__ import annotations

import itertools

import pytest
import torch
from lanes import op_of

from fastdl import BackendError, explain, ops
from fastdl.ops.batch_norm import BACKWARD, FORWARD
from fastdl.testing import check

F = torch.nn.functional
# Rows without a position, zero rows, short and long channels, odd sizes, more rows than one part.
SHAPES = [
    (5, 7),
    (4, 3, 1),
    (0, 4, 5),
    (2, 3, 0),
    (3, 5, 7),
    (2, 6, 4, 4),
    (3, 4, 5, 13),
    (1, 3, 6, 8),
    (2, 2, 2, 3, 16),
]
LARGE = [(700, 40), (3, 2, 130, 129), (5, 1, 64, 128)]
NAMES = ("weight", "bias", "residual")
GIVEN = [tuple(on) for on in itertools.product((False, True), repeat=3)]


def make(shape, dtype, device="cpu", *, parameters=None, given=(True,) * 3, grad=True):
    """x, then those of weight, bias, residual that are given."""
    c = shape[1]
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(c, device=device).to(parameters or dtype) for _ in range(2))
    rest = [t for t, on in zip((weight, bias, residual), given, strict=True) if on]
    return [t.requires_grad_(grad) for t in (x, *rest)]


def running(channels, device="cpu", dtype=torch.float32):
    return torch.randn(channels, device=device).to(dtype), torch.rand(channels, device=device).to(dtype) + 0.5


def torch_norm(x, mean=None, var=None, weight=None, bias=None, *, residual=None, relu=False, **options):
    """torch's own operations, rounding where they round."""
    if mean is not None and x.dtype == torch.float64:
        mean, var = mean.double(), var.double()
    y = F.batch_norm(x, mean, var, weight, bias, **options)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def both(lane, given=(True,) * 3, statistics=(None, None), **options):
    def split(tensors):
        return tensors[0], dict(zip(itertools.compress(NAMES, given), tensors[1:], strict=True))

    def ours(*tensors):
        x, rest = split(tensors)
        return ops.batch_norm(x, *statistics, backend=lane.backend, **rest, **options)

    def theirs(*tensors):
        x, rest = split(tensors)
        return torch_norm(x, *statistics, **rest, **options)

    return ours, theirs


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(lane, shape, training):
    """Every option on: outputs and all gradients, in every dtype of the lane."""
    for dtype in lane.dtypes:
        statistics = (None, None) if training else running(shape[1], lane.device)
        ours, theirs = both(lane, statistics=statistics, training=training, relu=True)
        tensors = make(shape, dtype, lane.device, parameters=torch.float32)
        if not tensors[0].numel():
            y = ours(*tensors)
            y.sum().backward()
            assert y.shape == shape and y.dtype == dtype
            assert all(t.grad.shape == t.shape and not t.grad.any() for t in tensors)
            continue
        check(ours, tensors, peer=theirs)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_many_parts(lane, shape):
    """Long channels, and more rows than one part holds."""
    ours, theirs = both(lane, (True, True, False), training=True)
    for dtype in lane.dtypes[:2]:
        tensors = make(shape, dtype, lane.device, parameters=torch.float32, given=(True, True, False))
        check(ours, tensors, peer=theirs)


@pytest.mark.parametrize("given", GIVEN, ids=lambda g: "-".join(itertools.compress(NAMES, g)) or "none")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_options(lane, given, training):
    """With and without each, with and without ReLU; parameters in the dtype of x too."""
    statistics = (None, None) if training else running(3, lane.device)
    for relu, parameters in ((False, torch.float32), (True, lane.dtypes[1])):
        ours, theirs = both(lane, given, statistics, training=training, relu=relu, eps=1e-3)
        tensors = make((3, 3, 2, 8), lane.dtypes[1], lane.device, parameters=parameters, given=given)

        def peer(*tensors, theirs=theirs):  # torch takes parameters in float32 only
            wide = (t.float() if t.dim() == 1 and t.dtype != torch.float64 else t for t in tensors)
            return theirs(*wide)

        check(ours, tensors, peer=peer)


def test_one_gradient_at_a_time(lane):
    tensors = make((3, 4, 40), torch.float32, lane.device)
    for training, relu in itertools.product((False, True), repeat=2):
        statistics = (None, None) if training else running(4, lane.device)
        ours, theirs = both(lane, statistics=statistics, training=training, relu=relu)
        for wanted in range(4):
            for index, t in enumerate(tensors):
                t.requires_grad_(index == wanted)
            check(ours, tensors, peer=theirs)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, torch.tensor(0.25)], ids=str)
def test_running_statistics(lane, momentum):
    for dtype in (torch.float32, lane.dtypes[1]):
        x = make((4, 3, 5), dtype, lane.device)[0]
        ours, theirs = running(3, lane.device), None
        theirs = [t.clone() for t in ours]
        options = {"training": True}
        momentum = momentum.to(lane.device) if isinstance(momentum, torch.Tensor) else momentum
        ops.batch_norm(x, *ours, momentum=momentum, backend=lane.backend, **options)
        F.batch_norm(x, *theirs, momentum=float(momentum), **options)
        torch.testing.assert_close(ours, tuple(theirs), rtol=1e-5, atol=1e-5)
    before = [t.clone() for t in ours]
    ops.batch_norm(x, *ours, backend=lane.backend)
    ops.batch_norm(x[:0], *ours, training=True, backend=lane.backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def test_strided_inputs(lane):
    """Slices of channels, transposed and expanded images; channels last stay channels last."""
    base = torch.randn(4, 12, 6, 10, device=lane.device)
    ours, theirs = both(lane, (True, False, True), training=True, relu=True)
    for x in (
        base[:, 2:7],
        base.transpose(2, 3)[:, :5],
        base.transpose(0, 1)[:8],
        base[:, :5].contiguous(memory_format=torch.channels_last),
        base[:, :5, 0].transpose(1, 2).contiguous().transpose(1, 2),
        base[:1, :5].expand(3, 5, 6, 10),
    ):
        weight = torch.randn(x.shape[1], device=lane.device)
        tensors = [t.detach().requires_grad_() for t in (x, weight, torch.randn_like(x) * 2)]
        check(ours, tensors, peer=theirs)
    x = base.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.batch_norm(x, training=True, residual=base, backend=lane.backend)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_the_output_may_be_written_to(lane):
    """As ReLU(inplace=True) does behind a norm."""
    x = torch.randn(3, 4, 5, device=lane.device, requires_grad=True)
    ours, theirs = (
        ops.batch_norm(x * 1, training=True, backend=lane.backend).relu_(),
        F.batch_norm(x, None, None, training=True).relu_(),
    )
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, x, x)), (theirs, *torch.autograd.grad(theirs, x, x)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nan_and_inf_go_through(lane):
    for shape in ((3, 5, 8), (2, 5, 40)):
        x = torch.randn(shape, device=lane.device)
        x[0, 0, 3], x[1, 2, 4], x[:, 3] = float("nan"), float("inf"), 0.0
        for relu in (False, True):
            ours, theirs = running(5, lane.device), None
            theirs = [t.clone() for t in ours]
            y = ops.batch_norm(x, *ours, training=True, relu=relu, backend=lane.backend)
            expected = torch_norm(x, *theirs, training=True, relu=relu)
            torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours, tuple(theirs), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_large_offset_keeps_its_variance(lane):
    """A mean of 10,000 does not drown a variance of 1."""
    for shape in ((4, 3, 128), (300, 3)):
        x = torch.randn(shape, device=lane.device) + 10000
        y = ops.batch_norm(x, training=True, backend=lane.backend)
        expected = F.batch_norm(x.double(), None, None, training=True)
        torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)


def test_equal_large_values_have_no_variance(lane):
    """Rounding must not make the variance negative, and y NaN."""
    for shape in ((121, 5), (67, 5, 3), (9, 5, 40)):
        x = torch.tensor([1.0, 1e4, 1e9, -1e12, 1e15], device=lane.device).div(3).view(1, 5, *[1] * (len(shape) - 2))
        ours = running(5, lane.device)
        y = ops.batch_norm(x.expand(shape), *ours, training=True, momentum=1.0, backend=lane.backend)
        assert y.isfinite().all() and (ours[1] >= 0).all()


def test_statistics_may_be_updated_before_the_backward_pass(lane):
    x, weight, bias = make((4, 3, 5), torch.float32, lane.device, given=(True, True, False))
    mean, var = running(3, lane.device)
    y = ops.batch_norm(x, mean, var, weight, bias, backend=lane.backend)
    expected = torch.autograd.grad(y.square().sum(), (x, weight, bias), retain_graph=True)
    ops.batch_norm(x, mean, var, training=True, backend=lane.backend)
    for found, wanted in zip(torch.autograd.grad(y.square().sum(), (x, weight, bias)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_explain_says_which_back_end_runs(lane, capsys):
    x = torch.randn(2, 8, 3, device=lane.device)
    assert explain("batch_norm", x, training=True, backend=lane.backend).choice == lane.backend
    assert "batch_norm" in capsys.readouterr().out


def test_threads_do_not_change_results(level):
    before = torch.get_num_threads()
    for shape in ((9, 70, 9, 11), (600, 70)):
        x, weight, bias, residual = make(shape, torch.float32)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = ops.batch_norm(x, None, None, weight, bias, training=True, residual=residual, relu=True)
            results.append((y, *torch.autograd.grad(y, (x, weight, bias, residual), x)))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- The maths, and torch's machinery -------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradcheck(training, relu):
    tensors = make((3, 2, 3), torch.float64)
    statistics = (None, None) if training else running(2, dtype=torch.float64)

    def function(x, weight, bias, residual):
        return ops.batch_norm(x, *statistics, weight, bias, training=training, residual=residual, relu=relu)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    plain = lambda x: ops.batch_norm(x, *statistics, training=training)  # noqa: E731
    assert torch.autograd.gradcheck(plain, tensors[:1]) and torch.autograd.gradgradcheck(plain, tensors[:1])


def test_double_backward(lane):
    x, weight = make((3, 4, 10), torch.float32, lane.device, given=(True, False, False))

    def second(norm):
        y = norm(x, weight)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    ours = second(lambda x, w: ops.batch_norm(x, None, None, w, training=True, relu=True, backend=lane.backend))
    theirs = second(lambda x, w: F.batch_norm(x, None, None, w, training=True).relu())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_opcheck(lane):
    x, weight, bias, residual = make((3, 4, 5), torch.float32, lane.device, grad=False)
    forward, backward = op_of(FORWARD, lane), op_of(BACKWARD, lane)
    statistics = running(4, lane.device)
    torch.library.opcheck(forward, (x, residual, weight, bias, None, None, 1e-5, True))
    torch.library.opcheck(forward, (x.detach().requires_grad_(), None, None, None, *statistics, 1e-5, False))
    torch.library.opcheck(forward, (x.detach().requires_grad_(), residual, weight, None, None, None, 1e-5, True))
    torch.library.opcheck(backward, (x, x, residual, weight, *statistics, 1e-5, True, True, True, True))
    torch.library.opcheck(backward, (x, x, None, None, *statistics, 1e-5, False, False, False, False))


def test_compile(lane):
    """fullgraph, with the running statistics written in place."""
    for last in (False, True):
        x, weight, bias, residual = make((3, 4, 3, 5), torch.float32, lane.device)
        if last:
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

        def step(x, weight, bias, residual, mean, var):
            options = {"training": True, "residual": residual, "relu": True, "backend": lane.backend}
            return ops.batch_norm(x, mean, var, weight, bias, **options) + x

        ours, expected = running(4, lane.device), None
        theirs = tuple(t.clone() for t in ours)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        expected, got = step(x, weight, bias, residual, *theirs), compiled(x, weight, bias, residual, *ours)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(ours, theirs)
        leaves = (x, weight, bias, residual)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_mixed_dtypes():
    x, residual = torch.randn(3, 4, 6, dtype=torch.bfloat16), torch.randn(3, 4, 6)
    assert ops.batch_norm(x, training=True, residual=residual).dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        mean, var, weight = (torch.ones(4, dtype=dtype) for _ in range(3))
        for training in (True, False):
            assert ops.batch_norm(x, mean, var, weight.requires_grad_(), training=training).dtype == torch.bfloat16
        assert mean.dtype == dtype and float(mean[0].detach()) != 1


X, ONES = torch.ones(2, 4, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0],), {}, TypeError, "x: expected a tensor, got list"),
        ((X.int(), ONES, ONES), {}, TypeError, "x: expected a dense floating point"),
        ((X.to(torch.float8_e5m2), ONES, ONES), {}, TypeError, "x: expected a dense floating point.*convert it"),
        ((X, ONES, ONES.clone().requires_grad_()), {}, ValueError, "running_var: expected .* requires no gradient"),
        ((X, ONES, ONES), {"momentum": ONES}, ValueError, r"momentum: expected a number, or .*got shape \(4,\)"),
        ((torch.ones(4), ONES, ONES), {}, ValueError, r"x: expected shape \[N, C, \*\]"),
        ((X,), {}, ValueError, r"running_mean: expected a tensor \[C\] in evaluation, got None; pass training=True"),
        ((X, ONES), {}, ValueError, "running_var: expected running_mean and running_var, or neither"),
        ((X, None, ONES), {"training": True}, ValueError, "running_mean: expected running_mean and running_var"),
        ((X, torch.ones(3), ONES), {}, ValueError, r"running_mean: expected shape \(4,\)"),
        ((X, ONES, ONES.int()), {}, TypeError, "running_var: expected a floating point tensor"),
        ((X, ONES, ONES, torch.ones(5)), {}, ValueError, r"weight: expected shape \(4,\)"),
        ((X, ONES, ONES, ONES.to("meta")), {}, ValueError, "weight: expected the device of x"),
        ((X, ONES, ONES, None, 1.0), {}, TypeError, "bias: expected a floating point tensor or None, got float"),
        ((X, ONES, ONES), {"residual": X[:1]}, ValueError, r"residual: expected shape \(2, 4, 3\)"),
        ((X, ONES, ONES), {"eps": 0.0}, ValueError, "eps: expected a number > 0"),
        ((X, ONES, ONES), {"eps": "1e-5"}, TypeError, "eps: expected a number, got str"),
        ((X, ONES, ONES), {"momentum": None}, TypeError, "momentum: expected a number, got NoneType"),
        ((X, ONES, ONES), {"momentum": 1.5}, ValueError, "momentum: expected 0 <= momentum <= 1, got 1.5"),
        ((X[:1, :, 0],), {"training": True}, ValueError, "x: expected more than 1 value per channel when training"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.batch_norm(*arguments, **options)


def test_back_ends_that_cannot():
    with pytest.raises(BackendError, match=r"batch_norm.*CUDA device"):
        ops.batch_norm(X, ONES, ONES, backend="cuda")
    with pytest.raises(BackendError, match="float64"):
        ops.batch_norm(X.double(), training=True, backend="cpu")
