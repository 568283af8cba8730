"""Peak memory of training steps of one recurrent layer, in a process of its own.

    python -m bench.recurrent_memory fastdl|torch lstm|gru|rnn TIME BATCH HIDDEN THREADS     JSON on stdout

The process first runs a small layer, which loads libraries and starts threads. Then the system's peak is reset
(/proc/self/clear_refs), the layer is made, and three steps run, each of them forward and backward. The peak (VmHWM)
less what was resident before counts all: weights, gradients, what forward keeps, working memory of kernels.

Test: tests/test_bench_recurrent.py
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def steps(side: str, room: str, shape: tuple[int, int, int], count: int) -> None:
    import torch

    from bench import recurrent

    layer, x, grad = recurrent.make(room, shape)
    if side == "fastdl":
        layer = recurrent.fastdl_layer(room, layer)
    x.requires_grad_()
    for _ in range(count):
        layer.zero_grad()
        x.grad = None
        y, _ = layer(x)
        torch.autograd.backward(y, grad)


def main(side: str, room: str, time: str, batch: str, hidden: str, threads: str) -> None:
    import torch

    torch.set_num_threads(int(threads))
    steps(side, room, (3, 2, 16), 2)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    steps(side, room, (int(time), int(batch), int(hidden)), STEPS)
    print(json.dumps({"bytes": resident("VmHWM") - before}))


def peak(side: str, room: str, shape: tuple[int, int, int], threads: int) -> int:
    """Bytes, from a process of its own."""
    return bytes_of("bench.recurrent_memory", side, room, *shape, threads)


def bytes_of(module: str, *arguments: object) -> int:
    """What `python -m module arguments...` prints as {"bytes": ...}."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout)["bytes"]


if __name__ == "__main__":
    main(*sys.argv[1:])
