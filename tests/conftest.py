"""What all tests share. Tests never depend on variables of the shell that runs them."""

from __future__ import annotations

import os
import zlib

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"  # before OpenMP is loaded: the other workers need the cores

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(2)  # so that every test meets the code of several threads

import lanes

from fastdl import backend, emulator
from fastdl.ops import ROOMS


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Each test starts with an automatic back end; a test that wants FASTDL_BACKEND sets it."""
    monkeypatch.delenv("FASTDL_BACKEND", raising=False)
    monkeypatch.delenv("FASTDL_CHECK", raising=False)


@pytest.fixture(autouse=True)
def _seed(request):
    """Random tensors depend on the test's name alone: not on the tests before it, so a failure shows again."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


# ---- Lanes ----------------------------------------------------------------------------------------------------------


def room_of(item) -> str | None:
    """The room of tests/test_<room>[_more].py; None for tests of no room."""
    stem = item.path.stem.removeprefix("test_")
    return max((room for room in ROOMS if stem == room or stem.startswith(f"{room}_")), key=len, default=None)


def pytest_configure(config):
    if config.option.quick:
        emulator.ORDERS = emulator.ORDERS[:1]
    lanes.only_levels += filter(None, config.option.levels.split(","))
    if unknown := set(lanes.only_levels) - set(backend.LEVEL_CAPS):
        raise pytest.UsageError(f"--levels: {sorted(unknown)}: expected some of {', '.join(backend.LEVEL_CAPS)}")
    if lanes.only_levels and backend.native_loaded() and not lanes.level_caps():
        raise pytest.UsageError(f"--levels {config.option.levels}: this CPU has none of them")


def pytest_generate_tests(metafunc):
    if "level" in metafunc.fixturenames:
        none = pytest.param("none", marks=pytest.mark.skip("no compiled library"))
        metafunc.parametrize("level", lanes.level_caps(room_of(metafunc.definition)) or [none], indirect=True)
    if "lane" in metafunc.fixturenames:
        room = room_of(metafunc.definition)
        metafunc.parametrize("lane", lanes.lanes(room), indirect=True, ids=lambda lane: lane.name.replace(" ", "-"))


@pytest.fixture
def lane(request):
    """Runs the test once per lane of its room (tests/lanes.py)."""
    with request.param.active() as active:
        yield active


def place_of(item) -> tuple[str | None, str | None]:
    """Room and lane that a test counts in."""
    marker, room = item.get_closest_marker("lane"), room_of(item)
    if marker:
        return (marker.args[1:] or (room,))[0], lanes.kind(marker.args[0])
    fixtures = set(getattr(item, "fixturenames", ()))
    if "lane" in fixtures:
        return room, lanes.kind(item.callspec.params["lane"].name)
    return room, "cpu" if {"level", "native"} & fixtures else "reference"


def pytest_addoption(parser):
    group = parser.getgroup("fastdl")
    group.addoption("--room", choices=sorted(ROOMS), help="only tests of this room")
    group.addoption("--levels", default="", help="only these CPU levels, a comma list: scalar,avx2,...")
    group.addoption("--one-level", action="store_true", help="each test at one CPU level (which, says its name)")
    group.addoption(
        "--quick",
        action="store_true",
        help="the same, and every third emulated test, in one order of threads",
    )
    group.addoption("--lane", choices=lanes.LANES, help="only tests of this lane; a room of it that ran none fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and not report.skipped:
        report.user_properties.append(("room and lane", place_of(item)))  # travels with it from pytest-xdist's workers
    return report


def pytest_runtest_logreport(report):
    for name, value in report.user_properties if report.when == "call" else ():
        if name == "room and lane" and value[0]:
            lanes.count(*value)


def pytest_terminal_summary(terminalreporter):
    if lanes.ran:
        terminalreporter.section("tests that ran, by room and lane")
        for line in lanes.matrix()[0]:
            terminalreporter.write_line(line)


def pytest_sessionfinish(session):
    """A whole run in which a lane of this machine ran nothing has failed."""
    config = session.config
    if hasattr(config, "workerinput"):
        return  # pytest-xdist: the process that hands out the tests counts
    whole = config.args_source == config.ArgsSource.TESTPATHS or config.option.lane
    whole = whole and not config.option.keyword and not config.option.markexpr
    whole = whole and not config.option.collectonly and not config.getoption("lf", False)
    if not whole or session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return
    for complaint in lanes.matrix(config.option.room, config.option.lane)[1]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        config.get_terminal_writer().line(f"\nFAILED {complaint}", red=True)


def level_of(item) -> str | None:
    """The CPU level that a test runs at; None for tests that run once."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params["lane"].level if "lane" in params else params.get("level")


def one_level_each(items) -> set[str]:
    """Of tests that differ in nothing but the level, the name of one; which one depends on the test's name."""
    groups: dict[str, list[str]] = {}
    for item in items:
        if level := level_of(item):
            groups.setdefault(item.nodeid.replace(level, "", 1), []).append(item.nodeid)
    return {same[zlib.crc32(name.encode()) % len(same)] for name, same in groups.items()}


def left_out(item) -> bool:
    """Two thirds of the emulated tests: the emulator looks at accesses itself."""
    lane = item.callspec.params.get("lane") if hasattr(item, "callspec") else None
    return lane is not None and lane.name == "emulated cuda" and zlib.crc32(item.nodeid.encode()) % 3 > 0


def pytest_collection_modifyitems(config, items):
    """Keeps what the options ask for, and marks what `make sanitize` runs: native code of all rooms, and the emulator
    with the kernels that it runs."""
    wanted = (config.option.room, config.option.lane)
    quick = config.option.quick
    spread = one_level_each(items) if quick or config.option.one_level else None
    if any(wanted) or spread is not None:
        kept, others = [], []
        for item in items:
            fits = all(w in (None, place) for w, place in zip(wanted, place_of(item), strict=True))
            fits = fits and (spread is None or level_of(item) is None or item.nodeid in spread)
            fits = fits and not (quick and left_out(item))
            (kept if fits else others).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = kept
    stems = ("test_quant_matmul", "test_decoder_block")
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        compiled = "level" in fixtures or ("native" in fixtures and item.path.stem.startswith(stems))
        if "lane" in fixtures:
            compiled = item.callspec.params["lane"].backend in ("cpu", "cuda")
        if item.path.stem == "test_emulator":
            compiled = True
        if compiled:
            item.add_marker("native")


# ---- Compiled code --------------------------------------------------------------------------------------------------


@pytest.fixture
def native():
    """For tests of the compiled library: skips by name where none is built."""
    if not backend.native_loaded():
        pytest.skip(f"compiled library: {backend.native_error()}")


@pytest.fixture
def level(request):
    """Runs the test once per CPU variant of this machine, the kernels capped to it; the value is the cap's name."""
    with backend.level_cap(request.param):
        yield request.param
