"""Room rope: tables and rotations against transformers', kernels in every lane, gradients, and bad input."""

from __future__ import annotations

import functools
import math

import lanes
import pytest
import torch

from fastdl import BackendError, explain, ops
from fastdl.ops.rope import PAIRS, TURN
from fastdl.reference import rope as reference
from fastdl.testing import check, poisoned

# x [batch, heads, n, head_dim], rope_dim, strided: [batch, n, heads, head_dim] transposed, as projections give it
CASES = [
    ((1, 1, 1, 2), 2, False),
    ((2, 3, 5, 8), 6, False),
    ((2, 3, 7, 64), 64, True),
    ((1, 9, 70, 64), 64, True),
    ((3, 2, 4, 80), 20, True),
    ((2, 2, 3, 33), 10, False),
    ((2, 5, 1, 128), 128, True),
    ((1, 2, 3, 1040), 1040, False),
    ((0, 3, 5, 8), 8, False),
    ((2, 3, 0, 8), 8, False),
    ((2, 0, 5, 8), 8, True),
]


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    table = ops.rope_table(16, 10000.0, 64)
    q, k = torch.randn(2, 1, 16)
    products = [float(ops.rope(q, table, positions=p + 5) @ ops.rope(k, table, positions=p).T) for p in (0, 7, 40)]
    assert max(products) - min(products) < 1e-4
    assert math.isclose(float(ops.rope(q, table, positions=33).norm()), float(q.norm()), rel_tol=1e-5)


@pytest.mark.parametrize("rope_dim", [8, 6, 2])
def test_half_and_interleaved_differ_by_a_permutation(rope_dim):
    x, table = torch.randn(3, 5, 8), ops.rope_table(rope_dim, 100.0, 9)
    order = torch.cat((torch.arange(rope_dim).view(2, -1).T.reshape(-1), torch.arange(rope_dim, 8)))
    half = ops.rope(x, table, pairs="half", positions=2)
    torch.testing.assert_close(ops.rope(x[..., order], table, pairs="interleaved", positions=2), half[..., order])
    torch.testing.assert_close(half[..., rope_dim:], x[..., rope_dim:])


def test_half_is_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, table = torch.randn(1, 3, 7, 8), ops.rope_table(8, 10000.0, 7)
    cos, sin = (torch.cat((t, t), -1)[None] for t in (table[:, 0::2], table[:, 1::2]))
    expected, _ = modeling.apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(ops.rope(x, table, pairs="half"), expected)


@pytest.mark.parametrize(
    ("scaling", "options"),
    [
        ("none", {}),
        ("linear", {"factor": 4.0}),
        ("dynamic", {"factor": 4.0, "original_context": 64}),
        ("dynamic", {"factor": 2.0, "original_context": 256}),
        ("llama3", {"factor": 8.0, "original_context": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("llama3", {"factor": 4.0, "original_context": 512, "low_freq_factor": 2.0, "high_freq_factor": 8.0}),
        ("yarn", {"factor": 4.0, "original_context": 64}),
        ("yarn", {"factor": 8.0, "original_context": 512, "attention_factor": 1.3}),
    ],
)
def test_table_is_transformers(scaling, options):
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    parameters = {"rope_type": scaling if scaling != "none" else "default", "rope_theta": 50000.0}
    parameters |= {"factor": options["factor"]} if "factor" in options else {}
    if scaling in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = options["original_context"]
    parameters |= {name: options[name] for name in options if name.endswith("_factor")}
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=options["original_context"] if scaling == "dynamic" else 256,
        rope_parameters=parameters,
    )
    magnitude = 1.0
    if scaling == "none":
        inverse = 1.0 / 50000.0 ** (torch.arange(0, 32, 2) / 32)
    else:
        inverse, magnitude = utils.ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"), seq_len=200)
    angles = torch.arange(200)[:, None].double() * inverse.double()
    expected = torch.stack((angles.cos(), angles.sin()), -1).flatten(1) * magnitude
    table = ops.rope_table(32, 50000.0, 200, scaling=scaling, **options)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-4)  # theirs has float32 frequencies


def test_ntk_is_dynamic_at_the_length_of_its_factor():
    """transformers has the fixed rule only inside the dynamic one, whose factor it is at one length."""
    utils, transformers = (pytest.importorskip(n) for n in ("transformers.modeling_rope_utils", "transformers"))
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 50000.0, "factor": 4.0},
    )  # fmt: skip
    inverse, _ = utils.ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=100)
    table = ops.rope_table(32, 50000.0, 200, scaling="ntk", factor=4.0 * 100 / 64 - 3.0)
    angles = torch.arange(200)[:, None].double() * inverse.double()
    torch.testing.assert_close(table[:, 0::2].double(), angles.cos(), rtol=0, atol=1e-4)
    dynamic = {"scaling": "dynamic", "factor": 4.0, "original_context": 64}
    torch.testing.assert_close(ops.rope_table(32, 50000.0, 200, **dynamic, length=100), table)
    slowest = [float(ops.rope_table(32, 1e4, 2, **options)[1, -1]) for options in ({}, {"scaling": "ntk", "factor": 8})]
    assert math.isclose(slowest[0] / slowest[1], 8, rel_tol=1e-3)


def test_factors_divide_and_start_shifts():
    factors = torch.tensor([1.0, 2.0, 8.0, 32.0])
    table = ops.rope_table(8, 10000.0, 40, factors=factors)
    angles = 39 * reference.frequencies(8, 10000.0) / factors.double()
    torch.testing.assert_close(table[39, 0::2], angles.cos().float())
    torch.testing.assert_close(ops.rope_table(8, 10000.0, 5, factors=factors, start=35), table[35:], rtol=0, atol=0)


def test_far_positions_are_exact():
    angle = 131071 * 10000.0 ** (-2 / 128)
    row = ops.rope_table(128, 10000.0, 1, start=131071)[0]
    assert abs(float(row[2]) - math.cos(angle)) < 1e-6


def test_positions_tensor_and_dtype():
    x, table = torch.randn(2, 3, 8), ops.rope_table(8, 10000.0, 50)
    y = ops.rope(x, table, positions=torch.tensor([4, 5, 6]))
    torch.testing.assert_close(y, ops.rope(x, table, positions=4), rtol=0, atol=0)
    assert ops.rope(x.bfloat16(), table).dtype == torch.bfloat16
    assert ops.rope(x[:, :0], table).shape == (2, 0, 8)


# ---- Kernels, in every lane -----------------------------------------------------------------------------------------


def make(shape, dtype, device="cpu", strided=False):
    """[batch, heads, n, head_dim], that requires its gradient."""
    if strided:
        batch, heads, n, head_dim = shape
        return torch.randn(batch, n, heads, head_dim).to(device, dtype).transpose(1, 2).requires_grad_()
    return torch.randn(shape).to(device, dtype).requires_grad_()


def plain(x, table, pairs="interleaved", positions=0):
    """What people write, in the dtype of x."""
    n, half = x.shape[-2], table.shape[1] // 2
    rows = table[positions : positions + n] if isinstance(positions, int) else table[positions]
    if rows.dim() == 3:
        rows = rows[(slice(None), *[None] * (x.dim() - 3))]
    cos, sin = rows[..., 0::2].to(x.dtype), rows[..., 1::2].to(x.dtype)
    if pairs == "half":
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), -1)
    a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("pairs", PAIRS)
def test_contract(lane, pairs):
    """Every kind of positions, every dtype and layout of the lane: result and gradient, and q with k."""
    for dtype in lane.dtypes:
        for shape, rope_dim, strided in CASES:
            if lane.name == "triton interpreted" and shape[2] > 20:
                continue  # half a minute for what the others show
            x = make(shape, dtype, lane.device, strided)
            k = make((shape[0], 2, *shape[2:]), dtype, lane.device, not strided)
            batch, n = shape[0], shape[2]
            table = ops.rope_table(rope_dim, 10000.0, n + 9).to(lane.device)
            positions = [3, torch.randint(n + 9, (n,), device=lane.device)]
            positions.append(torch.randint(n + 9, (batch, n), device=lane.device))
            for at in positions if dtype == torch.float32 else positions[2:]:
                options = {"pairs": pairs, "positions": at}
                theirs = functools.partial(plain, table=table, **options)
                both = functools.partial(ops.rope_qk, cos_sin=table, backend=lane.backend, **options)
                check(both, (x, k), peer=lambda q, k, theirs=theirs: (theirs(q), theirs(k)))
            ours = functools.partial(ops.rope, cos_sin=table, backend=lane.backend, **options)
            check(ours, (x,), peer=theirs)


@pytest.mark.parametrize("pairs", PAIRS)
def test_layouts(lane, pairs):
    """Views of all kinds: no copy where the elements of a head lie side by side, and the result lies as the input."""
    base = torch.randn(2, 6, 3, 4, 24, device=lane.device)
    table = ops.rope_table(16, 100.0, 8).to(lane.device)
    positions = torch.randint(8, (2, 6), device=lane.device)
    views = {
        "qkv": base[:, :, 1].transpose(1, 2)[..., :16],  # a slice of a projection of all three
        "heads": base.permute(0, 2, 3, 1, 4)[..., 8:],  # [2, 3, 4, 6, 16]: two dimensions of heads
        "shuffled": base.permute(0, 3, 2, 1, 4),  # heads that do not merge
        "expanded": base[:, :, :1, :1].transpose(1, 3)[:, 0].expand(2, 5, 6, 24)[..., :16],
        "apart": base.flatten(2).transpose(1, 2).contiguous()[:, :16].transpose(1, 2),
        "two": base[0, :, 0, 0],
        "offset": base.flatten()[1:865].view(2, 3, 6, 24),  # no address of 16 bytes
    }
    assert views["apart"].stride(-1) > 1  # the elements of a head
    for view in views.values():
        for at in (1, positions) if view.dim() > 2 else (1,):
            options = {"pairs": pairs, "positions": at}
            check(
                functools.partial(ops.rope, cos_sin=table, backend=lane.backend, **options),
                (view.detach().requires_grad_(),),
                peer=functools.partial(plain, table=table, **options),
            )
    y = ops.rope(views["qkv"], table, pairs=pairs, backend=lane.backend)
    assert y.transpose(1, 2).is_contiguous()
    assert ops.rope(base, table, pairs=pairs, backend=lane.backend).is_contiguous()


def test_positions_out_of_the_table_are_clamped(lane, monkeypatch):
    """Kernels are called below the checks, as they are where values are not looked at: on a GPU."""
    x, table = torch.randn(2, 1, 4, 16, device=lane.device), ops.rope_table(16, 10.0, 5).to(lane.device)
    positions = torch.tensor([[-7, 2, 1 << 40, 5], [0, 4, -1, -(1 << 62)]], device=lane.device)
    op = TURN[lanes.twin_of(lane.backend, torch.device(lane.device))]
    for interleaved in (True, False):
        y, none = op(x, None, table, positions, 0, interleaved, False)
        pairs = "interleaved" if interleaved else "half"
        torch.testing.assert_close(y, plain(x, table, pairs, positions.clamp(0, 4)))
        assert none.numel() == 0
    monkeypatch.setenv("FASTDL_CHECK", "1")
    with pytest.raises(ValueError, match=r"positions: .* do not lie in the table"):
        ops.rope(x, table, positions=positions, backend=lane.backend)


def test_nan_and_inf(lane):
    """What is no number stays in its pair, and passes where nothing turns."""
    inf, nan = float("inf"), float("nan")
    x = torch.ones(1, 2, 2, 40, device=lane.device)
    x[0, 0, 0, 1], x[0, 1, 1, 0], x[0, 1, 0, 35], x[0, 0, 1, 36] = nan, inf, nan, -inf
    table = ops.rope_table(32, 10.0, 4).to(lane.device)
    for pairs in PAIRS:
        y = ops.rope(x, table, pairs=pairs, positions=1, backend=lane.backend)
        torch.testing.assert_close(y, plain(x, table, pairs, 1), equal_nan=True, rtol=1e-5, atol=1e-6)


def test_inference_and_qk_give_the_same_bits(lane):
    table = ops.rope_table(64, 1e4, 12).to(lane.device)
    for dtype in lane.dtypes[:2]:
        q, k = make((2, 6, 5, 64), dtype, lane.device, True), make((2, 2, 5, 64), dtype, lane.device)
        options = {"positions": 4, "backend": lane.backend}
        trained = ops.rope_qk(q, k, table, **options)
        with torch.no_grad(), poisoned():
            for found in (ops.rope_qk(q, k, table, **options), [ops.rope(x, table, **options) for x in (q, k)]):
                assert all(torch.equal(a, b) for a, b in zip(trained, found, strict=True))


def test_only_one_of_q_and_k_has_a_gradient(lane):
    table = ops.rope_table(8, 1e2, 5).to(lane.device)
    for which in (0, 1):
        tensors = [make((1, 2, 5, 8), torch.float32, lane.device).detach() for _ in range(2)]
        x = tensors[which].requires_grad_()
        found = ops.rope_qk(*tensors, table, backend=lane.backend)
        (ours,) = torch.autograd.grad(found[which].square().sum(), x, retain_graph=True)
        (theirs,) = torch.autograd.grad(plain(x, table).square().sum(), x)
        torch.testing.assert_close(ours, theirs)


def test_double_backward(lane):
    """The gradient's gradient is the turn again, by the same kernels."""
    x, table = make((2, 3, 5, 16), torch.float32, lane.device), ops.rope_table(12, 1e2, 5).to(lane.device)

    def third(y):
        (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad((dx**2).sum(), x, create_graph=True)
        return torch.autograd.grad((ddx**2).sum(), x)[0]

    ours, theirs = (
        third(f(x)) for f in (lambda x: ops.rope(x, table, backend=lane.backend), lambda x: plain(x, table))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_opcheck(lane):
    op = lanes.op_of(TURN, lane)
    table = ops.rope_table(8, 1e2, 6).to(lane.device)
    q, k = (make(shape, torch.float32, lane.device, True) for shape in ((2, 3, 4, 12), (2, 1, 4, 12)))
    positions = torch.randint(6, (2, 4), device=lane.device)
    torch.library.opcheck(op, (q, k, table, positions, 0, False, False))
    torch.library.opcheck(op, (q.detach(), None, table, positions[0], 0, True, True))
    torch.library.opcheck(op, (q, None, table, None, 2, True, False))


def test_compile(lane):
    q, k = (make(shape, torch.float32, lane.device, True) for shape in ((2, 3, 4, 12), (2, 1, 4, 12)))
    table = ops.rope_table(8, 1e2, 6).to(lane.device)
    positions = torch.randint(6, (2, 4), device=lane.device)

    def step(q, k, positions):
        q, k = ops.rope_qk(q, k, table, positions=positions, pairs="half", backend=lane.backend)
        return ops.rope(q, table, positions=1, backend=lane.backend), k

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(q, k, positions), compiled(q, k, positions)
    for outputs in (expected, got):
        outputs[0].square().sum().backward(retain_graph=True)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()
    gradients = [torch.autograd.grad(y[0].sum() + y[1].square().sum(), (q, k)) for y in (expected, got)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_explain_says_which_back_end_runs(lane):
    x = torch.randn(2, 8, device=lane.device)
    for room in ("rope", "rope_qk"):
        assert explain(room, x, x, backend=lane.backend).choice == lane.backend


def test_threads_do_not_change_results(level):
    q, k = make((3, 8, 130, 64), torch.float32, strided=True), make((3, 2, 130, 64), torch.float32)
    table, before, results = ops.rope_table(64, 1e4, 130), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.rope_qk(q, k, table))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- The maths, and torch's machinery -------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", PAIRS)
def test_backward(pairs):
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    table = ops.rope_table(6, 100.0, 3).double()
    positions = torch.tensor([[2, 0, 0], [1, 1, 2]])

    def function(x):
        y, z = ops.rope_qk(x, x * 2, table, pairs=pairs, positions=positions)
        return y + ops.rope(z, table, pairs=pairs)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))
    y = ops.rope(x, table, pairs=pairs)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(plain(x, table, pairs), x, grad)
    got, _ = reference.rope_turn(grad, None, table, None, 0, pairs == "interleaved", True)
    torch.testing.assert_close(got, expected)


def test_a_table_may_have_a_gradient():
    x, table = torch.randn(2, 3, 8), ops.rope_table(8, 100.0, 3).requires_grad_()
    (found,) = torch.autograd.grad(ops.rope(x, table).square().sum() + ops.rope(x, table)[0, 1, 2], table)
    (expected,) = torch.autograd.grad(plain(x, table).square().sum() + plain(x, table)[0, 1, 2], table)
    torch.testing.assert_close(found, expected)
    with pytest.raises(BackendError, match="cos_sin"):
        ops.rope(x, table, backend="cpu")
    with torch.no_grad():
        ops.rope(x, table, backend="cpu")


def test_transforms_run_the_reference():
    x, table = torch.randn(4, 3, 8), ops.rope_table(8, 100.0, 3)
    torch.testing.assert_close(torch.func.vmap(lambda t: ops.rope(t, table))(x), ops.rope(x, table))
    _, tangent = torch.func.jvp(lambda t: ops.rope(t, table), (x,), (x,))
    torch.testing.assert_close(tangent, ops.rope(x, table))
    with pytest.raises(BackendError, match=r"torch\.func"):
        torch.func.vmap(lambda t: ops.rope(t, table, backend="cpu"))(x)


def test_tables_of_other_dtypes(lane):
    x, table = torch.randn(2, 3, 8, device=lane.device), ops.rope_table(8, 100.0, 3).to(lane.device)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        narrow = table.to(dtype)
        torch.testing.assert_close(
            ops.rope(x, narrow, backend=lane.backend), plain(x, narrow.float()), rtol=1e-5, atol=1e-6
        )
    columns = table.repeat(1, 2)[:, :8]
    torch.testing.assert_close(ops.rope(x, columns, backend=lane.backend), plain(x, table))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "head_dim"),
        ({"base": 1.0}, "base"),
        ({"base": float("nan")}, "base"),
        ({"max_len": -1}, "max_len"),
        ({"scaling": "longrope"}, "scaling: expected one of none, linear, ntk"),
        ({"scaling": "ntk", "head_dim": 2}, "head_dim: ntk needs at least 4"),
        ({"scaling": "dynamic", "factor": 2.0}, "original_context: dynamic needs"),
        ({"scaling": "dynamic", "original_context": 8, "length": -1}, "length"),
        ({"scaling": "llama3", "factor": 2.0}, "original_context"),
        ({"scaling": "llama3", "original_context": 8, "low_freq_factor": 4.0}, "low_freq_factor, high_freq_factor"),
        ({"scaling": "yarn", "factor": 2.0}, "original_context"),
        ({"factor": 0.0}, "factor"),
        ({"factors": torch.ones(3)}, "factors"),
    ],
)
def test_bad_table(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.rope_table(**({"head_dim": 8, "base": 10000.0, "max_len": 4} | arguments))


BAD = [  # arguments beside x [2, 3, 8] and a table [4, 8]
    ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, TypeError, "x: expected a dense floating point"),
    ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    ({"x": torch.ones(2, 3, 6)}, ValueError, r"cos_sin: expected \[max_len, rope_dim\]"),
    ({"x": torch.ones(8)}, ValueError, "cos_sin: expected"),
    ({"cos_sin": torch.ones(4, 7)}, ValueError, "cos_sin: expected"),
    ({"cos_sin": torch.ones(4, 8).long()}, TypeError, "cos_sin: expected a floating point tensor, got torch.int64"),
    ({"cos_sin": torch.ones(4, 8, device="meta")}, ValueError, "cos_sin: expected the device of x"),
    ({"pairs": "both"}, ValueError, "pairs: expected one of interleaved, half, got 'both'"),
    ({"positions": 2}, ValueError, "positions: 2 .. 4 do not lie in the table's 0 .. 3"),
    ({"positions": -1}, ValueError, "positions: -1 .. 1"),
    ({"positions": 0.5}, TypeError, "positions: expected an int or an int64 tensor, got float"),
    ({"positions": torch.zeros(3)}, TypeError, "positions: expected an int or an int64 tensor, got torch.float32"),
    ({"positions": torch.tensor([0, 4, 1])}, ValueError, "positions: 0 .. 4 do not lie"),
    ({"positions": torch.tensor([0])}, ValueError, r"positions: expected an int or int64 \[3\] or \[2, 3\], got \[1\]"),
    ({"positions": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, r"positions: .* \[2, 3\], got \[3, 3\]"),
    ({"positions": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "positions: expected the device"),
    ({"cos_sin": torch.ones(0, 8), "positions": torch.zeros(3, dtype=torch.int64)}, ValueError, "no rows"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:30] for *_, message in BAD])
def test_bad_input(change, error, message):
    arguments = {"x": torch.ones(2, 3, 8), "cos_sin": ops.rope_table(8, 10000.0, 4)} | change
    with pytest.raises(error, match=message):
        ops.rope(**arguments)


def test_bad_input_to_qk():
    q, table = torch.ones(2, 3, 8), ops.rope_table(8, 10000.0, 4)
    for k, error, message in (
        (1.0, TypeError, "k: expected a tensor, got float"),
        (torch.ones(2, 4, 8), ValueError, r"k: expected \[..., n, head_dim\]"),
        (torch.ones(2, 3, 10), ValueError, r"k: expected \[..., n, head_dim\]"),
        (torch.ones(2, 3, 8).half(), ValueError, "k: expected the dtype and device of q"),
    ):
        with pytest.raises(error, match=message):
            ops.rope_qk(q, k, table)
    with pytest.raises(TypeError, match="q: expected a tensor"):
        ops.rope_qk([1.0], q, table)
    with pytest.raises(ValueError, match="positions: expected"):
        ops.rope_qk(q, q[:1], table, positions=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(BackendError, match="float64"):
        ops.rope(q.double(), table, backend="cpu")
    with pytest.raises(BackendError, match="cuda"):
        ops.rope(q, table, backend="cuda")
