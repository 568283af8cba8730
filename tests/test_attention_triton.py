"""Room attention, Triton back end: what the contract test does not reach, loops over several tiles of queries and keys.
Interpreted without a GPU, for real with one."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastdl.kernels import configs
from fastdl.reference import attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.lane("gpu" if DEVICE == "cuda" else "triton interpreted", "attention"),
]


def compare(sizes, *, bias=None, lens=None, cu=(None, None), slopes=None, p=0.0, softcap=0.0, left=-1, right=-1):
    """Both ops against the reference. sizes: batch, heads, kv_heads, n_q, n_k, d, d_v; bias: its shape."""
    from fastdl.kernels import attention

    torch.manual_seed(0)
    batch, heads, groups, n_q, n_k, d, d_v = sizes
    q, k, v = (
        torch.randn(batch, n, h, width, device=DEVICE).transpose(1, 2)
        for n, h, width in ((n_q, heads, d), (n_k, groups, d), (n_k, groups, d_v))
    )
    bias = None if bias is None else torch.randn(bias, device=DEVICE)
    seed = torch.tensor([11], device=DEVICE) if p else None
    ends = [None if t is None else torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in cu]
    rest = (None, lens, *ends, slopes, seed, p, d**-0.5, softcap, left, right)
    results = attention.attention_forward(q, k, v, bias, *rest)
    wanted = out, lse = reference.attention_forward(q, k, v, bias, *rest)
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    given = (grad, grad_lse, q, k, v, out, lse, bias, *rest, bias is not None)
    results += attention.attention_backward(*given)
    wanted += reference.attention_backward(*given)
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv", "dbias"), results, wanted, strict=True):
        steps = [[step for n, step in zip(t.shape, t.stride(), strict=True) if n > 1] for t in (ours, theirs)]
        assert ours.shape == theirs.shape and steps[0] == steps[1], name
        if theirs.numel():
            scale = float(theirs.nan_to_num(posinf=0, neginf=0).abs().max())
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * max(1.0, scale), msg=name)


@pytest.mark.parametrize(("left", "right"), [(10, 5), (40, 0), (-1, 3), (20, -1), (0, 0)], ids=str)
def test_windows_over_several_tiles(left, right):
    """Tiles before the window, on its left edge, inside, on its right edge and behind it."""
    compare((1, 1, 1, 90, 100, 16, 16), left=left, right=right)
    compare((1, 1, 1, 100, 60, 16, 16), left=left, right=right)


@pytest.mark.parametrize(
    "shape", [(1, 2, 50, 40), (2, 1, 50, 40), (1, 1, 50, 1), (2, 2, 1, 40), (2, 1, 1, 40), (1, 1, 1, 1)]
)
def test_every_shape_of_bias(shape):
    compare((2, 2, 1, 50, 40, 16, 24), bias=shape, softcap=3.0, right=4)


def test_options_over_several_tiles():
    lens = torch.randint(0, 41, (2, 50), dtype=torch.int32, device=DEVICE)
    slopes = torch.rand(2, 2, device=DEVICE)
    compare((2, 2, 1, 50, 40, 16, 16), lens=lens, slopes=slopes, p=0.3, left=30, right=9)
    compare((2, 2, 1, 50, 40, 16, 16), lens=torch.tensor([0, 37], dtype=torch.int32, device=DEVICE), right=20)


def test_packed_sequences_over_several_tiles():
    """Empty ones, ones that end in a tile's middle, one that has several tiles; more sequences than tiles."""
    ends = ([0, 0, 37, 40, 90], [0, 5, 20, 70, 100])
    compare((1, 2, 1, 90, 100, 16, 16), cu=ends, right=0)
    compare((1, 2, 1, 90, 100, 16, 16), cu=ends, left=4, right=2, p=0.2)
    compare((1, 2, 2, 7, 7, 16, 16), cu=(list(range(8)), list(range(8))))


def test_the_table():
    """Every kernel of the room has every width; tiles of scores are of a size that products take."""
    names = [name for name in configs.kernels() if name.startswith("attention_") and "decode" not in name]
    for name in names:
        assert configs.blocks(name) == (32, 64, 128, 256), name
        for cc in (None, *configs.ARCHITECTURES):
            for block in configs.blocks(name):
                found = configs.config(name, cc, block)
                assert found.rows >= 16 and (found.keys >= 8 or "delta" in name), (name, cc, block)
    assert configs.config("attention_forward", 75, 64) == configs.config("attention_forward_float32", 80, 64)
