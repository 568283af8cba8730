"""Tokenizer metadata that lies or is odd: a ModelFileError that names the file and the key."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from tiny_model import CONTROL, write_tiny_model

from fastdl.llm.gguf import Metadata, ModelFileError, open_gguf
from fastdl.llm.tokenizer import Tokenizer


@pytest.fixture
def tiny(tmp_path):
    """A function that writes a tiny model with given options and returns its metadata."""

    def metadata(**options) -> Metadata:
        return open_gguf(write_tiny_model(tmp_path / "tiny.gguf", layers=1, **options)).metadata

    return metadata


BAD = [
    ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model: tokenizer 't5' is not supported; supported are 'gpt2'"),
    ({"tokenizer.ggml.model": 5}, "'tokenizer.ggml.model': expected a string"),
    (
        {"tokenizer.ggml.pre": "nope"},
        "tokenizer.ggml.pre: pre-tokenizer 'nope' is not supported; supported are a.x-4.0",
    ),
    ({"tokenizer.ggml.pre": 3}, "'tokenizer.ggml.pre': expected a string"),
    ({"tokenizer.ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id: id 1000000 is outside the 273 tokens"),
    ({"tokenizer.ggml.eos_token_id": "2"}, "'tokenizer.ggml.eos_token_id': expected an integer"),
    ({"tokenizer.ggml.eot_token_id": 10**6}, "tokenizer.ggml.eot_token_id: id 1000000 is outside"),
    ({"tokenizer.ggml.add_bos_token": 1}, "'tokenizer.ggml.add_bos_token': expected a bool"),
]


@pytest.mark.parametrize(
    ("keys", "match"), BAD, ids=[f"{next(iter(keys))}={next(iter(keys.values()))}" for keys, _ in BAD]
)
def test_bad_keys(tiny, keys, match):
    with pytest.raises(ModelFileError, match=match) as caught:
        Tokenizer.from_gguf(tiny(metadata=keys))
    assert "tiny.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("tokenizer.ggml.tokens", None, "'tokenizer.ggml.tokens' is missing, expected an array of strings"),
        ("tokenizer.ggml.tokens", 3, "'tokenizer.ggml.tokens': expected an array of strings"),
        ("tokenizer.ggml.merges", None, "'tokenizer.ggml.merges' is missing"),
        ("tokenizer.ggml.token_type", np.ones(5, np.int32), "token_type: expected 273 integers, one a token, got 5"),
        ("tokenizer.ggml.token_type", np.ones(273), "token_type: expected 273 integers, .* float64"),
    ],
)
def test_bad_arrays(tiny, key, value, match):
    metadata = tiny()
    if value is None:
        del metadata[key]
    else:
        metadata[key] = value
    with pytest.raises(ModelFileError, match=match):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("scores", [None, np.ones(3), np.full(371, np.nan, np.float32), np.array(["a"] * 371)])
def test_bad_scores(tiny, scores):
    metadata = tiny(tokenizer="llama")
    if scores is None:
        del metadata["tokenizer.ggml.scores"]
    else:
        metadata["tokenizer.ggml.scores"] = scores
    with pytest.raises(ModelFileError, match=r"tokenizer.ggml.scores"):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("merges", [["nospace"], ["t zzz"], ["t q"], [" t"], ["t "], [""]])
def test_bad_merges(tmp_path, merges):
    writer = gguf.GGUFWriter(tmp_path / "merges.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "h", "q", "th"])
    writer.add_token_merges(["t h", *merges])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"tokenizer.ggml.merges: merge 1 is"):
        Tokenizer.from_gguf(open_gguf(tmp_path / "merges.gguf").metadata)


def test_odd_vocabularies(tmp_path):
    """Twice the same token, an empty token, control tokens by name only, bytes that spell none."""
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "a", "", "<0xZZ>", "<|im_end|>"])
    writer.add_token_scores([0.0] * 8)
    writer.add_token_types([2, CONTROL, CONTROL, 1, 1, CONTROL, 6, 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = Tokenizer.from_gguf(open_gguf(tmp_path / "odd.gguf").metadata)
    assert tokenizer.eog_ids == {2, 7}
    assert tokenizer.decode([3, 4, 5, 6, 7]) == "aa<0xZZ><|im_end|>"
    assert tokenizer.vocab_size == 8
    assert all(index < 8 for index in tokenizer.encode("aé世 <s>", add_special=True))


@pytest.mark.parametrize(
    ("tokens", "types", "merges", "match"),
    [
        (["a"] * (2**19 + 1), None, None, "expected 1 to 524288 tokens of at most 65536 bytes, got 524289"),
        (["a" * 65_537], None, None, "got 1 of at most 65537"),
        (["a", "aa"] + ["b"] * 65537, [1, 1] + [CONTROL] * 65537, None, "65537 control and user-defined tokens"),
        (["a", "aa"], None, ["a a"] * (2**20 + 1), "merges: expected at most 1048576 merges"),
    ],
    ids=["tokens", "token length", "special tokens", "merges"],
)
def test_absurd_sizes(tmp_path, tokens, types, merges, match):
    writer = gguf.GGUFWriter(tmp_path / "absurd.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    if types:
        writer.add_token_types(types)
    writer.add_token_merges(merges or ["a a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=match):
        Tokenizer.from_gguf(open_gguf(tmp_path / "absurd.gguf").metadata)


def test_absurdly_long_piece(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "long.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a" * 30_000])
    writer.add_token_scores([0.0] * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"absurdly long pieces \(up to 30000 characters\)"):
        Tokenizer.from_gguf(open_gguf(tmp_path / "long.gguf").metadata)
