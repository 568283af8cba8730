"""The CUDA code in the library: kernels of every room for every architecture asked for, and none of them spills."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastdl import backend
from fastdl.ops import ROOMS

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
import cuda_report  # noqa: E402

CUDA_ROOMS = [room for room in ROOMS if "cuda" in ROOMS[room].backends]
built = bool(backend.build_info().get("cuda"))
needs_cuda = pytest.mark.skipif(not built, reason="the library was built without nvcc")


@pytest.fixture(scope="module")
def compiled() -> list[cuda_report.Kernel]:
    if cuda_report.find_cuobjdump() is None:
        pytest.skip("cuobjdump is neither on PATH nor beside nvcc nor in the package triton")
    return cuda_report.kernels(backend.library_path())


@needs_cuda
@pytest.mark.parametrize(
    "room", [pytest.param(room, marks=pytest.mark.lane("cuda compiled", room)) for room in CUDA_ROOMS]
)
def test_kernels_of_the_room(compiled, room):
    mine = [kernel for kernel in compiled if kernel.name.startswith(f"{room}_")]
    asked = {f"sm_{arch}" for arch in backend.build_info()["cuda_archs"].split() if arch != "+PTX"}
    assert asked and asked == {kernel.arch for kernel in mine}
    spilled = [
        f"{kernel.name} on {kernel.arch}: {kernel.stack + kernel.local} bytes" for kernel in mine if kernel.spills
    ]
    assert not spilled, f"registers spill to memory: {', '.join(spilled)}"


def test_report_reads_names_and_numbers(monkeypatch):
    shown = (
        "arch = sm_80\n Function void fastdl::cuda::norm_forward_rows<float, (int)32, 1>(fastdl::cuda::A<float>):\n"
        "  REG:40 STACK:8 SHARED:64 LOCAL:0 CONSTANT[0]:384\n"
    )

    class Done:
        returncode, stdout, stderr = 0, shown, ""

    monkeypatch.setattr(cuda_report.subprocess, "run", lambda *a, **k: Done)
    monkeypatch.setattr(cuda_report, "find_cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(cuda_report, "demangled", lambda text: text)
    (kernel,) = cuda_report.kernels(Path("x.so"))
    assert kernel == cuda_report.Kernel("sm_80", "norm_forward_rows<float, 32, 1>", 40, 8, 64, 0) and kernel.spills
    assert "norm_forward_rows<float, 32, 1>  sm_80" in cuda_report.table([kernel])
