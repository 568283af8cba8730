"""The Mamba block, on the selective scan (contract: fastdl/ops/selective_scan.py).

Test: tests/test_selective_scan_modules.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import selective_scan

__all__ = ["Mamba"]

State = tuple[Tensor, Tensor]


class Mamba(nn.Module):
    """Mamba block: a gated, short convolution and a selective state space model, between two projections.

        x, z = in_proj(u);  x = silu(conv1d(x))         causal, each of d_inner = expand * d_model channels alone
        delta, B, C = x_proj(x);  delta = dt_proj(delta)
        y = selective_scan(x, delta, -exp(A_log), B, C, D, z=z), dt = softplus(delta);  out = out_proj(y)

    d_model            features
    d_state            states of a channel
    d_conv             steps that the convolution sees
    expand             d_inner / d_model
    dt_rank            rank of delta, or "auto": d_model / 16, rounded up
    dt_min, dt_max     steps dt start log-uniform between the two, at least dt_init_floor
    conv_bias, bias    biases of conv1d, and of in_proj and out_proj
    backend            of the scan: None, "cpu", "torch"

    ``forward(u, state=None, *, return_state=False)``
    u      [batch, length, d_model]
    state  what an earlier call returned: (the last d_conv - 1 inputs of conv1d [batch, d_inner, d_conv - 1], the scan's
           state [batch, d_inner, d_state] float32), or None at the beginning
    Returns out [batch, length, d_model], with return_state (out, state). ``step(u, state)``: one token, u [batch,
    d_model] -> (out [batch, d_model], state); a sequence in pieces, or token by token, gives what it gives whole.

    Parameters in_proj, conv1d, x_proj, dt_proj, A_log, D and out_proj have the names and shapes of the authors'
    implementation, so that their state_dicts load.

    >>> import torch, fastdl
    >>> block = fastdl.nn.Mamba(16, d_state=4)
    >>> u = torch.randn(2, 6, 16)
    >>> prompt, state = block(u[:, :5], return_state=True)
    >>> token, state = block.step(u[:, 5], state)
    >>> torch.allclose(token, block(u)[:, 5], atol=1e-5)
    True

    Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dt_rank == "auto":
            dt_rank = math.ceil(d_model / 16) if isinstance(d_model, int) else 1
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {dt_min}, {dt_max}")
        facts = {"device": device, "dtype": dtype}
        inner = expand * d_model
        self.d_model, self.d_state, self.d_conv, self.expand, self.dt_rank = d_model, d_state, d_conv, expand, dt_rank
        self.d_inner, self.backend = inner, backend
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **facts)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, **facts)
        self.x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False, **facts)
        self.dt_proj = nn.Linear(dt_rank, inner, **facts)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, device=device))  # float32, as is D
        self.D = nn.Parameter(torch.empty(inner, device=device))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **facts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of the paper: A = -(1 .. d_state), D = 1, dt log-uniform."""
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            layer.reset_parameters()
        with torch.no_grad():
            steps = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(steps.log().expand_as(self.A_log))
            self.D.fill_(1)
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            low, high = math.log(self.dt_min), math.log(self.dt_max)
            dt = torch.empty(self.d_inner, device=self.D.device).uniform_(low, high).exp().clamp(min=self.dt_init_floor)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"

    def forward(self, u: Tensor, state: State | None = None, *, return_state: bool = False):
        if not isinstance(u, Tensor):
            raise TypeError(f"u: expected a tensor, got {type(u).__name__}")
        if u.dim() != 3 or u.shape[-1] != self.d_model:
            raise ValueError(f"u: expected shape [batch, length, {self.d_model}], got {tuple(u.shape)}")
        before, h = self._check(u.shape[0], state)
        x, z = self.in_proj(u).chunk(2, -1)
        x, before = self._convolve(x, before)
        x = F.silu(x)
        delta, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), -1)
        delta = F.linear(delta, self.dt_proj.weight)  # its bias is added in the scan
        y, h = selective_scan(
            x,
            delta,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B,
            C,
            self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            h0=h,
            return_state=True,
            backend=self.backend,
        )
        out = self.out_proj(y)
        return (out, (before, h)) if return_state else out

    def step(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token: u [batch, d_model], state or None -> out [batch, d_model], state."""
        if not isinstance(u, Tensor) or u.dim() != 2 or u.shape[-1] != self.d_model:
            got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(f"u: expected shape [batch, {self.d_model}], got {got}")
        out, state = self(u.unsqueeze(1), state, return_state=True)
        return out.squeeze(1), state

    def _convolve(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [batch, length, d_inner] -> the causal convolution of each channel, and the inputs that the next call
        needs. A sum of shifted products: channels stay side by side, as the scan reads them."""
        batch, length, inner = x.shape
        if before is None:
            before = x.new_zeros(batch, inner, self.d_conv - 1)
        x = torch.cat((before.to(x.dtype).transpose(1, 2), x), 1)
        weight = self.conv1d.weight
        y = sum(x[:, k : k + length] * weight[:, 0, k] for k in range(self.d_conv))
        if self.conv1d.bias is not None:
            y = y + self.conv1d.bias
        return y, x[:, length:].transpose(1, 2)

    def _check(self, batch: int, state: State | None) -> State | tuple[None, None]:
        if state is None:
            return None, None
        expected = ((batch, self.d_inner, self.d_conv - 1), (batch, self.d_inner, self.d_state))
        got = tuple(tuple(t.shape) for t in state) if isinstance(state, tuple) else type(state).__name__
        if got != expected:
            raise ValueError(f"state: expected two tensors of shapes {expected}, got {got}")
        return state
