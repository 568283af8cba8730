"""The examples run, with settings that take seconds; `make examples` runs them whole, with what they check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def example(name, *arguments, folder):
    """Run one as a user would, somewhere else."""
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_char_rnn(tmp_path):
    """All three models; loss curves agree with torch's, a text is written, a plot is drawn."""
    result = example("char_rnn.py", "--steps", 12, "--hidden", 48, "--length", 16, "--sample", 30, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for kind in ("rnn", "lstm", "layernorm-lstm"):
        assert f"\n{kind}: loss" in result.stdout
    assert result.stdout.count("curves agree") == 3 and "DIFFER" not in result.stdout
    assert (tmp_path / "char_rnn.png").is_file() or "pip install matplotlib" in result.stderr


def test_curves_that_differ_are_an_error(tmp_path):
    small = ("--steps", 8, "--hidden", 16, "--length", 8, "--sample", 0, "--kinds", "lstm")
    result = example("char_rnn.py", *small, "--tolerance", -1, folder=tmp_path)
    assert result.returncode == 1 and "curves DIFFER" in result.stdout


def test_zaremba(tmp_path):
    """It runs; whether dropout wins in one epoch of a few words says nothing."""
    small = ("--words", 3000, "--hidden", 24, "--epochs", 1, "--batch", 5, "--vocabulary", 100)
    result = example("zaremba_lstm.py", *small, folder=tmp_path)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    assert "best validation perplexity:" in result.stdout
    result = example("zaremba_lstm.py", "--words", 50, folder=tmp_path)
    assert result.returncode == 2 and "nothing is left to train" in result.stderr
