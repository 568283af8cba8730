"""Lanes: the ways in which a room's back ends can run on this machine, and the count of what ran in each.

A test that takes the fixture ``lane`` runs once for every lane of its room that this machine has::

    def test_contract(lane, case):
        y = ops.layer_norm(x.to(lane.device), backend=lane.backend)

    | lane                 | back end | tensors | where                                       |
    | reference            | torch    | CPU     | everywhere                                  |
    | cpu <level>          | cpu      | CPU     | levels that this CPU has                    |
    | emulated cuda        | cuda     | CPU     | where the emulated library is built         |
    | triton interpreted   | triton   | CPU     | Triton installed and no GPU                 |
    | gpu cuda, gpu triton | both     | GPU     | an NVIDIA GPU with a CUDA build of torch    |

Compile-only lanes (cuda compiled, triton compiled) mark their tests with ``pytest.mark.lane(name, room)``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastdl import backend, emulator
from fastdl._library import Op, twin_of
from fastdl.ops import ROOMS
from fastdl.testing import emulated

LANES = ("reference", "cpu", "emulated cuda", "triton interpreted", "triton compiled", "cuda compiled", "gpu")


@dataclass(frozen=True)
class Lane:
    """name: as in the table above; level: CPU level cap, or None."""

    name: str
    backend: str
    device: str = "cpu"
    level: str | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What the lane computes in: Triton's interpreter has no bfloat16 that can be trusted."""
        if self.name == "triton interpreted":
            return (torch.float32, torch.float16)
        return (torch.float32, torch.bfloat16, torch.float16)

    @contextlib.contextmanager
    def active(self) -> Iterator[Lane]:
        with contextlib.ExitStack() as stack:
            if self.level:
                stack.enter_context(backend.level_cap(self.level))
            if self.name == "emulated cuda":
                stack.enter_context(emulated())
            yield self


only_levels: list[str] = []  # caps that --levels asked for; all when empty
# Caps that give some rooms no other kernel than the cap below: CMakeLists.txt compiles them per kind of vectors.
SAME_KERNELS = {
    **dict.fromkeys(
        ("norm", "group_norm", "batch_norm", "activation", "rope", "position"), ("avx2", "amx-twin", "amx")
    ),
    **dict.fromkeys(
        ("linear_scan", "selective_scan", "attention", "attention_decode", "additive_attention"),
        ("avx2", "amx-twin", "amx"),
    ),
    **dict.fromkeys(("lstm", "gru", "rnn"), ("avx2",)),  # their products use tiles
}


def level_caps(room: str | None = None) -> list[str]:
    """Caps that this CPU can reach, each giving another compiled variant (of the room), of those that --levels asked
    for."""
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
    caps = [cap for cap in caps if cap not in SAME_KERNELS.get(room, ())]
    return [cap for cap in caps if not only_levels or cap in only_levels]


def missing(lane: str) -> str | None:
    """Why this machine has no such lane; None when it has."""
    if lane == "cpu":
        return backend.native_error()
    if lane == "emulated cuda":
        return emulator.emulator_error()
    if lane.startswith("triton") and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if lane == "triton interpreted" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is a GPU, where the kernels run for real"
    if lane == "cuda compiled" and not backend.build_info().get("cuda"):
        return "the library was built without nvcc"
    if lane == "gpu" and not torch.cuda.is_available():
        return "no GPU"
    return None


def lanes(room: str) -> list[Lane]:
    """Every lane of the room on this machine."""
    backends = ROOMS[room].backends
    found = [Lane("reference", "torch")]
    if "cpu" in backends:
        found += [Lane(f"cpu {cap}", "cpu", level=cap) for cap in level_caps(room)]
    if "cuda" in backends and not missing("emulated cuda"):
        found.append(Lane("emulated cuda", "cuda"))
    if "triton" in backends and not missing("triton interpreted"):
        found.append(Lane("triton interpreted", "triton"))
    if not missing("gpu"):
        found += [Lane(f"gpu {name}", name, "cuda") for name in ("cuda", "triton") if name in backends]
    return found


def op_of(op: Op, lane: Lane):
    """The twin of an op that a lane calls, as torch.library.opcheck wants it."""
    namespace, name = op.twins()[twin_of(lane.backend, torch.device(lane.device))].split("::")
    return getattr(getattr(torch.ops, namespace), name).default


# ---- The matrix that `make test` prints -----------------------------------------------------------------------------

ran: Counter[tuple[str, str]] = Counter()  # (room, lane of LANES) -> tests that ran


def kind(lane: str) -> str:
    """'cpu avx2' -> 'cpu': the lane of LANES."""
    return next((known for known in LANES if lane.startswith(known)), lane)


def count(room: str, lane: str) -> None:
    ran[room, kind(lane)] += 1


def expected(room: str) -> list[str]:
    """Lanes of LANES in which at least one test of the room must run on this machine."""
    backends = ROOMS[room].backends
    wanted = ["reference"]
    wanted += ["cpu"] if "cpu" in backends else []
    wanted += ["emulated cuda", "cuda compiled", "gpu"] if "cuda" in backends else []
    wanted += ["triton interpreted", "triton compiled", "gpu"] if "triton" in backends else []
    return [lane for lane in LANES if lane in wanted and not missing(lane)]


def matrix(only_room: str | None = None, only_lane: str | None = None) -> tuple[list[str], list[str]]:
    """Lines of the matrix, and complaints: lanes that should have run here (of those asked for) and ran nothing."""
    width = max(len(room) for room in ROOMS) + 2
    lines = ["".ljust(width) + "".join(lane.rjust(len(lane) + 2) for lane in LANES)]
    complaints = []
    for room in ROOMS:
        wanted, cells = expected(room), []
        for lane in LANES:
            number = ran[room, lane]
            if lane in wanted and not number and only_room in (None, room) and only_lane in (None, lane):
                complaints.append(f"room {room}: no test ran in the lane '{lane}'")
            cells.append((str(number) if number or lane in wanted else "-").rjust(len(lane) + 2))
        lines.append(room.ljust(width) + "".join(cells))
    lines += [f"{lane}: {reason}" for lane in LANES if lane != "reference" and (reason := missing(lane))]
    return lines, complaints
