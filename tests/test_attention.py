"""Room attention in every lane, against scaled_dot_product_attention by the rule of fastdl.testing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attention import OPTIONS, PAIRS, SMALL, dtypes_of, given, make, ours, torchs, whole
from lanes import op_of

from fastdl import BackendError, explain, ops
from fastdl.ops.attention import BACKWARD, FORWARD
from fastdl.reference import attention as reference
from fastdl.testing import check, poisoned

F = torch.nn.functional
SHAPES = [  # batch, heads, kv_heads, n_q, n_k, head_dim, d_v
    (2, 3, 3, 1, 1, 16, 16),
    (2, 4, 2, 5, 7, 16, 16),
    (2, 3, 1, 1, 129, 64, 64),
    (1, 2, 2, 33, 70, 64, 64),
    (1, 3, 1, 17, 130, 32, 24),
    (1, 2, 1, 66, 64, 128, 128),
    (1, 1, 1, 3, 300, 80, 80),
    (1, 2, 2, 40, 19, 5, 37),
    (1, 1, 1, 18, 21, 256, 256),
]
EMPTY = [(0, 2, 1, 3, 4, 16, 16), (2, 2, 1, 0, 5, 16, 16), (2, 2, 1, 5, 0, 16, 16), (1, 0, 1, 3, 3, 16, 16)]
LONG = [(1, 2, 1, 150, 700, 64, 64), (2, 1, 1, 500, 260, 32, 32)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(lane, shape, causal):
    """O, lse and all gradients."""
    for dtype in dtypes_of(lane, (shape, causal)):
        tensors, options = given(shape, ("lse", "causal") if causal else ("lse",), dtype, lane.device)
        check(ours(lane.backend, options), tensors, peer=torchs(shape, options))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(lane, shape):
    """No batch, no queries, no keys, no heads: a query without keys gives 0."""
    tensors, options = given(shape, ("lse",), torch.float32, lane.device)
    check(ours(lane.backend, options), tensors, peer=torchs(shape, options))


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_many_blocks(lane, shape):
    if lane.name in ("emulated cuda", "triton interpreted"):
        pytest.skip("minutes without a GPU; test_contract crosses blocks too")
    for dtype in lane.dtypes:
        for names in (("causal",), ("window", "bias of heads"), ("lens", "mask")):
            tensors, options = given(shape, names, dtype, lane.device)
            if "window" in names:
                options["window"] = (100, 60)
            check(ours(lane.backend, options), tensors, peer=torchs(shape, options))


def test_wide_heads(lane):
    """Over 256, which kernels for GPUs refuse."""
    shape = (1, 2, 1, 3, 5, 300, 272)
    tensors, options = given(shape, ("lse",), torch.float32, lane.device)
    if lane.backend in ("cuda", "triton"):
        with pytest.raises(BackendError, match="head_dim 300"):
            ours(lane.backend, options)(*tensors)
    else:
        check(ours(lane.backend, options), tensors, peer=torchs(shape, options))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(lane, name):
    """Each option alone, all gradients."""
    shapes = [SMALL, (1, 2, 1, 35, 66, 24, 40)]
    for shape in shapes[:1] if lane.name == "triton interpreted" else shapes:
        for dtype in dtypes_of(lane, name):
            tensors, options = given(shape, (name,), dtype, lane.device)
            check(ours(lane.backend, options), tensors, peer=torchs(shape, options))


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_pairs(lane, pair):
    """Every two options together; by norm, because a hundred small cases would meet chance."""
    if lane.name == "triton interpreted" and PAIRS.index(pair) % 8:
        pytest.skip("minutes without a GPU, of which every eighth pair runs")
    tensors, options = given(SMALL, pair, torch.float32, lane.device)
    check(ours(lane.backend, options), tensors, peer=torchs(SMALL, options), norm=True)


def test_float32_bias_of_narrow_tensors(lane):
    for dtype in lane.dtypes[1:]:
        q, k, v = make(SMALL, dtype, lane.device)
        bias = torch.randn(1, 4, 9, 13, device=lane.device, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "CHUNK", 200)
            found = []
            for backend in (lane.backend, "torch"):
                y = ops.attention(q, k, v, bias=bias, backend=backend)
                found.append((y, *torch.autograd.grad(y, (q, k, v, bias), torch.ones_like(y))))
        assert found[0][4].dtype == torch.float32
        for a, b in zip(*found, strict=True):
            scale = float(b.abs().max())
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=4 * torch.finfo(dtype).eps * max(scale, 1))


# ---- Packed sequences -----------------------------------------------------------------------------------------------

LENGTHS = ([5, 0, 1, 17, 9], [7, 3, 0, 17, 20])


@pytest.mark.parametrize("names", [(), ("causal",), ("window",), ("softcap", "lse"), ("alibi", "causal")], ids="-".join)
def test_packed_sequences(lane, names):
    """Each sequence alone gives the same: outputs and gradients."""
    dtype = lane.dtypes[0]
    q, k, v = make((1, 4, 2, sum(LENGTHS[0]), sum(LENGTHS[1]), 32, 16), dtype, lane.device)
    ends = [torch.tensor([0, *lengths], device=lane.device).cumsum(0) for lengths in LENGTHS]
    _, options = given(SMALL, names, dtype, lane.device)

    def packed(q, k, v):
        ends_of = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1].int()}
        return ops.attention(q, k, v, **ends_of, backend=lane.backend, **options)

    def alone(q, k, v):
        outs = []
        for i in range(len(LENGTHS[0])):
            a, b = (slice(int(end[i]), int(end[i + 1])) for end in ends)
            shape = (1, 4, 2, a.stop - a.start, b.stop - b.start, 32, 16)
            outs.append(whole(shape, options)(q[:, :, a], k[:, :, b], v[:, :, b]))
        return tuple(torch.cat(t, 2) for t in zip(*outs, strict=True)) if "lse" in names else torch.cat(outs, 2)

    check(packed, (q, k, v), peer=alone)
    if not names:
        flat = ops.attention(q[0], k[0], v[0], cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], backend=lane.backend)
        assert torch.equal(flat, packed(q, k, v)[0])


@pytest.mark.parametrize("window", [2**29, 2**31 - 1, 2**31, 2**63 - 1, 2**80])
def test_huge_windows_are_no_windows(lane, window):
    """No sum of a position and a window overflows, also where queries stand before the first key."""
    for n_q in (4, 9):
        q, k, v = make((1, 2, 1, n_q, 6, 16, 16), torch.float32, lane.device, grad=False)
        wanted = ops.attention(q, k, v, backend=lane.backend)
        for both in ((window, window), (window, -1), (-1, window)):
            assert torch.equal(ops.attention(q, k, v, window=both, backend=lane.backend), wanted)


def test_packed_dropout_is_the_references(lane):
    q, k, v = make((1, 2, 1, 26, 26, 16, 16), torch.float32, lane.device)
    ends = torch.tensor([0, 9, 9, 26], device=lane.device)
    found = []
    for backend in (lane.backend, "torch"):
        torch.manual_seed(3)
        y = ops.attention(q, k, v, cu_seqlens_q=ends, dropout_p=0.5, backend=backend)
        found.append((y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- What is promised beside the numbers ----------------------------------------------------------------------------


def test_a_row_does_not_depend_on_the_batch(lane):
    """Bit for bit: alone, in a batch, packed, padded."""
    for dtype in lane.dtypes:
        q, k, v = make((3, 4, 2, 20, 45, 32, 32), dtype, lane.device, grad=False)
        batch = ops.attention(q, k, v, causal=True, backend=lane.backend)
        for i in range(3):
            alone = ops.attention(q[i], k[i], v[i], causal=True, backend=lane.backend)
            assert torch.equal(alone, batch[i])
            assert torch.equal(
                ops.attention(q[i, 2:], k[i, 1:], v[i, 1:], causal=True, backend=lane.backend), batch[i, 2:]
            )
        ends = [torch.arange(4, device=lane.device) * n for n in (20, 45)]
        flat = (t.transpose(0, 1).flatten(1, 2) for t in (q, k, v))
        packed = ops.attention(*flat, causal=True, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], backend=lane.backend)
        assert torch.equal(packed.view(4, 3, 20, 32).transpose(0, 1), batch)


def test_strides(lane):
    """Any strides but the last; the result lies in memory as q does."""
    q, k, v = make(SMALL, torch.float32, lane.device, grad=False)
    y = ops.attention(q, k, v, backend=lane.backend)
    wide = torch.randn(2, 9, 3, 16, 4, device=lane.device).permute(0, 4, 1, 2, 3)[:, :, :, 1]
    wide.copy_(q)
    spread = torch.randn(2, 13, 2, 2, 32, device=lane.device).permute(3, 0, 2, 1, 4)[..., :16]
    spread[0].copy_(k)
    spread[1].copy_(v)
    again = ops.attention(wide, spread[0], spread[1], backend=lane.backend)
    assert torch.equal(again, y)
    across = q.transpose(-1, -2).contiguous().transpose(-1, -2)  # the last dimension is not contiguous
    assert torch.equal(ops.attention(across, k, v, backend=lane.backend), y)
    inside = q.transpose(1, 2).contiguous().transpose(1, 2)
    z = ops.attention(inside, k, v, backend=lane.backend)
    assert torch.equal(z, y) and z.transpose(1, 2).is_contiguous()
    five = ops.attention(q.view(1, 2, 4, 9, 16), k[None], v[None], backend=lane.backend)
    assert torch.equal(five[0], y)


@pytest.mark.parametrize("names", [(), ("causal",), ("bias",), ("mask", "softcap")], ids="-".join)
def test_infinity_and_nan(lane, names):
    """-inf in a bias hides a key, +inf and NaN in the scores of a row make that row NaN and no other."""
    q, k, v = make(SMALL, torch.float32, lane.device, grad=False)
    tensors, options = given(SMALL, names, torch.float32, lane.device)
    bias = tensors[3].detach() if len(tensors) > 3 else torch.zeros(2, 4, 9, 13, device=lane.device)
    bias[0, 0, 3] = -torch.inf
    bias[:, :, 4, :5] = -torch.inf
    y, lse = ops.attention(q, k, v, bias=bias, backend=lane.backend, **options, return_lse=True)
    wanted, sums = ops.attention(
        *(
            t.double()
            for t in (
                q,
                k,
                v,
            )
        ),
        bias=bias.double(),
        **options,
        return_lse=True,
    )
    assert not y[0, 0, 3].any() and lse[0, 0, 3] == -torch.inf
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-4, atol=1e-5)
    for value in (torch.inf, torch.nan):
        worse = bias.clone()
        worse[1, 2, 6, 0] = value
        z = ops.attention(q, k, v, bias=worse, backend=lane.backend, **{**options, "mask": None})
        assert z[1, 2, 6].isnan().all()
        z[1, 2, 6] = 0
        assert z.isfinite().all()


HIDDEN = {
    "mask": lambda kept: {"mask": kept[:, None, None]},
    "mask of pairs": lambda kept: {"mask": kept[:, None, None].expand(2, 4, 9, 200)},
    "bias": lambda kept: {"bias": torch.zeros(kept.shape).masked_fill(~kept, -torch.inf)[:, None, None]},
    "mask, softcap": lambda kept: {"mask": kept[:, None, None], "softcap": 2.0},
    "mask, dropout": lambda kept: {"mask": kept[:, None, None], "dropout_p": 0.3},
    "window": lambda kept: {"window": (3, 0)},
    "lens": lambda kept: {"valid_lens": torch.tensor([90, 140])},
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_keys_may_hold_anything(lane, name):
    """NaN and infinities in k and v of keys that no query sees change no bit of outputs and gradients."""
    if lane.backend in ("cuda", "triton") and name not in ("lens",):
        pytest.skip("kernels for GPUs multiply what is hidden by 0")
    kept = torch.ones(2, 200, dtype=torch.bool, device=lane.device)
    kept[0, :5] = kept[1, 50:70] = kept[:, 150:] = False
    options = {
        key: value.to(lane.device) if isinstance(value, torch.Tensor) else value
        for key, value in HIDDEN[name](kept.cpu()).items()
    }
    if name == "lens":
        kept = torch.arange(200, device=lane.device) < options["valid_lens"][:, None]
    elif name == "window":
        kept = (torch.arange(200, device=lane.device) >= 200 - 9 - 3).expand(2, 200)
    for dtype in lane.dtypes[:2]:
        q, k, v = make((2, 4, 2, 9, 200, 16, 24), dtype, lane.device, grad=False)
        expected = None
        for junk in (0.0, torch.nan, torch.inf):
            tensors = [
                q.clone().requires_grad_(),
                *(t.masked_fill(~kept[:, None, :, None], junk).requires_grad_() for t in (k, v)),
            ]
            torch.manual_seed(5)
            y, lse = ops.attention(*tensors, return_lse=True, backend=lane.backend, **options)
            grads = torch.autograd.grad((y, lse), tensors, (torch.ones_like(y), torch.ones_like(lse)))
            found = (y, lse, *grads)
            expected = found if expected is None else expected
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (dtype, junk)


def test_a_hidden_key_may_be_nan_in_every_lane(lane):
    """Of k, whose scores a mask and a bias of -inf replace: outputs, dk, dv and dbias."""
    q, k, v = make(SMALL, torch.float32, lane.device, grad=False)
    kept = torch.ones(2, 1, 1, 13, dtype=torch.bool, device=lane.device)
    kept[0, ..., 2] = kept[1, ..., 7:9] = False
    bias = torch.randn(1, 4, 9, 13, device=lane.device)
    for by_bias, softcap in ((True, None), (False, 2.0)):
        found = []
        for junk in (0.0, torch.nan, -torch.inf):
            worse = k.masked_fill(~kept.view(2, 1, 13, 1), junk).requires_grad_()
            values, term = v.clone().requires_grad_(), bias.expand(2, 4, 9, 13).clone()
            term = (term.masked_fill(~kept, -torch.inf) if by_bias else term).requires_grad_()
            options = {"mask": None if by_bias else kept, "softcap": softcap, "backend": lane.backend}
            y = ops.attention(q, worse, values, bias=term, **options)
            found.append((y, *torch.autograd.grad(y, (worse, values, term), torch.ones_like(y))))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_later_keys_may_hold_anything_on_the_cpu(level, value):
    """A key that other queries of the same block see leaves the rows that do not see it alone, and spoils those that
    do."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = make((1, 2, 1, 40, 140, 16, 16), dtype, grad=False)
        wanted = ops.attention(q, k, v, causal=True, backend="cpu")
        for which in (0, 1):
            worse = [k.clone(), v.clone()]
            worse[which][:, :, 120] = value  # query 20
            tensors = [t.requires_grad_() for t in (q.clone(), *worse)]
            y = ops.attention(*tensors, causal=True, backend="cpu")
            assert torch.equal(y[:, :, :20], wanted[:, :, :20])
            assert not y[:, :, 20:].isfinite().any() or (which == 0 and value == torch.inf)
            (dq,) = torch.autograd.grad(y[:, :, :20].float().sum(), tensors[0])
            assert dq[:, :, :20].isfinite().all()


def test_blind_rows_have_no_gradient(lane):
    q, k, v = make((1, 2, 1, 5, 3, 16, 16), torch.float32, lane.device)
    y, lse = ops.attention(q, k, v, causal=True, return_lse=True, backend=lane.backend)
    assert not y[:, :, :2].any() and (lse[:, :, :2] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad((y, lse), (q, k, v), (torch.ones_like(y), torch.ones_like(lse)))
    assert not dq[:, :, :2].any() and all(t.isfinite().all() for t in (dq, dk, dv))


def test_only_lse_has_a_gradient(lane):
    q, k, v = make(SMALL, torch.float32, lane.device)
    _, lse = ops.attention(q, k, v, return_lse=True, backend=lane.backend)
    dq, dv = torch.autograd.grad(lse.sum(), (q, v), allow_unused=True)
    wanted = torch.autograd.grad(torch.logsumexp(0.25 * q @ k.repeat_interleave(2, 1).transpose(-1, -2), -1).sum(), q)
    torch.testing.assert_close(dq, wanted[0], rtol=1e-4, atol=1e-5)
    assert dv is None or not dv.any()


def test_gradient_of_a_bias_of_queries(lane):
    """A bias that all keys share moves lse alone: its gradient is that of lse."""
    q, k, v = make(SMALL, torch.float32, lane.device)
    bias = torch.randn(4, 9, 1, device=lane.device, requires_grad=True)
    y, lse = ops.attention(q, k, v, bias=bias, return_lse=True, backend=lane.backend)
    (got,) = torch.autograd.grad((y, lse), bias, (torch.ones_like(y), torch.ones_like(lse)))
    torch.testing.assert_close(got, torch.full_like(bias, 2.0), rtol=1e-5, atol=1e-4)


def test_double_backward(lane):
    """Through the lane's backward op: against the reference's, chunk by chunk."""
    grads = []
    for backend in (lane.backend, "torch"):
        torch.manual_seed(0)
        tensors, options = given(
            (1, 2, 1, 6, 7, 16, 16), ("bias of heads", "causal", "softcap"), torch.float32, lane.device
        )
        y = ours(backend, options)(*tensors)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_threads_do_not_change_the_result(level):
    q, k, v = make((2, 4, 2, 70, 150, 32, 32), torch.float32)
    bias = torch.randn(1, 4, 1, 150, requires_grad=True)
    found = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = ops.attention(q, k, v, bias=bias, causal=True, backend="cpu")
            found.append((y, *torch.autograd.grad(y, (q, k, v, bias), torch.ones_like(y))))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_opcheck(lane):
    q, k, v = (t.detach() for t in make((1, 2, 1, 4, 5, 16, 16), torch.float32, lane.device))
    rest = (None, None, None, None, None, None, None, 0.0, 0.25, 0.0, -1, 0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    bias = torch.randn(1, 2, 1, 5, device=lane.device)
    for arguments in ((q, k, v, *rest), (q.requires_grad_(), k, v, bias.requires_grad_(), *rest[1:])):
        torch.library.opcheck(op_of(FORWARD, lane), arguments, test_utils=tests)
    q, bias = q.detach(), bias.detach()
    out, lse = FORWARD["torch"](q, k, v, bias, *rest[1:])
    arguments = (out, lse, q, k, v, out, lse, bias, *rest[1:], True)
    torch.library.opcheck(op_of(BACKWARD, lane), arguments, test_utils=tests)


def test_outputs_lie_as_the_fake_ones(lane):
    """torch.compile plans with the strides of the fake kernel."""
    tensors, options = given(SMALL, ("lse", "heads inside"), torch.float32, lane.device)
    with poisoned():
        real = ours(lane.backend, options)(*tensors)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ours(lane.backend, options)(*(mode.from_tensor(t) for t in tensors))
    assert [t.stride() for t in real] == [t.stride() for t in fake]


def test_compile(lane):
    if lane.name == "triton interpreted":
        pytest.skip("torch.compile cannot trace Triton's interpreter")
    tensors, options = given(SMALL, ("bias of heads", "causal", "lse"), torch.float32, lane.device)
    call = ours(lane.backend, options)

    def plain(q, k, v, bias):
        return ops.attention(q, k, v, bias=bias, backend=lane.backend, **options)

    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*tensors), call(*tensors), strict=True):
        torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(f(*tensors)[0].square().sum(), tensors) for f in (compiled, call))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "names", [(), ("causal", "bias of heads"), ("softcap", "lens", "lse"), ("alibi", "window")], ids="-".join
)
def test_gradcheck(names, monkeypatch):
    """Forward, backward and double backward, whole and in chunks."""
    shape = (1, 2, 1, 3, 4, 2, 3)
    tensors, options = given(shape, names, torch.float64)
    call = ours(None, options)
    assert torch.autograd.gradcheck(call, tensors)
    for chunk in (1 << 22, 8):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        assert torch.autograd.gradgradcheck(call, tensors)


def test_gradcheck_of_packed_sequences():
    q, k, v = (t.double().detach().requires_grad_() for t in make((1, 2, 1, 4, 5, 2, 2), torch.float32))
    ends = torch.tensor([0, 1, 4]), torch.tensor([0, 3, 5])

    def call(q, k, v):
        return ops.attention(q, k, v, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], causal=True)

    assert torch.autograd.gradcheck(call, (q, k, v)) and torch.autograd.gradgradcheck(call, (q, k, v))


def test_transforms_run_the_reference():
    q, k, v = make(SMALL, torch.float32, grad=False)
    mapped = torch.vmap(lambda q, k, v: ops.attention(q, k, v, causal=True))(q, k, v)
    torch.testing.assert_close(mapped, ops.attention(q, k, v, causal=True, backend="torch"), rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(lambda q: ops.attention(q, k, v), (q,), (torch.ones_like(q),))
    assert tangent.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    q, k, v = make(SMALL, torch.float32)
    with torch.autocast("cpu", dtype):
        y = ops.attention(q, k.to(dtype), v)
    assert y.dtype == dtype
    assert torch.autograd.grad(y.float().sum(), q)[0].dtype == torch.float32


def test_explain_names_the_back_end(lane):
    q, k, v = make(SMALL, torch.float32, lane.device)
    if lane.name.startswith("cpu"):
        assert explain("attention", q, backend=lane.backend).choice == "cpu"
    if lane.backend != "torch":
        with pytest.raises(BackendError, match="float64"):
            ops.attention(q.double(), k.double(), v.double(), backend=lane.backend)


# ---- Bad input ------------------------------------------------------------------------------------------------------

Q, K = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 6, 8)
NESTED = torch.nested.nested_tensor([torch.ones(5, 6), torch.ones(5, 6)])
PACKED = {"q": torch.ones(4, 5, 8), "k": torch.ones(2, 5, 8), "v": torch.ones(2, 5, 8)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 3)}, ValueError, r"q: expected \[..., heads, length, head_dim\]"),
        ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ({"k": torch.ones(2, 3, 6, 8), "v": torch.ones(2, 3, 6, 8)}, ValueError, "heads that divides q's 4, got 3"),
        ({"k": torch.ones(2, 2, 6, 7)}, ValueError, "k: expected the head_dim of q, 8, as last dimension, got 7"),
        ({"k": torch.ones(3, 2, 6, 8)}, ValueError, r"k: expected the batch of q, \(2,\), got \(3,\)"),
        ({"v": torch.ones(2, 2, 5, 8)}, ValueError, "v: expected the length of k, 6, as dimension -2, got 5"),
        ({"v": torch.ones(2, 4, 6, 8)}, ValueError, "v: expected the heads of k, 2, as dimension -3, got 4"),
        ({"v": torch.ones(2, 2, 6, 8).half()}, TypeError, "v: expected the dtype of q"),
        ({"k": torch.ones(2, 2, 6, 8, dtype=torch.int8)}, TypeError, "k: expected a dense floating"),
        ({"k": torch.ones(2, 2, 6, 8, device="meta")}, ValueError, "k: expected the device of q"),
        ({"mask": torch.ones(5, 6)}, TypeError, "mask: expected a boolean tensor.*a floating point mask is a bias"),
        ({"mask": torch.ones(5, 7) > 0}, ValueError, r"mask: expected .* broadcast to \(2, 4, 5, 6\), got \(5, 7\)"),
        ({"bias": torch.ones(3, 5, 6)}, ValueError, r"bias: expected .* broadcast to \(2, 4, 5, 6\), got \(3, 5, 6\)"),
        ({"bias": torch.ones(5, 6) > 0}, TypeError, "bias: expected a floating point tensor or None"),
        ({"valid_lens": torch.ones(2)}, TypeError, "valid_lens: expected an int64 or int32 tensor, got torch.float32"),
        ({"valid_lens": torch.ones(3, dtype=torch.long)}, ValueError, r"valid_lens: expected shape \(2,\) or \(2, 5\)"),
        ({"valid_lens": torch.tensor([-1, 3])}, ValueError, "valid_lens: expected values from 0 to 6, .* got -1 to 3"),
        ({"valid_lens": torch.tensor([1, 7])}, ValueError, "valid_lens: expected values from 0 to 6, .* got 1 to 7"),
        ({"window": 3}, TypeError, r"window: expected \(left, right\), two ints"),
        ({"window": (1, -2)}, ValueError, "window: expected numbers of keys, or -1"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a number > 0"),
        ({"softcap": "1"}, TypeError, "softcap: expected a number"),
        ({"softcap": float("inf")}, ValueError, "softcap: expected a number > 0"),
        ({"softcap": 1e-300}, ValueError, "softcap: expected a number > 0"),  # 0 in float32, which would be no cap
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
        ({"scale": 1e300}, ValueError, "scale: expected a finite number"),
        ({"scale": 1j}, TypeError, "scale: expected a number, got complex"),
        ({"causal": torch.ones(5, 6) > 0}, TypeError, "causal: expected True or False, got Tensor"),
        ({"causal": None}, TypeError, "causal: expected True or False, got NoneType"),
        ({"bias": NESTED}, TypeError, "bias: expected a floating point tensor or None, got torch.float32, nested"),
        ({"alibi_slopes": NESTED}, TypeError, "alibi_slopes: expected a floating point tensor or None.*nested"),
        ({"mask": torch.nested.nested_tensor([torch.ones(5, 6) > 0])}, TypeError, "mask: expected a boolean.*nested"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p: expected 0 <= p <= 1"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: expected shape \(4,\) or \(2, 4\)"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, "alibi_slopes: expected constants"),
        ({"cu_seqlens_q": torch.tensor([0, 5])}, ValueError, r"q: expected shape \[heads, total, head_dim\]"),
        (PACKED | {"cu_seqlens_k": torch.tensor([0, 5])}, ValueError, "cu_seqlens_q: expected the ends"),
        (PACKED | {"cu_seqlens_q": torch.tensor([0, 4])}, ValueError, "cu_seqlens_q: expected values from 0 to 5"),
        (PACKED | {"cu_seqlens_q": torch.tensor([0, 4, 3, 5])}, ValueError, "never fall, got 4 before 3"),
        (PACKED | {"cu_seqlens_q": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens_q: expected an int64 or int32"),
        (
            PACKED | {"cu_seqlens_q": torch.tensor([0, 5]), "cu_seqlens_k": torch.tensor([0, 2, 5])},
            ValueError,
            "cu_seqlens_k: expected as many as cu_seqlens_q",
        ),
        (
            PACKED | {"cu_seqlens_q": torch.tensor([0, 5]), "mask": torch.ones(5, 5) > 0},
            ValueError,
            "mask: excluded by cu_seqlens_q",
        ),
        (
            PACKED | {"cu_seqlens_q": torch.tensor([0, 5]), "valid_lens": torch.tensor([5])},
            ValueError,
            "valid_lens: excluded by cu_seqlens_q",
        ),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.attention(**({"q": Q, "k": K, "v": K} | change))


def test_no_compiler_is_needed(native):
    """A process that finds no program at all."""
    code = """
import torch
from fastdl import explain, ops
q = torch.randn(1, 2, 5, 16, requires_grad=True)
y = ops.attention(q, q, q, causal=True)
y.sum().backward()
print(explain("attention", q).choice, bool(q.grad.isfinite().all()))
"""
    done = subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-2:] == ["cpu", "True"], done.stderr
