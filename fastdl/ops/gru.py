"""Room gru: a layer of gated recurrent units over whole sequences, one or both directions in one call.

    r, z = sigmoid(w_ir x + b_ir + w_hr h + b_hr), sigmoid(w_iz x + b_iz + w_hz h + b_hz)     gate order r z n
    n    = tanh(w_in x + b_in + r * (w_hn h + b_hn))
    h'   = (1 - z) * n + z * h

with layer norm of both products, zoneout, a mask for h that stays the same for the sequence, and lengths:
fastdl/reference/gru.py has every formula. float32, bfloat16, float16, and float64 on the torch back end; h is kept in
float32, and sums are; what w_hh is multiplied with is rounded to the dtype of x. Gradients to every tensor; twice.

Back ends: cpu (csrc/cpu/gru*.cpp), cuda (csrc/cuda/gru*.cuh), triton (kernels/gru.py), torch (fastdl/reference/gru.py).
What they refuse:

    | back end          | refuses                | because                              |
    | cpu, cuda, triton | float64                | its kernels accumulate in float32    |
    | cpu, cuda, triton | torch.func, forward AD | kernels have no rules for transforms |

Under autocast x and the weights are cast to its dtype, as for torch's layer.
Test: ``pytest tests/test_gru.py``; benchmark: ``pytest bench/bench_gru.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, triton_twin
from ..reference import gru as reference
from ..reference.norm import compute_dtype
from ._recurrent import all_products, prepare, previous, refuse, weight_gradient

__all__ = ["gru"]


def _fake_forward(gates_x, h0, *rest):
    shape, hidden = gates_x.shape[:3], h0.shape[-1]
    return (
        gates_x.new_empty(*shape, hidden),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        gates_x.new_empty(*shape, 4 * hidden),
    )


def _fake_backward(dy, dh_n, dgates, gates, y, h0, w_hh, u, ln_weight, *rest):
    wide, rows = compute_dtype(gates.dtype), (*y.shape[:3], 3 * y.shape[3])
    return (
        gates.new_empty(rows),
        gates.new_empty(rows),
        gates.new_empty(h0.shape, dtype=wide),
        gates.new_empty(h0.shape[0], h0.shape[2], dtype=wide),
        gates.new_empty(0 if ln_weight is None else ln_weight.shape, dtype=wide),
    )


FORWARD = Op(
    "gru_forward(Tensor gates_x, Tensor h0, Tensor w_hh, Tensor? bias_n, Tensor? ln_weight, Tensor? h_mask, "
    "Tensor? lengths, Tensor? seed, float zoneout_h, float eps) -> (Tensor y, Tensor h_n, Tensor gates)",
    fake=_fake_forward,
    reference=reference.gru_forward,
    triton=triton_twin("gru", "gru_forward"),
)
INFERENCE = Op(  # where no gradient is asked for: nothing is written that only a backward pass reads
    "gru_inference(Tensor gates_x, Tensor h0, Tensor w_hh, Tensor? bias_n, Tensor? ln_weight, Tensor? h_mask, "
    "Tensor? lengths, Tensor? seed, float zoneout_h, float eps, Tensor? packed) -> (Tensor y, Tensor h_n)",
    fake=lambda *arguments: _fake_forward(*arguments)[:2],
    reference=reference.gru_inference,
    triton=triton_twin("gru", "gru_inference"),
)
BACKWARD = Op(
    "gru_backward(Tensor? dy, Tensor? dh_n, Tensor? dgates, Tensor gates, Tensor y, Tensor h0, Tensor w_hh, Tensor? u, "
    "Tensor? ln_weight, Tensor? h_mask, Tensor? lengths, Tensor? seed, float zoneout_h, float eps) -> "
    "(Tensor da, Tensor du, Tensor dh0, Tensor dbias_n, Tensor dln_weight)",
    fake=_fake_backward,
    reference=reference.gru_backward,
    triton=triton_twin("gru", "gru_backward"),
)


def _setup(ctx, inputs, output):
    _, h0, w_hh, _, *tensors, ctx.zoneout_h, ctx.eps = inputs
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
    da, du, dh0, dbias_n, dln_weight = BACKWARD[twin](
        dy, dh_n, dgates, gates, y, h0, w_hh, u, ln_weight, h_mask, lengths, seed, ctx.zoneout_h, ctx.eps
    )
    return (
        da,
        dh0,
        weight_gradient(du, h, twin) if need[2] else None,
        dbias_n if need[3] else None,
        dln_weight if need[4] else None,
        *[None] * 5,
    )


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.gru_backward))
backends.register_room("gru", {"cpu": refuse, "cuda": refuse, "triton": refuse})


def gru(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    layer_norm: Sequence[Tensor] | None = None,
    h_mask: Tensor | None = None,
    zoneout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of GRU over x, in D = 1 direction, or in D = 2, of which the second runs backwards in time.

        r, z = sigmoid(w_ir x_t + b_ir + w_hr h + b_hr), sigmoid(w_iz x_t + b_iz + w_hz h + b_hz)
        h    = (1 - z) * tanh(w_in x_t + b_in + r * (w_hn h + b_hn)) + z * h

    x           [time, batch, input_size], float32, bfloat16, float16 (float64: torch back end); any strides
    w_ih        [D, 3 * hidden_size, input_size], gates r z n
    w_hh        [D, 3 * hidden_size, hidden_size]
    b_ih, b_hh  [D, 3 * hidden_size] or None
    hx          h0 [D, batch, hidden_size] or None (zeros)
    layer_norm  (w_ih x's weight [D, 3 * hidden_size], w_hh h's weight): each product is normalized, and the biases
                added after (Ba et al. 2016)
    zoneout     probability of an element of h to keep its last value; in evaluation the expectation (Krueger et
                al. 2017)

    lengths, h_mask [D, batch, hidden_size], training, backend and what is raised are those of `lstm`. Returns
    y [time, batch, D * hidden_size] in the dtype of x and h_n [D, batch, hidden_size] in the dtype of hx.

    >>> import torch, fastdl
    >>> x, w_ih, w_hh = torch.randn(5, 2, 3), torch.randn(1, 12, 3), torch.randn(1, 12, 4)
    >>> y, h = fastdl.ops.gru(x, w_ih, w_hh)
    >>> y.shape, torch.equal(y[-1], h[0])
    (torch.Size([5, 2, 4]), True)

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), in torch's variant.
    """
    rows = w_hh.shape[1] if isinstance(w_hh, Tensor) and w_hh.dim() == 3 else 0
    hidden, directions = rows // 3, w_hh.shape[0] if rows else 1
    ln_ih, ln_hh = two_weights("layer_norm", layer_norm)
    bias, bias_n = b_ih, None
    right = [t is None or (isinstance(t, Tensor) and t.shape == (directions, rows)) for t in (b_ih, b_hh)]
    if b_hh is not None and all(right):  # else `prepare` says what is wrong
        # b_hn belongs inside r * (...); the rest is added to the products with x.
        bias_n = b_hh[:, 2 * hidden :]
        outside = torch.cat((b_hh[:, : 2 * hidden], torch.zeros_like(bias_n)), 1)
        bias, b_hh = (outside if b_ih is None else b_ih + outside), None
    call = prepare(
        "gru", 3, x, w_ih, w_hh, bias, b_hh, [("hx", hx, hidden)],
        lengths=lengths, ln_ih=ln_ih, h_mask=h_mask, training=training, eps=eps, backend=backend,
        rest=[("b_hh", bias_n, (directions, hidden)), ("layer_norm[1]", ln_hh, (directions, rows))],
        zoneout=[("zoneout", zoneout)],
    )  # fmt: skip
    arguments = (
        call.gates_x, *call.states, call.w_hh, *call.rest, call.h_mask, call.lengths, call.seed,
        float(zoneout), float(eps),
    )  # fmt: skip
    if call.needs_gradient():
        y, h_n, _ = FORWARD[call.twin](*arguments)
    else:
        y, h_n = INFERENCE[call.twin](*arguments, None)
    y, h_n = call.outputs(y, h_n)
    return y, h_n


def two_weights(name: str, value) -> tuple[Tensor | None, Tensor | None]:
    """The pair of weights of the layer norms of both products, or Nones."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2 or any(t is None for t in value):
        raise TypeError(f"{name}: expected two tensors, the weights for w_ih x and w_hh h")
    return value[0], value[1]
