"""Room rnn: a layer over whole sequences in every lane, against torch's own op (tests/recurrent.py)."""

from __future__ import annotations

import pytest
import recurrent
import torch
from recurrent_machinery import Machinery
from recurrent_results import Results

from fastdl import ops
from fastdl.ops.rnn import BACKWARD, FORWARD, INFERENCE


def torchs(x, states, weights, flags, relu, batch_sizes=None):
    op = torch._VF.rnn_relu if relu else torch._VF.rnn_tanh
    if batch_sizes is not None:
        return op(x, batch_sizes, states[0], weights, *flags)
    return op(x, states[0], weights, *flags)


FAMILY = recurrent.Family(
    "rnn", ops.rnn, FORWARD, INFERENCE, BACKWARD, 1,
    ("bias", "state", "layer_norm", "mask", "zoneout_h", "lengths", "two", "relu"), torchs,
)  # fmt: skip


class TestContract(Results, Machinery):
    family = FAMILY

    def backward_arguments(self, arguments, outputs):
        _, h0, w_hh, ln, mask, lengths, seed, zoneout, eps, relu = arguments
        y, h_n, gates = outputs
        u = None if ln is None else torch.randn(gates.shape, device=y.device).to(y.dtype)
        return (
            torch.randn_like(y), torch.randn_like(h_n), None, gates, h0, w_hh, u, ln, mask, lengths, seed, zoneout, eps,
            relu,
        )  # fmt: skip


@pytest.mark.parametrize("value", ["Tanh", "sigmoid", None])
def test_bad_nonlinearity(value):
    x, w_ih, w_hh = torch.ones(2, 1, 3), torch.ones(1, 4, 3), torch.ones(1, 4, 4)
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh' or 'relu', got"):
        ops.rnn(x, w_ih, w_hh, nonlinearity=value)
