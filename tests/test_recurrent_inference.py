"""Inference with weights that are prepared once: a change of anything is seen, and nothing is kept in the module."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import fastdl
from fastdl.nn import _recurrent_inference as inference

KINDS = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
X = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))


def made(kind, **options):
    """A module in evaluation that has run once, so that its weights are prepared, and its input."""
    layer = getattr(fastdl.nn, kind)(3, 5, **options).eval()
    x = X[0] if kind.endswith("Cell") else X
    with torch.no_grad():
        layer(x)
    assert id(layer) in inference._kept
    return layer, x


def first(layer, x):
    """The first output for a state that is not zero, so that every weight counts."""
    h = torch.full((2, 5) if x.dim() == 2 else (1, 2, 5), 0.5)
    result = layer(x, (h, h) if "LSTM" in type(layer).__name__ else h)
    return result[0] if isinstance(result, tuple) else result


def general(layer, x):
    """The same without prepared weights."""
    return first(layer, x.clone().requires_grad_()).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_seen(kind):
    layer, x = made(kind)
    name = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    bias = name.replace("weight", "bias")

    def replace():
        setattr(layer, name, nn.Parameter(torch.randn_like(getattr(layer, name))))

    def data():
        getattr(layer, name).data = torch.randn_like(getattr(layer, name))

    state = {key: torch.randn_like(t) for key, t in layer.state_dict().items()}
    changes = [
        lambda: getattr(layer, name).mul_(0.5),
        lambda: getattr(layer, bias).add_(1.0),
        lambda: getattr(layer, bias)[3:].zero_(),
        replace,
        data,
        lambda: getattr(layer, name).data.mul_(0.5),
        lambda: getattr(layer, name).data.copy_(torch.randn_like(getattr(layer, name))),
        lambda: layer.load_state_dict(state),
        lambda: nn.init.normal_(getattr(layer, name)),
        lambda: nn.utils.vector_to_parameters(
            torch.randn(sum(p.numel() for p in layer.parameters())), layer.parameters()
        ),
        lambda: torch.optim.SGD(layer.parameters(), lr=1.0).step(),
        lambda: layer.reset_parameters(),
    ]
    first(layer, x.clone().requires_grad_()).sum().backward()  # for the optimizer
    for number, change in enumerate(changes):
        with torch.no_grad():
            before = first(layer, x)
            change()
            after = first(layer, x)
        assert not torch.equal(before, after), number
        torch.testing.assert_close(after, general(layer, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_prepared_weights_are_used_again(kind, monkeypatch):
    layer, x = made(kind, num_layers=2, bidirectional=True)
    kept = inference._kept[id(layer)]
    monkeypatch.setattr(type(layer), "_weights", None)  # would be called to prepare
    with torch.no_grad():
        layer(x)
        layer(X[:3, :1])
        layer(x, lengths=torch.tensor([1, 4]))
    with torch.inference_mode():
        layer(x)
    assert inference._kept[id(layer)] is kept


@pytest.mark.parametrize("kind", KINDS[:3])
def test_results_are_those_of_the_general_way(kind):
    for options in ({}, {"bias": False}, {"layer_norm": True, "num_layers": 2, "bidirectional": True}):
        layer, x = made(kind, **options)
        for given in ({}, {"lengths": torch.tensor([3, 0])}):
            with torch.no_grad():
                found = layer(x, **given)
            expected = layer(x.clone().requires_grad_(), **given)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert not any(t.requires_grad for t in found if isinstance(t, torch.Tensor))


def test_options_may_change():
    layer, x = made("LSTM")
    with torch.no_grad():
        before = layer(x)[0]
        layer.zoneout_h = 0.5
        assert not torch.equal(layer(x)[0], before)
        layer.zoneout_h, layer.weight_dtype = 0.0, torch.bfloat16
        assert not torch.equal(layer(x)[0], before) and layer(x)[0].dtype == torch.float32
        layer.weight_dtype = None
        assert torch.equal(layer(x)[0], before)


def test_the_back_end_may_change(monkeypatch):
    layer, x = made("GRU")
    with torch.no_grad():
        layer.backend = "cuda"
        with pytest.raises(fastdl.BackendError, match="CUDA device"):
            layer(x)
        layer.backend = None
        layer(x)
        monkeypatch.setenv("FASTDL_BACKEND", "cuda")
        with pytest.raises(fastdl.BackendError, match="CUDA device"):
            layer(x)
        monkeypatch.setenv("FASTDL_BACKEND", "torch")
        layer(x)
        assert inference._kept[id(layer)].backend == "torch"


def test_dtype_and_module_may_change():
    layer, x = made("LSTM")
    with torch.no_grad():
        assert layer.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16
        assert layer.float()(x)[0].dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x)[0].dtype == torch.bfloat16
    layer.train()
    assert id(layer) not in inference._kept


def test_nothing_is_kept_in_the_module():
    layer, x = made("LSTM")
    assert not any(isinstance(value, inference.Prepared) for value in vars(layer).values())
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert id(other) not in inference._kept
        with torch.no_grad():
            assert torch.equal(other(x)[0], layer(x)[0])
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied(x)
        layer.weight_ih_l0.zero_()
        assert not torch.equal(copied(x)[0], layer(x)[0])
    before = len(inference._kept)
    del layer, other, copied
    gc.collect()
    assert len(inference._kept) < before


def test_where_nothing_is_prepared():
    """With gradients, in training, and for modules that were made in inference mode."""
    layer = fastdl.nn.LSTM(3, 5)
    layer(X)
    with torch.no_grad():
        layer(X)
    layer.eval()(X)
    assert id(layer) not in inference._kept
    with torch.inference_mode():
        layer = fastdl.nn.LSTM(3, 5).eval()
        expected = layer(X)[0]
        layer.weight_hh_l0.mul_(0.0)
        assert id(layer) not in inference._kept and not torch.equal(layer(X)[0], expected)


def test_carried_states_are_not_written():
    layer, x = made("LSTM")
    with torch.no_grad():
        y, (h, c) = layer(x)
        kept = h.clone(), c.clone()
        layer(x, (h, c))
        layer(torch.ones(0, 2, 3))[1][0].add_(1.0)  # the zeros that it starts from stay zero
        assert torch.equal(h, kept[0]) and torch.equal(c, kept[1]) and torch.equal(layer(x)[0], y)


def test_a_tagger_of_a_ragged_batch():
    """Lengths from 1 to 300 in one batch give, for each sentence, what it gives alone."""
    torch.manual_seed(0)
    lengths = torch.cat((torch.tensor([17, 300, 1]), torch.randint(1, 300, (21,))))
    sentences = [torch.randint(0, 50, (int(length),)) for length in lengths]

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 12)
            self.layers = fastdl.nn.LSTM(
                12, 16, 2, batch_first=True, bidirectional=True, layer_norm=True, peephole=True
            )
            self.tags = nn.Linear(32, 7)

        def forward(self, words, lengths=None):
            y, (h, _) = self.layers(self.embedding(words), lengths=lengths)
            return self.tags(y), h

    tagger = Tagger().eval()
    words = pad_sequence(sentences, batch_first=True, padding_value=49)  # a word that occurs: padding must not matter
    with torch.no_grad():
        scores, states = tagger(words, lengths)
        for index, sentence in enumerate(sentences):
            alone, state = tagger(sentence[None])
            # sums of another order, through 300 steps of layer norm
            torch.testing.assert_close(scores[index, : len(sentence)], alone[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(states[:, index], state[:, 0], rtol=1e-4, atol=1e-4)
    # and in training: the gradient of the batch is the sum of those of its sentences
    tagger.train()
    some = [0, 2, 5]
    losses = lambda scores: scores.square().sum()  # noqa: E731
    batch, _ = tagger(words[some], lengths[some])
    mask = torch.arange(batch.shape[1])[None] < lengths[some][:, None]
    together = torch.autograd.grad(losses(batch[mask]), list(tagger.parameters()))
    apart = torch.autograd.grad(sum(losses(tagger(sentences[i][None])[0]) for i in some), list(tagger.parameters()))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_evaluation_asked_for_again_keeps_what_is_prepared():
    layer, x = made("LSTM")
    kept = inference._kept[id(layer)]
    with torch.no_grad():
        nn.Sequential(layer).eval()[0](x)
        assert inference._kept[id(layer)] is kept
        layer.train().eval()
    assert id(layer) not in inference._kept


def test_threads_share_a_module():
    """Batches of other sizes at the same time, from another thread each."""
    layer, _ = made("GRU")
    inputs = [torch.randn(4, batch, 3) for batch in (1, 2, 3, 4)]
    with torch.no_grad():
        expected = [layer(x)[0] for x in inputs]

    def work(index):
        with torch.no_grad():
            return all(torch.equal(layer(inputs[index])[0], expected[index]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
