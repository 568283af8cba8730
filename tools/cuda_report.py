"""Registers, stack, shared memory and spills of every CUDA kernel in a library, for each architecture in it.

    python tools/cuda_report.py                          fastdl/libfastdl_ops.so (`make cuda-report`)
    python tools/cuda_report.py LIBRARY --room norm      kernels whose name begins with norm_
    python tools/cuda_report.py --check                  exit status 1 if a kernel uses its stack (spills, local arrays)

Reads the library with NVIDIA's cuobjdump: the one on PATH, beside nvcc, or in the Python package triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent / "fastdl" / "libfastdl_ops.so"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """name: with template arguments; stack, shared, local: bytes, of a thread, a block, a thread."""

    arch: str
    name: str
    registers: int
    stack: int
    shared: int
    local: int

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local)


def find_cuobjdump() -> str | None:
    """Path of cuobjdump, or None."""
    beside = [Path(nvcc).resolve().parent for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if nvcc]
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        beside.append(Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump")
    return found or next((str(folder / "cuobjdump") for folder in beside if (folder / "cuobjdump").is_file()), None)


def demangled(text: str) -> str:
    """Without the tool c++filt names stay as they are."""
    if not shutil.which("c++filt"):
        return text
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of every architecture in the library. RuntimeError without cuobjdump."""
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump was not found on PATH, beside nvcc or in triton; type: pip install triton")
    shown = subprocess.run([tool, "-res-usage", str(library)], capture_output=True, text=True)
    if shown.returncode:
        raise RuntimeError(f"cuobjdump {library}: {(shown.stderr or shown.stdout).strip()}")
    found, arch, name = [], "", ""
    for line in demangled(shown.stdout).splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif line.startswith(" Function "):
            name = line.removeprefix(" Function ").rstrip(":")
            name = re.sub(r"^void |fastdl::cuda::|\((int|bool)\)", "", name)
            name = re.sub(r"\(.*\)$", "", name)
        elif match := USAGE.search(line):
            found.append(Kernel(arch, name, *(int(value) for value in match.groups())))
    return found


def table(found: list[Kernel]) -> str:
    """One row a kernel and architecture."""
    width = max((len(kernel.name) for kernel in found), default=6)
    lines = [f"{'kernel':{width}}  arch     registers  shared  stack"]
    for k in sorted(found, key=lambda k: (k.name, k.arch)):
        lines.append(f"{k.name:{width}}  {k.arch:7}  {k.registers:9}  {k.shared:6}  {k.stack + k.local:5}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--room", help="only kernels whose name begins with this room's")
    parser.add_argument("--check", action="store_true", help="fail when a kernel uses its stack")
    arguments = parser.parse_args()
    try:
        found = kernels(arguments.library)
    except RuntimeError as error:
        print(f"cuda-report: {error}", file=sys.stderr)
        return 1
    if arguments.room:
        found = [kernel for kernel in found if kernel.name.startswith(f"{arguments.room}_")]
    print(table(found))
    spilled = [kernel for kernel in found if kernel.spills]
    print(f"{len(found)} kernels, {len({k.arch for k in found})} architectures, {len(spilled)} with a stack")
    return 1 if arguments.check and spilled else 0


if __name__ == "__main__":
    sys.exit(main())
