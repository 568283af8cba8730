"""Which back end runs an op, and why.

The compiled library is loaded once, at the end of ``import fastdl``. If that fails the package works on with the torch
back end, and :func:`native_error` says what was wrong.

Choice, by :func:`choose`: the argument ``backend=``, then the variable FASTDL_BACKEND, then automatic (on a GPU cuda,
triton, torch; on a CPU cpu, torch). The first two never fall back. What a back end refuses stands in its room's table::

    def _refuse_cpu(*, dtype, **facts):
        return "float64 has no kernel" if dtype == torch.float64 else None

    register_room("layer_norm", {"cpu": _refuse_cpu, "torch": None})
    choose("layer_norm", backend, device=x.device, dtype=x.dtype)      # "cpu", "torch", or BackendError

Test: tests/test_backend.py
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdl import _library

BACKENDS = ("cpu", "cuda", "triton", "torch")
LEVEL_CAPS = ("scalar", "avx2", "avx512", "amx", "amx-twin", "avx2-plain", "avx512-plain")
_MARKER = b"FASTDL_SCHEMA_HASH="
# What os.environ looks up in, without encoding the name at every call of every op.
_environment = getattr(os.environ, "_data", os.environ)
_VARIABLE = os.environ.encodekey("FASTDL_BACKEND") if _environment is not os.environ else "FASTDL_BACKEND"
_AUTOMATIC = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}

Refusal = Callable[..., "str | None"]


class BackendError(RuntimeError):
    """The back end or CPU level that was asked for cannot be used; the message says why and what to do."""


# ---- The compiled library ---------------------------------------------------------------------------------------


@dataclass
class _Native:
    library: ctypes.CDLL | None = None
    error: str | None = "fastdl is still being imported"


_native_state = _Native()


def library_path() -> Path:
    """Where the compiled library is expected: FASTDL_LIBRARY, or beside this package."""
    return Path(os.environ.get("FASTDL_LIBRARY") or Path(__file__).with_name("libfastdl_ops.so"))


def unfit(path: Path) -> str | None:
    """Why the library at ``path`` must not be loaded, read from its bytes (loading it would register its ops)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # A file cut short by a full disk kills the process inside dlopen. Its section headers stand at the end.
        if data[:6] == b"\x7fELF\x02\x01" and len(data) >= 64:
            (offset,), (size, count) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HH", data, 58)
            if offset + size * count > len(data):
                return f"{path} is cut short: rebuild it with `make build` or `pip install --no-build-isolation .`"
        at = data.find(_MARKER)
        built = data[at + len(_MARKER) : at + len(_MARKER) + 64].decode("ascii", "replace") if at >= 0 else "none"
    if built == _library.schema_hash():
        return None
    return (
        f"{path} was built for other op schemas (hash {built[:12]}, this Python has {_library.schema_hash()[:12]}): "
        "rebuild it with `make build` or `pip install --no-build-isolation .`"
    )


def _load() -> None:
    """Load the compiled library, once; remember why not. Called at the end of ``import fastdl``."""
    _choices.clear()
    _native_state.library, _native_state.error = None, None
    path = library_path()
    try:
        if not path.is_file():
            _native_state.error = (
                f"{path} does not exist: build it with `make build` or `pip install --no-build-isolation .`"
            )
        elif reason := unfit(path):
            _native_state.error = reason
        else:
            torch.ops.load_library(str(path))
            library = ctypes.CDLL(str(path))
            library.fastdl_cpu_level.restype = ctypes.c_char_p
            library.fastdl_cpu_features.restype = ctypes.c_char_p
            library.fastdl_set_level_cap.argtypes = [ctypes.c_char_p]
            _native_state.library = library
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        _native_state.error = f"{path} could not be loaded: {error}"


def native_loaded() -> bool:
    """True when the compiled library is loaded."""
    return _native_state.library is not None


def native_error() -> str | None:
    """Why the compiled library is not loaded; None when it is."""
    return _native_state.error


def check_environment() -> None:
    """Raise BackendError if FASTDL_ISA names no CPU level. The import lets it pass, so that the message can be shown
    without a traceback; every choice of a back end asks."""
    if _cap not in LEVEL_CAPS:
        raise BackendError(f"FASTDL_ISA={_cap!r} is no CPU level; expected one of {', '.join(LEVEL_CAPS[:5])}")


def _library_or_raise() -> ctypes.CDLL:
    if _native_state.library is None:
        raise BackendError(f"the compiled library is not loaded: {_native_state.error}")
    return _native_state.library


def cpu_level() -> str:
    """CPU level in use: "scalar", "avx2", "avx512", "amx" or "amx-twin"; "none" without the compiled library."""
    return _native_state.library.fastdl_cpu_level().decode() if _native_state.library else "none"


def cpu_features() -> str:
    """Comma list of what the CPU has and the kernels can use, e.g. "avx2,fma,f16c,avx512,avx512_bf16"."""
    return _native_state.library.fastdl_cpu_features().decode() if _native_state.library else ""


def set_level_cap(name: str) -> None:
    """Use no CPU level above ``name``: scalar, avx2, avx512, amx (no cap), or amx-twin (for tests).

    >>> from fastdl import backend
    >>> backend.set_level_cap("amx")   # back to everything the CPU has
    """
    if name not in LEVEL_CAPS or _library_or_raise().fastdl_set_level_cap(name.encode()) != 0:
        raise BackendError(f"{name!r} is no CPU level; expected one of {', '.join(LEVEL_CAPS[:5])}")
    global _cap
    _cap = name


_cap = os.environ.get("FASTDL_ISA", "amx")


@contextlib.contextmanager
def level_cap(name: str) -> Iterator[str]:
    """Cap the CPU level inside a ``with`` block, for the whole process; yields the level in use."""
    before = _cap
    set_level_cap(name)
    try:
        yield cpu_level()
    finally:
        set_level_cap(before)


def build_info() -> dict[str, str]:
    """How the compiled library was built (from fastdl._native); empty when that module is not built for this Python."""
    try:
        from fastdl import _native
    except ImportError:
        return {}
    return _native.build_info()


# ---- Rooms and the choice of a back end -------------------------------------------------------------------------


_choices: dict[tuple, str] = {}  # what `choose` found, for calls without facts


@dataclass
class _Room:
    backends: dict[str, Refusal | None]
    facts: Callable[..., Mapping[str, Any]] | None = None


_rooms: dict[str, _Room] = {}


def register_room(
    name: str,
    backends: Mapping[str, Refusal | None],
    facts: Callable[..., Mapping[str, Any]] | None = None,
) -> None:
    """Register an op's back ends.

    ``backends`` maps each back end that the room has to a function that refuses, or None where it takes everything. The
    function gets ``device=``, ``dtype=`` and whatever else the caller passes to :func:`choose`, by name, and returns
    the reason, or None. "torch" is always there. ``facts(*args, **kwargs)`` turns the public function's arguments
    into these names for :func:`explain`; without it device and dtype of the first tensor are taken.
    """
    unknown = set(backends) - set(BACKENDS)
    if unknown:
        raise ValueError(f"room {name!r}: unknown back ends {sorted(unknown)}; expected some of {BACKENDS}")
    _choices.clear()
    _rooms[name] = _Room({"torch": None, **backends}, facts)


def rooms() -> dict[str, tuple[str, ...]]:
    """Every registered room and the back ends it has."""
    return {name: tuple(b for b in BACKENDS if b in room.backends) for name, room in sorted(_rooms.items())}


def _refusal(
    room: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None,
    overrides: Mapping[str, str | None],
    facts: Mapping[str, Any],
) -> str | None:
    """Why this back end cannot run this call; None when it can."""
    if room not in _rooms:
        raise ValueError(f"no room named {room!r}; there are {', '.join(sorted(_rooms)) or 'none'}")
    table = _rooms[room].backends
    if backend not in table:
        return f"{room} has no {backend} back end in this release"
    if backend == "cpu" and device.type != "cpu":
        return f"the tensors are on {device}; move them to the CPU"
    emulated = backend == "cuda" and device.type == "cpu" and _library.emulating
    if backend == "cuda" and device.type != "cuda" and not emulated:
        return f"the tensors are on {device}; move them to a CUDA device"
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}; move them to a CUDA device"
    if backend in ("cpu", "cuda") and not native_loaded() and not emulated:
        return f"the compiled library is not loaded: {native_error()}"
    if (
        backend == "cuda"
        and not emulated
        and not torch._C._dispatch_has_kernel_for_dispatch_key("fastdl::cuda_smoke", "CUDA")
    ):
        return "the compiled library has no CUDA code; install nvcc and rebuild with FASTDL_CUDA=on"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed; type: pip install triton"
    if overrides.get(backend):
        return overrides[backend]
    refuse = table[backend]
    return refuse(device=device, dtype=dtype, **facts) if refuse is not None else None


def choose(
    room: str,
    requested: str | None = None,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    refusals: Mapping[str, str | None] | None = None,
    **facts: Any,
) -> str:
    """The back end for one call.

    requested   the caller's ``backend=`` argument; None or "auto" asks FASTDL_BACKEND, then chooses
    refusals    reasons found by the caller, back end -> reason (None: nothing against it), beside the room's own table
    facts       passed to the room's refusal functions

    An explicit choice that cannot run raises :class:`BackendError`; it never falls back.
    """
    if refusals is None and not facts:  # the answer is a function of these alone, and asked for at every call
        key = (room, requested, device, dtype, _environment.get(_VARIABLE), _library.emulating)
        found = _choices.get(key)
        if found is None:
            found = _choices[key] = _choose(room, requested, device, dtype, {}, {})
        return found
    return _choose(room, requested, device, dtype, refusals or {}, facts)


def setting() -> tuple:
    """What a choice depends on beside its arguments: for those who keep what was chosen."""
    return _environment.get(_VARIABLE), _cap, _library.emulating, _native_state.library


_NO_RULES = dict.fromkeys(
    ("cpu", "cuda", "triton"),
    "kernels have no rules for torch.func's transforms and forward-mode AD; use backend='torch'",
)


def in_a_transform() -> Mapping[str, str | None] | None:
    """``refusals`` for :func:`choose`: of every back end with kernels inside torch.func's transforms and forward AD."""
    return _NO_RULES if _library.transformed() else None


def _choose(
    room: str,
    requested: str | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
    overrides: Mapping[str, str | None],
    facts: Mapping[str, Any],
) -> str:
    check_environment()
    device = torch.device(device)
    source = "backend="
    if requested is None or requested == "auto":
        requested, source = os.environ.get("FASTDL_BACKEND", "auto") or "auto", "FASTDL_BACKEND="
    if requested != "auto":
        if requested not in BACKENDS:
            raise BackendError(f"{source}{requested!r} is no back end; expected auto or one of {', '.join(BACKENDS)}")
        reason = _refusal(room, requested, device, dtype, overrides, facts)
        if reason is not None:
            raise BackendError(f"{room}: {source}{requested!r} cannot run this call: {reason}")
        return requested
    for candidate in _AUTOMATIC.get(device.type, ("torch",)):
        if _refusal(room, candidate, device, dtype, overrides, facts) is None:
            return candidate
    reason = _refusal(room, "torch", device, dtype, overrides, facts)
    raise BackendError(f"{room}: no back end can run this call: torch: {reason}")


@dataclass
class Explanation:
    """What :func:`explain` found. ``choice``: None when nothing can run; ``refusals``: back end -> reason, or None."""

    room: str
    choice: str | None
    refusals: dict[str, str | None] = field(default_factory=dict)
    error: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.room}: {self.choice or 'nothing'} runs"]
        lines += [f"  {name:7} {'ok' if reason is None else 'no: ' + reason}" for name, reason in self.refusals.items()]
        if self.error:
            lines.append(f"  {self.error}")
        return "\n".join(lines)


def _default_facts(*args: Any, **kwargs: Any) -> dict[str, Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return {"device": value.device, "dtype": value.dtype}
    raise ValueError("explain() needs a tensor among the op's arguments, e.g. explain('layer_norm', x)")


def explain(op: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Print which back end runs ``fastdl.ops.<op>(*args, **kwargs)`` and why the others do not; return the same.

    >>> import fastdl, torch
    >>> fastdl.explain("quant_matmul", torch.ones(1, 32)).choice   # doctest: +SKIP
    'cpu'
    """
    if op not in _rooms:
        raise ValueError(f"no room named {op!r}; there are {', '.join(sorted(_rooms)) or 'none'}")
    facts = dict((_rooms[op].facts or _default_facts)(*args, **kwargs))
    device, dtype = torch.device(facts.pop("device")), facts.pop("dtype", None)
    refusals = {name: _refusal(op, name, device, dtype, {}, facts) for name in BACKENDS}
    try:
        choice, error = choose(op, backend, device=device, dtype=dtype, **facts), None
    except BackendError as failure:
        choice, error = None, str(failure)
    explanation = Explanation(op, choice, refusals, error)
    print(explanation, file=sys.stdout)
    return explanation
