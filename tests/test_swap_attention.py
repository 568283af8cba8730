"""fastdl.accelerate on torch's attention and transformer layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_swap import state
from torch import nn

import fastdl

B, L, S, E, H = 3, 7, 5, 32, 4
PADDING = torch.arange(L) >= torch.tensor([L, 4, 1])[:, None]


def transformer(**options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Transformer(E, H, 2, 2, 48, batch_first=True, dropout=0.0, **options)


def run(model, mode=torch.no_grad):
    generator = torch.Generator().manual_seed(1)
    src, tgt = (torch.randn(B, n, E, generator=generator) for n in (L, S))
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    with mode():
        return model(src, tgt, tgt_mask=causal, src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_whole_transformer(native, norm_first, mode, monkeypatch):
    """Every layer is swapped and called, also where torch has a fast path; restore gives back what was."""
    model = transformer(norm_first=norm_first).eval()
    expected, before = run(model, mode), state(model)
    report = fastdl.accelerate(model)
    kinds = sorted(layer.kind for layer in report.swapped)
    assert not report.left
    assert (
        kinds
        == ["LayerNorm"] * 12
        + ["MultiheadAttention"] * 6
        + ["TransformerDecoderLayer"] * 2
        + ["TransformerEncoderLayer"] * 2
    )
    assert type(model.encoder.layers[0]) is fastdl.nn.TransformerEncoderLayer
    assert isinstance(model.encoder.layers[0], nn.TransformerEncoderLayer)
    calls = []
    forward = fastdl.nn.MultiheadAttention.forward
    monkeypatch.setattr(
        fastdl.nn.MultiheadAttention, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k)
    )
    torch.testing.assert_close(run(model, mode), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 6
    fastdl.restore(model)
    assert state(model) == before and torch.equal(run(model, mode), expected)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("only", ["*attn", "*norm*", "encoder.layers.0", ["encoder.layers.1", "*.1.self_attn"]])
def test_parts(native, only):
    """Whichever parts are swapped, the others go on being torch's, and the model computes the same."""
    model = transformer().eval()
    expected, before = run(model), state(model)
    with fastdl.accelerated(model, only=only) as report:
        assert 0 < len(report.swapped) < len(report.layers)
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    assert state(model) == before and torch.equal(run(model), expected)


def test_attention_alone(native):
    layer = nn.MultiheadAttention(E, H, kdim=8, vdim=12, add_bias_kv=True, dropout=0.1).eval()
    given = torch.randn(L, B, E), torch.randn(S, B, 8), torch.randn(S, B, 12)
    expected = layer(*given)
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    assert fastdl.accelerate(layer, backend="torch").swapped and layer.backend == "torch"
    for other in (layer, copy.deepcopy(layer)):
        for a, b in zip(other(*given), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert seen and set(seen) == {fastdl.nn.MultiheadAttention}
    fastdl.restore(layer)
    assert type(layer) is nn.MultiheadAttention and "backend" not in vars(layer)


def test_layers_that_are_left(native):
    class Mine(nn.TransformerEncoderLayer):
        def forward(self, src, **masks):
            return 2 * super().forward(src, **masks)

    class Attention(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([
        Mine(E, H, 48, batch_first=True), Attention(E, H), nn.MultiheadAttention(E, H).double(),
        fastdl.nn.TransformerEncoderLayer(E, H, 48), nn.MultiheadAttention(E, H, device="meta"),
    ]).eval()  # fmt: skip
    x = torch.randn(B, L, E)
    with torch.no_grad():
        expected = model[0](x)
        report = fastdl.accelerate(model)
        torch.testing.assert_close(model[0](x), expected, rtol=1e-4, atol=1e-5)
    reasons = {layer.name: layer.reason for layer in report.left}
    assert reasons["0"] == "Mine is a subclass that may compute something else"
    assert reasons["1"] == "Attention is a subclass that may compute something else"
    assert "no fused back end for torch.float64" in reasons["2"] and "meta device" in reasons["4"]
    assert reasons["3"] == reasons["3.self_attn"] == reasons["3.norm1"] == "is a fused layer"
    assert {layer.name for layer in report.swapped} == {"0.self_attn", "0.norm1", "0.norm2"}


def test_training_copies_and_pickles(native):
    model = transformer().train()
    copies = [model, copy.deepcopy(model)]
    fastdl.accelerate(copies[1])
    copies.append(pickle.loads(pickle.dumps(copies[1])))
    gradients = []
    for one in copies:
        run(one, torch.enable_grad).square().mean().backward()
        gradients.append([p.grad for p in one.parameters()])
    for ours in gradients[1:]:
        for a, b in zip(ours, gradients[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    fastdl.restore(copies[2])
    assert {type(m) for m in copies[2].modules()} == {type(m) for m in model.modules()}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_compile(native):
    model = transformer().encoder.eval()
    x = torch.randn(B, L, E)
    expected = model(x)
    fastdl.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
