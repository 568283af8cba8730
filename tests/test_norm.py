"""Room norm: layer norm and RMS norm in every lane, against torch's own ops by the rule of fastdl.testing."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastdl import BackendError, explain, ops
from fastdl.ops.norm import BACKWARD, FORWARD, INFERENCE
from fastdl.reference import norm as reference
from fastdl.reference import philox
from fastdl.testing import check, poisoned

F = torch.nn.functional
# Odd, one element, one row, zero rows; widths that take each kernel: one warp, a block, a stream.
SHAPES = [(1, 1), (3, 7), (0, 8), (2, 5, 64), (1, 24), (4, 33), (5, 256), (37, 40), (3, 520), (2, 1000), (2, 2048)]
WIDE = [(2, 4096), (1, 5003), (1, 17408), (2, 131072)]
KINDS = ("layer", "rms")
GIVEN = [
    (kind, *(name for name, on in zip(("weight", "bias", "residual"), chosen, strict=True) if on))
    for kind in KINDS
    for chosen in itertools.product((False, True), repeat=3)
    if not (kind == "rms" and chosen[1])  # RMS norm has no bias
]


def make(shape, dtype, device="cpu", *, grad=True, weights=None):
    """x, residual, weight, bias."""
    weights = weights or dtype
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device=device).to(weights) for _ in range(2))
    return tuple(t.requires_grad_(grad) for t in (x, residual, weight, bias))


def torch_norm(kind, x, weight=None, bias=None, *, eps=1e-5, residual=None, offset=0.0):
    """torch's own ops, rounding where they round: (y, s)."""
    s = x if residual is None else residual + x
    if kind == "layer":
        return F.layer_norm(s, s.shape[-1:], weight, bias, eps), s
    return F.rms_norm(s, s.shape[-1:], None if weight is None else weight + offset, eps), s


def run(kind, x, weight=None, bias=None, **options):
    if kind == "layer":
        return ops.layer_norm(x, weight, bias, **options)
    return ops.rms_norm(x, weight, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(lane, shape, kind):
    """Every option on: outputs and all gradients, in every dtype of the lane."""
    for dtype in lane.dtypes:
        x, residual, weight, bias = make(shape, dtype, lane.device)

        def ours(x, residual, weight, bias):
            options = {"residual": residual, "return_sum": True, "eps": 1e-5, "backend": lane.backend}
            return run(kind, x, weight, bias, **options)

        def theirs(x, residual, weight, bias):
            return torch_norm(kind, x, weight, bias if kind == "layer" else None, residual=residual)

        check(ours, (x, residual, weight, bias), peer=theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide_rows(lane, shape, kind):
    if shape[-1] > 100_000 and lane.name in ("emulated cuda", "triton interpreted"):
        pytest.skip("a minute without a GPU, in the kernel that 17,408 columns take too")
    x, residual, weight, bias = make(shape, lane.dtypes[1], lane.device)
    check(
        lambda x, r, w, b: run(kind, x, w, b, residual=r, return_sum=True, eps=1e-5, backend=lane.backend),
        (x, residual, weight, bias),
        peer=lambda x, r, w, b: torch_norm(kind, x, w, b if kind == "layer" else None, residual=r),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [7, 72, 1100, 5003, 17408])
def test_inference_gives_the_same_bits(lane, cols, kind):
    """Without gradients another op runs, which stores neither statistics nor, unless asked for, the sum."""
    for dtype in lane.dtypes[:2]:
        x, residual, weight, bias = make((3, cols), dtype, lane.device)
        for beside in (None, residual):
            options = {"residual": beside, "backend": lane.backend}
            trained = run(kind, x, weight, bias, return_sum=True, **options)
            with torch.no_grad(), poisoned():
                both = run(kind, x, weight, bias, return_sum=True, **options)
                alone = run(kind, x, weight, bias, **options)
            for ours, theirs in ((both[0], trained[0]), (both[1], trained[1]), (alone, trained[0])):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("given", GIVEN, ids="-".join)
def test_options(lane, given):
    """With and without weight, bias and residual; float32 weights beside the lane's narrow dtype too."""
    kind = given[0]
    has_weight, has_bias, has_residual = (name in given for name in ("weight", "bias", "residual"))
    for dtype, weights in ((lane.dtypes[0], None), (lane.dtypes[1], None), (lane.dtypes[1], torch.float32)):
        x, residual, weight, bias = make((6, 72), dtype, lane.device, weights=weights)
        tensors = [
            x,
            *(t for t, has in zip((residual, weight, bias), (has_residual, has_weight, has_bias), strict=True) if has),
        ]

        def spread(tensors):
            rest = list(tensors)
            x, residual = rest.pop(0), rest.pop(0) if has_residual else None
            weight, bias = rest.pop(0) if has_weight else None, rest.pop(0) if has_bias else None
            return x, residual, weight, bias

        def ours(*tensors):
            x, residual, weight, bias = spread(tensors)
            options = {"residual": residual, "return_sum": True, "eps": 1e-5, "backend": lane.backend}
            y, s = run(kind, x, weight, bias, **options)
            return (y, s) if has_residual else y

        def theirs(*tensors, weights=weights):
            x, residual, weight, bias = spread(tensors)
            if weights and kind == "layer":  # torch takes float32 for both or neither
                weight = torch.ones_like(bias) if weight is None and bias is not None else weight
                bias = torch.zeros_like(weight) if bias is None and weight is not None else bias
            y, s = torch_norm(kind, x, weight, bias, residual=residual)
            return (y, s) if has_residual else y

        check(ours, tensors, peer=theirs)


def test_weight_offset(lane):
    x, _, weight, _ = make((5, 48), torch.float32, lane.device)
    check(
        lambda x, w: ops.rms_norm(x, w, weight_offset=1.0, eps=1e-5, backend=lane.backend),
        (x, weight),
        peer=lambda x, w: torch_norm("rms", x, w, offset=1.0)[0],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [5, 72, 1100])
def test_dropout(lane, kind, cols):
    """Same seed, same mask as the reference; the gradient uses it again."""
    for dtype in lane.dtypes:
        x, residual, weight, bias = make((7, cols), dtype, lane.device)
        results = []
        for backend in (lane.backend, "torch"):
            torch.manual_seed(11)
            y, s = run(kind, x, weight, bias, residual=residual, dropout_p=0.4, return_sum=True, backend=backend)
            grads = torch.autograd.grad((y, s), (x, residual, weight), (residual, x))
            results.append((y, s, *grads))
        torch.manual_seed(11)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=lane.device)
        dropped = ~philox.keep_mask(seed, x.shape, 0.4)
        assert 0.2 < dropped.float().mean() < 0.6
        assert torch.equal(results[0][1][dropped], residual[dropped]) and not results[0][2][dropped].any()
        floor = 16 * torch.finfo(dtype).eps
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=floor, atol=floor * float(theirs.abs().max()))


def test_only_the_sum_or_only_the_norm_has_a_gradient(lane):
    x, residual, weight, _ = make((4, 40), torch.float32, lane.device)
    y, s = ops.layer_norm(x, weight, residual=residual, return_sum=True, backend=lane.backend)
    (dx,) = torch.autograd.grad(s, x, torch.ones_like(s), retain_graph=True)
    assert torch.equal(dx, torch.ones_like(s))
    got = torch.autograd.grad(y, (x, residual, weight), s)
    expected = torch.autograd.grad(torch_norm("layer", x, weight, residual=residual)[0], (x, residual, weight), s)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_strided_rows(lane):
    """Views: a slice of columns, a transposed batch, expanded rows; gradients come back in the view's shape."""
    base = torch.randn(6, 3, 90, device=lane.device)
    views = [base[..., 8:72], base.transpose(0, 1)[..., :64], base[:, :1, :64].expand(6, 4, 64), base[::2, 1, 1:65]]
    for view in views:
        weight = torch.randn(64, device=lane.device)
        check(
            lambda x, w: ops.layer_norm(x, w, residual=x, backend=lane.backend),
            (view.detach().requires_grad_(), weight.requires_grad_()),
            peer=lambda x, w: torch_norm("layer", x, w, residual=x)[0],
        )


def test_nan_and_inf_go_through(lane):
    x = torch.randn(5, 32, device=lane.device)
    x[1, 3], x[2, 4], x[3] = float("nan"), float("inf"), 0.0
    y = ops.layer_norm(x, backend=lane.backend)
    torch.testing.assert_close(y, F.layer_norm(x, (32,)), equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ops.rms_norm(x, backend=lane.backend), F.rms_norm(x, (32,), eps=1e-6), equal_nan=True, rtol=1e-5, atol=1e-6
    )


def test_large_offset_keeps_its_variance(lane):
    """The variance is summed around the mean: a mean of 10,000 does not drown it."""
    x = torch.randn(4, 512, device=lane.device) + 10000
    y = ops.layer_norm(x, backend=lane.backend)
    torch.testing.assert_close(y.double(), F.layer_norm(x.double(), (512,)), rtol=2e-3, atol=2e-3)


def test_explain_says_which_back_end_runs(lane, capsys):
    x = torch.randn(2, 8, device=lane.device)
    assert explain("layer_norm", x, backend=lane.backend).choice == lane.backend
    assert "layer_norm" in capsys.readouterr().out


def test_threads_do_not_change_results(level):
    x, residual, weight, bias = make((257, 96), torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = ops.layer_norm(x, weight, bias, residual=residual)
        results.append((y, *torch.autograd.grad(y, (x, residual, weight, bias), x)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- The maths, and torch's machinery -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    x, residual, weight, bias = make((3, 6), torch.float64)
    tensors = (x, residual, weight, bias) if kind == "layer" else (x, residual, weight)

    def function(x, residual, weight, bias=None):
        torch.manual_seed(3)
        return run(kind, x, weight, bias, residual=residual, dropout_p=0.3, return_sum=True)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    plain = lambda x, weight: run(kind, x, weight)  # noqa: E731
    assert torch.autograd.gradcheck(plain, (x, weight)) and torch.autograd.gradgradcheck(plain, (x, weight))


def test_double_backward(lane):
    x, _, weight, _ = make((3, 40), torch.float32, lane.device)

    def second(norm):
        y = norm(x, weight)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    ours = second(lambda x, w: ops.layer_norm(x, w, backend=lane.backend))
    theirs = second(lambda x, w: F.layer_norm(x, (40,), w))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_opcheck(lane):
    x, residual, weight, bias = make((4, 24), torch.float32, lane.device, grad=False)
    seed = torch.tensor([5], device=lane.device)
    twin = {"emulated cuda": "emulated", "reference": "torch", "triton interpreted": "triton"}
    name = twin.get(lane.name, "triton" if lane.backend == "triton" else "native")
    op = getattr(torch.ops, FORWARD.twins()[name].split("::")[0])
    forward = getattr(op, FORWARD.twins()[name].split("::")[1]).default
    backward = getattr(op, BACKWARD.twins()[name].split("::")[1]).default
    inference = getattr(op, INFERENCE.twins()[name].split("::")[1]).default
    for rms, with_seed in itertools.product((False, True), repeat=2):
        arguments = (x, residual, weight, bias, seed if with_seed else None, 0.3 if with_seed else 0.0, 1e-5, 0.0, rms)
        torch.library.opcheck(forward, arguments)
        _, s, mean, rstd = forward(*arguments)
        torch.library.opcheck(
            backward,
            (residual, x, s, weight, mean, rstd, seed if with_seed else None, arguments[5], 1e-5, 0.0, rms, True, True),
        )
        torch.library.opcheck(forward, (x.requires_grad_(), None, None, None, None, 0.0, 1e-5, 0.0, rms))
        x = x.detach()
        torch.library.opcheck(inference, (x, residual, weight, bias, 1e-5, 0.0, rms, with_seed))


def test_compile(lane):
    x, residual, weight, bias = make((4, 24), torch.float32, lane.device)

    def step(x, residual, weight, bias):
        y, s = ops.layer_norm(x, weight, bias, residual=residual, return_sum=True, backend=lane.backend)
        return ops.rms_norm(y, weight, backend=lane.backend) + s

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(x, residual, weight, bias)
    got = compiled(x, residual, weight, bias)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), (x, weight)), torch.autograd.grad(expected.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_statistics_are_not_differentiable():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    y, s, mean, rstd = FORWARD["torch"](x, None, None, None, None, 0.0, 1e-5, 0.0, False)
    assert y.requires_grad and not (s.requires_grad or mean.requires_grad or rstd.requires_grad)


def test_mixed_dtypes():
    x, residual = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(3, 16)
    y, s = ops.layer_norm(x, residual=residual, return_sum=True)
    assert y.dtype == s.dtype == torch.float32
    for weights in (torch.float32, torch.float64, torch.float16):
        assert ops.rms_norm(x, torch.ones(16, dtype=weights)).dtype == torch.bfloat16
    assert ops.layer_norm(x, torch.ones(16), torch.zeros(16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_ends():
    x = torch.randn(3, 16)
    torch.testing.assert_close(ops.layer_norm(x, dropout_p=0.0, return_sum=True)[1], x)
    assert not ops.layer_norm(x, dropout_p=1.0, return_sum=True)[1].any()


def test_reference_for_other_rooms():
    x, weight = torch.randn(2, 3, 16), torch.randn(16)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6))


def test_philox_is_the_published_one():
    """Known answers of Random123 (philox4x32-10): counter and key all zero, and all ones."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(w) for w in philox.philox(zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    u = philox.uniform(torch.tensor([123]), torch.arange(100000))
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1 and abs(float(u.mean()) - 0.5) < 0.01
    assert int((philox.uniform(torch.tensor([123]), torch.arange(2**32, 2**32 + 9)) == u[:9]).sum()) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "x: expected a tensor, got list"),
        (
            (torch.ones(2, 4).to(torch.float8_e5m2),),
            TypeError,
            "x: expected a dense .*, got torch.float8_e5m2",
        ),
        ((torch.ones(2, 4).to_sparse(),), TypeError, "x: expected a dense .* layout torch.sparse_coo"),
        ((torch.ones(2, 4), torch.ones(4).to_sparse()), TypeError, "weight: expected .* layout torch.sparse_coo"),
        ((torch.ones(2, 4, dtype=torch.int64),), TypeError, "x: expected a dense floating point"),
        ((torch.ones(()),), ValueError, "x: expected shape"),
        ((torch.ones(2, 0),), ValueError, "at least 1"),
        ((torch.ones(2, 4), torch.ones(5)), ValueError, r"weight: expected shape \(4,\)"),
        ((torch.ones(2, 4), torch.ones(1, 4)), ValueError, r"weight: expected shape \(4,\)"),
        ((torch.ones(2, 4), torch.ones(4, dtype=torch.int32)), TypeError, "weight: expected a floating point"),
        ((torch.ones(2, 4), torch.ones(4, device="meta")), ValueError, "weight: expected the device of x"),
        ((torch.ones(2, 4), None, torch.ones(3)), ValueError, r"bias: expected shape \(4,\)"),
        ((torch.ones(2, 4), None, 0.0), TypeError, "bias: expected a floating point tensor or None, got float"),
    ],
)
def test_bad_input(arguments, error, message):
    for gradients in (True, False):  # without them a call takes a shorter way, which must not be a more lenient one
        with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
            ops.layer_norm(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps: expected a number > 0"),
        ({"eps": float("nan")}, "eps"),
        ({"dropout_p": 1.5}, "dropout_p: expected 0 <= p <= 1"),
        ({"residual": torch.ones(4)}, r"residual: expected shape \(1, 4\)"),
    ],
)
def test_bad_options(options, message):
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=message):
            ops.rms_norm(torch.ones(1, 4), **options)


@pytest.mark.parametrize("name", ["eps", "dropout_p", "weight_offset"])
@pytest.mark.parametrize("value", [None, "1", torch.tensor(1.0)], ids=["None", "str", "Tensor"])
def test_options_are_numbers(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected a number, got {type(value).__name__}"):
        ops.rms_norm(torch.ones(1, 4), **{name: value})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.lane("gpu")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_autocast(kind):
    """float32 comes out where it comes out of torch's op."""
    x = torch.randn(3, 16, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert run(kind, x).dtype == torch_norm(kind, x)[0].dtype


def test_back_ends_that_cannot():
    with pytest.raises(BackendError, match=r"rms_norm.*CUDA device"):
        ops.rms_norm(torch.ones(1, 4), backend="cuda")
    with pytest.raises(BackendError, match="float64"):
        ops.layer_norm(torch.ones(1, 4, dtype=torch.float64), backend="cpu")
