"""Options, fixtures and the results file of the benchmarks."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import pytest

from bench import gpu, hardware, limits, results
from bench.peers import MissingPeer


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdl benchmarks")
    group.addoption("--rounds", type=int, default=5, help="turns that every side gets (default 5)")
    group.addoption("--threads", type=int, default=hardware.cores(), help="threads (default: all cores)")
    group.addoption("--bench-model", default=None, help="GGUF file (default: the demo model)")
    group.addoption("--results", type=Path, default=results.RESULTS, help="folder for the results files")
    group.addoption("--no-save", action="store_true", help="measure, print, write no results file")


def pytest_collect_file(file_path: Path, parent: pytest.Collector):
    """`pytest bench` finds bench_*.py; the tests' own run does not."""
    named = parent.session.isinitpath(file_path)  # pytest itself collects what the command line names
    if not named and file_path.parent == Path(__file__).parent and file_path.match("bench_*.py"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


class Recorder:
    """Collects the figures of one run and writes them at its end."""

    def __init__(self, config: pytest.Config):
        self.machine = hardware.describe()
        self.threads = config.getoption("--threads")
        self.records: dict[str, dict[str, dict]] = {}
        self.gpu_records: dict[str, dict[str, dict]] = {}
        self.peers: dict[str, str] = {}
        self._limits: dict | None = None
        self._gpu_limits: dict | None = None

    @property
    def limits(self) -> dict[str, dict[str, float]]:
        """Limits of this machine, measured at the first use in this run."""
        if self._limits is None:
            self._limits = limits.measure(self.threads)
        return self._limits

    @property
    def gpu_limits(self) -> dict[str, float]:
        """Limits of the GPU, measured at the first use in this run."""
        if self._gpu_limits is None:
            self._gpu_limits = gpu.measure()
        return self._gpu_limits

    def add_gpu(self, bench: str, key: str, record: dict) -> None:
        """The same as `add` for a figure of the GPU, which goes to a file named by the GPU."""
        _ = self.gpu_limits
        self.gpu_records.setdefault(bench, {})[key] = record

    def sections(self) -> list[tuple[dict, str, dict[str, dict], dict | None]]:
        """What was measured: (hardware, bench, its records, limits)."""
        found = [(self.machine, bench, records, self._limits) for bench, records in self.records.items()]
        machine = hardware.describe_gpu() if self.gpu_records else {}
        limit = {"gpu": self._gpu_limits}
        return found + [(machine, bench, records, limit) for bench, records in self.gpu_records.items()]

    def add(self, bench: str, key: str, record: dict) -> None:
        """bench: 'llm'; key: 'avx2/decode'; record: figures that JSON can hold. Limits of the run go with it."""
        _ = self.limits
        self.records.setdefault(bench, {})[key] = record

    def save(self, folder: Path) -> list[Path]:
        now = datetime.datetime.now(datetime.timezone.utc)
        run = {
            "when": now.isoformat(timespec="seconds"),
            "commit": commit(),
            "threads": self.threads,
            "versions": hardware.versions(),
            "peers": self.peers,
        }
        written = []
        for machine, bench, records, limit in self.sections():
            path = results.path_for(folder, machine, bench)
            results.save(path, machine, now.strftime("%Y%m%dT%H%M%SZ"), run | {"limits": limit}, records)
            written.append(path)
        return written


def commit() -> str:
    """Commit of the source tree, '+' when files differ from it; 'unknown' outside a repository."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


RECORDER = pytest.StashKey[Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDER] = Recorder(config)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A peer that is not there skips the benchmark, by name."""
    try:
        return (yield)
    except MissingPeer as missing:
        pytest.skip(str(missing))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    try:
        return (yield)
    except MissingPeer as missing:
        pytest.skip(str(missing))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    recorder = config.stash[RECORDER]
    if not recorder.records and not recorder.gpu_records:
        return
    from bench import report

    for machine, bench, records, _ in recorder.sections():
        terminalreporter.section(f"{bench} on {hardware.slug(machine)}")
        for line in report.lines(bench, records):
            terminalreporter.write_line(line)
    if not config.getoption("--no-save"):
        for path in recorder.save(config.getoption("--results")):
            terminalreporter.write_line(f"written: {path}")
        terminalreporter.write_line("tables and plots: python -m bench.report --plots")


@pytest.fixture(scope="session")
def recorder(request) -> Recorder:
    return request.config.stash[RECORDER]


@pytest.fixture(scope="session")
def threads(request) -> int:
    return request.config.getoption("--threads")


@pytest.fixture(scope="session")
def rounds(request) -> int:
    return request.config.getoption("--rounds")
