"""A Hugging Face folder (llama, mistral, qwen2) as the source of a conversion.

Read are config.json (hyperparameters), *.safetensors (weights, also sharded, with an index) and the tokenizer's files.
Names become GGUF's. GGUF's llama rotates the pairs of elements (2i, 2i+1) of a head, Hugging Face's the pairs (i, i +
head_dim/2): so the rows of q and k change places within each head, new row 2i + j = old row i + j * head_dim/2. GGUF's
qwen2 rotates halves too, its rows stay. Every tensor's presence and shape is checked before anything is written.

Tests: ``pytest tests/test_convert.py -k hf``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdl.llm.convert_hf_config import Config, config_metadata, read_config, rope_factors
from fastdl.llm.convert_source import Source
from fastdl.llm.convert_tokenizer import Vocabulary, compare, read_json, read_vocabulary
from fastdl.llm.gguf import ModelFileError

_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F64": "f64"}
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq$")  # computed from the configuration


@dataclass
class FolderTensor:
    """One tensor of a safetensors file (convert.SourceTensor).

    The file is opened anew after each `release`: closing it gives the mapped pages back, so memory in use stays small.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    row_multiple: int  # head_dim where rows are permuted, else 1
    file: Path
    original: str
    permuted: bool
    _open: Any = None
    _slice: Any = None

    def rows(self, start: int, stop: int) -> Tensor:
        if self._slice is None:
            self._open = _open_safetensors(self.file)
            self._slice = self._open.get_slice(self.original)
        part = self._slice[:][None] if len(self.shape) == 1 else self._slice[start:stop]
        part = part.to(torch.float32)
        if self.permuted:
            part = part.reshape(-1, 2, self.row_multiple // 2, part.shape[1]).transpose(1, 2).reshape(part.shape)
        return part

    def raw(self, start: int, stop: int, kind: str) -> memoryview | None:
        return None

    def release(self) -> None:
        self._open = self._slice = None


@dataclass
class ComputedTensor:
    """A vector that no file holds: llama 3's rope factors."""

    name: str
    values: Tensor
    type: str = "f32"
    row_multiple: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.values[None]

    def raw(self, start: int, stop: int, kind: str) -> memoryview | None:
        return None

    def release(self) -> None:
        pass


def open_folder(folder: Path) -> Source:
    """Opens ``folder`` as a source; ModelFileError for what is missing, damaged or not supported."""
    config = read_config(folder)
    files = _weight_files(folder)
    present = _index_tensors(files)
    tensors = _named_tensors(folder, config, present)
    factors = rope_factors(config)
    if factors is not None:
        tensors.append(ComputedTensor("rope_freqs.weight", factors))
    vocab = read_vocabulary(folder, config.vocab_size)
    metadata = config_metadata(config) + _tokenizer_metadata(vocab)
    return Source(
        path=folder,
        architecture=config.architecture,
        files=files,
        nbytes=sum(_nbytes(tensor) for tensor in tensors),
        metadata=metadata,
        tensors=tensors,
        close=lambda: _release(tensors),
        compare=lambda written: compare(folder, written),
        notes=config.notes + vocab.notes,
    )


def _release(tensors: list[Any]) -> None:
    for tensor in tensors:
        tensor.release()


def _nbytes(tensor: FolderTensor | ComputedTensor) -> int:
    return torch.Size(tensor.shape).numel() * {"f32": 4, "f64": 8}.get(tensor.type, 2)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files: those that the index names, else model.safetensors, else all."""
    index_path = folder / "model.safetensors.index.json"
    index = read_json(index_path, optional=True)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelFileError(f"{index_path}: expected an object 'weight_map' of tensor name -> file name")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ModelFileError(f"{index_path}: {name!r} lies outside the folder")
        files = [folder / name for name in names]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise ModelFileError(f"{file}: no such file, but {index_path.name} names it")
    if not files:
        other = (
            " (pytorch_model.bin is not read: save the model again as safetensors)"
            if list(folder.glob("*.bin"))
            else ""
        )
        raise ModelFileError(f"{folder}: no *.safetensors file in the folder{other}")
    return files


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{file}: damaged or cut off ({error})") from error


def _index_tensors(files: list[Path]) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Tensor name -> (file, shape, dtype), from the headers alone."""
    present: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for file in files:
        with _open_safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
                if name in present:
                    raise ModelFileError(f"{file}: tensor {name!r} is also in {present[name][0].name}")
                part = opened.get_slice(name)
                present[name] = (file, tuple(part.get_shape()), part.get_dtype())
    return present


def _layout(config: Config) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """(Hugging Face name, GGUF name, shape, rows permuted) of every tensor of the model, in the file's order."""
    width, inner = config.width, config.feed_forward
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    permuted = config.architecture == "llama"
    rows = [("model.embed_tokens.weight", "token_embd.weight", (config.vocab_size, width), False)]
    for i in range(config.layers):
        hf, ours = f"model.layers.{i}.", f"blk.{i}."
        rows += [(hf + "input_layernorm.weight", ours + "attn_norm.weight", (width,), False)]
        for letter, size in (("q", q), ("k", kv), ("v", kv)):
            moved = permuted and letter != "v"
            rows += [(f"{hf}self_attn.{letter}_proj.weight", f"{ours}attn_{letter}.weight", (size, width), moved)]
            if config.architecture == "qwen2":
                rows += [(f"{hf}self_attn.{letter}_proj.bias", f"{ours}attn_{letter}.bias", (size,), False)]
        rows += [
            (hf + "self_attn.o_proj.weight", ours + "attn_output.weight", (width, q), False),
            (hf + "post_attention_layernorm.weight", ours + "ffn_norm.weight", (width,), False),
            (hf + "mlp.gate_proj.weight", ours + "ffn_gate.weight", (inner, width), False),
            (hf + "mlp.up_proj.weight", ours + "ffn_up.weight", (inner, width), False),
            (hf + "mlp.down_proj.weight", ours + "ffn_down.weight", (width, inner), False),
        ]
    rows += [("model.norm.weight", "output_norm.weight", (width,), False)]
    if not config.tied:
        rows += [("lm_head.weight", "output.weight", (config.vocab_size, width), False)]
    return rows


def _named_tensors(folder: Path, config: Config, present: dict[str, tuple[Path, tuple[int, ...], str]]) -> list[Any]:
    tensors: list[Any] = []
    known = set()
    for original, name, shape, permuted in _layout(config):
        known.add(original)
        if original not in present:
            hint = " (tie_word_embeddings is false in config.json)" if original == "lm_head.weight" else ""
            raise ModelFileError(f"{folder}: tensor {original!r} is missing{hint}")
        file, found, dtype = present[original]
        if found != shape:
            raise ModelFileError(f"{file}: tensor {original!r} has the shape {found}, config.json makes it {shape}")
        if dtype not in _TYPES:
            raise ModelFileError(f"{file}: tensor {original!r} has the type {dtype}; expected {', '.join(_TYPES)}")
        multiple = config.head_dim if permuted else 1
        tensors.append(FolderTensor(name, shape, _TYPES[dtype], multiple, file, original, permuted))
    if config.tied:
        known.add("lm_head.weight")  # a copy of the embedding, which transformers does not read either
    for name, (file, _, _) in present.items():
        if name not in known and not _IGNORED.match(name):
            raise ModelFileError(f"{file}: tensor {name!r} does not belong to a {config.architecture} model")
    return tensors


def _tokenizer_metadata(vocab: Vocabulary) -> list[tuple[str, Any, Any, Any]]:
    from gguf import GGUFValueType as Value

    metadata: list[tuple[str, Any, Any, Any]] = [
        ("tokenizer.ggml.model", vocab.kind, Value.STRING, None),
        ("tokenizer.ggml.pre", vocab.pre, Value.STRING, None),
        ("tokenizer.ggml.tokens", vocab.tokens, Value.ARRAY, Value.STRING),
        ("tokenizer.ggml.token_type", vocab.types, Value.ARRAY, Value.INT32),
    ]
    if vocab.scores is not None:
        metadata.append(("tokenizer.ggml.scores", vocab.scores, Value.ARRAY, Value.FLOAT32))
    if vocab.merges:
        metadata.append(("tokenizer.ggml.merges", vocab.merges, Value.ARRAY, Value.STRING))
    keys = {
        "bos": "bos",
        "eos": "eos",
        "unk": "unknown",
        "sep": "seperator",
        "pad": "padding",
        "mask": "mask",
    }  # GGUF's spelling
    for name, index in vocab.special_ids.items():
        if name in keys:
            metadata.append((f"tokenizer.ggml.{keys[name]}_token_id", index, Value.UINT32, None))
    for name in ("bos", "eos"):
        metadata.append((f"tokenizer.ggml.add_{name}_token", bool(getattr(vocab, f"add_{name}")), Value.BOOL, None))
    if vocab.add_space_prefix is not None:
        metadata.append(("tokenizer.ggml.add_space_prefix", vocab.add_space_prefix, Value.BOOL, None))
    template = vocab.chat_template
    if isinstance(template, list):  # several named templates: the default one is the one that chats use
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if isinstance(template, str):
        metadata.append(("tokenizer.chat_template", template, Value.STRING, None))
    return metadata
