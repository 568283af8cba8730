"""fastdl.quantize: quantize the linear and embedding layers of a model, in place.

Everything is checked and quantized first and swapped last, so an error leaves the model as it was. Layers that share
one weight (a tied embedding and output layer) share one QuantTensor afterwards, or stay as they are together.

Test: ``pytest tests/test_quantize_model.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .._patterns import select
from ..nn.quant_matmul import QuantEmbedding, QuantLinear
from .formats import FORMATS, Format, find
from .report import LayerReport, QuantReport, model_bytes
from .tensor import QuantTensor

__all__ = ["quantize"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


def quantize(
    model: nn.Module,
    format: str = "q4_1",
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> QuantReport:
    """Replace the nn.Linear and nn.Embedding layers of a model by quantized ones, in place.

    model    any module that contains such layers
    format   see `fastdl.ops.quantize`
    include  names of layers to take, with * and ? (``"*.mlp.*"``), one or several; None: all
    exclude  names to leave out, for example ``"lm_head"``

    Returns a report that prints as a table: what was quantized, what was skipped and why, bytes before and after.
    Layers that do not fit are skipped with a reason; NaN weights are an error. Calling it again with another format
    takes the layers that are left. Biases stay trainable parameters; forward hooks move to the new layers.

    Raises TypeError, ValueError (unknown format, a pattern that matches nothing, NaN weights, nothing to quantize); the
    model is then unchanged.

    >>> import torch, fastdl
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10))
    >>> print(fastdl.quantize(model, "q4_1", exclude="2"))
    layer  kind    shape    format  bytes          note
    0      Linear  96 x 64  q4_1    24576 -> 3840
    2      Linear  10 x 96          3840           skipped: excluded
    1 layer quantized, 1 skipped; the model has 8104 bytes, before 28840
    """
    fmt = find(format)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.Linear, nn.Embedding)):
        kind = type(model).__name__
        raise ValueError(f"model: is itself a layer ({kind}), use fastdl.nn.Quant{kind}.from_{kind.lower()}(model)")
    names = _names(model)
    selected = select(list(names.values()), include, exclude)
    before = model_bytes(model)
    reasons = _ties(model, names, {layer: _reason(layer, fmt, name in selected) for layer, name in names.items()})

    weights: dict[int, QuantTensor] = {}  # id(parameter) -> its one quantized tensor
    swaps: dict[nn.Module, nn.Module] = {}
    for layer, name in names.items():
        if reasons[layer] is None:
            key = id(layer.weight)
            if key not in weights:
                weights[key] = QuantTensor.quantize(layer.weight, format, f"{name}.weight")
            swaps[layer] = _quantized(layer, weights[key])
    layers = [_describe(layer, name, reasons[layer], weights) for layer, name in names.items()]
    if not swaps and not any(layer.already for layer in layers):
        why = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers) or "it has no Linear or Embedding"
        raise ValueError(f"model: nothing to quantize ({why})")
    _swap(model, swaps)
    return QuantReport(layers, before, model_bytes(model))


def _names(model: nn.Module) -> dict[nn.Module, str]:
    """Layers that hold a matrix of weights, each with its first name."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    kinds = (nn.Linear, nn.Embedding, QuantLinear, QuantEmbedding, nn.EmbeddingBag, nn.Bilinear, *convolutions)
    return {module: name for name, module in model.named_modules() if isinstance(module, kinds)}


def _reason(layer: nn.Module, fmt: Format, selected: bool) -> str | None:
    """Why this layer, taken alone, is skipped; None when it is not."""
    if isinstance(layer, (QuantLinear, QuantEmbedding)):
        return f"is {layer.weight.format} already"
    if not selected:
        return "excluded"
    if is_lazy(getattr(layer, "weight", None)):
        return "has no weights yet (lazy): call the model once first"
    if isinstance(layer, (nn.Linear, nn.Embedding)) and type(layer) not in (nn.Linear, nn.Embedding):
        return f"{type(layer).__name__} is a subclass that may compute something else"
    if type(layer) not in (nn.Linear, nn.Embedding):
        return f"no quantized {type(layer).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    if not isinstance(vars(layer)["_parameters"].get("weight"), nn.Parameter):
        return "its weight is computed (weight norm or the like), not a parameter"
    weight = layer.weight
    if weight.is_meta:
        return "is on the meta device: load the weights first"
    if not weight.dtype.is_floating_point:
        return f"weights of {weight.dtype}"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm rewrites its weights at each use"
    cols = weight.shape[1]
    if cols % fmt.block:
        fits = ", ".join(f.name for f in FORMATS.values() if f.encode and cols % f.block == 0)
        return f"{cols} input features do not divide by {fmt.block} (possible: {fits})"
    return None


def _ties(model: nn.Module, names: dict[nn.Module, str], reasons: dict[nn.Module, str | None]) -> dict:
    """reasons, with layers skipped whose weight someone else goes on using unquantized: the tie would break."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, f"{module_name}.{key}".lstrip(".")))
    result = dict(reasons)
    for layer in names:
        if reasons[layer] is None:
            for other, path in owners[id(layer.weight)]:
                if other is not layer and reasons.get(other, "") is not None:
                    result[layer] = f"shares its weight with {path}, which is not quantized"
    return result


def _quantized(layer: nn.Module, weight: QuantTensor) -> nn.Module:
    if isinstance(layer, nn.Linear):
        module: nn.Module = QuantLinear.from_weight(weight, layer.bias)
    else:
        module = QuantEmbedding.from_weight(weight, layer.padding_idx, dtype=layer.weight.dtype)
    for attribute in _HOOKS + _HOOK_FLAGS:  # the same dictionaries: handles of registered hooks go on working
        setattr(module, attribute, getattr(layer, attribute))
    return module.train(layer.training)


def _swap(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in swaps:
                parent._modules[key] = swaps[child]
    # Under eval and inference_mode these two hand the weights of their layers to one fused op, past the layers.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_quantized(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and _has_quantized(module):
            module.use_nested_tensor = False


def _has_quantized(module: nn.Module) -> bool:
    return any(isinstance(child, (QuantLinear, QuantEmbedding)) for child in module.modules())


def _describe(layer: nn.Module, name: str, reason: str | None, weights: dict[int, QuantTensor]) -> LayerReport:
    kind = type(layer).__name__
    weight = layer.weight
    if isinstance(weight, QuantTensor):
        return LayerReport(name, kind, weight.shape, weight.format, reason, weight.nbytes, weight.nbytes, already=True)
    before = weight.numel() * weight.element_size() if isinstance(weight, torch.Tensor) and not is_lazy(weight) else 0
    if reason is not None:
        return LayerReport(name, kind, () if is_lazy(weight) else tuple(weight.shape), None, reason, before, before)
    quantized = weights[id(weight)]
    return LayerReport(name, kind, quantized.shape, quantized.format, None, before, quantized.nbytes)
