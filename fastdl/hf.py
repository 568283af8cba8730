"""Hugging Face models on `fastdl.ops.attention`: importing this module registers ``attn_implementation="fastdl"``.

transformers calls two functions that it finds by that name. `key_mask` makes the mask of a forward pass, once for all
layers of a kind: a `KeyMask`, which says "causal", "a window", "so many keys" and, for left padding, which keys, where
that is all there is to say; None where not even that; a boolean [batch, 1, queries, keys] for whatever else a model
wants (blocks of image tokens, chunks, static caches). `attend` is called by every layer.

Every mask is complete: nothing that a layer passes beside it (sliding_window, is_causal) is needed to read it, because
not all models pass it. Without a mask, ``is_causal`` decides, as for SDPA.

Test: ``pytest tests/test_hf.py``; guide: docs/attention.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

from .nn._padding import lengths_of
from .ops.attention import attention

__all__ = ["KeyMask", "attend", "key_mask", "register"]

if "q_offset" not in inspect.signature(getattr(masking_utils, "sdpa_mask", lambda: None)).parameters:
    raise ImportError(
        f"fastdl.hf: transformers {transformers.__version__} makes masks in another way; expected one as 5.23 has it"
    )

NAME = "fastdl"
# Arguments that would change the result and that no kernel here has, and what to do.
_REFUSED = {
    "head_mask": "the weights are never formed; use attn_implementation='eager'",
    "cache": "continuous batching with a paged cache is not supported; use attn_implementation='sdpa'",
    "block_table": "a paged cache is not supported; use attn_implementation='sdpa'",
}


@dataclass(frozen=True, eq=False)
class KeyMask:
    """What the queries of a forward pass see, the last query standing at the last key.

    causal   hide what follows a query
    window   (left, right) as in `ops.attention`
    lens     int32 [batch]: keys a sequence has, from the first
    keys     bool [batch, 1, 1, keys]: which keys a sequence has
    packed   int32 [sequences + 1]: sequences one after the other in one row
    """

    causal: bool
    window: tuple[int, int] | None = None
    lens: Tensor | None = None
    keys: Tensor | None = None
    packed: Tensor | None = None

    ndim = 4  # generation makes the masks of a static cache itself and hands them to the model, as it does tensors

    def contiguous(self) -> KeyMask:
        return self

    def to(self, *args, **options) -> KeyMask:
        """For models whose layers lie on several devices."""
        moved = (None if t is None else t.to(*args, **options) for t in (self.lens, self.keys, self.packed))
        return KeyMask(self.causal, self.window, *moved)

    def options(self) -> dict:
        """For `ops.attention`."""
        found = {"causal": self.causal, "window": self.window, "valid_lens": self.lens, "mask": self.keys}
        return found if self.packed is None else found | {"cu_seqlens_q": self.packed}


def register() -> None:
    """Make ``attn_implementation="fastdl"`` known to transformers; importing `fastdl.hf` has done it already.

    >>> import transformers, fastdl.hf
    >>> config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, vocab_size=50, attn_implementation="fastdl")
    >>> model = transformers.LlamaForCausalLM(config)
    >>> model(torch.arange(6)[None]).logits.shape
    torch.Size([1, 6, 50])

    A loaded model takes it too: ``model.set_attn_implementation("fastdl")``.
    """
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, key_mask)


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: KeyMask | Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config=None,
    **options,
) -> KeyMask | Tensor | None:
    """The mask function that transformers calls; the arguments are those of its `sdpa_mask`.

    attention_mask  bool [batch, seen keys], True where a token is no padding, or None; or what this function made
    local_size      of a sliding window or a chunk
    allow_is_*_skip whether the mask is a plain causal or bidirectional one (with its window) but for padding
    """
    if isinstance(attention_mask, KeyMask):
        return attention_mask
    # A static cache counts in a tensor, and its keys go on behind the last query.
    aligned = isinstance(q_offset, int) and kv_offset + kv_length == q_offset + q_length
    plain = attention_mask is None or attention_mask.dim() == 2
    window = None
    if plain and allow_is_causal_skip and aligned and (local_size is None or _slides(config, local_size)):
        causal = True
        window = (local_size - 1, -1) if local_size is not None and kv_length > local_size else None
    elif plain and allow_is_bidirectional_skip and not allow_is_causal_skip and (local_size is None or aligned):
        causal = False
        window = (local_size, local_size) if local_size is not None and kv_length > local_size else None
    elif (packed := _packed(mask_function, attention_mask, batch_size, q_length, local_size, options)) is not None:
        return KeyMask(True, packed=packed)
    else:
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip, allow_is_bidirectional_skip, **options,
        )  # fmt: skip
    lens, keys = _padding(attention_mask, kv_length, kv_offset)
    if lens is None and keys is None and window is None and (not causal or q_length in (1, kv_length)):
        return None
    return KeyMask(causal, window, lens, keys)


def _slides(config, size: int) -> bool:
    """Whether a local mask of this size is a sliding window, not chunks."""
    return getattr(config, "sliding_window", None) == size and getattr(config, "attention_chunk_size", None) is None


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> tuple[Tensor | None, Tensor | None]:
    """lens, keys of a `KeyMask`: one, or none where there is no padding. Waits for a GPU, as the mask of SDPA does."""
    if attention_mask is None:
        return None, None
    kept = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    kept = kept[:, kv_offset : kv_offset + kv_length].bool()
    look = not masking_utils.is_tracing(kept)
    if look and bool(kept.all()):
        return None, None
    lens = lengths_of(kept, look)
    return (lens, None) if lens is not None else (None, kept[:, None, None, :])


def _packed(
    function: Callable, attention_mask: Tensor | None, batch: int, length: int, local_size: int | None, options: dict
) -> Tensor | None:
    """int32 [sequences + 1] where the mask is that of sequences packed into one row, which transformers finds by their
    position ids, and nothing else; None: it is something else."""
    if attention_mask is not None or local_size is not None or batch != 1 or options.get("use_vmap"):
        return None
    parts = _closure(function).get("mask_functions", ())
    if len(parts) != 2 or "packed_sequence_mask" not in _closure(parts[0]):
        return None
    if _closure(parts[1]).get("mask_function") is not masking_utils.causal_mask_function:
        return None
    if masking_utils.is_tracing(_closure(parts[0])["packed_sequence_mask"]):
        return None
    at = torch.arange(1, length, device=options.get("device"))
    starts = (~parts[0](0, 0, at, at - 1)).nonzero().flatten() + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), length)]).int()


def _closure(function: Callable) -> dict:
    return inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    query           [batch, heads, queries, head_dim]; key, value [batch, kv_heads, keys, head_dim or another]
    attention_mask  of `key_mask`, or a user's of four dimensions: boolean (True: attend) or floating (added)
    position_bias   floating, broadcastable to the scores: added to them
    s_aux           [heads]: attention sinks (gpt-oss), the score of one more key whose value is 0
    cu_seq_lens_*   int [sequences + 1]: sequences packed into one row

    Returns (output [batch, queries, heads, head_dim], None). Raises ValueError for what no kernel has.
    """
    for name in _REFUSED.keys() & options.keys():
        if options[name] is not None:
            raise ValueError(f"{name}: {_REFUSED[name]}")
    if options.get("output_attentions"):
        raise ValueError("output_attentions: the weights are never formed; use attn_implementation='eager'")
    n_q, n_k = query.shape[2], key.shape[2]
    given = {}
    if isinstance(attention_mask, KeyMask):
        given = attention_mask.options()
    elif attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or not (
            attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
        ):
            got = attention_mask.dtype if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise TypeError(f"attention_mask: expected a boolean or floating tensor of four dimensions, got {got}")
        given = {"mask" if attention_mask.dtype == torch.bool else "bias": attention_mask}
    else:
        given = {"causal": getattr(module, "is_causal", True) if is_causal is None else is_causal}
        given["causal"] = bool(given["causal"]) and n_q > 1
        if given["causal"] and n_k > n_q and cu_seq_lens_q is None:  # the first tokens in a static cache
            key, value = key[:, :, :n_q], value[:, :, :n_q]
            position_bias = None if position_bias is None else position_bias[..., :n_q]
    padded = any(given.get(name) is not None for name in ("mask", "bias", "valid_lens", "cu_seqlens_q"))
    if cu_seq_lens_q is not None and not padded:
        given |= {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
    if position_bias is not None:
        given["bias"] = position_bias if given.get("bias") is None else given["bias"] + position_bias
    if query.shape[0] == 1 != key.shape[0]:  # learned queries
        query = query.expand(key.shape[0], -1, -1, -1)
    given |= {"scale": scaling, "softcap": softcap, "dropout_p": dropout}
    if s_aux is None:
        out = attention(query, key, value, **given)
    else:  # exp(lse) / (exp(lse) + exp(sink)) is what the keys keep of each row
        out, lse = attention(query, key, value, return_lse=True, **given)
        out = out * torch.sigmoid(lse - s_aux.view(-1, 1).to(lse.dtype)).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


register()
