"""Token ids equal transformers' (demo model), llama.cpp's (its vocabulary files) and sentencepiece's."""

from __future__ import annotations

import os
import random
import threading
import unicodedata

import gguf
import numpy as np
import pytest
from demo_model import demo_model_path, vocabulary_folder
from tiny_model import NORMAL, write_tiny_model

from fastdl.llm.gguf import Metadata, ModelFileError, open_gguf
from fastdl.llm.tokenizer import Tokenizer
from fastdl.llm.tokenizer_bpe import PRE_TOKENIZERS

TEXTS = {
    "english": "The quick brown fox doesn't jump; it's LAZY, we'll say. \"Quoted\" (and bracketed) - e-mail: a.b@c.org",
    "code": "def f(x):\n    if x > 10:\n\t\treturn [\n            1,\n            2]  # ok\n\n\nfor (;;) {}\r\n",
    "numbers": "1 12 123 1234567 3.14159 -2e-10 1,000,000 0xFF  42   7 ½ ² Ⅷ ٣ ४ १२३",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪🏳️‍🌈 😀😃 ☺️ e\u0301 \U0001f9d1\U0001f3fd",
    "chinese": "你好，世界！今天天气很好。我们去公园吧 2024年5月 、ｆｕｌｌ　ｗｉｄｔｈ",
    "other scripts": "Привет мир. שלום עולם مرحبا नमस्ते ประเทศไทย 한국어 ελληνικά Ñandú İı ŐÜ",
    "white space": "a b  c   d    e\t\tf\n\ng\n \n\r\n  h \u00a0\u3000\u2003\u200b i        ",
    "only blanks": "          ",
    "leading blank": " x",
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|endoftext|><repo_name>a/b<file_sep>",
    "almost special": "<|im_start |> <|im_star <|im_end|",
    "mixed": "if x:  # 你好 😀 <|im_end|>1234\n    y = 'naïve'\t<|im_start|>  2",
    "control characters": "\x00\x01\x04\x06\x1d\x7f\x80\x85\xad\ufeff\uffff",
    "empty": "",
}


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.from_gguf(open_gguf(demo_model_path()).metadata)


@pytest.fixture(scope="module")
def transformers_demo():
    transformers = pytest.importorskip("transformers")
    folder, name = os.path.split(demo_model_path())
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)


@pytest.fixture
def tiny(tmp_path):
    """A function that writes a tiny model with given options and returns its metadata."""

    def metadata(**options) -> Metadata:
        return open_gguf(write_tiny_model(tmp_path / "tiny.gguf", layers=1, **options)).metadata

    return metadata


# ---- transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_demo_ids_equal_transformers(demo, transformers_demo, name):
    ids = demo.encode(TEXTS[name])
    assert ids == transformers_demo.encode(TEXTS[name], add_special_tokens=False)
    assert demo.decode(ids) == transformers_demo.decode(ids)
    assert demo.decode(ids, skip_special=True) == transformers_demo.decode(ids, skip_special_tokens=True)


def test_demo_long_text_equals_transformers(demo, transformers_demo):
    topics = pytest.importorskip("pydoc_data.topics").topics
    text = "".join(str(topic) for topic in topics.values())[:200_000]
    ids = demo.encode(text)
    assert ids == transformers_demo.encode(text, add_special_tokens=False)
    assert demo.decode(ids) == text


def test_demo_random_text_equals_transformers(demo, transformers_demo):
    rng = random.Random(7)
    blocks = [
        range(0x20, 0x250),
        range(0x370, 0x400),
        range(0x600, 0x640),
        range(0x4E00, 0x4E40),
        range(0x1F600, 0x1F640),
    ]
    alphabet = [chr(code) for block in blocks for code in block] + ["\u200d", "\ufe0f", "\u2028", "\xa0", "\x85"]
    alphabet += [
        "<|im_start|>",
        "<|im_end|>",
        "<repo_name>",
        " ",
        "  ",
        "\n",
        "\t",
        "    ",
        "'s",
        "'LL",
        " the",
        "12",
    ] * 8
    for _ in range(1500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(30)))
        ids = demo.encode(text)
        assert ids == transformers_demo.encode(text, add_special_tokens=False), text
        anything = [rng.randrange(demo.vocab_size) for _ in range(10)]
        assert demo.decode(anything) == transformers_demo.decode(anything)


def test_demo_special_ids(demo, transformers_demo):
    assert (demo.bos_id, demo.eos_id) == (transformers_demo.bos_token_id, transformers_demo.eos_token_id) == (1, 2)
    assert (demo.bos_token, demo.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert demo.eog_ids == {0, 2}
    assert demo.vocab_size == len(demo) == 49152
    assert demo.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert demo.encode("The capital of France is", add_special=True) == [504, 3575, 282, 4649, 314]


def test_demo_trained_digit_cut(demo):
    """The file's "smollm" is cut as transformers cuts it; the model's own cut can be asked for."""
    trained = Tokenizer.from_gguf(open_gguf(demo_model_path()).metadata, pre="starcoder")
    pieces = [[t.token_str(i) for i in t.encode("x  1")] for t in (demo, trained)]
    assert pieces == [["x", " ", " ", "1"], ["x", "  ", "1"]]


# ---- llama.cpp's vocabulary files ----------------------------------------------------------------------------------

VOCABULARIES = (
    *(
        "llama-spm",
        "llama-bpe",
        "qwen2",
        "qwen35",
        "phi-3",
        "gpt-2",
        "mpt",
        "starcoder",
        "refact",
        "command-r",
        "falcon",
    ),
    *("deepseek-llm", "deepseek-coder"),
)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_equal_llama_cpps(name):
    path = vocabulary_folder() / f"ggml-vocab-{name}.gguf"
    tokenizer = Tokenizer.from_gguf(open_gguf(path).metadata)
    with open(f"{path}.inp", encoding="utf-8", newline="") as texts, open(f"{path}.out", encoding="utf-8") as ids:
        cases = list(zip(texts.read().split("\n__ggml_vocab_test__\n"), ids.read().split("\n"), strict=False))
    assert len(cases) >= 40
    for text, expected in cases:
        expected = [int(index) for index in expected.split()]
        assert tokenizer.encode(text, parse_special=False) == expected, text
        assert tokenizer.decode(expected) == text
        stream = tokenizer.decode_stream()
        continued = "".join(stream.push(index) for index in expected) + stream.flush()
        assert continued == tokenizer.decode(expected, continuation=True)


def test_llama_bpe_special_tokens():
    tokenizer = Tokenizer.from_gguf(open_gguf(vocabulary_folder() / "ggml-vocab-llama-bpe.gguf").metadata)
    text = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    ids = tokenizer.encode(text, add_special=True)
    assert ids == [128000, 128006, 882, 128007, 271, 6151, 128009]
    assert tokenizer.decode(ids) == "<|begin_of_text|>" + text
    assert tokenizer.eog_ids == {128001, 128009}
    assert 128009 not in tokenizer.encode(text, parse_special=False)


def test_vocabulary_kinds_that_are_not_supported():
    for name, match in (("bert-bge", "tokenizer 'bert' is not supported"), ("gemma-4", "'gemma4' is not supported")):
        with pytest.raises(ModelFileError, match=match):
            Tokenizer.from_gguf(open_gguf(vocabulary_folder() / f"ggml-vocab-{name}.gguf").metadata)


# ---- sentencepiece -------------------------------------------------------------------------------------------------


def test_llama_kind_equals_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    topics = pytest.importorskip("pydoc_data.topics").topics
    corpus = "\n".join(str(topic) for topic in topics.values())
    (tmp_path / "corpus.txt").write_text(corpus[:300_000], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=1500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    tokenizer = Tokenizer.from_gguf(_metadata_of(oracle, tmp_path / "spm.gguf"))
    rng = random.Random(3)
    lines = [*corpus[300_000:360_000].split("\n"), *(text for name, text in TEXTS.items() if "special" not in name)]
    lines += ["".join(rng.choices("aabcdeth ninx  =-\t0世", k=rng.randrange(40))) for _ in range(500)]
    for line in lines:
        expected = oracle.encode(line)
        assert tokenizer.encode(line) == expected, line
        assert tokenizer.decode(expected) == line


def _metadata_of(processor, path) -> Metadata:
    writer = gguf.GGUFWriter(path, "llama")
    ids = range(processor.get_piece_size())
    kinds = ((processor.is_unknown, 2), (processor.is_control, 3), (processor.is_byte, 6), (processor.is_unused, 5))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types([next((kind for test, kind in kinds if test(i)), NORMAL) for i in ids])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(path).metadata


def test_sentencepiece_control_tokens_cannot_be_spelled(tiny):
    tokenizer = Tokenizer.from_gguf(tiny(tokenizer="llama"))
    assert tokenizer.encode("</s>") == [tokenizer.eos_id]
    spelled = tokenizer.encode("</s> <0x0A>", parse_special=False)
    assert tokenizer.eos_id not in spelled
    assert 3 + 0x0A not in spelled
    assert tokenizer.decode(spelled) == "</s> <0x0A>"


def test_sentencepiece_blank_before_text(tiny):
    metadata = tiny(tokenizer="llama")
    tokenizer = Tokenizer.from_gguf(metadata)
    the = tokenizer.encode("the")
    assert tokenizer.token_str(the[0]) == " the"
    assert tokenizer.decode(the) == "the"
    assert tokenizer.decode(the, continuation=True) == " the"
    assert tokenizer.decode([tokenizer.bos_id, *the]) == "<s>the"
    assert tokenizer.decode([tokenizer.bos_id, *the], skip_special=True) == "the"
    assert tokenizer.encode("the", add_special=True) == [tokenizer.bos_id, *the]
    assert tokenizer.encode("<s>the") == [tokenizer.bos_id, *the]
    metadata["tokenizer.ggml.add_space_prefix"] = False
    plain = Tokenizer.from_gguf(metadata)
    assert plain.token_str(plain.encode("the")[0]) == "th"
    assert plain.decode(plain.encode(" the")) == " the"


# ---- round trips, streams, edges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", TEXTS)
def test_round_trip(tiny, kind, name):
    tokenizer = Tokenizer.from_gguf(tiny(tokenizer=kind))
    for parse_special in (False, True):
        ids = tokenizer.encode(TEXTS[name], parse_special=parse_special)
        assert tokenizer.decode(ids) == TEXTS[name]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_stream_never_gives_half_a_character(tiny, kind):
    tokenizer = Tokenizer.from_gguf(tiny(tokenizer=kind))
    text = "世界 😀 é"
    stream, parts = tokenizer.decode_stream(), []
    for index in tokenizer.encode(text):
        part = stream.push(index)
        assert "\ufffd" not in part
        parts.append(part)
    assert "" in parts  # bytes were held back
    assert stream.flush() == ""
    assert "".join(parts).strip() == text

    stream = tokenizer.decode_stream()
    unfinished = tokenizer.encode("😀")[:-1]
    assert "".join(stream.push(index) for index in unfinished).strip() == ""
    assert stream.flush() == "\ufffd"


def test_invalid_bytes_decode_to_replacement_characters(demo, transformers_demo):
    ids = [demo.encode("世")[-1], *demo.encode("a"), demo.encode("😀")[0]]
    assert demo.decode(ids) == transformers_demo.decode(ids)
    assert "\ufffd" in demo.decode(ids)


def test_parse_special_false_keeps_control_tokens_out(demo):
    text = TEXTS["special tokens"]
    ids = demo.encode(text, parse_special=False)
    assert not any(demo.is_special(index) for index in ids)
    assert demo.decode(ids) == text
    assert demo.encode(text) != ids  # and the switch goes back


def test_add_bos_and_eos(tiny):
    metadata = tiny(metadata={"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})
    tokenizer = Tokenizer.from_gguf(metadata)
    inner = tokenizer.encode("the")
    assert tokenizer.encode("the", add_special=True) == [tokenizer.bos_id, *inner, tokenizer.eos_id]
    assert tokenizer.encode("", add_special=True) == [tokenizer.bos_id, tokenizer.eos_id]
    del metadata["tokenizer.ggml.bos_token_id"]
    with pytest.raises(ModelFileError, match=r"add_bos_token is set, but there is no tokenizer.ggml.bos_token_id"):
        Tokenizer.from_gguf(metadata)


def test_release_encoder(demo):
    before = demo.encode("Hello world")
    demo.release_encoder()
    assert demo.decode(before) == "Hello world"
    assert demo.encode("Hello world") == before


def test_threads_do_not_mix_up_parse_special(demo):
    text = "<|im_end|>"
    plain, special = demo.encode(text, parse_special=False), demo.encode(text)
    wrong = []

    def work(parse_special: bool, expected: list[int]) -> None:
        wrong.extend(1 for _ in range(300) if demo.encode(text, parse_special=parse_special) != expected)

    threads = [threading.Thread(target=work, args=arguments) for arguments in ((True, special), (False, plain)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ids_of_many_kinds_decode(demo):
    ids = demo.encode("Hello world")
    torch = pytest.importorskip("torch")
    for kind in (tuple(ids), np.array(ids), torch.tensor(ids), iter(ids)):
        assert demo.decode(kind) == "Hello world"
    assert demo.decode([]) == ""


@pytest.mark.parametrize("index", [-1, 49152, 2**40])
def test_ids_out_of_range(demo, index):
    for call in (
        lambda: demo.decode([1, index]),
        lambda: demo.token_str(index),
        lambda: demo.decode_stream().push(index),
    ):
        with pytest.raises(ValueError, match=rf"token id {index} is out of range: the vocabulary has 49152 tokens"):
            call()


def test_wrong_types(demo):
    for bad in (b"bytes", None, 3, ["a"]):
        with pytest.raises(TypeError, match="text: expected str, got"):
            demo.encode(bad)
    for bad in ("a", 1.5, None):
        with pytest.raises(TypeError, match="token id: expected an integer, got"):
            demo.decode([bad])
    with pytest.raises(ValueError, match=r"text: is not valid Unicode at character 1 .*surrogates not allowed"):
        demo.encode("a\ud800b")


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(tiny, name):
    tokenizer = Tokenizer.from_gguf(tiny(metadata={"tokenizer.ggml.pre": name}))
    for text in TEXTS.values():
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def test_byte_table_is_gpt2s(tiny):
    """Every byte has its own character, no blank or control character; printable ASCII stands for itself."""
    tokenizer = Tokenizer.from_gguf(tiny())
    table = tokenizer._byte_of
    assert sorted(table.values()) == list(range(256))
    assert all(table[chr(code)] == code for code in range(33, 127))
    assert not any(unicodedata.category(character) in ("Cc", "Zs") for character in table)
