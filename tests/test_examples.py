"""The examples run, with settings that take seconds; `make examples` runs them whole, with what they check."""

from __future__ import annotations

import importlib
import os
import random
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def load(monkeypatch):
    """Import an example, to test its pieces."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


def test_pointer_network(tmp_path):
    """The loss falls; whether hulls are covered after a few steps says nothing."""
    small = ("--steps", 80, "--hidden", 32, "--batch", 16, "--lr", 0.01, "--points", 4, 6, "--held-out", 20)
    result = example("pointer_network.py", *small, "--goal", -1, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    check_that_loss_falls(result.stdout)
    assert all(f"\n{count} points, 20 sets" in result.stdout for count in (5, 10, 20))
    assert (tmp_path / "pointer_network.png").is_file() or "pip install matplotlib" in result.stderr
    result = example("pointer_network.py", *small, "--goal", 1, "--no-chosen", folder=tmp_path)
    assert result.returncode == 1 and "is NOT above" in result.stdout, result.stdout + result.stderr
    result = example("pointer_network.py", "--points", 7, 6, folder=tmp_path)
    assert result.returncode == 2 and "the lesser first" in result.stderr


@pytest.mark.parametrize(
    ("name", "flag", "value", "message"),
    [
        ("pointer_network.py", "--batch", 0, "expected 1 or more, got 0"),
        ("seq2seq.py", "--hidden", 7, "expected a multiple of 2, 2 or more, got 7"),
        ("sort_sets.py", "--held-out", 0, "expected 1 or more, got 0"),
    ],
)
def test_odd_numbers_are_refused_before_anything_is_trained(name, flag, value, message, tmp_path):
    result = example(name, flag, value, folder=tmp_path)
    assert result.returncode == 2 and f"argument {flag}: {message}" in result.stderr


def check_that_loss_falls(text, times=1):
    found = re.findall(r"loss ([\d.]+) -> ([\d.]+) in", text)
    assert len(found) == times and all(float(last) < float(first) for first, last in found), text


def test_convex_hull(load):
    """Corners of a square; every point is left of every edge; rows on a line and double points are no corners."""
    hulls = load("pointer_network")
    square = [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.5, 0.0), (0.0, 0.0)]
    assert [square[i] for i in hulls.convex_hull(square)] == [(0, 0), (1, 0), (1, 1), (0, 1)]
    draws = random.Random(0)
    for count in (3, 4, 7, 20, 100):
        points = [(draws.random(), draws.random()) for _ in range(count)]
        hull = hulls.convex_hull(points)
        assert hull[0] == min(range(count), key=lambda i: points[i][1]) and len(set(hull)) == len(hull) >= 3
        for a, b in zip(hull, hull[1:] + hull[:1], strict=True):
            assert all(hulls.cross(points[a], points[b], points[i]) > 0 for i in range(count) if i not in (a, b))


def test_coverage(load):
    """Of polygons that are right, turned the other way, a part, crossed, too short, missing."""
    hulls = load("pointer_network")
    square, truth = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)], [0, 1, 2, 3]
    answers = ([0, 1, 2, 3], [2, 1, 0, 3], [0, 1, 2], [0, 2, 1, 3], [0, 1], [0, 1, 2, 1], [], None)
    assert [hulls.coverage(square, answer, truth) for answer in answers] == [1, 1, 0.5, *[None] * 5]


def test_batches_of_hulls(load):
    """Lengths differ; each hull ends with the end, past which nothing is asked."""
    hulls = load("pointer_network")
    points, targets, lens = hulls.make_batch(50, 5, 20, random.Random(0))
    assert set(lens.tolist()) <= set(range(5, 21)) and len(set(lens.tolist())) > 5
    assert points.shape == (50, 20, 2) and targets.shape[1] == (targets != hulls.NOTHING).sum(1).max()
    for row, target, count in zip(points.tolist(), targets.tolist(), lens.tolist(), strict=True):
        at = target.index(hulls.END)
        assert [key - 1 for key in target[:at]] == hulls.convex_hull([tuple(point) for point in row[:count]])
        assert all(key == hulls.NOTHING for key in target[at + 1 :]) and not any(map(any, row[count:]))


def lively(model):
    """Ready for use, with weights that give answers which differ from one another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
    return model.eval()


def test_pointers_one_at_a_time(load):
    """Each step gives what the call with a teacher gives for the same input, whatever else is in the batch."""
    hulls = load("pointer_network")
    torch.manual_seed(5)
    model = lively(hulls.PointerNetwork(32))
    points, _, lens = hulls.make_batch(8, 5, 9, random.Random(0))
    answers = model.solve(points, lens)
    assert max(len(answer or ()) for answer in answers) >= 3
    for row, answer in enumerate(answers):
        assert answer is None or len(set(answer)) == len(answer)
        keys = [*[1 + i for i in answer or []][:4], hulls.END]
        log_p = model(points[row : row + 1], lens[row : row + 1], torch.tensor([keys]))[0]
        assert not log_p[:, lens[row] + 1 :].isfinite().any()
        for t, key in enumerate(keys if answer is not None and len(answer) < 5 else keys[:-1]):
            log_p[t, keys[:t]] = -torch.inf  # chosen before
            assert log_p[t].argmax() == key


def test_seq2seq(tmp_path):
    small = ("--steps", 30, "--hidden", 32, "--batch", 16, "--held-out", 20)
    result = example("seq2seq.py", *small, "--goal", -1, "--ask", "3 may 1979", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    check_that_loss_falls(result.stdout, times=2)
    assert "you asked: '3 may 1979' -> '" in result.stdout
    assert (tmp_path / "seq2seq.png").is_file() or "pip install matplotlib" in result.stderr
    result = example("seq2seq.py", *small, "--tasks", "dates", folder=tmp_path)
    assert result.returncode == 1 and "is NOT above" in result.stdout, result.stdout + result.stderr


def test_dates(load):
    """Wordings; what is held out is never trained on; all characters are known."""
    seq2seq = load("seq2seq")
    day = date(1979, 5, 3)
    wanted = {"3 May 1979", "May 03, 1979", "03/05/79", "Thursday 3 May 1979", "3rd of May 1979", "Thu, 03 May 79"}
    assert wanted <= {seq2seq.written(day, wording) for wording in seq2seq.FORMATS}
    endings = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 21: "21st", 31: "31st"}
    assert {number: seq2seq.ordinal(number) for number in endings} == endings
    trained, held_out = ({a for _, a in seq2seq.examples("dates", 2000, h, random.Random(0))} for h in (False, True))
    assert len(trained) > 1000 and len(held_out) > 500 and not trained & held_out
    for question, answer in seq2seq.examples("dates", 500, False, random.Random(1)):
        assert set(question + answer) <= set(seq2seq.CHARACTERS) and 1950 <= date.fromisoformat(answer).year < 2050
        codes, lens = seq2seq.encoded([answer, question])
        assert [seq2seq.decoded(row[:n]) for row, n in zip(codes.tolist(), lens, strict=True)] == [answer, question]
    assert all(answer == word[::-1] for word, answer in seq2seq.examples("reverse", 50, True, random.Random(0)))


def test_translation_one_character_at_a_time(load):
    """Answers do not depend on what else is in the batch; maps are shares of the characters that there are."""
    seq2seq = load("seq2seq")
    torch.manual_seed(0)
    model = lively(seq2seq.Translator(32))
    texts = ["3 may 1979", "Thursday 3 May 1979", "é", ""]
    answers, maps = model.translate(texts)
    assert answers == [model.translate([text])[0][0] for text in texts] and len(set(answers)) > 1
    for text, weights in zip(texts, maps, strict=True):
        count = max(1, len(text))
        torch.testing.assert_close(weights[:, :count].sum(1), torch.ones(len(weights)))
        assert not weights[:, count:].any()


def test_sort_sets(tmp_path):
    small = ("--steps", 40, "--hidden", 32, "--batch", 16, "--count", 4, "--held-out", 50)
    result = example("sort_sets.py", *small, "--goal", -1, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    check_that_loss_falls(result.stdout)
    assert "the order of the input does not matter" in result.stdout
    assert (tmp_path / "sort_sets.png").is_file() or "pip install matplotlib" in result.stderr
    result = example("sort_sets.py", *small, "--goal", 1, folder=tmp_path)
    assert result.returncode == 1 and "are NOT above" in result.stdout, result.stdout + result.stderr


def test_sets_have_no_order(load):
    """Log-probabilities of a permuted set are the permuted ones; the answer has each number once."""
    sets = load("sort_sets")
    torch.manual_seed(0)
    model, numbers = sets.ReadProcessWrite(32, process=3).eval(), torch.rand(6, 5)
    permutation, order = torch.randperm(5), numbers.argsort(1)
    permuted = numbers[:, permutation]
    there, here = model(permuted, permuted.argsort(1)), model(numbers, order)[:, :, permutation]
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
    assert torch.equal(here.isinf().sum(2), torch.arange(5).expand(6, 5))  # what was chosen
    assert torch.equal(model.sort(numbers).sort(1).values, numbers.sort(1).values)
    torch.testing.assert_close(model.sort(numbers), model.sort(permuted), rtol=0, atol=0)
