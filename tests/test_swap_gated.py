"""fastdl.accelerate on gated MLPs: swapped where the probe finds SwiGLU or GEGLU, left where it does not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastdl

F = nn.functional


class Apart(nn.Module):
    """As LlamaMLP."""

    def __init__(self, act_fn=F.silu, width=16, inner=40, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.down_proj, self.act_fn = nn.Linear(inner, width, bias), act_fn

    def forward(self, hidden_state):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_state)) * self.up_proj(hidden_state))


class One(nn.Module):
    """As Phi3MLP."""

    def __init__(self, activation_fn):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(16, 80, bias=False), nn.Linear(40, 16, bias=False)
        self.activation_fn = activation_fn

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class Limited(Apart):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.5) * self.up_proj(x))


class Swapped(Apart):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


def tanh_gelu(t):
    return F.gelu(t, approximate="tanh")


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (Apart(), "silu"),
        (Apart(nn.SiLU(), bias=True), "silu"),
        (Apart(F.gelu), "gelu"),
        (Apart(tanh_gelu), "gelu_tanh"),
        (One(nn.GELU()), "gelu"),
        (One(nn.SiLU()), "silu"),
    ],
    ids=["llama", "llama-bias", "geglu", "gemma", "phi-gelu", "phi"],
)
def test_swapped(native, layer, kind):
    model = nn.Sequential(nn.Linear(16, 16), layer)
    x = torch.randn(3, 5, 16, requires_grad=True)
    parameters = list(model.parameters())
    expected = model(x)
    theirs = torch.autograd.grad(expected.sum(), (x, *parameters))
    report = fastdl.accelerate(model)
    assert [(y.name, y.reason) for y in report.layers] == [("1", None)]
    assert model[1]._fastdl_gated == kind and isinstance(model[1], type(layer).__mro__[1])
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y.sum(), (x, *parameters)), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    fastdl.restore(model)
    assert type(model[1]) in (Apart, One) and torch.equal(model(x), expected)
    for other in copies:
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)
        fastdl.restore(other)
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("layer", [Limited(), Swapped(), Apart(F.relu), Apart(lambda t: F.silu(1.702 * t))])
def test_left_where_it_computes_something_else(native, layer):
    report = fastdl.accelerate(nn.Sequential(layer))
    assert "checked on a probe" in report.left[0].reason


def test_a_probe_that_fails_is_told(native):
    class Odd(Apart):
        def forward(self, x):
            raise TypeError("not today")

    report = fastdl.accelerate(nn.Sequential(Odd()))
    assert "the probe failed: TypeError: not today" in report.left[0].reason


class Dropped(Apart):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Scaled(Apart):
    def forward(self, x, scale=None):
        return super().forward(x) if scale is None else super().forward(x) * scale


class Clamped(Apart):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=100.0) * self.up_proj(x))


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, t):
        return t * torch.sigmoid(self.beta * t)


def hooked():
    act = nn.SiLU()
    act.register_forward_hook(lambda module, given, y: y * 2)
    return act


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Dropped().eval(), "checked on a probe"),
        (Apart(nn.Sequential(nn.SiLU(), nn.Dropout(0.5))).eval(), "checked on a probe"),
        (Clamped(), "checked on a probe"),
        (Scaled(), "takes more than the tensor: x, scale"),
        (Apart(Learned()), "act_fn has parameters or buffers"),
        (Apart(nn.Sequential(hooked())), "act_fn has hooks"),
    ],
    ids=["dropout", "dropout after the activation", "limit", "argument", "learned", "hooked"],
)
def test_left_where_the_product_would_lose_something(native, layer, reason):
    report = fastdl.accelerate(layer)
    assert len(report.left) == 1 and reason in report.left[0].reason


def test_the_probe_leaves_random_numbers_and_the_default_device_alone(native):
    layer, before = Apart(nn.SiLU()), torch.get_rng_state()
    with torch.device("meta"):
        report = fastdl.accelerate(layer)
    assert len(report.swapped) == 1 and torch.equal(torch.get_rng_state(), before)


def test_names_alone_make_no_gated_layer(native):
    class Own(Apart):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    class More(Apart):
        def __init__(self):
            super().__init__()
            self.norm = nn.Identity()

    class Counts(Apart):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    for layer in (Own(), More(), counts := Counts()):
        assert fastdl.accelerate(layer).layers == []
    assert counts.calls == 0


def test_hooks_are_not_called_by_the_probe_and_run_after(native):
    layer, calls = Apart(), []
    layer.gate_proj.register_forward_hook(lambda *_: calls.append("gate"))
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    fastdl.accelerate(layer)
    assert not calls
    layer(torch.randn(2, 16))
    assert calls == ["gate", "layer"]


def test_a_layer_of_ours_is_left(native):
    assert fastdl.accelerate(fastdl.nn.GatedMLP(8, 16)).left[0].reason == "is a fused layer"
