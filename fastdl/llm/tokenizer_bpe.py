"""Byte-level byte-pair encoding (`tokenizer.ggml.model` = "gpt2"): the pre-tokenizers by name and the builder.

The text is cut by the pre-tokenizer's pattern, each piece's UTF-8 bytes become printable characters (GPT-2's table),
and merges join them. The patterns are those of the models' own tokenizer.json, the names those that llama.cpp's
converter writes to `tokenizer.ggml.pre`; adding one is one word in `_FAMILIES`. tests/test_tokenizer.py checks them
against the inputs and ids that llama.cpp ships.

"smollm" follows transformers, whose GGUF loader cuts by GPT-2's pattern alone. The model was trained with every digit
cut off first, which differs only where two or more blanks, or a digit that is not 0-9, meet: "x  1" is x ĠĠ 1 in
training, x Ġ Ġ 1 here. `Tokenizer.from_gguf(metadata, pre="starcoder")` gives the trained cut.
Unicode normal forms are left alone, as llama.cpp does (Qwen's own tokenizer composes to NFC).
"""

from __future__ import annotations

from .gguf_metadata import Metadata, ModelFileError, StringArray

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER_LOWER = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_HAN = "[\u0800-\u9fa5\uac00-\ud7ff]+"
# Letters with case, as DeepSeek lists them (Unicode 11).
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

# Each family is a list of patterns, applied in turn to the pieces that the one before left.
GPT2 = [_GPT2]
DIGITS = [r"\p{N}", _GPT2]
LLAMA3 = [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL]
QWEN2 = [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL]
QWEN35 = [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL]
SEED_CODER = [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _TAIL]
TEKKEN = [_UPPER_LOWER % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL]
GPT4O = [_UPPER_LOWER % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL]
FALCON = [r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"]
DEEPSEEK_CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"]
DEEPSEEK_LLM = [
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _HAN,
    r"\p{N}+",
]
DEEPSEEK_V3 = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + _TAIL,
]

_FAMILIES = (
    (GPT2, "default gpt-2 smollm phi-2 mpt olmo jais exaone4 a.x-4.0 mellum gigachat trillion granite-docling"),
    (DIGITS, "starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (LLAMA3, "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe chatglm-bpe glm4"),
    (QWEN2, "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (QWEN35, "qwen35"),
    (SEED_CODER, "seed-coder"),
    (TEKKEN, "tekken"),
    (GPT4O, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (FALCON, "falcon"),
    (DEEPSEEK_LLM, "deepseek-llm"),
    (DEEPSEEK_CODER, "deepseek-coder"),
    (DEEPSEEK_V3, "deepseek-v3 hunyuan-dense joyai-llm"),
)
PRE_TOKENIZERS = {name: patterns for patterns, names in _FAMILIES for name in names.split()}
# A piece that is a token by itself is taken whole, merges or not (`ignore_merges` in the models' own files).
WHOLE_TOKENS_FIRST = frozenset(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4", "tekken")
)
# These start a text with BOS unless the file says otherwise.
BOS_BY_DEFAULT = WHOLE_TOKENS_FIRST - {"glm4"}

MAX_MERGES = 1 << 20  # real files have up to 500,000


def byte_characters() -> dict[str, int]:
    """GPT-2's table: printable character -> byte. 188 bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def pre_tokenizer_name(metadata: Metadata, override: str | None) -> str:
    """The name to look up; ModelFileError when it is not in the table."""
    name = override if override is not None else metadata.value("tokenizer.ggml.pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise ModelFileError(
            f"{metadata.source}: tokenizer.ggml.pre: pre-tokenizer {name!r} is not supported; "
            f"supported are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return name


def build(metadata: Metadata, vocabulary: dict[str, int], pre: str):
    """A `tokenizers.Tokenizer` without special tokens. `vocabulary` is token -> id."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    merges = _merges(metadata, vocabulary)
    model = models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_TOKENS_FIRST)
    del merges
    tokenizer = Tokenizer(model)
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PRE_TOKENIZERS[pre]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def _merges(metadata: Metadata, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges as pairs that share the vocabulary's own strings, which halves the peak memory of the construction."""
    merges = metadata.value("tokenizer.ggml.merges", StringArray)
    if len(merges) > MAX_MERGES:
        raise ModelFileError(
            f"{metadata.source}: tokenizer.ggml.merges: expected at most {MAX_MERGES} merges, got {len(merges)}"
        )
    own = dict(zip(vocabulary, vocabulary, strict=True))
    pairs = []
    for index, merge in enumerate(merges):
        space = merge.find(" ", 1)
        left, right = own.get(merge[:space]), own.get(merge[space + 1 :])
        if space < 1 or left is None or right is None or left + right not in own:
            raise ModelFileError(
                f"{metadata.source}: tokenizer.ggml.merges: merge {index} is {merge[:80]!r}, expected two tokens of "
                f"the vocabulary, separated by a blank, whose concatenation is a token"
            )
        pairs.append((left, right))
    return pairs
