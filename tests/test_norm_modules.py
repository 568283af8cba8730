"""fastdl.nn.LayerNorm and RMSNorm: torch's signatures and state_dicts, and the extras."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdl


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (fastdl.nn.LayerNorm, nn.LayerNorm, ((4, 6), 1e-4)),
        (fastdl.nn.LayerNorm, nn.LayerNorm, (6, 1e-5, True, False)),
        (fastdl.nn.LayerNorm, nn.LayerNorm, ([6], 1e-5, False)),
        (fastdl.nn.RMSNorm, nn.RMSNorm, ((4, 6),)),
        (fastdl.nn.RMSNorm, nn.RMSNorm, (6, 1e-3, False)),
    ],
)
def test_is_torchs_layer(ours, theirs, arguments):
    mine, other = ours(*arguments), theirs(*arguments)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    mine.load_state_dict(other.state_dict())
    assert list(mine.state_dict()) == list(other.state_dict()) and repr(mine) == repr(other)
    for x in (torch.randn(3, 4, 6), torch.randn(2, 3, 4, 6)):
        torch.testing.assert_close(mine(x), other(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(mine)(x), mine(x))


def test_residual_and_dropout():
    norm = fastdl.nn.LayerNorm((2, 4), dropout=0.5)
    x, residual = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    y, s = norm.eval()(x, residual, return_sum=True)
    torch.testing.assert_close(s, x + residual)
    torch.testing.assert_close(y, nn.functional.layer_norm(x + residual, (2, 4)), rtol=1e-5, atol=1e-5)
    _, s = norm.train()(x, residual, return_sum=True)
    assert s.shape == x.shape and 0 < int((s == residual).sum()) < x.numel()
    assert "dropout=0.5" in repr(norm)


def test_weight_offset_and_back_end():
    norm = fastdl.nn.RMSNorm(8, eps=1e-6, weight_offset=1.0, backend="torch")
    nn.init.zeros_(norm.weight)
    x = torch.randn(2, 8)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (8,), eps=1e-6))
    assert "backend='torch'" in repr(norm)
    norm.backend = "cuda"
    with pytest.raises(fastdl.BackendError, match="rms_norm"):
        norm(x)


@pytest.mark.parametrize("layer", [fastdl.nn.LayerNorm, fastdl.nn.RMSNorm])
def test_bad_options(layer):
    for dropout in (-0.1, 1.5, float("nan"), None):
        with pytest.raises(ValueError, match="dropout: expected a number from 0 to 1, got"):
            layer(4, dropout=dropout)
    with pytest.raises(ValueError, match=r"backend: expected None, 'auto' or one of cpu, .*, got 'cdua'"):
        layer(4, backend="cdua")
    assert layer(4, backend="auto")(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize("x", [torch.ones(3, 5), torch.ones(6), torch.ones(3, 6, 4)])
def test_wrong_shape(x):
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., 4, 6\]"):
        fastdl.nn.LayerNorm((4, 6))(x)
    with pytest.raises(TypeError, match="x: expected a tensor"):
        fastdl.nn.RMSNorm(4)([1.0])
