"""One comparison with torch's own ops: both sides checked against float64, then timed in turn, then recorded.

Used by the benchmarks of norms and activations, whose sides are calls that return tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

import fastdl
from bench.accuracy import IncorrectResult, relative_error
from bench.timing import calls_for, paired_ratio, seconds_per_call, spread, take_turns

Side = Callable[[], Sequence[torch.Tensor]]
ALLOWED = {"fp32": 1e-5, "bf16": 1e-2}  # relative error of fastdl, norm over norm
PEER_ALLOWED = 0.1  # torch sums bf16 gradients of weight and bias in bf16: 5 % off with 4096 rows
SETTLE = 0.02  # seconds before a turn, in which the threads of the side before stop waiting for more work
TURNS = 5  # of a round: a turn takes some 30 ms, in which a neighbour's burst may hit one side alone
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def with_gradients(function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], grad: torch.Tensor) -> Side:
    """The call that returns function(*tensors) and its gradients for all of them."""

    def call() -> Sequence[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad)

    return call


def sides_of(
    ours: Callable[..., torch.Tensor | Sequence[torch.Tensor]],
    theirs: Callable[..., torch.Tensor | Sequence[torch.Tensor]],
    tensors: Sequence[torch.Tensor],
    grad: torch.Tensor | None = None,
) -> tuple[dict[str, Side], Sequence[torch.Tensor]]:
    """The sides, with gradients where ``grad`` is given, and the exact answer: theirs in float64."""
    double = [t.double() for t in tensors]
    if grad is None:

        def listed(found: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            return (found,) if isinstance(found, torch.Tensor) else found

        sides = {"fastdl": lambda: listed(ours(*tensors)), "torch": lambda: listed(theirs(*tensors))}
        return sides, listed(theirs(*double))
    sides = {"fastdl": with_gradients(ours, tensors, grad), "torch": with_gradients(theirs, tensors, grad)}
    return sides, with_gradients(theirs, double, grad.double())()


def check(sides: Mapping[str, Side], exact: Mapping[str, Sequence[torch.Tensor]], allowed: Mapping[str, float]) -> dict:
    """The relative error of every side, the largest of its tensors; raises when one is too far from its exact answer.

    Each side starts from the same random numbers: what draws some can be compared.
    """
    errors = {}
    for name, side in sides.items():
        torch.manual_seed(0)
        pairs = zip(exact[name], side(), strict=True)
        errors[name] = max(relative_error(e.detach().numpy(), got.detach().double().numpy()) for e, got in pairs)
        if not errors[name] <= allowed[name]:
            raise IncorrectResult(f"{name}: relative error {errors[name]:.3g} above {allowed[name]}: not timed")
    return errors


def play(sides: Mapping[str, Side], rounds: int, benchmark) -> dict[str, list[float]]:
    """Seconds of a call of every side, in turn. A turn begins when other sides' threads are asleep, with a call that is
    not counted."""
    calls = {name: calls_for(side) for name, side in sides.items()}

    def turn(side: Side, count: int) -> float:
        time.sleep(SETTLE)
        side()
        return seconds_per_call(side, count)

    turns = {name: lambda side=side, n=calls[name]: turn(side, n) for name, side in sides.items()}
    return take_turns(turns, rounds * TURNS, benchmark)


def compare(
    benchmark, recorder, rounds: int, bench: str, facts: Mapping, sides: Mapping[str, Side], exact, moved: int
) -> None:
    """Check, time and record the sides "fastdl" and "torch".

    facts   kind, shape and dtype ("fp32", "bf16"), for the record
    exact   the answer in float64
    moved   bytes that the op must read and write
    """
    allowed = {"fastdl": ALLOWED[facts["dtype"]], "torch": PEER_ALLOWED}
    errors = check(sides, dict.fromkeys(sides, exact), allowed)
    seconds = play(sides, rounds, benchmark)
    level = fastdl.backend.cpu_level()
    read = recorder.limits[str(recorder.threads)]["read_2000MB" if moved > 32e6 else "read_100MB"]
    record = {"level": level, **facts, "missing": [], "ratio": paired_ratio(seconds["torch"], seconds["fastdl"])}
    record["sides"] = {
        name: {
            "seconds": spread(values),
            "relative_error": float(f"{errors[name]:.3g}"),
            "gb_per_s": round(moved / spread(values)["median"] / 1e9, 2),
            "share_of_read_limit": round(moved / spread(values)["median"] / 1e9 / read, 3),
        }
        for name, values in seconds.items()
    }
    size = "x".join(map(str, facts["shape"]))
    recorder.add(bench, f"{level}/{facts['kind']}/{size}/{facts['dtype']}", record)
