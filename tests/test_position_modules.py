"""Modules of the rooms position and rope: tables that grow and stay float32, learned weights, compiled calls."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastdl
from fastdl import ops


def test_sinusoids_grow_and_stay_float32():
    encoding = fastdl.nn.PositionalEncoding(16, max_len=4, scale=4.0).eval()
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(encoding(x), 4 * x + ops.sinusoidal_table(9, 16))
    assert encoding._table.rows == 16 and not encoding.state_dict()
    torch.testing.assert_close(encoding(x[:, :2], positions=30), 4 * x[:, :2] + ops.sinusoidal_table(2, 16, start=30))
    at = torch.tensor([[0, 99], [1, 2]])
    torch.testing.assert_close(encoding(x[:, :2], positions=at), 4 * x[:, :2] + ops.sinusoidal_table(100, 16)[at])
    narrow = copy.deepcopy(encoding).bfloat16()
    y = narrow(x.bfloat16())
    assert y.dtype == torch.bfloat16 and narrow._table.table.dtype == torch.float32
    torch.testing.assert_close(pickle.loads(pickle.dumps(encoding))(x), encoding(x))


def test_dropout_is_for_training():
    encoding = fastdl.nn.PositionalEncoding(64, dropout=0.5)
    x = torch.randn(4, 10, 64)
    share = (encoding(x) == 0).float().mean()
    assert 0.4 < share < 0.6 and not (encoding.eval()(x) == 0).any()


def test_learned_encoding():
    encoding = fastdl.nn.LearnedPositionalEncoding(8, max_len=6)
    assert encoding.weight.shape == (6, 8) and 0.005 < float(encoding.weight.detach().std()) < 0.05
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(encoding(x, positions=2), x + encoding.weight[2:])
    encoding(x).sum().backward()
    assert torch.equal(encoding.weight.grad[:, 0], torch.tensor([3.0, 3, 3, 3, 0, 0]))
    with pytest.raises(ValueError, match=r"positions: 3 \.\. 6 do not lie"):
        encoding(x, positions=3)
    assert list(encoding.state_dict()) == ["weight"] and "max_len=6" in repr(encoding)


@pytest.mark.parametrize("pairs", ["interleaved", "half"])
def test_rotary_embedding(pairs):
    rotary = fastdl.nn.RotaryEmbedding(16, 500.0, rope_dim=12, pairs=pairs, max_len=4)
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 1, 5, 16)
    table = ops.rope_table(12, 500.0, 64)
    for at in (0, 20, torch.tensor([3, 0, 1, 63, 2]), torch.randint(64, (2, 5))):
        expected = [ops.rope(t, table, pairs=pairs, positions=at) for t in (q, k)]
        for ours, theirs in zip(rotary(q, k, at), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(rotary(q, positions=at), expected[0])
    assert not rotary.state_dict() and rotary.half()._table.table.dtype == torch.float32
    assert f"pairs='{pairs}'" in repr(rotary)


def test_rotary_embedding_with_dynamic_scaling():
    """The table is that of the length of the call, and the plain one again for a short sequence."""
    scaling = {"scaling": "dynamic", "factor": 2.0, "original_context": 8}
    rotary = fastdl.nn.RotaryEmbedding(16, 100.0, max_len=4, **scaling)
    x = torch.randn(1, 20, 16)
    for n in (3, 8, 20, 11, 6):
        table = ops.rope_table(16, 100.0, n, **scaling)
        torch.testing.assert_close(rotary(x[:, :n]), ops.rope(x[:, :n], table))
    long = ops.rope_table(16, 100.0, 12, **scaling)
    torch.testing.assert_close(rotary(x[:, :2], positions=10), ops.rope(x[:, :2], long, positions=10))


def test_compiled_modules_do_not_grow():
    rotary, encoding = fastdl.nn.RotaryEmbedding(16), fastdl.nn.PositionalEncoding(16, max_len=32)
    q, x = torch.randn(2, 3, 5, 16), torch.randn(2, 5, 16)
    expected = rotary(q, q), encoding(x)

    def step(q, x):
        return rotary(q, q), encoding(x)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(q, x), expected)
    with pytest.raises(Exception, match="reserve"):
        torch.compile(lambda x: encoding(x, positions=100), fullgraph=True, backend="aot_eager")(x)
    encoding.reserve(200)
    torch.compile(lambda x: encoding(x, positions=100), fullgraph=True, backend="aot_eager")(x)


def test_bad_arguments():
    for call, message in (
        (lambda: fastdl.nn.PositionalEncoding(0), "dim: expected a number >= 1"),
        (lambda: fastdl.nn.PositionalEncoding(8, dropout=2.0), "dropout: expected 0 <= dropout <= 1, got 2.0"),
        (lambda: fastdl.nn.LearnedPositionalEncoding(8, max_len=-1), "max_len: expected a number >= 0"),
        (lambda: fastdl.nn.RotaryEmbedding(7), "head_dim: expected an even number"),
        (lambda: fastdl.nn.RotaryEmbedding(8, rope_dim=10), "rope_dim: expected at most head_dim, 8, got 10"),
        (lambda: fastdl.nn.RotaryEmbedding(8)(torch.ones(2, 6)), r"q: expected \[..., n, 8\], got \(2, 6\)"),
        (lambda: fastdl.nn.RotaryEmbedding(8, pairs="both"), "pairs: expected one of"),
        (lambda: fastdl.nn.RotaryEmbedding(8, scaling="longrope"), "scaling: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
