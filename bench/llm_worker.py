"""One measurement of fastdl.llm in a process of its own, so that levels and peaks of memory do not mix.

    python -m bench.llm_worker ids MODEL COUNT OUT.npy                        token ids of English text
    python -m bench.llm_worker logits MODEL IDS.npy THREADS ACTIVATION BACKEND STEPS OUT.npy
                     STEPS 0: as a prompt; n: the first n tokens one at a time, as when generating
    python -m bench.llm_worker memory MODEL IDS.npy THREADS NEW               JSON on stdout
    python -m bench.llm_worker level                                          the CPU level in use

FASTDL_ISA in the environment caps the level.
"""

from __future__ import annotations

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

    found = llm.load(model).tokenizer.encode(english(), add_special=False)[: int(count)]
    np.save(out, np.asarray(found, dtype=np.int64))


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


def memory(model: str, ids_path: str, threads: str, new: str) -> None:
    """Load, take the prompt in, generate: peak of that, less the peak of `import torch`."""
    from fastdl import llm

    lm = llm.load(model, threads=int(threads))
    text = lm.generate(np.load(ids_path).tolist(), max_new_tokens=int(new), temperature=0.0)
    found = {"prompt_tokens": text.stats.prompt_tokens, "new_tokens": text.stats.new_tokens}
    print(json.dumps({"import_torch_bytes": AFTER_TORCH, "peak_bytes": peak_bytes(), **found}))


def level() -> None:
    from fastdl import backend

    print(backend.cpu_level())


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    {"ids": ids, "logits": logits, "memory": memory, "level": level}[sys.argv[1]](*sys.argv[2:])
