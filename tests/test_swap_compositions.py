"""Swapped layers together with what else people do to a model: compile, autocast, save, export, torch.func, share,
parametrize, quantize. Exotic layers are swapped rightly or left with a reason."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils import checkpoint

import fastdl
from fastdl import BackendError, swap

X = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def small() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU())
    return nn.Sequential(nn.LayerNorm(16), block, nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 16))


def profiled(model: nn.Module) -> set[str]:
    """Names of the norms that a call runs, inside compiled code too."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(X)
    return {event.key for event in profile.key_averages()} & {"fastdl::norm_inference", "aten::native_layer_norm"}


# ---- torch.compile, autocast, saving ---------------------------------------------------------------------------------


def test_compile_with_inductor(native):
    """Forward and gradients of one graph, with shapes that change."""
    model = small()
    expected = [p.grad.clone() for p in run_backward(model)]
    fastdl.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for found, wanted in zip(run_backward(model, compiled), expected, strict=True):
        torch.testing.assert_close(found.grad, wanted, **NEAR)
    torch.testing.assert_close(compiled(X[:2]), model(X[:2]))


def run_backward(model: nn.Module, call=None) -> list[nn.Parameter]:
    model.zero_grad()
    (call or model)(X).square().sum().backward()
    return list(model.parameters())


def test_compiled_before_the_swap(native):
    """A model that was compiled first: the swap and the restore are both seen, through either of the two objects."""
    model = small()
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(X)
    assert profiled(compiled) == {"aten::native_layer_norm"}
    report = fastdl.accelerate(compiled)
    assert [layer.name for layer in report.swapped] == ["_orig_mod.0", "_orig_mod.1.1", "_orig_mod.2"]
    assert profiled(compiled) == {"fastdl::norm_inference"}
    torch.testing.assert_close(compiled(X), expected)
    fastdl.restore(model)
    assert profiled(compiled) == {"aten::native_layer_norm"} and torch.equal(compiled(X), expected)


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32 input", "bf16 input"])
@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.RMSNorm])
def test_autocast_dtypes(native, layer, narrow):
    """What comes out under autocast is what comes out of torch's layer."""
    norm, x = layer(16), X.bfloat16() if narrow else X
    with torch.autocast("cpu", torch.bfloat16):
        expected = norm(x)
        with fastdl.accelerated(norm):
            found = norm(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_training(native, compiled):
    """30 steps in bfloat16 with float32 parameters: the unswapped run's losses."""

    def losses(swapped):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if swapped:
            fastdl.accelerate(model)
        call = torch.compile(model, backend="aot_eager") if compiled and swapped else model
        found = []
        for _ in range(30):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = call(X)
            loss = (y.float() - X.roll(1, dims=-1)).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    plain, fused = losses(False), losses(True)
    assert plain[-1] < 0.7 * plain[0]
    torch.testing.assert_close(fused, plain, rtol=8e-3, atol=0)  # one step of bfloat16


def test_whole_model_in_a_file(native, tmp_path):
    """torch.save of the model, loaded here and by a process that never imported fastdl; restored there."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(16)
    model = nn.Sequential(small(), llama).eval()
    expected = model(X)
    fastdl.accelerate(model)
    path = tmp_path / "model.pt"
    torch.save((model, X, model(X).detach()), path)
    loaded, _, y = torch.load(path, weights_only=False)
    assert torch.equal(loaded(X), y) and type(loaded[0][0]) is fastdl.nn.LayerNorm
    fastdl.restore(loaded)
    assert torch.equal(loaded(X), expected) and type(loaded[1]) is type(model[1]).__mro__[2]
    code = (
        f"import torch; model, x, y = torch.load({str(path)!r}, weights_only=False); assert torch.equal(model(x), y); "
        "import fastdl; fastdl.restore(model); print(type(model[0][0]).__module__, type(model[1]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["torch.nn.modules.normalization", "LlamaRMSNorm"], done.stderr


def test_copies_are_independent(native):
    model = small()
    fastdl.accelerate(model)
    other = copy.deepcopy(model)
    fastdl.restore(other)
    assert type(model[0]) is fastdl.nn.LayerNorm and type(other[0]) is nn.LayerNorm
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(X), other(X))


# ---- Export, trace, torch.func ---------------------------------------------------------------------------------------


def test_export_and_trace(native):
    model = small().eval().requires_grad_(False)
    fastdl.accelerate(model)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "fastdl.norm_inference.default" in {str(node.target) for node in program.graph.nodes}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for module in (program.module(), torch.export.load(file).module(), torch.jit.trace(model, X)):
        torch.testing.assert_close(module(X), model(X))
    torch.testing.assert_close(program.run_decompositions().module()(X[:3]), model(X[:3]))


def transforms(model: nn.Module, x: torch.Tensor) -> dict[str, object]:
    """What torch.func and forward-mode AD make of a model."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, x.cos()))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    stacked = {name: torch.stack([p, p + 1]) for name, p in parameters.items()}
    return {
        "functional_call": torch.func.functional_call(model, parameters, (x,)),
        "grad": torch.func.grad(loss)(parameters, x),
        "per-sample grad": torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x),
        "vmap": torch.func.vmap(model)(x),
        "ensemble": torch.func.vmap(loss, (0, None))(stacked, x),
        "jvp": torch.func.jvp(model, (x,), (x.cos(),))[1],
        "jacrev": torch.func.jacrev(model)(x[0]),
        "jacfwd": torch.func.jacfwd(model)(x[0]),
        "forward AD": tangent,
        "batched backward": torch.autograd.functional.jacobian(model, x[0], vectorize=True),
    }


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_transforms(native, frozen):
    model, x = small().requires_grad_(not frozen), X[:2, :3].clone()
    expected = transforms(model, x)
    fastdl.accelerate(model)
    for name, found in transforms(model, x).items():
        assert found is not None, name  # forward AD once gave no tangent at all
        torch.testing.assert_close(found, expected[name], **NEAR, msg=lambda text, name=name: f"{name}: {text}")


def test_transforms_with_a_back_end_that_has_no_rules(native):
    with pytest.raises(
        BackendError, match=r"backend='cpu' cannot run this call: kernels have no rules for torch\.func"
    ):
        torch.func.vmap(lambda x: fastdl.ops.layer_norm(x, backend="cpu"))(X)
    torch.func.vmap(lambda x: fastdl.ops.layer_norm(x, backend="torch"))(X)


# ---- Exotic layers ---------------------------------------------------------------------------------------------------


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


def test_around_other_wrappers(native):
    """DataParallel, scripted and quantized submodules, lazy layers, checkpointing."""
    model = nn.DataParallel(small())
    expected = model(X)
    assert [layer.name for layer in fastdl.accelerate(model).swapped] == ["module.0", "module.1.1", "module.2"]
    torch.testing.assert_close(model(X), expected, **NEAR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit and eager quantization are deprecated
        scripted = nn.Sequential(torch.jit.script(nn.LayerNorm(16)), nn.LayerNorm(16), nn.LazyLinear(3))
        quantized = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear})
    assert [layer.name for layer in fastdl.accelerate(scripted).swapped] == ["1"]
    scripted(X)
    expected = quantized(X)
    assert len(fastdl.accelerate(quantized).swapped) == 3
    torch.testing.assert_close(quantized(X), expected, rtol=1e-2, atol=1e-2)
    model, x = small(), X.clone().requires_grad_()
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    fastdl.accelerate(model)
    checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, expected, **NEAR)
