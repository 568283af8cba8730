"""The named peers: where they are, how they run, why one is missing. All are optional.

llama.cpp and its fork ik_llama.cpp are found by environment variable, a binary for each instruction level:

    FASTDL_LLAMA_BENCH          llama-bench, the best build for this machine (else the one on PATH)
    FASTDL_LLAMA_BENCH_AVX512   ... built without AMX   (else the best build, where the machine has no AMX)
    FASTDL_LLAMA_BENCH_AVX2     ... built without AVX-512
    FASTDL_IK_LLAMA_BENCH, FASTDL_IK_LLAMA_BENCH_AVX512, FASTDL_IK_LLAMA_BENCH_AVX2   the same for the fork
                                several paths with ":" between: every build is tried, the fastest counts
    FASTDL_LLAMA_PYTHON         an interpreter that has llama-cpp-python (else this one)

Test: tests/test_bench.py
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import hardware

VARIABLES = {"llama.cpp": "FASTDL_LLAMA_BENCH", "ik_llama.cpp": "FASTDL_IK_LLAMA_BENCH"}
# Settings that a user of the peer would try for speed; the harness keeps the fastest of each peer.
SETTINGS = {
    "llama.cpp": {"fa=0": ["-fa", "0"], "fa=1": ["-fa", "1"]},
    "ik_llama.cpp": {"fa=0": ["-fa", "0"], "fa=1": ["-fa", "1"], "fa=1 rtr=1": ["-fa", "1", "-rtr", "1"]},
}


class MissingPeer(Exception):
    """The peer is not there; the message names it and says what would bring it."""


@dataclass(frozen=True)
class LlamaBench:
    """A llama-bench binary of llama.cpp or of its fork."""

    name: str
    binary: str

    def run(self, model: str, *, prompt: int, new: int, threads: int, repeats: int = 1, extra=()) -> dict[str, float]:
        """tokens/s {"prefill": ..., "decode": ...} (0 tokens asked: left out), mean of `repeats`, warmed up."""
        return rates(self._rows(model, prompt, new, threads, repeats, extra))

    def version(self, model: str) -> str:
        """'llama.cpp 0c1e570 (build 1)': commit and build number that the binary reports."""
        row = self._rows(model, 1, 0, 1, 1, ())[0]
        return f"{self.name} {row.get('build_commit', 'unknown')} (build {row.get('build_number', '?')})"

    def _rows(self, model, prompt, new, threads, repeats, extra) -> list[dict]:
        command = [
            self.binary, "-m", str(model), "-p", str(prompt), "-n", str(new), "-t", str(threads), "-r", str(repeats),
            "-o", "json", *extra,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout[done.stdout.index("[") :])


def rates(rows: list[dict]) -> dict[str, float]:
    """llama-bench's JSON rows -> {"prefill": tokens/s, "decode": tokens/s}."""
    found = {}
    for row in rows:
        if row["n_gen"] == 0:
            found["prefill"] = float(row["avg_ts"])
        elif row["n_prompt"] == 0:
            found["decode"] = float(row["avg_ts"])
    return found


def llama_bench(name: str, level: str, flags: list[str] | None = None) -> list[LlamaBench]:
    """The peer's binaries for an instruction level; MissingPeer names the variable that would give one."""
    best = hardware.best_level(hardware.describe()["flags"] if flags is None else flags)
    variable = VARIABLES[name]
    wanted = [variable if level == best else f"{variable}_{level.upper()}"]
    if level == best and level != "amx":
        wanted.append(f"{variable}_{level.upper()}")
    for key in wanted:
        paths = [path for path in os.environ.get(key, "").split(os.pathsep) if path]
        for path in paths:
            if shutil.which(path) is None:
                raise MissingPeer(f"{name}: {key} names {path}, which cannot be run")
        if paths:
            return [LlamaBench(name, path) for path in paths]
    if level == best and name == "llama.cpp" and (path := shutil.which("llama-bench")):
        return [LlamaBench(name, path)]
    raise MissingPeer(f"{name} for level {level}: set {wanted[0]} to a llama-bench binary built for that level")


def llama_logits(model: str, ids: list[int], threads: int) -> np.ndarray:
    """llama.cpp's logits, float32 [len(ids), vocab], through llama-cpp-python."""
    python = os.environ.get("FASTDL_LLAMA_PYTHON")
    if python is None and importlib.util.find_spec("llama_cpp") is None:
        raise MissingPeer(
            "llama.cpp logits: install llama-cpp-python or set FASTDL_LLAMA_PYTHON to an interpreter with it"
        )
    with tempfile.TemporaryDirectory() as folder:
        ids_path, out = Path(folder, "ids.npy"), Path(folder, "logits.npy")
        np.save(ids_path, np.asarray(ids, dtype=np.int32))
        script = Path(__file__).with_name("llama_logits.py")
        command = [python or sys.executable, str(script), str(model), str(ids_path), str(out), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode != 0:
            raise MissingPeer(f"llama.cpp logits: llama-cpp-python failed: {done.stderr.strip()[-300:]}")
        return np.load(out)


def exact_logits(model: str, ids: list[int]) -> np.ndarray:
    """transformers' fp32 answer of the dequantized model, float32 [len(ids), vocab]."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingPeer(f"transformers: {error}") from error
    folder, file = os.path.split(os.path.abspath(model))
    lm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    with torch.inference_mode():
        return lm(torch.tensor([ids])).logits[0].float().numpy()


def torchao_int4(weight, group: int = 32):
    """The weight as torchao's int4 CPU tensor (16- or 32-bit activations); F.linear runs on it."""
    if importlib.util.find_spec("torchao") is None:
        raise MissingPeer("torchao: not installed (pip install --no-deps torchao)")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("torchao.prototype.quantization.int4")
            return module.Int4OpaqueTensor.from_hp(weight, [1, group])
    except (ImportError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise MissingPeer(f"torchao int4 on the CPU: {type(error).__name__}: {str(error)[:200]}") from error
