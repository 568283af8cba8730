"""Reader of SentencePiece's ``tokenizer.model``: pieces, scores, types.

The file is one protocol-buffer message (sentencepiece_model.proto): field 1 repeats ``SentencePiece {1: piece, 2:
score, 3: type}``, field 2 is the trainer's settings (``3: model_type``, 1 unigram, 2 BPE), field 3 the normalizer's
(``3: add_dummy_prefix``). These few fields do not justify a dependency on sentencepiece, so the wire format is read
here; every length is checked against the bytes that are there.

Tests: ``pytest tests/test_convert.py -k sentencepiece``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastdl.llm.gguf import ModelFileError

_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass
class SentencePiece:
    tokens: list[bytes]
    scores: list[float]
    types: list[int]  # the numbers are GGUF's too: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte
    add_dummy_prefix: bool


def read_sentencepiece(path: Path) -> SentencePiece:
    """Reads ``path``.

    Raises
    ------
    ModelFileError
        the file is not a SentencePiece model, is cut off, or is not of the BPE kind.
    """
    try:
        return _parse(path.read_bytes(), path)
    except (IndexError, struct.error) as error:
        raise ModelFileError(f"{path}: not a SentencePiece model, or cut off ({error})") from error


def _parse(data: bytes, path: Path) -> SentencePiece:
    model = SentencePiece([], [], [], add_dummy_prefix=True)
    model_type = 1  # the format's default: unigram
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            piece, score, kind = b"", 0.0, 1
            for inner, content in _fields(value):
                if inner == 1 and isinstance(content, bytes):
                    piece = content
                elif inner == 2 and isinstance(content, bytes):
                    (score,) = struct.unpack("<f", content)
                elif inner == 3 and isinstance(content, int):
                    kind = content
            if not 1 <= kind <= 6:
                raise ModelFileError(f"{path}: piece {len(model.tokens)} has the unknown type {kind}")
            model.tokens.append(piece)
            model.scores.append(score)
            model.types.append(kind)
        elif number == 2 and isinstance(value, bytes):
            model_type = next((content for inner, content in _fields(value) if inner == 3), model_type)
        elif number == 3 and isinstance(value, bytes):
            model.add_dummy_prefix = bool(next((content for inner, content in _fields(value) if inner == 3), True))
    if not model.tokens:
        raise ModelFileError(f"{path}: not a SentencePiece model (it holds no pieces)")
    if model_type != _BPE:
        raise ModelFileError(f"{path}: a SentencePiece model of type {model_type}; only BPE (2) is supported")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one message. Varints come as int, everything else as its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise IndexError(f"wire type {wire} at byte {at}")
        if at + length > len(data):
            raise IndexError(f"{length} bytes announced at byte {at}, {len(data) - at} left")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError(f"number too long at byte {at}")
