"""Tokenizer of a Hugging Face folder -> GGUF metadata.

Two kinds exist in the llama family, and each has one GGUF form:

- ``gpt2``: byte-level byte-pair encoding (llama 3, qwen2, smollm2, Mistral Nemo). Tokens, merges, and the *name* of the
  pre-tokenizer, from which a reader rebuilds the regular expressions. The name is found from the structure of
  ``pre_tokenizer`` in tokenizer.json, so that any fine-tune of a known family is recognised, whatever its vocabulary.
- ``llama``: SentencePiece byte-pair encoding (llama 2, Mistral 7B). Tokens and scores; a reader joins the pair with
the best
  score. Scores come from tokenizer.model; where there is only a tokenizer.json, the rank of a token's first merge
  takes their place, which orders the joins in the same way.

Special ids and the chat template are read by ``gguf.SpecialVocab``. Whether BOS and EOS are added is read off by
encoding.

Tests: ``pytest tests/test_convert.py -k tokenizer``.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdl.llm import tokenizer_bpe
from fastdl.llm.convert_spm import read_sentencepiece
from fastdl.llm.gguf import Metadata, ModelFileError
from fastdl.llm.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf's token types

# Names to choose from, best first: GGUF has many names for one way to cut. "command-r" cuts off every digit, then cuts
# as GPT-2 does: smollm's own way. The name "smollm" itself is read by transformers, and so by fastdl, as plain GPT-2.
PREFERRED = (
    *("gpt-2", "command-r", "llama-bpe", "dbrx", "qwen2", "qwen35", "seed-coder", "tekken", "gpt-4o"),
    *("deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon"),
)
# Texts on which a converted tokenizer is compared with its source.
SAMPLE = (
    "Hello, World! I've been told he's there, WE'LL see; it'S 3.14159, 2024 or 1000000?\n\n"
    "  def f(x):\n\treturn x[1:] + 'a\\n'  # done\r\n   x  1    .\u00a0!!!... ------======= "
    "Straße, naïve café, Ελληνικά, нещо на Български, 我想在apple工作1314151天～, 🚀 👩\u200d👩\u200d👧 "
)


@dataclass
class Vocabulary:
    """What goes into a GGUF file's ``tokenizer.ggml.*`` keys."""

    kind: str  # "gpt2" | "llama"
    pre: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float] | None = None  # llama only
    merges: list[str] | None = None  # gpt2 only
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    special_ids: dict[str, int] = field(default_factory=dict)  # "bos" -> id
    chat_template: Any = None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Reads the tokenizer of ``folder``; ids it leaves open below ``vocab_size`` (the embedding's rows) are unused.

    Raises
    ------
    ModelFileError
        no tokenizer, a damaged one, one of another kind, or one with more tokens than the embedding has rows.
    """
    tokenizer = read_json(folder / "tokenizer.json", optional=True)
    config = read_json(folder / "tokenizer_config.json", optional=True) or {}
    spm = folder / "tokenizer.model"
    if tokenizer is None and not spm.is_file():
        raise ModelFileError(
            f"{folder}: no tokenizer.json and no tokenizer.model; save the tokenizer beside the weights"
        )
    try:
        if tokenizer is not None and _is_byte_level(tokenizer):
            vocab = _byte_level(folder, tokenizer)
        elif spm.is_file():
            vocab = _sentencepiece(spm, tokenizer, config)
        else:
            vocab = _sentencepiece_from_json(folder, tokenizer)
        _pad(vocab, vocab_size, folder)
        _special(vocab, folder, tokenizer, config)
    except ModelFileError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ModelFileError(f"{folder}: the tokenizer files are damaged ({type(error).__name__}: {error})") from error
    return vocab


def read_json(path: Path, *, optional: bool = False) -> Any:
    """The parsed file, which must hold an object; None if it is missing and ``optional``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return None
        raise ModelFileError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _steps(pre_tokenizer: dict[str, Any]) -> list[str]:
    """The regular expressions of a byte-level pre-tokenizer, in order; a step of another kind stands as its JSON."""
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel":
        return tokenizer_bpe.GPT2 if pre_tokenizer.get("use_regex", True) else []
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return [r"\p{N}"]
    if kind == "Split" and pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert"):
        pattern = pre_tokenizer["pattern"]
        return [pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])]
    return [json.dumps(pre_tokenizer, sort_keys=True)]


def _name(steps: list[str], whole_tokens_first: bool) -> str | None:
    """GGUF's name for a pre-tokenizer. Where names differ only in taking whole tokens first, the model decides."""
    found = [name for name in PREFERRED if tokenizer_bpe.PRE_TOKENIZERS[name] == steps]
    exact = [name for name in found if (name in tokenizer_bpe.WHOLE_TOKENS_FIRST) == whole_tokens_first]
    return next(iter(exact + found), None)


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer"))


def _byte_level(folder: Path, tokenizer: dict[str, Any]) -> Vocabulary:
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ModelFileError(f"{folder / 'tokenizer.json'}: model type {model.get('type')!r} is not supported (BPE is)")
    steps = _steps(tokenizer["pre_tokenizer"])
    pre = _name(steps, model.get("ignore_merges") is True)
    if pre is None:
        raise ModelFileError(
            f"{folder / 'tokenizer.json'}: pre-tokenizer not recognised (known: {', '.join(PREFERRED)}); "
            f"its patterns are {steps}"
        )
    tokens, types = _tokens(folder, model["vocab"], tokenizer.get("added_tokens") or [])
    merges = [_merge(merge) for merge in model["merges"]]
    return Vocabulary("gpt2", pre, tokens, types, merges=merges)


def _merge(merge: str | list[str]) -> str:
    """'left right'. A space inside a half is written as U+0120, as byte-level tokens write it."""
    if isinstance(merge, str):
        return merge
    left, right = merge
    return f"{left.replace(' ', chr(0x120))} {right.replace(' ', chr(0x120))}"


def _tokens(folder: Path, vocab: dict[str, int], added: list[dict[str, Any]]) -> tuple[list[bytes], list[int]]:
    by_id = {index: (text, NORMAL) for text, index in vocab.items()}
    by_id.update({token["id"]: (token["content"], _added_type(token)) for token in added})
    if min(by_id, default=0) < 0 or len(by_id) > 1 << 24 or max(by_id, default=0) > 1 << 24:
        raise ModelFileError(f"{folder / 'tokenizer.json'}: token ids must lie between 0 and {1 << 24}")
    tokens: list[bytes] = []
    types: list[int] = []
    for index in range(max(by_id, default=-1) + 1):
        text, kind = by_id.get(index, (f"[PAD{index}]", UNUSED))
        tokens.append(text.encode())
        types.append(kind)
    return tokens, types


def _added_type(token: dict[str, Any]) -> int:
    """Some models forget to mark control tokens; ``<|name|>`` is one whatever the file says (llama.cpp's rule)."""
    text = token["content"]
    looks_special = text in ("<pad>", "<mask>") or re.fullmatch(r"<[|｜].*[|｜]>", text, re.DOTALL) is not None
    return CONTROL if token.get("special") or looks_special else USER_DEFINED


def _sentencepiece(path: Path, tokenizer: dict[str, Any] | None, config: dict[str, Any]) -> Vocabulary:
    spm = read_sentencepiece(path)
    vocab = Vocabulary("llama", "default", spm.tokens, spm.types, scores=spm.scores)
    vocab.add_space_prefix = spm.add_dummy_prefix
    decoder = config.get("added_tokens_decoder") or {}
    added = [{"id": int(index), **token} for index, token in decoder.items()]
    _add_tokens(vocab, (tokenizer or {}).get("added_tokens") or added, path.parent)
    return vocab


def _sentencepiece_from_json(folder: Path, tokenizer: dict[str, Any]) -> Vocabulary:
    model = tokenizer["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ModelFileError(
            f"{folder / 'tokenizer.json'}: tokenizer kind {model.get('type')!r} is not supported "
            "(byte-level BPE and SentencePiece BPE with byte fallback are)"
        )
    tokens, types = _tokens(folder, model["vocab"], [])
    rank: dict[str, int] = {}
    for index, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, index)
    never = -float(len(rank) + 1)
    scores = [-float(rank[text.decode()]) if text.decode() in rank else never for text in tokens]
    vocab = Vocabulary("llama", "default", tokens, types, scores=scores)
    for index, text in enumerate(tokens):
        if re.fullmatch(rb"<0x[0-9A-F]{2}>", text):
            types[index] = BYTE
    _add_tokens(vocab, tokenizer.get("added_tokens") or [], folder)
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        types[model["vocab"][unknown]] = UNKNOWN
    normalizer, pre_tokenizer = json.dumps(tokenizer.get("normalizer")), json.dumps(tokenizer.get("pre_tokenizer"))
    vocab.add_space_prefix = '"Prepend"' in normalizer or any(
        f'"prepend_scheme": "{scheme}"' in pre_tokenizer for scheme in ("always", "first")
    )
    return vocab


def _add_tokens(vocab: Vocabulary, added: list[dict[str, Any]], folder: Path) -> None:
    """Writes the added tokens over (or behind) those of a SentencePiece vocabulary."""
    for token in added:
        index = token["id"]
        if not 0 <= index <= 1 << 24:
            raise ModelFileError(f"{folder}: added token {token['content']!r} has the id {index}")
        _extend(vocab, index + 1)
        if vocab.types[index] in (UNKNOWN, BYTE):
            continue
        vocab.types[index] = _added_type(token)
        text = token["content"] if vocab.types[index] == CONTROL else token["content"].replace("▁", " ")
        vocab.tokens[index], vocab.scores[index] = text.encode(), -1000.0


def _extend(vocab: Vocabulary, size: int) -> None:
    for index in range(len(vocab.tokens), size):
        vocab.tokens.append(f"[PAD{index}]".encode())
        vocab.types.append(UNUSED)
        if vocab.scores is not None:
            vocab.scores.append(-1000.0)


def _pad(vocab: Vocabulary, size: int, folder: Path) -> None:
    if len(vocab.tokens) > size:
        raise ModelFileError(
            f"{folder}: the tokenizer has {len(vocab.tokens)} tokens, the embedding only {size} rows "
            "(vocab_size in config.json)"
        )
    _extend(vocab, size)


def _special(vocab: Vocabulary, folder: Path, tokenizer: dict[str, Any] | None, config: dict[str, Any]) -> None:
    import gguf

    logger = logging.getLogger("gguf.vocab")  # it warns of what is read off by encoding here
    before, logger.disabled = logger.disabled, True
    try:
        special = gguf.SpecialVocab(folder, n_vocab=len(vocab.tokens))
    finally:
        logger.disabled = before
    vocab.special_ids = dict(special.special_token_ids)
    if vocab.kind == "llama" and UNKNOWN in vocab.types:
        vocab.special_ids.setdefault("unk", vocab.types.index(UNKNOWN))
    template = special.chat_template
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    vocab.chat_template = template
    before, after = _added_around(folder, tokenizer)
    for name, ids, attribute in (("bos", before, "add_bos"), ("eos", after, "add_eos")):
        flag = config.get(f"add_{name}_token")
        expected = [vocab.special_ids[name]] if name in vocab.special_ids else None
        if isinstance(flag, bool):
            setattr(vocab, attribute, flag)
        elif ids is None:  # no tokenizer.json: SentencePiece models of the family add BOS and no EOS
            setattr(vocab, attribute, name == "bos")
        else:
            setattr(vocab, attribute, bool(ids) and ids == expected)
            if ids and ids != expected:
                vocab.notes.append(
                    f"the tokenizer puts the tokens {ids} around the text, which GGUF cannot say; left out"
                )
        if getattr(vocab, attribute) and expected is None:
            raise ModelFileError(f"{folder}: the tokenizer adds a {name.upper()} token but names none")


def _added_around(folder: Path, tokenizer: dict[str, Any] | None) -> tuple[list[int] | None, list[int] | None]:
    """Ids that the tokenizer puts before and after every text (None: not known)."""
    if tokenizer is None:
        return None, None
    from tokenizers import Tokenizer

    try:
        built = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelFileError(f"{folder / 'tokenizer.json'}: damaged ({error})") from error
    plain = built.encode("a", add_special_tokens=False).ids
    full = built.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def compare(folder: Path, metadata: Metadata) -> list[str]:
    """Encodes `SAMPLE` with the folder's tokenizer.json and with what was written; returns a note if the ids differ."""
    if not (folder / "tokenizer.json").is_file():
        return []
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    theirs = HuggingFaceTokenizer.from_file(str(folder / "tokenizer.json")).encode(SAMPLE, add_special_tokens=False).ids
    ours = Tokenizer.from_gguf(metadata).encode(SAMPLE, add_special=False)
    if ours == theirs:
        return []
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return [
        f"the tokenizer encodes some texts otherwise than the source's: "
        f"{ours[at : at + 4]}, there {theirs[at : at + 4]}"
    ]
