"""Text to token ids and back, built from a GGUF file's metadata.

Encoding runs in the `tokenizers` library (tokenizer_bpe.py, tokenizer_spm.py build it); decoding needs no library: each
token's bytes are looked up in the mapped file, and a text is the UTF-8 of the joined bytes. So the encoder, some 10 MB
for 49,152 tokens, can be dropped after the prompt (`release_encoder`) and comes back by itself.
Test: pytest tests/test_tokenizer*.py (transformers, llama.cpp's files and sentencepiece are the oracles)
"""

from __future__ import annotations

import codecs
import ctypes
import operator
import threading
from collections.abc import Iterable

import numpy as np

from . import tokenizer_bpe, tokenizer_spm
from .gguf_metadata import Metadata, ModelFileError, StringArray
from .tokenizer_spm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

KINDS = ("gpt2", "llama")
# Twice what real files have, and more; they bound the time and memory that a hostile vocabulary can ask for.
MAX_TOKENS, MAX_SPECIAL, MAX_TOKEN_BYTES = 1 << 19, 1 << 16, 1 << 16
# Tokens that end a turn or a text, by name: files often name only one of them in `eos_token_id`.
END_NAMES = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<eos>", "</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    "<｜end▁of▁sentence｜>",
)


class Tokenizer:
    """Encodes and decodes text with a model file's own vocabulary. Make one with `Tokenizer.from_gguf(file.metadata)`.

    Attributes: `vocab_size`; `bos_id`, `eos_id`, `unknown_id`, `pad_id` (int or None); `eog_ids`, the frozenset of ids
    that end a generation; `add_bos`, `add_eos`, what `add_special` adds; `kind`, "gpt2" or "llama".
    """

    def __init__(self, metadata: Metadata, pre: str | None = None):
        if not isinstance(metadata, Metadata):
            metadata = Metadata("<metadata>", metadata)
        self._metadata = metadata
        self.kind = metadata.value("tokenizer.ggml.model", str)
        if self.kind not in KINDS:
            raise ModelFileError(
                f"{metadata.source}: tokenizer.ggml.model: tokenizer {self.kind!r} is not supported; supported are "
                f"'gpt2' (byte-pair) and 'llama' (SentencePiece)"
            )
        self._tokens = metadata.value("tokenizer.ggml.tokens", StringArray)
        self.vocab_size = len(self._tokens)
        if not 1 <= self.vocab_size <= MAX_TOKENS or self._tokens.longest() > MAX_TOKEN_BYTES:
            raise ModelFileError(
                f"{metadata.source}: tokenizer.ggml.tokens: expected 1 to {MAX_TOKENS} tokens of at most "
                f"{MAX_TOKEN_BYTES} bytes, got {self.vocab_size} of at most {self._tokens.longest()}"
            )
        self._types = _token_types(metadata, self.vocab_size)
        self._pre = tokenizer_bpe.pre_tokenizer_name(metadata, pre) if self.kind == "gpt2" else None

        sentencepiece = self.kind == "llama"
        self.bos_id = self._special_id("bos", 1 if sentencepiece else None)
        self.eos_id = self._special_id("eos", 2 if sentencepiece else None)
        self.unknown_id = self._special_id("unknown", 0 if sentencepiece else None)
        self.pad_id = self._special_id("padding", None)
        self.add_bos = self._adds("bos", self.bos_id, sentencepiece or self._pre in tokenizer_bpe.BOS_BY_DEFAULT)
        self.add_eos = self._adds("eos", self.eos_id, False)
        self._strip_blank = sentencepiece and metadata.value("tokenizer.ggml.add_space_prefix", bool, True)

        self._byte_of = tokenizer_bpe.byte_characters()
        self._lock = threading.Lock()
        self._encoder = None
        self._build_encoder()

    @classmethod
    def from_gguf(cls, metadata: Metadata, *, pre: str | None = None) -> Tokenizer:
        """The tokenizer that a GGUF file's metadata describes.

        metadata: `open_gguf(path).metadata`. pre: a pre-tokenizer's name to use instead of the file's
        `tokenizer.ggml.pre` (see tokenizer_bpe.PRE_TOKENIZERS). Raises ModelFileError for what is missing, of the wrong
        type or not supported.

        >>> tokenizer = Tokenizer.from_gguf(open_gguf("model.gguf").metadata)          # doctest: +SKIP
        >>> tokenizer.encode("The capital of France is")                               # doctest: +SKIP
        [504, 3575, 282, 4649, 314]
        """
        return cls(metadata, pre)

    # ---- construction ------------------------------------------------------------------------------------------

    def _special_id(self, name: str, default: int | None) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        index = self._metadata.value(key, int, default)
        if index is not None and not 0 <= index < self.vocab_size:
            if key not in self._metadata:
                return None
            raise ModelFileError(f"{self._metadata.source}: {key}: id {index} is outside the {self.vocab_size} tokens")
        return index

    def _adds(self, name: str, index: int | None, default: bool) -> bool:
        key = f"tokenizer.ggml.add_{name}_token"
        adds = self._metadata.value(key, bool, default)
        if adds and index is None and key in self._metadata:
            raise ModelFileError(
                f"{self._metadata.source}: {key} is set, but there is no tokenizer.ggml.{name}_token_id"
            )
        return adds and index is not None

    def _build_encoder(self) -> None:
        """The Rust encoder, the ids of its special tokens and `eog_ids`. No Python copy of the vocabulary is kept."""
        try:
            from tokenizers import AddedToken
        except ImportError as error:
            raise ImportError(
                f"encoding text needs the tokenizers package: pip install tokenizers ({error})"
            ) from error
        source = self._metadata.source
        tokens = self._tokens.tolist()
        vocabulary = {token: index for index, token in enumerate(tokens)}
        self.eog_ids = self._end_ids(vocabulary)
        special_types = np.isin(self._types, (CONTROL, UNKNOWN))
        special = [index for index in np.flatnonzero(special_types).tolist() if tokens[index]]
        named = self.eog_ids | {index for index in (self.bos_id, self.eos_id) if index is not None}
        special += [index for index in named if not special_types[index] and tokens[index]]
        user_defined = [index for index in np.flatnonzero(self._types == USER_DEFINED).tolist() if tokens[index]]
        self._special = frozenset(special)
        count = len(special) + len(user_defined)
        if count > MAX_SPECIAL:
            raise ModelFileError(
                f"{source}: tokenizer.ggml.token_type: {count} control and user-defined tokens, at most {MAX_SPECIAL}"
            )
        try:
            if self.kind == "gpt2":
                encoder = tokenizer_bpe.build(self._metadata, vocabulary, self._pre)
            else:
                encoder = tokenizer_spm.build(self._metadata, tokens, vocabulary, self._types, self.unknown_id)
            encoder.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in special])
            encoder.add_tokens(
                [AddedToken(tokens[i], normalized=False) for i in user_defined if i not in self._special]
            )
        except ModelFileError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise ModelFileError(f"{source}: the tokenizer cannot be built: {error}") from error
        self._encoder = encoder
        del vocabulary, tokens
        _return_free_memory()

    def _end_ids(self, vocabulary: dict[str, int]) -> frozenset[int]:
        ids = {self._special_id(name, None) for name in ("eot", "eom")} | {self.eos_id}
        for name in END_NAMES:
            index = vocabulary.get(name)
            # "</s>" and its like may be ordinary text (HTML) where the file marks them as normal tokens.
            if index is not None and (self._types[index] != NORMAL or name.startswith("<|")):
                ids.add(index)
        return frozenset(ids - {None})

    def release_encoder(self) -> None:
        """Drop the encoder's memory; the next `encode` builds it again. Decoding goes on without it."""
        with self._lock:
            self._encoder = None
        _return_free_memory()

    # ---- text to ids -------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special: put BOS before and EOS after, as far as the file asks for it (`add_bos`, `add_eos`).
        parse_special: control tokens such as <|im_end|> written in the text become their ids, as in transformers; with
        False they are encoded as the letters they are made of (for text that is not trusted). User-defined tokens,
        which are ordinary text, are found in both cases.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        with self._lock:
            if self._encoder is None:
                self._build_encoder()
            self._encoder.encode_special_tokens = not parse_special
            try:
                ids = self._encoder.encode(text, add_special_tokens=False).ids
            except (UnicodeEncodeError, TypeError):
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:  # bytes that were no UTF-8, on stdin for example, become surrogates
                    where = f"at character {error.start} (bytes that are no UTF-8?)"
                    raise ValueError(f"text: is not valid Unicode {where}: {error.reason}") from None
                raise
        if add_special:
            ids = [self.bos_id] * self.add_bos + ids + [self.eos_id] * self.add_eos
        return ids

    # ---- ids to text -------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, continuation: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        skip_special: leave control tokens out. continuation: keep the first blank; without it the blank that a
        SentencePiece tokenizer put before the text is taken away again.
        """
        stream = DecodeStream(self, skip_special, strip_blank=self._strip_blank and not continuation)
        return "".join([stream.push(index) for index in ids]) + stream.flush()

    def decode_stream(self, *, skip_special: bool = False) -> DecodeStream:
        """Decodes a generation token by token: `push(id)` returns the text that is complete, `flush()` the rest."""
        return DecodeStream(self, skip_special, strip_blank=False)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that a token adds to a text. ValueError when the id is outside the vocabulary."""
        index = self._checked_id(index)
        text = self._tokens[index]
        kind = self._types[index]
        if index in self._special or kind == USER_DEFINED:
            return text.encode("utf-8")
        if self.kind == "gpt2":
            try:
                return bytes([self._byte_of[character] for character in text])
            except KeyError:
                return text.encode("utf-8")  # not in the byte alphabet: stands for itself
        if kind == BYTE and len(text) == 6 and text.startswith("<0x"):
            try:
                return bytes([int(text[3:5], 16)])
            except ValueError:
                pass  # marked as a byte, but it spells none: stands for itself
        return text.replace(SPACE, " ").encode("utf-8")

    def token_str(self, index: int) -> str:
        """The token's own text, for display; half a character shows as U+FFFD."""
        return self.token_bytes(index).decode("utf-8", "replace")

    def is_special(self, index: int) -> bool:
        """True for control tokens: BOS, EOS, <|im_start|> and so on."""
        return self._checked_id(index) in self._special

    @property
    def bos_token(self) -> str:
        """BOS as text, for chat templates; empty when there is none."""
        return "" if self.bos_id is None else self._tokens[self.bos_id]

    @property
    def eos_token(self) -> str:
        """EOS as text, for chat templates; empty when there is none."""
        return "" if self.eos_id is None else self._tokens[self.eos_id]

    def _checked_id(self, index: int) -> int:
        try:
            index = operator.index(index)
        except TypeError:
            raise TypeError(f"token id: expected an integer, got {type(index).__name__}") from None
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is out of range: the vocabulary has {self.vocab_size} tokens")
        return index

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        pre = f", pre {self._pre!r}" if self._pre else ""
        return f"Tokenizer({self.kind!r}{pre}, {self.vocab_size} tokens)"


class DecodeStream:
    """Turns ids into text one at a time and never returns half a UTF-8 character; made by `Tokenizer.decode_stream`."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, strip_blank: bool):
        self._tokenizer, self._skip_special, self._strip_blank = tokenizer, skip_special, strip_blank
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """The text that became complete with this token; may be empty."""
        special = self._tokenizer.is_special(index)
        if special and self._skip_special:
            return ""
        piece = self._tokenizer.token_bytes(index)
        if self._strip_blank and not special:
            self._strip_blank = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, otherwise nothing."""
        return self._utf8.decode(b"", final=True)


def _token_types(metadata: Metadata, count: int) -> np.ndarray:
    types = metadata.value("tokenizer.ggml.token_type", np.ndarray, None)
    if types is None:
        return np.ones(count, np.int32)
    if len(types) != count or types.dtype.kind not in "iu":
        raise ModelFileError(
            f"{metadata.source}: tokenizer.ggml.token_type: expected {count} integers, one a token, "
            f"got {len(types)} of {types.dtype}"
        )
    return types


def _return_free_memory() -> None:
    """Give freed heap pages back to the system: building needs three times what stays (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
