"""The demo model end to end: exact answers by transformers at test time, accuracy of every activation, memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from demo_model import demo_model_path

from fastdl import backend, llm

PROMPT = "The capital of France is"
LIMITS = {"fp32": 1e-6, "bf16": 2e-4, "int8": 4e-3}  # mean KL against the exact logits

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def lm():
    if not backend.native_loaded():
        pytest.skip(f"compiled library: {backend.native_error()}")
    return llm.load(demo_model_path())


@pytest.fixture(scope="module")
def exact(lm):
    """(ids of 512 tokens of English, their exact logits, transformers' greedy answer to PROMPT)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pydoc_data.topics import topics

    ids = lm.tokenizer.encode("\n".join(topics[key] for key in sorted(topics))[20000:26000])[:512]
    folder, name = os.path.split(demo_model_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        start = torch.tensor([lm.tokenizer.encode(PROMPT)])
        answer = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=40, do_sample=False)
    return ids, logits, answer[0, start.shape[1] :].tolist()


def divergence(exact, logits):
    """Mean KL; in float64, because float32's log_softmax alone is wrong by 1e-5."""
    total = 0.0
    for a, b in zip(exact.split(64), logits.split(64), strict=True):
        a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
        total += float((a.exp() * (a - b)).sum())
    return total / exact.shape[0]


@pytest.mark.parametrize("activation", LIMITS)
def test_divergence(lm, exact, activation, monkeypatch):
    ids, expected, _ = exact
    monkeypatch.setattr(lm, "activation", activation)
    logits = lm.logits(ids)
    assert divergence(expected, logits) <= LIMITS[activation]
    if activation == "fp32":  # the same token first, but where two are nearly equal: either's rounding decides there
        first, second = expected.topk(2, -1).values.unbind(-1)
        clear = first - second > 0.02
        assert clear.float().mean() > 0.98
        assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize("cap", ["avx2", "avx2-plain", "avx512-plain"])
@pytest.mark.parametrize("activation", ["fp32", "auto"])
def test_divergence_at_lower_levels(lm, exact, activation, cap, monkeypatch):
    ids, expected, _ = exact
    if cap.partition("-")[0] not in backend.cpu_features().split(","):
        pytest.skip(f"this CPU has no {cap}")
    monkeypatch.setattr(lm, "activation", activation)
    with backend.level_cap(cap):
        logits = lm.logits(ids[:128])
    assert divergence(expected[:128], logits) <= (1e-6 if activation == "fp32" else 6e-3)  # 128 tokens scatter more


def test_greedy_answer_is_the_exact_one(lm, exact, monkeypatch):
    monkeypatch.setattr(lm, "activation", "fp32")
    out = lm.generate(PROMPT, max_new_tokens=40)
    *answer, end = exact[2]
    assert out.ids == answer and end == lm.tokenizer.eos_id and out.stop_reason == "stop_token"
    assert out == lm.tokenizer.decode(answer)


def test_equal_calls_give_equal_answers(lm):
    first = lm.generate(PROMPT, max_new_tokens=12)
    lm.generate("Something else entirely", max_new_tokens=3)
    again = lm.generate(PROMPT, max_new_tokens=12)
    assert first == again and first.ids == again.ids


def test_perplexity_of_english_is_low(lm):
    text = "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius."
    assert 2 < lm.perplexity(text) < 30 < lm.perplexity(text[::-1])


def test_chat_answers(lm, monkeypatch):
    monkeypatch.setattr(lm, "activation", "fp32")  # the first word is a near tie that 8 bits may turn
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    first = lm.chat(messages, max_new_tokens=24)
    assert "Paris" in first
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And of Italy?"}]
    assert lm.chat(messages, max_new_tokens=4).stats.cached_tokens > first.stats.prompt_tokens


MEMORY = """
import sys
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
import torch
before = peak()
from fastdl import llm
lm = llm.load(sys.argv[1])
lm.tokenizer.release_encoder()
out = lm.generate(list(range(1000, 1512)), max_new_tokens=16)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_memory_is_at_most_one_and_a_half_files():
    done = subprocess.run([sys.executable, "-c", MEMORY, demo_model_path()], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1.5 * os.path.getsize(demo_model_path())
