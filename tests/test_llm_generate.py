"""Generation: against transformers' greedy answer, stopping, streaming, log-probabilities, chat, and bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_model import write_tiny_model

from fastdl import llm
from fastdl.llm.stopping import StopFinder

PROMPT = "the and then on a hill"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return llm.load(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf"), activation="fp32")


def greedy(lm, ids, count):
    """The answer by whole logits at every step, without a cache."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(lm.logits(ids)[-1].argmax()))
        if ids[-1] in lm.tokenizer.eog_ids:
            return ids[:-1]
    return ids


def test_greedy_is_the_largest_logit(lm):
    prompt = lm.tokenizer.encode(PROMPT)
    out = lm.generate(PROMPT, max_new_tokens=12)
    assert out.ids == greedy(lm, prompt, 12)[len(prompt) :]
    assert out == lm.tokenizer.decode(out.ids, skip_special=True)
    assert out.stats.prompt_tokens == len(prompt) and out.stats.cached_tokens == 0
    assert lm.generate(prompt, max_new_tokens=12) == out
    assert lm.generate(torch.tensor(prompt), max_new_tokens=12) == out


def test_prompt_in_chunks(lm, monkeypatch):
    out = lm.generate(PROMPT * 5, max_new_tokens=5)
    monkeypatch.setattr("fastdl.llm.model.PREFILL_CHUNK", 7)
    assert lm.generate(PROMPT * 5, max_new_tokens=5).ids == out.ids


def test_stream_gives_the_same_in_pieces(lm):
    stream = lm.stream(PROMPT, max_new_tokens=12)
    assert stream.stop_reason is None
    pieces = list(stream)
    out = lm.generate(PROMPT, max_new_tokens=12)
    assert "".join(pieces) == out and stream.ids == out.ids and stream.stop_reason == out.stop_reason
    assert stream.stats.new_tokens >= len(stream.ids) and stream.stats.prompt_rate > 0


def test_two_streams_at_once(lm):
    first, second = lm.stream(PROMPT, max_new_tokens=9), lm.stream("once", max_new_tokens=9)
    list(itertools.zip_longest(first, second))
    assert first.ids == lm.generate(PROMPT, max_new_tokens=9).ids
    assert second.ids == lm.generate("once", max_new_tokens=9).ids


def test_leaving_a_stream_early(lm):
    stream = lm.stream(PROMPT, max_new_tokens=50)
    next(stream)
    stream.close()
    assert list(stream) == [] and lm.generate(PROMPT, max_new_tokens=3).stop_reason == "length"


def test_interrupted_stream_keeps_its_statistics(lm, monkeypatch):
    stream = lm.stream(PROMPT, max_new_tokens=50)
    calls = itertools.count()
    real = lm.head

    def head(x):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(x)

    monkeypatch.setattr(lm, "head", head)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    monkeypatch.undo()
    assert stream.stats.new_tokens == 3
    assert lm.generate(PROMPT, max_new_tokens=4) == lm.generate(PROMPT, max_new_tokens=4)


def test_zero_tokens_and_limits(lm):
    out = lm.generate(PROMPT, max_new_tokens=0)
    assert out == "" and out.ids == [] and out.stop_reason == "length"
    room = lm.context - 3
    out = lm.generate([5] * room, max_new_tokens=None, stop_ids=[])
    assert out.stop_reason in ("context", "stop_token")
    if out.stop_reason == "context":
        assert len(out.ids) == 4
    assert len(lm.generate([5] * lm.context, max_new_tokens=9).ids) <= 1


def test_stop_tokens_and_strings(lm):
    full = lm.generate(PROMPT, max_new_tokens=12)
    token = full.ids[4]
    out = lm.generate(PROMPT, max_new_tokens=12, stop_ids=[token])
    assert out.ids == full.ids[: full.ids.index(token)] and out.stop_reason == "stop_token"
    middle = full[3:5]
    out = lm.generate(PROMPT, max_new_tokens=12, stop=middle)
    assert out == full[: full.index(middle)] and out.stop_reason == "stop_string"
    assert lm.generate(PROMPT, max_new_tokens=12, stop=["nowhere to be found"]) == full


def test_special_stop_string_stops_by_id(lm, monkeypatch):
    special = lm.tokenizer.encode("<|im_start|>")
    assert len(special) == 1
    monkeypatch.setattr("fastdl.llm.sampling.Sampler.choose", lambda self, logits, recent: special[0])
    assert lm.generate(PROMPT, max_new_tokens=5, stop="<|im_start|>").stop_reason == "stop_token"
    assert lm.generate(PROMPT, max_new_tokens=5) == ""  # control tokens are not text


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_stop_finder_at_every_cut(cut):
    text, stops = "abcabd</s>xyz", ["</s>", "abd!", "zz"]
    finder, shown = StopFinder(stops), ""
    for start in range(0, len(text), cut):
        shown += finder.push(text[start : start + cut])
    assert shown == "abcabd" and finder.found == "</s>" and finder.flush() == ""
    finder = StopFinder(["abd!"])
    assert "".join(finder.push(c) for c in "abcabd") + finder.flush() == "abcabd" and finder.found is None


def test_seed_and_sampling(lm):
    options = {"max_new_tokens": 10, "temperature": 2.0, "top_k": 50}
    assert lm.generate(PROMPT, seed=1, **options) == lm.generate(PROMPT, seed=1, **options)
    assert len({lm.generate(PROMPT, seed=seed, **options) for seed in range(5)}) > 1
    penalized = lm.generate(PROMPT, max_new_tokens=20, repeat_penalty=1e9, repeat_last=-1)
    assert len(set(penalized.ids)) == len(penalized.ids)


def test_logprobs(lm):
    out = lm.generate(PROMPT, max_new_tokens=5, logprobs=3)
    ids = lm.tokenizer.encode(PROMPT)
    expected = lm.logits(ids + out.ids)[len(ids) - 1 : -1].log_softmax(-1)
    assert len(out.logprobs) == len(out.ids)
    for entry, token, row in zip(out.logprobs, out.ids, expected, strict=True):
        assert entry.id == token and len(entry.top) == 3 and entry.top[0][0] == token
        assert abs(entry.logprob - float(row[token])) < 1e-3
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
    assert lm.generate(PROMPT, max_new_tokens=2, logprobs=0).logprobs[0].top == ()
    assert lm.generate(PROMPT, max_new_tokens=2).logprobs is None


def test_chat_keeps_its_cache(lm):
    messages = [{"role": "user", "content": "the hill and then"}]
    first = lm.chat(messages, max_new_tokens=6)
    messages += [{"role": "assistant", "content": str(first)}, {"role": "user", "content": "on"}]
    second = lm.chat(messages, max_new_tokens=6)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens
    fresh = lm.chat(messages, max_new_tokens=6, reuse=False)
    assert fresh.stats.cached_tokens == 0 and fresh.ids == second.ids
    assert list(lm.chat_stream(messages, max_new_tokens=6, reuse=False)) != [] or fresh == ""


def test_chat_without_a_template(tmp_path):
    path = write_tiny_model(tmp_path / "plain.gguf", metadata={"tokenizer.chat_template": None})
    with pytest.raises(ValueError, match="no chat template"):
        llm.load(path).chat([{"role": "user", "content": "x"}])


def test_perplexity(lm):
    text = lm.tokenizer.decode(lm.tokenizer.encode(PROMPT * 20)[:45])
    ids = lm.tokenizer.encode(text)

    def expected(window):
        """Token i is scored in the first window that has it; windows begin every window / 2 tokens."""
        total = 0.0
        for i in range(1, len(ids)):
            start = max(0, -(-(i + 1 - window) // (window // 2)) * (window // 2))
            total += float(lm.logits(ids[start:i])[-1].double().log_softmax(-1)[ids[i]])
        return math.exp(-total / (len(ids) - 1))

    assert lm.perplexity(text) == pytest.approx(expected(1000), rel=1e-3)
    assert lm.perplexity(text, window=20) == pytest.approx(expected(20), rel=1e-3)
    with pytest.raises(ValueError, match="text"):
        lm.perplexity("")
    for window, error in ((1, ValueError), ("9", TypeError)):
        with pytest.raises(error, match="window"):
            lm.perplexity(text, window=window)


def test_empty_prompt(lm, tmp_path):
    assert lm.generate("", max_new_tokens=3).stats.prompt_tokens == 1
    path = write_tiny_model(tmp_path / "nobos.gguf", metadata={"tokenizer.ggml.bos_token_id": None})
    with pytest.raises(ValueError, match="empty"):
        llm.load(path).generate("")


def test_threads_are_restored(tmp_path):
    before = torch.get_num_threads()
    lm = llm.load(write_tiny_model(tmp_path / "tiny.gguf"), threads=1)
    for _ in lm.stream(PROMPT, max_new_tokens=2):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": [10**6]}, ValueError, "out of range"),
        ({"prompt": [-1]}, ValueError, "out of range"),
        ({"prompt": [1.5]}, TypeError, "integer token ids"),
        ({"prompt": None}, TypeError, "prompt: expected text or integer token ids, got NoneType"),
        ({"prompt": b"bytes"}, TypeError, "prompt: expected text or integer token ids, got bytes"),
        ({"prompt": [1] * 300}, ValueError, "300 tokens do not fit in the context of 256"),
        ({"prompt": "a", "max_new_tokens": -1}, ValueError, "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": 1.0}, TypeError, "max_new_tokens"),
        ({"prompt": "a", "stop": [""]}, ValueError, "stop"),
        ({"prompt": "a", "stop": [3]}, TypeError, "stop"),
        ({"prompt": "a", "stop": 3}, TypeError, "stop: expected strings, got 3"),
        ({"prompt": "a", "stop_ids": 3}, TypeError, "stop_ids: expected integer token ids, got int"),
        ({"prompt": "a", "stop_ids": [10**6]}, ValueError, "stop_ids"),
        ({"prompt": "a", "logprobs": 1000}, ValueError, "logprobs"),
        ({"prompt": "a", "temperature": -1.0}, ValueError, "temperature"),
        ({"prompt": "a", "heat": 1.0}, TypeError, "heat"),
    ],
)
def test_bad_input(lm, arguments, error, message):
    with pytest.raises(error, match=message):
        lm.generate(**arguments)


def test_bad_ids_for_logits(lm):
    for ids, error in (
        ([], ValueError),
        ([lm.config.vocab], ValueError),
        ([0] * 257, ValueError),
        (["a"], TypeError),
        (3, TypeError),
    ):
        with pytest.raises(error, match="ids"):
            lm.logits(ids)
