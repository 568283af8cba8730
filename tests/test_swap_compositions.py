"""Swapped layers together with what else people do to a model: compile, autocast, save, export, torch.func, wrap."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from swap_model import NEAR, X, small
from torch import nn
from torch.utils import checkpoint

import fastdl
from fastdl import BackendError


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


def test_a_trace_can_be_saved_and_trained(native):
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.GroupNorm(2, 16), nn.LayerNorm(16)).eval()
    fastdl.accelerate(model)
    x = torch.randn(5, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            traced, file = torch.jit.trace(model, x), io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        again = torch.jit.load(file)
        torch.testing.assert_close(again(x), model(x), **NEAR)
        again(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in again.parameters())


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
