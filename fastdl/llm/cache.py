"""The KV cache of one sequence, and its file.

float16 [layers, n_kv_heads, capacity, head_dim] for keys and values, grown as needed: a tensor for the whole context
would be touched page by page only, but with 2 MB pages every head's first token would claim one. A saved cache
(safetensors) carries the token ids and a fingerprint of the model, without which its numbers mean nothing.
Test: pytest tests/test_llm_cache.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .atomic import atomic_file
from .config import ModelConfig
from .gguf import ModelFileError

STEP = 64  # capacities are multiples of it
FORMAT = "fastdl prompt cache 1"


class KVCache:
    """Keys and values of the tokens `ids`; `length` of them. Positions from `length` on are not initialised."""

    def __init__(self, config: ModelConfig, context: int):
        self.context = context
        self.ids: list[int] = []
        self._shape = (config.layers, config.kv_heads, config.head_dim)
        self.k = self.v = self._empty(0)

    def _empty(self, capacity: int) -> Tensor:
        layers, heads, head_dim = self._shape
        return torch.empty(layers, heads, capacity, head_dim, dtype=torch.float16)

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all; what is there stays."""
        if length <= self.capacity:
            return
        grown = max(length, min(self.capacity * 3 // 2, self.context)) if self.length else length
        capacity = min(-(-grown // STEP) * STEP, max(self.context, length))
        if not self.length:
            self.k = self.v = self._empty(0)  # the old ones go before the new ones come
        for name in ("k", "v"):
            new, old = self._empty(capacity), getattr(self, name)
            if self.length:
                new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.ids[length:]

    def common_prefix(self, ids: Sequence[int]) -> int:
        """How many leading tokens of `ids` are in the cache."""
        count = 0
        for cached, wanted in zip(self.ids, ids, strict=False):
            if cached != wanted:
                break
            count += 1
        return count


def save(cache: KVCache, path: str | os.PathLike[str], fingerprint: str) -> None:
    """Write the cache to `path`: whole or not at all, an existing file is replaced."""
    from safetensors.torch import save_file

    tensors = {
        "ids": torch.tensor(cache.ids, dtype=torch.int64),
        "k": cache.k[:, :, : cache.length].contiguous(),
        "v": cache.v[:, :, : cache.length].contiguous(),
    }
    with atomic_file(path, overwrite=True) as part:
        save_file(tensors, part, metadata={"format": FORMAT, "model": fingerprint})


def load(cache: KVCache, path: str | os.PathLike[str], fingerprint: str, vocab: int) -> None:
    """Replace the contents of `cache` by the file's. ModelFileError: no such file, not a cache, of another model, too
    long."""
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    try:
        with safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ModelFileError(
                    f"{name}: expected a file that save_cache wrote ({FORMAT!r}), got {json.dumps(metadata)[:80]}"
                )
            if metadata.get("model") != fingerprint:
                raise ModelFileError(
                    f"{name}: the cache was made with another model (its {metadata.get('model')}, here {fingerprint})"
                )
            ids, k, v = file.get_tensor("ids"), file.get_tensor("k"), file.get_tensor("v")
    except FileNotFoundError:
        raise ModelFileError(f"{name}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{name}: not a prompt cache: {error}") from None
    layers, heads, head_dim = cache._shape
    shape = (layers, heads, ids.numel(), head_dim)
    if (
        ids.dtype != torch.int64
        or ids.dim() != 1
        or any(t.dtype != torch.float16 or tuple(t.shape) != shape for t in (k, v))
    ):
        raise ModelFileError(
            f"{name}: expected float16 keys and values of shape {shape}, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if ids.numel() > cache.context:
        raise ModelFileError(
            f"{name}: holds {ids.numel()} tokens, the context is {cache.context}; load the model with a larger context"
        )
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocab):
        raise ModelFileError(f"{name}: holds token ids outside the vocabulary of {vocab}")
    cache.truncate(0)
    cache.reserve(ids.numel())
    cache.k[:, :, : ids.numel()], cache.v[:, :, : ids.numel()] = k, v
    cache.ids = ids.tolist()
