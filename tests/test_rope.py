"""Room rope: tables against transformers', rotations against its formula, backward against autograd, and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from fastdl import BackendError, ops
from fastdl.reference import rope as reference


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    table = ops.rope_table(16, 10000.0, 64)
    q, k = torch.randn(2, 1, 16)
    products = [float(ops.rope(q, table, positions=p + 5) @ ops.rope(k, table, positions=p).T) for p in (0, 7, 40)]
    assert max(products) - min(products) < 1e-4
    assert math.isclose(float(ops.rope(q, table, positions=33).norm()), float(q.norm()), rel_tol=1e-5)


@pytest.mark.parametrize("rope_dim", [8, 6, 2])
def test_half_and_interleaved_differ_by_a_permutation(rope_dim):
    x, table = torch.randn(3, 5, 8), ops.rope_table(rope_dim, 100.0, 9)
    order = torch.cat((torch.arange(rope_dim).view(2, -1).T.reshape(-1), torch.arange(rope_dim, 8)))
    half = ops.rope(x, table, pairs="half", positions=2)
    torch.testing.assert_close(ops.rope(x[..., order], table, pairs="interleaved", positions=2), half[..., order])
    torch.testing.assert_close(half[..., rope_dim:], x[..., rope_dim:])


def test_half_is_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, table = torch.randn(1, 3, 7, 8), ops.rope_table(8, 10000.0, 7)
    cos, sin = (torch.cat((t, t), -1)[None] for t in (table[:, 0::2], table[:, 1::2]))
    expected, _ = modeling.apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(ops.rope(x, table, pairs="half"), expected)


@pytest.mark.parametrize(
    ("scaling", "options"),
    [
        ("none", {}),
        ("linear", {"factor": 4.0}),
        ("yarn", {"factor": 4.0, "original_context": 64}),
        ("yarn", {"factor": 8.0, "original_context": 512, "attention_factor": 1.3}),
    ],
)
def test_table_is_transformers(scaling, options):
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    parameters = {"rope_type": scaling if scaling != "none" else "default", "rope_theta": 50000.0}
    parameters |= {"factor": options["factor"]} if "factor" in options else {}
    if scaling == "yarn":
        parameters["original_max_position_embeddings"] = options["original_context"]
        if "attention_factor" in options:
            parameters["attention_factor"] = options["attention_factor"]
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters=parameters,
    )
    magnitude = 1.0
    if scaling == "none":
        inverse = 1.0 / 50000.0 ** (torch.arange(0, 32, 2) / 32)
    else:
        inverse, magnitude = utils.ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"))
    angles = torch.arange(200)[:, None].double() * inverse.double()
    expected = torch.stack((angles.cos(), angles.sin()), -1).flatten(1) * magnitude
    table = ops.rope_table(32, 50000.0, 200, scaling=scaling, **options)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-4)  # theirs has float32 frequencies


def test_factors_divide_and_start_shifts():
    factors = torch.tensor([1.0, 2.0, 8.0, 32.0])
    table = ops.rope_table(8, 10000.0, 40, factors=factors)
    angles = 39 * reference.frequencies(8, 10000.0) / factors.double()
    torch.testing.assert_close(table[39, 0::2], angles.cos().float())
    torch.testing.assert_close(ops.rope_table(8, 10000.0, 5, factors=factors, start=35), table[35:], rtol=0, atol=0)


def test_far_positions_are_exact():
    angle = 131071 * 10000.0 ** (-2 / 128)
    row = ops.rope_table(128, 10000.0, 1, start=131071)[0]
    assert abs(float(row[2]) - math.cos(angle)) < 1e-6


def test_positions_tensor_and_dtype():
    x, table = torch.randn(2, 3, 8), ops.rope_table(8, 10000.0, 50)
    y = ops.rope(x, table, positions=torch.tensor([4, 5, 6]))
    torch.testing.assert_close(y, ops.rope(x, table, positions=4), rtol=0, atol=0)
    assert ops.rope(x.bfloat16(), table).dtype == torch.bfloat16
    assert ops.rope(x[:, :0], table).shape == (2, 0, 8)


@pytest.mark.parametrize("pairs", ["interleaved", "half"])
def test_backward(pairs):
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    table = ops.rope_table(6, 100.0, 3).double()
    y = ops.rope(x, table, pairs=pairs)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(reference.rope_backward(grad, table, pairs == "interleaved"), expected)
    assert torch.autograd.gradcheck(lambda t: ops.rope(t, table, pairs=pairs), (x,))
    assert torch.autograd.gradgradcheck(lambda t: ops.rope(t, table, pairs=pairs), (x,))
    compiled = torch.compile(lambda t: ops.rope(t, table, pairs=pairs), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "head_dim"),
        ({"base": 1.0}, "base"),
        ({"base": float("nan")}, "base"),
        ({"max_len": -1}, "max_len"),
        ({"scaling": "ntk"}, "scaling"),
        ({"scaling": "yarn", "factor": 2.0}, "original_context"),
        ({"factor": 0.0}, "factor"),
        ({"factors": torch.ones(3)}, "factors"),
    ],
)
def test_bad_table(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.rope_table(**({"head_dim": 8, "base": 10000.0, "max_len": 4} | arguments))


def test_bad_input():
    x, table = torch.ones(2, 8), ops.rope_table(8, 10000.0, 4)
    for arguments, error, message in (
        ((x.long(), table), TypeError, "floating"),
        ((x[:, :6], table), ValueError, "cos_sin: expected"),
        ((x[0], table), ValueError, "cos_sin: expected"),
        ((x, table.to("meta")), ValueError, "device"),
    ):
        with pytest.raises(error, match=message):
            ops.rope(*arguments)
    for positions in (3, -1, torch.tensor([0, 4]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="positions"):
            ops.rope(x, table, positions=positions)
    with pytest.raises(ValueError, match="pairs"):
        ops.rope(x, table, pairs="both")
    with pytest.raises(BackendError, match="rope"):
        ops.rope(x, table, backend="cpu")
