"""Lane "triton compiled": the kernels of every room become cubins, without a GPU, by tools/triton_compile.py.

A part of what `make triton-compile` does: the narrowest and the widest tile, for Hopper, the newest or the oldest
architecture, room by room. In a process of its own, because Triton is interpreted in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lanes
import pytest

from fastdl.kernels.configs import ARCHITECTURES
from fastdl.ops import ROOMS

TOOL = Path(__file__).resolve().parent.parent / "tools/triton_compile.py"
TRITON = [room for room, entry in ROOMS.items() if "triton" in entry.backends]


def run_tool(folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(autouse=True)
def _triton():
    if reason := lanes.missing("triton compiled"):
        pytest.skip(reason)


@pytest.mark.parametrize("room", [pytest.param(r, marks=pytest.mark.lane("triton compiled", r)) for r in TRITON])
def test_kernels_compile(room, tmp_path):
    architectures = [str((90, ARCHITECTURES[-1], ARCHITECTURES[0])[TRITON.index(room) % 3])]
    done = run_tool(tmp_path, "--room", room, "--ends", "--arch", *architectures)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, summary = done.stdout.splitlines()
    assert len(lines) >= 2 and f"{len(lines)} compiled, 0 failed" in summary
    for cc in architectures:
        assert any(f" sm_{cc} " in line for line in lines), f"nothing was compiled for {cc}"


def test_failures_are_reported(tmp_path):
    """An architecture that the compilers do not know: they raise or crash."""
    done = run_tool(tmp_path, "--kernel", "norm_partials", "--arch", "20")
    assert done.returncode == 1 and "FAILED norm_partials[128] sm_20" in done.stdout, done.stdout + done.stderr
    unknown = run_tool(tmp_path, "--kernel", "no_such_kernel")
    assert unknown.returncode == 2 and "nothing to compile" in unknown.stderr
