"""The GGUF reader: equal to gguf-py on good files, a ModelFileError that names file and part on bad ones."""

from __future__ import annotations

import os
import struct

import gguf
import numpy as np
import pytest
from demo_model import demo_model_path
from tiny_model import write_tiny_model

from fastdl.llm.gguf import ModelFileError, StringArray, open_gguf
from fastdl.llm.gguf_metadata import MAX_STRINGS
from fastdl.llm.gguf_types import GGML_TYPES, REMOVED_TYPES, row_bytes, type_name
from fastdl.quant.formats import FORMATS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# ---- a file made of bytes, so that every field can lie ------------------------------------------------------------


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def key(name: str | bytes, type_id: int, value: bytes) -> bytes:
    return text(name) + u32(type_id) + value


def tensor(name: str, dims: tuple[int, ...] = (8,), type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def gguf_bytes(keys=(), tensors=(), data: bytes = b"", *, version=3, key_count=None, tensor_count=None) -> bytes:
    counts = (len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    head = b"GGUF" + u32(version) + u64(counts[0]) + u64(counts[1]) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def written(tmp_path, raw: bytes) -> str:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    return str(path)


# ---- equal to gguf-py ---------------------------------------------------------------------------------------------


def test_type_table_is_ggufs():
    theirs = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    # gguf-py may be older or newer than the table: what both know must agree.
    assert {i: entry for i, entry in GGML_TYPES.items() if i in theirs} == {
        i: entry for i, entry in theirs.items() if i in GGML_TYPES
    }
    assert len(theirs.keys() & GGML_TYPES.keys()) >= 30


def test_type_table_agrees_with_the_kernels_formats():
    for entry in FORMATS.values():
        assert GGML_TYPES[entry.ggml_id][0].lower() == entry.name
        assert row_bytes(entry.ggml_id, 512) == 512 // entry.block * entry.block_bytes


def test_type_names():
    assert (type_name(3), type_name(31), type_name(77)) == ("Q4_1", REMOVED_TYPES[31], "unknown type 77")


def assert_equal_to_gguf_py(path: str) -> None:
    oracle = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        assert file.version == 3
        assert file.alignment == oracle.alignment
        fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for name, field in fields.items():
            ours = file.metadata[name]
            assert (ours.tolist() if isinstance(ours, (StringArray, np.ndarray)) else ours) == field.contents(), name
        assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
        for theirs in oracle.tensors:
            info = file.tensors[theirs.name]
            assert info.type_id == theirs.tensor_type
            assert info.type_name == theirs.tensor_type.name
            assert list(info.shape) == theirs.shape.tolist()[::-1]
            assert (info.offset, info.nbytes) == (theirs.data_offset, theirs.n_bytes)
            raw = np.asarray(theirs.data).view(np.uint8).reshape(-1)
            np.testing.assert_array_equal(file.tensor_bytes(theirs.name).reshape(-1), raw)


@pytest.mark.parametrize("quant", ["Q4_1", "Q8_0", "F16", "F32"])
def test_tiny_files_equal_gguf_py(tmp_path, quant):
    assert_equal_to_gguf_py(write_tiny_model(tmp_path / "tiny.gguf", quant=quant, architecture="qwen2", tied=False))


def test_demo_model_equals_gguf_py():
    assert_equal_to_gguf_py(demo_model_path())


def test_every_value_type(tmp_path):
    path = str(tmp_path / "values.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in [
        ("uint8", 255), ("int8", -128), ("uint16", 65535), ("int16", -32768), ("uint32", 2**32 - 1),
        ("int32", -(2**31)), ("uint64", 2**64 - 1), ("int64", -(2**63)), ("float32", 0.5), ("float64", 1e300), ("bool", True),
        ("string", "äöü 世界"),
    ]:  # fmt: skip
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("words", ["", "a", "世"])
    writer.add_array("flags", [True, False])
    writer.add_custom_alignment(128)
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("y", np.arange(4, dtype=np.int16))
    writer.add_tensor("z", np.arange(24, dtype=np.float64).reshape(2, 1, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_equal_to_gguf_py(path)
    with open_gguf(path) as file:
        assert file.metadata["bool"] is True
        assert file.metadata["flags"].dtype == bool
        assert file.tensors["z"].shape == (2, 1, 3, 4)
        assert file.tensors["z"].rows == 6
        np.testing.assert_array_equal(file.decode_foreign("z").reshape(-1), np.arange(24, dtype=np.float32))
        np.testing.assert_array_equal(file.decode_foreign("y"), np.arange(4))
        np.testing.assert_array_equal(file.decode_foreign("x", 1, 2), [[3, 4, 5]])


def test_version_2_and_nested_arrays(tmp_path):
    nested = u32(9) + u64(2) + (u32(4) + u64(2) + u32(1) + u32(2)) + (u32(8) + u64(1) + text("a"))
    raw = gguf_bytes([key("nested", 9, nested)], [tensor("t")], b"\0" * 32, version=2)
    with open_gguf(written(tmp_path, raw)) as file:
        assert file.version == 2
        first, second = file.metadata["nested"]
        assert first.tolist() == [1, 2]
        assert list(second) == ["a"]


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["Q4_0", "Q5_1", "Q4_K", "Q6_K", "BF16", "F16"])
def test_decode_foreign_equals_gguf_py(tmp_path, quant):
    path = write_tiny_model(tmp_path / "foreign.gguf", quant=quant, width=256, ff=256)
    oracle = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["token_embd.weight"]
    expected = gguf.quants.dequantize(oracle.data, oracle.tensor_type)
    with open_gguf(path) as file:
        ours = file.decode_foreign("token_embd.weight")
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(file.decode_foreign("token_embd.weight", 5, 9), expected[5:9])


def test_decode_foreign_in_chunks(tiny, monkeypatch):
    with open_gguf(tiny) as file:
        whole = file.decode_foreign("token_embd.weight")
        monkeypatch.setattr("fastdl.llm.gguf.DECODE_BYTES", 7 * 4 * 64)
        np.testing.assert_array_equal(file.decode_foreign("token_embd.weight"), whole)


def test_decode_foreign_without_decoder(tmp_path):
    raw = gguf_bytes([], [tensor("t", (256,), 15)], b"\0" * 320)
    with open_gguf(written(tmp_path, raw)) as file, pytest.raises(ModelFileError, match="'t' has the type Q8_K"):
        file.decode_foreign("t")


def test_views_are_read_only_and_outlive_close(tiny):
    file = open_gguf(tiny)
    view = file.tensor_bytes("token_embd.weight")
    assert view.shape == (file.tensors["token_embd.weight"].rows, 64 // 32 * 20)
    assert not view.flags.writeable
    before = view.copy()
    file.close()
    file.close()
    np.testing.assert_array_equal(view, before)
    with pytest.raises(ValueError, match="was closed"):
        file.tensor_bytes("token_embd.weight")
    with pytest.raises(ValueError, match="was closed"):
        file.release("token_embd.weight")


def test_release_gives_pages_back_and_keeps_data():
    def resident() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssFile"))

    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    with open_gguf(demo_model_path()) as file:
        name = "token_embd.weight"
        start = resident()
        total = int(file.tensor_bytes(name).sum(dtype=np.int64))
        assert resident() - start > 20_000  # kB: the tensor has 30 MB
        file.release(name)
        assert resident() - start < 2_000
        assert int(file.tensor_bytes(name).sum(dtype=np.int64)) == total


def test_unknown_and_removed_types_are_listed_but_not_read(tmp_path):
    raw = gguf_bytes([key("a", 4, u32(7))], [tensor("t", (8,), 77), tensor("u", (8,), 4)], b"\0" * 64)
    with open_gguf(written(tmp_path, raw)) as file:
        assert file.metadata["a"] == 7
        assert file.tensors["t"].nbytes is None
        assert file.tensors["u"].type_name == "Q4_2"
        file.release("t")
        with pytest.raises(
            ModelFileError, match=r"bad.gguf: tensor 't' has the type unknown type 77.*known types: F32"
        ):
            file.tensor_bytes("t")


def test_missing_tensor(tiny):
    with open_gguf(tiny) as file, pytest.raises(ModelFileError, match=r"tiny.gguf: tensor 'nope' is missing"):
        file.tensor_bytes("nope")


def test_string_array(tiny):
    with open_gguf(tiny) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        every = tokens.tolist()
        assert list(tokens) == every
        assert tokens[-1] == every[-1]
        assert tokens[2:5] == every[2:5]
        assert tokens.index("<|im_end|>") == 2
        assert "StringArray(" in repr(tokens)
        for index in (len(tokens), -len(tokens) - 1):
            with pytest.raises(IndexError, match="out of range"):
                tokens[index]


def test_typed_metadata(tiny):
    with open_gguf(tiny) as file:
        assert file.metadata.value("llama.block_count", int) == 2
        assert file.metadata.value("llama.block_count", float) == 2.0
        assert file.metadata.value("absent", str, "x") == "x"
        with pytest.raises(ModelFileError, match=r"tiny.gguf: metadata key 'absent' is missing, expected a string"):
            file.metadata.value("absent", str)
        with pytest.raises(
            ModelFileError, match=r"tiny.gguf: metadata key 'llama.block_count': expected a string, got int"
        ):
            file.metadata.value("llama.block_count", str)
        with pytest.raises(ModelFileError, match="expected an integer, got bool"):
            file.metadata.value("tokenizer.ggml.add_bos_token", int)


# ---- bad files ----------------------------------------------------------------------------------------------------


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
