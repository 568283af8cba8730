"""fastdl.nn.TransformerEncoderLayer and TransformerDecoderLayer: torch's layers, in every option."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import fastdl
from fastdl.testing import check

F = nn.functional
B, L, S, E, H, D = 3, 7, 9, 24, 4, 40
ENCODER = (fastdl.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer)
DECODER = (fastdl.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer)


def layers(kinds, **options):
    """Ours and torch's, with the same parameters, away from their start."""
    ours, theirs = (kind(E, H, D, **{"dropout": 0.0, **options}) for kind in kinds)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def function(layer, names, **options):
    """Of the inputs (one: encoder, two: decoder) and the parameters."""
    count = 2 if isinstance(layer, nn.TransformerDecoderLayer) else 1

    def call(*tensors):
        parameters = dict(zip(names, tensors[count:], strict=True))
        return torch.func.functional_call(layer, parameters, tensors[:count], options)

    return call


def hold(kinds, masks, dtype=torch.float32, **options):
    ours, theirs = layers(kinds, **options)
    names = [name for name, _ in ours.named_parameters()]
    lengths = (L, S) if isinstance(ours, nn.TransformerDecoderLayer) else (L,)
    x = [torch.randn((B, n, E) if options.get("batch_first") else (n, B, E)) for n in lengths]
    tensors = [t.detach().to(dtype, copy=True).requires_grad_() for t in (*x, *ours.parameters())]
    check(function(ours, names, **masks), tensors, peer=function(theirs, names, **masks), norm=True)


PADDING = torch.arange(L) >= torch.tensor([L, 4, 1])[:, None]
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"src_mask": CAUSAL, "is_causal": True},
    "causal and padding": {"src_mask": CAUSAL, "is_causal": True, "src_key_padding_mask": PADDING},
    "floating": {"src_mask": nn.Transformer.generate_square_subsequent_mask(L)},
}
ACTIVATIONS = ["relu", "gelu", F.silu, nn.GELU("tanh"), nn.ELU()]


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch-first"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("masks", MASKS)
def test_encoder_layer(native, norm_first, batch_first, masks):
    hold(ENCODER, MASKS[masks], norm_first=norm_first, batch_first=batch_first)


@pytest.mark.parametrize("kinds", [ENCODER, DECODER], ids=["encoder", "decoder"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["relu", "gelu", "silu", "gelu-tanh", "elu"])
def test_activations(native, kinds, activation):
    hold(kinds, {}, activation=activation, bias=False, layer_norm_eps=1e-3)


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch-first"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_decoder_layer(native, norm_first, batch_first, masked):
    masks = {}
    if masked:
        memory_padding = torch.arange(S) >= torch.tensor([S, 4, 1])[:, None]
        memory_mask = torch.rand(L, S) < 0.3
        memory_mask[:, 0] = False
        masks = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "tgt_key_padding_mask": PADDING,
                 "memory_mask": memory_mask, "memory_key_padding_mask": memory_padding}  # fmt: skip
    hold(DECODER, masks, norm_first=norm_first, batch_first=batch_first)


def test_decoder_that_is_causal_without_a_mask(native):
    ours, theirs = layers(DECODER, batch_first=True)
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    expected = theirs(x, memory, tgt_mask=CAUSAL)
    torch.testing.assert_close(ours(x, memory, tgt_is_causal=True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_in_torchs_encoder(native, norm_first):
    """In training and in inference, where torch makes nested tensors of padded batches."""
    ours, theirs = layers(ENCODER, batch_first=True, norm_first=norm_first)
    nested = not norm_first
    models = [nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), nested) for layer in (ours, theirs)]
    x = torch.randn(B, L, E)
    for mode in (True, False):
        for model in models:
            model.train(mode)
        for masks in ({}, {"src_key_padding_mask": PADDING}, {"mask": CAUSAL}, {"mask": CAUSAL, "is_causal": True},
                      {"mask": nn.Transformer.generate_square_subsequent_mask(L)}):  # fmt: skip
            with torch.set_grad_enabled(mode):
                got, expected = (model(x, **masks) for model in models)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert models[0].layers[0].self_attn is not models[0].layers[1].self_attn


def test_nested_input_is_computed_packed(native, monkeypatch):
    """Without its padding: the attention sees the rows of all sequences, one after the other."""
    seen = []
    packed = fastdl.nn.MultiheadAttention.packed
    monkeypatch.setattr(fastdl.nn.MultiheadAttention, "packed",
                        lambda self, x, cu: seen.append((x.shape, cu.tolist())) or packed(self, x, cu))  # fmt: skip
    model = nn.TransformerEncoder(fastdl.nn.TransformerEncoderLayer(E, H, D, batch_first=True), 2).eval()
    with torch.inference_mode():
        model(torch.randn(B, L, E), src_key_padding_mask=PADDING)
    assert seen == [((12, E), [0, 7, 11, 12])] * 2
    with pytest.raises(ValueError, match="expected None beside a nested src"):
        model.layers[0](torch.nested.nested_tensor([torch.randn(2, E)]), src_mask=CAUSAL)


@pytest.mark.parametrize("kinds", [ENCODER, DECODER], ids=["encoder", "decoder"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_dropout(native, kinds, norm_first):
    """Training draws from torch's generator, evaluation does not; the mean of many draws is what torch's mean is."""
    ours, theirs = layers(kinds, batch_first=True, norm_first=norm_first, dropout=0.2)
    inputs = (torch.randn(1, L, E), torch.randn(1, S, E))[: 1 if kinds is ENCODER else 2]
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(ours(*inputs))
    assert torch.equal(*runs) and not torch.equal(ours(*inputs), runs[0])
    many = [t.expand(4000, -1, -1) for t in inputs]
    with torch.no_grad():
        means, spreads = zip(*((y.mean(0), y.std(0)) for y in (ours(*many), theirs(*many))), strict=True)
        torch.testing.assert_close(means[0], means[1], rtol=0, atol=6 * float(spreads[1].max()) / 4000**0.5)
        torch.testing.assert_close(spreads[0], spreads[1], rtol=0.2, atol=0.02)
        for layer in (ours, theirs):
            layer.eval()
        torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-4)
    ours.train().dropout1.p = ours.dropout2.p = ours.dropout.p = ours.self_attn.dropout = 0.0
    if kinds is DECODER:
        ours.dropout3.p = ours.multihead_attn.dropout = 0.0
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-4)  # p is looked at in each call


def test_parts_that_cannot_be_fused_are_called(native):
    """A norm of one's own, hooks, a subclass of Dropout: each runs."""

    class Halved(nn.Dropout):
        def forward(self, x):
            return x / 2

    calls = []
    for change in ("norm", "hook on dropout", "dropout", "activation", "torch's attention"):
        ours, theirs = layers(ENCODER, batch_first=True, activation="relu")
        for layer in (ours, theirs):
            if change == "norm":
                layer.norm2 = nn.RMSNorm(E, eps=1e-6)
            elif change == "dropout":
                layer.dropout1 = Halved()
            elif change == "activation":
                layer.activation = nn.ReLU()
                layer.activation.register_forward_hook(lambda *args: calls.append("activation"))
            elif change == "hook on dropout":
                layer.dropout.register_forward_hook(lambda *args: calls.append("dropout"))
        if change == "torch's attention":
            ours.self_attn = copy.deepcopy(theirs.self_attn)
        x = torch.randn(B, L, E)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert calls == ["dropout"] * 2 + ["activation"] * 2


@pytest.mark.parametrize("kinds", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_is_torchs_layer(kinds):
    made = []
    for kind in kinds:
        torch.manual_seed(0)
        made.append(kind(E, H, D))
    ours, theirs = made
    assert isinstance(ours, type(theirs)) and list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert type(ours.self_attn) is fastdl.nn.MultiheadAttention and type(ours.norm1) is fastdl.nn.LayerNorm
    named = kinds[0](E, H, D, backend="torch")
    assert named.self_attn.backend == named.norm2.backend == "torch" and "backend='torch'" in repr(named)
    with pytest.raises(ValueError, match="backend: expected None, 'auto' or one of cpu"):
        kinds[0](E, H, D, backend="cdua")


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_compile_and_autocast(native, norm_first):
    ours, theirs = layers(ENCODER, batch_first=True, norm_first=norm_first)
    x = torch.randn(B, L, E)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, src_key_padding_mask=PADDING), ours(x, src_key_padding_mask=PADDING))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(x), theirs(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize(("kinds", "dtype"), itertools.product([ENCODER, DECODER], [torch.bfloat16, torch.float16]))
def test_half_precision(native, kinds, dtype, norm_first):
    hold(kinds, {}, dtype, batch_first=True, norm_first=norm_first)


@pytest.mark.parametrize("kinds", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_double_precision(native, kinds):
    ours, theirs = (layer.double() for layer in layers(kinds, batch_first=True))
    inputs = (torch.randn(B, L, E).double(), torch.randn(B, S, E).double())[: 1 if kinds is ENCODER else 2]
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-10, atol=1e-10)
