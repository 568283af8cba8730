"""fastdl.nn.LSTM, GRU, RNN and their cells: torch's signatures, results and state_dicts; the options."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, rnn

import fastdl
from fastdl import ops

KINDS = ("LSTM", "GRU", "RNN")
LAYOUTS = [
    {},
    {"bias": False},
    {"num_layers": 2, "batch_first": True},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "bias": False},
]
EXTRAS = {
    "LSTM": [
        {"layer_norm": True}, {"peephole": True}, {"zoneout_h": 0.3}, {"zoneout_c": 0.3}, {"input_dropout": 0.4},
        {"state_dropout": 0.4}, {"weight_dropout": 0.4}, {"forget_bias": 1.0}, {"learn_state": True},
        {"weight_dtype": torch.bfloat16}, {"proj_size": 2},
    ],
    "GRU": [
        {"layer_norm": True}, {"zoneout": 0.3}, {"input_dropout": 0.4}, {"state_dropout": 0.4},
        {"weight_dropout": 0.4}, {"learn_state": True}, {"weight_dtype": torch.bfloat16},
    ],
}  # fmt: skip
EXTRAS["RNN"] = [*EXTRAS["GRU"], {"nonlinearity": "relu"}]


def pair(kind, *arguments, seed=0, **options):
    """Ours and torch's, with the same weights drawn from the same seed."""
    made = []
    for module in (fastdl.nn, nn):
        torch.manual_seed(seed)
        made.append(getattr(module, kind)(*arguments, **options))
    return made


def tensors(result) -> list[torch.Tensor]:
    y, last = result
    return [y, *(last if isinstance(last, tuple) else (last,))]


def state(layer, batch, seed=1):
    """A random hx."""
    generator, d = torch.Generator().manual_seed(seed), 2 if layer.bidirectional else 1
    out = layer.proj_size or layer.hidden_size
    shape = () if batch is None else (batch,)
    h = torch.randn(layer.num_layers * d, *shape, out, generator=generator).requires_grad_()
    if layer.mode != "LSTM":
        return h
    return h, torch.randn(layer.num_layers * d, *shape, layer.hidden_size, generator=generator).requires_grad_()


def same(ours, theirs, limit=1e-5):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


# ---- As torch's -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [*LAYOUTS, {"proj_size": 2, "num_layers": 2, "bidirectional": True}], ids=str)
def test_is_torchs_layer(kind, options):
    """The same seed gives the same weights, the same outputs, states and gradients; names and repr are torch's."""
    if "proj_size" in options and kind != "LSTM":
        with pytest.raises(TypeError, match="proj_size"):
            getattr(fastdl.nn, kind)(3, 5, **options)
        return
    mine, other = pair(kind, 3, 5, **options)
    assert list(mine.state_dict()) == list(other.state_dict()) and repr(mine) == repr(other)
    assert isinstance(mine, nn.RNNBase) and mine.all_weights is not None
    mine.load_state_dict(other.state_dict())
    other.load_state_dict(mine.state_dict())
    for shape, given in itertools.product([(4, 2, 3), (4, 3)], (False, True)):
        x = torch.randn(shape, requires_grad=True)
        hx = state(other, (2 if not other.batch_first else 4) if len(shape) == 3 else None) if given else None
        results = []
        for layer in (mine, other):
            found = tensors(layer(x, hx))
            leaves = [x, *layer.parameters(), *(hx if isinstance(hx, tuple) else (hx,) if given else ())]
            grads = torch.autograd.grad(sum(t.square().sum() for t in found), leaves)
            with torch.no_grad():
                plain = tensors(layer(x, hx))
            results.append([*found, *grads, *plain, *tensors(layer.eval()(x, hx))])
            layer.train()
        same(*results)
    with torch.inference_mode():
        same(tensors(mine.eval()(x)), tensors(other.eval()(x)))


def test_nonlinearity():
    mine, other = pair("RNN", 3, 5, 2, "relu", True, True, 0.0, True)
    x = torch.randn(2, 4, 3)
    same(tensors(mine(x)), tensors(other(x)))
    same(tensors(mine.eval()(x)), tensors(other(x)))
    with torch.no_grad():
        same(tensors(mine(x)), tensors(other(x)))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("bias", [True, False])
def test_is_torchs_cell(kind, bias):
    mine, other = pair(kind, 3, 5, bias)
    assert list(mine.state_dict()) == list(other.state_dict()) and repr(mine) == repr(other)
    for batch in ((2,), ()):
        h, c, x = (torch.randn(*batch, size, requires_grad=True) for size in (5, 5, 3))
        results = []
        for cell in (mine, other):
            outputs, leaves, hx = [], [x, h, *cell.parameters()], (h, c) if kind == "LSTMCell" else h
            for given in (None, hx):
                step = cell(x, given)
                step = cell(x * 0.5, step)
                outputs += step if isinstance(step, tuple) else (step,)
            grads = torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves)
            with torch.no_grad():
                step = cell.eval()(x, hx)
            results.append([*outputs, *grads, *(step if isinstance(step, tuple) else (step,))])
        same(*results)


def test_relu_cell():
    mine, other = pair("RNNCell", 3, 5, True, "relu")
    x = torch.randn(2, 3)
    torch.testing.assert_close(mine(x), other(x))
    with torch.no_grad():
        torch.testing.assert_close(mine.eval()(x), other(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", LAYOUTS[1:4], ids=str)
@pytest.mark.parametrize("order", ["sorted", "unsorted"])
def test_packed_sequences(kind, options, order):
    """What comes back is packed as what was given, states in the caller's order, gradients through all of it."""
    mine, other = pair(kind, 3, 5, **options)
    lengths = torch.tensor([5, 4, 1] if order == "sorted" else [2, 5, 3])
    x, hx = torch.randn(3, 5, 3, requires_grad=True), state(other, 3)
    results = []
    for layer, given, training in itertools.product((mine, other), (None, hx), (True, False)):
        layer.train(training)
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=order == "sorted")
        y, last = layer(packed, given)
        assert isinstance(y, rnn.PackedSequence) and torch.equal(y.batch_sizes, packed.batch_sizes)
        assert y.sorted_indices is packed.sorted_indices and y.unsorted_indices is packed.unsorted_indices
        found = [y.data, *tensors((rnn.pad_packed_sequence(y)[0], last))]
        with torch.no_grad():
            plain = tensors((layer(packed, given)[0].data, layer(packed, given)[1]))
        results.append([*found, *torch.autograd.grad(found[1].square().sum(), [x, *layer.parameters()]), *plain])
    for ours, theirs in zip(results[:4], results[4:], strict=True):
        same(ours, theirs)
    y, _ = mine(rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)]))
    assert y.sorted_indices is None and y.data.shape == (6, mine(x)[0].shape[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_torch_layer_becomes_ours(kind):
    for name in (kind, kind + "Cell"):
        layer = getattr(nn, name)(3, 5)
        x = torch.randn(2, 3)
        expected = layer(x)
        layer.__class__ = getattr(fastdl.nn, name)
        again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        assert type(again) is type(layer)
        for a, b in ((layer(x), expected), (again.eval()(x), expected)):
            same(tensors(a) if kind == name else [*a], tensors(b) if kind == name else [*b])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind):
    """As torch's: between layers, in training, another mask at each step."""
    mine, _ = pair(kind, 3, 64, num_layers=2, dropout=0.5)
    x = torch.randn(4, 2, 3)
    first, second = mine(x)[0], mine(x)[0]
    assert not torch.equal(first, second)
    mine.eval()
    assert torch.equal(mine(x)[0], mine(x)[0])
    all_dropped, _ = pair(kind, 3, 5, num_layers=2, dropout=1.0)
    same([all_dropped(x)[0]], [all_dropped(x * 3)[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind):
    """As a packed sequence, without sorting; 0 is allowed, and the states pass through."""
    for options in LAYOUTS[:4]:
        mine, other = pair(kind, 3, 5, **options)
        lengths, x = torch.tensor([2, 5, 3]), torch.randn(3, 5, 3)
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, last = other(packed)
        y, _ = rnn.pad_packed_sequence(y, batch_first=mine.batch_first)
        given = x if mine.batch_first else x.transpose(0, 1)
        same(tensors(mine(given, lengths=lengths)), tensors((y, last)))
        with torch.no_grad():
            same(tensors(mine.eval()(given, lengths=lengths.int())), tensors((y, last)))
    hx = state(mine, 3)
    y, *last = tensors(mine(given, hx, lengths=torch.zeros(3, dtype=torch.int64)))
    assert not y.any()
    same(last, hx if kind == "LSTM" else [hx], 0)
    same(tensors(mine(given[:, 1], lengths=torch.tensor(2))), tensors(mine(given[:, 1], lengths=torch.tensor([2]))))


# ---- Options --------------------------------------------------------------------------------------------------------

ALL = [(kind, tuple(itertools.chain(*(extra.items() for extra in extras)))) for kind, extras in EXTRAS.items()]
ONE = [(kind, tuple(extra.items())) for kind, extras in EXTRAS.items() for extra in extras]


@pytest.mark.parametrize(("kind", "options"), ONE + ALL, ids=str)
def test_options_train_and_save(kind, options):
    """Gradients reach every parameter; state_dicts, copies and pickles carry the options' parameters."""
    options = dict(options)
    torch.manual_seed(3)
    layer = getattr(fastdl.nn, kind)(3, 6, num_layers=2, bidirectional=True, **options)
    x = torch.randn(4, 2, 3)
    y, *last = tensors(layer(x, lengths=torch.tensor([4, 2])))
    assert y.dtype == torch.float32 and all(s.dtype == torch.float32 for s in last)
    grads = torch.autograd.grad(sum(t.square().sum() for t in (y, *last)), list(layer.parameters()))
    assert all(g.isfinite().all() and g.any() for g in grads)
    layer.eval()
    again = getattr(fastdl.nn, kind)(3, 6, num_layers=2, bidirectional=True, **options).eval()
    again.load_state_dict(layer.state_dict())
    assert repr(again) == repr(layer)
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], layer(x)[0])
    with torch.no_grad():
        same(tensors(layer(x)), tensors(layer(x.clone().requires_grad_())))
        with torch.enable_grad():
            expected = tensors(layer(x.clone().requires_grad_()))
        same(tensors(layer(x)), expected, 1e-2 if "weight_dtype" in options else 1e-5)
    for name, value in options.items():
        assert name not in ("nonlinearity",) or value == layer.nonlinearity
        assert name == "nonlinearity" or f"{name}={value!r}" in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_the_op(kind):
    """Two layers, both directions, layer norm: the public function called twice by hand."""
    layer = getattr(fastdl.nn, kind)(3, 5, num_layers=2, bidirectional=True, layer_norm=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    w = layer.state_dict()
    x, norms = torch.randn(4, 2, 3), ["weight_ln_ih", "weight_ln_hh"]
    norms += ["weight_ln_c", "bias_ln_c"] if kind == "LSTM" else []
    y, parts = x, []
    for index in range(2):
        both = lambda name, index=index: torch.stack((w[f"{name}_l{index}"], w[f"{name}_l{index}_reverse"]))  # noqa: E731
        function = getattr(ops, kind.lower())
        y, last = function(
            y, *(both(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
            layer_norm=[both(name) for name in norms],
        )  # fmt: skip
        parts.append(last if kind == "LSTM" else (last,))
    expected = [y, *(torch.cat(found) for found in zip(*parts, strict=True))]
    same(tensors(layer(x)), expected)
    with torch.no_grad():
        same(tensors(layer.eval()(x)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_hold_for_a_sequence(kind, monkeypatch):
    """Input and state masks are the same at every step; recurrent weights lose elements once; none in evaluation."""
    name, seen = kind.lower(), []
    function = getattr(ops, name)

    def spy(x, w_ih, w_hh, *rest, **options):
        seen.append((x, w_hh, options["h_mask"]))
        return function(x, w_ih, w_hh, *rest, **options)

    monkeypatch.setattr(f"fastdl.nn.{name}.{name}", spy)
    layer = getattr(fastdl.nn, kind)(
        30, 20, num_layers=2, bidirectional=True, input_dropout=0.5, state_dropout=0.25, weight_dropout=0.2
    )
    x = torch.ones(4, 3, 30)
    layer(x)
    assert len(seen) == 2
    inputs, w_hh, h_mask = seen[0]
    assert set(inputs.unique().tolist()) == {0.0, 2.0} and torch.equal(inputs, inputs[:1].expand_as(inputs))
    assert not torch.equal(inputs[:, 0], inputs[:, 1])
    assert h_mask.shape == (2, 3, 20) and set(h_mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    weight = torch.stack((layer.weight_hh_l0, layer.weight_hh_l0_reverse)).detach()
    dropped = w_hh == 0
    assert 0.1 < dropped.float().mean() < 0.3
    torch.testing.assert_close(w_hh[~dropped].detach(), weight[~dropped] / 0.8)
    assert not torch.equal(seen[0][2], seen[1][2])
    layer.eval()
    layer(x)
    assert torch.equal(seen[2][0], x) and torch.equal(seen[2][1], weight) and seen[2][2] is None


@pytest.mark.parametrize("kind", KINDS)
def test_learned_states(kind):
    layer = getattr(fastdl.nn, kind)(3, 5, num_layers=2, bidirectional=True, learn_state=True)
    names = ["h_0", "c_0"][: 2 if kind == "LSTM" else 1]
    assert [n for n, p in layer.named_parameters() if p.shape == (4, 1, 5)] == names and not layer.h_0.any()
    learned = [getattr(layer, name) for name in names]
    for parameter in learned:
        nn.init.normal_(parameter)
    x = torch.randn(4, 3, 3)
    expanded = [p.detach().expand(-1, 3, -1) for p in learned]
    plain = getattr(nn, kind)(3, 5, num_layers=2, bidirectional=True)
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if name not in names})
    expected = tensors(plain(x, tuple(expanded) if kind == "LSTM" else expanded[0]))
    same(tensors(layer(x)), expected)
    with torch.no_grad():
        same(tensors(layer.eval()(x)), expected)
        nn.init.zeros_(layer.h_0)
        assert not torch.allclose(layer(x)[0], expected[0])
        hx = state(layer, 3)
        same(tensors(layer(x, hx)), tensors(plain(x, hx)))
        same(tensors(layer(x[:, 0])), [t.squeeze(1) for t in tensors(layer(x[:, :1]))])


def test_forget_bias():
    for layer in (
        fastdl.nn.LSTM(3, 5, 2, bidirectional=True, forget_bias=1.5),
        fastdl.nn.LSTMCell(3, 5, forget_bias=1.5),
    ):
        for _ in range(2):
            w = layer.state_dict()
            for name in w:
                if name.startswith("bias_ih"):
                    both = w[name] + w[name.replace("_ih", "_hh")]
                    assert torch.equal(both[5:10], torch.full((5,), 1.5)) and (both[:5] != 1.5).all()
            layer.reset_parameters()


def test_initial_values_of_options():
    layer = fastdl.nn.LSTM(3, 5, layer_norm=True, peephole=True)
    for _ in range(2):
        w = layer.state_dict()
        assert (w["weight_ln_ih_l0"] == 1).all() and (w["weight_ln_c_l0"] == 1).all() and not w["bias_ln_c_l0"].any()
        assert w["weight_peephole_l0"].shape == (3, 5) and w["weight_peephole_l0"].abs().max() < 5**-0.5
        layer.reset_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_weight_dtype(kind):
    """Products in bfloat16, as with everything cast; states and results in the input's dtype."""
    layer = getattr(fastdl.nn, kind)(8, 12, 2, weight_dtype=torch.bfloat16)
    full = getattr(nn, kind)(8, 12, 2)
    full.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, 8)
    expected = tensors(full(x))
    for given, training in ((None, True), (None, False), (state(layer, 3), False)):
        layer.train(training)
        with torch.set_grad_enabled(training):
            found = tensors(layer(x, given))
        assert all(t.dtype == torch.float32 for t in found)
        same(found, tensors(full(x, given)), 3e-2)
        assert not torch.equal(found[0], expected[0])
        assert not torch.equal(found[1], found[1].bfloat16().float())  # states are not rounded
    with torch.autocast("cpu", torch.float16):
        assert layer(x)[0].dtype == torch.float32
    layer(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


# ---- torch's machinery ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    """Dynamo refuses every nn.LSTM, nn.GRU and nn.RNN; not these. In training with all that is given, in evaluation."""
    torch._dynamo.reset()
    layer = getattr(fastdl.nn, kind)(3, 5, bidirectional=True, batch_first=True, layer_norm=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, hx, lengths = torch.randn(3, 4, 3), state(layer, 3), torch.tensor([1, 3, 0])
    results = []
    for run in (compiled, layer):
        found = tensors(run(x, hx, lengths=lengths))
        results.append([*found, *torch.autograd.grad(found[0].sum(), list(layer.parameters()))])
    same(*results)
    layer.eval()
    with torch.no_grad():
        same(tensors(compiled(x)), tensors(layer(x)))


def test_compile_with_everything():
    """Inside another module."""
    torch._dynamo.reset()
    layer = fastdl.nn.LSTM(
        3, 6, 2, bidirectional=True, proj_size=2, dropout=0.1, layer_norm=True, peephole=True, zoneout_h=0.1,
        zoneout_c=0.1, input_dropout=0.1, state_dropout=0.1, weight_dropout=0.1, forget_bias=1.0, learn_state=True,
        weight_dtype=torch.bfloat16,
    )  # fmt: skip
    model = nn.Sequential(layer)
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(4, 2, 3))[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    cell, x = fastdl.nn.LSTMCell(3, 6), torch.randn(2, 3)
    same([*torch.compile(cell, fullgraph=True, backend="aot_eager")(x)], [*cell(x)])


@pytest.mark.parametrize("kind", KINDS)
def test_half_and_autocast(kind):
    x = torch.randn(4, 2, 3)
    layer, exact = pair(kind, 3, 5, 2)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(layer).to(dtype)
        expected = exact(x.to(dtype).float())[0]
        for training in (True, False):
            with torch.set_grad_enabled(training):
                y, last = narrow.train(training)(x.to(dtype))
                assert y.dtype == dtype and tensors((y, last))[1].dtype == dtype
                torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
        with torch.autocast("cpu", dtype):
            y, _ = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), exact(x)[0], rtol=3e-2, atol=3e-2)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            torch.testing.assert_close(layer.eval()(x)[0].float(), y.float(), rtol=2e-2, atol=2e-2)
    double = copy.deepcopy(layer).double()
    torch.testing.assert_close(double(x.double())[0].float(), exact(x)[0])
    with torch.no_grad():
        torch.testing.assert_close(double.eval()(x.double())[0].float(), exact(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_parametrizations(kind):
    """Weights that are computed at each call: weight norm, and what torch.func.functional_call puts in."""
    layer, other = pair(kind, 3, 5)
    for module in (layer, other):
        parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(4, 2, 3)
    for module in (layer, other):
        module.parametrizations.weight_hh_l0.original0.data.mul_(1.5)
    same(tensors(layer(x)), tensors(other(x)))
    layer(x)[0].sum().backward()
    assert layer.parametrizations.weight_hh_l0.original0.grad.any()
    layer.eval()
    with torch.no_grad():
        for factor in (1.0, 0.5):
            for module in (layer, other):
                module.parametrizations.weight_hh_l0.original0.mul_(factor)
            same(tensors(layer(x)), tensors(other(x)))
    plain = getattr(fastdl.nn, kind)(3, 5).eval()
    zeros = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    with torch.no_grad():
        plain(x)
        assert not torch.func.functional_call(plain, zeros, (x,))[0].any() and plain(x)[0].any()


def test_training_and_the_double_backward():
    """The gradient penalty that torch's layer on a GPU cannot do."""
    layer = fastdl.nn.GRU(3, 5, bidirectional=True, layer_norm=True)
    x = torch.randn(4, 2, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters() if p.dim() == 2)


def test_the_data_parallel_wrapper():
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = fastdl.nn.LSTM(3, 5, 2, layer_norm=True)
        parallel, x = nn.parallel.DistributedDataParallel(layer), torch.randn(4, 2, 3)
        parallel(x)[0].sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
    finally:
        distributed.destroy_process_group()


def test_hooks_and_flatten_parameters():
    layer, seen = fastdl.nn.LSTM(3, 5, peephole=True), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    layer.flatten_parameters()
    layer(torch.randn(4, 2, 3))
    assert seen == [(4, 2, 5)]


def test_the_page_about_them_has_every_option():
    """tests/test_docs.py runs its examples."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "recurrent.md").read_text(encoding="utf-8")
    every = {name for kind in EXTRAS.values() for options in kind for name in options} - {"nonlinearity"}
    assert all(f"{name}=" in text for name in every)


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"zoneout_h": 1.5}, ValueError, "zoneout_h: expected a probability from 0 to 1, got 1.5"),
        ({"zoneout_c": "a"}, ValueError, "zoneout_c: expected a probability from 0 to 1, got 'a'"),
        ({"input_dropout": -0.1}, ValueError, "input_dropout: expected a probability"),
        ({"state_dropout": float("nan")}, ValueError, "state_dropout: expected a probability"),
        ({"weight_dropout": True}, ValueError, "weight_dropout: expected a probability from 0 to 1, got True"),
        ({"dropout": 2.0}, ValueError, "dropout should be a number in range"),
        ({"layer_norm": 1}, TypeError, "layer_norm: expected True or False, got 1"),
        ({"peephole": "yes"}, TypeError, "peephole: expected True or False, got 'yes'"),
        ({"learn_state": None}, TypeError, "learn_state: expected True or False, got None"),
        ({"forget_bias": True}, TypeError, "forget_bias: expected a number or None, got True"),
        ({"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias: expected None where bias=False, got 1.0; set"),
        ({"weight_dtype": torch.int8}, TypeError, "weight_dtype: expected None or a floating point dtype"),
        ({"weight_dtype": "bf16"}, TypeError, "weight_dtype: expected None or a floating point dtype, got 'bf16'"),
        ({"backend": "cdua"}, ValueError, r"backend: expected None, 'auto' or one of cpu, .*, got 'cdua'"),
        ({"proj_size": 5}, ValueError, "proj_size has to be smaller than hidden_size"),
    ],
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fastdl.nn.LSTM(3, 5, **options)


def test_bad_nonlinearity():
    for layer in (fastdl.nn.RNN, fastdl.nn.RNNCell):
        with pytest.raises(ValueError, match="nonlinearity"):
            layer(3, 5, nonlinearity="gelu")


@pytest.mark.parametrize("training", [True, False])
def test_bad_input(training):
    layer = fastdl.nn.LSTM(3, 5, 2, proj_size=2).train(training)
    x, h, c = torch.randn(4, 2, 3), torch.zeros(2, 2, 2), torch.zeros(2, 2, 5)
    bad = [
        (([1.0],), TypeError, "input: expected a tensor or a PackedSequence, got list"),
        ((torch.ones(3),), ValueError, r"input: expected 2 or 3 dimensions .* got \(3,\)"),
        ((torch.ones(4, 2, 4),), ValueError, r"input: expected shape \[\.\.\., input_size = 3\], got \(4, 2, 4\)"),
        ((x.double(),), ValueError, "input: expected the dtype of the weights, torch.float32, got torch.float64; conv"),
        ((x, h), TypeError, r"hx: expected a pair of tensors \(h_0, c_0\), got Tensor"),
        ((x, (h, c, c)), TypeError, r"hx: expected a pair of tensors \(h_0, c_0\), got 3 of them"),
        ((x, (h, None)), TypeError, r"hx\[1\]: expected a tensor, got NoneType"),
        (
            (x, (h[:1], c)),
            ValueError,
            r"hx\[0\]: expected shape \(num_layers \* directions, batch, proj_size\) = \(2, 2",
        ),
        ((x, (h, c[:, :1])), ValueError, r"hx\[1\]: expected shape .*hidden_size\) = \(2, 2, 5\), got \(2, 1, 5\)"),
        ((x[:, 0], (h, c)), ValueError, r"hx\[0\]: expected shape \(num_layers \* directions, proj_size\) = \(2, 2\)"),
    ]
    for arguments, error, message in bad:
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
                layer(*arguments)
    for lengths, message in (
        (torch.tensor([1, 5]), "lengths: expected values from 0 to 4"),
        (torch.tensor([1]), r"lengths: expected shape \(2,\)"),
        (torch.tensor([-1, 2]), "lengths: expected values from 0 to 4, .* got -1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, lengths=lengths)
    with pytest.raises(TypeError, match="lengths: expected an int64 tensor"):
        layer(x, lengths=[1, 2])
    with pytest.raises(ValueError, match="lengths: expected None with a PackedSequence"):
        layer(rnn.pack_sequence([x[:, 0]]), lengths=torch.tensor([4]))
    with pytest.raises(ValueError, match=r"input: expected shape \[\.\.\., input_size = 3\]"):
        layer(rnn.pack_sequence([torch.ones(4, 2)]))
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        layer.load_state_dict(fastdl.nn.LSTM(3, 6, 2, proj_size=2).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_peephole_l0"):
        fastdl.nn.LSTM(3, 5, peephole=True).load_state_dict(fastdl.nn.LSTM(3, 5).state_dict())


def test_bad_input_of_cells():
    for cell in (fastdl.nn.LSTMCell(3, 5), fastdl.nn.GRUCell(3, 5)):
        for x, error, message in (
            ([1.0], TypeError, "input: expected a tensor, got list"),
            (torch.ones(2, 4), ValueError, r"input: expected shape \[\.\.\., input_size = 3\]"),
            (torch.ones(1, 2, 3), ValueError, "input: expected 1 or 2 dimensions"),
            (torch.ones(2, 3).double(), ValueError, "input: expected the dtype of the weights"),
        ):
            with pytest.raises(error, match=message):
                cell(x)
    with pytest.raises(ValueError, match=r"hx: expected shape \(batch, hidden_size\) = \(2, 5\), got \(3, 5\)"):
        cell(torch.ones(2, 3), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"hx: expected shape \(hidden_size,\) = \(5,\)"):
        cell(torch.ones(3), torch.ones(1, 5))


def test_no_steps_and_no_sequences():
    """torch raises for them; here the states pass through."""
    for kind, (steps, batch) in itertools.product(KINDS, ((0, 2), (3, 0), (0, 0))):
        layer = getattr(fastdl.nn, kind)(3, 5, 2, bidirectional=True)
        hx = state(layer, batch)
        for training in (True, False):
            with torch.set_grad_enabled(training):
                y, *last = tensors(layer.train(training)(torch.ones(steps, batch, 3), hx))
            assert y.shape == (steps, batch, 10)
            same(last, hx if kind == "LSTM" else [hx], 0)
