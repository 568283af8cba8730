"""Room lstm: a layer of long short-term memory over whole sequences, one or both directions in one call.

    i, f, g, o = w_ih x + b_ih + w_hh h + b_hh                          gate order i f g o, as torch's
    c'         = sigmoid(f + p_f c) * c + sigmoid(i + p_i c) * tanh(g)  p: peepholes
    h'         = w_hr (sigmoid(o + p_o c') * tanh(c'))                  w_hr: projection

with layer norm of both products and of the cell, zoneout, a mask for h that stays the same for the sequence, and
lengths: fastdl/reference/lstm.py has every formula. Layers, dropout between them and the masks are the module's
(fastdl/nn/lstm.py). float32, bfloat16, float16, and float64 on the torch back end; h and c are kept in float32, and
sums are; what w_hh and w_hr are multiplied with is rounded to the dtype of x. Gradients to every tensor; twice.

Back ends: cpu (csrc/cpu/lstm*.cpp), cuda (csrc/cuda/lstm*.cuh), triton (kernels/lstm.py), torch
(fastdl/reference/lstm.py). What they refuse:

    | back end          | refuses                | because                              |
    | cpu, cuda, triton | float64                | its kernels accumulate in float32    |
    | cpu, cuda, triton | torch.func, forward AD | kernels have no rules for transforms |

Under autocast x and the weights are cast to its dtype, as for torch's layer.
Test: ``pytest tests/test_lstm.py``; benchmark: ``pytest bench/bench_lstm.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, triton_twin
from ..reference import lstm as reference
from ..reference.norm import compute_dtype
from ._recurrent import all_products, prepare, previous, refuse, weight_gradient

__all__ = ["lstm"]


def _fake_forward(gates_x, h0, c0, *rest):
    shape, hidden = gates_x.shape[:3], c0.shape[-1]
    return (
        gates_x.new_empty(*shape, h0.shape[-1]),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        torch.empty_like(c0, memory_format=torch.contiguous_format),
        gates_x.new_empty(*shape, 4 * hidden),
        gates_x.new_empty(*shape, hidden),
    )


def _fake_backward(dy, dh_n, dc_n, dgates, dcells, gates, cells, c0, w_hh, u, ln_weight, peephole, ln_c, *rest):
    _, w_hr = rest[0], rest[1]
    wide, batch, hidden, size = compute_dtype(gates.dtype), gates.shape[1], cells.shape[-1], w_hh.shape[-1]
    directions = w_hh.shape[0]

    def like(t):
        return gates.new_empty(0 if t is None else t.shape, dtype=wide)

    return (
        gates.new_empty(gates.shape),
        gates.new_empty(0 if ln_weight is None else gates.shape),
        gates.new_empty(directions, batch, size, dtype=wide),
        gates.new_empty(directions, batch, hidden, dtype=wide),
        like(ln_weight),
        like(peephole),
        like(ln_c),
        like(ln_c),
        gates.new_empty(0 if w_hr is None else (*gates.shape[:3], size)),
        gates.new_empty(0 if w_hr is None else cells.shape),
    )


FORWARD = Op(
    "lstm_forward(Tensor gates_x, Tensor h0, Tensor c0, Tensor w_hh, Tensor? ln_weight, Tensor? peephole, "
    "Tensor? ln_c_weight, Tensor? ln_c_bias, Tensor? w_hr, Tensor? h_mask, Tensor? lengths, Tensor? seed, "
    "float zoneout_h, float zoneout_c, float eps) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    fake=_fake_forward,
    reference=reference.lstm_forward,
    triton=triton_twin("lstm", "lstm_forward"),
)
INFERENCE = Op(  # where no gradient is asked for: nothing is written that only a backward pass reads
    "lstm_inference(Tensor gates_x, Tensor h0, Tensor c0, Tensor w_hh, Tensor? ln_weight, Tensor? peephole, "
    "Tensor? ln_c_weight, Tensor? ln_c_bias, Tensor? w_hr, Tensor? h_mask, Tensor? lengths, Tensor? seed, "
    "float zoneout_h, float zoneout_c, float eps, Tensor? packed) -> (Tensor y, Tensor h_n, Tensor c_n)",
    fake=lambda *arguments: _fake_forward(*arguments)[:3],
    reference=reference.lstm_inference,
    triton=triton_twin("lstm", "lstm_inference"),
)
BACKWARD = Op(
    "lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dgates, Tensor? dcells, Tensor gates, Tensor cells, "
    "Tensor c0, Tensor w_hh, Tensor? u, Tensor? ln_weight, Tensor? peephole, Tensor? ln_c_weight, Tensor? ln_c_bias, "
    "Tensor? w_hr, Tensor? h_mask, Tensor? lengths, Tensor? seed, float zoneout_h, float zoneout_c, float eps) -> "
    "(Tensor da, Tensor du, Tensor dh0, Tensor dc0, Tensor dln_weight, Tensor dpeephole, Tensor dln_c_weight, "
    "Tensor dln_c_bias, Tensor dm_out, Tensor m)",
    fake=_fake_backward,
    reference=reference.lstm_backward,
    triton=triton_twin("lstm", "lstm_backward"),
)


def _setup(ctx, inputs, output):
    _, h0, *tensors, ctx.zoneout_h, ctx.zoneout_c, ctx.eps = inputs
    y, _, _, gates, cells = output
    ctx.save_for_backward(y, gates, cells, h0, *tensors)
    ctx.set_materialize_grads(False)


def _backward(twin, ctx, dy, dh_n, dc_n, dgates, dcells):
    y, gates, cells, h0, c0, w_hh, ln_weight, peephole, ln_c, ln_b, w_hr, h_mask, lengths, seed = ctx.saved_tensors
    h = u = None
    if ctx.needs_input_grad[3] or ln_weight is not None:
        h = previous(y, h0, h_mask, lengths, w_hh.dtype)
    if ln_weight is not None:
        u = all_products(h, w_hh, twin)
    if dgates is not None or dcells is not None:
        twin = "torch"  # a double backward, which is the reference's in every back end
    da, du, dh0, dc0, dln, dpeephole, dln_c, dln_b, dm_out, m = BACKWARD[twin](
        dy, dh_n, dc_n, dgates, dcells, gates, cells, c0, w_hh, u, ln_weight, peephole, ln_c, ln_b, w_hr, h_mask,
        lengths, seed, ctx.zoneout_h, ctx.zoneout_c, ctx.eps,
    )  # fmt: skip
    need = ctx.needs_input_grad
    return (
        da,
        dh0,
        dc0,
        weight_gradient(da if ln_weight is None else du, h, twin) if need[3] else None,
        dln if need[4] else None,
        dpeephole if need[5] else None,
        dln_c if need[6] else None,
        dln_b if need[7] else None,
        weight_gradient(dm_out, m, twin) if need[8] else None,
        *[None] * 6,
    )


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.lstm_backward))
backends.register_room("lstm", {"cpu": refuse, "cuda": refuse, "triton": refuse})


def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Tensor | None = None,
    w_hr: Tensor | None = None,
    peephole: Tensor | None = None,
    layer_norm: Sequence[Tensor] | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer of LSTM over x, in D = 1 direction, or in D = 2, of which the second runs backwards in time.

        i, f, g, o = w_ih x_t + b_ih + w_hh h + b_hh
        c = sigmoid(f) * c + sigmoid(i) * tanh(g),    h = w_hr (sigmoid(o) * tanh(c))

    x           [time, batch, input_size], float32, bfloat16, float16 (float64: torch back end); any strides
    w_ih        [D, 4 * hidden_size, input_size], gates i f g o
    w_hh        [D, 4 * hidden_size, P], P = hidden_size, or the size of the projection
    b_ih, b_hh  [D, 4 * hidden_size] or None
    hx          (h0 [D, batch, P], c0 [D, batch, hidden_size]) or None (zeros)
    lengths     integers [batch] from 0 to time: outputs past them are zero, and the states are those of a sequence's
                last step. Values on a GPU are not looked at (FASTDL_CHECK=1: they are, at the price of waiting)
    w_hr        [D, P, hidden_size]: projection (Sak et al. 2014)
    peephole    [D, 3, hidden_size]: i and f see c of the step before, o sees the new one (Gers and Schmidhuber 2000)
    layer_norm  (w_ih x's weight [D, 4 * hidden_size], w_hh h's weight, the cell's weight [D, hidden_size], its bias):
                each product and the cell are normalized, and the biases b added after (Ba et al. 2016)
    h_mask      [D, batch, P]: h is multiplied with it before w_hh (variational dropout, Gal and Ghahramani 2016)
    zoneout_h, zoneout_c  probability of an element of h, c to keep its last value; in evaluation the expectation
                (Krueger et al. 2017)
    training    draw the elements that zoneout keeps, from torch's generator
    backend     None or "auto", "cpu", "cuda", "triton", "torch"

    Returns y [time, batch, D * P] in the dtype of x and (h_n [D, batch, P], c_n [D, batch, hidden_size]) in the dtypes
    of hx. time 0 and batch 0 are empty. Raises TypeError or ValueError naming the argument; fastdl.BackendError if
    ``backend`` cannot.

    >>> import torch, fastdl
    >>> x, w_ih, w_hh = torch.randn(5, 2, 3), torch.randn(1, 16, 3), torch.randn(1, 16, 4)
    >>> y, (h, c) = fastdl.ops.lstm(x, w_ih, w_hh)
    >>> y.shape, h.shape, torch.equal(y[-1], h[0])
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]), True)

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997).
    """
    h0, c0 = _pair("hx", hx)
    hidden = w_hh.shape[1] // 4 if isinstance(w_hh, Tensor) and w_hh.dim() == 3 else 0
    directions = w_hh.shape[0] if hidden else 1
    size = hidden
    if isinstance(w_hr, Tensor) and w_hr.dim() == 3:
        size = w_hr.shape[1]
    ln_ih, ln_hh, ln_c, ln_b = _four("layer_norm", layer_norm)
    call = prepare(
        "lstm", 4, x, w_ih, w_hh, b_ih, b_hh, [("hx[0]", h0, size), ("hx[1]", c0, hidden)],
        lengths=lengths, ln_ih=ln_ih, h_mask=h_mask, training=training, eps=eps, backend=backend,
        rest=[
            ("layer_norm[1]", ln_hh, (directions, 4 * hidden)),
            ("peephole", peephole, (directions, 3, hidden)),
            ("layer_norm[2]", ln_c, (directions, hidden)),
            ("layer_norm[3]", ln_b, (directions, hidden)),
            ("w_hr", w_hr, (directions, size, hidden)),
        ],
        zoneout=[("zoneout_h", zoneout_h), ("zoneout_c", zoneout_c)],
    )  # fmt: skip
    arguments = (
        call.gates_x, *call.states, call.w_hh, *call.rest, call.h_mask, call.lengths, call.seed,
        float(zoneout_h), float(zoneout_c), float(eps),
    )  # fmt: skip
    if call.needs_gradient():
        y, h_n, c_n, _, _ = FORWARD[call.twin](*arguments)
    else:
        y, h_n, c_n = INFERENCE[call.twin](*arguments, None)
    y, h_n, c_n = call.outputs(y, h_n, c_n)
    return y, (h_n, c_n)


def _pair(name: str, value) -> tuple[Tensor | None, Tensor | None]:
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = f"{len(value)} of them" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{name}: expected a pair of tensors (h, c), got {got}")
    return value[0], value[1]


def _four(name: str, value) -> tuple[Tensor | None, ...]:
    if value is None:
        return (None,) * 4
    if not isinstance(value, (tuple, list)) or len(value) != 4 or any(t is None for t in value):
        raise TypeError(
            f"{name}: expected four tensors, the weights for w_ih x, w_hh h and the cell and the bias of the cell"
        )
    return tuple(value)
