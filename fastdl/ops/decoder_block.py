"""A whole stack of decoder blocks in one call: contract of the room `decoder_block`.

One op computes all layers for the new tokens of one sequence and writes their keys and values into the KV cache, so
that a token costs Python three op calls (embedding, this, the head) and not four hundred. The maths is
fastdl/reference/decoder_block.py.

| back end | status |
| --- | --- |
| cpu | csrc/cpu/decoder_block*; float16 cache, float32 x, packed weights |
| torch | the reference, on GGUF or packed weights; float16 or float32 cache; matrices are decoded at every call: slow |
| cuda, triton | not in this release |

What the cpu back end refuses: a cache that is not float16 (its attention reads half precision; float32 would double the
traffic), weights in GGUF layout (the kernels read panels: `QuantTensor.pack_()`), caches and rope tables that are not
contiguous, heads whose size is no multiple of 16 or above 512 (a head is whole vectors of 16 floats).
Inference only: the cache is written in place, there is no gradient.

Test: pytest tests/test_decoder_block.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend as backends
from .._library import LIB, define
from ..quant.tensor import QuantTensor
from ..reference import decoder_block as reference
from .quant_matmul import ACTIVATIONS, auto_activation, quant_matmul

define(
    "decoder_blocks(Tensor x, Tensor[] weights, int[] formats, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rope, "
    "Tensor? output_norm, int pos, int n_heads, int n_kv_heads, int head_dim, int ff_dim, float eps, "
    "int activation) -> Tensor"
)


@torch.library.register_fake("fastdl::decoder_blocks", lib=LIB)
def _(x, *_rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _refuse_cpu(*, head_dim: int | None = None, **facts) -> str | None:
    if head_dim is not None and (head_dim % 16 or head_dim > 512):
        return f"head_dim is {head_dim}; its attention takes multiples of 16 up to 512"
    return None


backends.register_room("decoder_blocks", {"cpu": _refuse_cpu})


@dataclass
class DecoderLayer:
    """The weights of one layer, in the order the native op takes them.

    attn_norm, ffn_norm: float32 [width]. q [n_heads * head_dim, width], k and v [n_kv_heads * head_dim, width],
    o [width, n_heads * head_dim], gate and up [ff_dim, width], down [width, ff_dim]: QuantTensor. Rows of q and k (and
    their biases) stand in the order of interleaved RoPE pairs. bias_q, bias_k, bias_v: float32 [rows] or None.
    """

    attn_norm: Tensor
    q: QuantTensor
    k: QuantTensor
    v: QuantTensor
    o: QuantTensor
    ffn_norm: Tensor
    gate: QuantTensor
    up: QuantTensor
    down: QuantTensor
    bias_q: Tensor | None = None
    bias_k: Tensor | None = None
    bias_v: Tensor | None = None


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class DecoderStack:
    """Layers and sizes of a decoder, checked once, so that `decoder_blocks` has little left to check at each token.

    Parameters
    ----------
    layers: DecoderLayer, at least one, all of the same sizes.
    n_heads, n_kv_heads: heads of queries and of keys/values; the first is a multiple of the second.
    head_dim: elements of a head.
    eps: of the RMS norms.
    output_norm: float32 [width], the norm behind the last layer; None leaves it out.

    Raises TypeError or ValueError that name the layer and the weight.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        eps: float,
        output_norm: Tensor | None = None,
    ):
        if not layers:
            raise ValueError("layers: expected at least one layer, got none")
        if n_kv_heads < 1 or n_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_heads: expected a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}")
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim: expected an even number of at least 2, got {head_dim}")
        self.layers = list(layers)
        self.n_heads, self.n_kv_heads, self.head_dim, self.eps = n_heads, n_kv_heads, head_dim, float(eps)
        self.width, self.ff_dim = layers[0].q.shape[1], layers[0].gate.shape[0]
        self.output_norm = output_norm
        for index, layer in enumerate(self.layers):
            self._check(index, layer)
        if output_norm is not None:
            _check_vector("output_norm", output_norm, self.width)
            self.output_norm = output_norm.contiguous()
        self._native: tuple[list[Tensor], list[int]] | None = None

    def _check(self, index: int, layer: DecoderLayer) -> None:
        q_rows, kv_rows, width, ff = (
            self.n_heads * self.head_dim,
            self.n_kv_heads * self.head_dim,
            self.width,
            self.ff_dim,
        )
        shapes = {"q": (q_rows, width), "k": (kv_rows, width), "v": (kv_rows, width), "o": (width, q_rows)}
        shapes |= {"gate": (ff, width), "up": (ff, width), "down": (width, ff)}
        for name, shape in shapes.items():
            weight = getattr(layer, name)
            if not isinstance(weight, QuantTensor):
                raise TypeError(f"layers[{index}].{name}: expected a QuantTensor, got {type(weight).__name__}")
            if tuple(weight.shape) != shape:
                raise ValueError(f"layers[{index}].{name}: expected shape {shape}, got {tuple(weight.shape)}")
        for name, size in (
            ("attn_norm", width),
            ("ffn_norm", width),
            ("bias_q", q_rows),
            ("bias_k", kv_rows),
            ("bias_v", kv_rows),
        ):
            vector = getattr(layer, name)
            if vector is not None:
                _check_vector(f"layers[{index}].{name}", vector, size)
            elif name.endswith("norm"):
                raise TypeError(f"layers[{index}].{name}: expected a tensor, got None")

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(getattr(layer, name).nbytes for layer in self.layers for name in MATRICES)

    def pack_(self) -> DecoderStack:
        """Bring all matrices into the CPU kernels' layout, in place."""
        for layer in self.layers:
            for name in MATRICES:
                getattr(layer, name).pack_()
        return self

    def unpacked(self) -> str | None:
        """The name of a matrix that is not in the CPU kernels' layout, or None."""
        if self._native is not None:
            return None
        for index, layer in enumerate(self.layers):
            for name in MATRICES:
                if getattr(layer, name).layout != "panel16":
                    return f"layers[{index}].{name}"
        return None

    def native_arguments(self) -> tuple[list[Tensor], list[int]]:
        """(weights, formats) as the native op takes them, put together once. All matrices must be packed."""
        if self._native is None:
            none = torch.empty(0)
            weights: list[Tensor] = []
            formats: list[int] = []
            for layer in self.layers:
                weights += [layer.attn_norm.contiguous(), layer.q.data, layer.k.data, layer.v.data, layer.o.data]
                weights += [layer.ffn_norm.contiguous(), layer.gate.data, layer.up.data, layer.down.data]
                weights += [none if b is None else b.contiguous() for b in (layer.bias_q, layer.bias_k, layer.bias_v)]
                formats += [getattr(layer, name).fmt.ggml_id for name in MATRICES]
            self._native = weights, formats
        return self._native


def decoder_blocks(
    x: Tensor,
    stack: DecoderStack,
    k_cache: Tensor,
    v_cache: Tensor,
    rope: Tensor,
    *,
    pos: int = 0,
    activation: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Run new tokens of one sequence through all layers of a decoder; their keys and values are added to the cache.

    Parameters
    ----------
    x: float32 [n, width], the embeddings of the tokens at positions pos .. pos + n - 1.
    stack: DecoderStack.
    k_cache, v_cache: float16 (torch back end: float32 too) [layers, n_kv_heads, max_len, head_dim], contiguous.
        Positions before pos are read, pos .. pos + n - 1 are written.
    rope: float32 [at least pos + n, rope_dim] from `rope_table`, rope_dim <= head_dim.
    pos: how many tokens the cache holds already.
    activation: "auto", "int8", "bf16" or "fp32", as in `quant_matmul`; auto is `auto_activation(level, float32, n)`.
    backend: "cpu", "torch", or None for the automatic choice.

    Returns
    -------
    float32 [n, width]: the state after the last layer, normed when the stack has an output norm.

    Raises
    ------
    TypeError, ValueError: shapes, dtypes, or positions beyond the cache or the table.
    fastdl.BackendError: the back end asked for refuses.

    Source: Touvron et al., "LLaMA" (2023).

    Example
    -------
    >>> import torch
    >>> from fastdl import ops
    >>> def matrix(rows, cols):
    ...     return ops.quantize(torch.randn(rows, cols) / cols**0.5, "q8_0")
    >>> layer = ops.DecoderLayer(
    ...     attn_norm=torch.ones(64), q=matrix(64, 64), k=matrix(32, 64), v=matrix(32, 64), o=matrix(64, 64),
    ...     ffn_norm=torch.ones(64), gate=matrix(96, 64), up=matrix(96, 64), down=matrix(64, 96))
    >>> stack = ops.DecoderStack([layer], n_heads=2, n_kv_heads=1, head_dim=32, eps=1e-5).pack_()
    >>> k_cache, v_cache = torch.zeros(2, 1, 1, 16, 32, dtype=torch.float16)
    >>> ops.decoder_blocks(torch.randn(3, 64), stack, k_cache, v_cache, ops.rope_table(32, 1e4, 16), pos=0).shape
    torch.Size([3, 64])
    """
    _check_call(x, stack, k_cache, v_cache, rope, pos, activation)
    if backend != "torch":
        chosen = backends.choose(
            "decoder_blocks", backend, device=x.device, dtype=x.dtype, head_dim=stack.head_dim,
            refusals=_refusals(stack, k_cache, v_cache, rope),
        )  # fmt: skip
    else:
        chosen = "torch"
    if chosen == "cpu":
        if activation == "auto":
            activation = auto_activation(backends.cpu_level(), x.dtype, x.shape[0])
        return torch.ops.fastdl.decoder_blocks(
            x, *stack.native_arguments(), k_cache, v_cache, rope, stack.output_norm, pos,
            stack.n_heads, stack.n_kv_heads, stack.head_dim, stack.ff_dim, stack.eps, ACTIVATIONS[activation],
        )  # fmt: skip

    def matmul(h: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
        return quant_matmul(h, weight, bias, activation=activation, backend="torch")

    return reference.decoder_blocks(
        x, stack.layers, k_cache, v_cache, rope, stack.output_norm, pos,
        stack.n_heads, stack.n_kv_heads, stack.head_dim, stack.eps, matmul,
    )  # fmt: skip


def _refusals(stack: DecoderStack, k_cache: Tensor, v_cache: Tensor, rope: Tensor) -> dict[str, str]:
    if k_cache.dtype != torch.float16:
        return {"cpu": f"the KV cache is {k_cache.dtype}; its attention reads float16"}
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and rope.is_contiguous()):
        return {"cpu": "k_cache, v_cache and rope must be contiguous"}
    name = stack.unpacked()
    if name is not None:
        return {"cpu": f"{name} is in GGUF layout; call stack.pack_()"}
    return {}


def _check_vector(name: str, vector: Tensor, size: int) -> None:
    if vector.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {vector.dtype}")
    if vector.shape != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(vector.shape)}")


def _check_call(
    x: Tensor, stack: DecoderStack, k_cache: Tensor, v_cache: Tensor, rope: Tensor, pos: int, activation: str
) -> None:
    if not isinstance(stack, DecoderStack):
        raise TypeError(f"stack: expected a DecoderStack, got {type(stack).__name__}")
    if activation != "auto" and activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected auto, int8, bf16 or fp32, got {activation!r}")
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected float32, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != stack.width:
        raise ValueError(f"x: expected [n, {stack.width}], got {tuple(x.shape)}")
    n = x.shape[0]
    shape = k_cache.shape
    if len(shape) != 4 or shape[0] != len(stack.layers) or shape[1] != stack.n_kv_heads or shape[3] != stack.head_dim:
        raise ValueError(
            f"k_cache: expected [{len(stack.layers)}, {stack.n_kv_heads}, max_len, {stack.head_dim}], "
            f"got {tuple(shape)}"
        )
    if v_cache.shape != shape:
        raise ValueError(f"v_cache: expected the shape of k_cache {tuple(shape)}, got {tuple(v_cache.shape)}")
    if k_cache.dtype not in (torch.float16, torch.float32) or v_cache.dtype != k_cache.dtype:
        raise TypeError(
            f"k_cache, v_cache: expected float16 or float32, both the same, got {k_cache.dtype} and {v_cache.dtype}"
        )
    if pos < 0 or pos + n > shape[2]:
        raise ValueError(f"pos: tokens {pos} .. {pos + n - 1} do not fit in a cache of {shape[2]}")
    if rope.dtype != torch.float32:
        raise TypeError(f"rope: expected float32, got {rope.dtype}")
    if rope.dim() != 2 or rope.shape[0] < pos + n or rope.shape[1] % 2 or not 2 <= rope.shape[1] <= stack.head_dim:
        raise ValueError(
            f"rope: expected [at least {pos + n}, even, at most {stack.head_dim}] (see rope_table), "
            f"got {tuple(rope.shape)}"
        )
