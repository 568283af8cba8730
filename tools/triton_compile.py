"""Compiles every Triton kernel, with every configuration that kernels/configs.py can pick, to a cubin for every
architecture. Needs no GPU.

    python tools/triton_compile.py                               everything; make triton-compile
    python tools/triton_compile.py --arch 80 90 --room norm --kernel norm_backward

Rooms are the modules of kernels/ that have ``compile_cases(cc)``. One line per kernel and architecture with registers a
thread, bytes of stack a thread (spills) and bytes of shared memory; exit status 1 when a kernel does not compile.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastdl.kernels
from fastdl.kernels.configs import ARCHITECTURES, kernels


def rooms() -> list[str]:
    """Modules of kernels/ that say what to compile."""
    names = [module.name for module in pkgutil.iter_modules(fastdl.kernels.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"fastdl.kernels.{name}"), "compile_cases")]


def cases(room: str, cc: int) -> list:
    return list(importlib.import_module(f"fastdl.kernels.{room}").compile_cases(cc))


def resources(cubin: bytes) -> str:
    """Registers, stack and shared memory, from cuobjdump where Triton or the CUDA toolkit has one."""
    beside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(beside) if beside.exists() else shutil.which("cuobjdump")
    if not tool:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", shown))
    return f"{found['REG']:>4} registers {found['STACK']:>5} stack" if found else ""


def compile_case(room: str, index: int, cc: int) -> tuple[bool, str]:
    """(True, line) for a case of a room; (False, reason) when it does not compile."""
    case = cases(room, cc)[index]
    start = time.perf_counter()
    # As at a launch with aligned tensors and widths that divide by 16, where loads become vectors.
    wide = [i for i, kind in enumerate(case.signature.values()) if kind.startswith(("*", "i"))]
    attributes = {(i,): [["tt.divisibility", 16]] for i in wide}
    try:
        source = ASTSource(case.kernel, case.signature, case.constexprs, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=case.options)
    except Exception as error:  # whatever a compiler of many parts raises is what this tool reports
        return False, f"{case.name} sm_{cc}: {type(error).__name__}: {error}"
    warps, shared = case.options["num_warps"], compiled.metadata.shared
    figures = f"{warps:>3} warps {resources(compiled.asm['cubin'])} {shared:>6} shared"
    return True, f"{case.name:32} sm_{cc:<4} {figures} {time.perf_counter() - start:6.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, e.g. 80 90")
    parser.add_argument("--room", nargs="+", default=rooms(), help="modules of kernels/")
    parser.add_argument("--kernel", nargs="+", help="kernels or cases, e.g. norm_forward or 'norm_forward[1024]'")
    parser.add_argument("--ends", action="store_true", help="only the narrowest and the widest tile of a kernel")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    args = parser.parse_args()

    def chosen() -> Iterator[tuple[str, int, int]]:
        for room in args.room:
            for cc in args.arch:
                found = cases(room, cc)
                names = [case.name.split("[")[0] for case in found]
                for index, case in enumerate(found):
                    end = names[index] not in names[:index] or names[index] not in names[index + 1 :]
                    if (end or not args.ends) and (not args.kernel or {case.name, names[index]} & set(args.kernel)):
                        yield room, index, cc

    known = {case.name.split("[")[0] for room in rooms() for cc in ARCHITECTURES for case in cases(room, cc)}
    if known != set(kernels()):
        parser.error(f"not both in kernels/configs.py and in a room's compile_cases: {sorted(known ^ set(kernels()))}")
    start, work, failures = time.perf_counter(), list(chosen()), 0
    if not work:
        parser.error("nothing to compile: no kernel has this name")
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(compile_case, *item) for item in work]
        for (room, index, cc), future in zip(work, futures, strict=True):
            try:
                done, line = future.result()
            except BrokenProcessPool:  # LLVM aborts; nothing after that runs
                done, line = False, f"{cases(room, cc)[index].name} sm_{cc}: the compiler crashed, here or just before"
            failures += not done
            print(line if done else f"FAILED {line}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{len(work) - failures} compiled, {failures} failed, {seconds:.0f} s with {args.jobs} processes")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
