"""fastdl.nn.GroupNorm: torch's signature and state_dict, and the extras."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import fastdl

HAS_BIAS = "bias" in inspect.signature(nn.GroupNorm).parameters


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((2, 6), {}), ((3, 6, 1e-3), {}), ((6, 6), {"affine": False}), ((2, 6), {"bias": False})],
)
def test_is_torchs_layer(arguments, options):
    if "bias" in options and not HAS_BIAS:
        pytest.skip("this torch's GroupNorm has no argument bias")
    mine, other = fastdl.nn.GroupNorm(*arguments, **options), nn.GroupNorm(*arguments, **options)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    mine.load_state_dict(other.state_dict())
    assert list(mine.state_dict()) == list(other.state_dict()) and repr(mine) == repr(other)
    for x in (torch.randn(3, 6), torch.randn(2, 6, 5), torch.randn(2, 6, 4, 3)):
        torch.testing.assert_close(mine(x), other(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(mine)(x), mine(x))


def test_scale_shift_and_back_end():
    norm = fastdl.nn.GroupNorm(2, 4, backend="torch")
    x, scale, shift = torch.randn(3, 4, 5), torch.randn(3, 4), torch.randn(3, 4)
    expected = nn.functional.group_norm(x, 2) * scale[..., None] + shift[..., None]
    torch.testing.assert_close(norm(x, scale, shift), expected)
    assert "backend='torch'" in repr(norm)
    norm.backend = "cuda"
    with pytest.raises(fastdl.BackendError, match="group_norm"):
        norm(x)


def test_argument_by_torchs_name():
    norm, x = fastdl.nn.GroupNorm(2, 4), torch.randn(2, 4, 3)
    assert torch.equal(norm(input=x), norm(x))


def test_wrong_shape():
    norm = fastdl.nn.GroupNorm(2, 4)
    with pytest.raises(ValueError, match="x: expected 4 channels"):
        norm(torch.ones(2, 6, 3))
    with pytest.raises(TypeError, match="x: expected a tensor"):
        norm([1.0])
