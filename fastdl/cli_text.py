"""`fastdl generate` and `fastdl chat`: text on stdout as it comes, statistics on stderr at the end.

Test: pytest tests/test_cli.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from fastdl import llm
from fastdl.llm.generate import Stats
from fastdl.llm.model import LM
from fastdl.llm.sampling import SAMPLING_NAMES

ANSWER_ROOM = 64  # tokens of the context that a chat keeps free for the next answer


def generate(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments.prompt)
    if prompt is None:
        print("fastdl generate: error: no prompt: name one, or - for stdin, or set FASTDL_PROMPT", file=sys.stderr)
        return 2
    lm = load_model(arguments)
    stops = [_unescape(stop) for stop in arguments.stop]
    stream = lm.stream(prompt, max_new_tokens=arguments.max_new_tokens, stop=stops, **_sampling(arguments))
    lm.tokenizer.release_encoder()  # some 10 MB that decoding does not need
    status = _show(stream)
    if not arguments.quiet:
        print(statistics(lm, stream.stats), file=sys.stderr)
    return status


def chat(arguments: argparse.Namespace) -> int:
    lm = load_model(arguments)
    options = {"max_new_tokens": arguments.max_new_tokens, **_sampling(arguments)}
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    # wrong options, a model without a template and a context too small for it are named before the first question
    lm.chat_stream([*system, {"role": "user", "content": ""}], **options)
    interactive = sys.stdin.isatty()
    if interactive:
        _import_readline()
        print(f"{lm.config.name}. /reset forgets the conversation, /exit or Ctrl-D ends.", file=sys.stderr)
    messages: list[Mapping[str, str]] = list(system)
    total = Stats()
    status = 0
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            status = 130
            break
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            messages = list(system)
            continue
        if not text:
            continue
        try:
            asked, dropped = _fitting(lm, [*messages, {"role": "user", "content": text}], len(system))
            stream = lm.chat_stream(asked, **options)
        except ValueError as error:  # a message too long, or no text: the conversation goes on without it
            if not interactive:
                raise
            print(f"fastdl: error: {error}; this message is left out", file=sys.stderr)
            continue
        if dropped:
            note = f"the context of {lm.context} tokens is full: {dropped} oldest exchanges forgotten"
            print(f"fastdl: note: {note}", file=sys.stderr)
        messages = asked
        answer: list[str] = []
        status = _show(stream, answer)
        _add(total, stream.stats)
        if status and not interactive:
            break
        status = 0
        messages.append({"role": "assistant", "content": "".join(answer)})
    if not arguments.quiet:
        print(("\n" if interactive else "") + statistics(lm, total), file=sys.stderr)
    return status


def load_model(arguments: argparse.Namespace) -> LM:
    """The model that -m names, with the options all commands share. Says on stderr what had to be requantized."""
    lm = llm.load(
        arguments.model,
        backend=arguments.backend,
        activation=arguments.activation,
        threads=arguments.threads,
        context=arguments.context,
    )
    if lm.load_report.requantized:
        print(f"fastdl: note: {lm.path}: {str(lm.load_report).partition(chr(10))[2]}", file=sys.stderr)
    return lm


def statistics(lm: LM, stats: Stats) -> str:
    """One line: load time, rates, peak memory."""
    parts = [f"load {lm.load_report.seconds:.2f} s"]
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    parts.append(f"prompt {stats.prompt_tokens} tokens{cached}, {stats.prompt_rate:.1f} tokens/s")
    parts.append(f"decode {stats.new_tokens} tokens, {stats.decode_rate:.1f} tokens/s")
    peak = peak_memory()
    if peak:
        parts.append(f"peak memory {peak / 1e6:.0f} MB")
    return "[" + " | ".join(parts) + "]"


def peak_memory() -> int | None:
    """Most bytes that this process ever had in memory (VmHWM), or None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _show(stream, kept: list[str] | None = None) -> int:
    """Print the pieces as they come; 130 after Ctrl-C, else 0."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the text
    try:
        for piece in stream:
            if kept is not None:
                kept.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
        return 130
    finally:
        try:
            sys.stdout.write("\n")
            sys.stdout.flush()
        except BrokenPipeError:
            pass
    return 0


def _prompt(given: str | None) -> str | None:
    if given is None:
        return os.environ.get("FASTDL_PROMPT")
    return sys.stdin.read() if given == "-" else given


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in SAMPLING_NAMES if hasattr(arguments, name)}


def _unescape(text: str) -> str:
    r"""\n, \t, \\ as a shell user writes them."""
    return text.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\")


def _fitting(lm: LM, messages: list, keep: int) -> tuple[list, int]:
    """The conversation without its oldest exchanges, as far as the context demands it, and how many these are."""
    dropped = 0
    while len(messages) > keep + 1 and len(lm.tokenizer.encode(lm.chat_prompt(messages))) + ANSWER_ROOM > lm.context:
        del messages[keep : keep + 2]
        dropped += 1
    return messages, dropped


def _add(total: Stats, one: Stats) -> None:
    total.prompt_tokens += one.prompt_tokens
    total.cached_tokens += one.cached_tokens
    total.new_tokens += one.new_tokens
    total.prompt_seconds += one.prompt_seconds
    total.decode_seconds += one.decode_seconds


def _import_readline() -> None:
    try:
        import readline  # noqa: F401 (line editing in input())
    except ImportError:
        return
