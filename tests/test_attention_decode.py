"""Room attention_decode in every lane: against attention over the whole sequence, by the rule of fastdl.testing."""

from __future__ import annotations

import functools

import pytest
import torch
from lanes import op_of

from fastdl import BackendError, explain, ops
from fastdl._library import twin_of
from fastdl.ops.attention_decode import DECODE
from fastdl.reference import attention_decode as reference
from fastdl.testing import assert_accurate, poisoned

SHAPES = [  # heads, kv_heads, n_new, capacity, head_dim, d_v
    (4, 2, 1, 64, 32, 32),
    (9, 3, 1, 40, 64, 64),
    (3, 3, 4, 24, 16, 24),
    (8, 1, 3, 33, 128, 64),
    (2, 1, 7, 30, 40, 40),
    (1, 1, 1, 20, 256, 256),
]
LONG = [(6, 2, 1, 1400, 64, 64), (5, 1, 2, 1100, 32, 32)]
CACHES = ["float32", "float16", "bfloat16", "q8_0"]


def make(shape, lens, dtype, cache, device="cpu", *, seed=0):
    """q, k_new, v_new, and caches whose first lens positions hold something, the others NaN."""
    heads, kv_heads, n_new, capacity, head_dim, d_v = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype).to(device)

    batch = len(lens)
    q, k, v = random(batch, heads, n_new, head_dim), random(batch, kv_heads, n_new, head_dim), None
    v = random(batch, kv_heads, n_new, d_v)
    caches = []
    for width in (head_dim, d_v):
        values = torch.randn(batch, kv_heads, capacity, width, generator=generator)
        if cache == "q8_0":
            held = reference.to_q8_0(values)
        else:
            held = values.to(getattr(torch, cache))
            for b, length in enumerate(lens):
                held[b, :, length:] = torch.nan
        caches.append(held.to(device))
    return q, k, v, *caches, torch.tensor(lens, device=device)


def decoded(backend, q, k, v, k_cache, v_cache, lens, **options):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    with torch.no_grad(), poisoned():
        out, lse = ops.attention_decode(
            q, k_cache, v_cache, lens, k_new=k, v_new=v, return_lse=True, backend=backend, **options
        )
    return out, lse, k_cache, v_cache


def compare(lane, tensors, **options):
    """O and lse in float64 from the caches that the call wrote, which are those of the reference."""
    q, k, _, _, _, lens = tensors
    out, lse, k_cache, v_cache = decoded(lane.backend, *tensors, **options)
    wanted = decoded("torch", *tensors, **options)
    turned = options.get("cos_sin") is not None
    packed = k_cache.dtype == torch.uint8
    for mine, theirs in ((k_cache, wanted[2]), (v_cache, wanted[3])):
        if packed:
            mine, theirs = reference.from_q8_0(mine), reference.from_q8_0(theirs)
        step = 2**-6 if packed else torch.finfo(k_cache.dtype).eps
        if turned and mine.shape == (*k_cache.shape[:3], q.shape[3]):
            # an angle's sum may round to the neighbour
            torch.testing.assert_close(mine.double(), theirs.double(), rtol=2 * step, atol=2 * step, equal_nan=True)
        else:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    exact = exact_of(q, k_cache, v_cache, lens, 0 if k is None else k.shape[2], **options)
    eps = torch.finfo(q.dtype).eps
    assert_accurate(out, exact[0], exact[0].to(q.dtype).double() * (1 + eps / 2), name="out")
    assert_accurate(lse, exact[1], wanted[1], name="lse")


def exact_of(q, k_cache, v_cache, lens, n_new, *, block_table=None, cos_sin=None, pairs="half", **options):
    """float64, sequence by sequence, through room attention's reference."""
    outs, sums = [], []
    options = {"causal": True} | options
    slopes = options.pop("alibi_slopes", None)
    for b, held in enumerate(lens.tolist()):
        total, cached = held + n_new, []
        for cache in (k_cache, v_cache):
            first, second = reference.rows_of(cache, block_table, b, 0, total)
            rows = cache[first, :, second].transpose(0, 1)
            rows = reference.from_q8_0(rows) if cache.dtype == torch.uint8 else rows
            cached.append(rows.double()[None])
        query = q[b : b + 1].double()
        if cos_sin is not None:
            query = ops.rope(query, cos_sin.double(), pairs=pairs, positions=total - q.shape[2])
        slope = None if slopes is None else slopes if slopes.dim() == 1 else slopes[b]
        out, lse = ops.attention(query, *cached, alibi_slopes=slope, return_lse=True, backend="torch", **options)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs), torch.cat(sums)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(lane, shape, cache):
    """Sequences of several lengths, an empty and a full one among them, in every dtype of the lane."""
    if cache == "q8_0" and (shape[4] % 32 or shape[5] % 32):
        shape = (*shape[:4], 32, 32)
    capacity, n_new = shape[3], shape[2]
    lens = [0, capacity - n_new, capacity // 2]
    dtypes = lane.dtypes
    if lane.name == "triton interpreted":  # slow: in turn
        dtypes = dtypes[(shape[0] + CACHES.index(cache)) % 2 :][:1]
    for dtype in dtypes:
        compare(lane, make(shape, lens, dtype, cache, lane.device))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_rope_in_the_same_call(lane, pairs, cache):
    """Queries of 16 bits have more digits when they are turned, and no lane drops them."""
    table = ops.rope_table(32, 100.0, 40).to(lane.device)
    for width, dtype in ((32, torch.float32), (16, torch.float32 if pairs == "half" else lane.dtypes[-1])):
        tensors = make((4, 2, 3, 30, 32, 32), [0, 11, 27], dtype, cache, lane.device)
        compare(lane, tensors, cos_sin=table[:, :width].contiguous(), pairs=pairs)


OPTIONS = {
    "not causal": {"causal": False},
    "scale": {"scale": 0.4},
    "window": {"window": (9, -1)},
    "window on both sides": {"window": (5, 1), "causal": False},
    "softcap": {"softcap": 1.3},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "alibi of sequences": {"alibi_slopes": torch.rand(3, 4)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(lane, name):
    options = {n: t.to(lane.device) if isinstance(t, torch.Tensor) else t for n, t in OPTIONS[name].items()}
    compare(lane, make((4, 2, 3, 40, 32, 32), [0, 37, 20], torch.float32, "float16", lane.device), **options)


@pytest.mark.parametrize("cache", ["float16", "q8_0"])
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_caches(lane, shape, cache):
    """More than one part of the keys."""
    if lane.name in ("emulated cuda", "triton interpreted"):
        shape = (*shape[:3], 300, *shape[4:])
    lens = [shape[3] - shape[2], shape[3] // 2 + 1, 3]
    compare(lane, make(shape, lens, lane.dtypes[1], cache, lane.device))


@pytest.mark.parametrize("cache", ["float32", "bfloat16"])
def test_window_over_several_parts(lane, cache):
    """GPU kernels do not read the parts before the window: they may hold NaN."""
    tensors = make((2, 1, 2, 600, 32, 32), [590, 270], torch.float32, cache, lane.device)
    compare(lane, tensors, window=(300, 0))
    if lane.backend in ("cuda", "triton"):
        out = decoded(lane.backend, *tensors, window=(300, 0))[0]
        for t in tensors[3:5]:
            t[0, :, :256] = torch.nan
        assert torch.equal(decoded(lane.backend, *tensors, window=(300, 0))[0], out)


@pytest.mark.parametrize("cache", ["float16", "q8_0"])
def test_many_queries(lane, cache):
    """More than 64 a key head: parts are longer, and several tiles of queries see different keys."""
    heads, length = (3, 24) if lane.name == "triton interpreted" else (6, 40)
    tensors = make((heads, 1, length, 700, 32, 32), [300], torch.float32, cache, lane.device)
    compare(lane, tensors, window=(33, -1))


@pytest.mark.parametrize(("cache", "width", "step"), [("float16", 41, 1), ("float32", 3, 1), ("q8_0", 96, 1)], ids=str)
def test_addresses_without_alignment(lane, cache, width, step):
    """Rows of an odd number of bytes, at odd addresses."""
    q, k, v, *caches, lens = make((2, 1, 1, 20, width, width), [4, 19], torch.float32, cache, lane.device)
    moved = []
    for t in caches:
        large = torch.zeros(*t.shape[:3], t.shape[3] + step, dtype=t.dtype, device=lane.device)
        moved.append(large[..., step:])
        moved[-1].copy_(t)
        assert moved[-1].stride(2) == t.shape[3] + step
    compare(lane, (q, k, v, *moved, lens))
    out = decoded(lane.backend, q, k, v, *caches, lens)[0]
    with torch.no_grad():
        again = ops.attention_decode(q, *moved, lens, k_new=k, v_new=v, backend=lane.backend)
    assert torch.equal(again, out)


WRONG = {
    "longer than the cache": ([20, 100], {}),
    "no room for the last": ([15, 14], {}),
    "negative": ([-5, -(2**31)], {}),
    "blocks that do not exist": ([3, 9], {"block_table": torch.tensor([[0, 7, -3, 2], [1, 3, 2, 2**30]])}),
    "angles that do not exist": ([3, 9], {"cos_sin": torch.ones(5, 8)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_not_written(lane, name):
    """On a GPU nobody looks at lengths before the kernel: it stays inside the cache, whatever they are."""
    if lane.backend == "torch":
        pytest.skip("torch raises IndexError")
    lens, options = WRONG[name]
    table, cos_sin = options.get("block_table"), options.get("cos_sin")
    size, cache = (4, (2, 4)) if table is not None else (16, (2, 2))
    large = torch.full((2, cache[1] + 2, 2, size + 2, 32), 7.0, device=lane.device)
    caches = large[:, 1:-1, :, 1:-1]  # what lies around them stays
    caches.copy_(torch.randn(caches.shape))
    before = large.clone()
    q, new = torch.randn(2, 4, 2, 32, device=lane.device), torch.randn(2, 2, 2, 2, 32, device=lane.device)
    given = [None if t is None else t.to(lane.device) for t in (table if table is None else table.int(), cos_sin)]
    lens = torch.tensor(lens, dtype=torch.int32, device=lane.device)
    with poisoned():
        op = DECODE[twin_of(lane.backend, torch.device(lane.device))]
        out, lse = op(q, *new, *caches, lens, *given, None, False, 0.2, 0.0, -1, 0)
    assert not out.isnan().any() and not lse.isnan().any()
    written = (large != before).any(-1).any(2)  # [k and v, rows, positions]
    assert not written[:, 0].any() and not written[:, -1].any() and not written[..., [0, -1]].any()
    places = {"longer than the cache": [], "no room for the last": [(1, 16), (2, 15), (2, 16)]}
    places |= {"negative": [(1, 1), (1, 2), (2, 1), (2, 2)], "blocks that do not exist": [(1, 4), (3, 2), (3, 3)]}
    places |= {"angles that do not exist": [(1, 4), (1, 5), (2, 10), (2, 11)]}
    assert written[0].nonzero().tolist() == written[1].nonzero().tolist() == [list(at) for at in places[name]]


@pytest.mark.parametrize("cache", CACHES)
def test_pages(lane, cache):
    """Blocks in any order, given out by a table, some entries of which are not used."""
    heads, kv_heads, n_new, size, head_dim = 4, 2, 2, 8, 32
    lens = [0, 17, 30]
    q, k, v, _, _, held = make(
        (heads, kv_heads, n_new, 32, head_dim, head_dim), lens, torch.float32, cache, lane.device
    )
    table = torch.full((3, 5), -1, dtype=torch.int32)
    order, used = torch.randperm(12), 0
    for b, length in enumerate(lens):
        count = -(-(length + n_new) // size)
        table[b, :count] = order[used : used + count]
        used += count
    width = head_dim // 32 * 34 if cache == "q8_0" else head_dim
    blocks = torch.randn(2, 12, kv_heads, size, head_dim)
    blocks = reference.to_q8_0(blocks) if cache == "q8_0" else blocks.to(getattr(torch, cache))
    assert blocks.shape[-1] == width
    blocks = blocks.to(lane.device)
    compare(lane, (q, k, v, blocks[0], blocks[1], held), block_table=table.to(lane.device))


def test_without_new_keys(lane):
    """The keys are in the cache already: the queries are the last positions."""
    q, _, _, k_cache, v_cache, lens = make((4, 2, 3, 40, 32, 32), [3, 40, 20], torch.float32, "float16", lane.device)
    compare(lane, (q, None, None, k_cache, v_cache, lens))


def test_step_by_step_is_the_whole(lane):
    """Tokens one at a time, and several at a time, against causal attention over all of them."""
    total, heads, kv_heads, head_dim = 21, 4, 2, 32
    q, k, v = (torch.randn(2, h, total, head_dim, device=lane.device) for h in (heads, kv_heads, kv_heads))
    table = ops.rope_table(head_dim, 100.0, total).to(lane.device)
    wanted = ops.attention(
        ops.rope(q, table, pairs="half"), ops.rope(k, table, pairs="half"), v, causal=True, backend="torch"
    )
    caches = torch.zeros(2, 2, kv_heads, total, head_dim, device=lane.device)
    lens, outs = torch.zeros(2, dtype=torch.int32, device=lane.device), []
    with torch.no_grad():
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 13), (13, 21)):
            part = slice(start, end)
            outs.append(
                ops.attention_decode(
                    q[:, :, part],
                    *caches,
                    lens,
                    k_new=k[:, :, part],
                    v_new=v[:, :, part],
                    cos_sin=table,
                    backend=lane.backend,
                )
            )
            lens += end - start
    torch.testing.assert_close(torch.cat(outs, 2), wanted, rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_depend_on_the_others(lane):
    tensors = make((4, 2, 2, 50, 32, 32), [13, 48, 30], torch.float32, "float16", lane.device)
    out, lse, *_ = decoded(lane.backend, *tensors)
    for b in range(3):
        alone = decoded(lane.backend, *(t[b : b + 1] for t in tensors))
        assert torch.equal(alone[0][0], out[b]) and torch.equal(alone[1][0], lse[b])


def test_strides(lane):
    """Heads inside the length, as projections give them; caches that are part of a larger one."""
    q, k, v, k_cache, v_cache, lens = make((4, 2, 3, 24, 32, 32), [5, 20], torch.float32, "float32", lane.device)
    out = decoded(lane.backend, q, k, v, k_cache, v_cache, lens)[0]
    inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    large = torch.zeros(2, 2, 3, 24, 2, 32, device=lane.device)
    part = large[:, :, 1].transpose(2, 3)
    part[0].copy_(k_cache)
    part[1].copy_(v_cache)
    with torch.no_grad():
        again = ops.attention_decode(inside[0], *part, lens, k_new=inside[1], v_new=inside[2], backend=lane.backend)
    assert torch.equal(again, out) and again.transpose(1, 2).is_contiguous()
    assert torch.equal(part[0, 0, :, 5:8], k[0]) and not large[:, :, 0].any() and not large[:, :, 2].any()


@pytest.mark.parametrize("sizes", [(0, 4, 2, 1), (2, 4, 2, 0), (2, 4, 2, 1)], ids=str)
def test_empty(lane, sizes):
    """No sequences, no queries, no keys at all: then a query gives 0."""
    batch, heads, kv_heads, n_q = sizes
    q = torch.randn(batch, heads, n_q, 32, device=lane.device)
    caches = torch.zeros(2, batch, kv_heads, 8, 32, device=lane.device)
    with torch.no_grad(), poisoned():
        out, lse = ops.attention_decode(
            q, *caches, torch.zeros(batch, dtype=torch.long, device=lane.device), return_lse=True, backend=lane.backend
        )
    assert out.shape == (batch, heads, n_q, 32) and not out.any() and (lse == -torch.inf).all()


def test_threads_do_not_change_the_result(level):
    tensors = make((9, 3, 1, 1500, 64, 64), [1499, 700], torch.float32, "float16")
    found = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(decoded("cpu", *tensors))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found[0], other, strict=True))


def test_opcheck(lane):
    q, k, v, k_cache, v_cache, lens = make((4, 2, 1, 8, 32, 32), [3, 7], torch.float32, "float32", lane.device)
    k_cache, v_cache = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
    arguments = (q, k, v, k_cache, v_cache, lens.int(), None, None, None, False, 0.1, 0.0, -1, 0)
    torch.library.opcheck(op_of(DECODE, lane), arguments, test_utils=("test_schema", "test_faketensor"))


def test_compile(lane):
    if lane.name == "triton interpreted":
        pytest.skip("torch.compile cannot trace Triton's interpreter")
    tensors = make((4, 2, 1, 16, 32, 32), [3, 7], torch.float32, "float32", lane.device)

    def step(q, k, v, k_cache, v_cache, lens):
        return ops.attention_decode(q, k_cache, v_cache, lens, k_new=k, v_new=v, backend=lane.backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = []
    for call in (step, compiled):
        caches = [t.clone() for t in tensors[3:5]]
        with torch.no_grad():
            found.append((call(*tensors[:3], *caches, tensors[5]), *caches))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_graph_of_the_call_follows_the_lengths(lane):
    """Captured once, replayed while the cache grows: no length is looked at by the host."""
    if lane.device != "cuda" or lane.backend == "torch":
        pytest.skip("CUDA graphs need a GPU and kernels")
    q, k, v, k_cache, v_cache, lens = make((4, 2, 1, 600, 64, 64), [3, 250], torch.bfloat16, "bfloat16", lane.device)
    wanted = [t.clone() for t in (k_cache, v_cache)]
    step = functools.partial(ops.attention_decode, q, k_new=k, v_new=v, backend=lane.backend)
    lens, graph = lens.int(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        step(k_cache.clone(), v_cache.clone(), lens)  # compiles
        with torch.cuda.graph(graph):
            out = step(k_cache, v_cache, lens)
        for _ in range(10):
            graph.replay()
            assert torch.equal(out, step(*wanted, lens))
            lens += 1


def test_triton_launches_without_looking_at_a_value(monkeypatch):
    """Tensors without values, on the device meta, and kernels that only note their grids."""
    pytest.importorskip("triton")
    from fastdl.kernels import attention_decode as kernels

    grids = {}
    for name in ("append", "split", "merge"):
        note = type("Note", (), {"__getitem__": lambda _, grid, name=name: lambda **_: grids.update({name: grid})})
        monkeypatch.setattr(kernels, name, note())
    q, k, v, k_cache, v_cache, lens = make((6, 2, 1, 600, 64, 64), [3, 250], torch.bfloat16, "float16", "meta")
    table = torch.zeros(2, 5, dtype=torch.int32, device="meta")
    rest = (None, None, False, 0.1, 0.0, -1, 0)
    kernels.attention_decode(q, k, v, k_cache, v_cache, lens, table, *rest)
    assert grids == {"append": (1, 2, 2), "split": (12, 2, 2), "merge": (12,)}


def test_explain_names_the_back_end(lane):
    q = torch.zeros(1, 1, 1, 16, device=lane.device)
    assert explain("attention_decode", q, backend=lane.backend).choice == lane.backend
    if lane.backend != "torch":
        caches = torch.zeros(2, 1, 1, 4, 16, device=lane.device)
        lens = torch.zeros(1, dtype=torch.long, device=lane.device)
        with pytest.raises(BackendError, match="float64"):
            ops.attention_decode(q.double(), *caches, lens, backend=lane.backend)
        widest = 4096 if lane.backend == "cpu" else 256
        q, caches = (torch.zeros(*size, widest + 1, device=lane.device) for size in ((1, 1, 1), (2, 1, 1, 4)))
        with pytest.raises(BackendError, match=f"head_dim {widest + 1}: .* of (at most|more than) {widest}"):
            ops.attention_decode(q, *caches, lens, backend=lane.backend)


def test_an_empty_cache_of_8_bits(lane):
    empty = torch.zeros(2, 2, 8, 34, dtype=torch.uint8, device=lane.device)
    lens = torch.zeros(2, dtype=torch.int32, device=lane.device)
    q = torch.randn(2, 4, 1, 32, device=lane.device)
    y, lse = ops.attention_decode(q, empty, empty, lens, return_lse=True, backend=lane.backend)
    assert not y.any() and (lse == -torch.inf).all()


CACHE, ONE = torch.zeros(2, 2, 8, 32), torch.tensor([3, 7])
NESTED = torch.nested.nested_tensor([torch.zeros(2, 1, 32)] * 2)
GOOD = {
    "q": torch.zeros(2, 4, 1, 32), "k_cache": CACHE, "v_cache": CACHE.clone(), "cache_lens": ONE,
    "k_new": torch.zeros(2, 2, 1, 32), "v_new": torch.zeros(2, 2, 1, 32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(4, 1, 32)}, ValueError, r"q: expected shape \[batch, heads, n_q, head_dim\]"),
        ({"q": torch.zeros(2, 3, 1, 32)}, ValueError, "k_cache: expected a number of heads that divides q's 3, got 2"),
        ({"q": torch.zeros(3, 4, 1, 32)}, ValueError, "k_cache: expected the batch of q, 3, got 2"),
        ({"q": torch.zeros(2, 4, 1, 16)}, ValueError, "k_cache: expected the head_dim of q, 16, got 32"),
        ({"q": torch.zeros(2, 4, 1, 32, requires_grad=True)}, ValueError, "q: expected no gradient"),
        ({"k_cache": CACHE.int()}, TypeError, "k_cache: expected float32, float16, bfloat16 or uint8"),
        ({"k_cache": torch.zeros(2, 2, 8, 35, dtype=torch.uint8)}, ValueError, "expected a multiple of 34 bytes"),
        ({"v_cache": CACHE.half()}, TypeError, "v_cache: expected the dtype of k_cache"),
        ({"v_cache": torch.zeros(2, 2, 9, 32)}, ValueError, r"v_cache: expected \(2, 2, 8\) as in k_cache"),
        ({"cache_lens": torch.tensor([3.0, 1.0])}, TypeError, "cache_lens: expected an int64 or int32"),
        ({"cache_lens": torch.tensor([3])}, ValueError, r"cache_lens: expected shape \(2,\)"),
        ({"cache_lens": torch.tensor([3, 8])}, ValueError, r"sequence 1 would hold 8 \+ 1 positions, expected 0 to 8"),
        ({"cache_lens": torch.tensor([-1, 3])}, ValueError, r"cache_lens: sequence 0 would hold -1 \+ 1"),
        ({"v_new": None}, ValueError, "k_new, v_new: expected both or none"),
        ({"k_new": torch.zeros(2, 2, 1, 16)}, ValueError, "k_new: expected shape"),
        ({"v_new": torch.zeros(2, 2, 2, 32)}, ValueError, "v_new: expected shape"),
        ({"k_new": torch.zeros(2, 2, 1, 32).half()}, TypeError, "k_new: expected the dtype of q"),
        ({"block_table": torch.zeros(2, 2)}, TypeError, "block_table: expected an int64 or int32"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.long)}, ValueError, r"expected shape \(2, blocks\)"),
        ({"block_table": torch.tensor([[0], [5]])}, ValueError, "expected blocks 0 to 1, got 5 for sequence 1"),
        ({"cos_sin": torch.zeros(4, 33)}, ValueError, "cos_sin: expected float32"),
        ({"cos_sin": torch.zeros(7, 32)}, ValueError, "positions 0 to 6.* got 7 to 7 for sequence 1"),
        ({"pairs": "other"}, ValueError, "pairs: expected one of interleaved, half"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number > 0"),
        ({"window": (1,)}, TypeError, "window: expected"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes: expected shape"),
        ({"cos_sin": [1.0]}, TypeError, "cos_sin: expected a floating point tensor or None, got list"),
        ({"k_new": NESTED}, TypeError, "k_new: expected the dtype of q.*nested"),
        ({"k_cache": NESTED}, TypeError, "k_cache: expected float32.*nested"),
        ({"causal": "no"}, TypeError, "causal: expected True or False, got str"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
        ({"k_cache": CACHE, "v_cache": CACHE}, ValueError, "v_cache: expected memory of its own to write to"),
        ({"k_cache": CACHE[:1].expand(2, 2, 8, 32)}, ValueError, "k_cache: expected memory for every element"),
        ({"v_cache": torch.zeros(2, 2, 8, 32, requires_grad=True)}, ValueError, "v_cache: expected no gradient"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = GOOD | change
    caches = [arguments.pop(name) for name in ("q", "k_cache", "v_cache", "cache_lens")]
    with pytest.raises(error, match=message):
        ops.attention_decode(*caches, **arguments)
