"""GGUF files that are cut off, lie, or are something else: a ModelFileError that names the file and the part."""

from __future__ import annotations

import os
import struct

import pytest
from raw_gguf import gguf_bytes, key, tensor, text, u32, u64, written
from tiny_model import write_tiny_model

from fastdl.llm.gguf import ModelFileError, open_gguf
from fastdl.llm.gguf_metadata import MAX_STRINGS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_missing_file_directory_and_empty(tmp_path):
    with pytest.raises(ModelFileError, match=r"nothing.gguf: no such file"):
        open_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(ModelFileError, match="is a directory"):
        open_gguf(tmp_path)
    with pytest.raises(ModelFileError, match="the file is empty"):
        open_gguf(written(tmp_path, b""))
    with pytest.raises(ModelFileError, match="cannot be opened"):
        open_gguf("a\0b")
    with pytest.raises(TypeError):
        open_gguf(7)


def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_gguf(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"GGU", "expected the magic b'GGUF', got b'GGU'"),
        (b"hello world", "got b'hell'"),
        (b"version https://git-lfs", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"PK\x03\x04...", "zip archive"),
        (b"ggml....", "before GGUF"),
        (b"GGUF", "the version needs 4 bytes"),
        (b"GGUF" + u32(3), "number of tensors needs 8 bytes"),
        (b"GGUF" + u32(1) + bytes(16), "GGUF version 1, expected 2 or 3"),
        (b"GGUF" + u32(4) + bytes(16), "GGUF version 4, expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_not_gguf(tmp_path, raw, match):
    with pytest.raises(ModelFileError, match=match) as caught:
        open_gguf(written(tmp_path, raw))
    assert "bad.gguf" in str(caught.value)


BAD_KEYS = [
    ("absurd key count", dict(key_count=2**63), "claims 9223372036854775808 metadata keys, expected at most"),
    ("too many keys", dict(key_count=3), "claims 3 metadata keys|truncated"),
    ("absurd tensor count", dict(tensor_count=2**40), "claims 1099511627776 tensors, expected at most"),
    ("twice", dict(keys=[key("a", 4, u32(1)), key("a", 4, u32(1))]), "metadata key 'a': appears twice"),
    (
        "key length",
        dict(keys=[u64(2**60) + bytes(40)]),
        "the key claims 1152921504606846976 bytes, expected at most 65535",
    ),
    ("key past the end", dict(keys=[u64(60000) + bytes(40)]), "the key needs 60000 bytes"),
    ("key not UTF-8", dict(keys=[key(b"\xff\xfe", 4, u32(1))]), "the key is not UTF-8"),
    ("string length", dict(keys=[key("s", 8, u64(2**62))]), "key 's': the string claims"),
    ("string past the end", dict(keys=[key("s", 8, u64(1000))]), "key 's': the string needs 1000 bytes"),
    (
        "string not UTF-8",
        dict(keys=[key("s", 8, text(b"ok\xc3("))]),
        r"key 's': the string is not UTF-8 \(byte 2 of 4\)",
    ),
    ("value type", dict(keys=[key("v", 13, u32(1))]), "key 'v': value type 13, expected 0..12"),
    ("bool", dict(keys=[key("b", 7, b"\2")]), "key 'b': a bool must be 0 or 1, got 2"),
    ("bool array", dict(keys=[key("b", 9, u32(7) + u64(2) + b"\1\2")]), "key 'b': a bool array"),
    ("array type", dict(keys=[key("v", 9, u32(99) + u64(1) + u32(1))]), "key 'v': array of value type 99"),
    (
        "array length",
        dict(keys=[key("v", 9, u32(4) + u64(2**61))]),
        "key 'v': an array of 2305843009213693952 uint32 needs",
    ),
    ("string count", dict(keys=[key("v", 9, u32(8) + u64(2**50))]), f"strings, expected at most {MAX_STRINGS}"),
    ("strings past the end", dict(keys=[key("v", 9, u32(8) + u64(1000))]), "an array of 1000 strings needs 8000 bytes"),
    (
        "string in array",
        dict(keys=[key("v", 9, u32(8) + u64(2) + text("a") + u64(9999))]),
        "string 1 of 2 claims 9999 bytes",
    ),
    ("nested count", dict(keys=[key("v", 9, u32(9) + u64(2**50))]), "an array of 1125899906842624 arrays needs"),
    ("nested deep", dict(keys=[key("v", 9, (u32(9) + u64(1)) * 50 + bytes(64))]), "nested more than 3 deep"),
    ("alignment zero", dict(keys=[key("general.alignment", 4, u32(0))]), "expected a power of two, got 0"),
    ("alignment odd", dict(keys=[key("general.alignment", 4, u32(48))]), "expected a power of two, got 48"),
    (
        "alignment type",
        dict(keys=[key("general.alignment", 8, text("32"))]),
        "'general.alignment': expected an integer",
    ),
]
BAD_TENSORS = [
    ("no dimensions", [tensor("t", ())], "'t': 0 dimensions, expected 1 to 4"),
    ("five dimensions", [tensor("t", (1, 1, 1, 1, 1))], "'t': 5 dimensions, expected 1 to 4"),
    ("absurd dimensions", [text("t") + u32(2**31) + bytes(64)], "'t': 2147483648 dimensions"),
    ("zero size", [tensor("t", (8, 0))], r"'t': shape \(0, 8\), expected sizes of at least 1"),
    ("product overflows", [tensor("t", (2**32, 2**32))], "fewer than 2\\*\\*63 weights"),
    ("product wraps to 0", [tensor("t", (2**63, 2))], "fewer than 2\\*\\*63 weights"),
    ("no whole block", [tensor("t", (40,), 3)], "'t': 40 columns, expected a multiple of Q4_1's block of 32"),
    ("K-quant block", [tensor("t", (96,), 14)], "expected a multiple of Q6_K's block of 256"),
    ("offset not aligned", [tensor("t", offset=8)], "'t': offset 8 is no multiple of the alignment 32"),
    ("offset past the end", [tensor("t", offset=2**40)], "'t': F32 .* ends at byte .* the file has"),
    ("offset wraps", [tensor("t", offset=2**64 - 32)], "ends at byte 18446744073709551"),
    ("data past the end", [tensor("t", (1000,))], "'t': F32 .* ends at byte .* the file has"),
    ("unknown type past the end", [tensor("t", (8,), 77, 2**40)], "unknown type 77 .* ends at byte"),
    ("twice", [tensor("t"), tensor("t", offset=32)], "tensor 't': appears twice"),
    ("overlap", [tensor("t", (16,)), tensor("u", offset=32)], "'u' starts at byte .*, inside tensor 't'"),
    ("same place", [tensor("t"), tensor("u")], "'u' starts at byte .*, inside tensor 't'"),
]


@pytest.mark.parametrize(("fields", "match"), [case[1:] for case in BAD_KEYS], ids=[case[0] for case in BAD_KEYS])
def test_bad_metadata(tmp_path, fields, match):
    fields = {"keys": [key("only", 4, u32(1))], **fields}
    with pytest.raises(ModelFileError, match=match) as caught:
        open_gguf(written(tmp_path, gguf_bytes(**fields)))
    assert "bad.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "match"), [case[1:] for case in BAD_TENSORS], ids=[case[0] for case in BAD_TENSORS]
)
def test_bad_tensors(tmp_path, tensors, match):
    with pytest.raises(ModelFileError, match=match) as caught:
        open_gguf(written(tmp_path, gguf_bytes(tensors=tensors, data=bytes(128))))
    assert "bad.gguf" in str(caught.value)


def test_tokens_that_are_not_utf8_are_named_when_read(tmp_path):
    raw = gguf_bytes([key("v", 9, u32(8) + u64(3) + text("a") + text(b"\x80") + text("c"))])
    with open_gguf(written(tmp_path, raw)) as file:
        strings = file.metadata["v"]
        assert strings[2] == "c"
        for read in (strings.tolist, lambda: list(strings), lambda: strings[1]):
            with pytest.raises(ModelFileError, match=r"bad.gguf: metadata key 'v': string 1 is not UTF-8"):
                read()


def test_truncated_anywhere(tiny, tmp_path):
    """Every prefix of the header, and prefixes of the data: a clear error, never a crash."""
    with open_gguf(tiny) as file:
        data_start = min(info.offset for info in file.tensors.values())
    with open(tiny, "rb") as source:
        raw = source.read()
    steps = [*range(0, data_start, 7), *range(data_start, len(raw) - 1, 4099), len(raw) - 33]
    for length in steps:
        with pytest.raises(ModelFileError, match=r"bad\.gguf"):
            open_gguf(written(tmp_path, raw[:length]))


def test_every_failed_open_closes_the_file(tmp_path):
    path = written(tmp_path, gguf_bytes(tensors=[tensor("t", (8, 0))]))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(50):
        with pytest.raises(ModelFileError):
            open_gguf(path)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
