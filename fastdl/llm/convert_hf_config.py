"""config.json of a llama, mistral or qwen2 model -> GGUF metadata and rope factors.

What GGUF cannot express, or `fastdl.llm` could not compute, is refused by name: a converted model gives the source's
logits or does not come into being.

Tests: ``pytest tests/test_convert.py -k hf``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdl.llm.convert_tokenizer import read_json
from fastdl.llm.gguf import ModelFileError
from fastdl.reference.rope import llama3_factors

MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}  # Hugging Face's name -> GGUF's architecture


@dataclass
class Config:
    """The numbers of a model, checked."""

    name: str
    architecture: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_given: bool
    vocab_size: int
    context: int
    eps: float
    rope_theta: float
    rope: dict[str, Any]  # "rope_type" and its settings
    tied: bool
    notes: list[str] = field(default_factory=list)


def read_config(folder: Path) -> Config:
    """Reads and checks config.json."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelFileError(f"{folder}: holds a LoRA adapter, not a model; merge it into its base model first")
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; did you mean {ggufs[0]}?" if ggufs else ""
        raise ModelFileError(f"{folder}: a folder without config.json is not a Hugging Face model{hint}")
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ModelFileError(f"{path}: model_type {kind!r} is not supported (supported: {', '.join(MODEL_TYPES)})")
    _refuse(path, raw)
    heads = _number(path, raw, "num_attention_heads", int)
    width = _number(path, raw, "hidden_size", int)
    kv_heads = _number(path, raw, "num_key_value_heads", int, heads if kind == "llama" else None)
    head_dim = _number(path, raw, "head_dim", int, width // heads)
    if raw.get("head_dim") is None and width % heads:
        raise ModelFileError(f"{path}: hidden_size {width} is not divisible by {heads} attention heads")
    if heads % kv_heads:
        raise ModelFileError(f"{path}: {heads} attention heads cannot share {kv_heads} key/value heads")
    if head_dim % 2:
        raise ModelFileError(f"{path}: head_dim must be even for rotary embeddings, got {head_dim}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelFileError(f"{path}: rope settings must be an object, got {rope!r}")
    rope = dict(rope)
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    config = Config(
        name=folder.resolve().name,
        architecture=MODEL_TYPES[kind],
        layers=_number(path, raw, "num_hidden_layers", int),
        width=width,
        feed_forward=_number(path, raw, "intermediate_size", int),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_given=raw.get("head_dim") is not None,
        vocab_size=_number(path, raw, "vocab_size", int),
        context=_number(path, raw, "max_position_embeddings", int),
        eps=_number(path, raw, "rms_norm_eps", float, 1e-6),
        rope_theta=_number(path, rope, "rope_theta", float, _number(path, raw, "rope_theta", float, 10000.0)),
        rope=rope,
        tied=raw.get("tie_word_embeddings", False) is True,
    )
    _check_rope(path, config)
    _limit_to_window(raw, kind, config)
    return config


def config_metadata(config: Config) -> list[tuple[str, Any, Any, Any]]:
    """The keys that describe the model: (key, value, GGUF type, element type)."""
    from gguf import GGUFValueType as Value

    prefix, rope = config.architecture, config.rope
    numbers = {
        "block_count": config.layers,
        "context_length": config.context,
        "embedding_length": config.width,
        "feed_forward_length": config.feed_forward,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim_given:
        numbers |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    floats = {"attention.layer_norm_rms_epsilon": config.eps, "rope.freq_base": config.rope_theta}
    if rope["rope_type"] in ("linear", "yarn"):
        floats["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        numbers["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    metadata: list[tuple[str, Any, Any, Any]] = [
        ("general.type", "model", Value.STRING, None),
        ("general.name", config.name, Value.STRING, None),
    ]
    metadata += [(f"{prefix}.{key}", value, Value.UINT32, None) for key, value in numbers.items()]
    metadata += [(f"{prefix}.{key}", value, Value.FLOAT32, None) for key, value in floats.items()]
    if rope["rope_type"] in ("linear", "yarn"):
        metadata.append((f"{prefix}.rope.scaling.type", rope["rope_type"], Value.STRING, None))
    return metadata


def rope_factors(config: Config) -> Tensor | None:
    """float32 [head_dim / 2], what llama 3 divides each rotary frequency by; None for other kinds of scaling.

    Source: transformers, modeling_rope_utils, "llama3".
    """
    rope = config.rope
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    return llama3_factors(config.head_dim, config.rope_theta, factor, context, low, high).to(torch.float32)


def _number(path: Path, raw: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A positive number of the given kind; a missing one (or null) takes the default, if there is one."""
    value = raw.get(key)
    if value is None:
        if default is None:
            raise ModelFileError(f"{path}: {key!r} is missing")
        return default
    good = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not good or not 0 < value < 2**31:
        raise ModelFileError(f"{path}: {key!r} must be a positive {kind.__name__}, got {value!r}")
    return kind(value)


def _refuse(path: Path, raw: dict[str, Any]) -> None:
    if raw.get("quantization_config") is not None:
        raise ModelFileError(
            f"{path}: the weights are quantized already (quantization_config); convert the original model"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelFileError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported (silu is)")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ModelFileError(f"{path}: models with {key} are not supported")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelFileError(f"{path}: partial_rotary_factor {raw['partial_rotary_factor']} is not supported")


def _check_rope(path: Path, config: Config) -> None:
    rope, kind = config.rope, config.rope["rope_type"]
    needed = {
        "default": (),
        "linear": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needed:
        raise ModelFileError(f"{path}: rope type {kind!r} is not supported (supported: {', '.join(needed)})")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelFileError(f"{path}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    for key in needed[kind]:
        _number(path, rope, key, float)
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ModelFileError(f"{path}: high_freq_factor must be larger than low_freq_factor")
    if kind == "yarn":
        defaults = {
            "attention_factor": None,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": None,
            "mscale_all_dim": None,
            "truncate": True,
        }
        for key, default in defaults.items():
            if rope.get(key, default) not in (None, default):
                raise ModelFileError(f"{path}: rope type 'yarn' with {key} {rope[key]} is not supported")


def _limit_to_window(raw: dict[str, Any], kind: str, config: Config) -> None:
    """These GGUF architectures have no sliding window; up to its length the model is the same without it."""
    window = raw.get("sliding_window")
    if kind == "qwen2" and raw.get("use_sliding_window") is not True:
        window = None
    if kind == "llama" or not isinstance(window, int) or window >= config.context:
        return
    config.notes.append(
        f"attention has a sliding window of {window} tokens, which GGUF's {config.architecture} cannot say: "
        f"context_length is {window} instead of {config.context}, so that results are the source's"
    )
    config.context = window
