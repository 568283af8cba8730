"""How far logits are from the exact ones: mean KL divergence over English text, and how often the top token agrees.

    KL = mean over positions of sum_v p(v) (log p(v) - log q(v)),  p exact, q tested, in float64

Test: tests/test_bench.py
"""

from __future__ import annotations

import numpy as np


class IncorrectResult(Exception):
    """A side's answer is not what it should be: nothing is timed."""


def english() -> str:
    """Long English prose that comes with every CPython."""
    from pydoc_data.topics import topics

    return "\n".join(
        topics[name] for name in sorted(topics) if name in ("compound", "exceptions", "execmodel", "import")
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities along the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(exact: np.ndarray, tested: np.ndarray, rows: int = 64) -> dict[str, float]:
    """{"mean_kl", "same_top"} of two float arrays [tokens, vocab]; a NaN gives NaN, which no limit passes."""
    if exact.shape != tested.shape or exact.ndim != 2 or not len(exact):
        raise ValueError(f"expected two arrays of one shape [tokens, vocab], got {exact.shape} and {tested.shape}")
    total, same = 0.0, 0
    for at in range(0, len(exact), rows):  # in pieces: float64 of the whole would take gigabytes
        p, q = log_softmax(exact[at : at + rows]), log_softmax(tested[at : at + rows])
        total += float((np.exp(p) * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return {"mean_kl": float(f"{total / len(exact):.4g}"), "same_top": round(same / len(exact), 4)}


def relative_error(exact: np.ndarray, tested: np.ndarray) -> float:
    """Norm of the difference over the norm of the exact answer, in float64."""
    exact = exact.astype(np.float64)
    return float(np.linalg.norm(tested.astype(np.float64) - exact) / np.linalg.norm(exact))
