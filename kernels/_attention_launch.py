"""How the Triton kernels of room attention are launched: a call's arguments by name, configurations, cases to compile
(contract: fastdl/ops/attention.py; meaning of the arguments: fastdl/reference/attention.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from ._common import Case, capability, case, dropout_scale
from .configs import Config, block_for, blocks, config


def table(kernel: str, dtype: torch.dtype, split: bool = True) -> str:
    """The entry of kernels/configs.py. float32 has tiles of its own, because its products are sums in registers, and so
    have calls with options that take registers for themselves."""
    return f"attention_{kernel}{'_float32' if dtype == torch.float32 else '' if split else '_options'}"


def chosen(kernel: str, given: Mapping[str, Any]) -> Config:
    """given: as `arguments` gives it."""
    q = given["q"]
    name = table(kernel, q.dtype, given["SPLIT"] or kernel == "dbias")
    return config(name, capability(q.device), block_for(name, max(given["d"], given["d_v"])))


def block(cols: int) -> int:
    """The tile that holds a row of cols elements."""
    return max(32, triton.next_power_of_2(cols))


def plain(t: Tensor) -> Tensor:
    """t [B, H, n, D] with elements of a row side by side, and offsets within a tile of up to 256 rows in 32 bits."""
    return t if t.stride(3) == 1 and t.stride(2) < 2**23 else t.contiguous()


def strides(name: str, t: Tensor | None, letters: str) -> dict[str, int]:
    """{"q_b": distance between batches, ...}; 0 where a dimension is broadcast."""
    if t is None:
        return {f"{name}_{letter}": 0 for letter in letters}
    found = zip(letters, t.shape, t.stride(), strict=False)
    return {f"{name}_{letter}": 0 if size == 1 else stride for letter, size, stride in found}


def arguments(
    q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed, p, scale, softcap, left, right
) -> dict[str, Any]:  # fmt: skip
    """Arguments by name that all kernels take, from those of the ops (fastdl/reference/attention.py)."""
    (_, heads, n_q, d), (_, groups, n_k, d_v) = q.shape, v.shape
    q, k, v = plain(q), plain(k), plain(v)
    mask = None if mask is None else mask.view(torch.uint8)
    cu_q, cu_k = (None if t is None else t.contiguous() for t in (cu_q, cu_k))
    slopes = None if slopes is None else slopes.contiguous()
    found = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask, "lens": lens, "cu_q": cu_q, "cu_k": cu_k}
    found |= {"slopes": slopes, "seed": seed}
    found |= strides("q", q, "bhn") | strides("k", k, "bhn") | strides("v", v, "bhn")
    found |= strides("bias", bias, "bhqk") | strides("mask", mask, "bhqk")
    found |= {"lens_b": 0, "lens_q": 0} | strides("lens", lens, "bq")
    found |= {"slopes_b": 0 if slopes is None or slopes.shape[0] == 1 else heads}
    found |= {"heads": heads, "group": heads // max(groups, 1), "n_q": n_q, "n_k": n_k, "d": d, "d_v": d_v}
    found |= {"sequences": 1 if cu_q is None else cu_q.shape[0] - 1}
    far = n_q + n_k  # as good as unlimited, and sums of it stay in 32 bits
    found |= {"left": min(left, far), "right": min(right, far), "p": p, "kept": dropout_scale(p)}
    log2e = math.log2(math.e)
    found |= {"factor": scale / softcap if softcap > 0 else scale * log2e, "cap": softcap * log2e}
    found |= {"LEFT": left >= 0, "RIGHT": right >= 0, "SOFTCAP": softcap > 0}
    found |= {"QUERY_LENS": lens is not None and lens.dim() == 2}
    # Tiles that are seen whole have a loop of their own, without comparisons, where these are much of the work.
    plain_scores = bias is None and mask is None and slopes is None and softcap <= 0
    found |= {"SPLIT": plain_scores and seed is None and not found["QUERY_LENS"]}
    found |= {"EVEN_D": d == block(d), "EVEN_V": d_v == block(d_v), "BLOCK_D": block(d), "BLOCK_V": block(d_v)}
    return found


def tiles_of(rows: int, size: int, cu: Tensor | None) -> int:
    """Tiles of ``size`` rows that are launched for a plane; packed sequences: see sequence_of."""
    return triton.cdiv(rows, size) if cu is None else rows // size + cu.shape[0] - 1


# ---- Cases to compile -----------------------------------------------------------------------------------------------

_NARROW = dict.fromkeys(("q", "k", "v", "bias", "out", "grad", "dq", "dk", "dv"), "narrow")
_TYPES = _NARROW | {"mask": "*u8", "lens": "*i32", "cu_q": "*i32", "cu_k": "*i32", "seed": "*i64"}
_TYPES |= dict.fromkeys(("lse", "slopes", "delta", "dlse", "dbias"), "*fp32")
_TYPES |= dict.fromkeys(("p", "kept", "factor", "cap", "scale"), "fp32")
_SWITCHES = ("LEFT", "RIGHT", "SOFTCAP", "QUERY_LENS", "SPLIT", "EVEN_D", "EVEN_V")
_NONE: dict[str, Any] = dict.fromkeys(("bias", "mask", "lens", "cu_q", "cu_k", "slopes", "seed", "dlse"))
_NONE |= dict.fromkeys(_SWITCHES, False) | {"EVEN_D": True, "EVEN_V": True}
CAUSAL = {**_NONE, "SPLIT": True, "RIGHT": True}
PACKED = {key: value for key, value in CAUSAL.items() if key not in ("cu_q", "cu_k")}
OPTIONS = {"cu_q": None, "cu_k": None, **dict.fromkeys(_SWITCHES, True), "SPLIT": False, "EVEN_D": False}


def kernel_cases(kernel: Any, cc: int) -> Iterator[Case]:
    """Every tile of a kernel: causal, and with every option but packed sequences, which the narrowest has alone."""
    for dtype in ("*fp16" if cc < 80 else "*bf16", "*fp32"):
        types = {key: _TYPES.get(key, "i32") for key in kernel.arg_names}
        types = {key: dtype if kind == "narrow" else kind for key, kind in types.items()}
        for note, constants in (("causal", CAUSAL), ("options", OPTIONS), ("packed", PACKED)):
            if ("cap" not in types and note != "options") or ("dbias" in types and note != "options"):
                continue
            wide = torch.float32 if dtype == "*fp32" else torch.float16
            name = table(kernel.__name__, wide, constants["SPLIT"] or "SPLIT" not in kernel.arg_names)
            for width in blocks(name)[: 1 if note == "packed" else None]:
                c = config(name, cc, width)
                tile = {**constants, "BLOCK_D": width, "BLOCK_V": width, "KEYS": c.keys}
                yield case(name, kernel, types, width, c, tile, note)
