"""Room additive_attention in every lane, against the tensor [batch, queries, keys, hidden] by the rule of
fastdl.testing."""

from __future__ import annotations

import lanes
import pytest
import torch

from fastdl import BackendError, explain, ops
from fastdl.ops.additive_attention import BACKWARD, FORWARD, POINTER, POINTER_BACKWARD
from fastdl.reference import _chunks
from fastdl.testing import assert_accurate, check

INF = float("inf")
# batch, queries, keys, hidden, d_v: one of each, odd, none of each, tiles and chunks of keys, widths of vectors
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 3),
    (0, 2, 3, 4, 5),
    (2, 0, 3, 4, 5),
    (2, 3, 0, 4, 5),
    (3, 17, 33, 40, 18),
    (2, 5, 70, 130, 64),
    (1, 66, 9, 16, 33),
    (1, 2, 600, 24, 8),
]
OPTIONS = ["plain", "mask", "key mask", "lens", "query lens", "mask and lens", "chosen", "chosen and lens"]


def make(shape, dtype, device="cpu", *, grad=True, scale=1.0):
    """q, k, v, w"""
    batch, queries, keys, hidden, d_v = shape
    sizes = ((batch, queries, hidden), (batch, keys, hidden), (batch, keys, d_v), (hidden,))
    factors = (scale, scale, 1.0, 1.0)
    return tuple(
        (f * torch.randn(size, device=device)).to(dtype).requires_grad_(grad)
        for size, f in zip(sizes, factors, strict=True)
    )


def options_of(name, shape, device="cpu"):
    """Masks and lengths; a row that sees nothing where there are several."""
    batch, queries, keys, *_ = shape
    found = {}
    if name in ("mask", "mask and lens"):
        found["mask"] = torch.rand(batch, queries, keys, device=device) > 0.4
        if queries > 1:
            found["mask"][:, 1] = False
    if name == "key mask":
        found["mask"] = torch.rand(batch, 1, keys, device=device) > 0.4
    if name in ("lens", "mask and lens", "chosen and lens"):
        found["valid_lens"] = torch.arange(batch, device=device) * keys // max(1, batch - 1)
    if name == "query lens":
        found["valid_lens"] = torch.arange(batch * queries, device=device).view(batch, queries) % (keys + 1)
    if name.startswith("chosen"):
        found["chosen"] = torch.rand(batch, keys, device=device) > 0.6
    return found


def allowed_of(shape, *, mask=None, valid_lens=None, chosen=None):
    batch, queries, keys, *_ = shape
    device = next((t.device for t in (mask, valid_lens, chosen) if t is not None), "cpu")
    allowed = torch.ones(batch, queries, keys, dtype=torch.bool, device=device)
    if mask is not None:
        allowed = allowed & mask
    if valid_lens is not None:
        lens = valid_lens if valid_lens.dim() == 2 else valid_lens[:, None]
        allowed = allowed & (torch.arange(keys, device=device) < lens[..., None])
    if chosen is not None:
        allowed = allowed & ~(chosen if chosen.dim() == 3 else chosen[:, None])
    return allowed


class ByOutput(torch.autograd.Function):
    """softmax(s) v whose backward pass takes sum_j p_ij dp_ij as grad_i . out_i, because it has no row of scores."""

    @staticmethod
    def forward(ctx, s, v, allowed):
        p = torch.softmax(s, -1).masked_fill(~allowed, 0.0)
        out = p @ v
        ctx.save_for_backward(p, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        p, v, out = ctx.saved_tensors
        ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
        return ds, p.mT @ grad, None


WAYS = ("products", "sums", "sums reversed", "by output")


def eager(q, k, v, w, *, pointer=False, way=WAYS[0], **options):
    """What one writes with torch; rows that see nothing are set afterwards. Gradients of shifted scores are sums that
    cancel, so what is left of their rounding is taken from several orders of the sums."""
    flipped = way == WAYS[2]
    if flipped:
        k, v = k.flip(1), None if v is None else v.flip(1)
    shape = (*q.shape[:2], k.shape[1])
    allowed = allowed_of(shape, **options).to(q.device)
    allowed = allowed.flip(2) if flipped else allowed
    t = torch.tanh(q[:, :, None] + k[:, None])
    s = t @ w if way in (WAYS[0], WAYS[3]) else (t * w).sum(-1)
    blind = ~allowed.any(-1, keepdim=True)
    s = s.masked_fill(~allowed & ~blind, -INF)
    if pointer:
        logp = torch.log_softmax(s, -1).masked_fill(~allowed, -INF)
        return logp.flip(2) if flipped else logp
    if way == WAYS[3]:
        return ByOutput.apply(s, v, allowed)
    p = torch.softmax(s, -1).masked_fill(~allowed, 0.0)
    return p @ v if way == WAYS[0] else (p[..., None] * v[:, None]).sum(2)


def seen_only(function):
    """Log-probabilities with zeros for -inf, whose gradients nobody weights."""

    def call(*given):
        y = function(*given)
        return torch.where(y == -INF, 0.0, y)

    return call


def small(lane, shape):
    """Triton's interpreter and the emulator run a thread at a time."""
    batch, queries, keys, hidden, d_v = shape
    if lane.name == "triton interpreted":
        return (min(batch, 2), min(queries, 5), min(keys, 35), min(hidden, 20), min(d_v, 18))
    if lane.name == "emulated cuda":
        return (min(batch, 2), min(queries, 18), min(keys, 290), min(hidden, 70), min(d_v, 40))
    return shape


def compare(lane, tensors, options, *, pointer=False):
    if not pointer:
        ours = lambda q, k, v, w: ops.additive_attention(q, k, v, w, **options, backend=lane.backend)  # noqa: E731
        peers = [lambda *given, way=way: eager(*given, way=way, **options) for way in WAYS]
        return check(ours, tensors, peer=peers)
    q, k, _, w = tensors
    call = lambda q, k, w: ops.additive_attention(  # noqa: E731
        q, k, None, w, **options, return_pointer=True, backend=lane.backend
    )
    peers = [
        seen_only(lambda q, k, w, way=way: eager(q, k, None, w, pointer=True, way=way, **options)) for way in WAYS[:3]
    ]
    return check(seen_only(call), (q, k, w), peer=peers)


def dtypes_of(lane, index):
    """Without hardware in two dtypes, in turn."""
    if lane.name in ("emulated cuda", "triton interpreted"):
        return [lane.dtypes[(index + i) % len(lane.dtypes)] for i in range(2)]
    return lane.dtypes


@pytest.mark.parametrize("pointer", [False, True], ids=["attention", "pointer"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(lane, shape, pointer):
    """Outputs and all gradients in every dtype of the lane."""
    index, shape = SHAPES.index(shape), small(lane, shape)
    for dtype in dtypes_of(lane, index + pointer):
        compare(lane, make(shape, dtype, lane.device), {}, pointer=pointer)


@pytest.mark.parametrize("pointer", [False, True], ids=["attention", "pointer"])
@pytest.mark.parametrize("name", OPTIONS[1:])
def test_masks_and_lengths(lane, name, pointer):
    shapes = [(3, 5, 37, 20, 9), (2, 3, 300, 12, 5)]
    if lane.name == "emulated cuda" and name != "mask and lens":
        shapes = shapes[:1]
    for shape in shapes:
        shape = small(lane, shape)
        for dtype in dtypes_of(lane, OPTIONS.index(name))[:2]:
            options = options_of(name, shape, lane.device)
            compare(lane, make(shape, dtype, lane.device), options, pointer=pointer)


@pytest.mark.parametrize("scale", [0.01, 0.3, 4.0, 12.0, 60.0])
def test_ranges(lane, scale):
    """Small numbers, where tanh is nearly linear, and large ones, which saturate or cancel."""
    shape = small(lane, (2, 5, 40, 65, 7))
    for dtype in lane.dtypes[:2]:
        tensors = make(shape, dtype, lane.device, scale=scale)
        compare(lane, tensors, {})
        compare(lane, tensors, {}, pointer=True)


def test_cancelling_sums(lane):
    """q far from 0 and k its opposite but for a little: q + k is what counts."""
    for size in (3.0, 15.0, 30.0, 200.0):
        q, k, v, w = make(small(lane, (2, 4, 20, 33, 6)), torch.float32, lane.device, grad=False)
        sign = torch.where(torch.arange(q.shape[2], device=lane.device) % 2 == 0, size, -size)
        tensors = [t.requires_grad_() for t in (q * 0.5 + sign, k * 0.5 - sign, v, w)]
        compare(lane, tensors, {})


def test_w_in_float32(lane):
    q, k, v, w = make((2, 3, 9, 20, 4), lane.dtypes[1], lane.device, grad=False)
    leaf = (w.float() * 1.001).requires_grad_()
    y = ops.additive_attention(q, k, v, leaf, backend=lane.backend)
    exact = eager(*(t.double() for t in (q, k, v, leaf)))
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(y.float().sum(), leaf)
    assert grad.dtype == torch.float32


def test_fully_masked_rows(lane):
    """Zeros and zero gradients; of pointers -inf and zero gradients, whatever gradient comes in."""
    shape = (2, 3, 6, 8, 4)
    q, k, v, w = make(shape, torch.float32, lane.device)
    mask = torch.ones(2, 3, 6, dtype=torch.bool, device=lane.device)
    mask[0, 1] = False
    y = ops.additive_attention(q, k, v, w, mask=mask, backend=lane.backend)
    assert not y[0, 1].any() and y[0, 0].any()
    grads = torch.autograd.grad(y[0, 1].sum(), (q, k, v, w))
    assert all(not g.any() for g in grads)
    logp = ops.additive_attention(q, k, None, w, mask=mask, return_pointer=True, backend=lane.backend)
    assert (logp[0, 1] == -INF).all() and logp.dtype == torch.float32
    torch.testing.assert_close(logp.exp().sum(-1)[1], torch.ones(3, device=lane.device))
    grads = torch.autograd.grad(logp, (q, k, w), torch.randn_like(logp) * (~mask))
    assert all(not g.any() for g in grads)


def test_masked_keys_are_not_read(lane):
    """NaN and inf in keys and values that no query attends to touch nothing, gradients included."""
    q, k, v, w = make((2, 4, 40, 20, 6), torch.float32, lane.device, grad=False)
    lens = torch.tensor([17, 40], device=lane.device)
    expected = None
    for junk in (0.0, float("nan"), INF):
        k[0, 17:], v[0, 17:] = junk, junk
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, w)]
        y = ops.additive_attention(*leaves, valid_lens=lens, backend=lane.backend)
        found = (y, *torch.autograd.grad(y.square().sum(), leaves))
        logp = ops.additive_attention(
            *leaves[:2], None, leaves[3], valid_lens=lens, return_pointer=True, backend=lane.backend
        )
        found += (logp,)
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_what_a_query_does_not_see_changes_no_bit(lane):
    """Neither padding nor a key that only other queries see chooses how a row is computed."""
    q, k, v, w = make((1, 3, 21, 16, 5), torch.float32, lane.device, grad=False)
    mask = torch.ones(1, 3, 21, dtype=torch.bool, device=lane.device)
    mask[0, 1, 4] = mask[0, 1, 17] = False
    expected = ops.additive_attention(q, k, v, w, mask=mask, backend=lane.backend)
    for junk in (1e-3, 30.0, 1e30, INF):
        k[0, 4], k[0, 17] = junk, -junk
        found = ops.additive_attention(q, k, v, w, mask=mask, backend=lane.backend)
        assert torch.equal(found[0, 1], expected[0, 1])
    lens = torch.tensor([17], device=lane.device)
    k[0, 4] = 0.5
    expected = None
    for junk in (0.0, 30.0, float("nan")):
        k[0, 17:] = junk
        found = ops.additive_attention(q, k, v, w, valid_lens=lens, backend=lane.backend)
        expected = found if expected is None else expected
        assert torch.equal(found, expected)


def test_nan_and_inf(lane):
    """NaN in a query makes its row NaN, in a key that is seen every row of its sequence; infinities saturate tanh, and
    opposite ones make NaN."""
    q, k, v, w = make((2, 3, 20, 16, 5), torch.float32, lane.device, grad=False)
    q[0, 1, 2], k[1, 3, 4] = float("nan"), float("nan")
    y = ops.additive_attention(q, k, v, w, backend=lane.backend)
    assert y[0, 1].isnan().all() and y[1].isnan().all() and y[0, [0, 2]].isfinite().all()
    q, k, v, w = make((1, 3, 20, 16, 5), torch.float32, lane.device, grad=False)
    q[0, 0, 2], k[0, 3, 4], k[0, 5, 6] = INF, INF, -INF
    y = ops.additive_attention(q, k, v, w, backend=lane.backend)
    torch.testing.assert_close(y, eager(q, k, v, w))
    k[0, 7, 2] = -INF
    y = ops.additive_attention(q, k, v, w, backend=lane.backend)
    assert y[0, 0].isnan().all() and y[0, 1:].isfinite().all()


def test_strided_views(lane):
    """Slices, transposed tensors, expanded queries and values."""
    base = torch.randn(24, 3, 40, device=lane.device)
    w = torch.randn(17, device=lane.device)
    views = [
        (base[:5, :, :17].transpose(0, 1), base[5:, :, 3:20].transpose(0, 1), base[5:, :, ::2].transpose(0, 1)),
        (base[::5, :2, :17], base[::5, :, 20:37], base[::5, :, :1].expand(-1, -1, 6)),
        (base[:1, :, 1:18].expand(4, -1, -1), base[:12].view(4, 9, 40)[:, :, 2:36:2], base[:12].view(4, 9, 40)),
    ]
    for q, k, v in views:
        leaves = [t.requires_grad_() for t in (*(t.detach() for t in (q, k, v)), w.detach())]
        y = ops.additive_attention(*leaves, backend=lane.backend)
        expected = eager(*leaves)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        grad = torch.randn(y.shape[2], y.shape[1], y.shape[0], device=lane.device).permute(2, 1, 0)
        grads = torch.autograd.grad(y, leaves, grad)
        for a, b in zip(grads, torch.autograd.grad(expected, leaves, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_do_not_depend_on_others(lane):
    """A query alone, or with others, in a batch of one or of several: the same bits."""
    if lane.backend == "torch":
        pytest.skip("torch's sums go by the shape")
    shape = small(lane, (3, 70, 300, 40, 17))
    q, k, v, w = make(shape, torch.float32, lane.device, grad=False)
    q[:, 0] *= 100  # another query takes another path
    whole = ops.additive_attention(q, k, v, w, backend=lane.backend)
    logp = ops.additive_attention(q, k, None, w, return_pointer=True, backend=lane.backend)
    for n, i in ((0, 1), (1, 2), (shape[0] - 1, shape[1] - 1)):
        one = (q[n : n + 1, i : i + 1], k[n : n + 1])
        alone = ops.additive_attention(*one, v[n : n + 1], w, backend=lane.backend)
        assert torch.equal(alone[0, 0], whole[n, i])
        alone = ops.additive_attention(*one, None, w, return_pointer=True, backend=lane.backend)
        assert torch.equal(alone[0, 0], logp[n, i])


def test_autocast(lane):
    """Inputs of several dtypes are cast; gradients come back in theirs."""
    half = lane.dtypes[1]
    q, k, v, w = make((2, 3, 9, 16, 5), torch.float32, lane.device)
    with torch.autocast(lane.device, half):
        y = ops.additive_attention(q.to(half), k, v, w, backend=lane.backend)
    assert y.dtype == half
    grads = torch.autograd.grad(y.float().sum(), (k, v, w))
    assert all(g.dtype == torch.float32 for g in grads)


def test_explain_says_which_back_end_runs(lane, capsys):
    x = torch.randn(2, 3, 8, device=lane.device)
    assert explain("additive_attention", x, x, x, x[0, 0], backend=lane.backend).choice == lane.backend
    assert "additive_attention" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(3, 50, 70, 40, 20), (1, 1, 3000, 33, 9), (1, 130, 600, 16, 8), (9, 3, 40, 24, 8)],
                         ids=str)  # fmt: skip
def test_threads_do_not_change_results(level, shape):
    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, w = make(shape, dtype)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = ops.additive_attention(q, k, v, w)
            logp = ops.additive_attention(q, k, None, w, return_pointer=True)
            results.append((y, logp, *torch.autograd.grad(y, (q, k, v, w), y.detach()),
                            *torch.autograd.grad(logp, (q, k, w), logp.detach())))  # fmt: skip
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    torch.set_num_threads(before)


# ---- The maths, and torch's machinery -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name, monkeypatch):
    """In chunks of two queries, with rows that see nothing."""
    shape = (2, 5, 4, 3, 2)
    monkeypatch.setattr(_chunks, "ELEMENTS", 2 * 2 * 4 * 3)
    options = options_of(name, shape)
    q, k, v, w = make(shape, torch.float64)
    function = lambda q, k, v, w: ops.additive_attention(q, k, v, w, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v, w)) and torch.autograd.gradgradcheck(function, (q, k, v, w))
    torch.testing.assert_close(function(q, k, v, w), eager(q, k, v, w, **options))
    pointer = seen_only(lambda q, k, w: ops.additive_attention(q, k, None, w, return_pointer=True, **options))
    assert torch.autograd.gradcheck(pointer, (q, k, w)) and torch.autograd.gradgradcheck(pointer, (q, k, w))


@pytest.mark.parametrize("pointer", [False, True], ids=["attention", "pointer"])
def test_double_backward(lane, pointer):
    q, k, v, w = make((2, 4, 9, 6, 5), torch.float32, lane.device)
    tensors = (q, k, w) if pointer else (q, k, v, w)

    def ours(*t):
        given = (*t[:2], None, t[2]) if pointer else t
        return ops.additive_attention(*given, return_pointer=pointer, backend=lane.backend)

    def theirs(*t):
        return eager(*t[:2], None, t[2], pointer=True) if pointer else eager(*t)

    def second(function):
        grads = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    for a, b in zip(second(ours), second(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_memory_of_the_reference_is_bounded():
    """No tensor of the double backward is larger than a chunk's, nor kept from one chunk to the next."""
    from torch.autograd.graph import saved_tensors_hooks

    q, k, v, w = make((2, 32, 16, 8, 4), torch.float32)
    before, _chunks.ELEMENTS = _chunks.ELEMENTS, 2 * 16 * 8 * 4
    kept = []
    try:
        with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            y = ops.additive_attention(q, k, v, w, backend="torch")
            grads = torch.autograd.grad(y.square().sum(), (q, k, v, w), create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v, w))
    finally:
        _chunks.ELEMENTS = before
    assert max(kept) <= 2 * 16 * 8 * 4


@pytest.mark.parametrize("name", ["plain", "mask and lens"])
def test_opcheck(lane, name):
    shape = (2, 3, 6, 8, 4)
    q, k, v, w = make(shape, torch.float32, lane.device, grad=False)
    options = options_of(name, shape, lane.device)
    mask, lens = options.get("mask"), options.get("valid_lens")
    lens = None if lens is None else lens.int()
    forward, backward = lanes.op_of(FORWARD, lane), lanes.op_of(BACKWARD, lane)
    torch.library.opcheck(forward, (q.clone().requires_grad_(), k, v, w, mask, lens))
    out, statistics = forward(q, k, v, w, mask, lens)
    torch.library.opcheck(backward, (out, q, k, v, w, mask, lens, out, statistics))
    forward, backward = lanes.op_of(POINTER, lane), lanes.op_of(POINTER_BACKWARD, lane)
    torch.library.opcheck(forward, (q, k.clone().requires_grad_(), w, mask, lens))
    logp, statistics = forward(q, k, w, mask, lens)
    torch.library.opcheck(backward, (logp.nan_to_num(neginf=0.0), q, k, w, mask, lens, statistics))


def test_compile(lane):
    q, k, v, w = make((2, 3, 6, 8, 4), torch.float32, lane.device)
    lens = torch.tensor([6, 2], device=lane.device)

    def step(q, k, v, w):
        y = ops.additive_attention(q, k, v, w, valid_lens=lens, backend=lane.backend)
        logp = ops.additive_attention(q, k, None, w, return_pointer=True, backend=lane.backend)
        return y.sum() + (logp * logp).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(q, k, v, w), compiled(q, k, v, w)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v, w)), torch.autograd.grad(expected, (q, k, v, w)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_transforms_take_the_reference():
    q, k, v, w = make((4, 2, 5, 3, 2), torch.float32, grad=False)
    one = lambda q, k, v: ops.additive_attention(q[None], k[None], v[None], w)[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(one)(q, k, v), ops.additive_attention(q, k, v, w))
    grads = torch.func.grad(lambda w: ops.additive_attention(q, k, v, w).sum())(w)
    leaf = w.clone().requires_grad_()
    torch.testing.assert_close(grads, torch.autograd.grad(ops.additive_attention(q, k, v, leaf).sum(), leaf)[0])
    with pytest.raises(BackendError, match="kernels have no rules"):
        torch.func.vmap(lambda q, k, v: ops.additive_attention(q[None], k[None], v[None], w, backend="cpu"))(q, k, v)


def test_long_keys(lane):
    """A query against more keys than a chunk has, and more than the number of chunks times their least length."""
    if lane.name == "triton interpreted" or lane.name == "emulated cuda":
        pytest.skip("the interpreter takes minutes")
    q, k, v, w = make((1, 2, 9000, 8, 4), torch.float32, lane.device)
    compare(lane, (q, k, v, w), {})
    exact = eager(*(t.detach().double() for t in (q, k, v, w)), pointer=True)
    logp = ops.additive_attention(q, k, None, w, return_pointer=True, backend=lane.backend)
    assert_accurate(logp, exact, eager(q, k, v, w, pointer=True))


GOOD = torch.zeros(2, 3, 4)
W = torch.zeros(4)
BOOL = torch.ones(2, 3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, GOOD, GOOD, W), {}, TypeError, "q: expected a tensor, got NoneType"),
        ((GOOD.int(), GOOD, GOOD, W), {}, TypeError, "q: expected a dense floating point tensor, got torch.int32"),
        ((GOOD, GOOD, None, W), {}, TypeError, "v: expected a tensor, got NoneType; None is for return_pointer=True"),
        ((GOOD, GOOD.half(), GOOD, W), {}, TypeError, "k: expected the dtype of q, torch.float32, got torch.float16"),
        ((GOOD.half(), GOOD.half(), GOOD.half(), W.bfloat16()), {}, TypeError, "w: expected the dtype of q"),
        ((GOOD[0], GOOD, GOOD, W), {}, ValueError, r"q: expected shape \[batch, queries, hidden\]"),
        ((GOOD[..., :0], GOOD, GOOD, W), {}, ValueError, "q: .* hidden of at least 1"),
        ((GOOD, GOOD[..., :3], GOOD, W), {}, ValueError, r"k: expected shape \(2, keys, 4\) for q of shape"),
        ((GOOD, GOOD[:1], GOOD, W), {}, ValueError, r"k: expected shape \(2, keys, 4\)"),
        ((GOOD, GOOD, GOOD[:, :2], W), {}, ValueError, r"v: expected shape \(2, 3, d_v\)"),
        ((GOOD, GOOD, GOOD, W[:3]), {}, ValueError, r"w: expected shape \(4,\)"),
        ((GOOD, GOOD, GOOD, W.to("meta")), {}, ValueError, "w: expected the device of q, cpu, got meta"),
        ((GOOD, GOOD, GOOD, W), {"mask": GOOD}, TypeError, "mask: expected a boolean tensor"),
        ((GOOD, GOOD, GOOD, W), {"mask": BOOL[..., :2]}, ValueError, r"mask: .* broadcast to \(2, 3, 3\)"),
        ((GOOD, GOOD, GOOD, W), {"valid_lens": W}, TypeError, "valid_lens: expected an int64 or int32 tensor"),
        ((GOOD, GOOD, GOOD, W), {"valid_lens": torch.tensor([1, 4])}, ValueError, "valid_lens: .* from 0 to 3"),
        ((GOOD, GOOD, GOOD, W), {"valid_lens": torch.tensor([1])}, ValueError, r"valid_lens: expected shape \(2,\)"),
        ((GOOD, GOOD, GOOD, W), {"chosen": W}, TypeError, "chosen: expected a boolean tensor"),
        ((GOOD, GOOD, GOOD, W), {"chosen": BOOL[:, :2, :2]}, ValueError, r"chosen: expected shape \(2, 3\) or"),
        ((GOOD, GOOD, GOOD, W), {"return_pointer": 1}, TypeError, "return_pointer: expected True or False, got int"),
        ((GOOD, GOOD, GOOD, W), {"backend": "gpu"}, BackendError, "'gpu' is no back end"),
        ((GOOD.double(),) * 3 + (W.double(),), {"backend": "cpu"}, BackendError, "float64: its kernels compute in"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.additive_attention(*arguments, **options)
