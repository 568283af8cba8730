"""What tools/triton_tune.py found on GPUs: architecture -> (kernel, block) -> (rows, num_warps, num_stages, programs,
keys).

Written by that tool, on the GPU named beside each entry's architecture; entries go before the table in configs.py.
Nothing has been tuned yet.
"""

from __future__ import annotations

TUNED: dict[str, dict[tuple[str, int], tuple[int, int, int, int, int]]] = {}
