"""QuantLinear, QuantEmbedding and fastdl.quantize: modules, state dicts, ties, the report, and nothing half done."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional as F

import fastdl
from fastdl import nn
from fastdl.quant import QuantTensor


class Tied(torch.nn.Module):
    """A language model's skeleton: embedding and head share one weight."""

    def __init__(self, width: int = 64, words: int = 40):
        super().__init__()
        self.embed = torch.nn.Embedding(words, width, padding_idx=3)
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width, bias=False)
        self.head = torch.nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(F.silu(self.up(self.norm(x)))))


IDS = torch.tensor([[1, 2, 3], [39, 0, 7]])


def dense_twin(model: Tied) -> Tied:
    """The quantized model with its weights dequantized."""
    twin = Tied()
    twin.load_state_dict(
        {
            "embed.weight": model.embed.weight.dequantize(),
            "head.weight": model.head.weight.dequantize(),
            "norm.weight": model.norm.weight,
            "norm.bias": model.norm.bias,
            "up.weight": model.up.weight.dequantize(),
            "up.bias": model.up.bias,
            "down.weight": model.down.weight.dequantize(),
        }
    )
    return twin


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("format", ["q4_1", "q8_0", "f16", "bf16", "f32"])
def test_linear_there_and_back(format):
    linear = torch.nn.Linear(64, 48)
    layer = nn.QuantLinear.from_linear(linear, format, activation="fp32")
    assert (layer.in_features, layer.out_features, layer.weight.format) == (64, 48, format)
    assert layer.bias is linear.bias and list(dict(layer.named_parameters())) == ["bias"]
    x = torch.randn(5, 64)
    back = layer.to_linear()
    assert isinstance(back, torch.nn.Linear) and torch.equal(back.weight, layer.weight.dequantize())
    torch.testing.assert_close(layer(x), back(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(nn.QuantLinear.from_linear(back, format).weight.dequantize(), back.weight) or format == "q4_1"
    half = layer.to_linear(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    assert nn.QuantLinear.from_linear(torch.nn.Linear(64, 48, bias=False), format).to_linear().bias is None


def test_embedding_there_and_back():
    embedding = torch.nn.Embedding(40, 64, padding_idx=2, dtype=torch.bfloat16)
    table = nn.QuantEmbedding.from_embedding(embedding, "q8_0")
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (40, 64, 2)
    assert table(IDS).dtype == torch.bfloat16 and table.float()(IDS).dtype == torch.float32
    back = table.to_embedding()
    assert back.padding_idx == 2 and torch.equal(back(IDS), table(IDS))
    assert repr(table) == "QuantEmbedding(40, 64, padding_idx=2, format=q8_0)"


def test_state_dict_round_trip():
    for make in (
        lambda f: nn.QuantLinear(64, 48, format=f),
        lambda f: nn.QuantEmbedding(48, 64, format=f),
    ):
        source, target = make("q4_1"), make("q4_1")
        source.weight.load_(fastdl.ops.quantize(torch.randn(48, 64)).to_gguf())
        state = source.state_dict()
        assert state["weight_q4_1"].dtype == torch.uint8 and state["weight_q4_1"].shape == (48, 40)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        shared = target.weight
        target.load_state_dict(torch.load(file, weights_only=True))
        assert target.weight is shared and same_weights(source, target)
        assert target.weight.layout == source.weight.layout
        for assign in (False, True):
            on_meta = make("q4_1") if not assign else make("q4_1").to("meta")
            on_meta.load_state_dict(state, assign=assign)
            assert same_weights(source, on_meta)
        with pytest.raises(RuntimeError, match=r"Missing key.*weight_q8_0"):
            make("q8_0").load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"weight_q4_1: expected \(48, 40\) bytes of q4_1, got \(47, 40\)"):
            target.load_state_dict({**state, "weight_q4_1": state["weight_q4_1"][1:]})
        with pytest.raises(RuntimeError, match=r"weight_q4_1: expected uint8 bytes of q4_1, got torch\.float32"):
            target.load_state_dict({**state, "weight_q4_1": state["weight_q4_1"].float()})
        assert same_weights(source, target)


def test_copies_and_moves():
    layer = nn.QuantLinear.from_linear(torch.nn.Linear(64, 48))
    x = torch.randn(2, 64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to("cpu")):
        assert torch.equal(other(x), layer(x)) and other.weight is not layer.weight
    half = copy.deepcopy(layer).half()
    assert half.bias.dtype == torch.float16 and half(x.half()).dtype == torch.float16
    assert same_weights(half.float().to(torch.float32), half)
    assert torch.equal(copy.deepcopy(layer).type(torch.float32)(x), layer(x))  # casts every dtype, but not the codes
    moved = copy.deepcopy(layer).to("meta")
    assert moved.weight.device.type == "meta" and moved.weight.layout == "gguf"
    assert repr(layer) == "QuantLinear(in_features=64, out_features=48, bias=True, format=q4_1)"


def test_quantize_keeps_ties_and_says_what_it_did():
    torch.manual_seed(0)
    model = Tied().eval()
    before = model.up.bias
    report = fastdl.quantize(model, "q4_1")
    assert type(model.embed) is nn.QuantEmbedding and model.embed.padding_idx == 3 and not model.embed.training
    assert model.head.weight is model.embed.weight and model.up.bias is before
    assert [layer.name for layer in report.quantized] == ["embed", "up", "down", "head"] and not report.skipped
    floats = 40 * 64 + 2 * 64 * 128 + 128 + 2 * 64
    assert report.before == 4 * floats
    assert report.after == sum(w.nbytes for w in (model.embed.weight, model.up.weight, model.down.weight)) + 4 * 256
    assert "4 layers quantized, 0 skipped" in str(report) and "128 x 64" in str(report)
    with torch.no_grad():
        error = (model(IDS) - dense_twin(model)(IDS)).abs().max()
        assert error < 0.05 * dense_twin(model)(IDS).abs().max()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.head.weight is other.embed.weight and same_weights(other, model)
    state = model.state_dict()
    assert state["head.weight_q4_1"] is state["embed.weight_q4_1"]
    fresh = Tied()
    fastdl.quantize(fresh, "q4_1")
    fresh.load_state_dict(state)
    assert fresh.head.weight is fresh.embed.weight and same_weights(fresh, model)


def test_include_and_exclude():
    model = Tied()
    report = fastdl.quantize(model, "q8_0", include=["embed", "head"])
    assert [layer.reason for layer in report.layers] == [None, "excluded", "excluded", None]
    report = fastdl.quantize(model, "q4_1", exclude="d?wn")
    assert [layer.reason for layer in report.layers] == ["is q8_0 already", None, "excluded", "is q8_0 already"]
    assert type(model.down) is torch.nn.Linear and model.embed.weight.format == "q8_0"
    assert fastdl.quantize(model, exclude="down").quantized == []
    half_tied = Tied()
    report = fastdl.quantize(half_tied, exclude="head")
    assert report.layers[0].reason == "shares its weight with head.weight, which is not quantized"
    assert half_tied.head.weight is half_tied.embed.weight and type(half_tied.embed) is torch.nn.Embedding


class Special(torch.nn.Linear):
    pass


def test_what_is_skipped_and_why():
    model = torch.nn.ModuleDict(
        {
            "good": torch.nn.Linear(64, 8),
            "odd": torch.nn.Linear(33, 8),
            "special": Special(64, 8),
            "conv": torch.nn.Conv2d(3, 8, 3),
            "normed": torch.nn.utils.weight_norm(torch.nn.Linear(64, 8)),
            "parametrized": torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, 8)),
            "patched": torch.nn.Linear(64, 8),
            "meta": torch.nn.Linear(64, 8, device="meta"),
            "renormed": torch.nn.Embedding(8, 64, max_norm=1.0),
            "bag": torch.nn.EmbeddingBag(8, 64),
            "attention": torch.nn.MultiheadAttention(64, 2),
            "lazy": torch.nn.LazyLinear(8),
        }
    )
    model["patched"].forward = lambda x: x
    report = fastdl.quantize(model)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert [name for name, reason in reasons.items() if reason is None] == ["good"]
    for name, reason in {
        "odd": "33 input features do not divide by 32 (possible: f16, bf16, f32)",
        "special": "Special is a subclass that may compute something else",
        "conv": "no quantized Conv2d",
        "normed": "its weight is computed (weight norm or the like), not a parameter",
        "parametrized": "ParametrizedLinear is a subclass that may compute something else",
        "patched": "its forward was replaced on the instance",
        "meta": "is on the meta device: load the weights first",
        "renormed": "max_norm rewrites its weights at each use",
        "bag": "no quantized EmbeddingBag",
        "lazy": "has no weights yet (lazy): call the model once first",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is a subclass that may compute something else",
    }.items():
        assert reasons[name] == reason


def test_shared_modules_hooks_and_training_survive():
    shared = torch.nn.Linear(64, 64)
    model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared, torch.nn.Sequential(shared))
    seen = []
    handle = shared.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    shared.eval()
    fastdl.quantize(model)
    assert model[0] is model[2] is model[3][0] and type(model[0]) is nn.QuantLinear and not model[0].training
    model(torch.randn(2, 64))
    assert seen == [nn.QuantLinear] * 3
    handle.remove()
    model(torch.randn(2, 64))
    assert len(seen) == 3


def test_the_input_and_the_bias_train():
    model = Tied()
    fastdl.quantize(model)
    model(IDS).square().mean().backward()
    assert model.up.bias.grad.abs().sum() > 0 and model.norm.weight.grad.abs().sum() > 0
    assert sorted(dict(model.named_parameters())) == ["norm.bias", "norm.weight", "up.bias"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mask", [None, torch.tensor([[False] * 4, [False, False, True, True]])], ids=["all", "padded"])
def test_transformer_encoder_without_its_fast_path(mask):
    """In eval torch's encoder hands the weights to one fused op; with quantized layers it must call the layers."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 4, 64)
    with torch.inference_mode():
        exact = model(x, src_key_padding_mask=mask)
        fastdl.quantize(model, "q8_0")
        y = model(x, src_key_padding_mask=mask)
    keep = slice(None) if mask is None else ~mask
    torch.testing.assert_close(y[keep], exact[keep], rtol=0.1, atol=0.1)


def nan_model() -> Tied:
    model = Tied()
    with torch.no_grad():
        model.down.weight[3, 4] = float("nan")
    return model


BAD = {
    "format": (Tied, {"format": "q3"}, ValueError, "format: unknown format 'q3'"),
    "read only": (Tied, {"format": "q6_k"}, ValueError, "nothing to quantize .*do not divide by 256"),
    "nan": (nan_model, {}, ValueError, "down.weight: expected finite weights, got 1 NaN"),
    "include": (
        Tied,
        {"include": ["up", "dwon"]},
        ValueError,
        "include: 'dwon' matches no layer; the layers are embed",
    ),
    "exclude": (Tied, {"exclude": "lm_head"}, ValueError, "exclude: 'lm_head' matches no layer"),
    "pattern alone": (Tied, {"include": 3}, TypeError, "include: expected names or patterns"),
    "pattern": (Tied, {"include": [3]}, TypeError, "include: expected names or patterns"),
    "everything": (Tied, {"exclude": "*"}, ValueError, "model: nothing to quantize"),
    "no layers": (torch.nn.ReLU, {}, ValueError, "model: nothing to quantize .*no Linear or Embedding"),
    "itself": (lambda: torch.nn.Linear(64, 8), {}, ValueError, r"use fastdl.nn.QuantLinear.from_linear\(model\)"),
    "no module": (dict, {}, TypeError, "model: expected a torch.nn.Module, got dict"),
}


@pytest.mark.parametrize(("make", "arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_the_model_alone(make, arguments, error, message):
    model = make()
    kinds = [type(module) for module in model.modules()] if isinstance(model, torch.nn.Module) else None
    with pytest.raises(error, match=message):
        fastdl.quantize(model, **arguments)
    if kinds is not None:
        assert [type(module) for module in model.modules()] == kinds
        assert all(not isinstance(vars(module).get("weight"), QuantTensor) for module in model.modules())


def test_bad_input_of_the_modules():
    with pytest.raises(TypeError, match=r"linear: expected nn\.Linear, got ReLU"):
        nn.QuantLinear.from_linear(torch.nn.ReLU())
    with pytest.raises(TypeError, match=r"embedding: expected nn\.Embedding, got Linear"):
        nn.QuantEmbedding.from_embedding(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="embedding: max_norm"):
        nn.QuantEmbedding.from_embedding(torch.nn.Embedding(4, 64, max_norm=1.0))
    with pytest.raises(ValueError, match=r"linear\.weight: q4_1 needs rows of a multiple of 32 weights"):
        nn.QuantLinear.from_linear(torch.nn.Linear(33, 4))
    with pytest.raises(ValueError, match="cols: q4_1 needs rows of a multiple of 32"):
        nn.QuantLinear(33, 4)
    layer = nn.QuantLinear.from_linear(torch.nn.Linear(64, 4, bias=False))
    x = torch.randn(2, 64)
    before = layer(x)
    for value, message in (([1], "uint8 bytes of q4_1, got list"), (layer.weight.to_gguf().to("meta"), "meta device")):
        with pytest.raises(RuntimeError, match=f"weight_q4_1: .*{message}"):
            layer.load_state_dict({"weight_q4_1": value})
    assert torch.equal(layer(x), before)
