"""What the recurrent modules share: their options, the loop over layers, PackedSequence, and checks.

A module is torch's RNNBase or cell below a class of this file, `Sequence` (LSTM, GRU, RNN) or `Cell`, and the room's
own mixin, which says what one layer is (fastdl/nn/lstm.py, gru.py, rnn.py). Options are class attributes with neutral
values, so that assigning ``layer.__class__`` turns a torch layer into one of these. They derive from RNNBase and not
from nn.LSTM, nn.GRU and nn.RNN because torch.compile refuses every instance of those three; layers that
`fastdl.accelerate` swaps are instances of both (fastdl/_swap_recurrent.py).

Weights are found by name, a layer and direction at a time, as torch names them: ``weight_ih_l0``,
``weight_ih_l0_reverse``; a cell's have no suffix. The parameters of options are named in the same manner.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from .. import _library
from ..backend import BACKENDS
from ..ops._recurrent import check_lengths
from . import _recurrent_inference as inference


class Options:
    """Options that all recurrent modules have, and what a room's mixin says: its name, how many gates and states it
    has, and one layer."""

    _room: str
    _gates: int
    _states: tuple[str, ...]  # their names: ("h", "c") or ("h",)
    _option_names: tuple[str, ...]  # keyword arguments beyond torch's, as attributes
    _probabilities: tuple[str, ...] = ()  # those of them that are probabilities

    layer_norm = False
    learn_state = False
    eps = 1e-5
    weight_dtype: torch.dtype | None = None
    forget_bias: float | None = None
    input_dropout = state_dropout = weight_dropout = 0.0
    backend: str | None = None
    # What torch's layers have and its cells have not.
    num_layers, bidirectional, proj_size, dropout, batch_first = 1, False, 0, 0.0, False

    def _call_op(self, x, weights, states, lengths, h_mask) -> tuple[Tensor, list[Tensor]]:
        """One layer by the room's public function: x [T, B, I], weights by name [D, ...], states [D, B, ...] or None
        -> y [T, B, D * P], states."""
        raise NotImplementedError

    def _inference_arguments(self, weights: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor | None, tuple]:
        """(the bias to add to the products with the input [D, G * H] or None, what the inference op takes between
        w_hh and h_mask)."""
        raise NotImplementedError

    def _inference_numbers(self) -> tuple:
        """What the inference op takes after the seed."""
        raise NotImplementedError

    def _extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters that options add to each layer and direction: name without suffix -> shape."""
        rows = self._gates * self.hidden_size
        return {"weight_ln_ih": (rows,), "weight_ln_hh": (rows,)} if self.layer_norm else {}

    # ---- Options and parameters --------------------------------------------------------------------------------

    def _configure(self, device, dtype, **options) -> None:
        """Check and keep the options, and make their parameters."""
        for name in self._probabilities:
            p = options[name]
            if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
                raise ValueError(f"{name}: expected a probability from 0 to 1, got {p!r}")
        for name in ("layer_norm", "peephole", "learn_state"):
            if not isinstance(options.get(name, False), bool):
                raise TypeError(f"{name}: expected True or False, got {options[name]!r}")
        backend, narrow, forget = options["backend"], options["weight_dtype"], options.get("forget_bias")
        if backend not in (None, "auto", *BACKENDS):
            raise ValueError(f"backend: expected None, 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
        if narrow is not None and not (isinstance(narrow, torch.dtype) and narrow.is_floating_point):
            raise TypeError(f"weight_dtype: expected None or a floating point dtype, got {narrow!r}")
        if forget is not None:
            if isinstance(forget, bool) or not isinstance(forget, (int, float)):
                raise TypeError(f"forget_bias: expected a number or None, got {forget!r}")
            if not self.bias:
                raise ValueError(f"forget_bias: expected None where bias=False, got {forget}; set bias=True")
        vars(self).update(options)
        made = {name + suffix: s for suffix in self._suffixes() for name, s in self._extra_shapes().items()}
        if self.learn_state:
            made |= {f"{name}_0": self._state_shape(name, 1) for name in self._states}
        for name, shape in made.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        spread = 1 / math.sqrt(self.hidden_size)
        for name in made:
            if name.startswith("weight_peephole"):
                nn.init.uniform_(getattr(self, name), -spread, spread)
        self._reset_extras()

    def reset_parameters(self) -> None:
        """As torch's; weights of layer norm 1, its bias and learned states 0, the forget gate's bias as asked for."""
        super().reset_parameters()
        self._reset_extras()

    @torch.no_grad()
    def _reset_extras(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight_ln_"):
                nn.init.ones_(parameter)
            elif name.startswith("bias_ln_") or name in ("h_0", "c_0"):
                nn.init.zeros_(parameter)
        if self.forget_bias is not None:
            hidden = self.hidden_size
            for suffix in self._suffixes():
                getattr(self, "bias_ih" + suffix)[hidden : 2 * hidden] = self.forget_bias
                getattr(self, "bias_hh" + suffix)[hidden : 2 * hidden] = 0

    def _suffixes(self, layer: int | None = None) -> list[str]:
        """Of the parameters of one layer, or of all."""
        layers = range(self.num_layers) if layer is None else (layer,)
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{index}{end}" for index in layers for end in ends]

    def _weight_names(self) -> list[str]:
        """Of one layer, without suffix."""
        names = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self.bias else ())]
        return [*names, *(("weight_hr",) if self.proj_size else ()), *self._extra_shapes()]

    def _weights(self, layer: int) -> dict[str, Tensor]:
        """Those of one layer, both directions stacked: [D, ...]."""
        suffixes, found = self._suffixes(layer), {}
        for name in self._weight_names():
            tensors = [getattr(self, name + suffix) for suffix in suffixes]
            found[name] = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
        return found

    def _state_shape(self, name: str, batch: int) -> tuple[int, int, int]:
        size = self.proj_size if self.proj_size and name == "h" else self.hidden_size
        return self.num_layers * (2 if self.bidirectional else 1), batch, size

    def train(self, mode: bool = True):
        if mode != self.training:
            inference.forget(self)
        return super().train(mode)

    def _apply(self, *arguments, **options):
        inference.forget(self)
        return super()._apply(*arguments, **options)

    def extra_repr(self) -> str:
        given = [(name, getattr(self, name)) for name in self._option_names]
        more = [f", {name}={value!r}" for name, value in given if value != getattr(type(self), name)]
        return super().extra_repr() + "".join(more)

    # ---- The loop over layers ----------------------------------------------------------------------------------

    def _run(self, x: Tensor, states: list[Tensor] | None, lengths: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """x [T, B, I], states [L * D, B, ...] -> y [T, B, D * P], states [L * D, B, ...]"""
        if not self.training and _library.plain_call():
            prepared = inference.prepared(self, x)
            if prepared is not None:
                return prepared.run(self, x, states, lengths)
        given, batch, directions = x.dtype, x.shape[1], 2 if self.bidirectional else 1
        if states is None and self.learn_state:
            states = [getattr(self, f"{name}_0").expand(-1, batch, -1) for name in self._states]
        context = nullcontext()
        if self.weight_dtype is not None:
            if states is None:  # in the dtype of the input, not in that of the weights
                states = [x.new_zeros(self._state_shape(name, batch)) for name in self._states]
            x, context = x.to(self.weight_dtype), torch.autocast(x.device.type, enabled=False)
        last = [[] for _ in self._states]
        with context:
            for layer in range(self.num_layers):
                if layer and self.dropout and self.training:
                    x = functional.dropout(x, self.dropout)
                now = states and [s[layer * directions : (layer + 1) * directions] for s in states]
                x, after = self._run_layer(layer, x, now, lengths)
                for found, state in zip(last, after, strict=True):
                    found.append(state)
        y = x if self.weight_dtype is None else x.to(given)
        return y, [found[0] if len(found) == 1 else torch.cat(found) for found in last]

    def _run_layer(self, layer: int, x: Tensor, states, lengths: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """With the masks that hold for a whole forward."""
        weights, h_mask = self._weights(layer), None
        if self.training and self.input_dropout:
            x = x * functional.dropout(x.new_ones(1, *x.shape[1:]), self.input_dropout)
        if self.training and self.weight_dropout:
            weights["weight_hh"] = functional.dropout(weights["weight_hh"], self.weight_dropout)
        if self.training and self.state_dropout:
            _, *shape = self._state_shape("h", x.shape[1])
            h_mask = functional.dropout(x.new_ones(weights["weight_hh"].shape[0], *shape), self.state_dropout)
        return self._call_op(x, weights, states, lengths, h_mask)

    # ---- Checks ------------------------------------------------------------------------------------------------

    def check_input(self, input: Tensor, *_) -> None:
        dtype = getattr(self, "weight_ih" + self._suffixes(0)[0]).dtype
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"input: expected the dtype of the weights, {dtype}, got {input.dtype}; convert the input or the "
                "module, or use torch.autocast"
            )
        if input.shape[-1] != self.input_size:
            raise ValueError(f"input: expected shape [..., input_size = {self.input_size}], got {tuple(input.shape)}")

    def _split_states(self, hx, batch: int | None) -> list[Tensor] | None:
        """hx as torch's layer takes it -> the states, checked. batch None: without that dimension."""
        if hx is None:
            return None
        both = len(self._states) == 2
        if both and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"hx: expected a pair of tensors (h_0, c_0), got {got}")
        found = list(hx) if both else [hx]
        for index, (name, state) in enumerate(zip(self._states, found, strict=True)):
            called = f"hx[{index}]" if both else "hx"
            if not isinstance(state, Tensor):
                raise TypeError(f"{called}: expected a tensor, got {type(state).__name__}")
            shape, words = self._expected_state(name, batch)
            if tuple(state.shape) != shape:
                raise ValueError(f"{called}: expected shape {words} = {shape}, got {tuple(state.shape)}")
        return found

    def _expected_state(self, name: str, batch: int | None) -> tuple[tuple[int, ...], str]:
        """The shape of a state as the caller gives it, and the same in words."""
        layers, _, size = self._state_shape(name, 1)
        last = "proj_size" if self.proj_size and name == "h" else "hidden_size"
        if batch is None:
            return (layers, size), f"(num_layers * directions, {last})"
        return (layers, batch, size), f"(num_layers * directions, batch, {last})"


class Sequence(Options):
    """forward of LSTM, GRU and RNN."""

    def forward(self, input, hx=None, *, lengths: Tensor | None = None):
        if not self.training and type(input) is Tensor and _library.plain_call():
            result = inference.short_way(self, input, hx, lengths)
            if result is not None:
                return result
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, lengths)
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor or a PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"input: expected 2 or 3 dimensions (no batch, or one), got {tuple(input.shape)}")
        self.check_input(input)
        alone = input.dim() == 2
        turned = self.batch_first and not alone
        x = input.unsqueeze(1) if alone else input.transpose(0, 1) if turned else input
        states = self._split_states(hx, None if alone else x.shape[1])
        if alone:
            states = states and [s.unsqueeze(1) for s in states]
            if isinstance(lengths, Tensor) and lengths.dim() == 0:
                lengths = lengths.unsqueeze(0)
        if lengths is not None:
            lengths = check_lengths(lengths, x.shape[1], x.shape[0], x.device)
        y, last = self._run(x, states, lengths)
        if alone:
            y, last = y.squeeze(1), [s.squeeze(1) for s in last]
        elif turned:
            y = y.transpose(0, 1)
        return y, (tuple(last) if len(last) == 2 else last[0])

    def _packed(self, input: PackedSequence, hx, lengths):
        """Padded, run with its lengths, and packed again."""
        if lengths is not None:
            raise ValueError("lengths: expected None with a PackedSequence, which has its own")
        data, sizes, order, back = input
        if data.dim() != 2:
            raise ValueError(f"input.data: expected shape [steps, input_size], got {tuple(data.shape)}")
        self.check_input(data)
        x, steps = torch._VF._pad_packed_sequence(data, sizes, False, 0.0, len(sizes))
        states = self._split_states(hx, x.shape[1])
        if states is not None and order is not None:
            states = [s.index_select(1, order) for s in states]
        y, last = self._run(x, states, steps.to(x.device, non_blocking=True))
        packed, _ = torch._VF._pack_padded_sequence(y, steps, False)
        if back is not None:
            last = [s.index_select(1, back) for s in last]
        return PackedSequence(packed, sizes, order, back), (tuple(last) if len(last) == 2 else last[0])


class Cell(Options):
    """forward of LSTMCell, GRUCell and RNNCell: a sequence of one step."""

    def _suffixes(self, layer: int | None = None) -> list[str]:
        return [""]

    def forward(self, input: Tensor, hx=None):
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(f"input: expected 1 or 2 dimensions (no batch, or one), got {tuple(input.shape)}")
        self.check_input(input)
        alone = input.dim() == 1
        states = self._split_states(hx, None if alone else input.shape[0])
        x = input[None, None] if alone else input[None]
        _, last = self._run(x, states and [s[None, None] if alone else s[None] for s in states], None)
        last = [s[0, 0] if alone else s[0] for s in last]
        return tuple(last) if len(last) == 2 else last[0]

    def _expected_state(self, name: str, batch: int | None) -> tuple[tuple[int, ...], str]:
        hidden = self.hidden_size
        return ((hidden,), "(hidden_size,)") if batch is None else ((batch, hidden), "(batch, hidden_size)")
