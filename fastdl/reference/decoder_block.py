"""A stack of decoder blocks over new tokens of one sequence, in plain PyTorch: the meaning of the op.

For each layer, with t the new tokens at positions pos .. pos + n - 1:

    h      = rms_norm(x) * attn_norm
    q,k,v  = h Wq^T + bq,  h Wk^T + bk,  h Wv^T + bv          q and k turned by RoPE, pairs interleaved
    cache  = k and v written at the new positions, rounded to the dtype of the cache
    x      = x + attention(q, cached keys, cached values) Wo^T       causal, grouped heads, scale 1 / sqrt(head_dim)
    h      = rms_norm(x) * ffn_norm
    x      = x + (silu(h Wg^T) * (h Wu^T)) Wd^T

and at the end, when an output norm is given, rms_norm(x) * output_norm.  All float32; what `matmul` does to its
activations is its own affair.  Touvron et al., "LLaMA" (2023).  Test: tests/test_decoder_block.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .activation import swiglu
from .attention import attention_forward
from .norm import rms_norm
from .rope import rope as turn


def decoder_blocks(
    x: Tensor,
    layers: Sequence[Any],
    k_cache: Tensor,
    v_cache: Tensor,
    rope: Tensor,
    output_norm: Tensor | None,
    pos: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    eps: float,
    matmul: Callable[[Tensor, Any, Tensor | None], Tensor],
) -> Tensor:
    """x float32 [n, width], caches [layers, n_kv_heads, max_len, head_dim] (written), rope [>= pos + n, rope_dim] ->
    [n, width].

    `layers` have the fields of fastdl.ops.DecoderLayer; `matmul(x, weight, bias)` multiplies by one weight of theirs.
    """
    n = x.shape[0]
    new, seen = slice(pos, pos + n), slice(0, pos + n)

    def heads(t: Tensor, count: int) -> Tensor:  # [n, count * head_dim] -> [count, n, head_dim]
        return t.view(n, count, head_dim).transpose(0, 1)

    for i, layer in enumerate(layers):
        h = rms_norm(x, layer.attn_norm, eps)
        q = turn(heads(matmul(h, layer.q, layer.bias_q), n_heads), rope[new], interleaved=True)
        k = turn(heads(matmul(h, layer.k, layer.bias_k), n_kv_heads), rope[new], interleaved=True)
        k_cache[i, :, new] = k.to(k_cache.dtype)
        v_cache[i, :, new] = heads(matmul(h, layer.v, layer.bias_v), n_kv_heads).to(v_cache.dtype)
        cached = (cache[i, None, :, seen] for cache in (k_cache, v_cache))
        out = attention_forward(q[None], *cached, *[None] * 7, 0.0, head_dim**-0.5, 0.0, -1, 0)[0][0]
        x = x + matmul(out.transpose(0, 1).reshape(n, -1), layer.o, None)
        h = rms_norm(x, layer.ffn_norm, eps)
        x = x + matmul(swiglu(matmul(h, layer.gate, None), matmul(h, layer.up, None)), layer.down, None)
    return x if output_norm is None else rms_norm(x, output_norm, eps)
