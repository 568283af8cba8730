"""Room lstm: a layer over whole sequences in every lane, against torch's own op (tests/recurrent.py)."""

from __future__ import annotations

import recurrent
import torch
from recurrent_machinery import Machinery
from recurrent_results import Results

from fastdl import ops
from fastdl.ops.lstm import BACKWARD, FORWARD, INFERENCE


def torchs(x, states, weights, flags, relu, batch_sizes=None):
    if batch_sizes is not None:
        return torch._VF.lstm(x, batch_sizes, states, weights, *flags)
    return torch._VF.lstm(x, states, weights, *flags)


FAMILY = recurrent.Family(
    "lstm", ops.lstm, FORWARD, INFERENCE, BACKWARD, 4,
    ("bias", "state", "projection", "peephole", "layer_norm", "mask", "zoneout_h", "zoneout_c", "lengths", "two"),
    torchs,
)  # fmt: skip


class TestContract(Results, Machinery):
    family = FAMILY

    def backward_arguments(self, arguments, outputs):
        _, _, c0, w_hh, ln, peephole, ln_c, ln_b, w_hr, mask, lengths, seed, *numbers = arguments
        y, h_n, c_n, gates, cells = outputs
        u = None if ln is None else torch.randn(gates.shape, device=y.device).to(y.dtype)
        return (
            torch.randn_like(y), torch.randn_like(h_n), torch.randn_like(c_n), None, None, gates, cells, c0, w_hh, u,
            ln, peephole, ln_c, ln_b, w_hr, mask, lengths, seed, *numbers,
        )  # fmt: skip

    def more_bad_input(self, made):
        h, c = torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)
        four = [torch.ones(1, 20), torch.ones(1, 20), torch.ones(1, 5), torch.ones(1, 5)]
        return [
            ({"hx": h}, TypeError, r"hx: expected a pair of tensors \(h, c\), got Tensor"),
            ({"hx": (h,)}, TypeError, r"hx: expected a pair of tensors \(h, c\), got 1 of them"),
            ({"hx": (h, c[:, :1])}, ValueError, r"hx\[1\]: expected shape \(1, 2, 5\)"),
            ({"w_hr": torch.ones(1, 4, 5)}, ValueError, r"w_hh: expected shape \(1, 20, 4\)"),
            ({"w_hr": torch.ones(1, 5, 4)}, ValueError, r"w_hr: expected shape \(1, 5, 5\)"),
            ({"w_hr": torch.ones(2, 5, 5)}, ValueError, r"w_hr: expected shape \(1, 5, 5\)"),
            ({"peephole": torch.ones(3, 5)}, ValueError, r"peephole: expected shape \(1, 3, 5\)"),
            ({"layer_norm": four[:2]}, TypeError, "layer_norm: expected four tensors"),
            ({"layer_norm": [torch.ones(1, 5), *four[1:]]}, ValueError, "ln_ih|layer_norm.0."),
            ({"layer_norm": [*four[:2], torch.ones(1, 20), four[3]]}, ValueError, r"layer_norm\[2\]: expected shape"),
            ({"zoneout_c": 2}, ValueError, "zoneout_c: expected a probability from 0 to 1, got 2"),
            ({"zoneout_c": None}, TypeError, "zoneout_c: expected a number, got NoneType"),
        ]


def test_the_reference_is_haste_and_torch_in_one_formula():
    """Peepholes and layer norm step by step, written once more by hand."""
    options = ("bias", "state", "peephole", "layer_norm")
    made = FAMILY.make((3, 2, 4, 5), options, torch.float64, grad=False)
    g = {name: t[0] if name != "x" else t for name, t in made.items()}
    y, h_n, c_n = FAMILY.ours(made, options, "torch")(*made.values())

    def norm(u, weight):
        return torch.nn.functional.layer_norm(u, u.shape[-1:], weight, None, 1e-5)

    h, c = g["h0"], g["c0"]
    for t in range(3):
        a = norm(g["x"][t] @ g["w_ih"].t(), g["ln_ih"]) + norm(h @ g["w_hh"].t(), g["ln_hh"]) + g["b_ih"] + g["b_hh"]
        i, f, n, o = a.chunk(4, -1)
        new = torch.sigmoid(f + g["peephole"][1] * c) * c + torch.sigmoid(i + g["peephole"][0] * c) * n.tanh()
        o = torch.sigmoid(o + g["peephole"][2] * new)
        c, h = new, o * (norm(new, g["ln_c"]) + g["ln_b"]).tanh()
        torch.testing.assert_close(y[t], h)
    torch.testing.assert_close(torch.stack((h_n[0], c_n[0])), torch.stack((h, c)))
