"""The GGUF reader: equal to gguf-py on good files, a ModelFileError that names file and part on bad ones."""

from __future__ import annotations

import os

import gguf
import numpy as np
import pytest
from demo_model import demo_model_path
from raw_gguf import gguf_bytes, key, tensor, text, u32, u64, written
from tiny_model import write_tiny_model

from fastdl.llm.gguf import ModelFileError, StringArray, open_gguf
from fastdl.llm.gguf_types import GGML_TYPES, REMOVED_TYPES, row_bytes, type_name
from fastdl.quant.formats import FORMATS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# ---- equal to gguf-py ----------------------------------------------------------------------------------------------


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
        ("int32", -(2**31)), ("uint64", 2**64 - 1), ("int64", -(2**63)), ("float32", 0.5), ("float64", 1e300),
        ("bool", True), ("string", "äöü 世界"),
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


# ---- reading -------------------------------------------------------------------------------------------------------


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
