"""Conversion to GGUF: the numbers. test_convert_tokenizer.py has the words, test_convert_errors.py what goes wrong.

Oracles: transformers (logits, also of the written files), gguf-py's quantizers (bytes) and its reader (metadata).
"""

from __future__ import annotations

import os

import gguf
import numpy as np
import pytest
import torch
from demo_model import demo_model_path
from hf_models import logits, write_hf_model
from tiny_model import write_tiny_model

from fastdl import llm
from fastdl.llm import convert
from fastdl.llm.convert import FILE_TYPES, quantize_file
from fastdl.llm.gguf import open_gguf

IDS = torch.randint(3, 390, (200,), generator=torch.Generator().manual_seed(1)).tolist()
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-heads-wider-than-model": ("llama", {"head_dim": 32}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-eps-theta": (
        "llama",
        {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "float16": ("qwen2", {"dtype": torch.float16}),
    "sharded": ("llama", {"shard": "100KB"}),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def transformers_logits(path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    folder, name = os.path.split(path)
    return logits(AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval(), IDS)


def fastdl_logits(path) -> torch.Tensor:
    model = llm.load(path, backend="torch", activation="fp32")
    return torch.as_tensor(np.asarray(model.logits(IDS)))


def raw_tensors(path) -> dict[str, tuple[str, np.ndarray]]:
    with open_gguf(path) as file:
        return {name: (info.type_name.lower(), file.tensor_bytes(name).copy()) for name, info in file.tensors.items()}


def oracle_bytes(values: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()]).view(np.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_hf_logits(tmp_path, name):
    """The file gives the source's logits; fastdl's differ by the float16 of its KV cache."""
    kind, settings = MODELS[name]
    source = tmp_path / "source"
    expected = logits(write_hf_model(source, kind, **settings), IDS)
    report = quantize_file(source, tmp_path / "f32.gguf", "f32", progress=False)
    assert report.notes == [] and not any(tensor.note for tensor in report.tensors)
    torch.testing.assert_close(fastdl_logits(tmp_path / "f32.gguf"), expected, rtol=0, atol=6e-3)
    if (
        "scaling" not in name and "rope" not in name and "yarn" not in name and "wider" not in name
    ):  # not read by transformers
        torch.testing.assert_close(transformers_logits(tmp_path / "f32.gguf"), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [kind for kind in FILE_TYPES if kind != "f32"])
@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_hf_quantized_logits(tmp_path, name, kind):
    """Logits are those of the source with every matrix quantized and dequantized by gguf-py."""
    family, settings = MODELS[name]
    model = write_hf_model(tmp_path / "source", family, **settings)
    quantize_file(tmp_path / "source", tmp_path / "out.gguf", kind, progress=False)
    output = "model.embed_tokens.weight" if "tied" in name else "lm_head.weight"
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2:
                format = "q8_0" if kind == "q4_1" and key == output else kind
                ggml = gguf.GGMLQuantizationType[format.upper()]
                values = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), ggml), ggml)
                weight.copy_(torch.from_numpy(values.astype(np.float32)))
    expected = logits(model, IDS)
    torch.testing.assert_close(transformers_logits(tmp_path / "out.gguf"), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(fastdl_logits(tmp_path / "out.gguf"), expected, rtol=0, atol=6e-3)


@pytest.mark.parametrize("chunk", [1 << 22, 1])
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_hf_bytes(tmp_path, monkeypatch, kind, chunk):
    """Bytes are gguf-py's, q and k rows permuted; a chunk of one row (one head for q and k) gives the same file."""
    monkeypatch.setattr(convert, "CHUNK_WEIGHTS", chunk)
    model = write_hf_model(tmp_path / "source", head_dim=24)
    report = quantize_file(tmp_path / "source", tmp_path / "out.gguf", kind, progress=False)
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    tensors = raw_tensors(tmp_path / "out.gguf")
    assert len(tensors) == len(state) == len(report.tensors)
    for name, key, heads in (
        ("token_embd.weight", "model.embed_tokens.weight", 0),
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", 4),
        ("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight", 2),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight", 0),
        ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight", 0),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", 0),
        ("output.weight", "lm_head.weight", 0),
    ):
        values = state[key]
        if heads:
            half = values.shape[0] // heads // 2
            values = values.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
        wanted = "q8_0" if kind == "q4_1" and name == "output.weight" else kind
        assert tensors[name][0] == wanted
        np.testing.assert_array_equal(
            tensors[name][1], oracle_bytes(np.ascontiguousarray(values), wanted), err_msg=name
        )
    assert tensors["blk.0.attn_norm.weight"][0] == "f32"


def test_width_not_divisible(tmp_path):
    write_hf_model(tmp_path / "source", hidden_size=80, intermediate_size=72)
    report = quantize_file(tmp_path / "source", tmp_path / "out.gguf", "q4_1", progress=False)
    types = {tensor.name: tensor.type for tensor in report.tensors}
    assert set(types.values()) == {"f16", "f32"}
    assert "width 72 is not divisible by 32" in str(report) and "width 80 is not divisible by 32" in str(report)
    fastdl_logits(tmp_path / "out.gguf")


def test_llama3_rope_factors(tmp_path):
    """rope_freqs.weight divides the plain frequencies into transformers' own."""
    model = write_hf_model(tmp_path / "source", head_dim=64, rope_parameters=LLAMA3)
    quantize_file(tmp_path / "source", tmp_path / "out.gguf", "q8_0", progress=False)
    kind, data = raw_tensors(tmp_path / "out.gguf")["rope_freqs.weight"]
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = torch.from_numpy(data.view(np.float32)[0].copy())
    assert kind == "f32"
    torch.testing.assert_close((plain / factors).float(), model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_sliding_window_limits_the_context(tmp_path):
    """Up to the window's length the model is the same without a window; more is not promised."""
    expected = logits(write_hf_model(tmp_path / "source", "mistral", sliding_window=200), IDS)
    report = quantize_file(tmp_path / "source", tmp_path / "out.gguf", "f32", progress=False)
    assert "sliding window of 200" in str(report)
    with open_gguf(tmp_path / "out.gguf") as file:
        assert file.metadata["llama.context_length"] == 200
    torch.testing.assert_close(fastdl_logits(tmp_path / "out.gguf"), expected, rtol=0, atol=6e-3)


def test_old_config_names(tmp_path):
    """transformers before 5 wrote rope_theta and rope_scaling; numbers mean the same."""
    import json

    expected = logits(write_hf_model(tmp_path / "source", rope_parameters=LLAMA3), IDS)
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(config))
    quantize_file(tmp_path / "source", tmp_path / "out.gguf", "f32", progress=False)
    torch.testing.assert_close(fastdl_logits(tmp_path / "out.gguf"), expected, rtol=0, atol=6e-3)


def test_hf_metadata(tmp_path):
    write_hf_model(tmp_path / "tiny", "mistral", sliding_window=None)
    quantize_file(tmp_path / "tiny", tmp_path / "out.gguf", progress=False)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 3,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 416,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    assert {key: values[key] for key in expected} == expected
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


@pytest.mark.parametrize("source_type", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_1", "Q6_K", "Q4_K"])
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_gguf_types(tmp_path, source_type, kind):
    """Every tensor is the source's own bytes, or gguf-py's decoding of them encoded by gguf-py."""
    sizes = {"width": 256, "ff": 256, "layers": 1} if source_type.endswith("K") else {}
    source = write_tiny_model(tmp_path / "source.gguf", quant=source_type, tied=False, **sizes)
    report = quantize_file(source, tmp_path / "out.gguf", kind, progress=False)
    before, after = raw_tensors(source), raw_tensors(tmp_path / "out.gguf")
    assert list(before) == list(after) == [tensor.name for tensor in report.tensors]
    for name, (old, data) in before.items():
        new, result = after[name]
        if old == new:
            np.testing.assert_array_equal(result, data, err_msg=name)
        else:
            ggml = gguf.GGMLQuantizationType[old.upper()]
            values = np.asarray(gguf.quants.dequantize(data, ggml), np.float32)
            wanted = oracle_bytes(values, new)
            if (
                old.startswith("q4_") and new == "q4_1"
            ):  # the codes are kept: no loss, or the rounding of a scale to fp16
                recoded = gguf.quants.dequantize(result, gguf.GGMLQuantizationType.Q4_1)
                atol = 0 if old == "q4_0" else 2e-3 * np.abs(values).max()
                np.testing.assert_allclose(recoded, values, rtol=0, atol=atol, err_msg=name)
                continue
            if source_type.endswith("K"):  # zeros with a sign: gguf-py's minimum of -0.0 and 0.0 is not always ggml's
                ggml = gguf.GGMLQuantizationType[new.upper()]
                result, wanted = gguf.quants.dequantize(result, ggml), gguf.quants.dequantize(wanted, ggml)
            np.testing.assert_array_equal(result, wanted, err_msg=name)
    output = after["output.weight"][0]
    wanted = {"q4_1": "q6_k" if source_type == "Q6_K" else "q8_0"}.get(kind, kind)
    assert output == wanted and after["blk.0.attn_q.weight"][0] == kind and after["output_norm.weight"][0] == "f32"
    kept = source_type in ("Q4_0", "Q4_K") and kind == "q4_1"
    twice = source_type[0] == "Q" and source_type.lower() != kind and not kept
    assert ("already quantized" in str(report)) == twice and ("its codes are kept" in str(report)) == kept


def test_gguf_metadata_is_kept(tmp_path):
    """Every key keeps its value and its type, except file_type and quantization_version; custom alignment included."""
    source = write_tiny_model(tmp_path / "source.gguf", metadata={"general.file_type": 7})
    kinds = gguf.GGUFValueType
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(tmp_path / "more.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    writer.add_custom_alignment(64)
    for number, kind in enumerate(
        [kinds.UINT8, kinds.INT8, kinds.UINT16, kinds.INT16, kinds.INT32, kinds.UINT64, kinds.INT64]
    ):
        writer.add_key_value(f"x.{kind.name}", 100 + number, kind)
        writer.add_key_value(f"x.array.{kind.name}", [1, 2, number], kinds.ARRAY, kind)
    writer.add_key_value("x.double", 1 / 3, kinds.FLOAT64)
    writer.add_key_value("x.bool", True, kinds.BOOL)
    writer.add_key_value("x.empty", "", kinds.STRING)
    writer.add_key_value("x.bools", [True, False], kinds.ARRAY, kinds.BOOL)
    writer.add_key_value("x.strings", ["ä", ""], kinds.ARRAY, kinds.STRING)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    quantize_file(tmp_path / "more.gguf", tmp_path / "out.gguf", "q8_0", progress=False)
    described = [
        {
            key: (field.types, field.contents())
            for key, field in gguf.GGUFReader(path).fields.items()
            if "GGUF." not in key
        }
        for path in (tmp_path / "more.gguf", tmp_path / "out.gguf")
    ]
    old, new = described
    assert new.pop("general.file_type") == ([kinds.UINT32], 7)
    assert new.pop("general.quantization_version") == ([kinds.UINT32], 2)
    old.pop("general.file_type")
    assert new == old
    with open_gguf(tmp_path / "out.gguf") as file:
        assert all(info.offset % 64 == 0 for info in file.tensors.values())


def test_gguf_logits(tmp_path):
    source = write_tiny_model(tmp_path / "source.gguf", quant="Q4_1", architecture="qwen2", context=256)
    ids = [5, 9, 30, 7]
    expected = llm.load(source, backend="torch", activation="fp32").logits(ids)
    quantize_file(source, tmp_path / "out.gguf", "f32", progress=False)
    result = llm.load(tmp_path / "out.gguf", backend="torch", activation="fp32").logits(ids)
    torch.testing.assert_close(torch.as_tensor(result), torch.as_tensor(expected), rtol=0, atol=1e-5)


def test_demo_model(tmp_path):
    """To its own type: the very same tensors and metadata. To q8_0: gguf-py's bytes."""
    demo = demo_model_path()
    report = quantize_file(demo, tmp_path / "q4_1.gguf", "q4_1", progress=False)
    assert all(tensor.copied for tensor in report.tensors)
    with open_gguf(demo) as old, open_gguf(tmp_path / "q4_1.gguf") as new:
        assert list(old.metadata) == list(new.metadata)
        for name in old.tensors:
            assert old.info(name).type_id == new.info(name).type_id
            assert np.array_equal(old.tensor_bytes(name), new.tensor_bytes(name)), name
    quantize_file(demo, tmp_path / "q8_0.gguf", "q8_0", progress=False)
    with open_gguf(demo) as old, open_gguf(tmp_path / "q8_0.gguf") as new:
        for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight"):
            data, kind = old.tensor_bytes(name), gguf.GGMLQuantizationType(old.info(name).type_id)
            wanted = data if kind == 8 else oracle_bytes(gguf.quants.dequantize(data, kind), "q8_0")
            assert np.array_equal(new.tensor_bytes(name), wanted), name


def test_llama_cpp_loads_the_result(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    for kind, settings in (MODELS["llama3-rope"], MODELS["qwen2-tied"]):
        expected = logits(write_hf_model(tmp_path / kind, kind, **settings), IDS).numpy()
        quantize_file(tmp_path / kind, tmp_path / f"{kind}.gguf", "f32", progress=False)
        model = llama_cpp.Llama(str(tmp_path / f"{kind}.gguf"), n_ctx=512, logits_all=True, verbose=False)
        model.eval(IDS)
        np.testing.assert_allclose(np.array(model.scores[: len(IDS)]), expected, rtol=0, atol=1e-2)


def test_report(tmp_path):
    source = write_tiny_model(tmp_path / "source.gguf", quant="F16")
    report = quantize_file(source, tmp_path / "out.gguf", progress=False)
    assert report.bytes_before == os.path.getsize(source) and report.bytes_after == os.path.getsize(
        tmp_path / "out.gguf"
    )
    assert report.bytes_after < report.bytes_before
    assert {tensor.type for tensor in report.tensors} == {"q4_1", "q8_0", "f32"}
    assert "note: output matrix: q8_0: token_embd.weight" in str(report)


def test_progress_bar_only_on_a_terminal(tmp_path, capsys):
    source = write_tiny_model(tmp_path / "source.gguf")
    quantize_file(source, tmp_path / "out.gguf", "q8_0", progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""
