"""The README's and the guides' examples run as they stand, in order, and the tests that their tables name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastdl

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/attention.md", "docs/recurrent.md")
# What runs elsewhere: tests/test_llm_generate.py with the demo model.
ELSEWHERE = ("from fastdl import llm",)


def examples(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page, tmp_path):
    """One after the other, in one namespace a page, as a reader types them."""
    names = {}
    if page == "docs/attention.md":
        pytest.importorskip("transformers")
        from hf_models import write_hf_model

        write_hf_model(tmp_path)
        names["folder"] = tmp_path
    for example in examples(page):
        if not any(word in example for word in ELSEWHERE):
            exec(compile(example, page, "exec"), names)
        if "part in" in example:  # a state that is carried on in float32
            assert isinstance(names["layer"], fastdl.nn.GRU) and names["state"].dtype == torch.float32
    if page == "docs/attention.md":
        assert names["model"].config._attn_implementation == "fastdl"


def test_tables_name_tests_that_exist():
    """Of docs/attention.md: `test_x` is one of tests/test_attention.py, or of the file that the table's head names."""
    home, found = "tests/test_attention.py", 0
    for line in (ROOT / "docs" / "attention.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            home = "tests/test_attention.py"
            continue
        cell = line.rstrip("| ").rsplit("|", 1)[-1]
        if "test in `" in cell:
            home = re.search(r"test in `([^`]*)`", cell)[1]
            continue
        file = home
        for name in re.findall(r"`((?:test_|tests/|bench/)[^`]*)`", cell):
            file, _, test = name.partition("::") if "/" in name else (file, "", name)
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not test or f"def {test}(" in text, f"{file} has no {test}"
            found += 1
    assert found > 30
