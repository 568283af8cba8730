"""Rooms lstm, gru and rnn, Triton back end: both ways of every op, and what the contract tests do not reach.

Interpreted without a GPU, for real with one. The ways: the step loop (any shape and option), and the kernel for whole
sequences (hidden sizes that fit, no layer norm, no projection).
"""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import test_gru
import test_lstm
import test_rnn
import torch
from torch import Tensor

from fastdl.kernels import configs
from fastdl.testing import assert_accurate, poisoned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LANE = "gpu" if DEVICE == "cuda" else "triton interpreted"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TESTS = {"lstm": test_lstm, "gru": test_gru, "rnn": test_rnn}
ROOMS = [pytest.param(room, marks=pytest.mark.lane(LANE, room)) for room in TESTS]
NARROW = {"lstm": (3, 8), "gru": (2,), "rnn": (2,)}  # w_hh and w_hr among the arguments: in the dtype of gates_x
SEED = {"lstm": 11, "gru": 7, "rnn": 6}  # among the arguments of forward
U = {"lstm": 9, "gru": 7, "rnn": 6}  # among those of backward
WAYS = ("steps", "sequence")
WHOLE = {"layer_norm", "projection"}  # options that only the step loop has
# time, batch, input, hidden; the tiles of whole sequences are 16, 32, 64 and 128 wide
SHAPES = [(5, 3, 1, 5), (1, 1, 1, 1), (2, 17, 1, 17), (2, 3, 1, 33), (1, 2, 1, 64), (1, 3, 1, 128), (2, 1, 1, 130)]
EMPTY = [(0, 3, 1, 5), (5, 0, 1, 17), (0, 0, 1, 33)]


def options_of(room, way):
    return tuple(o for o in TESTS[room].FAMILY.options if way == "steps" or o not in WHOLE)


def each_option(way):
    """(room, options): none, each alone, all together."""
    return [
        pytest.param(room, options, marks=pytest.mark.lane(LANE, room), id=f"{room}-{'-'.join(options) or 'plain'}")
        for room in TESTS
        for options in [(), *((o,) for o in options_of(room, way)), options_of(room, way)]
    ]


def both(room):
    """The module of the kernels and that of the reference."""
    return (importlib.import_module(f"fastdl.{where}.{room}") for where in ("kernels", "reference"))


def take(monkeypatch, room, way):
    """Every call goes one way, and fails if it could not."""
    found = []

    def instead(original):
        def chosen(*arguments):
            block = original(*arguments)
            found.append(block)
            return None if way == "steps" else block

        return chosen

    for name in (room, "lstm_backward") if room == "lstm" else (room,):
        module = importlib.import_module(f"fastdl.kernels.{name}")
        monkeypatch.setattr(module, "sequence_block", instead(module.sequence_block))
    return found


def arguments_of(room, sizes, options, dtype) -> list:
    """What the forward op takes."""
    family = TESTS[room].FAMILY
    made = family.make(sizes, options, torch.float32, DEVICE, grad=False)
    found = family.arguments(made, options, dtype)
    for index in NARROW[room]:
        found[index] = None if found[index] is None else found[index].to(dtype)
    return found


def in_double(arguments):
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments]


def compare(function, reference, arguments, name):
    """The rule, from memory full of NaN, and on a GPU the same at a second run: (ours, the reference's)."""
    with poisoned():
        ours = function(*arguments)
        again = function(*arguments) if DEVICE == "cuda" else ours
    exact, peer = reference(*in_double(arguments)), reference(*arguments)
    assert len(ours) == len(peer)
    for index, (a, b, e, p) in enumerate(zip(ours, again, exact, peer, strict=True)):
        assert a.dtype == p.dtype and a.shape == p.shape and a.is_contiguous()
        assert torch.equal(a, b)
        assert not any(isinstance(t, Tensor) and t.numel() and t.data_ptr() == a.data_ptr() for t in arguments)
        assert_accurate(a, e, p, name=f"{name}, output {index}")
    return ours, peer


def check_room(room, sizes, options, dtype, *, seed=True, without=()) -> None:
    """Forward, inference and backward of one call. without: gradients of outputs that are not given."""
    kernels, reference = both(room)
    functions = [
        tuple(getattr(module, f"{room}_{name}") for module in (kernels, reference))
        for name in ("forward", "inference", "backward")
    ]
    arguments = arguments_of(room, sizes, options, dtype)
    if not seed:  # zoneout's expectation
        arguments[SEED[room]] = None
    outputs, exact = compare(*functions[0], arguments, f"{room}, forward")
    plain = functions[1][0](*arguments, None)
    assert len(plain) == len(outputs) - (2 if room == "lstm" else 1)
    assert all(torch.equal(a, b) for a, b in zip(plain, outputs, strict=False))

    grads = list(TESTS[room].TestContract().backward_arguments(arguments, exact))
    grads[U[room]] = None if grads[U[room]] is None else grads[U[room]].to(dtype)
    for index in without:
        grads[index] = None
    compare(*functions[2], grads, f"{room}, backward")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("room", ROOMS)
def test_shapes(monkeypatch, room, sizes, way):
    """Both directions and lengths in float32; all options in float16, interpreted at every other shape. A width that
    no kernel for whole sequences holds goes step by step."""
    ways = take(monkeypatch, room, way)
    check_room(room, sizes, ("two", "lengths"), torch.float32)
    assert ways
    del ways[:]
    if DEVICE == "cpu" and SHAPES.index(sizes) % 2:
        return
    check_room(room, sizes, options_of(room, way), torch.float16)
    assert ways and all((block is None) == (sizes[3] > 128) for block in ways)


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize("room", ROOMS)
def test_empty(room, sizes):
    """No step: states and their gradients pass through; no sequence: sums are 0."""
    for options in (("two", "lengths"), options_of(room, "steps")):
        check_room(room, sizes, options, torch.float32)
        check_room(room, sizes, options, torch.float32, without=(0, 1))


@pytest.mark.parametrize(("room", "options"), each_option("steps"))
def test_options_step_by_step(monkeypatch, room, options):
    take(monkeypatch, room, "steps")
    check_room(room, (3, 3, 1, 18), (*options, "two"), torch.float32)
    check_room(room, (3, 5, 1, 9), options, torch.float16, seed=False, without=(0,))


@pytest.mark.parametrize(("room", "options"), each_option("sequence"))
def test_options_of_whole_sequences(monkeypatch, room, options):
    ways = take(monkeypatch, room, "sequence")
    check_room(room, (3, 3, 1, 18), (*options, "two"), torch.float32)
    check_room(room, (3, 5, 1, 9), options, torch.float16, seed=False, without=(0,))
    assert all(block in (16, 32) for block in ways)


@pytest.mark.parametrize("room", ROOMS)
def test_rows_wider_than_a_tile(monkeypatch, room):
    """Layer norm walks over a row tile by tile; without it programs share a row."""
    take(monkeypatch, room, "steps")
    for name in ("step", "step_backward"):
        monkeypatch.setitem(configs._TABLE, f"{room}_{name}", {16: configs.Config(2, 1)})
    for options in (("two", "lengths"), options_of(room, "steps")):
        check_room(room, (2, 3, 1, 37), options, torch.float32)


def test_the_way_is_a_function_of_shape_dtype_and_architecture(monkeypatch):
    pytest.importorskip("triton")
    from fastdl.kernels import _recurrent_launch as launch

    def block(cc, gates, hidden, dtype):
        monkeypatch.setattr(launch, "capability", lambda _: cc)
        room = {4: "lstm", 3: "gru", 1: "rnn"}[gates]
        return launch.sequence_block(f"{room}_sequence", torch.device("cpu"), gates, hidden, dtype)

    for gates in (4, 3, 1):
        for cc in (None, *configs.ARCHITECTURES):
            for hidden, tile in ((1, 16), (16, 16), (17, 32), (64, 64), (65, None)):  # in registers
                assert block(cc, gates, hidden, torch.float32) == tile
        assert block(75, gates, 5, torch.float16) is None  # no tensor core products
        for cc in (80, 90, 100):
            assert block(cc, gates, 128, torch.bfloat16) == 128 and block(cc, gates, 129, torch.bfloat16) is None
        for cc in (86, 89, 120):  # 99 KiB of shared memory
            assert block(cc, gates, 64, torch.bfloat16) == 64
            assert block(cc, gates, 100, torch.bfloat16) == (128 if gates == 1 else None)
    assert block(121, 4, 128, torch.float16) is None and block(103, 4, 128, torch.float16) == 128


@pytest.mark.parametrize("room", ROOMS)
def test_gradients_of_a_double_backward_are_refused(room):
    kernels, reference = both(room)
    arguments = arguments_of(room, (2, 2, 1, 3), (), torch.float32)
    grads = list(
        TESTS[room].TestContract().backward_arguments(arguments, getattr(reference, f"{room}_forward")(*arguments))
    )
    gates = 3 if room == "lstm" else 2
    grads[gates] = torch.zeros(())
    with pytest.raises(RuntimeError, match="dgates: only a double backward gives it"):
        getattr(kernels, f"{room}_backward")(*grads)


def test_rows_far_into_a_large_tensor():
    """Rows of [T, B, D] are counted in 64 bits."""
    triton = pytest.importorskip("triton")
    tl = triton.language
    from fastdl.kernels._recurrent import place

    @triton.jit
    def kernel(found, step, count, batch, place: tl.constexpr):
        _, row, _, t, state, at = place(step, count, batch, 16)
        to = found + (tl.program_id(1) * 16 + row) * 3
        tl.store(to, t + row * 0)
        tl.store(to + 1, state)
        tl.store(to + 2, at)

    found = torch.zeros(2, 16, 3, dtype=torch.int64, device=DEVICE)
    count, batch = 2**20, 2**19 + 3
    kernel[(1, 2)](found, 5, count, batch, place)
    for d, t in ((0, 5), (1, count - 6)):
        row = torch.arange(16, device=DEVICE)
        expected = torch.stack((torch.full_like(row, t), d * batch + row, (t * batch + row) * 2 + d), 1)
        assert torch.equal(found[d], expected)
