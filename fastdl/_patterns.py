"""Names of layers chosen by patterns: what `fastdl.quantize` and `fastdl.accelerate` take."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def select(
    names: list[str],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str],
    argument: str = "include",
) -> set[str]:
    """Names that include takes (None: all) and exclude leaves; a pattern that matches nothing is worth an error.

    argument  what the caller's users call ``include``
    """
    chosen = {}
    for label, patterns in ((argument, include), ("exclude", exclude)):
        if patterns is not None and not isinstance(patterns, Iterable):
            raise TypeError(f"{label}: expected names or patterns (str), got {type(patterns).__name__}")
        patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{label}: expected names or patterns (str), got {type(pattern).__name__}")
            if not any(fnmatchcase(name, pattern) for name in names):
                some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise ValueError(f"{label}: {pattern!r} matches no layer; the layers are {some or 'none'}")
        chosen[label] = {name for name in names for pattern in patterns if fnmatchcase(name, pattern)}
    return (set(names) if include is None else chosen[argument]) - chosen["exclude"]
