"""fastdl.accelerate, restore, accelerated: the model keeps everything but the arithmetic of its swapped layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastdl
from fastdl import BackendError, swap

X = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU())
    return nn.Sequential(nn.LayerNorm(16), block, nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 16))


def state(model: nn.Module) -> list:
    """Everything that a swap must leave as it was."""
    return [
        (name, type(module), dict(vars(module)), [id(p) for p in module.parameters(recurse=False)])
        for name, module in model.named_modules()
    ]


def test_swap_and_restore(native):
    model = small().eval()
    before, modules, expected = state(model), list(model.modules()), model(X)
    report = fastdl.accelerate(model)
    assert [layer.name for layer in report.swapped] == ["0", "1.1", "2"] and not report.left
    assert report.others == {"Linear": 2, "GELU": 1}
    assert type(model[0]) is fastdl.nn.LayerNorm and type(model[2]) is fastdl.nn.RMSNorm
    assert list(model.modules()) == modules and isinstance(model[0], nn.LayerNorm) and not model.training
    torch.testing.assert_close(model(X), expected)
    fastdl.restore(model)
    assert state(model) == before and torch.equal(model(X), expected)
    fastdl.restore(model)
    assert state(model) == before


def test_swapped_layers_are_called(native, monkeypatch):
    calls = []
    monkeypatch.setattr("fastdl.nn.norm.layer_norm", lambda x, *a, **k: calls.append(k["backend"]) or x)
    model = small()
    fastdl.accelerate(model, backend="torch")
    model(X)
    assert calls == ["torch", "torch"] and model[0].backend == "torch"
    fastdl.restore(model)
    assert "backend" not in vars(model[0])


def test_report_prints_as_a_table(native):
    model = small()
    text = str(fastdl.accelerate(model, exclude="0"))
    assert text.splitlines() == [
        "layer  kind       note",
        "0      LayerNorm  left: excluded",
        "1.1    LayerNorm  swapped",
        "2      RMSNorm    swapped",
        "2 of 3 known layers swapped",
        "no fused version: 1 GELU, 2 Linear",
    ]
    assert "1.1    LayerNorm  left: swapped already" in str(fastdl.accelerate(model))


def test_only_and_exclude(native):
    model = small()
    assert [y.name for y in fastdl.accelerate(model, only="1.*").swapped] == ["1.1"]
    assert [y.name for y in fastdl.accelerate(model, exclude=["2", "1.1"]).swapped] == ["0"]
    with pytest.raises(ValueError, match=r"only: 'encoder\.\*' matches no layer; the layers are 0, 1\.1, 2"):
        fastdl.accelerate(model, only="encoder.*")
    with pytest.raises(TypeError, match="exclude: expected names"):
        fastdl.accelerate(model, exclude=3)


def test_nothing_to_swap():
    report = fastdl.accelerate(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert not report.layers
    assert str(report) == "0 of 0 known layers swapped\nno fused version: 1 Linear, 1 ReLU"
    with pytest.raises(TypeError, match="model: expected a torch"):
        fastdl.accelerate("model")
    with pytest.raises(TypeError, match="model: expected a torch"):
        fastdl.restore(None)


def test_a_layer_alone(native):
    norm = nn.LayerNorm(8)
    assert "(model)" in str(fastdl.accelerate(norm)) and type(norm) is fastdl.nn.LayerNorm
    fastdl.restore(norm)
    assert type(norm) is nn.LayerNorm


def test_back_end_that_cannot_leaves_the_model_unchanged(native):
    model = small()
    before = state(model)
    with pytest.raises(BackendError, match="CUDA device"):
        fastdl.accelerate(model, backend="cuda")
    assert state(model) == before


def test_layers_that_are_left(native):
    class Mine(nn.LayerNorm):
        def forward(self, x):
            return x

    model = nn.Sequential(Mine(4), nn.LayerNorm(4), nn.LayerNorm(4, device="meta"), nn.LayerNorm(4).double())
    model[1].forward = lambda x: x
    model.append(fastdl.nn.LayerNorm(4))
    reasons = {layer.name: layer.reason for layer in fastdl.accelerate(model).left}
    assert "subclass that may compute something else" in reasons["0"]
    assert "replaced on the instance" in reasons["1"] and "meta device" in reasons["2"]
    assert "no fused back end for torch.float64" in reasons["3"] and reasons["4"] == "is a fused layer"


def test_context(native):
    model = small()
    fastdl.accelerate(model, only="0")
    with pytest.raises(RuntimeError, match="inside"), fastdl.accelerated(model) as report:
        assert len(report.swapped) == 2 and type(model[2]) is fastdl.nn.RMSNorm
        raise RuntimeError("inside")
    assert type(model[2]) is nn.RMSNorm and type(model[0]) is fastdl.nn.LayerNorm


def test_training_follows_the_unswapped_run(native):
    """An optimizer made before the swap trains the same parameters: 30 steps, the same losses."""

    def losses(swapped):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if swapped:
            fastdl.accelerate(model)
        found = []
        for _ in range(30):
            loss = (model(X) - X.flip(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    plain, fused = losses(False), losses(True)
    assert plain[-1] < 0.7 * plain[0]
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=1e-3, atol=1e-4)


def test_hooks_copies_and_pickles(native):
    model = small()
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    fastdl.accelerate(model)
    model(X)
    assert seen == [fastdl.nn.LayerNorm]
    model[0]._forward_hooks.clear()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(X), model(X))
        fastdl.restore(other)
        assert type(other[0]) is nn.LayerNorm and swap._MARK not in vars(other[0])
    assert list(model.state_dict()) == list(small().state_dict())


def test_compile_and_autocast(native):
    model = small()
    expected = model(X)
    fastdl.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16


def test_transformer_encoder_calls_its_layers(native, monkeypatch):
    """torch's fast path would skip the norms inside; the swap turns it off, restore gives it back."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16)).eval()
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[:, -2:] = True
    with torch.inference_mode():
        expected = [model(X), model(X, src_key_padding_mask=mask)[:, :5]]
        before = state(model)
        assert len(fastdl.accelerate(model, only="*norm*").swapped) == 5
        calls = []
        forward = fastdl.nn.LayerNorm.forward
        monkeypatch.setattr(fastdl.nn.LayerNorm, "forward", lambda self, x: calls.append(self) or forward(self, x))
        got = [model(X), model(X, src_key_padding_mask=mask)[:, :5]]
        assert len(calls) == 10
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        fastdl.restore(model)
        assert state(model) == before and torch.equal(model(X), expected[0])


# ---- Hugging Face's RMS norms, found by what they compute -----------------------------------------------------------


def test_llama_and_gemma_norms(native):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(16, eps=1e-5)
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(16, eps=1e-5)
    for norm, offset in ((llama, 0.0), (gemma, 1.0)):
        torch.nn.init.normal_(norm.weight)
        inputs = [X, X.bfloat16(), X.half()]
        expected = [norm(x) for x in inputs]
        original = type(norm)
        assert fastdl.accelerate(norm).swapped
        assert isinstance(norm, original) and norm._fastdl_rms_norm[0] == offset
        for x, theirs in zip(inputs, expected, strict=True):
            ours = norm(x)
            limit = 1e-5 if x.dtype == torch.float32 else 2e-2
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)
        again = pickle.loads(pickle.dumps(norm))
        assert type(again) is type(norm) and torch.equal(again(X), norm(X))
        fastdl.restore(norm)
        assert type(norm) is original and torch.equal(norm(X), expected[0])


def test_names_are_not_enough(native):
    class HalfRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x):
            return x / 2 * self.weight

    class OtherRMSNorm(HalfRMSNorm):
        def forward(self, x, gate):
            return x

    model = nn.ModuleList([HalfRMSNorm(), OtherRMSNorm()])
    reasons = [layer.reason for layer in fastdl.accelerate(model).left]
    assert (
        "does not compute an RMS norm" in reasons[0] and reasons[1] == "its forward takes more than the tensor: x, gate"
    )


def test_a_norm_that_is_one_only_now_is_left(native):
    """With its weight at 1 or 0, in evaluation, or for small inputs it computes an RMS norm; else something else."""

    class BaseRMSNorm(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.full((16,), weight)), 1e-6

        def normed(self, x):
            return nn.functional.rms_norm(x, (16,), None, self.eps)

    class SquareRMSNorm(BaseRMSNorm):
        def forward(self, x):
            return self.normed(x) * self.weight**2

    class ScaleRMSNorm(BaseRMSNorm):
        def forward(self, x):
            return x * self.weight

    class DropRMSNorm(BaseRMSNorm):
        def forward(self, x):
            return nn.functional.dropout(self.normed(x) * self.weight, 0.5, self.training)

    class LimitRMSNorm(BaseRMSNorm):
        def forward(self, x):
            return self.normed(x.clamp(-50, 50)) * self.weight

    model = nn.ModuleList([SquareRMSNorm(1.0), ScaleRMSNorm(0.0), DropRMSNorm(1.0), LimitRMSNorm(1.0)]).eval()
    before = torch.get_rng_state()
    report = fastdl.accelerate(model)
    assert ["does not compute an RMS norm" in layer.reason for layer in report.left] == [True] * 4
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_device_does_not_matter(native):
    norm = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(16, eps=1e-5)
    with torch.device("meta"):
        assert fastdl.accelerate(norm).swapped


def test_a_hugging_face_model(native):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with fastdl.accelerated(model) as report:
            assert len(report.swapped) == 7
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(ids).logits, expected)
