"""Peak memory of additive attention, forward and backward, in a process of its own.

    python -m bench.additive_memory fastdl|eager BATCH QUERIES KEYS HIDDEN THREADS     JSON on stdout

As bench/recurrent_memory.py: a small call first, then the system's peak is reset, inputs are made and two steps run.
What is counted has inputs, outputs and gradients in it.

Test: tests/test_bench_attention.py
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from bench.recurrent_memory import bytes_of, resident


def steps(side: str, shape: tuple[int, int, int, int], count: int) -> None:
    import torch

    from bench.plain import plain_additive_attention
    from fastdl import ops

    batch, queries, keys, hidden = shape
    sizes = ((batch, queries, hidden), (batch, keys, hidden), (batch, keys, hidden), (hidden,))
    leaves = [torch.randn(size).requires_grad_() for size in sizes]
    function = ops.additive_attention if side == "fastdl" else plain_additive_attention
    for _ in range(count):
        y = function(*leaves)
        torch.autograd.grad(y, leaves, torch.ones_like(y))


def main(side: str, *numbers: str) -> None:
    import torch

    *shape, threads = map(int, numbers)
    torch.set_num_threads(threads)
    steps(side, (2, 3, 4, 16), 2)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    steps(side, tuple(shape), 2)
    print(json.dumps({"bytes": resident("VmHWM") - before}))


def peak(side: str, shape: tuple[int, int, int, int], threads: int) -> int:
    """Bytes, from a process of its own."""
    return bytes_of("bench.additive_memory", side, *shape, threads)


if __name__ == "__main__":
    main(*sys.argv[1:])
