"""LM: a language model from a GGUF file, ready to generate. `fastdl.llm.load` makes one.

The path of a token through Python is short on purpose: embedding rows, one call for all layers, one for the head,
argmax.
Test: pytest tests/test_llm.py
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import ops
from . import cache as cache_file
from . import score
from .cache import KVCache
from .chat_template import render
from .config import ModelConfig
from .generate import Generation, Options, Stream
from .gguf import GGUFFile
from .sampling import Sampling
from .tokenizer import Tokenizer
from .weights import LoadReport, Weights

# Tokens of a prompt computed at once: enough for the matrix units; 256 would take 4 MB more in the demo model.
PREFILL_CHUNK = 128
CHAT_TEMPLATE = "tokenizer.chat_template"


class LM:
    """A loaded language model. Made by `fastdl.llm.load`; one call at a time (it is not locked against other threads).

    Attributes: `tokenizer`; `config` (ModelConfig); `context`, the most tokens a sequence may have; `backend` ("cpu" or
    "torch"); `activation`; `load_report`; `chat_template` (Jinja source or None).
    """

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        tokenizer: Tokenizer,
        weights: Weights,
        *,
        backend: str,
        activation: str,
        threads: int | None,
        context: int,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.backend, self.activation, self.threads, self.context = backend, activation, threads, context
        self.path = file.path
        self.chat_template: str | None = file.metadata.value(CHAT_TEMPLATE, str, None)
        self.load_report: LoadReport = weights.report
        self._weights = weights
        self._rope = torch.empty(0, config.rope.dim)
        self._cache: KVCache | None = None
        self._loaded_cache = False

    def __repr__(self) -> str:
        c = self.config
        sizes = f"{c.layers} layers of {c.width}, vocabulary {c.vocab}, context {self.context}"
        return f"LM({c.name!r}, {c.architecture}, {sizes}, {self.backend})"

    # ---- the model's arithmetic --------------------------------------------------------------------------------

    def reserve(self, cache: KVCache, length: int) -> None:
        """Room for `length` tokens in the cache and in the table of angles."""
        cache.reserve(length)
        if self._rope.shape[0] < cache.capacity:
            rope = self.config.rope
            self._rope = ops.rope_table(
                rope.dim,
                rope.base,
                cache.capacity,
                scaling=rope.scaling,
                factor=rope.factor,
                original_context=rope.original_context,
                attention_factor=rope.attention_factor,
                factors=self._weights.rope_factors,
            )

    def hidden(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """State float32 [n, width] behind the last norm, for new tokens behind those in the cache, which grows. Ids are
        in range."""
        pos = cache.length
        if cache.capacity < pos + len(ids):
            self.reserve(cache, pos + len(ids))
        x = self._weights.embedding.rows_at(torch.tensor(ids))  # quant_embedding without its checks: 15 us a token
        x = ops.decoder_blocks(
            x,
            self._weights.stack,
            cache.k,
            cache.v,
            self._rope,
            pos=pos,
            activation=self.activation,
            backend=self.backend,
        )
        cache.ids.extend(ids)  # only now: an interrupted call leaves the cache as it was
        return x

    def head(self, x: Tensor) -> Tensor:
        """Logits float32 [n, vocab] of states [n, width]."""
        return ops.quant_matmul(x, self._weights.head, activation=self.activation, backend=self.backend)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """Add tokens to the cache, PREFILL_CHUNK at a time; logits float32 [vocab] behind the last one."""
        with self.thread_limit():
            for start in range(0, len(ids), PREFILL_CHUNK):
                x = self.hidden(ids[start : start + PREFILL_CHUNK], cache)
            return self.head(x[-1:])[0]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Teacher-forced logits: row i is the model's prediction of the token behind ids[: i + 1].

        ids: token ids (list or int64 tensor), at most `context` of them, each below the vocabulary.
        Returns float32 [len(ids), vocab]. Raises ValueError for ids out of range or too many, TypeError for no
        integers.

        >>> lm.logits(lm.tokenizer.encode("The capital of France is")).shape          # doctest: +SKIP
        torch.Size([5, 49152])
        """
        ids = self._checked(ids)
        out = torch.empty(len(ids), self.config.vocab)
        cache = KVCache(self.config, self.context)
        with torch.inference_mode(), self.thread_limit():
            self.reserve(cache, len(ids))
            for start in range(0, len(ids), PREFILL_CHUNK):
                chunk = ids[start : start + PREFILL_CHUNK]
                out[start : start + len(chunk)] = self.head(self.hidden(chunk, cache))
        return out

    def perplexity(self, text: str, *, window: int | None = None, progress: bool = False) -> float:
        """exp of the mean negative log-likelihood of the text's tokens, each given those before it.

        A text longer than `window` tokens (None: the context, at most 2048) is read in windows that overlap by half; a
        token is scored in the first window that has it, so with at least window/2 tokens before it. BOS goes before
        each window if the file asks for it. Raises ValueError for texts of fewer than two tokens.

        >>> lm.perplexity("The quick brown fox jumps over the lazy dog.")            # doctest: +SKIP
        """
        return score.perplexity(self, text, window=window, progress=progress)

    # ---- text --------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last: int = 64,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_ids: Sequence[int] = (),
        logprobs: int | None = None,
        reuse: bool | None = None,
    ) -> Stream:
        """Generate the continuation of a prompt, piece by piece.

        Parameters
        ----------
        prompt: text (BOS is added if the file asks for it) or token ids. An empty one stands for BOS.
        max_new_tokens: 0 gives nothing; None goes on to the end of the context.
        temperature, top_k, top_p, min_p, repeat_penalty, repeat_last, seed: see fastdl.llm.Sampling; the default is
        greedy.
        stop: strings that end the text; they are not part of it.
        stop_ids: tokens that end the text, beside those the file names.
        logprobs: None for none, else how many alternatives to list for each token (0: only the chosen one).
        reuse: take what the KV cache holds of this prompt. None: only from a cache that `load_cache` brought, so that
            equal calls give equal answers (the rounding of a prompt depends on how it is cut).

        Returns
        -------
        Stream: an iterator of str, with `ids`, `stats`, `logprobs` and, at the end, `stop_reason`.

        Raises
        ------
        TypeError, ValueError: wrong options, ids out of range, a prompt longer than the context, empty where there is
            no BOS.

        >>> for piece in lm.stream("Once upon a time", max_new_tokens=20):           # doctest: +SKIP
        ...     print(piece, end="", flush=True)
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, repeat_last, seed)
        options = self._options(sampling, max_new_tokens, stop, stop_ids, logprobs, reuse)
        ids = self.tokenizer.encode(prompt, add_special=True) if isinstance(prompt, str) else _listed(prompt, "prompt")
        if not ids:
            if self.tokenizer.bos_id is None:
                raise ValueError("prompt: is empty, and this model has no BOS token to begin with")
            ids = [self.tokenizer.bos_id]
        return Stream(self, self._checked(ids, "prompt"), options)

    def generate(self, prompt: str | Sequence[int], **options) -> Generation:
        """The continuation of a prompt: a str with `ids`, `stop_reason`, `logprobs`, `stats`. Options as in `stream`.

        >>> lm.generate("The capital of France is", max_new_tokens=8)                  # doctest: +SKIP
        ' Paris.\\n\\nThe answer is:'
        """
        return self.stream(prompt, **options).finish()

    def chat_prompt(self, messages: Sequence[Mapping]) -> str:
        """The prompt that the file's chat template makes of the messages. ValueError when the file has no template."""
        if self.chat_template is None:
            raise ValueError(f"{self.path}: has no chat template; write the prompt yourself and use generate()")
        if not messages:
            raise ValueError("messages: expected at least one")
        tokenizer = self.tokenizer
        return render(
            self.chat_template,
            messages,
            tokenizer.bos_token,
            tokenizer.eos_token,
            source=f"{self.path}: {CHAT_TEMPLATE}",
        )

    def chat_stream(self, messages: Sequence[Mapping], **options) -> Stream:
        """The answer to a conversation, piece by piece; messages and options as in `chat`."""
        ids = self.tokenizer.encode(self.chat_prompt(messages))
        return self.stream(ids, **{"max_new_tokens": 512, "reuse": True, **options})

    def chat(self, messages: Sequence[Mapping], **options) -> Generation:
        """The model's answer to a conversation.

        messages: [{"role": "system" | "user" | "assistant", "content": text}, ...], the last one from the user. The KV
        cache is kept: a conversation that goes on computes its new part only. Options as in `stream` (max_new_tokens is
        512 here).

        >>> lm.chat([{"role": "user", "content": "Name a colour."}])                  # doctest: +SKIP
        """
        return self.chat_stream(messages, **options).finish()

    def _options(self, sampling: Sampling, max_new_tokens, stop, stop_ids, logprobs, reuse) -> Options:
        if not (stop is None or isinstance(stop, Iterable)):
            raise TypeError(f"stop: expected strings, got {stop!r}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        Options(max_new_tokens, sampling, stops, frozenset(), logprobs, reuse)  # checks them
        stop_ids = _listed(() if stop_ids is None else stop_ids, "stop_ids")
        ids = set(self._checked(stop_ids, "stop_ids") if stop_ids else ())
        for text in stops:  # control tokens are not shown as text, so they stop by id
            encoded = self.tokenizer.encode(text)
            if len(encoded) == 1 and self.tokenizer.is_special(encoded[0]):
                ids.add(encoded[0])
        return Options(max_new_tokens, sampling, stops, frozenset(ids), logprobs, reuse)

    # ---- the KV cache ------------------------------------------------------------------------------------------

    @contextmanager
    def borrowed_cache(self, reuse: bool | None) -> Iterator[KVCache]:
        """The model's cache for one generation, emptied unless it is to be reused. A second one at the same time gets
        its own."""
        cache, self._cache = self._cache or KVCache(self.config, self.context), None
        if not (self._loaded_cache if reuse is None else reuse):
            cache.truncate(0)
        try:
            yield cache
        finally:
            if self._cache is None or self._cache.length < cache.length:
                self._cache = cache

    def save_cache(self, path: str | os.PathLike[str]) -> int:
        """Write the KV cache of the last generation (prompt and answer) to a file; the number of tokens in it.

        To prepare a long prompt: ``lm.generate(prompt, max_new_tokens=1); lm.save_cache("prompt.cache")``. ValueError
        when there is nothing to save.
        """
        if self._cache is None or not self._cache.length:
            raise ValueError("there is no cache to save: generate something first")
        cache_file.save(self._cache, path, self.load_report.fingerprint)
        return self._cache.length

    def load_cache(self, path: str | os.PathLike[str]) -> int:
        """Bring a saved cache back; later prompts that begin with its tokens skip them. Returns the number of tokens.

        Raises ModelFileError for files that are no cache or belong to another model.
        """
        cache = KVCache(self.config, self.context)
        cache_file.load(cache, path, self.load_report.fingerprint, self.config.vocab)
        self._cache, self._loaded_cache = cache, True
        return cache.length

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _checked(self, ids: Sequence[int] | Tensor, name: str = "ids") -> list[int]:
        """Token ids as a list of int, in range, at least one, at most `context`."""
        values = _listed(ids, name)
        try:
            values = [operator.index(i) for i in values]
        except TypeError:
            raise TypeError(f"{name}: expected integer token ids, got {values[:4]!r}") from None
        if not values:
            raise ValueError(f"{name}: expected at least one token, got none")
        if len(values) > self.context:
            raise ValueError(
                f"{name}: {len(values)} tokens do not fit in the context of {self.context}"
                + (
                    f" (the model allows {self.config.context}: pass context=)"
                    if self.config.context > self.context
                    else ""
                )
            )
        low, high = min(values), max(values)
        if low < 0 or high >= self.config.vocab:
            raise ValueError(
                f"{name}: token id {low if low < 0 else high} is out of range: the vocabulary has {self.config.vocab}"
            )
        return values

    @contextmanager
    def thread_limit(self) -> Iterator[None]:
        """torch's number of threads (it is global) set to this model's for the time of a call."""
        before = torch.get_num_threads()
        if self.threads is None or self.threads == before:
            yield
            return
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _listed(ids: Sequence[int] | Tensor, name: str) -> list:
    """Ids as a list, unchecked. Text and bytes are refused here: bytes would pass for small ids."""
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes, bytearray)) or not isinstance(ids, Iterable):
        text = "text or " if name == "prompt" else ""
        raise TypeError(f"{name}: expected {text}integer token ids, got {type(ids).__name__}")
    return list(ids)
