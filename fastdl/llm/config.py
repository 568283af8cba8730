"""What a GGUF file's metadata says about the model, checked: sizes, RoPE, and which tensors the file must hold.

Keys are `<architecture>.<name>` as llama.cpp writes them. Everything that does not fit raises ModelFileError with the
key, what was expected and what was found, before any weight is read.
Test: pytest tests/test_llm_load.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gguf import GGUFFile, ModelFileError

# architecture -> how RoPE pairs stand in its files. "llama" covers llama 1 to 3, mistral, smollm2 and others of that
# make.
ARCHITECTURES = {"llama": "interleaved", "qwen2": "half"}

# Beyond any real model; they keep products of hostile sizes within 64 bits.
MAX_LAYERS, MAX_WIDTH, MAX_FF, MAX_CONTEXT = 1 << 12, 1 << 20, 1 << 22, 1 << 27


@dataclass(frozen=True)
class RopeConfig:
    """Arguments of fastdl.ops.rope_table, and the pairs' order in the file ("interleaved" or "half")."""

    dim: int
    base: float
    pairs: str
    scaling: str = "none"
    factor: float = 1.0
    original_context: int | None = None
    attention_factor: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a llama-family decoder. width = embedding_length; context = the length it was trained for."""

    architecture: str
    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ff_dim: int
    vocab: int
    context: int
    eps: float
    rope: RopeConfig

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token takes in a float16 KV cache."""
        return self.layers * self.kv_heads * self.head_dim * 2 * 2


class _Keys:
    """Typed access to `<architecture>.<name>` with range checks."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.prefix = file, architecture + "."

    def error(self, key: str, expected: str, got: object) -> ModelFileError:
        return ModelFileError(f"{self.file.path}: metadata key {self.prefix + key!r}: expected {expected}, got {got!r}")

    def has(self, key: str) -> bool:
        return self.prefix + key in self.file.metadata

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        fallback = () if default is None else (default,)
        value = self.file.metadata.value(self.prefix + key, int, *fallback)
        if not low <= value <= high:
            raise self.error(key, f"{low} to {high}", value)
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        fallback = () if default is None else (default,)
        value = self.file.metadata.value(self.prefix + key, float, *fallback)
        if not low <= value <= high:  # NaN compares false
            raise self.error(key, f"{low:g} to {high:g}", value)
        return value

    def text(self, key: str, default: str) -> str:
        return self.file.metadata.value(self.prefix + key, str, default)


def read_config(file: GGUFFile) -> ModelConfig:
    """The model's configuration; ModelFileError when the architecture is not supported or a value cannot be."""
    check_whole(file)
    architecture = file.metadata.value("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise ModelFileError(
            f"{file.path}: architecture {architecture!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)} (llama covers mistral and smollm2)"
        )
    keys = _Keys(file, architecture)
    experts = keys.integer("expert_count", 0, 1 << 16, 0)
    if experts:
        raise ModelFileError(
            f"{file.path}: a mixture of {experts} experts is not supported; only dense {architecture} models are"
        )
    width = keys.integer("embedding_length", 1, MAX_WIDTH)
    heads = keys.integer("attention.head_count", 1, MAX_WIDTH)
    kv_heads = keys.integer("attention.head_count_kv", 1, MAX_WIDTH, heads)
    if heads % kv_heads:
        raise keys.error("attention.head_count_kv", f"a divisor of the {heads} query heads", kv_heads)
    if not keys.has("attention.key_length") and width % heads:
        raise keys.error(
            "attention.head_count", f"a divisor of the width {width} (there is no attention.key_length)", heads
        )
    head_dim = keys.integer("attention.key_length", 2, 1 << 12, width // heads)
    if head_dim % 2:
        raise keys.error("attention.key_length", "an even number", head_dim)
    if keys.integer("attention.value_length", 1, 1 << 12, head_dim) != head_dim:
        raise keys.error(
            "attention.value_length",
            f"the length of keys, {head_dim}",
            keys.integer("attention.value_length", 1, 1 << 12),
        )
    context = keys.integer("context_length", 1, MAX_CONTEXT)
    return ModelConfig(
        architecture=architecture,
        name=file.metadata.value("general.name", str, architecture),
        layers=keys.integer("block_count", 1, MAX_LAYERS),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ff_dim=keys.integer("feed_forward_length", 1, MAX_FF),
        vocab=file.info("token_embd.weight").rows,
        context=context,
        eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        rope=_rope(keys, architecture, head_dim, context),
    )


def _rope(keys: _Keys, architecture: str, head_dim: int, context: int) -> RopeConfig:
    dim = keys.integer("rope.dimension_count", 2, head_dim, head_dim)
    if dim % 2:
        raise keys.error("rope.dimension_count", "an even number", dim)
    base = keys.number("rope.freq_base", 1.0, 1e12, 10000.0)
    if base == 1.0:
        raise keys.error("rope.freq_base", "a number over 1", base)
    scaling = keys.text("rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise keys.error("rope.scaling.type", "none, linear or yarn", scaling)
    factor = keys.number("rope.scaling.factor", 0.0, 1e6, 0.0)
    if factor == 0.0:  # files of 2023 have the factor here, without a type
        factor = keys.number("rope.scale_linear", 0.0, 1e6, 0.0) or 1.0
        if scaling == "none" and factor != 1.0:
            scaling = "linear"
    if factor == 1.0:
        scaling = "none"
    attention_factor = None
    if scaling == "yarn" and keys.has("rope.scaling.attn_factor"):
        # llama.cpp multiplies this with its own 0.1 ln(factor) + 1
        attention_factor = keys.number("rope.scaling.attn_factor", 0.0, 100.0) * (
            0.1 * math.log(max(factor, 1.0)) + 1.0
        )
    return RopeConfig(
        dim=dim,
        base=base,
        pairs=ARCHITECTURES[architecture],
        scaling=scaling,
        factor=factor if scaling != "none" else 1.0,
        original_context=keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, context),
        attention_factor=attention_factor,
    )


# tensor of a layer -> (field of DecoderLayer, rows, cols); None for vectors. Names as llama.cpp writes them.
def layer_tensors(config: ModelConfig) -> dict[str, tuple[str, int, int | None]]:
    """Suffix of `blk.<i>.<suffix>` -> (field, rows, cols or None for a vector of `rows`)."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "attn_norm.weight": ("attn_norm", config.width, None),
        "attn_q.weight": ("q", q, config.width),
        "attn_k.weight": ("k", kv, config.width),
        "attn_v.weight": ("v", kv, config.width),
        "attn_output.weight": ("o", config.width, q),
        "ffn_norm.weight": ("ffn_norm", config.width, None),
        "ffn_gate.weight": ("gate", config.ff_dim, config.width),
        "ffn_up.weight": ("up", config.ff_dim, config.width),
        "ffn_down.weight": ("down", config.width, config.ff_dim),
        "attn_q.bias": ("bias_q", q, None),
        "attn_k.bias": ("bias_k", kv, None),
        "attn_v.bias": ("bias_v", kv, None),
    }


OPTIONAL_IN_LAYER = {"llama": ("attn_q.bias", "attn_k.bias", "attn_v.bias"), "qwen2": ()}
# Written by some converters, needed by nobody: RoPE frequencies that follow from the metadata.
IGNORED = ("rope_freqs.weight", "attn_rot_embd.weight", "attn_rot_embd", "attn.rope_freqs.weight")


def check_whole(file: GGUFFile) -> None:
    """ModelFileError for one part of a model in several files (``model-00001-of-00003.gguf``)."""
    parts = file.metadata.value("split.count", int, 1)
    if parts > 1:
        raise ModelFileError(
            f"{file.path}: one part of a split model ({parts} files); join them first: "
            f"llama-gguf-split --merge model-00001-of-{parts:05}.gguf model.gguf"
        )


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """ModelFileError unless the file holds every tensor the model needs, of the right shape, and none that would be
    left out."""
    width = config.width
    expected: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab, width), "output_norm.weight": (width,)}
    optional: dict[str, tuple[int, ...]] = {
        "output.weight": (config.vocab, width),
        "rope_freqs.weight": (config.rope.dim // 2,),
    }
    per_layer = layer_tensors(config)
    if len(file.tensors) < config.layers * (len(per_layer) - 3):  # before building names for absurd counts
        raise ModelFileError(
            f"{file.path}: {config.architecture}.block_count says {config.layers} layers, "
            f"the file has only {len(file.tensors)} tensors"
        )
    for i in range(config.layers):
        for suffix, (_, rows, cols) in per_layer.items():
            table = optional if suffix in OPTIONAL_IN_LAYER[config.architecture] else expected
            table[f"blk.{i}.{suffix}"] = (rows,) if cols is None else (rows, cols)
    for name, shape in expected.items():
        _check_shape(file, name, shape)
    for name, info in file.tensors.items():
        if name in optional:
            _check_shape(file, name, optional[name])
        elif name not in expected and not name.endswith(IGNORED):
            raise ModelFileError(
                f"{file.path}: tensor {name!r} ({info.type_name} {info.shape}) has no place in a {config.architecture} "
                f"model of {config.layers} layers as this version computes it; the answers would be wrong"
            )


def _check_shape(file: GGUFFile, name: str, shape: tuple[int, ...]) -> None:
    info = file.info(name)
    if tuple(info.shape) != shape:
        raise ModelFileError(f"{file.path}: tensor {name!r}: expected shape {shape}, got {tuple(info.shape)}")
