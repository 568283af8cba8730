"""Modules AdditiveAttention and PointerAttention, against the layers as one writes them with torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fastdl.nn import AdditiveAttention, PointerAttention


def additive(layer, queries, keys, values, valid_lens=None):
    """The layer of "Dive into deep learning": scores of [batch, queries, keys, hidden], masked softmax, values."""
    features = torch.tanh(layer.W_q(queries).unsqueeze(2) + layer.W_k(keys).unsqueeze(1))
    scores = layer.w_v(features).squeeze(-1)
    if valid_lens is not None:
        lens = valid_lens[:, None, None] if valid_lens.dim() == 1 else valid_lens[:, :, None]
        scores = scores.masked_fill(torch.arange(keys.shape[1]) >= lens, -1e6)
    weights = torch.softmax(scores, -1)
    return weights @ values, weights


def make(bias=False, **options):
    layer = AdditiveAttention(6, 5, 9, bias, **options)
    return layer, torch.randn(2, 4, 6), torch.randn(2, 7, 5), torch.randn(2, 7, 3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lens", [None, torch.tensor([7, 3]), torch.tensor([[1, 2, 3, 4], [7, 6, 5, 1]])], ids=str)
def test_additive_attention(lane, lens, bias):
    if lane.device != "cpu":
        pytest.skip("made of the op, which has its own tests")
    layer, queries, keys, values = make(bias, backend=lane.backend)
    leaves = [t.requires_grad_() for t in (queries, keys, values)] + list(layer.parameters())
    y = layer(queries, keys, values, lens)
    expected, weights = additive(layer, queries, keys, values, lens)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    again, found = layer(queries, keys, values, lens, return_weights=True)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(found, weights)


def test_one_query_and_projected_keys():
    """A step of a decoder: the same as the row of many queries, keys projected once."""
    layer, queries, keys, values = make()
    lens, mask = torch.tensor([7, 3]), torch.rand(2, 4, 7) > 0.2
    whole = layer(queries, keys, values, lens, mask=mask)
    projected = layer.project_keys(keys)
    for i in range(4):
        one, weights = layer(
            queries[:, i], None, values, lens, mask=mask[:, i : i + 1], projected_keys=projected, return_weights=True
        )
        assert one.shape == (2, 3) and weights.shape == (2, 7)
        torch.testing.assert_close(one, whole[:, i])


def test_dropout_is_on_the_weights():
    torch.manual_seed(0)
    layer, queries, keys, values = make(dropout=0.5)
    values = torch.ones_like(values)
    found = layer.train()(queries, keys, values)
    assert not torch.allclose(found, torch.ones_like(found))
    mean = torch.stack([layer(queries, keys, values) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0.2, atol=0.2)
    torch.testing.assert_close(layer.eval()(queries, keys, values), torch.ones_like(found))


def test_pointer_attention():
    layer = PointerAttention(6, 5, 9)
    queries, keys, lens = torch.randn(3, 4, 6), torch.randn(3, 8, 5), torch.tensor([8, 5, 1])
    chosen = torch.zeros(3, 8, dtype=torch.bool)
    chosen[:, 1] = True
    logp = layer(queries, keys, lens, chosen=chosen)
    features = torch.tanh(layer.W_q(queries).unsqueeze(2) + layer.W_k(keys).unsqueeze(1))
    hidden = (torch.arange(8) >= lens[:, None]) | chosen
    scores = layer.w_v(features).squeeze(-1).masked_fill(hidden[:, None], float("-inf"))
    torch.testing.assert_close(logp, torch.log_softmax(scores, -1))
    projected = layer.project_keys(keys)
    one = layer(queries[:, 2], None, lens, projected_keys=projected, chosen=chosen)
    torch.testing.assert_close(one, logp[:, 2])
    loss = F.nll_loss(logp.flatten(0, 1), torch.zeros(12, dtype=torch.int64))
    grads = torch.autograd.grad(loss, list(layer.parameters()))
    expected = F.nll_loss(torch.log_softmax(scores, -1).flatten(0, 1), torch.zeros(12, dtype=torch.int64))
    for a, b in zip(grads, torch.autograd.grad(expected, list(layer.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_greedy_decoding_is_a_permutation():
    torch.manual_seed(1)
    layer, batch, keys = PointerAttention(4, 4, 16), 5, 9
    projected, chosen = layer.project_keys(torch.randn(batch, keys, 4)), torch.zeros(batch, keys, dtype=torch.bool)
    order = []
    with torch.no_grad():
        for _ in range(keys):
            found = layer(torch.randn(batch, 4), None, projected_keys=projected, chosen=chosen).argmax(-1)
            chosen[torch.arange(batch), found] = True
            order.append(found)
    assert (torch.stack(order, 1).sort(-1).values == torch.arange(keys)).all()


def test_it_learns():
    """To point at the input whose first feature is the largest."""
    torch.manual_seed(0)
    layer = PointerAttention(1, 2, 32, bias=True)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(200):
        inputs = torch.randn(64, 6, 2)
        logp = layer(torch.ones(64, 1), inputs)
        loss = F.nll_loss(logp, inputs[..., 0].argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs = torch.randn(500, 6, 2)
    right = layer(torch.ones(500, 1), inputs).argmax(-1) == inputs[..., 0].argmax(-1)
    assert right.float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    layer, queries, keys, values = make(dtype=dtype)
    y, weights = layer(queries.to(dtype), keys.to(dtype), values.to(dtype), return_weights=True)
    assert y.dtype == dtype and weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer(queries.to(dtype), keys.to(dtype), values.to(dtype)).dtype == dtype


def test_autocast():
    layer, queries, keys, values = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(queries, keys, values)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(queries, keys, values), rtol=5e-2, atol=5e-2)


def test_state_dict_copies_and_compile():
    layer, queries, keys, values = make(bias=True)
    assert list(layer.state_dict()) == ["W_q.weight", "W_q.bias", "W_k.weight", "w_v.weight"]
    other = AdditiveAttention(6, 5, 9, True)
    other.load_state_dict(layer.state_dict())
    expected = layer(queries, keys, values)
    for one in (other, copy.deepcopy(layer), torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(one(queries, keys, values), expected)
    assert "6, 5, 9, bias=True" in repr(layer)


def test_bad_input():
    layer, queries, keys, values = make()
    with pytest.raises(
        ValueError, match=r"queries: expected shape \[batch, 6\] or \[batch, rows, 6\], got \(2, 4, 5\)"
    ):
        layer(queries[..., :5], keys, values)
    with pytest.raises(ValueError, match=r"keys: expected shape \[batch, rows, 5\]"):
        layer(queries, keys[0], values)
    with pytest.raises(ValueError, match="keys: expected either keys or projected_keys, got neither"):
        layer(queries, None, values)
    with pytest.raises(ValueError, match="got both"):
        layer(queries, keys, values, projected_keys=layer.project_keys(keys))
    with pytest.raises(ValueError, match=r"projected_keys: expected shape \[batch, rows, 9\]"):
        layer(queries, None, values, projected_keys=keys)
    with pytest.raises(TypeError, match="queries: expected a tensor, got list"):
        layer([1], keys, values)
    with pytest.raises(ValueError, match="num_hiddens: expected an int of at least 1, got 0"):
        PointerAttention(1, 1, 0)
    with pytest.raises(ValueError, match=r"dropout: expected 0 <= p < 1, got 1\.5"):
        AdditiveAttention(1, 1, 1, dropout=1.5)
