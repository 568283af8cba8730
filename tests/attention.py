"""What the tests of room attention share: inputs, options, and attention with whole matrices to compare with."""

from __future__ import annotations

import itertools
import zlib

import torch

from fastdl import ops
from fastdl.reference import philox

F = torch.nn.functional
SEED = 11
# batch, heads, kv_heads, n_q, n_k, head_dim, d_v
SMALL = (2, 4, 2, 9, 13, 16, 16)
# Every option, as it is given to ops.attention for shape s on a device; of a bias its shape.
OPTIONS = {
    "causal": lambda s, device: {"causal": True},
    "scale": lambda s, device: {"scale": 0.3},
    "scale below 0": lambda s, device: {"scale": -0.2},
    "scale of 0": lambda s, device: {"scale": 0.0},
    "bias": lambda s, device: {"bias": (s[0], s[1], s[3], s[4])},
    "bias of heads": lambda s, device: {"bias": (1, s[1], s[3], s[4])},
    "bias of keys": lambda s, device: {"bias": (s[0], 1, 1, s[4])},
    "bias of pairs": lambda s, device: {"bias": (s[3], s[4])},
    "mask": lambda s, device: {"mask": torch.rand(s[0], s[1], s[3], s[4], device=device) < 0.6},
    "mask of keys": lambda s, device: {"mask": torch.rand(s[0], 1, 1, s[4], device=device) < 0.6},
    "mask of pairs": lambda s, device: {"mask": torch.rand(s[3], s[4], device=device) < 0.6},
    "lens": lambda s, device: {"valid_lens": torch.randint(0, s[4] + 1, (s[0],), device=device)},
    "lens of queries": lambda s, device: {"valid_lens": torch.randint(0, s[4] + 1, (s[0], s[3]), device=device)},
    "window": lambda s, device: {"window": (3, 2)},
    "window to the left": lambda s, device: {"window": (4, -1)},
    "softcap": lambda s, device: {"softcap": 1.5},
    "alibi": lambda s, device: {"alibi_slopes": torch.rand(s[1], device=device)},
    "alibi of sequences": lambda s, device: {"alibi_slopes": torch.rand(s[0], s[1], device=device)},
    "dropout": lambda s, device: {"dropout_p": 0.3},
    "lse": lambda s, device: {"return_lse": True},
    "heads inside": lambda s, device: {},
}
PAIRS = [
    (a, b)
    for a, b in itertools.combinations(OPTIONS, 2)
    if a.split()[0] != b.split()[0]  # two of one kind
]


def dtypes_of(lane, case):
    """The lane's dtypes; emulated one of the two of 16 bits, whose kernels are one template. Which, says the case."""
    if lane.name != "emulated cuda":
        return lane.dtypes
    return lane.dtypes[0], lane.dtypes[1 + zlib.crc32(str(case).encode()) % 2]


def make(shape, dtype, device="cpu", *, inside=False, grad=True):
    """q, k, v"""
    batch, heads, kv_heads, n_q, n_k, head_dim, d_v = shape
    made = []
    for h, n, d in ((heads, n_q, head_dim), (kv_heads, n_k, head_dim), (kv_heads, n_k, d_v)):
        size = (batch, n, h, d) if inside else (batch, h, n, d)
        t = torch.randn(size, device=device).to(dtype)
        made.append((t.transpose(1, 2) if inside else t).requires_grad_(grad))
    return made


def given(shape, names, dtype, device="cpu"):
    """Tensors with gradients (q, k, v, perhaps bias) and the other arguments."""
    options = {}
    for name in names:
        options |= OPTIONS[name](shape, device)
    tensors = make(shape, dtype, device, inside="heads inside" in names)
    if "bias" in options:
        tensors.append(torch.randn(options.pop("bias"), device=device).to(dtype).requires_grad_())
    return tensors, options


def ours(backend, options):
    def call(q, k, v, bias=None):
        torch.manual_seed(SEED)
        return ops.attention(q, k, v, bias=bias, backend=backend, **options)

    return call


def seen_by(shape, options, device):
    """bool, broadcastable to [batch, heads, n_q, n_k]"""
    batch, _, _, n_q, n_k, _, _ = shape
    ahead = torch.arange(n_k, device=device) - (torch.arange(n_q, device=device)[:, None] + n_k - n_q)
    left, right = options.get("window") or (-1, -1)
    seen = torch.ones(n_q, n_k, dtype=torch.bool, device=device)
    if options.get("causal"):
        seen &= ahead <= 0
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    seen = seen.expand(batch, 1, n_q, n_k)
    if (lens := options.get("valid_lens")) is not None:
        seen = seen & (torch.arange(n_k, device=device) < lens.view(batch, 1, -1, 1))
    if (mask := options.get("mask")) is not None:
        seen = seen & mask
    return seen


def torchs(shape, options):
    """torch's two ways: scaled_dot_product_attention, and its own matrix products and softmax."""
    return [whole(shape, options), whole(shape, options, fused=False)]


def whole(shape, options, fused=True):
    """The same with matrices of all scores: torch's scaled_dot_product_attention where it has the option."""

    def call(q, k, v, bias=None):
        batch, heads, kv_heads, n_q, n_k, head_dim, _ = shape
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        seen = seen_by(shape, options, q.device).expand(batch, heads, n_q, n_k)
        blind = ~seen.any(-1, keepdim=True)
        open_ = seen | blind  # rows without keys see all, so that nothing is NaN, and are zeroed in the end
        add = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
        if (slopes := options.get("alibi_slopes")) is not None:
            ahead = torch.arange(n_k, device=q.device) - (torch.arange(n_q, device=q.device)[:, None] + n_k - n_q)
            slopes = slopes.to(q.dtype if q.dtype == torch.float64 else torch.float32)
            add = add - (slopes.view(-1, heads, 1, 1) * ahead.abs()).to(q.dtype)
        scale = options.get("scale", head_dim**-0.5)
        cap, p, lse = options.get("softcap"), options.get("dropout_p", 0.0), options.get("return_lse")
        additive = add.expand(batch, heads, n_q, n_k).masked_fill(~open_, -torch.inf)
        fast = fused and not cap and not p and n_k
        if fast:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=additive, scale=scale)
        scores = scale * (q @ k.transpose(-1, -2))
        scores = (cap * torch.tanh(scores / cap) if cap else scores) + additive
        if not fast:
            weights = torch.softmax(scores, -1)
            if p:
                torch.manual_seed(SEED)
                seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device)
                weights = philox.dropout(weights, seed, p)
            out = weights @ v
        out = torch.where(blind, torch.zeros_like(out), out)
        if not lse:
            return out
        wide = scores if scores.dtype == torch.float64 else (scale * (q.float() @ k.float().transpose(-1, -2)))
        if wide is not scores:
            wide = (cap * torch.tanh(wide / cap) if cap else wide) + additive.float()
        row = torch.logsumexp(wide, -1) if n_k else wide.new_full(wide.shape[:-1], -torch.inf)
        return out, torch.where(blind.squeeze(-1), torch.full_like(row, -torch.inf), row)

    return call
