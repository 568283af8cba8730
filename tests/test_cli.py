"""The command `fastdl`: output, exit statuses and one-line errors; in this process where that is possible."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_model import write_tiny_model

from fastdl import cli

PROMPT = "the hill and then"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTDL_PROMPT", raising=False)
    monkeypatch.delenv("FASTDL_DEBUG", raising=False)


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def command(*arguments, **options):
    return [sys.executable, "-m", "fastdl.cli", *map(str, arguments)]


def test_generate(capsys, model):
    status, out, err = run(capsys, "generate", "-m", model, "-n", 5, PROMPT)
    assert status == 0 and out.endswith("\n") and "tokens/s" in err and "load" in err and "peak memory" in err
    assert run(capsys, "generate", "-m", model, "-n", 5, "--quiet", PROMPT) == (0, out, "")
    seeded = ("generate", "-m", model, "--quiet", "-n", 8, "--temperature", 2, "--top-k", 90, "--seed", 4, PROMPT)
    assert run(capsys, *seeded) == run(capsys, *seeded)


def test_prompt_from_environment_and_stdin(capsys, model, monkeypatch):
    expected = run(capsys, "generate", "-m", model, "-n", 4, "--quiet", PROMPT)
    monkeypatch.setenv("FASTDL_PROMPT", PROMPT)
    assert run(capsys, "generate", "-m", model, "-n", 4, "--quiet") == expected
    monkeypatch.delenv("FASTDL_PROMPT")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run(capsys, "generate", "-m", model, "-n", 4, "--quiet", "-") == expected
    status, _, err = run(capsys, "generate", "-m", model)
    assert status == 2 and "FASTDL_PROMPT" in err


def test_zero_tokens_and_stop(capsys, model):
    assert run(capsys, "generate", "-m", model, "-n", 0, "--quiet", PROMPT) == (0, "\n", "")
    status, out, _ = run(capsys, "generate", "-m", model, "-n", 8, "--quiet", PROMPT)
    assert status == 0 and len(out) > 3
    middle = out[1:3].replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    stopped = run(capsys, "generate", "-m", model, "-n", 8, "--quiet", "--stop", middle, PROMPT)[1]
    assert stopped == out[: out.index(out[1:3])] + "\n"


def test_chat(capsys, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the hill\n\n/reset\nand then\n/exit\nnever\n"))
    status, out, err = run(capsys, "chat", "-m", model, "-n", 3, "--system", "on")
    assert status == 0 and out.count("\n") >= 2 and "tokens/s" in err


def test_chat_forgets_when_the_context_is_full(capsys, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the hill and then on a hill\n" * 9))
    status, _, err = run(capsys, "chat", "-m", model, "-n", 3)
    assert status == 0 and "forgotten" in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_chat_on_a_terminal_outlives_bad_messages(capsys, model, monkeypatch):
    bad = "the hill " * 300 + "\n" + "the \udcff\n"
    outputs = []
    for lines in ("the hill\nand then\n", "the hill\n" + bad + "and then\n"):
        monkeypatch.setattr("sys.stdin", Terminal(lines))
        outputs.append(run(capsys, "chat", "-m", model, "-n", 3))
    (status, out, _), (status_bad, out_bad, err) = outputs
    assert status == status_bad == 0 and out_bad.replace("> ", "") == out.replace("> ", "")
    assert "context of 256" in err and "not valid Unicode" in err and err.count("left out") == 2
    assert "forgotten" not in err
    monkeypatch.setattr("sys.stdin", Terminal("the hill\n"))
    status, _, err = run(capsys, "chat", "-m", model, "--temperature", -1)
    assert status == 1 and "temperature" in err
    monkeypatch.setattr("sys.stdin", io.StringIO(bad))  # no terminal: an error ends it
    assert run(capsys, "chat", "-m", model, "-n", 3)[0] == 1


def test_perplexity(capsys, model, tmp_path):
    (tmp_path / "text.txt").write_text(PROMPT * 9)
    status, out, _ = run(capsys, "perplexity", "-m", model, tmp_path / "text.txt", "--window", 32)
    assert status == 0 and float(out.split()[1]) > 1
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\x00")
    status, _, err = run(capsys, "perplexity", "-m", model, tmp_path / "latin.txt")
    assert status == 1 and "latin.txt: is not UTF-8" in err


def test_bench(capsys, model):
    status, out, _ = run(capsys, "bench", "-m", model, "-p", 9, "-n", 3, "-t", 1, "-r", 2, "--json")
    result = json.loads(out)
    assert status == 0 and result["threads"] == 1 and len(result["decode_runs"]) == 2
    assert result["prefill_tokens_per_s"] > 0 and result["decode_tokens_per_s"] > 0 and result["model"] == "tiny.gguf"
    assert "tokens/s" in run(capsys, "bench", "-m", model, "-p", 9, "-n", 3, "-r", 1)[1]
    status, _, err = run(capsys, "bench", "-m", model, "-p", 1000)
    assert status == 1 and "context of 256" in err


def test_quantize(capsys, model, tmp_path):
    target = tmp_path / "small.gguf"
    status, out, _ = run(capsys, "quantize", model, target, "--type", "q8_0")
    assert status == 0 and target.exists() and "q8_0" in out
    assert run(capsys, "quantize", model, target, "--type", "q8_0")[0] == 1  # exists
    assert run(capsys, "quantize", model, target, "--type", "q8_0", "--force", "--quiet") == (0, "", "")
    assert run(capsys, "generate", "-m", target, "-n", 2, "--quiet", PROMPT)[0] == 0
    status, _, err = run(capsys, "quantize", model, target, "--type", "q3", "--force")
    assert status == 1 and "q3" in err and err.count("\n") == 1


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for part in ("fastdl", "torch", "decoder_blocks", "quant_matmul", "triton", "demo model"):
        assert part in out


def test_pull(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdl.llm.pull.pull", lambda force: tmp_path / "model.gguf")
    assert run(capsys, "pull") == (0, f"{tmp_path}/model.gguf\n", "")
    assert run(capsys, "pull", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "-m", "none.gguf", "x"), "none.gguf: no such file"),
        (("generate", "-m", __file__, "x"), "not a GGUF file"),
        (("generate", "x"), "fastdl pull"),
        (("generate", "-m", "MODEL", "--backend", "cuda", "x"), "cuda"),
        (("generate", "-m", "MODEL", "--temperature", "-1", "x"), "temperature"),
        (("generate", "-m", "MODEL", "the " * 300), "context of 256"),
        (("generate", "-m", "MODEL", "--context", "9999", "x"), "context"),
        (("perplexity", "-m", "MODEL", "none.txt"), "none.txt"),
        (("quantize", "none.gguf", "out.gguf"), "none.gguf"),
        (("generate", "-m", "", "x"), "the empty path: no such file"),
        (("quantize", "MODEL", ""), "destination's name is empty"),
        (("perplexity", "-m", "MODEL", ""), "'': No such file"),
        (("perplexity", "-m", "MODEL", os.devnull), "is empty, expected text"),
    ],
)
def test_errors_are_one_line_and_status_1(capsys, model, arguments, message):
    status, _, err = run(capsys, *(model if argument == "MODEL" else argument for argument in arguments))
    assert status == 1 and message in err and err.startswith("fastdl: error: ") and err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("dance",),
        ("generate", "-n", "-1", "x"),
        ("generate", "-n", "many", "x"),
        ("generate", "-t", "0", "x"),
        ("bench", "-r", "0"),
        ("quantize", "a"),
    ],
)
def test_wrong_usage_is_status_2(capsys, arguments):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and "usage: fastdl" in err and "_count" not in err and "_positive" not in err


@pytest.mark.parametrize("name", [*cli.EXAMPLES, None])
def test_help_has_examples(capsys, name):
    status, out, _ = run(capsys, *([name] if name else []), "--help")
    assert status == 0 and "examples:" in out and (name or "pull") in out


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("FASTDL_DEBUG", "1")
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["generate", "-m", "none.gguf", "x"])


def test_as_a_program(model):
    done = subprocess.run(
        command("generate", "-m", model, "-n", 3, PROMPT), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "tokens/s" in done.stderr
    done = subprocess.run(command("generate", "-m", "none.gguf", "x"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    unwanted = "import sys; from fastdl import cli, cli_text; print([m for m in ('transformers', 'matplotlib', 'gguf', "
    unwanted += "'triton', 'torch._dynamo') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", unwanted], capture_output=True, text=True, timeout=120).stdout == "[]\n"
    )


def test_ctrl_c_prints_statistics_and_exits_130(model):
    process = subprocess.Popen(
        command("generate", "-m", model, "-n", 250, "--backend", "torch", "--temperature", 3, "--seed", 1, PROMPT),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    clock = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert first and time.monotonic() - clock < 30
    if process.returncode != 0:  # it may have met a stop token before the signal came
        assert process.returncode == 130 and b"tokens/s" in err and b"Traceback" not in err


@pytest.mark.parametrize("arguments", ["generate -n 3 -m MODEL -", "generate -n 3 -m MODEL hill", "chat -m MODEL"])
def test_closed_streams_count_as_empty(model, arguments):
    line = " ".join([*command(*arguments.replace("MODEL", str(model)).split()), "<&- >&-"])
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_reader_that_goes_away(model):
    line = " ".join(
        [*command("generate", "-m", model, "-n", 60, "--temperature", 3, "--quiet", "'the hill'"), "| head -c 1"]
    )
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=120)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr
