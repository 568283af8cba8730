"""Room quant_matmul: the contract of both back ends, gradients, compilation, choice of precision, bad input.

The CPU kernels, level by level, are in test_quant_matmul_cpu.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from random_weights import random_weight as weight
from torch.nn import functional as F

import fastdl
from fastdl import BackendError, backend, nn, ops, testing
from fastdl.ops.quant_matmul import ACTIVATIONS
from fastdl.quant import FORMATS, QuantTensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "cpu"])
def where(request):
    """The back end, asked for by name."""
    if request.param == "cpu" and not backend.native_loaded():
        pytest.skip(f"compiled library: {backend.native_error()}")
    return request.param


# All pairs for q4_1; the other formats with each activation once and each dtype once.
CASES = [("q4_1", dtype, activation) for dtype in DTYPES for activation in ("fp32", "bf16", "int8", "auto")]
CASES += [
    (name, dtype, activation)
    for name in FORMATS
    if name != "q4_1"
    for dtype, activation in zip((torch.float32, *DTYPES), ("int8", "fp32", "bf16", "auto"), strict=True)
]


@pytest.mark.parametrize(("name", "dtype", "activation"), CASES)
def test_contract(where, name, dtype, activation):
    """Outputs and gradients against float64 with the same rounding of x; error at most twice that of torch's linear."""
    w = weight(name)
    for shape in ((256,), (3, 5, 256), (17, 256), (0, 256)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        bias = torch.randn(33).to(dtype).requires_grad_()
        precision = activation
        if activation == "auto":
            level = backend.cpu_level() if where == "cpu" else "torch"
            precision = ops.auto_activation(level, dtype, x.shape.numel() // 256)
        testing.check(
            lambda x, b: ops.quant_matmul(x, w, b, activation=activation, backend=where),
            (x, bias),
            peer=lambda x, b: F.linear(x, w.dequantize(x.dtype), b),
            exact=lambda x, b, a=precision: ops.quant_matmul(x, w, b, activation=a, backend="torch"),
            ulps=16,
        )


@pytest.mark.parametrize("name", FORMATS)
def test_meaning_of_activations(name):
    """float64: "fp32" is F.linear; "bf16" and "int8" are F.linear of x rounded as the contract says."""
    w = weight(name)
    x, dense = torch.randn(7, 256, dtype=torch.float64), w.dequantize(torch.float64)
    x[0] = 0
    torch.testing.assert_close(ops.quant_matmul(x, w, activation="fp32"), x @ dense.T)
    rounded = x.bfloat16().double() @ dense.bfloat16().double().T
    torch.testing.assert_close(ops.quant_matmul(x, w, activation="bf16"), rounded)
    blocks = x.float().view(-1, 32)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = torch.nan_to_num(blocks * (torch.full_like(largest, 127.0) / largest)).round()
    assert codes.abs().max() == 127
    rounded = (codes.double() * (largest / 127.0).double()).view(7, 256)
    expected = rounded @ dense.T if FORMATS[name].block > 1 else x @ dense.T
    torch.testing.assert_close(ops.quant_matmul(x, w, activation="int8"), expected, rtol=1e-6, atol=1e-7)


def test_small_blocks_count_as_zeros():
    w = weight("q8_0", 5, 64)
    x = torch.full((1, 64), 1e-31)
    x[:, 32:] = 2e-30
    y = ops.quant_matmul(x.double(), w, activation="int8")
    torch.testing.assert_close(y, x[:, 32:].double() @ w.dequantize(torch.float64)[:, 32:].T, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "packed"), [*((name, False) for name in FORMATS), ("q4_1", True)])
def test_gradcheck(name, packed):
    w = weight(name, rows=5, cols=256 if name == "q6_k" else 32)
    w = w.pack_() if packed else w
    x = torch.randn(3, w.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    function = lambda x, bias: ops.quant_matmul(x, w, bias)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, bias), fast_mode=True)


def test_opcheck(where):
    w = weight("q4_1")
    suffix = "" if where == "cpu" else "_torch"
    data = w.pack_().data if where == "cpu" else w.to_gguf()
    x, bias = torch.randn(2, 3, 256, requires_grad=True), torch.randn(33, requires_grad=True)
    grad, ids = torch.randn(2, 3, 33, requires_grad=True), torch.tensor([0, 32, 5])

    def op(name):
        return getattr(torch.ops.fastdl, name + suffix)

    torch.library.opcheck(op("quant_matmul"), (x, data, bias, 3, 33, ACTIVATIONS["fp32"]))
    torch.library.opcheck(op("quant_matmul"), (x.detach().bfloat16(), data, None, 3, 33, ACTIVATIONS["fp32"]))
    torch.library.opcheck(op("quant_matmul_backward"), (grad, data, 3, 256))
    for rows in (ids, None):
        torch.library.opcheck(op("quant_rows"), (data, rows, 3, 33, 256, torch.bfloat16))
    if where == "cpu":
        gguf = w.to_gguf()
        torch.library.opcheck(torch.ops.fastdl.quant_pack, (gguf, 3, 256))
        torch.library.opcheck(torch.ops.fastdl.quant_unpack, (data, 3, 33, 256))
        torch.library.opcheck(torch.ops.fastdl.quant_quantize, (w.dequantize(), 3))


def test_compile_fullgraph(where):
    """Modules with a QuantTensor inside, forward and backward, several shapes, one graph."""
    torch.manual_seed(0)
    table = nn.QuantEmbedding.from_embedding(torch.nn.Embedding(20, 64), "q8_0", backend=where)
    linear = nn.QuantLinear.from_linear(torch.nn.Linear(64, 48), "q4_1", backend=where)
    model = torch.nn.Sequential(table, torch.nn.LayerNorm(64), linear)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (torch.arange(4), torch.arange(18), torch.zeros(2, 3, dtype=torch.int64)):
        model.zero_grad()
        expected = model(ids)
        expected.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        y = compiled(ids)
        y.square().sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_compile_with_inductor():
    w, bias = weight("q4_1"), torch.randn(33)
    compiled = torch.compile(lambda x: ops.quant_matmul(x, w, bias).relu() + 1, fullgraph=True)
    x = torch.randn(4, 256)
    torch.testing.assert_close(compiled(x), ops.quant_matmul(x, w, bias).relu() + 1)


def test_strides_and_autocast(where):
    w = weight("q4_1")
    x = torch.randn(256, 6).t()
    y = ops.quant_matmul(x, w, backend=where)
    torch.testing.assert_close(y, ops.quant_matmul(x.contiguous(), w, backend=where))
    torch.testing.assert_close(ops.quant_matmul(x[::2, None], w, backend=where), y[::2, None])
    bias = torch.randn(2 * w.shape[0])[::2]
    assert torch.equal(ops.quant_matmul(x, w, bias, backend=where), ops.quant_matmul(x, w, bias.clone(), backend=where))
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.quant_matmul(x, w, backend=where)
        assert cast.dtype == F.linear(x, w.dequantize()).dtype == torch.bfloat16
        assert ops.quant_matmul(x.double(), w).dtype == torch.float64
    torch.testing.assert_close(cast, ops.quant_matmul(x.bfloat16(), w, backend=where))
    cast.sum().backward()  # an expanded gradient: strides 0
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, w.dequantize().sum(0).expand(6, -1), rtol=2e-2, atol=2e-2)


def test_nan_and_infinity_stay_in_their_row(where):
    w = weight("q4_1")
    for bad in (float("nan"), float("inf"), -float("inf")):
        for activation in ACTIVATIONS:
            x = torch.randn(20, 256)
            x[7, 100] = bad
            y = ops.quant_matmul(x, w, activation=activation, backend=where)
            assert not torch.isfinite(y[7]).any()
            assert torch.isfinite(torch.cat([y[:7], y[8:]])).all()


def test_meta_tensors_give_shapes():
    layer = nn.QuantLinear(64, 48).to("meta")
    y = layer(torch.empty(2, 3, 64, device="meta", requires_grad=True))
    assert y.shape == (2, 3, 48) and y.is_meta and y.requires_grad
    assert nn.QuantEmbedding(48, 64).to("meta")(torch.empty(5, dtype=torch.int64, device="meta")).shape == (5, 64)


@pytest.mark.parametrize("name", FORMATS)
def test_embedding(name, where):
    w = weight(name)
    for dtype in DTYPES:
        dense = w.dequantize(dtype)
        for ids in (
            torch.tensor([[0, 32, 16], [15, 0, 0]]),
            torch.tensor(3, dtype=torch.int32),
            torch.empty(0, 2).long(),
        ):
            with testing.poisoned():
                y = ops.quant_embedding(ids, w, dtype, backend=where)
            assert torch.equal(y, F.embedding(ids, dense))
    assert torch.equal(ops.quant_embedding(torch.tensor([1]), w, torch.float64), w.dequantize(torch.float64)[1:2])


def test_auto_activation_table():
    f32 = torch.float32
    table = {
        (level, rows): ops.auto_activation(level, f32, rows)
        for level in ("scalar", "avx2", "avx512", "amx", "torch")
        for rows in (1, 15, 16, 512)
    }
    assert {
        level: {table[level, rows] for rows in (1, 15, 16, 512)} for level in ("scalar", "avx2", "avx512", "torch")
    } == {"scalar": {"int8"}, "avx2": {"int8"}, "avx512": {"int8"}, "torch": {"fp32"}}
    assert [table["amx", rows] for rows in (1, 15, 16, 512)] == ["int8", "int8", "bf16", "bf16"]
    assert ops.auto_activation("amx", torch.float64, 512) == "fp32"


def test_back_end_is_explained_and_never_falls_back(monkeypatch, capsys):
    w, x = weight("q4_1"), torch.randn(2, 256)
    assert fastdl.explain("quant_matmul", x, w).choice == ("cpu" if backend.native_loaded() else "torch")
    assert fastdl.explain("quant_matmul", x.double(), w).choice == "torch"
    with pytest.raises(
        BackendError, match="float64: its kernels accumulate in float32" if backend.native_loaded() else "not loaded"
    ):
        ops.quant_matmul(x.double(), w, backend="cpu")
    with pytest.raises(BackendError, match="no triton back end"):
        ops.quant_matmul(x, w, backend="triton")
    monkeypatch.setenv("FASTDL_BACKEND", "torch")
    exact = ops.quant_matmul(x, w)
    monkeypatch.delenv("FASTDL_BACKEND")
    assert torch.equal(exact, ops.quant_matmul(x, w, backend="torch"))


X, W = torch.ones(2, 64), QuantTensor.zeros(3, 64, "q4_1")
BAD = {
    "w": (lambda: ops.quant_matmul(X, torch.ones(3, 64)), TypeError, "w: expected a QuantTensor .* got Tensor"),
    "x": (lambda: ops.quant_matmul([1.0], W), TypeError, "x: expected a tensor, got list"),
    "x dtype": (lambda: ops.quant_matmul(X.long(), W), TypeError, "x: expected float32, bfloat16, .* got torch.int64"),
    "x shape": (lambda: ops.quant_matmul(X[:, 1:], W), ValueError, r"x: expected shape \[..., 64\] .* got \(2, 63\)"),
    "x scalar": (lambda: ops.quant_matmul(torch.tensor(1.0), W), ValueError, r"x: expected shape .* got \(\)"),
    "x layout": (lambda: ops.quant_matmul(X.to_sparse(), W), TypeError, r"x: .* torch.sparse_coo; .* x.to_dense\(\)"),
    "x device": (
        lambda: ops.quant_matmul(X.to("meta"), W),
        ValueError,
        "x: expected on the weight's device cpu, got meta",
    ),
    "bias": (lambda: ops.quant_matmul(X, W, 1.0), TypeError, "bias: expected a floating tensor or None, got float"),
    "bias dtype": (lambda: ops.quant_matmul(X, W, torch.ones(3).int()), TypeError, "bias: .* got torch.int32"),
    "bias shape": (
        lambda: ops.quant_matmul(X, W, torch.ones(1, 3)),
        ValueError,
        r"bias: expected shape \(3,\), got \(1, 3\)",
    ),
    "bias device": (
        lambda: ops.quant_matmul(X, W, torch.ones(3, device="meta")),
        ValueError,
        "bias: expected on the weight",
    ),
    "activation": (lambda: ops.quant_matmul(X, W, activation="int4"), ValueError, "activation: expected .* got 'int4'"),
    "backend": (lambda: ops.quant_matmul(X, W, backend="gpu"), BackendError, "'gpu' is no back end"),
    "ids type": (lambda: ops.quant_embedding(3, W), TypeError, "ids: expected an integer tensor, got int"),
    "ids dtype": (lambda: ops.quant_embedding(X, W), TypeError, "ids: expected int64 or int32, got torch.float32"),
    "ids high": (
        lambda: ops.quant_embedding(torch.tensor([0, 3]), W),
        ValueError,
        "ids: expected 0 <= id < 3, got .* 0 to 3",
    ),
    "ids low": (
        lambda: ops.quant_embedding(torch.tensor([-1]), W),
        ValueError,
        "ids: expected 0 <= id < 3, got ids from -1",
    ),
    "ids weight": (lambda: ops.quant_embedding(torch.tensor([1]), X), TypeError, "w: expected a QuantTensor"),
    "dtype": (lambda: ops.quant_embedding(torch.tensor([1]), W, torch.int32), TypeError, "dtype: expected float32"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


MEMORY = """
import sys, torch
from fastdl import ops
from fastdl.quant import QuantTensor

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

where = sys.argv[1]
x = torch.randn(64, 4096)
for rows in (64, 4096):  # the first warms up
    w = QuantTensor.zeros(rows, 4096, "q4_1")
    if where == "cpu":
        w.pack_()
    x.requires_grad_()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = peak()
    y = ops.quant_matmul(x, w, activation="int8", backend=where)
    torch.autograd.grad(y, x, torch.ones_like(y))
    extra = peak() - before - 3 * y.numel() * 4  # outputs: y, its gradient, the gradient of x
print(extra)
"""


def test_weights_are_never_dequantized_whole(where):
    """Working memory beside the outputs: 1 MB (and a copy of x, 1 MB, on the torch back end); the matrix has 64 MB."""
    run = subprocess.run([sys.executable, "-c", MEMORY, where], capture_output=True, text=True)
    if "clear_refs" in run.stderr:
        pytest.skip("the kernel does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= (1.5 if where == "cpu" else 2.5) * 2**20
