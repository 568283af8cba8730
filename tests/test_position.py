"""Room position: the tables' formulas, the fused add in every lane, its gradients, and bad input."""

from __future__ import annotations

import functools
import math

import lanes
import pytest
import torch

from fastdl import BackendError, explain, ops
from fastdl.ops.position import BACKWARD, FORWARD
from fastdl.reference import philox
from fastdl.testing import check, poisoned

# shapes of x: one element, odd widths, several dimensions before n, wide rows, no element, many rows at a position
SHAPES = [(1, 1), (5, 7), (3, 6, 40), (2, 3, 5, 24), (2, 4, 1100), (0, 3, 8), (2, 0, 8), (2, 3, 0), (70, 2, 16)]
TABLE = 11  # rows


def make(shape, dtype, device="cpu", table_dtype=None):
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    return x, torch.randn(TABLE, shape[-1]).to(device, table_dtype or dtype).requires_grad_()


def places(shape, device="cpu"):
    """Every kind of positions for x of the shape: from the start, from elsewhere, repeated, one for each sequence."""
    n = shape[-2]
    found = [0, 3, torch.randint(TABLE, (n,), device=device)]
    if len(shape) > 2:
        found.append(torch.randint(TABLE, (shape[0], n), device=device))
        found.append(torch.full((shape[0], n), 4, device=device))
    return found


def plain(x, table, scale=1.0, positions=0):
    """What people write, in the dtype of x."""
    n = x.shape[-2]
    rows = table[positions : positions + n] if isinstance(positions, int) else table[positions]
    if rows.dim() == 3:
        rows = rows[(slice(None), *[None] * (x.dim() - 3))]
    return x * scale + rows.to(x.dtype)


# ---- Tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_sinusoidal_table(dim):
    table = ops.sinusoidal_table(50, dim)
    assert table.dtype == torch.float32 and table.shape == (50, dim)
    for position, column in ((0, 0), (1, 0), (49, dim - 1), (17, dim // 2)):
        angle = position / 10000 ** ((column - column % 2) / dim)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert abs(float(table[position, column]) - expected) < 1e-7
    assert torch.equal(ops.sinusoidal_table(9, dim, start=41), table[41:])
    assert ops.sinusoidal_table(0, dim).shape == (0, dim)


def test_sinusoids_far_away_are_exact_and_distances_turn_them():
    row = ops.sinusoidal_table(1, 8, start=10**6, base=50.0)[0]
    angle = 10**6 / 50.0 ** (2 / 8)
    assert abs(float(row[2]) - math.sin(angle)) < 1e-7 and abs(float(row[3]) - math.cos(angle)) < 1e-7
    table = ops.sinusoidal_table(60, 32).double()
    products = [float(table[p] @ table[p + 7]) for p in (0, 20, 50)]
    assert max(products) - min(products) < 1e-5


def test_alibi_slopes():
    assert torch.equal(ops.alibi_slopes(8), torch.tensor([2.0**-h for h in range(1, 9)]))
    sixteen = ops.alibi_slopes(16)
    torch.testing.assert_close(sixteen, torch.tensor([2.0 ** (-h / 2) for h in range(1, 17)]))
    torch.testing.assert_close(ops.alibi_slopes(12), torch.cat((ops.alibi_slopes(8), sixteen[0:8:2])))
    assert ops.alibi_slopes(1).tolist() == [2.0**-8] and ops.alibi_slopes(3).shape == (3,)
    assert ops.alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


def test_alibi_slopes_are_transformers():
    modeling = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in (1, 2, 3, 6, 8, 12, 14, 16, 20, 71, 112):
        alibi = modeling.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
        torch.testing.assert_close(ops.alibi_slopes(heads), alibi[:, 0, 1])


# ---- The add, in every lane -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(lane, shape):
    """Every kind of positions in every dtype: result and both gradients."""
    for dtype in lane.dtypes:
        for at in places(shape, lane.device):
            x, table = make(shape, dtype, lane.device)
            options = {"scale": 1.75, "positions": at}
            ours = functools.partial(ops.add_positions, backend=lane.backend, **options)
            check(ours, (x, table), peer=functools.partial(plain, **options))


def test_tables_of_other_dtypes(lane):
    for dtype in lane.dtypes[1:]:
        for table_dtype in (torch.float32, torch.float64):
            x, table = make((2, 5, 24), dtype, lane.device, table_dtype)
            y = ops.add_positions(x, table, positions=2, backend=lane.backend)
            dtable = torch.autograd.grad(y, table, torch.ones_like(y))[0]
            torch.testing.assert_close(y, (x.double() + table[2:7].double()).to(dtype), rtol=1e-2, atol=1e-2)
            assert (
                y.dtype == dtype
                and dtable.dtype == table_dtype
                and torch.equal(dtable[2:7], torch.full_like(dtable[2:7], 2))
            )


def test_only_one_of_x_and_table_has_a_gradient(lane):
    for dtype in lane.dtypes[:2]:
        for at in places((3, 6, 40), lane.device):
            for scale in (1.0, 0.5):
                x, table = make((3, 6, 40), dtype, lane.device)
                ours = functools.partial(ops.add_positions, scale=scale, positions=at, backend=lane.backend)
                theirs = functools.partial(plain, scale=scale, positions=at)
                check(ours, (x, table.detach()), peer=theirs)
                check(ours, (x.detach(), table), peer=theirs)


def test_dropout(lane):
    """Same seed, same mask as the reference; the gradients use it again."""
    for dtype in lane.dtypes:
        for at in places((3, 7, 40), lane.device)[1:4]:
            x, table = make((3, 7, 40), dtype, lane.device)
            grad, results = torch.randn_like(x), []
            for backend in (lane.backend, "torch"):
                torch.manual_seed(11)
                y = ops.add_positions(x, table, scale=2.0, positions=at, dropout_p=0.4, backend=backend)
                results.append((y, *torch.autograd.grad(y, (x, table), grad)))
            torch.manual_seed(11)
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=lane.device)
            mask = philox.keep_mask(seed, x.shape, 0.4)
            assert 0.2 < (~mask).float().mean() < 0.6
            assert not results[0][0][~mask].any() and not results[0][1][~mask].any() and results[0][1][mask].all()
            floor = 16 * torch.finfo(dtype).eps
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=floor, atol=floor * float(theirs.detach().abs().max()))


def test_dropout_ends(lane):
    x, table = make((2, 3, 16), torch.float32, lane.device)
    x.data[0, 0, 0] = float("inf")
    assert not ops.add_positions(x, table, dropout_p=1.0, backend=lane.backend).any()


def test_strided(lane):
    """Views: a slice of columns, a transposed batch, expanded rows, columns far apart, no address of 16 bytes."""
    base = torch.randn(6, 3, 90, device=lane.device)
    _, table = make((1, 64), torch.float32, lane.device)
    for view in (
        base[..., 8:72],
        base.transpose(0, 1)[..., :64],
        base[:, :1, :64].expand(6, 4, 64),
        base[::2, 1, 1:65],
        base.flatten()[1:1537].view(64, 8, 3).permute(2, 1, 0),
        base.flatten()[1:1537].view(3, 8, 64),
    ):
        check(
            functools.partial(ops.add_positions, backend=lane.backend),
            (view.detach().requires_grad_(), table),
            peer=plain,
        )


def test_positions_out_of_the_table_are_clamped(lane, monkeypatch):
    """Kernels are called below the checks, as they are where values are not looked at: on a GPU."""
    x, table = make((2, 4, 16), torch.float32, lane.device)
    positions = torch.tensor([[-7, 2, 1 << 40, 11], [0, 10, -1, -(1 << 62)]], device=lane.device)
    op = FORWARD[lanes.twin_of(lane.backend, torch.device(lane.device))]
    y = op(x, table, positions, 0, None, 0.0, 1.0)
    expected = plain(x, table, positions=positions.clamp(0, 10))
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, table, grad), torch.autograd.grad(expected, table, grad))
    monkeypatch.setenv("FASTDL_CHECK", "1")
    with pytest.raises(ValueError, match=r"positions: .* do not lie in the table"):
        ops.add_positions(x, table, positions=positions, backend=lane.backend)


def test_many_tokens_at_one_position(lane):
    """Long sums, in float32 and in an order of their own: more exact than one number added to the next."""
    tokens = 300 if lane.name in ("emulated cuda", "triton interpreted") else 3000
    x, table = make((1, tokens, 8), torch.float32, lane.device)
    positions = torch.randint(2, (tokens,), device=lane.device) * 5
    options = {"positions": positions}
    check(
        functools.partial(ops.add_positions, backend=lane.backend, **options),
        (x, table),
        peer=functools.partial(plain, **options),
    )


def test_inference_gives_the_same_bits(lane):
    for dtype in lane.dtypes[:2]:
        x, table = make((3, 6, 40), dtype, lane.device)
        for at in places(x.shape, lane.device):
            options = {"scale": 1.5, "positions": at, "backend": lane.backend}
            trained = ops.add_positions(x, table, **options)
            with torch.no_grad(), poisoned():
                assert torch.equal(ops.add_positions(x, table, **options), trained)


def test_double_backward(lane):
    """The gradients' gradient is the forward op again, by the same kernels."""
    positions = torch.tensor([[0, 3, 3, 1], [3, 3, 0, 10]], device=lane.device)
    x, table = make((2, 4, 24), torch.float32, lane.device)

    def third(y):
        first = torch.autograd.grad((y**3).sum(), (x, table), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), (x, table), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in second), (x, table))

    ours = third(ops.add_positions(x, table, scale=0.5, positions=positions, backend=lane.backend))
    theirs = third(plain(x, table, 0.5, positions))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    for which in (0, 1):  # one of them alone
        y = ops.add_positions(x, table, scale=0.5, positions=positions, backend=lane.backend)
        (first,) = torch.autograd.grad((y**2).sum(), (x, table)[which], create_graph=True)
        z = plain(x, table, 0.5, positions)
        (expected,) = torch.autograd.grad((z**2).sum(), (x, table)[which], create_graph=True)
        second = [torch.autograd.grad((g**2).sum(), (x, table)) for g in (first, expected)]
        for a, b in zip(*second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_opcheck(lane):
    x, table = make((2, 4, 24), torch.float32, lane.device)
    positions, seed = torch.randint(TABLE, (2, 4), device=lane.device), torch.tensor([5], device=lane.device)
    torch.library.opcheck(lanes.op_of(FORWARD, lane), (x, table, positions, 0, seed, 0.3, 2.0))
    torch.library.opcheck(lanes.op_of(FORWARD, lane), (x.detach(), table, None, 3, None, 0.0, 1.0))
    backward, grad = lanes.op_of(BACKWARD, lane), torch.randn(2, 4, 24, device=lane.device)
    order, begin = ops.position.reference.by_position(positions, TABLE)
    torch.library.opcheck(backward, (grad, positions, order, begin, 0, seed, 0.3, 2.0, TABLE, True, True))
    torch.library.opcheck(backward, (grad.requires_grad_(), None, None, None, 3, None, 0.0, 2.0, TABLE, True, False))
    torch.library.opcheck(backward, (grad.detach(), None, None, None, 3, None, 0.0, 1.0, TABLE, False, True))


def test_compile(lane):
    x, table = make((2, 4, 24), torch.float32, lane.device)
    positions = torch.randint(TABLE, (2, 4), device=lane.device)

    def step(x, table, positions):
        y = ops.add_positions(x, table, scale=2.0, positions=positions, backend=lane.backend)
        return ops.add_positions(y, table, positions=3, backend=lane.backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(x, table, positions), compiled(x, table, positions)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(y.square().sum(), (x, table)) for y in (expected, got)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_explain_says_which_back_end_runs(lane):
    x = torch.randn(2, 8, device=lane.device)
    assert explain("add_positions", x, x, backend=lane.backend).choice == lane.backend


def test_threads_do_not_change_results(level):
    x, table = make((5, 300, 96), torch.float32)
    table = torch.randn(400, 96, requires_grad=True)
    before, results = torch.get_num_threads(), []
    kinds = (50, torch.randint(400, (300,)), torch.randint(3, (5, 300)))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found = []
        for at in kinds:
            torch.manual_seed(3)
            y = ops.add_positions(x, table, positions=at, dropout_p=0.1)
            found += [y, *torch.autograd.grad(y, (x, table), x)]
        results.append(found)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- The maths, and torch's machinery -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 3), (2, 2, 3, 2)], ids=str)
def test_gradcheck(shape):
    x, table = make(shape, torch.float64)
    for at in places(shape):

        def function(x, table, at=at):
            torch.manual_seed(3)
            return ops.add_positions(x, table, scale=1.5, positions=at, dropout_p=0.3)

        assert torch.autograd.gradcheck(function, (x, table))
        assert torch.autograd.gradgradcheck(function, (x, table))


def test_transforms_run_the_reference():
    x, table = torch.randn(4, 3, 8), torch.randn(TABLE, 8)
    torch.testing.assert_close(torch.func.vmap(lambda t: ops.add_positions(t, table))(x), plain(x, table))
    gradient = torch.func.grad(lambda t: ops.add_positions(x, t, positions=2).square().sum())(table)
    torch.testing.assert_close(gradient, torch.func.grad(lambda t: plain(x, t, positions=2).square().sum())(table))
    with pytest.raises(BackendError, match=r"torch\.func"):
        torch.func.vmap(lambda t: ops.add_positions(t, table, backend="cpu"))(x)


BAD = [  # arguments beside x [2, 3, 8] and a table [4, 8]
    ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, TypeError, "x: expected a dense floating point"),
    ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    ({"x": torch.ones(8)}, ValueError, r"table: expected \[max_len, dim\]"),
    ({"table": torch.ones(4, 7)}, ValueError, r"table: expected \[max_len, dim\] .* got \(4, 7\) for \(2, 3, 8\)"),
    ({"table": torch.ones(4, 8).long()}, TypeError, "table: expected a dense floating point"),
    ({"table": torch.ones(4, 8, device="meta")}, ValueError, "table: expected the device of x"),
    ({"scale": "2"}, TypeError, "scale: expected a number, got str"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number, got str"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p: expected 0 <= p <= 1, got 1.5"),
    ({"positions": 2}, ValueError, "positions: 2 .. 4 do not lie in the table's 0 .. 3"),
    ({"positions": -1}, ValueError, "positions: -1 .. 1"),
    ({"positions": None}, TypeError, "positions: expected an int or an int64 tensor, got NoneType"),
    ({"positions": torch.zeros(3).int()}, TypeError, "positions: expected an int or an int64 tensor, got torch.int32"),
    ({"positions": torch.tensor([0, 4, 1])}, ValueError, "positions: 0 .. 4 do not lie"),
    ({"positions": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, r"positions: .* \[2, 3\], got \[3, 3\]"),
    ({"table": torch.ones(0, 8), "positions": torch.zeros(3, dtype=torch.int64)}, ValueError, "no rows"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:30] for *_, message in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.add_positions(**({"x": torch.ones(2, 3, 8), "table": torch.ones(4, 8)} | change))


def test_bad_input_to_tables():
    for call, message in (
        (lambda: ops.sinusoidal_table(-1, 8), "length: expected a number >= 0, got -1"),
        (lambda: ops.sinusoidal_table(4, 0), "dim: expected a number >= 1, got 0"),
        (lambda: ops.sinusoidal_table(4, 8, base=1.0), "base: expected a finite number > 1"),
        (lambda: ops.alibi_slopes(0), "heads: expected a number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(BackendError, match="float64"):
        ops.add_positions(torch.ones(2, 8).double(), torch.ones(2, 8), backend="cpu")
    with pytest.raises(BackendError, match="cuda"):
        ops.add_positions(torch.ones(2, 8), torch.ones(2, 8), backend="cuda")
