"""Writes tiny GGUF models with gguf-py's writer: random weights, a real tokenizer, all options a test may want.

    path = write_tiny_model(tmp_path / "tiny.gguf", architecture="qwen2", quant="Q8_0", tied=False)

Two layers of width 64 load in milliseconds; types with blocks of 256 (Q6_K, Q4_K, Q5_K) need width=256, ff=256.
"""

from __future__ import annotations

import os

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from fastdl.llm.tokenizer_bpe import byte_characters

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ("t h", "th e", "Ġ the", "i n", "a n", "an d", "Ġ and", "e r", "o n", "Ġ a", "r e", "Ġ Ġ", "ĠĠ ĠĠ", "l l")
PIECES = ("th", "▁t", "▁th", "▁the", "in", "an", "and", "▁a", "▁and", "er", "on", "re", "▁▁", "▁▁▁▁", "ll", "he", "llo")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
# Random blocks of the types that gguf-py cannot encode: bytes per block, places of the float16 scales.
RANDOM_BLOCKS = {"Q6_K": (210, (208,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q3_K": (110, (108,))}


def write_tiny_model(
    path: str | os.PathLike,
    *,
    architecture: str = "llama",
    tied: bool = True,
    quant: str = "Q4_1",
    tokenizer: str = "gpt2",
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ff: int = 96,
    context: int = 256,
    seed: int = 0,
    metadata: dict | None = None,
    tensors: dict | None = None,
) -> str:
    """Write the model and return its path.

    architecture: "llama" or "qwen2" (with biases on q, k, v). quant: type of the matrices, "Q4_1", "Q8_0", "F16",
    "Q6_K"...; norms and biases are F32. tokenizer: "gpt2" or "llama". metadata: more keys (str, bool, int or float
    values) or replacements; None as a value leaves the key out. tensors: name -> (uint8 or float array, type name),
    more or replaced; None leaves the tensor out.
    """
    rng = np.random.default_rng(seed)
    keys, arrays = _vocabulary(tokenizer, architecture)
    vocab, head = len(arrays["tokens"]), width // heads
    keys |= {
        "general.name": "tiny",
        f"{architecture}.block_count": layers,
        f"{architecture}.context_length": context,
        f"{architecture}.embedding_length": width,
        f"{architecture}.feed_forward_length": ff,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.rope.dimension_count": head,
        f"{architecture}.vocab_size": vocab,
    }
    keys |= metadata or {}
    data = {"token_embd.weight": _matrix(rng, vocab, width, quant), "output_norm.weight": _norm(rng, width)}
    if not tied:
        data["output.weight"] = _matrix(rng, vocab, width, quant)
    shapes = {
        "attn_q": (heads * head, width),
        "attn_k": (kv_heads * head, width),
        "attn_v": (kv_heads * head, width),
        "attn_output": (width, heads * head),
        "ffn_gate": (ff, width),
        "ffn_up": (ff, width),
        "ffn_down": (width, ff),
    }
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            data[f"blk.{layer}.{norm}.weight"] = _norm(rng, width)
        for name, (rows, cols) in shapes.items():
            data[f"blk.{layer}.{name}.weight"] = _matrix(rng, rows, cols, quant)
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                data[f"blk.{layer}.{name}.bias"] = (rng.normal(0, 0.1, rows).astype(np.float32), "F32")
    data |= tensors or {}
    _write(path, architecture, keys, arrays, data)
    return os.fspath(path)


def _write(path, architecture: str, keys: dict, arrays: dict, data: dict) -> None:
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
    writer.add_token_list(arrays["tokens"])
    writer.add_token_types(arrays["types"])
    if "scores" in arrays:
        writer.add_token_scores(arrays["scores"])
    if "merges" in arrays:
        writer.add_token_merges(arrays["merges"])
    for name, entry in data.items():
        if entry is not None:
            values, type_name = entry
            raw = None if type_name in ("F32", "F16") else GGMLQuantizationType[type_name]
            writer.add_tensor(name, values, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrix(rng, rows: int, cols: int, type_name: str):
    if type_name in RANDOM_BLOCKS:
        size, scales = RANDOM_BLOCKS[type_name]
        blocks = rng.integers(0, 256, (rows, cols // 256, size), dtype=np.uint8)
        for place in scales:
            scale = rng.uniform(1e-5, 1e-4, (rows, cols // 256, 1)).astype("<f2")
            blocks[:, :, place : place + 2] = scale.view(np.uint8)
        return blocks.reshape(rows, -1), type_name
    values = rng.normal(0, cols**-0.5, (rows, cols)).astype(np.float32)
    if type_name == "F32":
        return values, type_name
    if type_name == "F16":
        return values.astype(np.float16), type_name
    return quantize(values, GGMLQuantizationType[type_name]), type_name


def _norm(rng, width: int):
    return rng.uniform(0.5, 1.5, width).astype(np.float32), "F32"


def _vocabulary(kind: str, architecture: str) -> tuple[dict, dict]:
    """(scalar metadata keys, arrays) of a small but complete tokenizer: every byte can be encoded."""
    if kind == "gpt2":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokens = special + sorted(byte_characters()) + [merge.replace(" ", "") for merge in MERGES]
        types = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3)
        arrays = {"tokens": tokens, "types": types, "merges": list(MERGES)}
        pre = "qwen2" if architecture == "qwen2" else "smollm"
        ids = {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}
    else:
        letters = [chr(code) for code in range(33, 127)] + ["▁"]
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + list(PIECES) + letters
        types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(PIECES) + len(letters))
        scores = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES) + len(letters))]
        arrays = {"tokens": tokens, "types": types, "scores": scores}
        pre, ids = "default", {"bos": 1, "eos": 2, "unknown": 0}
    keys = {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()}
    keys |= {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.add_bos_token": kind == "llama",
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    return keys, arrays
