"""From logits to the next token: greedy, or drawn after temperature, top-k, top-p, min-p and a repeat penalty.

The order is llama.cpp's: repeat penalty, top-k, top-p, min-p, temperature, draw. (Hugging Face applies the temperature
first; at temperature 1 the two agree.) Each step keeps at least one token. Same seed, same logits: same tokens,
whatever the threads.
Sources: Fan et al. (top-k, 2018), Holtzman et al. (top-p, 2020), Nguyen et al. (min-p, 2024), Keskar et al. (repeat
    penalty, 2019).
Test: pytest tests/test_sampling.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

FIRST_CANDIDATES = 256  # top-p and min-p look at these first; a full sort of 49,152 logits takes some 3 ms


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; checked when made.

    temperature     0 takes the largest logit (greedy), 1 draws from the model's own distribution
    top_k           keep the k largest logits; 0 keeps all
    top_p           keep the fewest tokens whose probability sums to at least top_p; 1 keeps all
    min_p           keep tokens with at least min_p times the largest probability; 0 keeps all
    repeat_penalty  divides positive and multiplies negative logits of recent tokens; 1 does nothing
    repeat_last     how many recent tokens count, prompt included; -1 for all
    seed            of the draw; None for a new one each time

    >>> Sampling(temperature=0.7, top_p=0.9).greedy
    False
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, low, high, expected in (
            ("temperature", float, 0.0, math.inf, "a finite number >= 0"),
            ("top_k", int, 0, math.inf, "an integer >= 0"),
            ("top_p", float, 0.0, 1.0, "a number from 0 to 1"),
            ("min_p", float, 0.0, 1.0, "a number from 0 to 1"),
            ("repeat_penalty", float, 0.0, math.inf, "a finite number > 0"),
            ("repeat_last", int, -1, math.inf, "an integer >= -1"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
                raise TypeError(f"{name}: expected {expected}, got {value!r}")
            if not low <= value <= high or value == math.inf or (name == "repeat_penalty" and value == 0):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        if self.seed is not None:
            if isinstance(self.seed, bool) or not isinstance(self.seed, int):
                raise TypeError(f"seed: expected an integer or None, got {self.seed!r}")
            if not 0 <= self.seed < 1 << 63:
                raise ValueError(f"seed: expected 0 <= seed < 2**63, got {self.seed}")

    @property
    def greedy(self) -> bool:
        """True when the largest logit is taken (after the repeat penalty)."""
        return self.temperature == 0 or self.top_k == 1


SAMPLING_NAMES = tuple(field.name for field in fields(Sampling))


class Sampler:
    """Chooses tokens one after another; holds the random generator of one generation.

    >>> import torch
    >>> Sampler(Sampling(temperature=1.0, top_k=2, seed=0)).choose(torch.tensor([0.0, 5.0, -1.0]), [])
    1
    """

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: Tensor, recent: Sequence[int]) -> int:
        """The next id. logits float32 [vocab], not changed; recent: all ids so far, the last `repeat_last` count."""
        s = self.sampling
        if s.repeat_penalty != 1.0:
            logits = penalize(logits, recent, s.repeat_penalty, s.repeat_last)
        if s.greedy:
            return int(logits.argmax())
        values, ids = candidates(logits, s.top_k, s.top_p, s.min_p)
        # float64: after a division by a tiny temperature the largest is still exactly 0
        p = ((values.double() - values[0].double()) / s.temperature).exp_()
        return int(ids[torch.multinomial(p, 1, generator=self._generator)])


def penalize(logits: Tensor, recent: Sequence[int], penalty: float, last: int = -1) -> Tensor:
    """Logits with those of the `last` recent ids (-1: all) divided by `penalty` if positive, multiplied if negative;
    once each."""
    window = recent if last < 0 else recent[max(len(recent) - last, 0) :]
    if not window:
        return logits
    ids = torch.tensor(sorted(set(window)), dtype=torch.int64)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def candidates(logits: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """(logits, ids) that top-k, top-p and min-p leave, in falling order; at least one."""
    vocab = logits.shape[0]
    if top_k == 0 and top_p >= 1.0 and min_p == 0.0:
        best = logits.argmax()  # first, because Sampler.choose subtracts it; the rest needs no order
        ids = torch.arange(vocab)
        ids[0], ids[best] = best, ids[0].clone()
        return logits[ids], ids
    limit = min(top_k or vocab, vocab)
    keep = min(limit, FIRST_CANDIDATES)
    while True:
        values, ids = logits.topk(keep)
        count = _kept(logits, values, limit, top_p, min_p)
        if count < keep or keep == limit:
            return values[:count], ids[:count]
        keep = limit


def _kept(logits: Tensor, values: Tensor, limit: int, top_p: float, min_p: float) -> int:
    """How many of the leading `values` top-p and then min-p keep."""
    count = values.shape[0]
    if top_p < 1.0:
        # Probabilities among the tokens that top-k keeps.
        total = logits.logsumexp(0) if limit == logits.shape[0] else logits.topk(limit).values.logsumexp(0)
        before = (values - total).exp().cumsum(0)
        count = min(count, int((before < top_p).sum()) + 1)
    if min_p > 0.0:
        # p_i / p_max, the same before and after top-p's renormalization
        count = min(count, int(((values - values[0]).exp() >= min_p).sum()))
    return max(count, 1)
