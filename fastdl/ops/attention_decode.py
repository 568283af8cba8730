"""Room attention_decode: few queries over a long cache of keys and values, which the same call appends to.

    total_b = cache_lens_b + n_new      k_new, q turned by RoPE at their positions, k_new and v_new written to the cache
    O       = softmax(cap(scale * q k^T) - slope * distance) v over the keys 0 .. total_b - 1, as in room `attention`

The cache is contiguous, a row of positions for every sequence, or paged: blocks that a table deals out. It holds
float32, float16, bfloat16, or 8-bit numbers (Q8_0 blocks). Keys are cut into parts of the same length, by
position alone, so a sequence's result does not depend on the others. The cache is state: no gradients; `attention` has
them.

Back ends: cpu (csrc/cpu/attention_decode*), cuda (csrc/cuda/attention_decode*), triton (kernels/attention_decode.py),
torch (fastdl/reference/attention_decode.py). What they refuse:

    | back end          | refuses                      | because                              |
    | cpu, cuda, triton | float64                      | its kernels accumulate in float32    |
    | cpu               | head_dim or d_v of over 4096 | a row is turned in memory of its own |
    | cuda, triton      | head_dim or d_v of over 256  | a row must fit in registers          |

Queries are float32 while they are turned and multiplied, whatever the cache's type: also the tensor cores' products
with a 16-bit cache are those of the float32 query, to some 22 bits.

Test: ``pytest tests/test_attention_decode.py``; benchmark: ``pytest bench/bench_attention_decode.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, triton_twin, twin_of
from ..reference import attention_decode as reference
from ..reference.attention import output_like
from ._attention_checks import check_slopes, check_softcap, check_window
from ._checks import check_dense, check_finite, check_optional, kind_of
from ._masks import check_ints, values_are_known

__all__ = ["attention_decode"]

PAIRS = ("interleaved", "half")
CACHES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def _width(cache: Tensor) -> int:
    return cache.shape[3] // 34 * 32 if cache.dtype == torch.uint8 else cache.shape[3]


def _fake(
    q, k_new, v_new, k_cache, v_cache, lens, block_table, cos_sin, slopes, interleaved, scale, softcap, left, right
):
    return output_like(q, _width(v_cache)), q.new_empty(q.shape[:3], dtype=torch.float32)


DECODE = Op(
    "attention_decode(Tensor q, Tensor? k_new, Tensor? v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lens, "
    "Tensor? block_table, Tensor? cos_sin, Tensor? slopes, bool interleaved, float scale, float softcap, int left, "
    "int right) -> (Tensor out, Tensor lse)",
    fake=_fake,
    reference=reference.attention_decode,
    triton=triton_twin("attention_decode", "attention_decode"),
)


def _refuse_cpu(*, dtype: torch.dtype, head_dim: int = 64, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels accumulate in float32; use another dtype"
    if head_dim > 4096:
        return f"head_dim {head_dim}: its kernels hold rows of at most 4096; use backend='torch'"
    return None


def _refuse_gpu(*, dtype: torch.dtype, head_dim: int = 64, **facts) -> str | None:
    if head_dim > 256:
        return f"head_dim {head_dim}: a row of more than 256 does not fit in registers; use backend='torch'"
    return _refuse_cpu(dtype=dtype)


backends.register_room("attention_decode", {"cpu": _refuse_cpu, "cuda": _refuse_gpu, "triton": _refuse_gpu})


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    block_table: Tensor | None = None,
    cos_sin: Tensor | None = None,
    pairs: str = "half",
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a cache, which takes their keys and values in the same call.

    Sequence b holds cache_lens[b] positions; its n_new new keys and values are written behind them, and the n_q queries
    are those of the last positions. With `cos_sin` queries and new keys are turned first.

    q            [batch, heads, n_q, head_dim], float32, bfloat16, float16
    k_cache      [batch, kv_heads, capacity, head_dim], or with block_table [blocks, kv_heads, block_size,
                 head_dim]; float32, float16, bfloat16, or uint8 [..., head_dim / 32 * 34]: Q8_0 (float16 d, 32 int8
                 codes). Written in place
    v_cache      the same with d_v
    cache_lens   int [batch]: positions held before the call. It is not changed
    k_new        [batch, kv_heads, n_new, head_dim], the dtype of q, or None: nothing is appended
    v_new        [batch, kv_heads, n_new, d_v], with k_new
    block_table  int [batch, blocks of a sequence]: which block holds positions i * block_size and on
    cos_sin      float32 [positions, rope_dim] of `rope_table`, or None
    pairs        "half" (Hugging Face) or "interleaved" (GGUF's llama): which elements are turned together
    causal       hide later keys from the earlier of the queries
    scale, window, softcap, alibi_slopes, return_lse   as in `attention`
    backend      None or "auto", "cpu", "cuda", "triton", "torch"

    Returns O [batch, heads, n_q, d_v] in the dtype of q; with return_lse also lse float32 [batch, heads, n_q].
    Raises TypeError or ValueError naming the argument, also when a cache would overflow; fastdl.BackendError if
    ``backend`` cannot. On a GPU nothing looks at the values of cache_lens and block_table, which would wait for it: the
    call can be captured in a CUDA graph and follows the lengths when it is replayed. Keys and values for which the
    cache or the table has no place are then not written, and positions behind cos_sin take its last angles;
    FASTDL_CHECK=1 looks, and raises the errors.

    >>> import torch
    >>> from fastdl import ops
    >>> k_cache, v_cache = torch.zeros(2, 1, 2, 64, 16, dtype=torch.float16)      # keys and values of one sequence
    >>> lens = torch.zeros(1, dtype=torch.int32)
    >>> q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    >>> y = ops.attention_decode(q, k_cache, v_cache, lens, k_new=k, v_new=v, cos_sin=ops.rope_table(16, 10000.0, 64))
    >>> y.shape, bool(v_cache[0, :, :3].any()), bool(v_cache[0, :, 3:].any())
    (torch.Size([1, 4, 3, 16]), True, False)

    Source: Dao et al., "Flash-Decoding" (2023); paged caches: Kwon et al. (2023); Q8_0: GGUF.
    """
    lens, table, cos_sin, slopes, numbers = _check(
        q, k_cache, v_cache, cache_lens, k_new, v_new, block_table, cos_sin, pairs, scale, softcap, alibi_slopes
    )
    left, right = check_window(window, causal)
    chosen = backends.choose(
        "attention_decode",
        backend,
        device=q.device,
        dtype=q.dtype,
        refusals=backends.in_a_transform(),
        head_dim=max(q.shape[3], _width(v_cache)),
    )
    q, k_new, v_new = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k_new, v_new))
    out, lse = DECODE[twin_of(chosen, q.device)](
        q, k_new, v_new, k_cache, v_cache, lens, table, cos_sin, slopes, pairs == "interleaved", *numbers, left, right
    )
    return (out, lse) if return_lse else out


def _check(q, k_cache, v_cache, cache_lens, k_new, v_new, block_table, cos_sin, pairs, scale, softcap, alibi_slopes):
    check_dense("q", q)
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"q: expected shape [batch, heads, n_q, head_dim], got {tuple(q.shape)}")
    batch, heads, n_q, head_dim = q.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if (
            not isinstance(cache, Tensor)
            or cache.dtype not in CACHES
            or cache.layout != torch.strided
            or cache.is_nested
        ):
            got = kind_of(cache) if isinstance(cache, Tensor) else type(cache).__name__
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or uint8 (Q8_0), got {got}")
        if cache.dim() != 4 or cache.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected shape [batch or blocks, kv_heads, capacity, head_dim], the last contiguous, "
                f"got {tuple(cache.shape)}, strides {cache.stride()}"
            )
        if cache.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {cache.device}; move it")
        if cache.dtype == torch.uint8 and cache.shape[3] % 34:
            raise ValueError(f"{name}: expected a multiple of 34 bytes, Q8_0 blocks, a row, got {cache.shape[3]}")
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"v_cache: expected the dtype of k_cache, {k_cache.dtype}, got {v_cache.dtype}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"v_cache: expected {tuple(k_cache.shape[:3])} as in k_cache, got {tuple(v_cache.shape[:3])}")
    if _width(k_cache) != head_dim:
        raise ValueError(f"k_cache: expected the head_dim of q, {head_dim}, got {_width(k_cache)}")
    kv_heads, capacity = k_cache.shape[1], k_cache.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k_cache: expected a number of heads that divides q's {heads}, got {kv_heads}")
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(f"k_cache: expected the batch of q, {batch}, got {k_cache.shape[0]}")
    else:
        _check_ints("block_table", block_table, q.device)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(f"block_table: expected shape ({batch}, blocks), got {tuple(block_table.shape)}")
        capacity *= block_table.shape[1]
    _check_ints("cache_lens", cache_lens, q.device)
    if tuple(cache_lens.shape) != (batch,):
        raise ValueError(f"cache_lens: expected shape ({batch},), a length a sequence, got {tuple(cache_lens.shape)}")
    if (k_new is None) != (v_new is None):
        raise ValueError("k_new, v_new: expected both or none")
    n_new = 0
    if k_new is not None:
        n_new = k_new.shape[2] if isinstance(k_new, Tensor) and not k_new.is_nested and k_new.dim() == 4 else -1
        for name, new, width in (("k_new", k_new, head_dim), ("v_new", v_new, _width(v_cache))):
            if not isinstance(new, Tensor) or new.dtype != q.dtype or new.layout != torch.strided or new.is_nested:
                got = kind_of(new) if isinstance(new, Tensor) else type(new).__name__
                raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {got}")
            if tuple(new.shape) != (batch, kv_heads, n_new, width):
                raise ValueError(f"{name}: expected shape {(batch, kv_heads, 'n_new', width)}, got {tuple(new.shape)}")
            if new.device != q.device:
                raise ValueError(f"{name}: expected the device of q, {q.device}, got {new.device}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k_new, v_new)):
        raise ValueError("q: expected no gradient, a cache has none; use torch.no_grad(), or ops.attention to train")
    if k_new is not None:
        _check_writable(k_cache, v_cache)
    if pairs not in PAIRS:
        raise ValueError(f"pairs: expected one of {', '.join(PAIRS)}, got {pairs!r}")
    if cos_sin is not None:
        check_optional("cos_sin", cos_sin)
        if cos_sin.dtype != torch.float32 or cos_sin.dim() != 2 or cos_sin.shape[1] % 2 or cos_sin.shape[1] > head_dim:
            raise ValueError(
                f"cos_sin: expected float32 [positions, rope_dim] of rope_table, rope_dim at most {head_dim}, "
                f"got {cos_sin.dtype} {tuple(cos_sin.shape)}"
            )
        if cos_sin.device != q.device:
            raise ValueError(f"cos_sin: expected the device of q, {q.device}, got {cos_sin.device}")
        cos_sin = cos_sin.contiguous()
    if batch and values_are_known(cache_lens):
        _check_values(cache_lens, block_table, k_cache, capacity, n_new, n_q, cos_sin)
    if scale is None:
        scale = head_dim**-0.5
    check_finite("scale", scale)
    lens = cache_lens.to(torch.int32).contiguous()
    table = None if block_table is None else block_table.to(torch.int32).contiguous()
    slopes = check_slopes(alibi_slopes, batch, heads, q.device)
    return lens, table, cos_sin, slopes, (float(scale), check_softcap(softcap))


def _check_writable(k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache is v_cache:
        raise ValueError("v_cache: expected memory of its own to write to, got k_cache")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected no gradient, because it is written; use torch.no_grad()")
        if any(stride == 0 and size > 1 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{name}: expected memory for every element to write to, got an expanded tensor, strides "
                f"{cache.stride()}; clone it"
            )


def _check_ints(name: str, value: Tensor, device: torch.device) -> None:
    check_ints(name, value)
    if value.device != device:
        raise ValueError(f"{name}: expected the device of q, {device}, got {value.device}; move one to the other")


def _check_values(lens, block_table, k_cache, capacity, n_new, n_q, cos_sin) -> None:
    held = lens.tolist()
    for b, length in enumerate(held):
        if length < 0 or length + n_new > capacity:
            raise ValueError(
                f"cache_lens: sequence {b} would hold {length} + {n_new} positions, expected 0 to {capacity}, "
                "the capacity; give it a larger cache"
            )
        if cos_sin is not None and (length + n_new > cos_sin.shape[0] or length + n_new < n_q):
            raise ValueError(
                f"cos_sin: expected positions 0 to {cos_sin.shape[0] - 1}, those of the table, got "
                f"{length + n_new - n_q} to {length + n_new - 1} for sequence {b}"
            )
    if block_table is not None and values_are_known(block_table):
        size, blocks = k_cache.shape[2], k_cache.shape[0]
        for b, row in enumerate(block_table.tolist()):
            for i in row[: -(-(held[b] + n_new) // size) if size else 0]:
                if not 0 <= i < blocks:
                    raise ValueError(f"block_table: expected blocks 0 to {blocks - 1}, got {i} for sequence {b}")
