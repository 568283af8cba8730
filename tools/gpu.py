"""All that a machine with an NVIDIA GPU can prove: build for it, GPU tests, compute-sanitizer, benchmarks. `make gpu`.

    python tools/gpu.py                  every room, under 8 minutes
    python tools/gpu.py --room norm      one room; make gpu ROOM=norm
    python tools/gpu.py --check          only look whether everything is there

Installs nothing and needs no network: it works with this interpreter's packages, a CUDA build of torch (2.10 or later)
among them, and says what is missing. A step that fails or takes too long does not stop the later ones; its output is in
build/gpu/<step>.log. Exit status: 0 all steps passed, 1 some failed, 2 something is missing.

Test: pytest tests/test_gpu_script.py
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

ANOTHER = "name an interpreter that has a CUDA build: make gpu PYTHON=/path/to/python"
TORCH_MIN = (2, 10)
# What would make a step run on something else than the GPU and the library that was just built.
UNWANTED = ("FASTDL_BACKEND", "FASTDL_ISA", "FASTDL_LIBRARY", "FASTDL_SANITIZE", "TRITON_INTERPRET")
MODULES = {  # import name -> what it is for and what to type
    "triton": "the Triton kernels: pip install triton",
    "numpy": "fastdl: pip install numpy",
    "pytest": "the tests: pip install pytest",
    "pytest_benchmark": "the benchmarks: pip install pytest-benchmark",
    "pybind11": "the build: pip install pybind11",
    "setuptools": "the build: pip install 'setuptools>=77'",
}
TOOLS = {"cmake": "the build: pip install cmake", "ninja": "the build: pip install ninja"}


# ---- What is there ---------------------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """Beside this interpreter, on PATH, or in the CUDA toolkit ($CUDA_HOME, else /usr/local/cuda)."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    places = (Path(sys.executable).parent / name, toolkit / "bin" / name, toolkit / "compute-sanitizer" / name)
    return shutil.which(name) or next((str(path) for path in places if path.is_file()), None)


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def torch_problem() -> str | None:
    """What is wrong with this interpreter's torch, or that there is no GPU; None when all is well."""
    if not has_driver():
        return "GPU: there is no NVIDIA driver on this machine; without a GPU everything else runs by: make test"
    if importlib.util.find_spec("torch") is None:
        return f"torch: not installed for {sys.executable}; {ANOTHER}"
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_MIN:
        return f"torch: {torch.__version__} is too old, expected 2.10 or later"
    if torch.version.cuda is None:
        return f"torch: {torch.__version__} is a build without CUDA; {ANOTHER}"
    if not torch.cuda.is_available():
        return "GPU: torch finds no NVIDIA GPU here; nvidia-smi shows what the driver sees"
    return None


def problems() -> list[str]:
    """All that is missing, a line each: what, what for, what to do."""
    found = [text] if (text := torch_problem()) else []
    if find_tool("nvcc") is None:
        found.append(
            "nvcc: not on PATH, in $CUDA_HOME or /usr/local/cuda; the build needs the CUDA toolkit, 12.8 or later"
        )
    missing = [(name, why) for name, why in MODULES.items() if importlib.util.find_spec(name) is None]
    missing += [(name, why) for name, why in TOOLS.items() if find_tool(name) is None]
    return found + [f"{name}: not installed for {sys.executable}; for {why}" for name, why in missing]


def architecture(capability: tuple[int, int]) -> str:
    """(9, 0) -> '90a': the name for FASTDL_CUDA_ARCHS."""
    return "90a" if capability == (9, 0) else f"{capability[0]}{capability[1]}"


def gpu_rooms() -> list[str]:
    """Rooms that have kernels for a GPU."""
    from fastdl.ops import ROOMS

    return [room for room, entry in ROOMS.items() if {"cuda", "triton"} & set(entry.backends)]


# ---- The steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command. limit_s: after so many seconds it is interrupted and has failed. skip: why it cannot run here."""

    name: str
    command: Sequence[str]
    limit_s: int = 180
    environment: Mapping[str, str] = field(default_factory=dict)
    skip: str | None = None


def steps(room: str | None, arch: str) -> list[Step]:
    """Everything for one room, or for all that have GPU kernels."""
    rooms = [room] if room else gpu_rooms()
    python = sys.executable
    stems = [*rooms, *(["recurrent"] if {"lstm", "gru", "rnn"} & set(rooms) else [])]
    tests = sorted({str(p.relative_to(ROOT)) for s in stems for p in (ROOT / "tests").glob(f"test_{s}*.py")})
    only = ["--room", room] if room else []
    if not room:
        tests.append("tests/test_build.py::test_cuda_smoke_runs")
    benchmarks = [f"bench/bench_{r}.py" for r in rooms if (ROOT / f"bench/bench_{r}.py").is_file()]
    build = {"FASTDL_CUDA": "on", "FASTDL_CUDA_ARCHS": arch}
    found = [
        Step("build", [python, "-W", "ignore", "setup.py", "--quiet", "build_ext", "--inplace"], 240, build),
        Step("tests", [python, "-m", "pytest", "-q", "--lane", "gpu", *only, *tests], 240),
    ]
    sanitizer = find_tool("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        # Every tensor in memory of its own, or an access beyond its end would land in torch's pool unseen.
        found.append(
            Step(
                tool,
                [sanitizer or "", "--tool", tool, "--error-exitcode", "9", python, "tools/gpu_small.py", *only],
                120,
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                None if sanitizer else "compute-sanitizer is neither on PATH nor in the CUDA toolkit",
            )
        )
    found.append(Step("benchmarks", [python, "-m", "pytest", "-q", "-k", "gpu", *benchmarks], 240))
    return [*found, Step("tables", [python, "-m", "bench.report", "--tables"], 60)]


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str  # "ok", "skipped: ...", "FAILED: ..."
    seconds: float

    @property
    def failed(self) -> bool:
        return self.result.startswith("FAILED")


def run_step(step: Step, logs: Path) -> Outcome:
    """Run the command; its output goes to the terminal and to <logs>/<name>.log."""
    if step.skip:
        return Outcome(step.name, f"skipped: {step.skip}", 0.0)
    logs.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key not in UNWANTED}
    # unbuffered: the log has everything, whatever happens to the process
    environment |= {"PYTHONUNBUFFERED": "1", **step.environment}
    with open(logs / f"{step.name}.log", "wb") as log:
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(step.name, f"FAILED: {error}", time.monotonic() - start)
        late = not follow(process, logs / log.name, start + step.limit_s)
    if late:
        return Outcome(step.name, f"FAILED: took more than {step.limit_s} s", time.monotonic() - start)
    ended = process.returncode
    return Outcome(step.name, "ok" if ended == 0 else f"FAILED: ended with {ended}", time.monotonic() - start)


def follow(process: subprocess.Popen, log: Path, deadline: float, grace_s: float = 15.0) -> bool:
    """Copy the log to the terminal until the process ends; False when the deadline came first. The process then gets an
    interrupt, at which pytest still writes its results, and is killed when it does not end."""
    signals = [(deadline, signal.SIGINT), (deadline + grace_s, signal.SIGKILL)]
    with open(log, "rb") as output:
        while True:
            ended = process.poll() is not None
            sys.stdout.write(output.read().decode(errors="replace"))
            sys.stdout.flush()
            if ended:
                return len(signals) == 2
            if signals and time.monotonic() > signals[0][0]:
                os.killpg(process.pid, signals.pop(0)[1])
            time.sleep(0.1)


def run(chosen: Sequence[Step], logs: Path = LOGS) -> int:
    """All steps, each whatever became of those before it, and the summary; 0 or 1."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: the steps would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes = []
    for number, step in enumerate(chosen, 1):
        print(f"\n== {number} of {len(chosen)}: {step.name}: {' '.join(step.command)}", flush=True)
        outcome = run_step(step, logs)
        print(f"== {step.name}: {outcome.result}, {outcome.seconds:.1f} s", flush=True)
        outcomes.append(outcome)
    print("\n" + summary(outcomes, logs))
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def summary(outcomes: Sequence[Outcome], logs: Path) -> str:
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{outcome.name:{width}}  {outcome.seconds:7.1f} s  {outcome.result}" for outcome in outcomes]
    failed = [outcome.name for outcome in outcomes if outcome.failed]
    total = sum(outcome.seconds for outcome in outcomes)
    end = f"{len(failed)} of {len(outcomes)} steps failed: {', '.join(failed)}" if failed else "no step failed"
    return "\n".join([*lines, f"make gpu: {end}; {total:.0f} s; logs in {logs}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--room", help="only this room")
    parser.add_argument("--check", action="store_true", help="only look whether everything is there")
    options = parser.parse_args(arguments)
    if found := problems():
        print("make gpu cannot run here, and installs nothing. Missing:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in found), file=sys.stderr)
        return 2
    if options.room and options.room not in gpu_rooms():
        print(
            f"ROOM={options.room}: no room of that name has GPU kernels; expected one of: {', '.join(gpu_rooms())}",
            file=sys.stderr,
        )
        return 2
    import torch

    arch = architecture(torch.cuda.get_device_capability())
    print(f"{torch.cuda.get_device_name()}, sm_{arch}; torch {torch.__version__}, {sys.executable}")
    return 0 if options.check else run(steps(options.room, arch))


if __name__ == "__main__":
    sys.exit(main())
