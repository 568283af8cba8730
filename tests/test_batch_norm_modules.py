"""fastdl.nn.BatchNorm1d and BatchNorm2d: torch's signatures, state_dicts and running statistics, and the extras."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdl

SHAPES = {"1d": [(5, 4), (3, 4, 6)], "2d": [(3, 4, 5, 2)]}
KINDS = {"1d": (fastdl.nn.BatchNorm1d, nn.BatchNorm1d), "2d": (fastdl.nn.BatchNorm2d, nn.BatchNorm2d)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-3},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_is_torchs_layer(kind, options):
    """Three batches in training, then evaluation: outputs, gradients and buffers follow torch's layer."""
    mine, other = (layer(4, **options) for layer in KINDS[kind])
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    mine.load_state_dict(other.state_dict())
    assert list(mine.state_dict()) == list(other.state_dict()) and repr(mine) == repr(other)
    for shape in SHAPES[kind]:
        for training in (True, True, True, False):
            mine.train(training), other.train(training)
            x = torch.randn(shape)
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            got, expected = mine(leaves[0]), other(leaves[1])
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            got.backward(x), expected.backward(x)
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)
            for ours, theirs in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(mine)(x), mine(x))


def test_residual_relu_and_back_end():
    norm = fastdl.nn.BatchNorm2d(4, relu=True, backend="torch")
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    expected = torch.relu(nn.functional.batch_norm(x, None, None, training=True) + residual)
    torch.testing.assert_close(norm(x, residual), expected)
    assert "relu=True, backend='torch'" in repr(norm)
    norm.backend = "cuda"
    with pytest.raises(fastdl.BackendError, match="batch_norm"):
        norm(x)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_training_updates_the_statistics(momentum):
    layers = [fastdl.nn.BatchNorm2d(4, momentum=momentum, relu=True) for _ in range(2)]
    compiled = torch.compile(layers[0], fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 4, 3, 3)
        torch.testing.assert_close(compiled(x), layers[1](x))
    for a, b in zip(layers[0].state_dict().values(), layers[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert int(layers[0].num_batches_tracked) == 3


def test_argument_by_torchs_name():
    norm, x = fastdl.nn.BatchNorm1d(4), torch.randn(2, 4, 3)
    assert torch.equal(norm(input=x), norm(x))


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"expected 4D input"):
        fastdl.nn.BatchNorm2d(4)(torch.ones(2, 4, 3))
    with pytest.raises(ValueError, match=r"running_mean: expected shape \(6,\)"):
        fastdl.nn.BatchNorm1d(4)(torch.ones(2, 6, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fastdl.nn.BatchNorm1d(4)(torch.ones(1, 4))
    with pytest.raises(TypeError, match="x: expected a tensor"):
        fastdl.nn.BatchNorm1d(4)([1.0])
