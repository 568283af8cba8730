"""Room quant_matmul: products with quantized weights, and their gradient for the input, straight from the packed bytes.

    y[..., r] = sum_k a(x)[..., k] * W[r, k] + bias[r]         W [rows, cols]: what the format's bytes stand for
    dL/dx[..., k] = sum_r dL/dy[..., r] * W[r, k]              accumulated in float32; W takes no gradient

a() is the rounding of the activations, set by ``activation``:

    "fp32"  none                        "bf16"  x and W to bfloat16 (their products are summed in float32)
    "int8"  x to 8 bits in blocks of 32 with scale max |x| / 127, products of integers; what llama.cpp does.
            f16, bf16 and f32 weights have no integer products: computed as "fp32"
    "auto"  `auto_activation`: a pure function of level, dtype and number of rows of x, see its table

The gradient ignores a() (straight-through). dtypes of x: float32, bfloat16, float16, and float64 on the torch back end.

Back ends: cpu (csrc/cpu/quant_matmul*.cpp; the weights are packed in place at the first use), torch
(fastdl/reference/quant_matmul.py). What they refuse:

    | back end | refuses              | because                                                     |
    | cpu      | tensors off the CPU  | its kernels run there                                       |
    | cpu      | float64              | its kernels accumulate in float32                           |

Under autocast x is cast to the autocast dtype, as torch's linear does. Test: ``pytest tests/test_quant_matmul.py``;
benchmark: ``pytest bench/bench_quant_matmul.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backend as backends
from .._library import LIB, define
from ..quant.formats import by_id
from ..quant.tensor import QuantTensor
from ..reference import quant_matmul as reference

__all__ = ["auto_activation", "quant_embedding", "quant_matmul", "quantize"]

ACTIVATIONS = {"fp32": 0, "bf16": 1, "int8": 2}  # the numbers that the native ops take
_ACTIVATION_NAMES = {number: name for name, number in ACTIVATIONS.items()}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

define("quant_pack(Tensor gguf, int format, int cols) -> Tensor")
define("quant_unpack(Tensor packed, int format, int rows, int cols) -> Tensor")
define("quant_quantize(Tensor w, int format) -> Tensor")
define("quant_rows(Tensor packed, Tensor? ids, int format, int rows, int cols, ScalarType dtype) -> Tensor")
define("quant_matmul(Tensor x, Tensor packed, Tensor? bias, int format, int rows, int activation) -> Tensor")
define("quant_matmul_backward(Tensor grad, Tensor packed, int format, int cols) -> Tensor")
# The torch back end's twins: data is GGUF bytes (2-D) or panel16 (1-D).
define("quant_rows_torch(Tensor data, Tensor? ids, int format, int rows, int cols, ScalarType dtype) -> Tensor")
define("quant_matmul_torch(Tensor x, Tensor data, Tensor? bias, int format, int rows, int activation) -> Tensor")
define("quant_matmul_backward_torch(Tensor grad, Tensor data, int format, int cols) -> Tensor")


def _refuse_cpu(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels accumulate in float32; use backend='torch' or another dtype"
    return None


backends.register_room("quant_matmul", {"cpu": _refuse_cpu})
backends.register_room("quant_embedding", {"cpu": _refuse_cpu})


def quantize(w: Tensor, format: str = "q4_1") -> QuantTensor:
    """Quantize a weight matrix.

    w       [rows, cols], any floating dtype, finite; cols a multiple of the format's block (32 for q4_1 and q8_0)
    format  "q4_1" (5 bits a weight), "q8_0" (8.5), "f16", "bf16", "f32"; "q6_k" can be read, not written

    The bytes are those of ggml's reference quantizer. q4_1: for each 32 weights d = (max - min) / 15, m = min, and
    codes round((w - m) / d); value = code * d + m, with d and m in fp16.

    Raises TypeError (not a floating tensor) or ValueError: not a matrix, cols not divisible, NaN or infinite weights,
    weights so large that a scale leaves fp16's range.

    >>> import torch, fastdl
    >>> w = fastdl.ops.quantize(torch.randn(48, 64), "q4_1")
    >>> w.nbytes, w.dequantize().shape
    (1920, torch.Size([48, 64]))

    Source: GGUF, ggml's ``quantize_row_q4_1_ref`` and ``quantize_row_q8_0_ref``.
    """
    return QuantTensor.quantize(w, format)


def quant_matmul(
    x: Tensor, w: QuantTensor, bias: Tensor | None = None, *, activation: str = "auto", backend: str | None = None
) -> Tensor:
    """``torch.nn.functional.linear`` with a quantized weight: x @ W.T + bias.

    x           [..., cols], float32, bfloat16, float16 (float64: torch back end); any strides
    w           QuantTensor (rows, cols) on x's device
    bias        [rows], floating, or None
    activation  "auto", "int8", "bf16" or "fp32": precision of x in the products (see the head of this file)
    backend     None or "auto", "cpu", "torch"

    Returns [..., rows] in x's dtype. Differentiable in x and bias (twice); w is frozen. Results do not depend on the
    number of threads. Raises TypeError or ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch, fastdl
    >>> w = fastdl.ops.quantize(torch.randn(48, 64), "q4_1")
    >>> fastdl.ops.quant_matmul(torch.randn(2, 5, 64), w).shape
    torch.Size([2, 5, 48])
    """
    _check_matmul(x, w, bias, activation)
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    chosen = backends.choose("quant_matmul", backend, device=x.device, dtype=x.dtype)
    rows = w.shape[0]
    if activation == "auto":
        level = _cpu_level() if chosen == "cpu" else "torch"
        activation = auto_activation(level, x.dtype, math.prod(x.shape[:-1]))
    if bias is not None:
        bias = bias.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    op = torch.ops.fastdl.quant_matmul if chosen == "cpu" else torch.ops.fastdl.quant_matmul_torch
    data = _packed(w) if chosen == "cpu" else w.data
    return op(x, data, bias, w.fmt.ggml_id, rows, ACTIVATIONS[activation])


def quant_embedding(
    ids: Tensor, w: QuantTensor, dtype: torch.dtype = torch.float32, *, backend: str | None = None
) -> Tensor:
    """Rows of a quantized matrix: ``torch.nn.functional.embedding``.

    ids    integers of any shape, 0 <= id < rows, on w's device
    w      QuantTensor (rows, cols)
    dtype  of the result; computed in float32 (float64 for float64) and rounded

    Returns [*ids.shape, cols]; no gradient. Raises TypeError or ValueError naming the argument (ids out of range:
    checked on the CPU, and not while compiling).

    >>> import torch, fastdl
    >>> w = fastdl.ops.quantize(torch.randn(100, 64), "q8_0")
    >>> fastdl.ops.quant_embedding(torch.tensor([[1, 2, 99]]), w).shape
    torch.Size([1, 3, 64])
    """
    _check_weight(w, "w")
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected an integer tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    _check_device(ids, w, "ids")
    rows, cols = w.shape
    flat = ids.reshape(-1).to(torch.int64)
    if not torch.compiler.is_compiling() and flat.device.type == "cpu" and flat.numel():
        low, high = (int(end) for end in torch.aminmax(flat))
        if low < 0 or high >= rows:
            raise ValueError(f"ids: expected 0 <= id < {rows}, got ids from {low} to {high}")
    chosen = backends.choose("quant_embedding", backend, device=ids.device, dtype=dtype)
    op = torch.ops.fastdl.quant_rows if chosen == "cpu" else torch.ops.fastdl.quant_rows_torch
    data = _packed(w) if chosen == "cpu" else w.data
    return op(data, flat, w.fmt.ggml_id, rows, cols, dtype).reshape(*ids.shape, cols)


def auto_activation(level: str, dtype: torch.dtype, rows: int) -> str:
    """The activation precision that "auto" means: a pure function, so the same call always computes the same numbers.

    | level (of the back end)   | rows of x | activation |
    | torch back end            | any       | fp32       |
    | scalar, avx2, avx512      | any       | int8       |
    | amx                       | < 16      | int8       |
    | amx                       | >= 16     | bf16       |

    and "fp32" for float64. The error of int8 is that of llama.cpp on a CPU; bf16's is some ten times smaller, and AMX
    multiplies bf16 fast enough. Whether anything requires a gradient plays no part.

    >>> import torch, fastdl
    >>> fastdl.ops.auto_activation("avx2", torch.float32, 512)
    'int8'
    """
    if dtype == torch.float64 or level == "torch":
        return "fp32"
    if level.startswith("amx") and rows >= 16:
        return "bf16"
    return "int8"


def _cpu_level() -> str:
    return backends.cpu_level()


# What torch.compiler.assume_constant_result does, without importing the compiler: a graph keeps the level it saw.
_cpu_level._dynamo_marked_constant = True


def _packed(w: QuantTensor) -> Tensor:
    """The weight's bytes in panel16 order; packs w in place at the first use."""
    data = w.data
    if data.dim() == 1:
        return data
    if torch.compiler.is_compiling():  # a graph does not change w: it packs at each run (modules pack beforehand)
        return torch.ops.fastdl.quant_pack(data.contiguous(), w.fmt.ggml_id, w.shape[1])
    return w.pack_().data


def _check_weight(w: QuantTensor, name: str) -> None:
    if not isinstance(w, QuantTensor):
        raise TypeError(f"{name}: expected a QuantTensor (fastdl.ops.quantize makes one), got {type(w).__name__}")


def _check_device(x: Tensor, w: QuantTensor, name: str) -> None:
    if x.device != w.device:
        raise ValueError(f"{name}: expected on the weight's device {w.device}, got {x.device}; move one to the other")


def _check_matmul(x: Tensor, w: QuantTensor, bias: Tensor | None, activation: str) -> None:
    _check_weight(w, "w")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a dense tensor, got layout {x.layout}; convert it with x.to_dense()")
    rows, cols = w.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"x: expected shape [..., {cols}] for a weight of shape {w.shape}, got {tuple(x.shape)}")
    _check_device(x, w, "x")
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.dtype.is_floating_point:
            got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"bias: expected a floating tensor or None, got {got}")
        if tuple(bias.shape) != (rows,):
            raise ValueError(f"bias: expected shape ({rows},), got {tuple(bias.shape)}")
        _check_device(bias, w, "bias")
    if activation != "auto" and activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected 'auto', 'int8', 'bf16' or 'fp32', got {activation!r}")


# Registration: torch implementations, fakes (shape and dtype only), gradients.


@torch.library.impl(LIB, "quant_rows_torch", "CompositeExplicitAutograd")
def _rows_torch(data, ids, format, rows, cols, dtype):
    return reference.quant_rows(data, ids, by_id(format), rows, cols, dtype)


@torch.library.impl(LIB, "quant_matmul_torch", "CompositeExplicitAutograd")
def _matmul_torch(x, data, bias, format, rows, activation):
    return reference.quant_matmul(x, data, bias, by_id(format), rows, _ACTIVATION_NAMES[activation])


@torch.library.impl(LIB, "quant_matmul_backward_torch", "CompositeExplicitAutograd")
def _matmul_backward_torch(grad, data, format, cols):
    return reference.quant_matmul_backward(grad, data, by_id(format), cols)


@torch.library.register_fake("fastdl::quant_pack", lib=LIB)
def _(gguf, format, cols):
    fmt = by_id(format)
    return gguf.new_empty(reference.panel16.panels(gguf.shape[0]) * reference.panel16.panel_bytes(fmt, cols))


@torch.library.register_fake("fastdl::quant_unpack", lib=LIB)
def _(packed, format, rows, cols):
    return packed.new_empty(rows, by_id(format).row_bytes(cols))


@torch.library.register_fake("fastdl::quant_quantize", lib=LIB)
def _(w, format):
    return w.new_empty(w.shape[0], by_id(format).row_bytes(w.shape[1]), dtype=torch.uint8)


def _fake_rows(data, ids, format, rows, cols, dtype):
    return data.new_empty(rows if ids is None else ids.shape[0], cols, dtype=dtype)


def _fake_matmul(x, data, bias, format, rows, activation):
    return x.new_empty(*x.shape[:-1], rows)


def _fake_backward(grad, data, format, cols):
    return grad.new_empty(*grad.shape[:-1], cols)


def _register(suffix: str) -> None:
    """Fakes and autograd of one back end's ops: quant_matmul<suffix> and its backward, each the other's derivative."""
    forward, backward = f"fastdl::quant_matmul{suffix}", f"fastdl::quant_matmul_backward{suffix}"
    torch.library.register_fake(f"fastdl::quant_rows{suffix}", _fake_rows, lib=LIB)
    torch.library.register_fake(forward, _fake_matmul, lib=LIB)
    torch.library.register_fake(backward, _fake_backward, lib=LIB)

    def keep_forward(ctx, inputs, output):
        x, data, _, ctx.format, _, _ = inputs
        ctx.cols = x.shape[-1]
        ctx.save_for_backward(data)

    def forward_gradient(ctx, grad):
        (data,) = ctx.saved_tensors
        op = getattr(torch.ops.fastdl, f"quant_matmul_backward{suffix}")
        x = op(grad, data, ctx.format, ctx.cols) if ctx.needs_input_grad[0] else None
        bias = None
        if ctx.needs_input_grad[2]:
            wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
            bias = reference.as_matrix(grad).sum(0, dtype=wide)
        return x, None, bias, None, None, None

    def keep_backward(ctx, inputs, output):
        grad, data, ctx.format, _ = inputs
        ctx.rows = grad.shape[-1]
        ctx.save_for_backward(data)

    def backward_gradient(ctx, grad):
        (data,) = ctx.saved_tensors
        op = getattr(torch.ops.fastdl, f"quant_matmul{suffix}")
        return op(grad, data, None, ctx.format, ctx.rows, ACTIVATIONS["fp32"]), None, None, None

    torch.library.register_autograd(forward, forward_gradient, setup_context=keep_forward, lib=LIB)
    torch.library.register_autograd(backward, backward_gradient, setup_context=keep_backward, lib=LIB)


_register("")
_register("_torch")
