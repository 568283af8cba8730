"""fastdl.accelerate on models that people use: a sentence encoder and a language model with real weights, torch's own.

The weights come from the package index as files (tests/demo_model.py); nothing is downloaded from a model hub.
"""

from __future__ import annotations

import os
from collections import Counter
from pydoc_data.topics import topics

import pytest
import torch
from demo_model import demo_model_path, minilm_folder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdl

STEPS = 30


class FusedCalls(TorchDispatchMode):
    """Inside, counts the calls of fastdl's compiled ops: {"norm_inference": 61}."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastdl":
            self.calls[function.name().removeprefix("fastdl::")] += 1
        return function(*args, **(kwargs or {}))


def sentences(number: int) -> list[str]:
    """Sentences of the Python reference, which every CPython brings: of 20 to 300 characters, the first ones."""
    text = "\n".join(topics[name] for name in sorted(topics))
    found = (" ".join(part.split()) for part in text.replace("\n\n", ". ").split(". "))
    kept = dict.fromkeys(s for s in found if 20 <= len(s) <= 300 and s[0].isalpha())
    return list(kept)[:number]


def train(step, parameters, swap=None, *, optimizer=torch.optim.SGD, **options) -> list[float]:
    """Losses of STEPS steps; the optimizer is made before ``swap()``, as a user would who tries fastdl in a script."""
    optimizer = optimizer(parameters, **options)
    if swap is not None:
        swap()
    losses = []
    for at in range(STEPS):
        optimizer.zero_grad()
        loss = step(at)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def swapped_all(report, kind: str) -> int:
    """How many layers of a class were swapped, and no layer of it left."""
    assert not [layer for layer in report.left if layer.kind == kind]
    return sum(layer.kind == kind for layer in report.swapped)


# ---- A sentence encoder: BERT ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert():
    """(model, its inputs for 100 sentences, embed(model)) of all-MiniLM-L6-v2."""
    transformers = pytest.importorskip("transformers")
    folder = minilm_folder()
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = sentences(100)
    assert len(texts) == 100
    batches = [tokenizer(texts[at : at + 25], padding=True, return_tensors="pt") for at in range(0, 100, 25)]

    @torch.no_grad()
    def embed(model) -> torch.Tensor:
        """[100, 384]: the mean over a sentence's tokens, of length 1, as the model's card says."""
        found = []
        for batch in batches:
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            found.append((hidden * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(found), dim=-1)

    return model, batches, embed


def test_sentence_embeddings(native, bert):
    """The same embeddings to five nines of cosine; after restore the same bits."""
    model, batches, embed = bert
    before = embed(model)
    assert 0.1 < float((before @ before.T).mean()) < 0.6  # real sentences: neither all alike nor all apart
    with fastdl.accelerated(model) as report, FusedCalls() as fused:
        swapped = embed(model)
    assert swapped_all(report, "LayerNorm") == 13  # one after the embeddings, two a layer
    assert fused.calls["norm_inference"] == 13 * len(batches)
    cosine = nn.functional.cosine_similarity(before.double(), swapped.double())
    assert float(cosine.min()) >= 0.99999, cosine.min()
    assert torch.equal(embed(model), before)


# ---- The demo language model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model():
    """(transformers' model of the demo GGUF in float32, ids [1, 128] of English text)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    folder, name = os.path.split(demo_model_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    return model, tokenizer(" ".join(sentences(40)), return_tensors="pt").input_ids[:, :128]


def test_language_model(native, language_model):
    """The same logits and the same greedy text; after restore the same bits."""
    model, ids = language_model
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids[:, :16])}
    with torch.inference_mode():
        before, text = model(ids).logits, model.generate(ids[:, :16], **greedy)
        with fastdl.accelerated(model) as report:
            with FusedCalls() as fused:
                logits = model(ids).logits
            assert torch.equal(model.generate(ids[:, :16], **greedy), text)
        assert swapped_all(report, "LlamaRMSNorm") == fused.calls["norm_inference"] == 61
        assert swapped_all(report, "LlamaMLP") == fused.calls["glu_forward"] == 30
        torch.testing.assert_close(logits, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
        assert torch.equal(model(ids).logits, before)


def test_language_model_training(native, language_model):
    """All parameters but the embedding, of 30 layers: the losses of the unswapped run."""
    model, ids = language_model
    model.get_input_embeddings().requires_grad_(False)  # a fifth of the time, and no norm comes before it
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def step(at):
        chunk = ids[:, 8 * (at % 8) :][:, :8]
        return model(chunk, labels=chunk).loss

    try:
        plain = train(step, trained, lr=2e-3)
        model.load_state_dict(start)
        with FusedCalls() as fused:
            ours = train(step, trained, lambda: fastdl.accelerate(model), lr=2e-3)
        assert fused.calls["norm_forward"] == fused.calls["norm_backward"] == 61 * STEPS
        assert fused.calls["glu_forward"] == fused.calls["glu_backward"] == 30 * STEPS
    finally:
        fastdl.restore(model)
        model.load_state_dict(start)
    assert sum(plain[-8:]) < 0.8 * sum(plain[:8])
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-4, atol=1e-5)


# ---- torch's nn.TransformerEncoder ----------------------------------------------------------------------------------


def encoder(**options) -> nn.Module:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, **options)
    model = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(48), enable_nested_tensor=not options.get("norm_first"))
    for layer in model.layers:  # which a new encoder makes as copies of one another
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_transformer_encoder_in_eval(native, mode, norm_first):
    """Where torch would take its fast path, which skips the layers inside: every norm is called, the outputs agree."""
    model = encoder(norm_first=norm_first).eval()
    x = torch.randn(4, 9, 48)
    padding = torch.arange(9) >= torch.tensor([9, 5, 7, 3])[:, None]
    with mode():
        for mask in (None, padding):
            kept = slice(None) if mask is None else ~mask
            before = model(x, src_key_padding_mask=mask)
            with fastdl.accelerated(model), FusedCalls() as fused:
                after = model(x, src_key_padding_mask=mask)
            assert fused.calls["norm_inference"] == 7
            torch.testing.assert_close(after[kept], before[kept], rtol=1e-4, atol=1e-4)
            assert torch.equal(model(x, src_key_padding_mask=mask), before)


@pytest.mark.parametrize("only", ["*norm*", None], ids=["norms", "all"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_transformer_encoder_training(native, norm_first, only):
    """With dropout where torch's modules draw it; swapped whole layers draw other elements, and are trained without."""
    x = torch.randn(6, 9, 48)
    target = x.roll(1, dims=-1)

    def losses(swap):
        model = encoder(norm_first=norm_first, dropout=0.1 if only else 0.0).train()

        def step(at):
            torch.manual_seed(at)
            return (model(x) - target).square().mean()

        swap_in = (lambda: fastdl.accelerate(model, only=only)) if swap else None
        return train(step, model.parameters(), swap_in, optimizer=torch.optim.AdamW, lr=3e-3)

    plain = losses(False)
    with FusedCalls() as fused:
        ours = losses(True)
    assert fused.calls["norm_forward"] == fused.calls["norm_backward"] == 7 * STEPS
    attended = 0 if only else 3 * STEPS
    assert fused.calls["attention_forward"] == fused.calls["attention_backward"] == attended
    assert fused.calls["activation_forward"] == attended
    assert plain[-1] < 0.8 * plain[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-4, atol=1e-5)


def test_explain_names_the_back_end(native, capsys):
    """What the swapped layers of these models run on where there is no GPU."""
    assert fastdl.explain("layer_norm", torch.randn(2, 384)).choice == "cpu"
    assert fastdl.explain("rms_norm", torch.randn(2, 576)).choice == "cpu"
    assert "layer_norm: cpu runs" in capsys.readouterr().out
