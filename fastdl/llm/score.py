"""Perplexity: a text in windows that overlap by half, logits a few rows at a time.

Test: pytest tests/test_llm.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .cache import KVCache

if TYPE_CHECKING:
    from .model import LM

CHUNK = 256  # tokens through the layers at once
HEAD_CHUNK = 64  # rows of logits at once: 12 MB at 49,152 words


def perplexity(lm: LM, text: str, *, window: int | None, progress: bool) -> float:
    """See LM.perplexity."""
    ids = lm.tokenizer.encode(text)
    bos = [lm.tokenizer.bos_id] if lm.tokenizer.add_bos else []
    window = min(lm.context, 2048) if window is None else window
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window: expected an integer or None, got {window!r}")
    if not len(bos) + 2 <= window <= lm.context:
        raise ValueError(f"window: expected {len(bos) + 2} to {lm.context} tokens, got {window}")
    if len(ids) + len(bos) < 2:
        raise ValueError(f"text: expected at least 2 tokens, got {len(ids)}")
    size = window - len(bos)
    first = scored = 0 if bos else 1  # without BOS nothing predicts the first token
    total, start = 0.0, 0
    with torch.inference_mode(), lm.thread_limit(), _bar(len(ids), progress) as advance:
        advance(scored)
        while scored < len(ids):
            part = ids[start : start + size]
            total += _nll(lm, bos + part, scored - start + len(bos))
            advance(start + len(part) - scored)
            scored = start + len(part)
            start += size - size // 2
    return math.exp(min(total / (len(ids) - first), 700.0))


def _nll(lm: LM, ids: list[int], first: int) -> float:
    """Negative log-likelihood of ids[first:], each given all before it."""
    cache = KVCache(lm.config, lm.context)
    lm.reserve(cache, len(ids))
    total = 0.0
    for start in range(0, len(ids) - 1, CHUNK):
        chunk = ids[start : min(start + CHUNK, len(ids) - 1)]
        x = lm.hidden(chunk, cache)
        for row in range(max(first - 1 - start, 0), len(chunk), HEAD_CHUNK):
            logits = lm.head(x[row : row + HEAD_CHUNK])
            wanted = torch.tensor(ids[start + row + 1 : start + row + 1 + logits.shape[0]])
            total -= float(logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum())
    return total


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], object]]:
    if not show:
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=" tokens", file=sys.stderr, leave=False) as bar:
        yield bar.update
