"""What all tests share. Tests never depend on variables of the shell that runs them."""

from __future__ import annotations

import zlib

import pytest
import torch

from fastdl import backend


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Each test starts with an automatic back end; a test that wants FASTDL_BACKEND sets it."""
    monkeypatch.delenv("FASTDL_BACKEND", raising=False)
    monkeypatch.delenv("FASTDL_CHECK", raising=False)


@pytest.fixture(autouse=True)
def _seed(request):
    """Random tensors depend on the test's name alone: not on the tests before it, so a failure shows again."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def pytest_collection_modifyitems(items):
    """Marks what `make sanitize` runs: tests over CPU levels, and those of rooms with kernels that need the library."""
    rooms = ("test_quant_matmul", "test_decoder_block")
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "level" in fixtures or ("native" in fixtures and item.path.stem.startswith(rooms)):
            item.add_marker("native")


@pytest.fixture
def native():
    """For tests of the compiled library: skips by name where none is built."""
    if not backend.native_loaded():
        pytest.skip(f"compiled library: {backend.native_error()}")


def level_caps() -> list[str]:
    """Caps that this CPU can reach, each giving another compiled variant: what `level` runs through."""
    if not backend.native_loaded():
        return []
    features = set(backend.cpu_features().split(","))
    caps = ["scalar"]
    if {"avx2", "fma", "f16c"} <= features:
        caps += ["avx2-plain"] + (["avx2"] if "avx_vnni" in features else [])
        if "avx512" in features:
            caps += ["avx512-plain"]
            if "avx512_bf16" in features:
                caps += ["avx512", "amx-twin"] + (["amx"] if "amx" in features else [])
    return caps


@pytest.fixture(params=level_caps() or [pytest.param("none", marks=pytest.mark.skip("no compiled library"))])
def level(request):
    """Runs the test once per CPU variant of this machine, the kernels capped to it; the value is the cap's name."""
    with backend.level_cap(request.param):
        yield request.param
