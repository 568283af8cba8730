"""tools/gpu.py, which `make gpu` runs, as far as it can be proven without a GPU: what it says is missing, what it
selects, that a failing step neither stops the others nor goes unseen; tools/gpu_small.py under the emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lanes
import pytest
import torch

from fastdl.testing import emulated

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
import gpu  # noqa: E402
import gpu_small  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where the script runs for real")


@without_gpu
def test_without_a_gpu_it_says_so():
    outer = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
    command = ["make", "gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, env=outer, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout.strip()
    assert "make gpu cannot run here, and installs nothing. Missing:\n  GPU: " in done.stderr


@pytest.fixture
def driver(monkeypatch):
    """A machine with a driver and nothing else known."""
    monkeypatch.setattr(gpu, "has_driver", lambda: True)


@without_gpu
def test_torch_without_cuda(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA; name an interpreter that has a CUDA build: make gpu PYTHON=" in gpu.torch_problem()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert gpu.torch_problem().startswith("GPU: torch finds no NVIDIA GPU here")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    assert gpu.torch_problem() == "torch: 2.9.1+cu130 is too old, expected 2.10 or later"


def test_every_missing_tool_is_named(driver, monkeypatch, capsys):
    """All of them at once, each with what it is for and what to type."""
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.main([]) == 2
    lines = capsys.readouterr().err.splitlines()[1:]
    names = [line.strip().split(":")[0] for line in lines]
    assert names == ["torch", "nvcc", *gpu.MODULES, *gpu.TOOLS]
    assert f"pytest: not installed for {sys.executable}; for the tests: pip install pytest" in lines[4]


@pytest.fixture
def complete(monkeypatch):
    """A machine that has everything."""
    monkeypatch.setattr(gpu, "problems", list)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/opt/{name}")


def test_unknown_room(complete, capsys):
    assert gpu.main(["--room", "nrom"]) == 2
    known = ", ".join(gpu.gpu_rooms())
    assert f"ROOM=nrom: no room of that name has GPU kernels; expected one of: {known}" in capsys.readouterr().err


def test_check_only(complete, capsys):
    assert gpu.main(["--check"]) == 0 and "Some GPU, sm_90a" in capsys.readouterr().out


def test_steps_of_a_room(complete):
    chosen = {step.name: step for step in gpu.steps("norm", "90a")}
    assert list(chosen) == ["build", "tests", "memcheck", "racecheck", "benchmarks", "tables"]
    assert chosen["build"].environment == {"FASTDL_CUDA": "on", "FASTDL_CUDA_ARCHS": "90a"}
    tests = chosen["tests"].command
    assert tests[tests.index("--lane") + 1] == "gpu" and tests[tests.index("--room") + 1] == "norm"
    assert tests[-3:] == ["tests/test_norm.py", "tests/test_norm_modules.py", "tests/test_norm_triton.py"]
    assert chosen["memcheck"].command[:3] == ["/opt/compute-sanitizer", "--tool", "memcheck"]
    assert chosen["benchmarks"].command[-1] == "bench/bench_norm.py"
    assert sum(step.limit_s for step in chosen.values()) <= 20 * 60  # what a machine that hangs everywhere would take


def test_steps_of_all_rooms(complete):
    chosen = {step.name: step for step in gpu.steps(None, "80")}
    assert (
        "--room" not in chosen["tests"].command
        and "tests/test_build.py::test_cuda_smoke_runs" in chosen["tests"].command
    )
    for room in gpu.gpu_rooms():
        assert f"tests/test_{room}.py" in chosen["tests"].command
        assert f"bench/bench_{room}.py" in chosen["benchmarks"].command
        assert room in gpu_small.CASES or "cuda" not in lanes.ROOMS[room].backends, f"tools/gpu_small.py lacks {room}"


def test_a_missing_sanitizer_is_skipped_by_name(complete, monkeypatch):
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    chosen = {step.name: step for step in gpu.steps("norm", "90a")}
    assert "compute-sanitizer is neither on PATH" in gpu.run_step(chosen["memcheck"], ROOT).result


def test_architecture_names():
    assert [gpu.architecture(cc) for cc in ((7, 5), (8, 6), (9, 0), (12, 0))] == ["75", "86", "90a", "120"]


def python(code: str, name: str, **more) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], **more)


def test_a_failing_step_stops_nothing(tmp_path, capsys):
    """Its output is kept, the later ones run, the summary names it, and the status says so."""
    chosen = [
        python("print('first')", "build"),
        python("print('half a result'); raise SystemExit(3)", "tests"),
        gpu.Step("memcheck", ["/nonexistent/tool"]),
        gpu.Step("racecheck", [], skip="not installed"),
        python("import os; print(os.environ['ADDED'], os.environ.get('FASTDL_BACKEND'))", "tables",
               environment={"ADDED": "yes"}),
    ]  # fmt: skip
    assert gpu.run(chosen, tmp_path) == 1
    out = capsys.readouterr().out
    assert "half a result" in out and (tmp_path / "tests.log").read_text() == "half a result\n"
    assert (tmp_path / "tables.log").read_text() == "yes None\n"
    end = out.splitlines()[-6:]
    assert [line.split()[0] for line in end[:5]] == ["build", "tests", "memcheck", "racecheck", "tables"]
    assert (
        "ok" in end[0]
        and "FAILED: ended with 3" in end[1]
        and "FAILED" in end[2]
        and "skipped: not installed" in end[3]
    )
    assert end[5].startswith("make gpu: 2 of 5 steps failed: tests, memcheck;")
    assert gpu.run(chosen[:1], tmp_path) == 0


def test_a_step_that_takes_too_long_is_interrupted(tmp_path):
    """First by an interrupt, so that it can write what it has."""
    code = (
        "import time\ntry:\n    print('started', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('saved'); raise SystemExit(0)"
    )
    outcome = gpu.run_step(python(code, "benchmarks", limit_s=2), tmp_path)
    assert outcome.result == "FAILED: took more than 2 s" and outcome.seconds < 30
    assert (tmp_path / "benchmarks.log").read_text() == "started\nsaved\n"


def test_small_shapes_under_the_emulator():
    """What compute-sanitizer will watch, on the CPU."""
    if reason := lanes.missing("emulated cuda"):
        pytest.skip(reason)
    with emulated():
        assert gpu_small.norm("cpu", [(0, 8), (5, 7), (3, 130)]) == 24


def test_small_shapes_find_a_wrong_kernel():
    with pytest.raises(AssertionError, match="the case: "):
        gpu_small.compare("the case", lambda backend: (torch.ones(3) * (2 if backend == "cuda" else 1),), 1e-4)


def selected(*options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_lane_and_room_select_tests():
    """By what a test counts in, whatever its name."""
    files = ["tests/test_norm.py", "tests/test_norm_triton.py", "tests/test_rope.py"]
    found = selected("--lane", "reference", "--room", "norm", *files)
    assert "test_norm.py::test_gradcheck[layer]" in found and "rope" not in found and "test_norm_triton.py" not in found
    assert "test_contract[reference-" in found and "test_contract[cpu" not in found
