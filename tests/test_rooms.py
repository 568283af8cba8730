"""Every room has the files that the table of ops and its own contract promise; every public name is documented."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import fastdl
from fastdl import backend, ops
from fastdl.ops import ROOMS

ROOT = Path(__file__).resolve().parent.parent


def files(room: str) -> list[str]:
    """What the table promises for a room."""
    entry = ROOMS[room]
    found = [f"fastdl/ops/{room}.py", f"fastdl/reference/{room}.py", f"tests/test_{room}.py"]
    if "cpu" in entry.backends:
        found += [f"csrc/cpu/{room}.cpp", f"csrc/cpu/{room}_kernel.cpp"]
    if "cuda" in entry.backends:
        found += [f"csrc/cuda/{room}.cu", f"csrc/cuda/{room}.cuh"]
    if "triton" in entry.backends:
        found.append(f"kernels/{room}.py")
    if entry.backends:
        found.append(f"bench/bench_{room}.py")
    if entry.modules:
        found.append(f"fastdl/nn/{room}.py")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_room_has_its_files(room):
    missing = [name for name in files(room) if not (ROOT / name).is_file()]
    assert not missing, f"room {room} lacks {', '.join(missing)}"


@pytest.mark.parametrize("room", ROOMS)
def test_contract_names_files_that_exist(room):
    text = (ROOT / f"fastdl/ops/{room}.py").read_text(encoding="utf-8")
    contract = inspect.cleandoc(importlib.import_module(f"fastdl.ops.{room}").__doc__ or "")
    assert contract, f"fastdl/ops/{room}.py has no contract at its head"
    for name in re.findall(r"\b(?:fastdl|csrc|tests|bench|kernels)/[\w/.*]+", text):
        assert list(ROOT.glob(name.rstrip("."))), f"fastdl/ops/{room}.py names {name}, which does not exist"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_registered_with_the_back_ends_of_the_table(room):
    registered = backend.rooms()
    for function in ROOMS[room].functions:
        if function in registered:
            assert set(registered[function]) == {"torch", *ROOMS[room].backends}


@pytest.mark.parametrize("room", ROOMS)
def test_public_names(room):
    entry = ROOMS[room]
    for name in entry.functions:
        assert name in ops.__all__ and getattr(ops, name).__doc__, name
    for name in entry.modules:
        assert name in fastdl.nn.__all__ and getattr(fastdl.nn, name).__doc__, name


def test_no_file_without_a_room():
    stems = {path.stem for path in (ROOT / "fastdl/ops").glob("[a-z]*.py")}
    assert stems == set(ROOMS)
    assert {path.stem for path in (ROOT / "fastdl/nn").glob("[a-z]*.py")} <= set(ROOMS)


DOCUMENTED = ["fastdl.testing", "fastdl.ops._rope_table", "fastdl.quant.tensor", "fastdl.quant.model"]
DOCUMENTED += ["fastdl.nn._transformer"]
DOCUMENTED += [f"fastdl.nn.{room}" for room in ROOMS if ROOMS[room].modules]


@pytest.mark.parametrize("module", [*(f"fastdl.ops.{room}" for room in ROOMS), *DOCUMENTED])
def test_examples_run(module):
    found = importlib.import_module(module)
    result = doctest.testmod(found, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0
