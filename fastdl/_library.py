"""The op library and the hash that ties the compiled implementations to these schemas.

Schemas are Python's: each ``fastdl/ops/<op>.py`` passes a string literal to :func:`define`; C++ registers
implementations only. ``tools/schema_hash.py`` reads the same literals at build time.
"""

from __future__ import annotations

import hashlib

import torch

LIB = torch.library.Library("fastdl", "DEF")
_schemas: list[str] = []


def define(schema: str) -> None:
    """Define ``fastdl::<schema>``, e.g. ``define("double(Tensor x) -> Tensor")``. Takes one string literal."""
    LIB.define(schema)
    _schemas.append(" ".join(schema.split()))


def schemas() -> list[str]:
    """All schemas defined so far, sorted."""
    return sorted(_schemas)


def schema_hash() -> str:
    """SHA-256 of all schemas; the same rule as tools/schema_hash.py."""
    return hashlib.sha256("\n".join(schemas()).encode()).hexdigest()
