"""attn_implementation="fastdl" in models with real weights: the demo language model and a sentence encoder.

The weights come from the package index as files (tests/demo_model.py); nothing is downloaded from a model hub.
"""

from __future__ import annotations

import os

import pytest
import torch
from demo_model import demo_model_path, minilm_folder
from test_swap_models import FusedCalls, sentences, train

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("fastdl.hf")


@pytest.fixture(scope="module")
def language_model():
    """(the demo model in float32, its tokenizer, ids [1, 128] of English text)."""
    folder, name = os.path.split(demo_model_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="fastdl"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    assert model.config._attn_implementation == "fastdl"
    return model.eval(), tokenizer, tokenizer(" ".join(sentences(40)), return_tensors="pt").input_ids[:, :128]


@torch.inference_mode()
def greedy(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32}
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def test_greedy_text(native, language_model):
    """32 tokens as SDPA gives them, after a question and after a page of text; in a batch padded on the left too."""
    model, tokenizer, text = language_model
    question = tokenizer("The capital of France is", return_tensors="pt").input_ids
    prompts = (question, text[:, :30])
    texts = []
    for name in ("sdpa", "fastdl"):
        model.set_attn_implementation(name)
        with FusedCalls() as fused:
            texts.append([greedy(model, ids) for ids in prompts])
        assert fused.calls["attention_forward"] == (0 if name == "sdpa" else 30 * 32 * 2)
    assert all(torch.equal(a, b) for a, b in zip(*texts, strict=True))
    assert tokenizer.decode(texts[0][0][0]).startswith(" Paris.\n\nThe answer is: 2018-01-22 12:12:53.")
    gap = 20
    batch = torch.cat([torch.nn.functional.pad(question, (gap, 0)), text[:, : gap + question.shape[1]]])
    mask = torch.ones_like(batch)
    mask[0, :gap] = 0
    assert torch.equal(greedy(model, batch, mask)[:1], texts[0][0])


def test_training(native, language_model):
    """30 steps of all parameters but the embedding: SDPA's losses to 1e-4 of them."""
    model, _, ids = language_model
    model.get_input_embeddings().requires_grad_(False)  # a fifth of the time, and no attention comes before it
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def step(at):
        chunk = ids[:, 12 * (at % 8) :][:, :12]
        return model(chunk, labels=chunk).loss

    losses = {}
    try:
        for name in ("sdpa", "fastdl"):
            model.load_state_dict(start)
            model.set_attn_implementation(name)
            with FusedCalls() as fused:
                losses[name] = train(step, trained, lr=1e-3)
        assert fused.calls["attention_forward"] == fused.calls["attention_backward"] == 30 * 30
    finally:
        model.load_state_dict(start)
    assert sum(losses["sdpa"][-8:]) < 0.9 * sum(losses["sdpa"][:8])
    torch.testing.assert_close(torch.tensor(losses["fastdl"]), torch.tensor(losses["sdpa"]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_sentences_are_what_each_is_alone(native, side):
    """25 sentences of different lengths in a batch, and one at a time: the same embeddings, and those of SDPA."""
    folder = minilm_folder()
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="fastdl").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    texts = sentences(25)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(-1)
    assert int(lengths.min()) < int(lengths.max()) // 2
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    @torch.inference_mode()
    def padded(name):
        model.set_attn_implementation(name)
        hidden = model(**batch, position_ids=positions).last_hidden_state
        return [row[mask.bool()] for row, mask in zip(hidden, batch["attention_mask"], strict=True)]

    with torch.inference_mode(), FusedCalls() as fused:
        together = padded("fastdl")
        alone = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    assert fused.calls["attention_forward"] == 6 * 26
    for ours, one, theirs in zip(together, alone, padded("sdpa"), strict=True):
        assert ours.shape == one.shape
        torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
