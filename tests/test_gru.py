"""Room gru: a layer over whole sequences in every lane, against torch's own op (tests/recurrent.py)."""

from __future__ import annotations

import recurrent
import torch
from recurrent_machinery import Machinery
from recurrent_results import Results

from fastdl import ops
from fastdl.ops.gru import BACKWARD, FORWARD, INFERENCE


def torchs(x, states, weights, flags, relu, batch_sizes=None):
    if batch_sizes is not None:
        return torch._VF.gru(x, batch_sizes, states[0], weights, *flags)
    return torch._VF.gru(x, states[0], weights, *flags)


FAMILY = recurrent.Family(
    "gru", ops.gru, FORWARD, INFERENCE, BACKWARD, 3,
    ("bias", "state", "layer_norm", "mask", "zoneout_h", "lengths", "two"), torchs,
)  # fmt: skip


class TestContract(Results, Machinery):
    family = FAMILY

    def backward_arguments(self, arguments, outputs):
        _, h0, w_hh, _, ln, mask, lengths, seed, zoneout, eps = arguments
        y, h_n, gates = outputs
        u = None if ln is None else torch.randn(*y.shape[:3], 3 * y.shape[3], device=y.device).to(y.dtype)
        return (
            torch.randn_like(y),
            torch.randn_like(h_n),
            None,
            gates,
            y,
            h0,
            w_hh,
            u,
            ln,
            mask,
            lengths,
            seed,
            zoneout,
            eps,
        )


def test_only_one_bias():
    """b_hh's part for n belongs inside r * (...); each bias may be given alone."""
    made = FAMILY.make((4, 2, 3, 5), ("bias",), torch.float64)
    x, w_ih, w_hh, b_ih, b_hh = made.values()
    zero = torch.zeros_like(b_ih)
    for ours, full in (((b_ih, None), (b_ih, zero)), ((None, b_hh), (zero, b_hh))):
        y, _ = ops.gru(x, w_ih, w_hh, *ours)
        expected, _ = torch._VF.gru(
            x, x.new_zeros(1, 2, 5), [w_ih[0], w_hh[0], full[0][0], full[1][0]], True, 1, 0.0, False, False, False
        )
        torch.testing.assert_close(y, expected)
