"""The CUDA kernels of lstm, gru and rnn on both of their ways (csrc/cuda/recurrent_plan.h): the step loop, and the
kernel that stays for the whole sequence. Every op, with its own arguments, against the reference by the rule of
fastdl.testing: under the emulator, and on a GPU where there is one. The rooms' contract tests are in
tests/test_{lstm,gru,rnn}.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools

import pytest
import torch

from fastdl import emulator
from fastdl.ops._recurrent import all_products, previous
from fastdl.testing import assert_accurate, emulated, poisoned

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
WAYS = ("loop", "persistent")
COMMON = ("lengths", "h_mask", "zoneout", "expectation")
OPTIONS = {
    "lstm": (*COMMON, "peephole", "layer_norm", "cell_norm", "projection"),
    "gru": (*COMMON, "bias_n", "layer_norm"),
    "rnn": (*COMMON, "relu", "layer_norm"),
}
LOOP_ONLY = {"layer_norm", "cell_norm", "projection"}  # what the persistent kernels leave to the loop


def places():
    """(room, device) of every lane that this machine has; without any, one that skips."""
    for room in GATES:
        if emulator.emulator_error() is None:
            yield pytest.param((room, "cpu"), id=f"{room}-emulated", marks=pytest.mark.lane("emulated cuda", room))
        if torch.cuda.is_available():
            yield pytest.param((room, "cuda"), id=f"{room}-gpu", marks=pytest.mark.lane("gpu", room))


PLACES = list(places())
pytestmark = pytest.mark.skipif(not PLACES, reason="neither the emulated library nor a GPU")


@pytest.fixture(params=PLACES)
def place(request):
    """(room, device), the back end "cuda" running there."""
    with emulated() if request.param[1] == "cpu" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def room(place):
    return place[0]


@pytest.fixture
def device(place):
    return place[1]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setenv("FASTDL_RECURRENT", request.param)
    return request.param


class Case:
    """The arguments of one room's forward and backward op."""

    def __init__(self, room, steps, batch, directions, hidden, options=(), dtype=torch.float32, device="cpu"):
        self.room, self.module = room, importlib.import_module(f"fastdl.ops.{room}")
        self.twin = "emulated" if device == "cpu" else "native"
        options = set(options)
        rows, size = GATES[room] * hidden, hidden // 2 + 1 if "projection" in options else hidden

        def numbers(*shape, kind=torch.float32, scale=1.0, on=True):
            return (torch.randn(shape) * scale).to(device, kind) if on else None

        gates_x = numbers(steps, batch, directions, rows, kind=dtype)
        self.h0 = numbers(directions, batch, size)
        c0 = numbers(directions, batch, hidden)
        self.w_hh = numbers(directions, rows, size, kind=dtype, scale=size**-0.5)
        self.ln = numbers(directions, rows, on="layer_norm" in options)
        self.lengths = torch.randint(0, steps + 1, (batch,), device=device) if "lengths" in options else None
        mask = (torch.rand(directions, batch, size, device=device) < 0.7) / 0.7 if "h_mask" in options else None
        self.mask = mask
        zone = 0.3 if options & {"zoneout", "expectation"} else 0.0
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=device) if "zoneout" in options else None
        tail = [mask, self.lengths, seed, zone]
        if room == "lstm":
            cell = [numbers(directions, hidden, on="cell_norm" in options) for _ in range(2)]
            peephole = numbers(directions, 3, hidden, on="peephole" in options)
            w_hr = numbers(directions, size, hidden, kind=dtype, scale=hidden**-0.5, on="projection" in options)
            between, tail = [self.ln, peephole, *cell, w_hr], [*tail, 2 * zone / 3, 1e-5]
            self.arguments = [gates_x, self.h0, c0, self.w_hh, *between, *tail]
            self.given = [numbers(steps, batch, directions, size, kind=dtype), numbers(directions, batch, size)]
            self.given += [numbers(directions, batch, hidden), None, None]
            self.shared = [*between, *tail]
        else:
            between = [numbers(directions, hidden, on="bias_n" in options)] if room == "gru" else []
            tail = [*tail, 1e-5, *(["relu" in options] if room == "rnn" else [])]
            self.arguments = [gates_x, self.h0, self.w_hh, *between, self.ln, *tail]
            self.given = [numbers(steps, batch, directions, size, kind=dtype), numbers(directions, batch, size), None]
            self.shared = [self.ln, *tail]

    def backward_arguments(self):
        """Those of the backward op, from what the reference saves."""
        outputs = self.module.FORWARD["torch"](*self.arguments)
        u = None
        if self.ln is not None and not outputs[0].shape[0]:
            u = outputs[0].new_empty(0, *self.arguments[0].shape[1:])
        elif self.ln is not None:
            u = all_products(
                previous(outputs[0], self.h0, self.mask, self.lengths, self.w_hh.dtype), self.w_hh, "torch"
            )
        y, c0 = outputs[0], self.arguments[2]
        saved = {"lstm": [*outputs[3:], c0], "gru": [outputs[2], y, self.h0], "rnn": [outputs[2], self.h0]}[self.room]
        return [*self.given, *saved, self.w_hh, u, *self.shared]

    def check(self, op, arguments):
        def double(value):
            return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        with poisoned():
            found = op[self.twin](*arguments)
        exact, peer = op["torch"](*map(double, arguments)), op["torch"](*arguments)
        for index, (ours, right, theirs) in enumerate(zip(found, exact, peer, strict=True)):
            assert ours.dtype == theirs.dtype and ours.is_contiguous()
            assert_accurate(ours.cpu(), right.cpu(), theirs.cpu(), name=f"{op.name} output {index}")
        for old, new in zip(before, arguments, strict=True):
            assert not isinstance(old, torch.Tensor) or torch.equal(old, new)
        return found

    def run(self):
        found = self.check(self.module.FORWARD, self.arguments)
        shorter = self.module.INFERENCE[self.twin](*self.arguments, None)
        assert all(torch.equal(a, b) for a, b in zip(shorter, found[: len(shorter)], strict=True))
        self.check(self.module.BACKWARD, self.backward_arguments())


def some(device, count, index):
    """Every dtype on a GPU; so many of them under the emulator, others for another index."""
    return DTYPES if device == "cuda" else [DTYPES[(index + i) % 3] for i in range(count)]


SIZES = [(5, 3, 2, 1), (5, 1, 1, 5), (1, 17, 2, 17), (5, 17, 1, 33), (3, 3, 2, 64), (2, 9, 1, 130), (0, 2, 2, 3)]


@pytest.mark.native
@pytest.mark.parametrize("size", [*SIZES, (4, 0, 1, 3)], ids=str)
def test_sizes(room, way, device, size):
    """(steps, batch, directions, hidden) in every dtype (emulated: all but one, in turn), without options."""
    for dtype in some(device, 2, sum(size)):
        Case(room, *size, dtype=dtype, device=device).run()


@pytest.mark.native
@pytest.mark.parametrize("size", [(3, 3, 2, 33), (4, 2, 1, 8)], ids=str)
def test_options(room, way, device, size):
    """Each option alone, then all of them."""
    options = [option for option in OPTIONS[room] if way == "loop" or option not in LOOP_ONLY]
    cases = (*((option,) for option in options), [option for option in options if option != "expectation"])
    for index, chosen in enumerate(cases):
        for dtype in some(device, 1, index + sum(size)):
            Case(room, *size, chosen, dtype, device).run()


@pytest.mark.parametrize("size", [(0, 2, 2, 3), (4, 0, 1, 3), (2, 1, 1, 1), (2, 17, 2, 300)], ids=str)
def test_all_options_at_the_edges(room, device, size):
    """No step, no sequence, one unit, more units than a block has threads."""
    for dtype in some(device, 1, sum(size)):
        Case(room, *size, [option for option in OPTIONS[room] if option != "expectation"], dtype, device).run()


def test_gradients_that_nobody_asked_for(room, way, device):
    """Those of the outputs that are None count as zeros."""
    for missing in itertools.product((False, True), repeat=2):
        case = Case(room, 3, 2, 2, 9, ("lengths",), device=device)
        if missing[0]:
            case.given[0] = None
        if missing[1]:
            case.given[1:] = [None] * (len(case.given) - 1)
        case.check(case.module.BACKWARD, case.backward_arguments())


def test_strided_arguments(room, way, device):
    case = Case(room, 3, 4, 2, 9, ("lengths", "h_mask"), device=device)
    for arguments in (case.arguments, case.given):
        for index, value in enumerate(arguments):
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                arguments[index] = value.mT.contiguous().mT
    case.check(case.module.FORWARD, case.arguments)
    case.check(case.module.BACKWARD, case.backward_arguments())


def test_bad_arguments(room, device):
    """What the wrappers check for memory safety; the readable errors are Python's."""
    case = Case(room, 3, 2, 1, 4, device=device)
    forward = case.module.FORWARD[case.twin]
    with pytest.raises(RuntimeError, match="h0: expected a tensor of shape"):
        forward(case.arguments[0], case.h0[:, :1], *case.arguments[2:])
    with pytest.raises(RuntimeError, match=r"in the dtype|float32"):
        forward(*(a.double() if isinstance(a, torch.Tensor) else a for a in case.arguments))
    arguments = case.backward_arguments()
    index = case.given.index(None)
    arguments[index] = torch.zeros_like(arguments[len(case.given)])
    with pytest.raises(RuntimeError, match="dgates"):
        case.module.BACKWARD[case.twin](*arguments)


# ---- The choice of the way ------------------------------------------------------------------------------------------

H100 = (132, 227 * 1024, 9)
A100, L4, T4 = (108, 163 * 1024, 8), (58, 99 * 1024, 8), (40, 64 * 1024, 7)
needs_emulator = pytest.mark.skipif(emulator.emulator_error() is not None, reason="no emulated library")


def plan_of(task, device):
    """task: bytes, bf16, steps, batch, directions, hidden, rows of a unit, depth, states."""
    library, out = ctypes.CDLL(str(emulator.library_path())), (ctypes.c_int64 * 9)()
    library.fastdl_emulator_recurrent_plan((ctypes.c_int64 * 9)(*task), (ctypes.c_int64 * 3)(*device), out)
    names = ("units", "slices", "groups", "batch", "columns", "parts", "depth", "chunk", "shared")
    return dict(zip(names, out, strict=True))


def task_of(room, batch, hidden, *, dtype=torch.bfloat16, backward=False, directions=1):
    gates, states = GATES[room], 2 if room == "lstm" else 1
    shape = (1, gates * hidden) if backward else (gates, hidden)
    return (dtype.itemsize, dtype == torch.bfloat16, 100, batch, directions, hidden, *shape, states)


@needs_emulator
@pytest.mark.lane("emulated cuda", "lstm")
@pytest.mark.parametrize("room", GATES)
def test_plans_fit_the_device(room, way):
    """Every unit and sequence in one block, no more blocks than run at the same time, no more memory than there is."""
    for device, hidden, batch, directions, backward, dtype in itertools.product(
        (H100, A100, L4, T4, (6, 227 * 1024, 9), (1, 48 * 1024, 8)),
        (1, 7, 64, 129, 256, 650, 1024, 4096),
        (1, 8, 9, 40, 64, 300),
        (1, 2),
        (False, True),
        DTYPES,
    ):
        plan = plan_of(task_of(room, batch, hidden, dtype=dtype, backward=backward, directions=directions), device)
        if not plan["units"]:
            continue
        assert way == "persistent"
        assert plan["slices"] * plan["groups"] * directions <= device[0] and plan["shared"] <= device[1]
        assert (plan["slices"] - 1) * plan["units"] < hidden <= plan["slices"] * plan["units"]
        assert (plan["groups"] - 1) * plan["batch"] < batch <= plan["groups"] * plan["batch"]
        assert plan["batch"] % plan["columns"] == 0 and plan["chunk"] % 16 == 0 and plan["chunk"] <= plan["depth"]


@needs_emulator
@pytest.mark.lane("emulated cuda", "lstm")
@pytest.mark.parametrize("room", GATES)
def test_estimates(room):
    """The kernel for a whole sequence where the weights fit and the batch is small; the loop beyond that."""
    for hidden, batch, backward in itertools.product((256, 512, 1024), (1, 8, 64), (False, True)):
        assert plan_of(task_of(room, batch, hidden, backward=backward), H100)["units"], (hidden, batch, backward)
    assert plan_of(task_of(room, 1, 1024, dtype=torch.float32), H100)["units"]
    assert not plan_of(task_of(room, 4096, 1024), H100)["units"]  # large products
    assert not plan_of(task_of(room, 1, 8192), H100)["units"]  # weights that do not fit
    assert not plan_of(task_of(room, 1, 64), T4)["units"]  # bfloat16 without tensor cores for it
    assert plan_of(task_of(room, 1, 64, dtype=torch.float16), T4)["units"]


@needs_emulator
@pytest.mark.native
def test_several_turns(room, device, monkeypatch):
    """Shapes with several passes over the batch, groups of sequences, and a tile that holds a part of the depth."""
    monkeypatch.setenv("FASTDL_RECURRENT", "persistent")
    seen = set()
    slice_of_two = {"lstm": 125, "gru": 145, "rnn": 250}[room]  # weights of a direction that no block holds alone
    deep = {"lstm": 275, "gru": 366, "rnn": 700}[room]
    for batch, directions, hidden, backward, dtype in (
        (70, 1, 9, False, torch.float16),
        (70, 1, 9, True, torch.float32),
        (17, 2, slice_of_two, False, torch.float32),
        (17, 2, slice_of_two, True, torch.float32),
        (9, 1, deep, True, torch.bfloat16),
    ):
        task = task_of(room, batch, hidden, dtype=dtype, backward=backward, directions=directions)
        plan = plan_of(task, (6, 227 * 1024, 9))  # csrc/cuda/platform.cuh
        assert plan["units"]
        seen.add("groups" if plan["groups"] > 1 else "one group")
        seen.add("passes" if plan["batch"] > plan["columns"] else "one pass")
        seen.add("chunks" if plan["depth"] > plan["chunk"] else "one chunk")
        seen.add("parts" if plan["parts"] > 1 else "one part")
        case = Case(room, 2, batch, directions, hidden, ("lengths", "h_mask", "zoneout"), dtype, device)
        if backward:
            case.check(case.module.BACKWARD, case.backward_arguments())
        else:
            case.check(case.module.FORWARD, case.arguments)
    assert seen >= {"groups", "passes", "chunks", "parts"} and len(seen) == 8, seen
