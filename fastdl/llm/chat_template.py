"""Renders a model file's chat template, which is a program by a stranger, in a short-lived process of its own.

A Jinja sandbox keeps a template from reaching Python, but not from looping for hours (`range` in `range`), from asking
for 10 GB in one expression (`'a' * 10**10`) or from crashing the compiler by nesting; nothing inside one interpreter
can stop all of that. So chat_template_worker.py runs as a child with limits on time, memory and output; it costs some
0.1 s a call, and Jinja's memory never becomes this process's.
What templates may use is what transformers offers them. Test: pytest tests/test_chat_template.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from .gguf_metadata import ModelFileError

SECONDS = 3  # of CPU time
WALL_SECONDS = 20  # for machines that are busy with something else
MEMORY_BYTES = 512 << 20
MAX_OUTPUT = 16 << 20  # characters
MAX_TEMPLATE = 1 << 20  # characters; the longest real ones have some 20,000

_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chat_template_worker.py")


def render(
    template: str,
    messages: Sequence[Mapping],
    bos: str = "",
    eos: str = "",
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[Mapping] | None = None,
    variables: Mapping | None = None,
    source: str = "chat template",
) -> str:
    """The prompt that a chat template makes of a conversation, as transformers' apply_chat_template would make it.

    template: Jinja source (a GGUF file's `tokenizer.chat_template`). messages: dicts with at least a "role".
    bos, eos: what the template sees as bos_token and eos_token. tools, variables: passed on to the template.
    source: names the template in errors, "model.gguf: tokenizer.chat_template".

    Raises TypeError for messages that are no list of dicts; ModelFileError when the template is at fault (syntax, an
    undefined name, a forbidden access, too much time, memory or output); ValueError when the template itself refuses
    the messages (`raise_exception`).

    >>> render("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}", [{"role": "user", "content": "hi"}])
    '[user] hi'
    """
    _check(template, messages, bos, eos, source)
    request = {
        "template": template,
        "context": {
            **(variables or {}),
            "messages": [dict(message) for message in messages],
            "bos_token": bos,
            "eos_token": eos,
            "add_generation_prompt": bool(add_generation_prompt),
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
        },
        "path": [entry for entry in sys.path if isinstance(entry, str)],
        "seconds": SECONDS,
        "memory": MEMORY_BYTES,
        "output": MAX_OUTPUT,
    }
    try:
        request = json.dumps(request).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"messages: expected strings, numbers, lists and dicts that JSON can carry: {error}") from None
    return _result(_run(request, source), source)


def _check(template, messages, bos, eos, source: str) -> None:
    for name, value in (("template", template), ("bos", bos), ("eos", eos)):
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected str, got {type(value).__name__}")
    if len(template) > MAX_TEMPLATE:
        raise ModelFileError(f"{source}: {len(template)} characters, expected at most {MAX_TEMPLATE}")
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: expected a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: the conversation is empty, expected at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{index}]: expected a dict, got {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}]: expected a 'role' that is a string, got {message.get('role')!r}")


def _run(request: bytes, source: str) -> subprocess.CompletedProcess:
    if not sys.executable:
        raise RuntimeError("chat templates run in a process of their own, but sys.executable is not set")
    command = [sys.executable, "-I", "-S", _WORKER]
    try:
        return subprocess.run(command, input=request, capture_output=True, timeout=WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{source}: rendering took more than {WALL_SECONDS} s and was stopped") from None


def _result(done: subprocess.CompletedProcess, source: str) -> str:
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        # The child died without a word: the limits of the system, or a crash in the compiler.
        if done.returncode in (-24, -9):  # SIGXCPU, SIGKILL
            raise ModelFileError(f"{source}: rendering took more than {SECONDS} s and was stopped") from None
        reason = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        detail = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
        raise ModelFileError(
            f"{source}: rendering crashed ({reason}; it may use {MEMORY_BYTES >> 20} MB) {detail}"
        ) from None
    kind, text = answer["kind"], answer["text"]
    if kind == "ok":
        return text
    if kind == "missing":
        raise ImportError(f"chat templates need jinja2 3.1.6 or later: pip install 'jinja2>=3.1.6' ({text})")
    if kind == "refused":
        raise ValueError(f"{source}: the template refuses these messages: {text}")
    raise ModelFileError(f"{source}: {text}")
