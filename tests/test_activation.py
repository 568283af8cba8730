"""Room activation: bias, activation, dropout and residual in one pass, and gated products, in every lane."""

from __future__ import annotations

import math

import pytest
import torch

from fastdl import BackendError, explain, ops
from fastdl.ops.activation import BACKWARD, FORWARD, GLU_BACKWARD, GLU_FORWARD
from fastdl.reference import activation as reference
from fastdl.reference import philox
from fastdl.testing import check, poisoned

F = torch.nn.functional
KINDS = reference.KINDS
# [shape, channel_dim]: no dimension, one element, zero rows, odd widths, more rows than one walk, tiles, images
SHAPES = [((), -1), ((1, 1), -1), ((3, 7), -1), ((0, 8), -1), ((2, 5, 64), -1), ((70, 33), -1), ((2, 1100), -1)]
SHAPES += [((2, 3, 5, 4), 1), ((3, 4, 0), 1), ((2, 2, 300), 1), ((4, 6), 0)]
SHAPES += [((3, 5, 1, 1), 1), ((6, 1), 0), ((3, 0), -1)]  # one position behind the bias's dimension, a bias of nothing


def torch_activation(kind, t, *, slope=0.01, beta=1.0):
    """torch's own op; in float64, where it is the exact answer, gelu without the cancellation in torch's."""
    if kind == "gelu" and t.dtype == torch.float64:
        return t * 0.5 * torch.erfc(t * -(0.5**0.5))
    if kind == "gelu_tanh" and t.dtype == torch.float64:
        return t * torch.sigmoid((8 / torch.pi) ** 0.5 * (t + 0.044715 * t**3))
    return {
        "relu": F.relu,
        "leaky_relu": lambda t: F.leaky_relu(t, slope),
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "swish": lambda t: t * torch.sigmoid(beta * t),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "identity": lambda t: t,
    }[kind](t)


def make(shape, dtype, device="cpu", channel_dim=-1):
    """x, residual, bias. A few numbers alone are positive: the rule is about the largest error and the largest number,
    which one number near a root of f or f' makes a matter of luck."""
    few = math.prod(shape) < 8
    draw = (lambda size: torch.rand(size) + 0.5) if few else torch.randn
    x, residual = ((draw(shape) * (1 if few else 3)).to(device, dtype).requires_grad_() for _ in range(2))
    return x, residual, draw(shape[channel_dim] if shape else 0).to(device, dtype).requires_grad_()


def over(bias, x, channel_dim):
    """bias in the shape that broadcasts to x."""
    behind = x.dim() - 1 - channel_dim % x.dim()
    return bias.reshape(-1, *[1] * behind)


@pytest.mark.parametrize("kind", KINDS)
def test_contract(lane, kind):
    """Every option but dropout: outputs and all gradients, in every dtype and layout of the lane."""
    for dtype in lane.dtypes:
        for shape, channel_dim in SHAPES:
            if lane.name == "emulated cuda" and len(shape) == 2 and dtype == torch.float16:
                continue  # the emulator takes its time; float16 and bfloat16 differ in loads and stores
            x, residual, bias = make(shape, dtype, lane.device, channel_dim)
            options = {"slope": 0.2} if kind == "leaky_relu" else {"beta": 1.7} if kind == "swish" else {}

            def ours(x, residual, bias=None, options=options, channel_dim=channel_dim):
                options = {"residual": residual, "channel_dim": channel_dim, "backend": lane.backend} | options
                return ops.activation(x, kind, bias, **options)

            def theirs(x, residual, bias=None, options=options, channel_dim=channel_dim):
                t = x if bias is None else x + over(bias, x, channel_dim)
                return residual + torch_activation(kind, t, **options)

            check(ours, (x, residual, bias) if shape else (x, residual), peer=theirs)


@pytest.mark.parametrize("given", [(), ("bias",), ("residual",)], ids="-".join)
def test_options(lane, given):
    """Without bias or residual, and with a float32 bias beside the lane's narrow dtype."""
    for dtype, wide in ((lane.dtypes[0], False), (lane.dtypes[1], False), (lane.dtypes[1], True)):
        x, residual, bias = make((5, 2048), dtype, lane.device)
        bias = bias.detach().float().requires_grad_() if wide else bias
        tensors = (x, *(t for name, t in (("residual", residual), ("bias", bias)) if name in given))

        def ours(x, other=None):
            return ops.activation(x, "gelu", **({given[0]: other} if given else {}), backend=lane.backend)

        def theirs(x, other=None):
            y = F.gelu(x + other.to(x.dtype)) if "bias" in given else F.gelu(x)
            return other + y if "residual" in given else y

        check(ours, tensors, peer=theirs)


@pytest.mark.parametrize("shape", [(1,), (5,), (40, 72), (3, 1300)], ids=str)
def test_beta_has_a_gradient(lane, shape):
    """One number out of all elements: its error is measured against the sum of the terms' sizes."""
    for dtype in lane.dtypes[:2]:
        x, grad, bias = make(shape, dtype, lane.device)
        beta = torch.tensor([0.7], device=lane.device).to(dtype).requires_grad_()
        y = ops.activation(x, "swish", bias, beta=beta, backend=lane.backend)
        (found,) = torch.autograd.grad(y, beta, grad)
        t = (x.double() + bias.double()).detach()
        g = torch.sigmoid(t * beta.double().detach())
        terms = grad.double().detach() * t * t * g * (1 - g)
        allowed = 4 * torch.finfo(torch.float32).eps * terms.abs().sum() + torch.finfo(dtype).eps * terms.sum().abs()
        assert found.dtype == dtype and (found.double() - terms.sum()).abs() <= allowed


@pytest.mark.parametrize("kind", ["identity", "gelu"])
@pytest.mark.parametrize("case", ["elements", "image", "channels"])
def test_dropout(lane, kind, case):
    """Same seed, same mask as the reference; the gradient uses it again."""
    shape, channel_dim = ((7, 72), -1) if case == "elements" else ((3, 5, 4, 6), 1)
    for dtype in lane.dtypes:
        x, residual, bias = make(shape, dtype, lane.device, channel_dim)
        options = {"residual": residual, "dropout_p": 0.4, "channel_dropout": case == "channels"}
        results = []
        for backend in (lane.backend, "torch"):
            torch.manual_seed(11)
            y = ops.activation(x, kind, bias, channel_dim=channel_dim, backend=backend, **options)
            results.append((y, *torch.autograd.grad(y, (x, residual, bias), residual)))
        torch.manual_seed(11)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=lane.device)
        mask = philox.keep_mask(seed, shape if case != "channels" else (*shape[:2], 1, 1), 0.4).expand(shape)
        assert 0.1 < (~mask).float().mean() < 0.7
        assert torch.equal(results[0][0][~mask], residual[~mask]) and not results[0][1][~mask].any()
        floor = 16 * torch.finfo(dtype).eps
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=floor, atol=floor * float(theirs.abs().max()))


def test_dropout_ends(lane):
    x, residual, _ = make((3, 16), torch.float32, lane.device)
    options = {"residual": residual, "backend": lane.backend}
    assert torch.equal(ops.activation(x, "tanh", dropout_p=1.0, **options), residual)
    x.data[0, 0] = float("inf")
    assert torch.equal(ops.activation(x, "relu", dropout_p=1.0, **options), residual)


@pytest.mark.parametrize("function", ["swiglu", "geglu", "geglu tanh"])
def test_gated(lane, function):
    """Contiguous tensors and halves of one product, which are strided."""
    kind = {"swiglu": "swish", "geglu": "gelu", "geglu tanh": "gelu_tanh"}[function]

    def ours(gate, up):
        if function == "swiglu":
            return ops.swiglu(gate, up, backend=lane.backend)
        return ops.geglu(
            gate, up, approximate=function.removeprefix("geglu ").replace("geglu", "none"), backend=lane.backend
        )

    for dtype in lane.dtypes:
        for shape in ((), (1,), (3, 7), (0, 4), (2, 3, 64), (66, 40), (2, 1100)):
            gate, up, _ = make(shape, dtype, lane.device)
            check(ours, (gate, up), peer=lambda gate, up: torch_activation(kind, gate) * up)
            if len(shape) > 1:
                gate, up = (t.detach().requires_grad_() for t in torch.cat((gate, up), -1).chunk(2, -1))
                check(ours, (gate, up), peer=lambda gate, up: torch_activation(kind, gate) * up)


def test_strided(lane):
    """Views: a slice of columns, a transposed batch, expanded rows, an image with its channels last."""
    base = torch.randn(6, 3, 90, device=lane.device)
    bias = torch.randn(64, device=lane.device).requires_grad_()
    for view in (
        base[..., 8:72],
        base.transpose(0, 1)[..., :64],
        base[:, :1, :64].expand(6, 4, 64),
        base[::2, 1, 1:65],
    ):
        check(
            lambda x, b: ops.activation(x, "gelu", b, residual=x, backend=lane.backend),
            (view.detach().requires_grad_(), bias),
            peer=lambda x, b: x + F.gelu(x + b),
        )
    image = torch.randn(2, 64, 3, 5, device=lane.device).to(memory_format=torch.channels_last).requires_grad_()
    check(
        lambda x, b: ops.activation(x, "relu", b, residual=x, channel_dim=1, backend=lane.backend),
        (image, bias),
        peer=lambda x, b: x + F.relu(x + b[:, None, None]),
    )
    y = ops.activation(image, "relu", bias, channel_dim=1, backend=lane.backend)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_inf_and_extremes(lane, kind):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([nan, inf, -inf, 1e4, -1e4, 90.0, -90.0, 0.0, -0.0, 1e-6, -1e-6, 1e-30], device=lane.device)
    y = ops.activation(x, kind, backend=lane.backend)
    expected = torch_activation(kind, x.double()).float()  # torch's gelu(inf) is NaN in vectors, inf in float64
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-30)
    finite = x[3:].clone().requires_grad_()
    (dx,) = torch.autograd.grad(ops.activation(finite, kind, backend=lane.backend).sum(), finite)
    (expected,) = torch.autograd.grad(torch_activation(kind, finite).sum(), finite)
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-6)


def test_inference_gives_the_same_bits(lane):
    for dtype in lane.dtypes[:2]:
        x, residual, bias = make((9, 72), dtype, lane.device)
        for kind, options in (("gelu", {}), ("swish", {"beta": 1.5}), ("leaky_relu", {"slope": 0.3})):
            for beside in ({}, {"bias": bias}, {"bias": bias, "residual": residual}):
                given = {"backend": lane.backend, **options, **beside}
                trained = ops.activation(x, kind, **given)
                with torch.no_grad(), poisoned():
                    assert torch.equal(ops.activation(x, kind, **given), trained)
        trained = ops.swiglu(x, residual, backend=lane.backend)
        with torch.no_grad(), poisoned():
            assert torch.equal(ops.swiglu(x, residual, backend=lane.backend), trained)


def test_explain_says_which_back_end_runs(lane, capsys):
    x = torch.randn(2, 8, device=lane.device)
    for room in ("activation", "swiglu", "geglu"):
        assert explain(room, x, x, backend=lane.backend).choice == lane.backend
    assert "geglu" in capsys.readouterr().out


def test_threads_do_not_change_results(level):
    x, residual, bias = make((257, 96), torch.float32)
    image, _, channels = make((3, 7, 40, 60), torch.float32, channel_dim=1)
    beta = torch.ones(1, requires_grad=True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = ops.activation(x, "swish", bias, beta=beta, residual=residual)
        z = ops.activation(image, "relu", channels, channel_dim=1)
        found = (
            *torch.autograd.grad(y, (x, residual, bias, beta), x),
            *torch.autograd.grad(z, (image, channels), image),
        )
        results.append((y, z, *found))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- The maths, and torch's machinery -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    x, residual, bias = make((2, 3, 4), torch.float64, channel_dim=1)
    beta = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)

    def function(x, residual, bias, beta):
        torch.manual_seed(3)
        options = {"beta": beta} if kind == "swish" else {}
        return ops.activation(x, kind, bias, residual=residual, dropout_p=0.3, channel_dim=1, **options)

    assert torch.autograd.gradcheck(function, (x, residual, bias, beta))
    assert torch.autograd.gradgradcheck(function, (x, residual, bias, beta))


@pytest.mark.parametrize("function", [ops.swiglu, ops.geglu])
def test_gradcheck_of_gated(function):
    gate, up, _ = make((4, 3), torch.float64)
    assert torch.autograd.gradcheck(function, (gate, up)) and torch.autograd.gradgradcheck(function, (gate, up))


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_backward_formula_is_autograd(kind):
    x, residual, bias = make((4, 9), torch.float64)
    beta = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    y = reference.activation_forward(x, bias, None, beta, None, kind, 0.0, 0.0, 1, False)
    expected = torch.autograd.grad(y, (x, bias, beta), residual, allow_unused=True)
    swish = KINDS[kind] == "swish"
    got = reference.activation_backward(residual, x, bias, beta, None, kind, 0.0, 0.0, 1, False, True, swish)
    for ours, theirs in zip(got, expected, strict=True):
        if swish or (ours.numel() != 0 and theirs is not None):
            torch.testing.assert_close(ours, theirs)


def test_double_backward(lane):
    x, _, bias = make((3, 40), torch.float32, lane.device)

    def second(y):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, bias))

    ours = second(ops.activation(x, "gelu", bias, backend=lane.backend))
    theirs = second(F.gelu(x + bias))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_opcheck(lane):
    x, residual, bias = (t.detach() for t in make((4, 24), torch.float32, lane.device))
    seed, beta = torch.tensor([5], device=lane.device), torch.ones(1, device=lane.device)
    twin = {"emulated cuda": "emulated", "reference": "torch", "triton interpreted": "triton"}
    name = twin.get(lane.name, "triton" if lane.backend == "triton" else "native")

    def op(of):
        namespace, stem = of.twins()[name].split("::")
        return getattr(getattr(torch.ops, namespace), stem).default

    swish = KINDS.index("swish")
    torch.library.opcheck(op(FORWARD), (x, bias, residual, beta, seed, swish, 1.0, 0.3, 1, False))
    torch.library.opcheck(op(FORWARD), (x.clone().requires_grad_(), None, None, None, None, 0, 1.0, 0.0, 1, False))
    torch.library.opcheck(op(BACKWARD), (residual, x, bias, beta, seed, swish, 1.0, 0.3, 1, False, True, True))
    torch.library.opcheck(op(BACKWARD), (residual, x, None, None, None, 0, 1.0, 0.0, 1, False, False, False))
    torch.library.opcheck(op(GLU_FORWARD), (x, residual, swish))
    torch.library.opcheck(op(GLU_BACKWARD), (x, x, residual, swish))


def test_compile(lane):
    x, residual, bias = make((4, 24), torch.float32, lane.device)

    def step(x, residual, bias):
        y = ops.activation(x, "gelu", bias, residual=residual, backend=lane.backend)
        return ops.swiglu(y, residual, backend=lane.backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(x, residual, bias), compiled(x, residual, bias)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), (x, bias)), torch.autograd.grad(expected.sum(), (x, bias)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_transforms_run_the_reference():
    """torch.func and forward AD; a back end that was asked for by name refuses."""
    x, bias = torch.randn(3, 5), torch.randn(5)
    _, tangent = torch.func.jvp(lambda t: ops.activation(t, "gelu", bias), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.func.jvp(lambda t: F.gelu(t + bias), (x,), (torch.ones_like(x),))[1])
    torch.testing.assert_close(torch.func.vmap(ops.swiglu)(x, x), F.silu(x) * x)
    with pytest.raises(BackendError, match=r"torch\.func"):
        torch.func.vmap(lambda t: ops.activation(t, "gelu", backend="cpu"))(x)


def test_mixed_dtypes():
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    assert ops.activation(x, "relu", residual=torch.randn(3, 16)).dtype == torch.float32
    for bias in (torch.float32, torch.float64, torch.float16):
        assert ops.activation(x, "silu", torch.ones(16, dtype=bias)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], "relu"), {}, TypeError, "x: expected a tensor, got list"),
        ((torch.ones(2, dtype=torch.int64), "relu"), {}, TypeError, "x: expected a dense floating point"),
        (
            (torch.ones(2).to(torch.float8_e5m2), "relu"),
            {},
            TypeError,
            "x: expected a dense floating point.*convert it",
        ),
        ((torch.ones(2), ["relu"]), {}, ValueError, "kind: expected one of relu"),
        ((torch.ones(2), "leaky_relu"), {"slope": "0.1"}, TypeError, "slope: expected a number, got str"),
        ((torch.ones(2), "swish"), {"beta": None}, TypeError, "beta: expected a number, got NoneType"),
        ((torch.ones(2), "relu"), {"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number, got str"),
        ((torch.ones(2), "relu"), {"residual": torch.ones(2).to_sparse()}, TypeError, "residual: expected .*sparse"),
        ((torch.ones(2), "selu"), {}, ValueError, "kind: expected one of relu, .*got 'selu'"),
        ((torch.ones(2, 4), "relu", torch.ones(5)), {}, ValueError, r"bias: expected shape \(4,\)"),
        ((torch.ones(2, 4), "relu", torch.ones(4)), {"channel_dim": 0}, ValueError, r"bias: expected shape \(2,\)"),
        ((torch.ones(()), "relu", torch.ones(1)), {}, ValueError, "bias: expected shape an x with a dimension"),
        ((torch.ones(2, 4), "relu", torch.ones(4, device="meta")), {}, ValueError, "bias: expected the device of x"),
        ((torch.ones(2, 4), "relu", 1.0), {}, TypeError, "bias: expected a floating point tensor or None, got float"),
        ((torch.ones(2), "relu"), {"residual": torch.ones(3)}, ValueError, r"residual: expected shape \(2,\)"),
        ((torch.ones(2), "relu"), {"dropout_p": -0.1}, ValueError, "dropout_p: expected 0 <= p <= 1"),
        ((torch.ones(2), "relu"), {"channel_dim": 1}, ValueError, "channel_dim: expected a dimension"),
        ((torch.ones(2), "relu"), {"channel_dim": 0.5}, TypeError, "channel_dim: expected an int"),
        ((torch.ones(2, 3), "relu"), {"channel_dropout": True}, ValueError, "channel_dropout: expected dimensions"),
        ((torch.ones(2), "swish"), {"beta": torch.ones(2)}, ValueError, "beta: expected one element"),
        ((torch.ones(2), "gelu"), {"beta": 2.0}, ValueError, "beta: belongs to kind 'swish'"),
        ((torch.ones(2), "relu"), {"slope": 0.5}, ValueError, "slope: belongs to kind 'leaky_relu'"),
    ],
)
def test_bad_input(arguments, options, error, message):
    for gradients in (True, False):  # without them a call takes a shorter way, which must not be a more lenient one
        with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
            ops.activation(*arguments, **options)


def test_bad_input_to_gated():
    for arguments, error, message in (
        ((torch.ones(2), torch.ones(3)), ValueError, "up: expected the shape of gate"),
        ((torch.ones(2), torch.ones(2, dtype=torch.float16)), TypeError, "up: expected the dtype of gate"),
        ((torch.ones(2, dtype=torch.int32), torch.ones(2)), TypeError, "gate: expected a dense floating point"),
        ((torch.ones(2), torch.ones(2, device="meta")), ValueError, "up: expected the device of gate"),
        ((torch.ones(2), 1.0), TypeError, "up: expected a tensor, got float"),
    ):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
                ops.swiglu(*arguments)
    with pytest.raises(ValueError, match="approximate: expected 'none' or 'tanh'"):
        ops.geglu(torch.ones(2), torch.ones(2), approximate="erf")
    with pytest.raises(BackendError, match="swiglu"):
        ops.swiglu(torch.ones(2), torch.ones(2), backend="cuda")
    with pytest.raises(BackendError, match="float64"):
        ops.activation(torch.ones(2, dtype=torch.float64), "relu", backend="cpu")
