"""tools/triton_tune.py without a GPU: what it tries, refuses, takes and writes; the clock is a stub."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TOOL = Path(__file__).resolve().parent.parent / "tools/triton_tune.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("triton_tune", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu():
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert done.returncode == 2 and "tuning needs an NVIDIA GPU" in done.stderr


def small(tool):
    _, work = next(tool.activation_work("cuda" if torch.cuda.is_available() else "cpu", 3, (40,)))
    return work if torch.cuda.is_available() else halved(tool)


def halved(tool):
    """The interpreter has no bfloat16 that can be trusted."""
    from fastdl import ops

    x, bias = torch.randn(3, 40), torch.randn(40)
    return tool.with_gradients(lambda x, b, backend: ops.activation(x, "gelu", b, backend=backend), x, bias)


def test_takes_the_fastest(tool):
    """The stub clock: 4 warps take 1 s, 16 warps of activation_backward half of it."""
    from fastdl.kernels import configs

    def clock(call):
        call()
        return 0.5 if configs.config("activation_backward", None, 128).num_warps == 16 else 1.0

    work = small(tool)
    found = {(kernel, block): (after, ratio) for kernel, block, _, after, ratio in tool.tune(work, clock)}
    assert list(found) == [("activation_backward", 128)]
    after, ratio = found["activation_backward", 128]
    assert after.num_warps == 16 and ratio == 0.5 and not configs._overrides


def test_a_wrong_result_is_not_timed(tool, monkeypatch):
    calls = []
    work = small(tool)
    exact = work("torch")
    monkeypatch.setattr(tool, "agrees", lambda *_: False)
    assert not list(tool.tune(work, lambda call: calls.append(call) or 1.0))
    assert len(calls) == 3  # forward, backward and sums with the present configurations alone
    monkeypatch.undo()
    assert tool.agrees(work, exact)
    assert not tool.agrees(work, [exact[0] + 1, *exact[1:]])


def test_candidates_keep_what_the_kernel_does_not_choose(tool):
    from fastdl.kernels.configs import Config

    for c in tool.candidates(Config(1, 4)):
        assert c.rows == 1 and c.programs == 0
    found = tool.candidates(Config(8, 4, programs=16))
    assert Config(16, 8, programs=32) in found and Config(8, 4, programs=16) not in found
    found = tool.candidates(Config(64, 4, 2, keys=64))
    assert Config(128, 8, 2, keys=32) in found and all(c.keys in (32, 64, 128) for c in found)


def test_writes_the_table(tool, tmp_path):
    from fastdl.kernels.configs import Config

    path = tmp_path / "tuned.py"
    shutil.copy(tool.TARGET, path)
    tool.write(path, "hopper", {("norm_forward", 4096): Config(1, 16)}, "NVIDIA H100")
    tool.write(path, "ada", {("norm_backward", 64): Config(8, 4, programs=2)}, "NVIDIA L4")
    namespace = {}
    exec(path.read_text(), namespace)
    assert namespace["TUNED"]["hopper"]["norm_forward", 4096] == (1, 16, 1, 0, 0)
    assert namespace["TUNED"]["ada"]["norm_backward", 64] == (8, 4, 1, 2, 0)
    assert "hopper: NVIDIA H100" in namespace["__doc__"] and "Nothing has been tuned" not in namespace["__doc__"]


def test_tuned_entries_go_first(monkeypatch):
    from fastdl.kernels import configs

    monkeypatch.setitem(configs.TUNED, "hopper", {("norm_forward", 4096): (1, 16, 2, 0)})
    assert configs.config("norm_forward", 90, 4096) == configs.Config(1, 16, 2)
    assert configs.config("norm_forward", 80, 4096) == configs.config("norm_forward", None, 4096)
    with configs.override("norm_forward", 4096, configs.Config(2, 2)):
        assert configs.config("norm_forward", 90, 4096).num_warps == 2
