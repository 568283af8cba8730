"""Choice of the back end, its refusals, and the loading of the compiled library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdl
from fastdl import _library, backend
from fastdl.backend import BackendError

ROOT = Path(fastdl.__file__).parent


def refuse_cpu(*, dtype, width=None, **_):
    if dtype == torch.float64:
        return "float64 has no kernel"
    return "width must be even" if width is not None and width % 2 else None


@pytest.fixture
def room(monkeypatch):
    monkeypatch.setattr(backend, "_rooms", dict(backend._rooms))
    backend.register_room("toy", {"cpu": refuse_cpu, "torch": None})
    return "toy"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: what is decided at import can only be tested there."""
    keep = {k: v for k, v in os.environ.items() if k not in ("FASTDL_ISA", "FASTDL_BACKEND", "LD_PRELOAD")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**keep, **environment}, capture_output=True, text=True, cwd=ROOT.parent
    )


# ---- choice


def test_automatic_choice_prefers_kernels_and_falls_back(room, native):
    assert backend.choose(room, device="cpu", dtype=torch.float32) == "cpu"
    assert backend.choose(room, "auto", device="cpu", dtype=torch.float64) == "torch"
    assert backend.choose(room, device="cpu", dtype=torch.float32, width=3) == "torch"
    assert backend.choose(room, device="cpu", dtype=torch.float32, refusals={"cpu": "not today"}) == "torch"


def test_automatic_choice_without_kernels_for_the_device(room):
    assert backend.choose(room, device="meta", dtype=torch.float32) == "torch"
    assert backend.choose(room, device="cuda", dtype=torch.float32) == "torch"


def test_explicit_choice_never_falls_back(room, monkeypatch):
    assert backend.choose(room, "torch", device="cpu", dtype=torch.float32) == "torch"
    with pytest.raises(BackendError, match="toy has no triton back end"):
        backend.choose(room, "triton", device="cpu", dtype=torch.float32)
    monkeypatch.setattr(backend, "_native_state", backend._Native(None, "not built"))
    with pytest.raises(BackendError, match=r"backend='cpu'.*not built"):
        backend.choose(room, "cpu", device="cpu", dtype=torch.float32)


def test_explicit_choice_says_what_the_room_refuses(room, native):
    with pytest.raises(BackendError, match="float64 has no kernel"):
        backend.choose(room, "cpu", device="cpu", dtype=torch.float64)
    with pytest.raises(BackendError, match="on cuda; move them to the CPU"):
        backend.choose(room, "cpu", device="cuda", dtype=torch.float32)


def test_environment_chooses_after_the_argument(room, native, monkeypatch):
    monkeypatch.setenv("FASTDL_BACKEND", "torch")
    assert backend.choose(room, device="cpu", dtype=torch.float32) == "torch"
    assert backend.choose(room, "cpu", device="cpu", dtype=torch.float32) == "cpu"
    monkeypatch.setenv("FASTDL_BACKEND", "cpu")
    with pytest.raises(BackendError, match="FASTDL_BACKEND='cpu' cannot run this call: float64"):
        backend.choose(room, device="cpu", dtype=torch.float64)


def test_unknown_back_end_names_the_valid_ones(room, monkeypatch):
    expected = re.escape("is no back end; expected auto or one of cpu, cuda, triton, torch")
    with pytest.raises(BackendError, match=f"backend='gpu' {expected}"):
        backend.choose(room, "gpu", device="cpu")
    monkeypatch.setenv("FASTDL_BACKEND", "fast")
    with pytest.raises(BackendError, match=f"FASTDL_BACKEND='fast' {expected}"):
        backend.choose(room, device="cpu")


def test_unknown_room_and_unknown_registration():
    with pytest.raises(ValueError, match="no room named 'nope'"):
        backend.choose("nope", device="cpu")
    with pytest.raises(ValueError, match=r"unknown back ends \['gpu'\]"):
        backend.register_room("toy", {"gpu": None})


def test_explain_prints_choice_and_refusals(room, native, capsys):
    found = fastdl.explain(room, torch.ones(2, dtype=torch.float64))
    assert found.choice == "torch"
    assert found.refusals["cpu"] == "float64 has no kernel"
    assert found.refusals["torch"] is None
    printed = capsys.readouterr().out
    assert "toy: torch runs" in printed
    assert "no: float64 has no kernel" in printed


def test_explain_of_an_impossible_choice_does_not_raise(room, capsys):
    found = fastdl.explain(room, torch.ones(2), backend="triton")
    assert found.choice is None
    assert "toy has no triton back end" in found.error
    assert "toy has no triton back end" in capsys.readouterr().out


def test_explain_needs_a_tensor(room):
    with pytest.raises(ValueError, match="needs a tensor"):
        fastdl.explain(room, 3)


def test_choice_is_traced_by_compile(room):
    def f(x):
        return x + 1 if backend.choose(room, device=x.device, dtype=x.dtype) in ("cpu", "torch") else x

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


# ---- CPU levels


@pytest.mark.native
def test_level_cap_is_reached(level):
    assert backend.cpu_level() == level.removesuffix("-plain")


@pytest.mark.native
def test_level_cap_is_restored(native):
    before = backend.cpu_level()
    with backend.level_cap("scalar") as now:
        assert now == backend.cpu_level() == "scalar"
        with backend.level_cap("amx"):
            pass
        assert backend.cpu_level() == "scalar"
    assert backend.cpu_level() == before


def test_unknown_level_names_the_valid_ones(native):
    with pytest.raises(BackendError, match="'sse9' is no CPU level; expected one of scalar, avx2"):
        backend.set_level_cap("sse9")


def test_environment_caps_the_level(native):
    shown = python("from fastdl import backend; print(backend.cpu_level())", FASTDL_ISA="scalar")
    assert shown.stdout.strip() == "scalar", shown.stderr


@pytest.mark.parametrize(
    "code",
    ["from fastdl import backend; backend.check_environment()", "from fastdl.cli import main; print(main(['info']))"],
)
def test_unknown_level_in_the_environment_is_an_error(code):
    shown = python(code, FASTDL_ISA="avx1024")
    assert "FASTDL_ISA='avx1024' is no CPU level; expected one of scalar, avx2, avx512, amx, amx-twin" in shown.stderr
    assert ("Traceback" not in shown.stderr and shown.stdout.strip() == "1") if "cli" in code else shown.returncode == 1


# ---- the compiled library

TORCH_ONLY = """
import torch, fastdl
from fastdl import backend
assert not backend.native_loaded() and backend.cpu_level() == "none"
print(backend.native_error())
w = fastdl.ops.quantize(torch.ones(4, 32), "q4_1")
assert fastdl.ops.quant_matmul(torch.ones(2, 32), w).shape == (2, 4)
try:
    fastdl.ops.quant_matmul(torch.ones(2, 32), w, backend="cpu")
except fastdl.BackendError as error:
    print(error)
"""


def test_works_without_the_library(tmp_path):
    shown = python(TORCH_ONLY, FASTDL_LIBRARY=str(tmp_path / "none.so"))
    assert shown.returncode == 0, shown.stderr
    assert "none.so does not exist: build it with `make build`" in shown.stdout.splitlines()[0]
    assert "the compiled library is not loaded" in shown.stdout.splitlines()[1]


def test_another_schema_refuses_the_library(native, tmp_path):
    data = backend.library_path().read_bytes()
    marker, own = b"FASTDL_SCHEMA_HASH=", _library.schema_hash().encode()
    assert marker + own in data
    stale = tmp_path / "libfastdl_ops.so"
    stale.write_bytes(data.replace(marker + own, marker + b"0" * 64))
    shown = python(TORCH_ONLY, FASTDL_LIBRARY=str(stale))
    assert shown.returncode == 0, shown.stderr
    assert "was built for other op schemas (hash 000000000000" in shown.stdout
    assert "rebuild it with `make build`" in shown.stdout


@pytest.mark.parametrize("content", [b"", b"no library at all"], ids=["empty", "text"])
def test_a_broken_library_is_a_reason_not_a_crash(content, tmp_path):
    broken = tmp_path / "libfastdl_ops.so"
    broken.write_bytes(content)
    shown = python(TORCH_ONLY, FASTDL_LIBRARY=str(broken))
    assert shown.returncode == 0, shown.stderr
    assert str(broken) in shown.stdout


def test_a_truncated_library_is_a_reason_not_a_crash(native, tmp_path):
    data = backend.library_path().read_bytes()
    cut = tmp_path / "libfastdl_ops.so"
    cut.write_bytes(data[: data.index(b"FASTDL_SCHEMA_HASH=") + 200])
    shown = python(TORCH_ONLY, FASTDL_LIBRARY=str(cut))
    assert shown.returncode == 0, shown.stderr
    assert "is cut short: rebuild it" in shown.stdout


@pytest.mark.skipif("TORCH_SECOND" not in os.environ, reason="TORCH_SECOND names no environment with another torch")
def test_same_binary_on_a_second_torch(native):
    """TORCH_SECOND: an environment (folder) with another torch >= 2.10 and numpy, with any Python."""
    code = TORCH_ONLY.replace("assert not backend.native_loaded()", "assert backend.native_loaded()").split("print(")[0]
    code = code.replace(' and backend.cpu_level() == "none"', "") + "print(torch.__version__)"
    code += "\nw = fastdl.ops.quantize(torch.ones(4, 32), 'q4_1')"
    code += "\nprint(fastdl.ops.quant_matmul(torch.ones(2, 32), w, backend='cpu').shape)"
    interpreter = Path(os.environ["TORCH_SECOND"], "bin", "python")
    shown = subprocess.run([interpreter, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split("\n")[0] != torch.__version__
