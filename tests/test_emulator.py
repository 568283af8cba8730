"""The emulator: its own kernels, right ones and ones with planted mistakes, and what the Python side makes of them."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from fastdl import BackendError, _library, emulator, ops
from fastdl.emulator import EmulatorError, emulated

pytestmark = pytest.mark.lane("emulated cuda")


def names() -> list[str]:
    if emulator.emulator_error() is not None:
        return []
    function = emulator._State.library.fastdl_emulator_test_name
    function.restype = ctypes.c_char_p
    found, index = [], 0
    while name := function(index):
        found.append(name.decode())
        index += 1
    return found


NAMES = names()
reason = emulator.emulator_error()
needed = pytest.mark.skipif(reason is not None, reason=f"emulator: {reason}")


@needed
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("crash")])
def test_kernel(name):
    """Planted mistakes must be found; the message names the threads, the file and the line."""
    message = ctypes.create_string_buffer(1000)
    failed = emulator._State.library.fastdl_emulator_self_test(NAMES.index(name), message, len(message))
    text = message.value.decode()
    assert not failed, text
    if name == "planted-early-exit":
        assert "thread (7)" not in text.split("ended")[1] and "1 thread (7) ended" in text
    if name == "planted-divergent-barrier":
        assert "self_test.cpp:" in text and "[thread (40, 0, 0) of block (0, 0, 0)" in text


@needed
@pytest.mark.skipif("crash-global-out-of-bounds" not in NAMES, reason="only the address sanitizer sees every access")
def test_access_out_of_bounds_ends_a_sanitized_process():
    for name, report in (("crash-global-out-of-bounds", "heap-buffer-overflow"), ("crash-past-the-end", "poison")):
        script = (
            "import ctypes; from fastdl import emulator; emulator.emulator_error();"
            "text = ctypes.create_string_buffer(99);"
            f"emulator._State.library.fastdl_emulator_self_test({NAMES.index(name)}, text, 99)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode != 0 and report in done.stderr, name


@needed
def test_only_inside_the_lane():
    x = torch.randn(2, 8)
    with pytest.raises(BackendError, match="move them to a CUDA device"):
        ops.layer_norm(x, backend="cuda")
    with emulated():
        torch.testing.assert_close(ops.layer_norm(x, backend="cuda"), ops.layer_norm(x, backend="torch"))
        with pytest.raises(BackendError, match="float64"):
            ops.layer_norm(x.double(), backend="cuda")
    assert _library.emulating is False


def test_results_that_depend_on_the_order_are_an_error(monkeypatch):
    class Library:
        order = 0

        def fastdl_emulator_set_order(self, order):
            self.order = order

    monkeypatch.setattr(emulator._State, "library", Library())
    monkeypatch.setattr(emulator, "ORDERS", ("forward", "reverse", "shuffled"))
    steady = emulator._in_every_order(lambda x: (x, x + 1), "op")
    assert torch.equal(steady(torch.ones(2))[1], torch.full((2,), 2.0))
    racing = emulator._in_every_order(lambda x: x + (Library.order, emulator._State.library.order)[1], "op")
    with pytest.raises(EmulatorError, match="op: output 0 depends on the order of threads"):
        racing(torch.ones(2))
    nans = emulator._in_every_order(lambda x: x * float("nan"), "op")
    assert nans(torch.ones(2)).isnan().all()


def test_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(emulator._State, "library", None)
    monkeypatch.setattr(emulator._State, "error", None)
    monkeypatch.setenv("FASTDL_EMULATED_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(EmulatorError, match=r"none\.so does not exist: build it with `make build`"), emulated():
        pass
