"""Which layers `fastdl.accelerate` knows, and what each becomes: `RULES`. Later rooms add theirs here.

torch's own layers become the subclasses in fastdl/nn, recurrent ones those in _swap_recurrent.py. Layers of Hugging
Face models are known by names and checked on a probe: RMS norms here, gated MLPs in _swap_gated.py.
Test: pytest tests/test_swap.py tests/test_swap_gated.py tests/test_swap_recurrent.py
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import _swap_recurrent as recurrent
from ._swap_gated import GatedByProbe, is_gated, plan_gated
from .nn._transformer import TransformerDecoderLayer, TransformerEncoderLayer
from .nn.activation import GatedMLP
from .nn.attention import MultiheadAttention
from .nn.batch_norm import BatchNorm1d, BatchNorm2d
from .nn.group_norm import GroupNorm
from .nn.norm import LayerNorm, RMSNorm
from .ops.norm import rms_norm


@dataclass(frozen=True)
class Rule:
    """room: op that the swapped layer calls. known(layer): the rule is about it. plan(layer): its new class and the
    instance attributes to set, or the reason to leave it."""

    room: str
    known: Callable[[nn.Module], bool]
    plan: Callable[[nn.Module], tuple[type, dict] | str]


def _torch_rule(room: str, ours: type, theirs: type) -> Rule:
    def plan(layer: nn.Module) -> tuple[type, dict] | str:
        if type(layer) is not theirs:
            return f"{type(layer).__name__} is a subclass that may compute something else"
        if layer.eps is not None and not layer.eps > 0:
            return f"its eps is {layer.eps}; the kernels need eps > 0"
        return "normalizes over no elements" if 0 in getattr(layer, "normalized_shape", ()) else (ours, {})

    return Rule(room, lambda layer: isinstance(layer, theirs), plan)


def _recurrent_rule(theirs: type) -> Rule:
    ours, room = recurrent.SWAPS[theirs]
    known = (theirs, *(kind for kind in recurrent.FUSED if issubclass(ours, kind)))

    def plan(layer: nn.Module) -> tuple[type, dict] | str:
        if type(layer) is theirs:
            return ours, {}
        return f"{type(layer).__name__} is a subclass that may compute something else"

    return Rule(room, lambda layer: isinstance(layer, known), plan)


def _attention_rule(ours: type, theirs: type) -> Rule:
    def plan(layer: nn.Module) -> tuple[type, dict] | str:
        if type(layer) is not theirs:
            return f"{type(layer).__name__} is a subclass that may compute something else"
        return ours, {}

    return Rule("attention", lambda layer: isinstance(layer, theirs), plan)


class _RMSNormByProbe:
    """forward of a Hugging Face RMS norm: weight and eps as the model's class keeps them."""

    backend: str | None = None

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())  # its one argument has another name in every model
        offset, promotes = self._fastdl_rms_norm
        y = rms_norm(x, self.weight, eps=_epsilon(self), weight_offset=offset, backend=self.backend)
        return y.to(torch.promote_types(x.dtype, self.weight.dtype)) if promotes else y


def _epsilon(layer: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(getattr(layer, name, None), float):
            return getattr(layer, name)
    return None


def _is_rms_norm(layer: nn.Module) -> bool:
    """Looks like LlamaRMSNorm and its kin: by name, with one weight and nothing else."""
    named = type(layer).__name__.endswith("RMSNorm") and not isinstance(layer, (nn.RMSNorm, nn.LayerNorm))
    parameters = dict(layer.named_parameters())
    tensors = (
        list(parameters) == ["weight"] and parameters["weight"].dim() == 1 and not any(True for _ in layer.buffers())
    )
    return named and tensors and not any(layer.children())


def _plan_rms_norm(layer: nn.Module) -> tuple[type, dict] | str:
    """Runs a copy of the layer with another weight on a probe, in training and in evaluation: its output says whether
    the weight has an offset, and which dtype comes out."""
    if _epsilon(layer) is None or not _epsilon(layer) > 0:
        return "its eps was not found" if _epsilon(layer) is None else f"its eps is {_epsilon(layer)}"
    weight, forward = layer.weight, type(layer).forward
    arguments = list(inspect.signature(forward).parameters)[1:]
    if len(arguments) != 1:
        return f"its forward takes more than the tensor: {', '.join(arguments)}"
    if weight.is_meta:
        return "is on the meta device: load the weights first"
    generator, probe, runs = torch.Generator().manual_seed(0), copy.copy(layer), []
    random = torch.randn(6, weight.shape[0], generator=generator, device="cpu")
    random[1:] *= torch.tensor([1e-3, 0.1, 1.0, 10.0, 100.0], device="cpu")[:, None]
    random = random.to(weight.device, weight.dtype)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a model's random numbers stay what they were
            w, x = torch.zeros_like(weight) + random[0], random[1:]
            probe.__dict__["_parameters"] = {"weight": nn.Parameter(w)}
            for mode in (False, True):
                probe.train(mode)
                runs.append(forward(probe, x))
            found = [forward(probe, x.to(dtype)).dtype for dtype in dtypes]
    except Exception as error:  # another signature, or a device that is not there
        return f"the probe failed: {type(error).__name__}: {error}"
    promotes = found == [torch.promote_types(dtype, weight.dtype) for dtype in dtypes]
    if not promotes and found != list(dtypes):
        return f"gives {found} for inputs of {dtypes}, which follows no known rule"
    limit = 1e-4 if weight.dtype == torch.float32 else 2e-2
    for offset in (0.0, 1.0):
        y = rms_norm(x, w, eps=_epsilon(layer), weight_offset=offset, backend="torch").float()
        if all(isinstance(z, Tensor) and torch.allclose(y, z.float(), rtol=limit, atol=limit) for z in runs):
            return _subclass(_RMSNormByProbe, type(layer)), {"_fastdl_rms_norm": (offset, promotes)}
    return "does not compute an RMS norm (checked on a probe)"


def _plan_gated(layer: nn.Module) -> tuple[type, dict] | str:
    found = plan_gated(layer)
    return found if isinstance(found, str) else (_subclass(GatedByProbe, type(layer)), found)


RULES = [
    _torch_rule("layer_norm", LayerNorm, nn.LayerNorm),
    _torch_rule("rms_norm", RMSNorm, nn.RMSNorm),
    _torch_rule("group_norm", GroupNorm, nn.GroupNorm),
    _torch_rule("batch_norm", BatchNorm1d, nn.BatchNorm1d),
    _torch_rule("batch_norm", BatchNorm2d, nn.BatchNorm2d),
    _attention_rule(MultiheadAttention, nn.MultiheadAttention),
    _attention_rule(TransformerEncoderLayer, nn.TransformerEncoderLayer),
    _attention_rule(TransformerDecoderLayer, nn.TransformerDecoderLayer),
    *(_recurrent_rule(theirs) for theirs in recurrent.SWAPS),
    Rule("rms_norm", _is_rms_norm, _plan_rms_norm),
    Rule("swiglu", is_gated, _plan_gated),
]

# Layers that are fused already.
FUSED = (
    *(LayerNorm, RMSNorm, GroupNorm, BatchNorm1d, BatchNorm2d, GatedMLP, *recurrent.FUSED),
    *(MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer),
)

# Subclasses of other packages' layers are made on demand, once, and found again by name when a model is unpickled.
_made: dict[tuple[type, type], type] = {}
_MIXINS = {"FusedNorm": _RMSNormByProbe, "FusedGated": GatedByProbe}


def _subclass(mixin: type, original: type) -> type:
    if (mixin, original) not in _made:
        word = next(word for word, kind in _MIXINS.items() if kind is mixin)
        name = f"{word}:{original.__module__.replace('.', '/')}:{original.__qualname__.replace('.', '/')}"
        _made[mixin, original] = type(name, (mixin, original), {"__module__": __name__, "__qualname__": name})
    return _made[mixin, original]


def __getattr__(name: str) -> type:
    word, *path = name.split(":")
    if word in _MIXINS and len(path) == 2:
        found = importlib.import_module(path[0].replace("/", "."))
        for part in path[1].split("/"):
            found = getattr(found, part)
        return _subclass(_MIXINS[word], found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
