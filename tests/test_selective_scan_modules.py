"""The Mamba block against a loop from the paper's formulas; generation; torch.compile; state_dicts; bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdl.nn import Mamba


def block_loop(m, u):
    """u [batch, length, d_model] by the formulas of Gu and Dao, with torch's own convolution."""
    x, z = m.in_proj(u).chunk(2, -1)
    x = F.silu(m.conv1d(x.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
    delta, B, C = m.x_proj(x).split((m.dt_rank, m.d_state, m.d_state), -1)
    dt, A = F.softplus(m.dt_proj(delta)), -m.A_log.exp()
    h, found = u.new_zeros(u.shape[0], m.d_inner, m.d_state), []
    for t in range(u.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None] * x[:, t, :, None]
        found.append((h * C[:, t, None]).sum(-1) + m.D * x[:, t])
    return m.out_proj(torch.stack(found, 1) * F.silu(z)), h


@pytest.mark.parametrize(
    "options", [{}, {"d_conv": 1, "dt_rank": 3}, {"bias": True, "conv_bias": False, "expand": 1}], ids=str
)
def test_the_block_is_the_papers(lane, options):
    block = Mamba(10, d_state=4, **options, backend=lane.backend).to(lane.device)
    u = torch.randn(2, 19, 10, device=lane.device, requires_grad=True)
    leaves = (u, *block.parameters())
    y, (_, last) = block(u, return_state=True)
    expected, state = block_loop(block, u)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max())))


def test_pieces_and_tokens_give_the_whole(lane):
    block = Mamba(8, d_state=5, backend=lane.backend).to(lane.device)
    u = torch.randn(2, 20, 8, device=lane.device)
    with torch.no_grad():
        whole, last = block(u, return_state=True)
        first, state = block(u[:, :2], return_state=True)  # fewer than the convolution sees
        second, state = block(u[:, 2:18], state, return_state=True)
        found = [first, second]
        for t in (18, 19):
            y, state = block.step(u[:, t], state)
            found.append(y[:, None])
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)
        for a, b in zip(state, last, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        y, unchanged = block(u[:, :0], last, return_state=True)
        assert y.shape == (2, 0, 8) and all(torch.equal(a, b) for a, b in zip(unchanged, last, strict=True))


def test_compile(lane):
    block = Mamba(8, d_state=4, backend=lane.backend).to(lane.device)
    u = torch.randn(2, 6, 8, device=lane.device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected, got = block(u), compiled(u)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.sum(), block.A_log)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)


def test_gradcheck():
    block = Mamba(4, d_state=2, d_conv=2, expand=1).double()
    u = torch.randn(1, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(block, (u,)) and torch.autograd.gradgradcheck(block, (u,))


def test_names_and_initial_values():
    block = Mamba(32)
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    assert shapes == {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 32, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }
    dt = F.softplus(block.dt_proj.bias)
    assert float(dt.min()) > 0.0009 and float(dt.max()) < 0.11
    assert torch.allclose(block.A_log.exp()[3], torch.arange(1.0, 17))


def test_16_bits(lane):
    block = Mamba(8, d_state=4, backend=lane.backend).to(lane.device)
    u = torch.randn(2, 6, 8, device=lane.device)
    expected = block(u)
    dtype = lane.dtypes[1]
    got = block.to(dtype)(u.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Mamba(0), ValueError, "d_model: expected an int of at least 1, got 0"),
        (lambda: Mamba(8, dt_rank="full"), ValueError, "dt_rank: expected an int of at least 1, got 'full'"),
        (lambda: Mamba(8, dt_min=1.0, dt_max=0.1), ValueError, "dt_min, dt_max: expected 0 < dt_min <= dt_max"),
        (lambda: Mamba(8)(torch.zeros(2, 8)), ValueError, r"u: expected shape \[batch, length, 8\], got \(2, 8\)"),
        (lambda: Mamba(8)([1.0]), TypeError, "u: expected a tensor, got list"),
        (lambda: Mamba(8).step(torch.zeros(2, 3, 8)), ValueError, r"u: expected shape \[batch, 8\], got \(2, 3, 8\)"),
        (
            lambda: Mamba(8)(torch.zeros(2, 3, 8), (torch.zeros(2, 16, 4), torch.zeros(2, 16, 16))),
            ValueError,
            r"state: expected two tensors of shapes \(\(2, 16, 3\), \(2, 16, 16\)\), got",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
