"""Room rnn: a layer of Elman's recurrent units over whole sequences, one or both directions in one call.

    h' = tanh(w_ih x + b_ih + w_hh h + b_hh)           or max(.., 0)

with layer norm of both products, zoneout, a mask for h that stays the same for the sequence, and lengths:
fastdl/reference/rnn.py has every formula. float32, bfloat16, float16, and float64 on the torch back end; h is kept in
float32, and sums are; what w_hh is multiplied with is rounded to the dtype of x. Gradients to every tensor; twice.

Back ends: cpu (csrc/cpu/rnn*.cpp), cuda (csrc/cuda/rnn*.cuh), triton (kernels/rnn.py), torch (fastdl/reference/rnn.py).
What they refuse:

    | back end          | refuses                | because                              |
    | cpu, cuda, triton | float64                | its kernels accumulate in float32    |
    | cpu, cuda, triton | torch.func, forward AD | kernels have no rules for transforms |

Under autocast x and the weights are cast to its dtype, as for torch's layer.
Test: ``pytest tests/test_rnn.py``; benchmark: ``pytest bench/bench_rnn.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, triton_twin
from ..reference import rnn as reference
from ..reference.norm import compute_dtype
from ._recurrent import all_products, prepare, previous, refuse, weight_gradient
from .gru import two_weights

__all__ = ["rnn"]


def _fake_forward(gates_x, h0, *rest):
    return (
        gates_x.new_empty(gates_x.shape),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        gates_x.new_empty(gates_x.shape),
    )


def _fake_backward(dy, dh_n, dgates, gates, h0, w_hh, u, ln_weight, *rest):
    wide = compute_dtype(gates.dtype)
    return (
        gates.new_empty(gates.shape),
        gates.new_empty(0 if ln_weight is None else gates.shape),
        gates.new_empty(h0.shape, dtype=wide),
        gates.new_empty(0 if ln_weight is None else ln_weight.shape, dtype=wide),
    )


FORWARD = Op(
    "rnn_forward(Tensor gates_x, Tensor h0, Tensor w_hh, Tensor? ln_weight, Tensor? h_mask, Tensor? lengths, "
    "Tensor? seed, float zoneout_h, float eps, bool relu) -> (Tensor y, Tensor h_n, Tensor gates)",
    fake=_fake_forward,
    reference=reference.rnn_forward,
    triton=triton_twin("rnn", "rnn_forward"),
)
INFERENCE = Op(  # where no gradient is asked for: nothing is written that only a backward pass reads
    "rnn_inference(Tensor gates_x, Tensor h0, Tensor w_hh, Tensor? ln_weight, Tensor? h_mask, Tensor? lengths, "
    "Tensor? seed, float zoneout_h, float eps, bool relu, Tensor? packed) -> (Tensor y, Tensor h_n)",
    fake=lambda *arguments: _fake_forward(*arguments)[:2],
    reference=reference.rnn_inference,
    triton=triton_twin("rnn", "rnn_inference"),
)
BACKWARD = Op(
    "rnn_backward(Tensor? dy, Tensor? dh_n, Tensor? dgates, Tensor gates, Tensor h0, Tensor w_hh, Tensor? u, "
    "Tensor? ln_weight, Tensor? h_mask, Tensor? lengths, Tensor? seed, float zoneout_h, float eps, bool relu) -> "
    "(Tensor da, Tensor du, Tensor dh0, Tensor dln_weight)",
    fake=_fake_backward,
    reference=reference.rnn_backward,
    triton=triton_twin("rnn", "rnn_backward"),
)


def _setup(ctx, inputs, output):
    _, h0, w_hh, *tensors, ctx.zoneout_h, ctx.eps, ctx.relu = inputs
    y, _, gates = output
    ctx.save_for_backward(y, gates, h0, w_hh, *tensors)
    ctx.set_materialize_grads(False)


def _backward(twin, ctx, dy, dh_n, dgates):
    y, gates, h0, w_hh, ln_weight, h_mask, lengths, seed = ctx.saved_tensors
    need, h = ctx.needs_input_grad, None
    if need[2] or ln_weight is not None:
        h = previous(y, h0, h_mask, lengths, w_hh.dtype)
    u = None if ln_weight is None else all_products(h, w_hh, twin)
    if dgates is not None:
        twin = "torch"  # a double backward, which is the reference's in every back end
    da, du, dh0, dln_weight = BACKWARD[twin](
        dy, dh_n, dgates, gates, h0, w_hh, u, ln_weight, h_mask, lengths, seed, ctx.zoneout_h, ctx.eps, ctx.relu
    )
    return (
        da,
        dh0,
        weight_gradient(da if ln_weight is None else du, h, twin) if need[2] else None,
        dln_weight if need[3] else None,
        *[None] * 6,
    )


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.rnn_backward))
backends.register_room("rnn", {"cpu": refuse, "cuda": refuse, "triton": refuse})


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    layer_norm: Sequence[Tensor] | None = None,
    h_mask: Tensor | None = None,
    zoneout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of Elman's RNN over x, in D = 1 direction, or in D = 2, of which the second runs backwards in time.

        h = tanh(w_ih x_t + b_ih + w_hh h + b_hh)

    x             [time, batch, input_size], float32, bfloat16, float16 (float64: torch back end); any strides
    w_ih          [D, hidden_size, input_size]
    w_hh          [D, hidden_size, hidden_size]
    b_ih, b_hh    [D, hidden_size] or None
    hx            h0 [D, batch, hidden_size] or None (zeros)
    nonlinearity  "tanh" or "relu"
    layer_norm    (w_ih x's weight [D, hidden_size], w_hh h's weight): each product is normalized, and the biases added
                  after (Ba et al. 2016)
    zoneout       probability of an element of h to keep its last value; in evaluation the expectation

    lengths, h_mask [D, batch, hidden_size], training, backend and what is raised are those of `lstm`. Returns
    y [time, batch, D * hidden_size] in the dtype of x and h_n [D, batch, hidden_size] in the dtype of hx.

    >>> import torch, fastdl
    >>> y, h = fastdl.ops.rnn(torch.randn(5, 2, 3), torch.randn(1, 4, 3), torch.randn(1, 4, 4), nonlinearity="relu")
    >>> y.shape, torch.equal(y[-1], h[0])
    (torch.Size([5, 2, 4]), True)

    Source: Elman, "Finding Structure in Time" (1990).
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    hidden = w_hh.shape[1] if isinstance(w_hh, Tensor) and w_hh.dim() == 3 else 0
    directions = w_hh.shape[0] if hidden else 1
    ln_ih, ln_hh = two_weights("layer_norm", layer_norm)
    call = prepare(
        "rnn", 1, x, w_ih, w_hh, b_ih, b_hh, [("hx", hx, hidden)],
        lengths=lengths, ln_ih=ln_ih, h_mask=h_mask, training=training, eps=eps, backend=backend,
        rest=[("layer_norm[1]", ln_hh, (directions, hidden))],
        zoneout=[("zoneout", zoneout)],
    )  # fmt: skip
    arguments = (
        call.gates_x, *call.states, call.w_hh, *call.rest, call.h_mask, call.lengths, call.seed,
        float(zoneout), float(eps), nonlinearity == "relu",
    )  # fmt: skip
    if call.needs_gradient():
        y, h_n, _ = FORWARD[call.twin](*arguments)
    else:
        y, h_n = INFERENCE[call.twin](*arguments, None)
    y, h_n = call.outputs(y, h_n)
    return y, h_n
