"""One measurement of fastdl.llm in a process of its own, so that levels and peaks of memory do not mix.

    python -m bench.llm_worker ids MODEL COUNT OUT.npy          token ids of English text, and the text as OUT.txt
    python -m bench.llm_worker logits MODEL IDS.npy THREADS ACTIVATION BACKEND STEPS OUT.npy
                     STEPS 0: as a prompt; n: the first n tokens one at a time, as when generating
    python -m bench.llm_worker memory MODEL PROMPT.txt THREADS NEW             JSON on stdout
    python -m bench.llm_worker level                                          the CPU level in use

FASTDL_ISA in the environment caps the level.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch


def peak_bytes() -> int:
    """The most memory that this process has held at once (VmHWM)."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


AFTER_TORCH = peak_bytes()  # before fastdl is imported


def ids(model: str, count: str, out: str) -> None:
    from bench.accuracy import english
    from fastdl import llm

    tokenizer = llm.load(model).tokenizer
    found = tokenizer.encode(english(), add_special=False)[: int(count)]
    np.save(out, np.asarray(found, dtype=np.int64))
    Path(out).with_suffix(".txt").write_text(tokenizer.decode(found), encoding="utf-8")


def logits(model: str, ids_path: str, threads: str, activation: str, backend: str, steps: str, out: str) -> None:
    from fastdl import llm

    lm = llm.load(model, backend=backend, activation=activation, threads=int(threads))
    ids = np.load(ids_path).tolist()
    found = one_at_a_time(lm, ids[: int(steps)]) if int(steps) else lm.logits(ids)
    np.save(out, np.asarray(found, dtype=np.float32))


def one_at_a_time(lm, ids: list[int]) -> torch.Tensor:
    """Logits [len(ids), vocab] by the path that generation takes: kernels for one row, and a growing cache."""
    from fastdl.llm.cache import KVCache

    cache = KVCache(lm.config, lm.context)
    with torch.inference_mode():
        return torch.cat([lm.head(lm.hidden([token], cache)) for token in ids])


def memory(model: str, prompt_path: str, threads: str, new: str) -> None:
    """`fastdl generate` on a prompt: peak of the process, less the peak of `import torch`."""
    from fastdl.cli import main

    shown, statistics = io.StringIO(), io.StringIO()
    prompt = Path(prompt_path).read_text(encoding="utf-8")
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(statistics):
        status = main(["generate", "-m", model, "-n", new, "-t", threads, prompt])
    counts = re.findall(r"(prompt|decode) (\d+) tokens", statistics.getvalue())
    if status or len(counts) != 2:
        sys.exit(f"fastdl generate ended with {status}: {statistics.getvalue()}")
    found = {f"{name}_tokens": int(count) for name, count in counts}
    print(json.dumps({"import_torch_bytes": AFTER_TORCH, "peak_bytes": peak_bytes(), **found}))


def level() -> None:
    from fastdl import backend

    print(backend.cpu_level())


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    {"ids": ids, "logits": logits, "memory": memory, "level": level}[sys.argv[1]](*sys.argv[2:])
