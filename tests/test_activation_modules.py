"""fastdl.nn.Activation and GatedMLP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdl

F = nn.functional


def test_is_the_op_with_a_bias():
    layer = fastdl.nn.Activation("gelu", 6)
    nn.init.normal_(layer.bias)
    x, residual = torch.randn(3, 6), torch.randn(3, 6)
    torch.testing.assert_close(layer(x, residual), residual + F.gelu(x + layer.bias))
    assert list(layer.state_dict()) == ["bias"] and repr(layer) == "Activation('gelu', features=6)"
    assert list(fastdl.nn.Activation("tanh").state_dict()) == []


def test_dropout_of_channels_in_training_only():
    layer = fastdl.nn.Activation("relu", 32, dropout=0.5, channel_dropout=True, channel_dim=1)
    x = torch.rand(2, 32, 4, 4) + 1
    torch.testing.assert_close(layer.eval()(x), x)
    y = layer.train()(x)
    zero = (y == 0).flatten(2)
    assert torch.equal(zero.all(2), zero.any(2)) and 10 < int(zero.all(2).sum()) < 54
    assert "dropout=0.5, channel_dropout=True, channel_dim=1" in repr(layer)


def test_beta_is_learned():
    layer = fastdl.nn.Activation("swish", beta=0.5, learn_beta=True)
    x = torch.randn(4, 8)
    layer(x).sum().backward()
    (expected,) = torch.autograd.grad((x * torch.sigmoid(layer.beta * x)).sum(), layer.beta)
    torch.testing.assert_close(layer.beta.grad, expected)
    assert list(layer.state_dict()) == ["beta"]
    assert fastdl.nn.Activation("swish", beta=1, learn_beta=True).beta.dtype == torch.float32
    with pytest.raises(ValueError, match="learn_beta: belongs to kind 'swish'"):
        fastdl.nn.Activation("relu", learn_beta=True)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_mlp(kind):
    function = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[kind]
    layer = fastdl.nn.GatedMLP(6, 10, kind, bias=True)
    x = torch.randn(2, 3, 6, requires_grad=True)
    y = layer(x)
    expected = layer.down_proj(function(layer.gate_proj(x)) * layer.up_proj(x))
    torch.testing.assert_close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.sum(), (x, layer.gate_proj.weight)),
        torch.autograd.grad(expected.sum(), (x, layer.gate_proj.weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gated_mlp_of_an_unknown_kind():
    with pytest.raises(ValueError, match="kind: expected 'silu', 'gelu' or 'gelu_tanh', got 'relu'"):
        fastdl.nn.GatedMLP(6, 10, "relu")
