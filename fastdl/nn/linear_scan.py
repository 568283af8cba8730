"""Layers on the linear recurrence of room linear_scan: QRNN and S4D (contract: fastdl/ops/linear_scan.py).

Test: tests/test_linear_scan_modules.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear_scan

__all__ = ["QRNN", "S4D"]

_GATES = {"f": 2, "fo": 3, "ifo": 4}


class QRNN(nn.Module):
    """Quasi-recurrent network: gates by a causal convolution over time, then a recurrence without matrix products.

        z = tanh(W_z x),  f = sigmoid(W_f x),  o = sigmoid(W_o x),  i = sigmoid(W_i x)
        c_t = f c_{t-1} + (1 - f) z             "fo"; "f" too, whose output is c
        c_t = f c_{t-1} + i z                   "ifo"
        output_t = o c_t                        x: the input at t, with window 2 at t - 1 (zeros at first) and t

    input_size, hidden_size, num_layers, bias, batch_first, bidirectional   as nn.GRU's
    window         1 or 2: inputs that a gate sees; the backward direction of time sees t and t + 1
    pooling        "f", "fo" or "ifo"
    dropout        0 <= p < 1, on the outputs of each layer but the last, in training
    zoneout        0 <= p < 1: in training each f is 1 with this probability, so that the state stays as it is (without
                   rescaling, as in the paper)
    backend        of the scan: None, "cpu", "cuda", "triton", "torch"

    ``forward(input, hx=None, *, lengths=None)``
    input    [length, batch, input_size], with batch_first [batch, length, input_size]; or [length, input_size]
    hx       [num_layers * directions, batch, hidden_size], the states c before the first step, or None for zeros
    lengths  int [batch] on any device, 0 .. length, in any order: steps of each sequence. Outputs past the end
             are zero, and the final state is that after the last real step (without a step: hx)

    Returns (output, h_n): output as input with directions * hidden_size features; h_n like hx, the final states c: the
    next segment's hx. (With "f" c is the last output; with the other two output = o c.)
    Parameters weight_l<k>[_reverse] [gates * hidden_size, window * features], the older input first, and bias_l<k>;
    gates in the order z f o i.

    >>> import torch, fastdl
    >>> layer = fastdl.nn.QRNN(8, 16, num_layers=2, window=2, batch_first=True)
    >>> output, h_n = layer(torch.randn(3, 5, 8), lengths=torch.tensor([5, 2, 0]))
    >>> output.shape, h_n.shape, bool(output[1, 2:].any())
    (torch.Size([3, 5, 16]), torch.Size([2, 3, 16]), False)

    Source: Bradbury, Merity, Xiong and Socher, "Quasi-recurrent neural networks" (2016).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        window: int = 1,
        pooling: str = "fo",
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        zoneout: float = 0.0,
        dropout: float = 0.0,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if window not in (1, 2):
            raise ValueError(f"window: expected 1 or 2, got {window!r}")
        if pooling not in _GATES:
            raise ValueError(f"pooling: expected 'f', 'fo' or 'ifo', got {pooling!r}")
        for name, p in (("zoneout", zoneout), ("dropout", dropout)):
            if not isinstance(p, (int, float)) or not 0 <= p < 1:
                raise ValueError(f"{name}: expected 0 <= p < 1, got {p!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.window, self.pooling, self.bias, self.batch_first = window, pooling, bias, batch_first
        self.bidirectional, self.zoneout, self.dropout, self.backend = bidirectional, zoneout, dropout, backend
        features, rows = input_size, _GATES[pooling] * hidden_size
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                weight = torch.empty(rows, window * features, device=device, dtype=dtype)
                self.register_parameter(f"weight_{suffix}", nn.Parameter(weight))
                if bias:
                    values = torch.empty(rows, device=device, dtype=dtype)
                    self.register_parameter(f"bias_{suffix}", nn.Parameter(values))
            features = hidden_size * (2 if bidirectional else 1)
        self.reset_parameters()

    def _suffixes(self, layer: int) -> tuple[str, ...]:
        return (f"l{layer}", f"l{layer}_reverse")[: 2 if self.bidirectional else 1]

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(hidden_size), as nn.GRU."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, window={self.window}"
        return f"{text}, pooling={self.pooling!r}, bidirectional={self.bidirectional}"

    def forward(self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None):
        batched = self._check(input, hx, lengths)
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        if hx is not None and not batched:
            hx = hx.unsqueeze(1)
        x = x if self.batch_first else x.transpose(0, 1)
        valid = None
        if lengths is not None:
            steps = torch.arange(x.shape[1], device=x.device)
            valid = (steps < lengths.to(x.device).reshape(-1, 1)).unsqueeze(-1)
            x = torch.where(valid, x, 0)
        directions, last = 2 if self.bidirectional else 1, []
        for layer in range(self.num_layers):
            outputs = []
            for index, suffix in enumerate(self._suffixes(layer)):
                state = None if hx is None else hx[layer * directions + index]
                output, state = self._direction(x, state, valid, suffix, index == 1)
                outputs.append(output)
                last.append(state)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if layer + 1 < self.num_layers and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
        x = x if self.batch_first else x.transpose(0, 1)
        h_n = torch.stack(last)
        return (x, h_n) if batched else (x.squeeze(0 if self.batch_first else 1), h_n.squeeze(1))

    def _direction(self, x: Tensor, h0: Tensor | None, valid: Tensor | None, suffix: str, reverse: bool):
        """x [batch, length, features] -> outputs [batch, length, hidden], the final state [batch, hidden]."""
        if self.window == 2:
            older = F.pad(x[:, 1:], (0, 0, 0, 1)) if reverse else F.pad(x[:, :-1], (0, 0, 1, 0))
            x = torch.cat((older, x), -1) if x.shape[1] else x.new_empty(*x.shape[:2], 2 * x.shape[2])
        gates = F.linear(x, getattr(self, f"weight_{suffix}"), getattr(self, f"bias_{suffix}") if self.bias else None)
        z, f, *rest = gates.chunk(_GATES[self.pooling], -1)
        f = torch.sigmoid(f)
        if self.zoneout and self.training:
            f = torch.where(torch.rand_like(f) < self.zoneout, 1, f)
        if valid is not None:  # a step with f = 1 and nothing added passes the state through
            f = torch.where(valid, f, 1)
        added = torch.tanh(z) * (torch.sigmoid(rest[1]) if self.pooling == "ifo" else 1 - f)
        if valid is not None:
            added = torch.where(valid, added, 0)
        c = linear_scan(f, added, h0, reverse=reverse, backend=self.backend)
        if c.shape[1]:
            state = c[:, 0 if reverse else -1]
        else:
            state = c.new_zeros(c.shape[0], self.hidden_size) if h0 is None else h0
        y = c if self.pooling == "f" else torch.sigmoid(rest[0]) * c
        return y if valid is None else torch.where(valid, y, 0), state

    def _check(self, x: Tensor, hx: Tensor | None, lengths: Tensor | None) -> bool:
        """True when the input has a batch dimension. Raises what is wrong with the arguments."""
        if not isinstance(x, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(x).__name__}")
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            order = "[batch, length, " if self.batch_first else "[length, batch, "
            raise ValueError(f"input: expected shape {order}{self.input_size}], got {tuple(x.shape)}")
        batched = x.dim() == 3
        batch = (x.shape[0 if self.batch_first else 1],) if batched else ()
        if hx is not None:
            expected = (self.num_layers * (2 if self.bidirectional else 1), *batch, self.hidden_size)
            if hx.shape != expected:
                raise ValueError(f"hx: expected shape {expected}, got {tuple(hx.shape)}")
        if lengths is not None:
            steps = x.shape[1 if self.batch_first else 0] if batched else x.shape[0]
            _check_lengths(lengths, batch, steps)
        return batched


def _check_lengths(lengths: Tensor, batch: tuple[int, ...], steps: int) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths: expected an int64 or int32 tensor, got {got}")
    if lengths.shape != batch:
        raise ValueError(f"lengths: expected shape {batch}, a number for each sequence, got {tuple(lengths.shape)}")
    # On a GPU reading values would wait for the device; there any value is safe.
    if not torch.compiler.is_compiling() and lengths.device.type == "cpu" and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > steps:
            raise ValueError(f"lengths: expected 0 .. {steps}, got {low if low < 0 else high}")


class S4D(nn.Module):
    """Diagonal state space layer: every feature has d_state / 2 complex states of its own, and their conjugates.

        h' = A h + u,  y = 2 Re(C h) + D u       A = -exp(log_A_real) + i A_imag, in steps of exp(log_dt)
        h_t = a h_{t-1} + b u_t                  zoh: a = exp(dt A), b = (a - 1) / A
                                                 bilinear: a = (1 + dt A / 2) b / dt, b = dt / (1 - dt A / 2)
        out = glu(linear(dropout(gelu(y))))      the mixing of features; glu=False leaves it out

    d_model         features
    d_state         even, states of a feature (with their conjugates)
    init            "lin": A_imag = pi n; "inv": A_imag = N / pi (N / (2 n + 1) - 1)
    discretization  "zoh" or "bilinear"
    dt_min, dt_max  steps start log-uniform between the two
    mode            "convolution": y as a convolution by FFT, as in the paper; "scan": by the recurrence, whose states
                    [batch, length, d_model * d_state / 2] complex64 are held in memory. The same numbers
    backend         of the scan

    ``forward(u, state=None, *, return_state=False)``
    u      [batch, length, d_model], float32 (16-bit input is widened inside)
    state  [batch, d_model, d_state / 2] complex64, that before the first step, or None; with it, and with
           return_state, the scan is taken
    Returns out [batch, length, d_model], or (out, state). ``step(u, state)``: one step, u [batch, d_model].

    >>> import torch, fastdl
    >>> layer = fastdl.nn.S4D(4, d_state=8)
    >>> u = torch.randn(2, 6, 4)
    >>> first, state = layer(u[:, :5], return_state=True)
    >>> last, state = layer.step(u[:, 5], state)
    >>> torch.allclose(last, layer(u)[:, 5], atol=1e-5)
    True

    Source: Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state space models" (2022).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dropout: float = 0.0,
        glu: bool = True,
        mode: str = "convolution",
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not isinstance(d_model, int) or d_model < 1:
            raise ValueError(f"d_model: expected an int of at least 1, got {d_model!r}")
        if not isinstance(d_state, int) or d_state < 2 or d_state % 2:
            raise ValueError(f"d_state: expected an even number of at least 2, got {d_state!r}")
        for name, value, known in (
            ("init", init, ("lin", "inv")),
            ("discretization", discretization, ("zoh", "bilinear")),
            ("mode", mode, ("convolution", "scan")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {dt_min}, {dt_max}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected 0 <= p < 1, got {dropout!r}")
        self.d_model, self.d_state, self.init, self.discretization = d_model, d_state, init, discretization
        self.dt_min, self.dt_max, self.dropout, self.mode, self.backend = dt_min, dt_max, dropout, mode, backend
        half, facts = d_state // 2, {"device": device, "dtype": dtype}
        self.log_dt = nn.Parameter(torch.empty(d_model, **facts))
        self.log_A_real = nn.Parameter(torch.empty(d_model, half, **facts))
        self.A_imag = nn.Parameter(torch.empty(d_model, half, **facts))
        self.C = nn.Parameter(torch.empty(d_model, half, 2, **facts))  # real and imaginary parts
        self.D = nn.Parameter(torch.empty(d_model, **facts))
        self.output_linear = nn.Linear(d_model, 2 * d_model, **facts) if glu else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        half = self.d_state // 2
        n = torch.arange(half, dtype=torch.float64)
        imag = math.pi * n if self.init == "lin" else self.d_state / math.pi * (self.d_state / (2 * n + 1) - 1)
        with torch.no_grad():
            self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
            self.log_A_real.fill_(math.log(0.5))
            self.A_imag.copy_(imag.to(self.A_imag).expand_as(self.A_imag))
            self.C.normal_(std=math.sqrt(0.5))
            self.D.normal_()
        if self.output_linear is not None:
            self.output_linear.reset_parameters()

    def extra_repr(self) -> str:
        kinds = f"init={self.init!r}, discretization={self.discretization!r}, mode={self.mode!r}"
        return f"{self.d_model}, d_state={self.d_state}, {kinds}"

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and C as complex [d_model, d_state / 2]."""
        wide = torch.promote_types(self.log_dt.dtype, torch.float32)
        A = torch.complex(-self.log_A_real.to(wide).exp(), self.A_imag.to(wide))
        dt = self.log_dt.to(wide).exp()[:, None]
        if self.discretization == "zoh":
            a = torch.exp(dt * A)
            b = (a - 1) / A
        else:
            a = (1 + dt * A / 2) / (1 - dt * A / 2)
            b = dt / (1 - dt * A / 2)
        return a, b, torch.view_as_complex(self.C.to(wide).contiguous())

    def kernel(self, length: int) -> Tensor:
        """The convolution kernel 2 Re(C a^t b), t = 0 .. length - 1: [d_model, length]."""
        a, b, C = self.discrete()
        powers = torch.exp(a.log()[..., None] * torch.arange(length, device=a.device))
        return 2 * torch.einsum("dn,dnt->dt", C * b, powers).real

    def forward(self, u: Tensor, state: Tensor | None = None, *, return_state: bool = False):
        if not isinstance(u, Tensor):
            raise TypeError(f"u: expected a tensor, got {type(u).__name__}")
        if u.dim() != 3 or u.shape[-1] != self.d_model:
            raise ValueError(f"u: expected shape [batch, length, {self.d_model}], got {tuple(u.shape)}")
        self._check_state(u, state)
        x = u.to(torch.promote_types(u.dtype, torch.float32))
        batch, length, _ = x.shape
        if state is None and not return_state and self.mode == "convolution" and length:
            size = 2 * length  # zeros behind, so that the end does not reach the beginning
            spectrum = torch.fft.rfft(self.kernel(length), size) * torch.fft.rfft(x.transpose(1, 2), size)
            return self._finish(torch.fft.irfft(spectrum, size)[..., :length].transpose(1, 2), x, u.dtype)
        a, b, C = self.discrete()
        added = (x[..., None] * b).reshape(batch, length, -1)
        before = None if state is None else state.reshape(batch, -1)
        h = linear_scan(a.reshape(1, 1, -1), added, before, backend=self.backend).reshape(batch, length, *a.shape)
        y = self._finish(2 * torch.einsum("btdn,dn->btd", h, C).real, x, u.dtype)
        if not return_state:
            return y
        if not length:
            return y, a.new_zeros(batch, *a.shape) if state is None else state
        return y, h[:, -1]

    def step(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step: u [batch, d_model], state [batch, d_model, d_state / 2] or None -> out [batch, d_model], state."""
        if u.dim() != 2 or u.shape[-1] != self.d_model:
            raise ValueError(f"u: expected shape [batch, {self.d_model}], got {tuple(u.shape)}")
        self._check_state(u, state)
        x = u.to(torch.promote_types(u.dtype, torch.float32))
        a, b, C = self.discrete()
        state = b * x[..., None] if state is None else a * state + b * x[..., None]
        return self._finish(2 * (state * C).sum(-1).real, x, u.dtype), state

    def _check_state(self, u: Tensor, state: Tensor | None) -> None:
        expected = (u.shape[0], self.d_model, self.d_state // 2)
        if state is not None and (not isinstance(state, Tensor) or state.shape != expected or not state.is_complex()):
            got = f"{state.dtype} {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"state: expected a complex tensor of shape {expected}, got {got}")

    def _finish(self, y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Skip, activation, dropout and the mixing of features; y without the skip, x: the input, float32."""
        y = y + x * self.D.to(x.dtype)
        if self.output_linear is None:
            return y.to(dtype)
        y = F.dropout(F.gelu(y), self.dropout, self.training).to(self.output_linear.weight.dtype)
        return F.glu(self.output_linear(y), -1).to(dtype)
