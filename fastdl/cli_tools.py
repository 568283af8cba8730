"""`fastdl pull`, `quantize`, `perplexity`, `bench` and `info`.

Test: pytest tests/test_cli.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time

import torch

import fastdl
from fastdl import backend as backends

EXTRAS = ("numpy", "tokenizers", "jinja2", "tqdm", "gguf", "safetensors", "transformers", "triton")


def pull(arguments: argparse.Namespace) -> int:
    from fastdl.llm import pull as store

    path = store.pull(force=arguments.force)
    if not arguments.quiet:
        print(path)
    return 0


def quantize(arguments: argparse.Namespace) -> int:
    from fastdl.llm.convert import quantize_file

    report = quantize_file(
        arguments.src, arguments.dst, arguments.type, progress=not arguments.quiet, overwrite=arguments.force
    )
    if not arguments.quiet:
        print(report)
    return 0


def perplexity(arguments: argparse.Namespace) -> int:
    from fastdl.cli_text import load_model

    if arguments.file == "-":
        text = sys.stdin.read()
    else:
        try:
            with open(arguments.file, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{arguments.file}: is not UTF-8 text (byte {error.start})") from None
    if not text:
        raise ValueError(f"{arguments.file}: is empty, expected text of at least 2 tokens")
    lm = load_model(arguments)
    value = lm.perplexity(text, window=arguments.window, progress=sys.stderr.isatty())
    print(f"perplexity {value:.4f}")
    return 0


def bench(arguments: argparse.Namespace) -> int:
    from fastdl.cli_text import load_model, peak_memory
    from fastdl.llm.cache import KVCache

    lm = load_model(arguments)
    need = max(arguments.prompt_tokens, arguments.new_tokens)
    if need > lm.context:
        raise ValueError(f"-p, -n: {need} tokens do not fit in the context of {lm.context}")
    ids = torch.randint(
        lm.config.vocab, (arguments.prompt_tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()

    def prefill() -> float:
        cache = KVCache(lm.config, lm.context)
        clock = time.perf_counter()
        lm.prefill(ids, cache)
        return arguments.prompt_tokens / (time.perf_counter() - clock)

    def decode() -> float:
        cache, token = KVCache(lm.config, lm.context), ids[0]
        lm.reserve(cache, arguments.new_tokens)
        clock = time.perf_counter()
        for _ in range(arguments.new_tokens):
            token = int(lm.prefill([token], cache).argmax())
        return arguments.new_tokens / (time.perf_counter() - clock)

    runs = {}
    for name, run in (("prefill", prefill), ("decode", decode)):
        run()
        runs[name] = [run() for _ in range(arguments.repeats)]
    level = backends.cpu_level() if lm.backend == "cpu" else "torch"
    activation = {
        name: fastdl.ops.auto_activation(level, torch.float32, rows) if lm.activation == "auto" else lm.activation
        for name, rows in (("prefill", arguments.prompt_tokens), ("decode", 1))
    }
    result = {
        "model": os.path.basename(lm.path),
        "name": lm.config.name,
        "fastdl": fastdl.__version__,
        "torch": torch.__version__,
        "backend": lm.backend,
        "level": level,
        "activation": lm.activation,
        "prefill_activation": activation["prefill"],
        "decode_activation": activation["decode"],
        "threads": lm.threads or torch.get_num_threads(),
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "repeats": arguments.repeats,
        "prefill_tokens_per_s": round(statistics.median(runs["prefill"]), 2),
        "decode_tokens_per_s": round(statistics.median(runs["decode"]), 2),
        "prefill_runs": [round(rate, 2) for rate in runs["prefill"]],
        "decode_runs": [round(rate, 2) for rate in runs["decode"]],
        "peak_memory_bytes": peak_memory(),
    }
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"{result['name']}: {result['level']}, {result['threads']} threads, median of {arguments.repeats}")
    for name, count in (("prefill", arguments.prompt_tokens), ("decode", arguments.new_tokens)):
        rates = runs[name]
        rate = f"{result[name + '_tokens_per_s']:10.1f} tokens/s"
        print(f"  {name:8}{count:6} tokens {rate}   ({activation[name]}, {min(rates):.1f} to {max(rates):.1f})")
    return 0


def info(arguments: argparse.Namespace) -> int:
    print(f"fastdl {fastdl.__version__}   torch {torch.__version__}   Python {platform.python_version()}")
    print(platform.platform())
    print("packages: " + ", ".join(f"{name} {_version(name)}" for name in EXTRAS))
    print()
    error = backends.native_error()
    print(f"compiled library: {backends.library_path() if error is None else 'not loaded: ' + error}")
    for key, value in backends.build_info().items():
        print(f"  {key}: {value}")
    if error is None:
        cap = os.environ.get("FASTDL_ISA")
        print(f"CPU level: {backends.cpu_level()}" + (f" (capped by FASTDL_ISA={cap})" if cap else ""))
        print(f"CPU features: {backends.cpu_features() or 'none that the kernels use'}")
    print(f"threads: {torch.get_num_threads()}")
    print(f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that this torch can use'}")
    print(f"FASTDL_BACKEND: {os.environ.get('FASTDL_BACKEND') or 'not set (automatic)'}")
    print()
    _print_backends()
    print()
    _print_demo()
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _print_backends() -> None:
    """The table of ops x back ends, then why a back end cannot run here."""
    rooms = backends.rooms()
    width = max(map(len, rooms)) + 2
    print("op".ljust(width) + "".join(name.ljust(8) for name in backends.BACKENDS))
    reasons: dict[str, str] = {}
    for room, has in rooms.items():
        row = room.ljust(width)
        for name in backends.BACKENDS:
            device = "cuda" if name in ("cuda", "triton") else "cpu"
            cell = "-"
            if name in has:
                try:
                    backends.choose(room, name, device=device, dtype=torch.float32)
                    usable = device == "cpu" or torch.cuda.is_available()
                    cell = "yes" if usable else "no GPU"
                except backends.BackendError as error:
                    cell = "no"
                    reasons.setdefault(name, str(error))
            row += cell.ljust(8)
        print(row.rstrip())
    for name in backends.BACKENDS:
        if not any(name in has for has in rooms.values()):
            reasons[name] = "no op has this back end in this release"
    for name, reason in reasons.items():
        print(f"{name}: {reason}")


def _print_demo() -> None:
    try:
        from fastdl.llm.pull import DEMO, cache_folder
    except ImportError as error:
        print(f"demo model: needs the extra llm: {error}")
        return
    path = cache_folder() / DEMO.filename
    print(f"demo model: {path}" + ("" if path.is_file() else " (not there: fastdl pull)"))
