"""`fastdl.llm.load`: from a path to a model that is ready."""

from __future__ import annotations

import os
import time

import torch

from .. import backend as backends
from ..ops.quant_matmul import ACTIVATIONS
from .config import check_tensors, read_config
from .gguf import ModelFileError, open_gguf
from .model import LM
from .pull import demo_path
from .tokenizer import Tokenizer
from .weights import load_weights

DEFAULT_CONTEXT = 8192  # longer ones are for who asks: the KV cache of a large model takes 100 KB and more a token

MAX_THREADS = 1024  # OpenMP ends the process where the system gives no more threads


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    activation: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    progress: bool | None = None,
) -> LM:
    """Load a language model from a GGUF file.

    Architectures: llama (llama 1 to 3, mistral, smollm2) and qwen2. Weights of types Q4_1, Q8_0, Q6_K, F16, BF16 and
    F32 are used as they are; other types that can be decoded are brought into Q4_1 or Q8_0 (fastdl/llm/requantize.py),
    which `lm.load_report` lists.

    Parameters
    ----------
    path: the file; None for the demo model, which ``fastdl pull`` fetches.
    backend: "auto", "cpu" (the compiled kernels) or "torch" (readable and slow; holds the file's own bytes).
    activation: precision of activations in weight products: "auto", "int8", "bf16" or "fp32" (see
        fastdl.ops.quant_matmul).
    threads: threads of this model's calls; None for torch's number.
    context: most tokens in a sequence; None for the model's own length, at most 8192.
    progress: a bar on stderr; None shows it for large files.

    Raises
    ------
    ModelFileError: the file is missing, damaged, of an architecture or type that is not supported; the message says
        what and where.
    fastdl.BackendError: `backend` cannot run here.
    TypeError, ValueError: wrong options.

    Example
    -------
    >>> from fastdl import llm
    >>> lm = llm.load("model.gguf")                                                   # doctest: +SKIP
    >>> lm.generate("The capital of France is", max_new_tokens=2)                     # doctest: +SKIP
    ' Paris.'
    """
    clock = time.perf_counter()
    if activation != "auto" and activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected auto, int8, bf16 or fp32, got {activation!r}")
    for name, value in (("threads", threads), ("context", context)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}: expected an integer or None, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if threads is not None and threads > MAX_THREADS:
        raise ValueError(f"threads: expected at most {MAX_THREADS}, got {threads}")
    if path is None:
        path = demo_path()
    file = open_gguf(path)
    config = read_config(file)
    if context is not None and context > config.context:
        raise ValueError(f"context: {path} was made for {config.context} tokens, got {context}")
    check_tensors(file, config)
    chosen = backends.choose(
        "decoder_blocks", backend, device=torch.device("cpu"), dtype=torch.float32, head_dim=config.head_dim
    )
    tokenizer = Tokenizer.from_gguf(file.metadata)
    if tokenizer.vocab_size != config.vocab:
        raise ModelFileError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab} rows"
        )
    file.release_header()
    weights = load_weights(file, config, pack=chosen == "cpu", progress=progress)
    weights.report.seconds = time.perf_counter() - clock
    return LM(
        file, config, tokenizer, weights, backend=chosen, activation=activation, threads=threads,
        context=context or min(config.context, DEFAULT_CONTEXT),
    )  # fmt: skip
