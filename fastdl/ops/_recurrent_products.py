"""The products over all steps in the training of lstm, gru and rnn: with the input, and the gradients of weights.

    product(x, w, bias)      y = x w^T + bias
    outer(a, b)              c = a^T b, summed over the rows

In float32 on the back end cpu they are, from MANY rows on, ops of ours (csrc/cpu/recurrent_products.cpp), whose speed
does not depend on which of the matrices is transposed; elsewhere they are torch's. The derivatives of each are products
of the same two, so they can be differentiated any number of times.

Test: ``pytest tests/test_recurrent_products.py``
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .._library import Op

MANY = 192  # rows from which packing a weight pays


def _reference_product(x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return functional.linear(x, w.t() if transposed else w, bias)


PRODUCT = Op(  # x [..., K], w [N, K] or, transposed, [K, N], bias [N] -> y [..., N]
    "recurrent_product(Tensor x, Tensor w, Tensor? bias, bool transposed) -> Tensor",
    fake=lambda x, w, bias, transposed: x.new_empty(*x.shape[:-1], w.shape[1 if transposed else 0]),
    reference=_reference_product,
)
OUTER = Op(  # a [R, N], b [R, P] -> [N, P]
    "recurrent_outer(Tensor a, Tensor b) -> Tensor",
    fake=lambda a, b: a.new_empty(a.shape[1], b.shape[1]),
    reference=lambda a, b: a.t() @ b,
)


def _setup_product(ctx, inputs, output):
    x, w, _, ctx.transposed = inputs
    need = ctx.needs_input_grad
    ctx.save_for_backward(x if need[1] else None, w if need[0] else None)


def _product_backward(twin, ctx, grad):
    (x, w), need = ctx.saved_tensors, ctx.needs_input_grad
    dx = PRODUCT[twin](grad, w, None, not ctx.transposed) if need[0] else None
    dw = None
    if need[1]:
        left, right = (x, grad) if ctx.transposed else (grad, x)
        dw = OUTER[twin](left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1]))
    return dx, dw, grad.flatten(0, -2).sum(0) if need[2] else None, None


def _setup_outer(ctx, inputs, output):
    (a, b), need = inputs, ctx.needs_input_grad
    ctx.save_for_backward(a if need[1] else None, b if need[0] else None)


def _outer_backward(twin, ctx, grad):
    (a, b), need = ctx.saved_tensors, ctx.needs_input_grad
    da = PRODUCT[twin](b, grad, None, False) if need[0] else None
    return da, PRODUCT[twin](a, grad, None, True) if need[1] else None


PRODUCT.autograd(_setup_product, _product_backward)
OUTER.autograd(_setup_outer, _outer_backward)


def ours(x: Tensor, rows: int, twin: str) -> bool:
    """Whether these ops are for a call with so many rows."""
    return twin == "native" and x.device.type == "cpu" and x.dtype == torch.float32 and rows >= MANY


def product(x: Tensor, w: Tensor, bias: Tensor | None, twin: str) -> Tensor:
    """x [..., K], w [N, K], bias [N] or None -> [..., N]"""
    if ours(x, x.numel() // max(x.shape[-1], 1), twin):
        return PRODUCT[twin](x, w, bias, False)
    return functional.linear(x, w, bias)


def outer(a: Tensor, b: Tensor, twin: str) -> Tensor:
    """a [R, N], b [R, P] -> a^T b [N, P]"""
    return OUTER[twin](a, b) if ours(a, a.shape[0], twin) else a.t() @ b
