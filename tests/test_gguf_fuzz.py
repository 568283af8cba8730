"""2,130 mutated headers: each is a ModelFileError or a model that works; no crash, no 5 s, no 2 GB (fuzz_gguf.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from demo_model import demo_model_path
from tiny_model import write_tiny_model

MODELS = {
    "llama Q4_1 byte-pair": dict(architecture="llama", quant="Q4_1", tokenizer="gpt2"),
    "qwen2 Q8_0 untied": dict(architecture="qwen2", quant="Q8_0", tied=False),
    "llama sentencepiece": dict(architecture="llama", quant="F16", tokenizer="llama"),
    "llama Q6_K": dict(architecture="llama", quant="Q6_K", width=256, ff=256, layers=1),
}
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="limits need Linux")


def fuzz(model: str, folder: Path, seed: int, count: int, depth: str) -> None:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), *filter(None, sys.path)])}
    command = [sys.executable, str(tests / "fuzz_gguf.py"), model, str(folder), str(seed), str(count), depth]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        kept = tempfile.mkdtemp(prefix="fastdl-fuzz-")
        if (folder / "case.gguf").exists():
            shutil.copy(folder / "case.gguf", kept)
        pytest.fail(
            f"exit status {done.returncode}; the file is in {kept}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    assert "ModelFileError" in done.stdout, done.stdout  # mutations were found out
    assert done.stdout.count("loads") >= 2, done.stdout  # and some did no harm


@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("name", MODELS)
def test_mutated_headers(tmp_path, name, seed):
    fuzz(write_tiny_model(tmp_path / "tiny.gguf", **MODELS[name]), tmp_path, seed, 520, "full")


def test_mutated_header_of_the_demo_model(tmp_path):
    fuzz(demo_model_path(), tmp_path, 1, 50, "header")
