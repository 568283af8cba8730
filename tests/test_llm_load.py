"""fastdl.llm.load: logits against transformers for both architectures, weight types, and files that must be refused."""

from __future__ import annotations

import os

import gguf
import numpy as np
import pytest
import torch
from raw_gguf import gguf_bytes, key, tensor, written
from tiny_model import write_tiny_model

from fastdl import BackendError, llm
from fastdl.llm import ModelFileError, requantize
from fastdl.llm.convert import quantize_file
from fastdl.llm.gguf import open_gguf
from fastdl.llm.weights import half_to_interleaved

WIDE = {"width": 256, "ff": 256, "heads": 4, "kv_heads": 2}


def exact_logits(path, ids, slower=1.0):
    """Logits by transformers, from the dequantized file; slower divides RoPE's frequencies (it skips scaling)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    folder, name = os.path.split(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    model.model.rotary_emb.inv_freq /= slower
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def kl(expected, got):
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_logits_are_transformers(tmp_path, architecture, tied, backend, request):
    if backend == "cpu":
        request.getfixturevalue("native")
    path = write_tiny_model(tmp_path / "tiny.gguf", architecture=architecture, tied=tied)
    lm = llm.load(path, backend=backend, activation="fp32")
    ids = list(range(5, 45))
    logits = lm.logits(ids)
    assert logits.dtype == torch.float32 and logits.shape == (40, lm.config.vocab) and not logits.is_inference()
    assert kl(exact_logits(path, ids), logits) < 1e-6
    assert (lm._weights.head is lm._weights.embedding) == tied


@pytest.mark.parametrize("quant", ["Q8_0", "Q6_K", "F16", "BF16", "F32"])
def test_types_with_a_kernel_are_used_as_they_are(tmp_path, quant, native):
    path = write_tiny_model(tmp_path / "tiny.gguf", quant=quant, **WIDE)
    lm = llm.load(path, activation="fp32")
    assert lm.load_report.formats == {quant.lower(): 15} and not lm.load_report.requantized
    reference = llm.load(path, backend="torch")
    ids = list(range(20))
    assert kl(reference.logits(ids), lm.logits(ids)) < 1e-6


@pytest.mark.parametrize(
    ("quant", "target", "limit"),
    [("Q4_0", "q4_1", 1e-6), ("Q4_K", "q4_1", 1e-6), ("Q5_0", "q8_0", 2e-3), ("Q5_K", "q8_0", 2e-3)],
)
def test_other_types_are_requantized(tmp_path, quant, target, limit):
    path = write_tiny_model(tmp_path / "tiny.gguf", quant=quant, **WIDE)
    lm = llm.load(path, backend="torch")
    assert (
        set(lm.load_report.requantized.values()) == {f"{quant} -> {target}"} and len(lm.load_report.requantized) == 15
    )
    assert f"{quant} -> {target}" in str(lm.load_report)
    with open_gguf(path) as file:
        for name, weight in (
            ("token_embd.weight", lm._weights.embedding),
            ("blk.1.ffn_down.weight", lm._weights.stack.layers[1].down),
        ):
            exact = torch.from_numpy(file.decode_foreign(name))
            error = (weight.dequantize() - exact).norm() / exact.norm()
            assert error < (5e-4 if target == "q4_1" else 1e-2)
    if quant == "Q4_0":
        assert error == 0


def test_q4_0_and_q4_k_blocks_by_gguf():
    rng = np.random.default_rng(0)
    for name, size, convert in (("Q4_0", 18, requantize.q4_0_to_q4_1), ("Q4_K", 144, requantize.q4_k_to_q4_1)):
        rows = rng.integers(0, 256, (6, 3 * size), dtype=np.uint8)
        blocks = rows.reshape(-1, size)
        for place in (0,) if name == "Q4_0" else (0, 2):
            blocks[:, place : place + 2] = rng.uniform(-0.01, 0.01, (len(blocks), 1)).astype("<f2").view(np.uint8)
        exact = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name]).reshape(-1)
        got = gguf.quants.dequantize(convert(rows), gguf.GGMLQuantizationType.Q4_1).reshape(-1)
        np.testing.assert_allclose(got, exact, rtol=0, atol=0 if name == "Q4_0" else 2e-3 * np.abs(exact).max())


@pytest.mark.parametrize("d", [10_000.0, np.inf, np.nan])
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K", "Q5_0"])
def test_scales_that_q4_1_cannot_hold(tmp_path, quant, d, recwarn):
    """10,000 is a float16, but -8 of it (Q4_0) or 63 (Q4_K) are not: no infinite weights, no warnings of numpy."""
    size = {"Q4_0": 18, "Q4_K": 144, "Q5_0": 22}[quant]
    blocks = np.full((256, 256 * size // (256 if quant == "Q4_K" else 32)), 0xFF, np.uint8).reshape(-1, size)
    blocks[:, : 4 if quant == "Q4_K" else 2] = np.tile(np.array([d], "<f2").view(np.uint8), 2 if quant == "Q4_K" else 1)
    tensors = {"blk.0.attn_output.weight": (blocks.reshape(256, -1), quant)}
    path = write_tiny_model(tmp_path / "bad.gguf", tensors=tensors, **WIDE)
    if (quant, d) == ("Q5_0", 10_000.0):
        llm.load(path, backend="torch")
    else:
        with pytest.raises(ModelFileError, match=r"bad\.gguf: tensor 'blk\.0\.attn_output\.weight': .*(scales|finite)"):
            llm.load(path, backend="torch")
        with pytest.raises(ModelFileError, match=r"bad\.gguf: tensor 'blk\.0\.attn_output\.weight': .*(scales|finite)"):
            quantize_file(path, tmp_path / "out.gguf", progress=False)
        assert [file.name for file in tmp_path.iterdir()] == ["bad.gguf"]
    assert not [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning]


def test_linear_scaling_and_factors(tmp_path):
    ids = list(range(60))
    plain = llm.load(write_tiny_model(tmp_path / "plain.gguf"), backend="torch").logits(ids)
    scaled = write_tiny_model(
        tmp_path / "scaled.gguf",
        metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    )
    assert kl(exact_logits(scaled, ids, slower=4.0), llm.load(scaled, backend="torch").logits(ids)) < 1e-6
    ones, more = np.ones(8, np.float32), np.full(8, 4.0, np.float32)
    for factors, same_as in ((ones, plain), (more, llm.load(scaled, backend="torch").logits(ids))):
        path = write_tiny_model(tmp_path / "factors.gguf", tensors={"rope_freqs.weight": (factors, "F32")})
        torch.testing.assert_close(llm.load(path, backend="torch").logits(ids), same_as)


def test_half_to_interleaved():
    assert half_to_interleaved(8, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "head_count_kv.*divisor"),
        ({"metadata": {"llama.attention.head_count": 5, "llama.attention.head_count_kv": 5}}, "head_count.*divisor"),
        ({"metadata": {"llama.block_count": 0}}, "block_count"),
        ({"metadata": {"llama.block_count": 3}}, "blk.2|has only"),
        ({"metadata": {"llama.block_count": 4000}}, "has only"),
        ({"metadata": {"llama.block_count": None}}, "block_count.*missing"),
        ({"metadata": {"llama.context_length": 0}}, "context_length"),
        ({"metadata": {"llama.embedding_length": 128}}, "expected shape"),
        ({"metadata": {"llama.feed_forward_length": 64}}, "expected shape"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "epsilon"),
        ({"metadata": {"llama.rope.freq_base": 0.5}}, "freq_base"),
        ({"metadata": {"llama.rope.freq_base": "big"}}, "freq_base"),
        ({"metadata": {"llama.rope.dimension_count": 15}}, "dimension_count"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "scaling"),
        ({"metadata": {"llama.expert_count": 8}}, "experts"),
        ({"metadata": {"split.count": 3}}, r"part of a split model \(3 files\); join them first"),
        ({"tensors": {"output_norm.weight": None}}, "output_norm"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "blk.1.ffn_up"),
        ({"tensors": {"blk.0.attn_q_norm.weight": (np.ones(16, np.float32), "F32")}}, "attn_q_norm.*no place"),
        ({"tensors": {"blk.0.attn_norm.weight": (np.full(64, np.nan, np.float32), "F32")}}, "NaN"),
        ({"tensors": {"blk.0.attn_norm.weight": (np.ones(32, np.float32), "F32")}}, "expected shape"),
        ({"tensors": {"token_embd.weight": (np.ones((9, 64), np.float32), "F32")}}, "tokenizer has"),
        ({"architecture": "qwen2", "tensors": {"blk.0.attn_q.bias": None}}, "attn_q.bias"),
    ],
)
def test_refused_files(tmp_path, options, message):
    path = write_tiny_model(tmp_path / "bad.gguf", **options)
    with pytest.raises(ModelFileError, match=message) as caught:
        llm.load(path, backend="torch")
    assert "bad.gguf" in str(caught.value)


def test_refused_architecture(tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match="'mamba' is not supported; supported are llama, qwen2"):
        llm.load(path)


def test_later_part_of_a_split_model(tmp_path):
    """Such parts hold the split's keys and tensors, no architecture."""
    path = written(
        tmp_path, gguf_bytes([key("split.count", 2, b"\3\0")], [tensor("blk.9.attn_norm.weight")], bytes(32))
    )
    with pytest.raises(ModelFileError, match=r"bad\.gguf: one part of a split model \(3 files\)"):
        llm.load(path)
    with pytest.raises(ModelFileError, match=r"bad\.gguf: one part of a split model \(3 files\)"):
        quantize_file(path, tmp_path / "out.gguf")


def test_refused_options(tmp_path):
    path = write_tiny_model(tmp_path / "tiny.gguf")
    for options, error, message in (
        ({"activation": "int4"}, ValueError, "activation"),
        ({"threads": 0}, ValueError, "threads"),
        ({"threads": 1.5}, TypeError, "threads"),
        ({"threads": 10**6}, ValueError, "threads: expected at most 1024"),
        ({"context": 1000}, ValueError, "256"),
        ({"context": 0}, ValueError, "context"),
        ({"backend": "cuda"}, BackendError, "cuda"),
        ({"backend": "best"}, BackendError, "best"),
    ):
        with pytest.raises(error, match=message):
            llm.load(path, **options)
    with pytest.raises(ModelFileError, match="no such file"):
        llm.load(tmp_path / "none.gguf")


def test_heads_that_the_kernels_do_not_take(tmp_path, native):
    """A head of 24: the automatic choice is torch, an explicit cpu is refused before the weights are read."""
    path = write_tiny_model(tmp_path / "tiny.gguf", width=96, heads=4)
    assert llm.load(path).backend == "torch"
    with pytest.raises(BackendError, match="head_dim is 24"):
        llm.load(path, backend="cpu")


def test_nan_weights_are_reported_not_sampled(tmp_path):
    matrix = np.zeros((64, 64), np.float16)
    matrix[3, 3] = np.nan
    path = write_tiny_model(tmp_path / "nan.gguf", quant="F16", tensors={"blk.0.attn_v.weight": (matrix[:32], "F16")})
    with pytest.raises(ValueError, match="not numbers"):
        llm.load(path, backend="torch").generate("the", max_new_tokens=2)


def test_packing_keeps_one_copy_and_the_file_may_go(tmp_path, native):
    path = write_tiny_model(tmp_path / "tiny.gguf")
    lm = llm.load(path)
    os.unlink(path)
    assert all(getattr(lm._weights.stack.layers[0], name).layout == "panel16" for name in ("q", "o", "down"))
    assert lm.generate("the", max_new_tokens=2) is not None
    assert lm.load_report.memory_bytes < 1.6 * lm.load_report.file_bytes  # rows are padded to 16
