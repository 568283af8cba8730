"""The attention rooms' part of the report: rows for what was measured, 'not yet measured' for the rest."""

from __future__ import annotations

from bench import additive_memory, goals
from bench.attention_report import additive_key, additive_table, attention_lines, attention_table, case_key, decode_key
from bench.cells import NOT_MEASURED

RATIO = {"median": 1.7, "min": 1.5, "max": 1.9}
MACHINE = {"hardware": {"model": "a CPU", "cores": 2, "best_level": "avx512"}, "name": "a"}
SECONDS = {"median": 1e-3, "min": 1e-3, "max": 2e-3}


def test_rows_and_verdicts():
    kind, option, shape, dtype = next(iter(goals.ATTENTION))
    side = {"seconds": SECONDS, "relative_error": 1e-7, "gflop_per_s": 10.0, "share_of_product_limit": 0.5}
    record = {"ratio": RATIO, "sides": {"fastdl": side, "torch": side}}
    decode, dtype_, cache = next(iter(goals.DECODE))
    read = {"seconds": SECONDS, "relative_error": 1e-7, "gb_per_s": 1.0, "share_of_read_limit": None}
    found = {
        "attention": [MACHINE | {"records": {case_key("avx512", kind, option, shape, dtype): record}}],
        "attention_decode": [
            MACHINE
            | {"records": {decode_key("avx512", decode, dtype_, cache): {"ratio": RATIO, "sides": {"fastdl": read}}}}
        ],
    }
    table = attention_table(found).split("\n")
    assert len(table) == 2 + len(goals.ATTENTION) + len(goals.DECODE) + len(goals.ATTENTION_GPU)
    row = next(line for line in table if "(1.50 to 1.90), 50% of the peak" in line)
    assert row.endswith("aim met | a CPU, 2 cores, AVX-512 |") and "1 x 8 x 2048 x 64, fp32, AVX-512" in row
    assert sum("MISSED" in line for line in table) == 1  # decode at 1.7 of 2
    assert sum(NOT_MEASURED in line for line in table) == len(table) - 4
    lines = attention_lines("key", record)
    assert lines[0].startswith("- key: fastdl: 1.70 × (1.50 to 1.90) torch, 1000.0 us, 10.0 GFLOP/s = 50% of the limit")
    assert "×" not in lines[1]


def test_nothing_measured():
    assert all(NOT_MEASURED in line for line in attention_table({}).split("\n")[2:])


def test_additive_attention_rows():
    kind, shape, dtype, peer = next(iter(goals.ADDITIVE))
    side = {"seconds": SECONDS, "relative_error": 1e-7, "gflop_per_s": 10.0, "share_of_product_limit": 0.5}
    records = {
        additive_key("avx512", kind, shape, dtype, peer): {"ratio": RATIO, "best": peer, "sides": {"fastdl": side}},
        additive_key("avx512", "memory", shape, dtype, peer): {
            "kind": "memory", "bytes": {"fastdl": {"median": 1e6}}, "over_eager": {"median": 0.02},
        },
    }  # fmt: skip
    assert len(additive_table({}).split("\n")) == 3 + len(goals.ADDITIVE)
    table = additive_table({"additive_attention": [MACHINE | {"records": records}]}).split("\n")
    assert any("50% of the peak: MISSED" in line and "over eager torch, AVX-512" in line for line in table)
    assert "| ≤ 0.1 × |  | 0.020 ×: met | a CPU" in table[-1]
    assert sum(NOT_MEASURED in line for line in table) == len(goals.ADDITIVE) - 1
    lines = [line for key, record in records.items() for line in attention_lines(key, record)]
    assert "1.70 × (1.50 to 1.90) eager" in lines[0] and "0.020 × eager torch's memory; fastdl 1.0 MB" in lines[1]
    missing = attention_lines("key", {"kind": "forward", "missing": ["torch.compile: no compiler"]})
    assert missing == ["- key: missing: torch.compile: no compiler"]


def test_additive_memory_is_measured():
    ours, eager = (additive_memory.peak(side, (2, 32, 64, 64), 1) for side in ("fastdl", "eager"))
    assert 0 < ours < eager
