"""Layers that are not as the manual shows them: swapped rightly, or left with a reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from swap_model import NEAR, X, small
from torch import nn
from torch.nn.utils import parametrize

import fastdl
from fastdl import swap


def test_a_layer_at_two_places(native):
    """Swapped once; each of its names counts for only and exclude."""
    norm = nn.LayerNorm(16)
    model = nn.Sequential(norm, nn.Linear(16, 16), norm)
    expected = model(X)
    assert not fastdl.accelerate(model, exclude="2").swapped
    report = fastdl.accelerate(model, only="2")
    assert [layer.name for layer in report.swapped] == ["0"] and model[0] is model[2]
    torch.testing.assert_close(model(X), expected)
    fastdl.restore(model)
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match=r"only: '3' matches no layer; the layers are 0, 2"):
        fastdl.accelerate(model, only="3")


def test_tied_weights(native):
    model = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16))
    model[1].weight = model[0].weight
    fastdl.accelerate(model)
    model(X).square().sum().backward()
    ours = model[0].weight.grad.clone()
    fastdl.restore(model)
    model.zero_grad()
    model(X).square().sum().backward()
    torch.testing.assert_close(ours, model[0].weight.grad, **NEAR)
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("shape", [(16,), (7, 16)], ids=str)
@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.RMSNorm])
def test_layers_without_parameters(native, layer, shape):
    norm = layer(shape, elementwise_affine=False)
    expected = norm(X)
    assert fastdl.accelerate(norm).swapped
    torch.testing.assert_close(norm(X), expected, **NEAR)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.LayerNorm(4, eps=0.0), "its eps is 0.0; the kernels need eps > 0"),
        (lambda: nn.LayerNorm(0), "normalizes over no elements"),
        (lambda: torch.ao.nn.quantized.LayerNorm(4, *map(nn.Parameter, torch.ones(2, 4)), 0.1, 0), "is a subclass"),
    ],
    ids=["eps 0", "no elements", "quantized"],
)
def test_layers_that_the_kernels_cannot_take(native, layer, reason):
    (left,) = fastdl.accelerate(layer()).left
    assert reason in left.reason


def test_arguments_by_name(native):
    """torch calls the argument of LayerNorm input, that of RMSNorm x; Hugging Face's models have names of their own."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(16)
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(16)
    for norm, name in ((nn.LayerNorm(16), "input"), (nn.RMSNorm(16), "x"), (llama, "hidden_states"), (gemma, "x")):
        expected = norm(**{name: X})
        assert fastdl.accelerate(norm).swapped
        torch.testing.assert_close(norm(**{name: X}), expected, **NEAR)


def test_a_norm_with_a_gate_is_left(native):
    """Without its optional argument it computes an RMS norm, with it something else."""

    class GatedRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, hidden_states, gate=None):
            y = nn.functional.rms_norm(hidden_states, (16,), self.weight, self.eps)
            return y if gate is None else y * nn.functional.silu(gate)

    model = nn.Sequential(GatedRMSNorm())
    (left,) = fastdl.accelerate(model).left
    assert left.reason == "its forward takes more than the tensor: hidden_states, gate"


class PlainRMSNorm(nn.Module):
    """Llama's formula; ``rule`` says which dtype comes out."""

    def __init__(self, rule):
        super().__init__()
        self.weight, self.eps, self.rule = nn.Parameter(torch.ones(16) * 1.5), 1e-6, rule

    def forward(self, x):
        y = nn.functional.rms_norm(x.float(), (16,), eps=self.eps).to(x.dtype) * self.weight
        return y if self.rule == "promote" else y.to(x.dtype if self.rule == "input" else self.weight.dtype)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["promote", "input", "weight"])
def test_output_dtypes_of_rms_norms(native, rule, weights):
    """Mixed inputs give what they gave; a rule that is not known leaves the layer."""
    norm = PlainRMSNorm(rule).to(weights)
    inputs = [X.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    expected = [norm(x).dtype for x in inputs]
    report = fastdl.accelerate(norm)
    assert [norm(x).dtype for x in inputs] == expected
    if rule == "weight" and weights != torch.float32:  # float32 weights promote everything, which is a known rule
        assert "follows no known rule" in report.left[0].reason
    else:
        assert report.swapped


def test_a_forward_replaced_after_the_swap(native):
    """It may hold the swapped forward, which the layer's own class could not run: restore refuses, then works."""
    model = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16))
    fastdl.accelerate(model)
    swapped = model[1].forward
    model[1].forward = lambda x: 2 * swapped(x)
    with pytest.raises(RuntimeError, match=r"1: its forward was replaced after the swap .*take that back first"):
        fastdl.restore(model)
    assert type(model[0]) is fastdl.nn.LayerNorm
    model(X)
    del model[1].forward
    fastdl.restore(model)
    assert type(model[0]) is type(model[1]) is nn.LayerNorm


def test_automatic_by_name(native):
    """backend="auto" means what None means: a layer without a fused back end is left."""
    assert (
        "no fused back end for torch.float64"
        in fastdl.accelerate(nn.LayerNorm(4).double(), backend="auto").left[0].reason
    )


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_after_the_swap(native):
    """restore takes out the swap and leaves the parametrization, which can still be removed."""
    model = small()
    fastdl.accelerate(model)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    swapped = model(X)
    fastdl.restore(model)
    assert parametrize.is_parametrized(model[0]) and not isinstance(model[0], fastdl.nn.LayerNorm)
    torch.testing.assert_close(model(X), swapped, **NEAR)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.LayerNorm
    torch.testing.assert_close(model(X), swapped, **NEAR)


def test_parametrized_before_the_swap(native):
    model = small()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight_norm, which works by a hook, is deprecated
        nn.utils.weight_norm(model[1][1], dim=None)
    expected = model(X)
    report = fastdl.accelerate(model)
    assert [layer.name for layer in report.swapped] == ["1.1", "2"]
    assert "ParametrizedLayerNorm is a subclass" in report.left[0].reason
    torch.testing.assert_close(model(X), expected, **NEAR)


def test_a_class_that_somebody_else_assigned_stays(native):
    class Theirs(nn.LayerNorm):
        pass

    norm = nn.LayerNorm(16)
    fastdl.accelerate(norm)
    norm.__class__ = Theirs
    fastdl.restore(norm)
    assert type(norm) is Theirs and swap._MARK not in vars(norm)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_go_to_torchs_layer(native, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=layout)
    norm = nn.LayerNorm(16)
    expected = norm(x)
    fastdl.accelerate(norm)
    for ours, theirs in zip(norm(x).unbind(), expected.unbind(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(TypeError, match=r"x: expected a dense floating point .* nested"):
        fastdl.ops.layer_norm(x)


def test_dtypes_change_after_the_swap(native):
    model = small()
    fastdl.accelerate(model)
    model.double()
    double = model(X.double())
    fastdl.restore(model)
    torch.testing.assert_close(double, model(X.double()))
    model = small().bfloat16()
    model[0].float(), model[2].float()  # norms in float32 inside a bfloat16 model
    expected = model(X.bfloat16())
    fastdl.accelerate(model)
    assert model(X.bfloat16()).dtype == expected.dtype
    torch.testing.assert_close(model(X.bfloat16()), expected, rtol=2e-2, atol=2e-2)


def test_frozen_weights_get_no_gradient(native):
    model = small().requires_grad_(False)
    model[0].bias.requires_grad_()
    fastdl.accelerate(model)
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None and model[0].bias.grad is not None and model[0].weight.grad is None
