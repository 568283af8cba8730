"""Prompt caches: saved and loaded ones give equal answers; those of another model or damaged ones are refused."""

from __future__ import annotations

import pytest
import torch
from tiny_model import write_tiny_model

from fastdl import llm
from fastdl.llm import ModelFileError
from fastdl.llm.cache import KVCache

PROMPT = "the hill and then a hill on the hill"


@pytest.fixture
def path(tmp_path):
    return write_tiny_model(tmp_path / "tiny.gguf")


def test_save_and_load(path, tmp_path):
    lm = llm.load(path, activation="fp32")
    with pytest.raises(ValueError, match="no cache"):
        lm.save_cache(tmp_path / "prompt.cache")
    expected = lm.generate(PROMPT, max_new_tokens=6)
    lm.generate(PROMPT, max_new_tokens=1)
    count = lm.save_cache(tmp_path / "prompt.cache")
    assert count == len(lm.tokenizer.encode(PROMPT))

    other = llm.load(path, activation="fp32")
    assert other.load_cache(tmp_path / "prompt.cache") == count
    out = other.generate(PROMPT, max_new_tokens=6)
    assert out.ids == expected.ids and out.stats.cached_tokens == count - 1
    longer = other.generate(PROMPT + " and on", max_new_tokens=6)
    assert (
        longer.ids == lm.generate(PROMPT + " and on", max_new_tokens=6).ids and longer.stats.cached_tokens >= count - 2
    )
    assert other.generate("on", max_new_tokens=3).ids == lm.generate("on", max_new_tokens=3).ids


def test_both_back_ends_read_one_cache(path, tmp_path, native):
    first = llm.load(path, backend="cpu", activation="fp32")
    expected = first.generate(PROMPT, max_new_tokens=4)
    first.save_cache(tmp_path / "c")
    second = llm.load(path, backend="torch")
    second.load_cache(tmp_path / "c")
    assert second.generate(PROMPT, max_new_tokens=4).ids == expected.ids


def test_refused_files(path, tmp_path):
    lm = llm.load(path)
    lm.generate(PROMPT, max_new_tokens=1)
    good = tmp_path / "good.cache"
    lm.save_cache(good)
    with pytest.raises(ModelFileError, match="no such file"):
        lm.load_cache(tmp_path / "none.cache")
    bad = tmp_path / "bad.cache"
    for contents in (b"", b"not a cache at all", good.read_bytes()[:-7], good.read_bytes()[:40]):
        bad.write_bytes(contents)
        with pytest.raises(ModelFileError, match=r"bad\.cache"):
            lm.load_cache(bad)
    with pytest.raises(ModelFileError, match="another model"):
        llm.load(write_tiny_model(tmp_path / "other.gguf", seed=1)).load_cache(good)
    with pytest.raises(ModelFileError, match="context"):
        llm.load(path, context=4).load_cache(good)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, bad)
    with pytest.raises(ModelFileError, match="expected a file that save_cache wrote"):
        lm.load_cache(bad)
    assert lm.generate(PROMPT, max_new_tokens=1) == llm.load(path).generate(PROMPT, max_new_tokens=1)


def test_nothing_half_written(path, tmp_path, monkeypatch):
    lm = llm.load(path)
    lm.generate(PROMPT, max_new_tokens=1)
    target = tmp_path / "prompt.cache"
    target.write_bytes(b"old")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="space"):
        lm.save_cache(target)
    assert target.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["prompt.cache", "tiny.gguf"]


def test_growth_keeps_contents(path):
    config = llm.load(path).config
    cache = KVCache(config, 256)
    cache.reserve(10)
    assert cache.capacity == 64
    cache.k.normal_(), cache.v.normal_()
    cache.ids = list(range(10))
    before = cache.k[:, :, :10].clone()
    cache.reserve(65)
    assert cache.capacity == 128 and torch.equal(cache.k[:, :, :10], before)
    cache.reserve(256)
    assert cache.capacity == 256 and torch.equal(cache.k[:, :, :10], before) and cache.nbytes == 2 * cache.k.nbytes
    assert cache.common_prefix([0, 1, 2, 9]) == 3 and cache.common_prefix(range(50)) == 10
    cache.truncate(4)
    assert cache.length == 4
