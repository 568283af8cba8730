"""Hash of all op schemas under fastdl/ops/, read from the source text (no import of torch, which the build may lack).

Usage:
    python tools/schema_hash.py                  prints the hash
    python tools/schema_hash.py --list           prints the schemas
    python tools/schema_hash.py --header FILE    writes the C++ header, only if it changes
"""

from __future__ import annotations

import argparse
import ast
import hashlib
from pathlib import Path

OPS = Path(__file__).resolve().parent.parent / "fastdl" / "ops"


def collect(folder: Path = OPS) -> list[str]:
    """Every schema literal that the folder passes to ``define(...)`` or ``Op(...)``, sorted."""
    schemas = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
            if name not in ("define", "Op"):
                continue
            if not (
                len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
            ):
                raise SystemExit(
                    f"{path}:{node.lineno}: {name}() takes one string literal, so that the build can read it"
                )
            schemas.append(" ".join(node.args[0].value.split()))
    return sorted(schemas)


def schema_hash(schemas: list[str]) -> str:
    """The same rule as fastdl._library.schema_hash."""
    return hashlib.sha256("\n".join(sorted(schemas)).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the schemas")
    parser.add_argument("--header", type=Path, help="C++ header to write")
    args = parser.parse_args()
    schemas = collect()
    digest = schema_hash(schemas)
    if args.header:
        text = f'#pragma once\n#define FASTDL_SCHEMA_HASH "{digest}"\n'
        if not args.header.exists() or args.header.read_text() != text:
            args.header.parent.mkdir(parents=True, exist_ok=True)
            args.header.write_text(text)
    else:
        print("\n".join(schemas) if args.list else digest)


if __name__ == "__main__":
    main()
