"""Timing in turn: A B C, A B C, ... so that whatever disturbs the machine disturbs every side.

A ratio is taken within each round and then the median over rounds, so slow drift (heat, neighbours) cancels.
pytest-benchmark drives the rounds: one of its rounds plays every side once.

Test: tests/test_bench.py
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def seconds_per_call(fn: Callable[[], object], calls: int) -> float:
    """Wall seconds of one call, averaged over `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def calls_for(fn: Callable[[], object], target_s: float = 0.03, limit: int = 10_000) -> int:
    """How many calls in a row take about `target_s` seconds; warms up on the way."""
    calls = 1
    while True:
        elapsed = seconds_per_call(fn, calls) * calls
        if elapsed >= target_s / 2 or calls >= limit:
            return max(1, min(limit, round(calls * target_s / max(elapsed, 1e-9))))
        calls *= 4


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int, benchmark=None) -> dict[str, list]:
    """Play every side once per round, `rounds` times -> what each side returned, per round.

    sides      name -> callable that runs once and returns its own figure(s)
    benchmark  pytest-benchmark's fixture; None runs the rounds plainly
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    samples: dict[str, list] = {name: [] for name in sides}

    def one_round() -> None:
        for name, side in sides.items():
            gc.collect()
            samples[name].append(side())

    if benchmark is None:
        for _ in range(rounds):
            one_round()
    else:
        benchmark.pedantic(one_round, rounds=rounds, iterations=1, warmup_rounds=0)
    return samples


def spread(values: list[float]) -> dict:
    """Median with minimum, maximum and the number of rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def paired_ratio(ours: list[float], theirs: list[float]) -> dict:
    """Spread of ours[i] / theirs[i], round by round. Above 1 means ours is larger."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"expected two lists of one length above 0, got {len(ours)} and {len(theirs)}")
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])
