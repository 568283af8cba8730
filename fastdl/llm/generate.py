"""The generation loop: prompt in chunks, then one token a step; text as it comes, with statistics and reasons.

A `Stream` is the loop, one step for each `next`; a `Generation` is its finished text (a str with details).
Test: pytest tests/test_llm_generate.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sampling import Sampler, Sampling
from .stopping import StopFinder

if TYPE_CHECKING:
    from .model import LM

MAX_LOGPROBS = 100


@dataclass(frozen=True)
class Options:
    """What a generation is asked for, checked when made; see LM.stream for the meaning."""

    max_new_tokens: int | None = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    reuse: bool | None = None

    def __post_init__(self) -> None:
        n = self.max_new_tokens
        if n is not None and (isinstance(n, bool) or not isinstance(n, int)):
            raise TypeError(f"max_new_tokens: expected an integer >= 0 or None, got {n!r}")
        if n is not None and n < 0:
            raise ValueError(f"max_new_tokens: expected an integer >= 0 or None, got {n}")
        if not all(isinstance(stop, str) for stop in self.stop):
            raise TypeError(f"stop: expected strings, got {self.stop!r}")
        if "" in self.stop:
            raise ValueError("stop: an empty string would stop everything")
        k = self.logprobs
        if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
            raise TypeError(f"logprobs: expected an integer or None, got {k!r}")
        if k is not None and not 0 <= k <= MAX_LOGPROBS:
            raise ValueError(f"logprobs: expected 0 to {MAX_LOGPROBS}, got {k}")


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one generated token, of the model's own distribution (before penalty, truncation and
    temperature).

    id, logprob: the chosen token. top: the most probable (id, logprob), in falling order, as many as were asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Stats:
    """Token counts and seconds of one generation. cached_tokens of the prompt came from the KV cache."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens computed a second."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second after the first, which the prompt's last step gives."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else 0.0


class Generation(str):
    """Generated text: a str that also carries `ids`, `stop_reason`, `logprobs` and `stats`.

    stop_reason: "stop_token", "stop_string", "length" (max_new_tokens) or "context" (the context is full).
    ids: the new tokens, without the stop token. logprobs: list of TokenLogprob, or None unless asked for.
    """

    ids: list[int]
    stop_reason: str
    logprobs: list[TokenLogprob] | None
    stats: Stats


class Stream(Iterator[str]):
    """Iterates over pieces of text as they are generated; `ids`, `stats`, `logprobs` grow meanwhile, `stop_reason` is
    set at the end.

    Leaving the loop early is fine; `close()` gives the KV cache back at once.
    """

    def __init__(self, lm: LM, prompt: list[int], options: Options):
        self._lm, self._prompt, self._options = lm, prompt, options
        self.ids: list[int] = []
        self.stop_reason: str | None = None
        self.logprobs: list[TokenLogprob] | None = None if options.logprobs is None else []
        self.stats = Stats(prompt_tokens=len(prompt))
        self._pieces = self._run()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop the generation."""
        self._pieces.close()

    def finish(self) -> Generation:
        """Run to the end and return the whole remaining text with its details."""
        text = Generation("".join(self))
        text.ids, text.stop_reason, text.logprobs, text.stats = (
            self.ids,
            self.stop_reason or "",
            self.logprobs,
            self.stats,
        )
        return text

    def _run(self) -> Iterator[str]:
        options, lm = self._options, self._lm
        if options.max_new_tokens == 0:
            self.stop_reason = "length"
            return
        decoder = lm.tokenizer.decode_stream(skip_special=True)
        finder = StopFinder(options.stop)
        for token in self._tokens():
            piece = finder.push(decoder.push(token))
            if piece:
                yield piece
            if finder.found is not None:
                self.stop_reason = "stop_string"
                return
        rest = finder.push(decoder.flush())
        rest += finder.flush() if finder.found is None else ""
        if finder.found is not None:
            self.stop_reason = "stop_string"
        if rest:
            yield rest

    def _tokens(self) -> Iterator[int]:
        """New ids until a stop token, max_new_tokens or the end of the context; sets stop_reason."""
        lm, options, stats = self._lm, self._options, self.stats
        sampler = Sampler(options.sampling)
        stop_ids = lm.tokenizer.eog_ids | options.stop_ids
        room = lm.context - len(self._prompt) + 1  # the last token needs no place of its own
        limit = room if options.max_new_tokens is None else min(options.max_new_tokens, room)
        history = list(self._prompt)
        with lm.borrowed_cache(options.reuse) as cache:
            clock = time.perf_counter()
            # one token at least is computed: its logits are needed
            cached = min(cache.common_prefix(self._prompt), len(self._prompt) - 1)
            cache.truncate(cached)
            stats.cached_tokens = cached
            lm.reserve(cache, min(len(self._prompt) + min(limit, 1024), lm.context))
            logits = lm.prefill(self._prompt[cached:], cache)
            while True:
                token = self._choose(sampler, logits, history)
                now = time.perf_counter()
                if not self.ids and not stats.prompt_seconds:
                    stats.prompt_seconds = now - clock
                    clock = now
                stats.decode_seconds = now - clock
                stats.new_tokens += 1
                if token in stop_ids:
                    self.stop_reason = "stop_token"
                    return
                self.ids.append(token)
                history.append(token)
                if len(self.ids) == limit:
                    self.stop_reason = "length" if limit == options.max_new_tokens else "context"
                yield token
                if self.stop_reason is not None:
                    return
                logits = lm.prefill([token], cache)

    @torch.inference_mode()
    def _choose(self, sampler: Sampler, logits: Tensor, history: Sequence[int]) -> int:
        token = sampler.choose(logits, history)
        value = float(logits[token])
        if value != value:
            raise ValueError(f"the model's logits are not numbers after {len(history)} tokens: its weights are damaged")
        if self.logprobs is not None and (token not in self._lm.tokenizer.eog_ids | self._options.stop_ids):
            self.logprobs.append(token_logprob(logits, token, self._options.logprobs or 0))
        return token


def token_logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Log-probability of `token` and of the `top` best under logits float32 [vocab]."""
    total = logits.double().logsumexp(0)
    values, ids = logits.topk(min(top, logits.shape[0]))
    best = tuple(zip(ids.tolist(), (values.double() - total).tolist(), strict=True))
    return TokenLogprob(token, float(logits[token].double() - total), best)
