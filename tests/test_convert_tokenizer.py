"""Tokenizers of Hugging Face folders in GGUF files: the written file's ids are those of the folder's own tokenizer.

Oracles: the `tokenizers` library on the folder's tokenizer.json, and sentencepiece on tokenizer.model.
"""

from __future__ import annotations

import json
import re

import pytest
from hf_models import TEXT, byte_level_tokenizer, sentencepiece_tokenizer, write_hf_model
from tokenizers import Tokenizer as HuggingFaceTokenizer

from fastdl.llm import ModelFileError
from fastdl.llm.convert import quantize_file
from fastdl.llm.convert_spm import read_sentencepiece
from fastdl.llm.convert_tokenizer import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary
from fastdl.llm.gguf import open_gguf
from fastdl.llm.tokenizer import Tokenizer

SAMPLES = [
    "The quick brown fox isn't here, WE'LL see what they've done in 2024.",
    "def add(first):\n\treturn first[1:]  # 12345.678\n\n\n",
    "  two  blanks   x  1    ",
    "naïve café Straße, Ελληνικά, 我想在apple工作1314151天～ 🚀",
    "<|im_start|>user\nhello <tag>there</tag><|im_end|>",
    "",
]


def convert(folder, **settings):
    """Writes a model folder, converts it; returns the report and the file's metadata."""
    write_hf_model(folder, **settings)
    report = quantize_file(folder, folder / "out.gguf", "q8_0", progress=False)
    with open_gguf(folder / "out.gguf") as file:
        return report, file.metadata


def assert_same_ids(folder, metadata, samples=SAMPLES):
    theirs = HuggingFaceTokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_gguf(metadata)
    for text in samples:
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.encode(text, add_special=True) == theirs.encode(text, add_special_tokens=True).ids, text


@pytest.mark.parametrize(
    ("cut", "whole_tokens_first", "name"),
    [
        ("gpt2", False, "gpt-2"),
        ("smollm", False, "command-r"),
        ("llama3", True, "llama-bpe"),
        ("llama3", False, "dbrx"),
        ("qwen2", False, "qwen2"),
        ("tekken", True, "tekken"),
    ],
)
def test_tokenizer_pre_tokenizers(tmp_path, cut, whole_tokens_first, name):
    tokenizer = byte_level_tokenizer(cut, whole_tokens_first=whole_tokens_first)
    report, metadata = convert(tmp_path, tokenizer=tokenizer)
    assert metadata["tokenizer.ggml.model"] == "gpt2" and metadata["tokenizer.ggml.pre"] == name
    assert report.notes == []
    assert_same_ids(tmp_path, metadata)


def test_tokenizer_types_and_specials(tmp_path):
    _, metadata = convert(tmp_path, tokenizer=byte_level_tokenizer(bos=True))
    types = metadata["tokenizer.ggml.token_type"].tolist()
    tokens = list(metadata["tokenizer.ggml.tokens"])
    assert types[:3] == [CONTROL] * 3 and types[tokens.index("<tag>")] == USER_DEFINED and types[10] == NORMAL
    assert types[-1] == UNUSED and tokens[-1] == "[PAD415]" and len(tokens) == 416
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.ggml.bos_token_id"] == 1 and metadata["tokenizer.ggml.eos_token_id"] == 2
    assert_same_ids(tmp_path, metadata)


def test_tokenizer_flag_in_its_configuration_wins(tmp_path):
    """transformers rebuilds the template from add_bos_token."""
    write_hf_model(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    assert read_vocabulary(tmp_path, 416).add_bos is True


def test_tokenizer_with_merges_as_text(tmp_path):
    """transformers before 4.45 wrote "a b" for ["a", "b"]."""
    write_hf_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    expected = read_vocabulary(tmp_path, 416).merges
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    path.write_text(json.dumps(data))
    assert read_vocabulary(tmp_path, 416).merges == expected


def test_tokenizer_chat_template_file(tmp_path):
    write_hf_model(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({key: value for key, value in json.loads(config.read_text()).items() if "chat" not in key})
    )
    (tmp_path / "chat_template.jinja").write_text("{{ 'from the file' }}")
    assert read_vocabulary(tmp_path, 416).chat_template == "{{ 'from the file' }}"
    config.unlink()
    assert read_vocabulary(tmp_path, 416).chat_template == "{{ 'from the file' }}"


def test_tokenizer_that_puts_more_around_the_text_is_noted(tmp_path):
    from tokenizers import processors

    tokenizer = byte_level_tokenizer()
    specials = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <|im_end|> $A", special_tokens=specials
    )
    report, metadata = convert(tmp_path, tokenizer=tokenizer)
    assert "[1, 2] around the text" in str(report) and metadata["tokenizer.ggml.add_bos_token"] is False


def test_sentencepiece_from_tokenizer_json(tmp_path):
    """Scores from merge ranks join in the same order; ids are equal, byte fallback and BOS included."""
    report, metadata = convert(tmp_path, kind="mistral", tokenizer=sentencepiece_tokenizer(), sliding_window=None)
    assert metadata["tokenizer.ggml.model"] == "llama" and report.notes == []
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.ggml.add_space_prefix"] is True
    types = metadata["tokenizer.ggml.token_type"].tolist()
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, 6] and metadata["tokenizer.ggml.unknown_token_id"] == 0
    assert_same_ids(tmp_path, metadata, [text for text in SAMPLES if "<" not in text and text])


@pytest.fixture
def spm_folder(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT)
    folder = tmp_path / "model"
    folder.mkdir()
    write_hf_model(folder, "mistral", sliding_window=None)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


def test_sentencepiece_model_file(spm_folder):
    """Without a tokenizer.json; pieces, scores, types and ids are sentencepiece's."""
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    read = read_sentencepiece(spm_folder / "tokenizer.model")
    assert [token.decode() for token in read.tokens] == [oracle.id_to_piece(i) for i in range(oracle.vocab_size())]
    assert read.scores == pytest.approx([oracle.get_score(i) for i in range(oracle.vocab_size())])
    quantize_file(spm_folder, spm_folder / "out.gguf", "q8_0", progress=False)
    with open_gguf(spm_folder / "out.gguf") as file:
        ours = Tokenizer.from_gguf(file.metadata)
        assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    for text in SAMPLES:
        if text and "<" not in text:
            assert ours.encode(text, add_special=False) == oracle.encode(text)


def test_sentencepiece_added_tokens(spm_folder):
    config = json.loads((spm_folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "1": {"content": "<s>", "special": True},
        "410": {"content": "[INST]", "special": False},
    }
    (spm_folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocab = read_vocabulary(spm_folder, 416)
    assert vocab.tokens[410] == b"[INST]" and vocab.types[410] == USER_DEFINED and vocab.types[409] == UNUSED


def test_sentencepiece_damaged(spm_folder):
    """Cut off anywhere: ModelFileError, or a shorter list of pieces where the cut falls between two."""
    path = spm_folder / "tokenizer.model"
    data = path.read_bytes()
    for length in [*range(64), *range(64, len(data), 97)]:
        path.write_bytes(data[:length])
        with pytest.raises(ModelFileError, match=r"tokenizer\.model"):
            read_sentencepiece(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelFileError, match=r"tokenizer\.model: not a SentencePiece model"):
        read_sentencepiece(path)


def _spoil(change):
    def apply(folder):
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


BAD = {
    "none": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json and no tokenizer.model"),
    "not-json": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: not valid JSON"),
    "not-an-object": (lambda folder: (folder / "tokenizer.json").write_text("[1]"), "expected a JSON object, got list"),
    "unigram": (
        _spoil(lambda d: d.update(model={"type": "Unigram"}, pre_tokenizer=None)),
        "'Unigram' is not supported",
    ),
    "wordpiece": (_spoil(lambda d: d["model"].update(type="WordPiece")), "'WordPiece' is not supported"),
    "no-vocab": (_spoil(lambda d: d["model"].pop("vocab")), "tokenizer files are damaged"),
    "bad-merge": (_spoil(lambda d: d["model"].update(merges=[["a"]])), "tokenizer files are damaged"),
    "huge-id": (_spoil(lambda d: d["model"]["vocab"].update(x=1 << 40)), "token ids must lie between 0 and"),
    "more-tokens-than-rows": (
        _spoil(lambda d: d["model"]["vocab"].update(x=416)),
        "417 tokens, the embedding only 416 rows",
    ),
    "other-cut": (
        _spoil(lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"})),
        "pre-tokenizer not recognised",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_tokenizer_bad_files(tmp_path, name):
    spoil, message = BAD[name]
    write_hf_model(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelFileError, match=re.escape(message)):
        quantize_file(tmp_path, tmp_path / "out.gguf", progress=False)
    assert not list(tmp_path.glob("out.gguf*"))
