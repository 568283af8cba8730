"""The GPU's side of the benchmarks, as far as it can be proven on a CPU: records, files named by the GPU, tables."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # bench/ is not installed

from bench import (  # noqa: E402
    accuracy,
    attention_gpu,
    decode_gpu,
    gpu,
    hardware,
    norm_gpu,
    recurrent_gpu,
    report,
    results,
    rooms_gpu,
    timing,
)

GPU = {"model": "NVIDIA H100 80GB HBM3", "gpu": True}
CPU = {"model": "Some CPU 7", "best_level": "avx512", "cores": 2, "flags": []}


def timer():
    """Seconds without a GPU: every call runs once; copies take 1 us, everything else 2 us."""

    def seconds_per_call(call) -> float:
        call()
        return 1e-6 if getattr(call, "__name__", "") == "<lambda>" and call.__code__.co_names == ("copy_",) else 2e-6

    return seconds_per_call


def measure(kind: str, op: str, **options) -> dict:
    defaults = {"device": "cpu", "backends": ("torch",), "seconds_per_call": timer()}
    return norm_gpu.measure(kind, op, (16, 64), 2, 1e-3, **{**defaults, **options})


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch):
    """Between two turns garbage is collected, which takes longer than all else here."""
    monkeypatch.setattr(timing, "gc", types.SimpleNamespace(collect=lambda: 0))


@pytest.fixture
def eager_compile(monkeypatch):
    """torch.compile that compiles nothing, for speed; and no Liger, installed or not."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)


@pytest.mark.parametrize("op", norm_gpu.OPS)
@pytest.mark.parametrize("kind", norm_gpu.TENSORS_MOVED)
def test_record(kind, op, eager_compile):
    record = measure(kind, op)
    assert list(record["sides"]) == ["fastdl torch", "torch", "torch.compile"]
    assert len(record["missing"]) == 1 and record["missing"][0].startswith("liger: ")
    ours = record["sides"]["fastdl torch"]
    moved, copied = norm_gpu.TENSORS_MOVED[kind] * 16 * 64 * 2, 2 * 16 * 64 * 2
    assert ours["share_of_copy"] == pytest.approx((moved / 2e-6) / (copied / 1e-6), abs=1e-3)
    assert set(ours["speedup_over"]) == {"torch", "torch.compile"} and ours["relative_error"] <= gpu.ALLOWED
    assert not record["sides"]["torch"]["speedup_over"]


@pytest.mark.parametrize(("room", "kind", "shape"), rooms_gpu.CASES, ids=lambda value: str(value))
def test_record_of_other_rooms(room, kind, shape, eager_compile):
    small = (2, 64, 3, 5) if len(shape) == 4 else (6, 40)
    record = rooms_gpu.measure(room, kind, small, 1, 1e-3, device="cpu", backends=("torch",), seconds_per_call=timer())
    assert list(record["sides"]) == ["fastdl torch", "torch", "torch.compile"] and not record["missing"]
    assert record["op"] == room and record["kind"] == kind and record["shape"] == list(small)
    assert all(side["relative_error"] <= gpu.ALLOWED for side in record["sides"].values())
    assert report.lines(room, {"gpu": record})


@pytest.mark.parametrize("kind", recurrent_gpu.KINDS)
def test_record_and_table_of_lstm(kind, tmp_path):
    record = recurrent_gpu.measure(
        kind, (5, 3, 16), 1, 1e-3, device="cpu", backends=("torch",), seconds_per_call=timer()
    )
    assert list(record["sides"]) == ["fastdl torch", "cuDNN"] and not record["missing"]
    assert all(side["relative_error"] <= gpu.ALLOWED for side in record["sides"].values())
    run = {"when": "now", "commit": "c", "threads": 2, "versions": {}, "peers": {}, "limits": {"gpu": gpu_limits()}}
    results.save(results.path_for(tmp_path, GPU, "lstm"), GPU, "r1", run, {f"gpu/{kind}/5x3x16/bf16": record})
    report.main(["--results", str(tmp_path), "--details", "--tables"])
    text = (tmp_path / "nvidia-h100-80gb-hbm3-lstm.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| on a GPU: LSTM forward"))
    assert "T 5, batch 3, hidden 16, bf16, over cuDNN | 1.2 × | 2.0 × | 1.00 × (1.00 to 1.00) (torch): MISSED" in row
    assert report.recurrent_table(results.load_all(tmp_path)).count("NVIDIA H100") == 1


@pytest.mark.parametrize("kind", attention_gpu.KINDS)
def test_record_of_attention(kind, monkeypatch):
    monkeypatch.setattr(attention_gpu, "PEERS", {**attention_gpu.PEERS, "SDPA math": attention_gpu.SDPBackend.MATH})
    shape = (2, 3, 20, 16)
    options = {"device": "cpu", "backends": ("torch",), "seconds_per_call": timer()}
    record = attention_gpu.measure(kind, shape, 1, 1e-3, **options)
    assert "fastdl torch" in record["sides"] and record["best_peer"] in record["sides"]
    assert any(text.startswith("SDPA cuDNN: ") for text in record["missing"])
    side = record["sides"]["fastdl torch"]
    products = attention_gpu.PRODUCTS[kind] * 2 * 6 * 210 * 16
    assert side["tflops"] == pytest.approx(products / 2e-6 / 1e12, rel=1e-3)
    assert side["relative_error"] <= gpu.ALLOWED and record["best_peer"] in side["speedup_over"]


@pytest.mark.parametrize("cache", decode_gpu.CACHES)
def test_record_and_table_of_decoding(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(decode_gpu, "PEERS", {**decode_gpu.PEERS, "SDPA math": attention_gpu.SDPBackend.MATH})
    options = {"device": "cpu", "backends": ("torch",), "seconds_per_call": timer()}
    record = decode_gpu.measure(cache, (2, 6, 2, 20, 32), 1, 1e-3, **options)
    assert "fastdl torch" in record["sides"] and record["best_peer"] in record["sides"]
    side, row_bytes = record["sides"]["fastdl torch"], 64 if cache == "bf16" else 34
    assert side["gb_per_s"] == pytest.approx(2 * 2 * 2 * 20 * row_bytes / side["seconds"]["median"] / 1e9, abs=0.1)
    run = {"when": "now", "commit": "c", "threads": 2, "versions": {}, "peers": {}, "limits": {"gpu": gpu_limits()}}
    path = results.path_for(tmp_path, GPU, "attention_decode")
    results.save(path, GPU, "r1", run, {f"gpu/decode/2x6x2x20x32/bf16/{cache}": record})
    report.main(["--results", str(tmp_path), "--details", "--tables"])
    text = (tmp_path / "nvidia-h100-80gb-hbm3-attention_decode.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| on a GPU"))
    suffix = "" if cache == "bf16" else ", cache q8_0"
    assert row.startswith(
        f"| on a GPU: decode, batch 2, 20 keys, 6 query and 2 key heads of 32, bf16{suffix} | 1.5 × |"
    )
    assert "(torch), " in row and "of the copy bandwidth: " in row and "not yet measured" not in row


def test_the_larger_copy_is_the_limit(eager_compile):
    wide = norm_gpu.measure("norm", "rms_norm", (16, 64), 1, 1e6, device="cpu", backends=(), seconds_per_call=timer())
    assert wide["copy_gb_per_s"] == 1e6


def test_a_wrong_side_is_not_timed(eager_compile, monkeypatch):
    wrong = lambda op, backend: lambda x, residual, weight, bias: (x * 2,)  # noqa: E731
    monkeypatch.setattr(norm_gpu, "fused", wrong)
    with pytest.raises(accuracy.IncorrectResult, match=r"fastdl torch: relative error .* not timed"):
        measure("norm", "layer_norm")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(torch, "compile", lambda fn, **options: lambda *arguments: (torch.zeros(16, 64),))
    record = measure("norm", "layer_norm")
    assert "torch.compile: relative error 1 above 0.1: not timed" in record["missing"]
    assert list(record["sides"]) == ["fastdl torch", "torch"]


def test_liger_is_called_as_its_functions_ask(eager_compile, monkeypatch):
    functional = types.SimpleNamespace(
        liger_layer_norm=lambda X, W, B, eps: torch.nn.functional.layer_norm(X, X.shape[-1:], W, B, eps),
        liger_rms_norm=lambda X, W, eps, offset=0.0, casting_mode="llama", in_place=True: torch.nn.functional.rms_norm(
            X, X.shape[-1:], W, eps
        ),
    )
    package = types.ModuleType("liger_kernel")
    package.transformers = types.ModuleType("liger_kernel.transformers")
    package.transformers.functional = functional
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)
    for op in norm_gpu.OPS:
        assert "liger" in measure("norm_backward", op)["sides"]
    # A version without the fused op: that peer is missing, by name, and the benchmark goes on.
    assert "liger_fused_add_rms_norm" in measure("add_norm", "rms_norm")["missing"][0]


def test_torch_compile_is_a_side_of_every_case(monkeypatch):
    """Its graphs run backward more than once, and so many compilations of one function meet no limit."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiler(fn, backend="aot_eager", **options))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with torch._dynamo.config.patch(recompile_limit=2):
        for kind in ("norm", "norm", "norm", "norm_backward"):
            record = measure(kind, "rms_norm")
            assert "torch.compile" in record["sides"], record["missing"]


def test_relative_error_of_tensors():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert gpu.relative_error(exact, torch.tensor([3.0, 4.0])) == 0
    assert gpu.relative_error(exact, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert not gpu.relative_error(exact, torch.tensor([3.0, float("nan")])) <= 1


def test_files_and_tables_are_named_by_the_gpu(tmp_path, eager_compile):
    records = {f"gpu/{op}/{kind}/16x64/bf16": measure(kind, op) for kind in ("norm", "add_norm") for op in norm_gpu.OPS}
    run = {"when": "now", "commit": "c", "threads": 2, "versions": {}, "peers": {}, "limits": {"gpu": gpu_limits()}}
    path = results.path_for(tmp_path, GPU, "norm")
    assert path.name == "nvidia-h100-80gb-hbm3-norm.json"
    results.save(path, GPU, "r1", run, records)
    report.main(["--results", str(tmp_path), "--details", "--tables"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "nvidia-h100-80gb-hbm3-norm.json",
        "nvidia-h100-80gb-hbm3-norm.md",
    ]
    text = (tmp_path / "nvidia-h100-80gb-hbm3-norm.md").read_text()
    assert (
        "| residual add + rms_norm, 16 x 64 bf16, share of the copy bandwidth | 70% | 85% | 100% (torch): aim met; "
        in text
    )
    assert "| layer_norm forward, 16 x 64 bf16, share of the copy bandwidth | 85% | 92% | 50% (torch): MISSED; " in text
    assert "- limits, gpu: {'copy_gb_per_s': 1000.0}" in text and "missing: liger" in text
    table = report.norm_table(results.load_all(tmp_path))
    assert table.count("NVIDIA H100 80GB HBM3") == 4 and "on a GPU: forward" not in table


def test_norm_results_have_a_table_and_no_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    content = {"hardware": GPU, "name": "gpu", "records": {"gpu/x": {"level": "gpu", "sides": {}}}}
    assert plot.draw_all({"norm": [content]}, tmp_path) == [] and not list(tmp_path.iterdir())


def gpu_limits() -> dict[str, float]:
    return {"copy_gb_per_s": 1000.0}


def test_recorder_writes_cpu_and_gpu_apart(tmp_path, monkeypatch):
    from bench.conftest import Recorder

    monkeypatch.setattr(hardware, "describe", lambda: CPU)
    monkeypatch.setattr(hardware, "describe_gpu", lambda: GPU)
    monkeypatch.setattr(gpu, "measure", gpu_limits)
    recorder = Recorder(types.SimpleNamespace(getoption=lambda name: 2))
    recorder._limits = {"2": {"fma": 1.0}}
    recorder.add("norm", "avx512/x", {"level": "avx512"})
    recorder.add_gpu("norm", "gpu/x", {"level": "gpu"})
    paths = recorder.save(tmp_path)
    assert [path.name for path in paths] == ["some-7-avx512-2c-norm.json", "nvidia-h100-80gb-hbm3-norm.json"]
    cpu, its_gpu = results.load_all(tmp_path)["norm"]
    assert [run["limits"] for run in cpu["runs"].values()] == [{"2": {"fma": 1.0}}]
    assert [run["limits"] for run in its_gpu["runs"].values()] == [{"gpu": gpu_limits()}]
