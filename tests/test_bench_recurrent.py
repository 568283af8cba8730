"""The benchmarks of rooms lstm, gru and rnn: peers, checks, records, tables. None depends on speed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # bench/ is not installed

pytest.importorskip("pytest_benchmark")

from bench import accuracy, goals, limits, recurrent, recurrent_memory, recurrent_peers, report, results, timing  # noqa: E402
from bench.peers import MissingPeer  # noqa: E402

MACHINE = {"model": "Some CPU 7", "best_level": "avx512", "cores": 2, "flags": []}
LAYERS = {
    "lstm": lambda: nn.LSTM(6, 9),
    "gru": lambda: nn.GRU(6, 9),
    "rnn": lambda: nn.RNN(6, 9),
    "rnn relu": lambda: nn.RNN(6, 9, nonlinearity="relu"),
}
SHAPE = (5, 3, 16)


class Recorder:
    """Keeps what a benchmark records."""

    threads = 1
    limits = {"1": {"fma": 100.0, "bf16": 200.0, "torch_matmul_fp32": 90.0}}  # noqa: RUF012

    def __init__(self):
        self.records = {}

    def add(self, bench, key, record):
        self.records[key] = json.loads(json.dumps(record))


@pytest.fixture
def recorder(monkeypatch):
    """Two calls instead of 30 ms of them; one thread, restored afterwards."""
    from bench import against_torch

    monkeypatch.setattr(against_torch, "calls_for", lambda side: 2)
    monkeypatch.setattr(timing, "gc", types.SimpleNamespace(collect=lambda: 0))  # takes longer than all else here
    monkeypatch.setattr(limits, "read_rate", lambda nbytes, threads: 50.0)
    before = torch.get_num_threads()
    yield Recorder()
    torch.set_num_threads(before)


@pytest.mark.parametrize("peer", ["onnxruntime fp32", "OpenVINO fp32", "OpenVINO bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_peers_compute_torch_s_layer(name, peer):
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(5, 3, 6)
    try:
        if peer.startswith("onnxruntime"):
            side = recurrent_peers.onnxruntime_side(layer, x, 1)
        else:
            side = recurrent_peers.openvino_side(layer, x, 1, peer[-4:])
    except MissingPeer as missing:
        pytest.skip(str(missing))
    with torch.no_grad():
        wanted = recurrent.listed(layer(x))
    for _ in range(2):
        for exact, got in zip(wanted, side(), strict=True):
            assert accuracy.relative_error(exact.numpy(), got.numpy()) < (1e-2 if peer.endswith("bf16") else 1e-5)


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    for name in ("onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    sides, _, missing = recurrent.inference_sides("lstm", SHAPE, "fp32", 1)
    assert list(sides) == ["fastdl fp32", "torch fp32"]
    assert [text.split(":")[0] for text in missing] == ["onnxruntime", "OpenVINO"] and "pip install" in missing[0]


def test_layers_that_have_no_graph_are_refused():
    for layer in (nn.LSTM(3, 4, 2), nn.GRU(3, 4, bidirectional=True), nn.RNN(3, 4, bias=False)):
        with pytest.raises(ValueError, match="layer: expected one layer and direction"):
            recurrent_peers.onnx_model(layer, 5, 1)


@pytest.mark.parametrize(("room", "kind", "dtype"), list(dict.fromkeys((r, k, d) for r, k, _, d in goals.RECURRENT)))
def test_every_kind_of_record_has_lines_a_row_and_a_plot(room, kind, dtype, recorder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    batch = 1 if kind == "inference" else 3
    shape, case = (5, batch, 16), (room, kind, (5, batch, 16), dtype)
    monkeypatch.setattr(goals, "RECURRENT", {case: goals.Goal(1e-6, 1e6)})
    monkeypatch.setattr(recurrent.fastdl.backend, "cpu_level", lambda: "avx512")
    if kind == "memory":
        one = {"median": 1.05, "min": 1.0, "max": 1.1, "rounds": 1}
        facts = {"level": "avx512", "kind": kind, "dtype": dtype, "shape": list(shape), "missing": []}
        recorder.add(room, "avx512/memory/5x3x16/fp32", {**facts, "bytes": {"torch": one}, "over_torch": one})
    else:
        recurrent.compare(None, recorder, 1, room, kind, shape, dtype)
    (record,) = recorder.records.values()
    run = {"when": "now", "commit": "c", "threads": 1, "versions": {}, "peers": {}, "limits": {}}
    results.save(results.path_for(tmp_path, MACHINE, room), MACHINE, "r1", run, recorder.records)
    report.main(["--results", str(tmp_path), "--details", "--plots"])
    drawn = kind in ("inference", "training")
    assert len(list(tmp_path.glob("*.png"))) == drawn
    rows = report.recurrent_table(results.load_all(tmp_path)).splitlines()[2:]
    options = kind.startswith("options")
    assert len(rows) == (2 if options else 1) + 2 and all(report.NOT_MEASURED in row for row in rows[-2:])
    if all(peer in record.get("sides", [peer]) for peer in goals.recurrent_peers(kind, shape, dtype)):
        assert all(report.NOT_MEASURED not in row and "must met" in row for row in rows[:-2])
    if options:
        assert set(record["time_over_plain"]) == set(recurrent.OPTIONS)
    elif kind == "inference":
        side = record["sides"][f"fastdl {dtype}"]
        matrix = recurrent.GATES[room] * 16 * 16
        seconds = side["seconds"]["median"]
        assert side["weight_gb_per_s"] == round(6 * matrix * (2 if dtype == "bf16" else 4) / seconds / 1e9, 1)
        assert side["gflop_per_s"] == round(20 * matrix / seconds / 1e9, 1)


def test_the_faster_peer_counts_and_one_that_is_missing_is_named():
    from bench.recurrent_report import cell

    def side(seconds, **over):
        spread = {name: {"median": r, "min": r, "max": r, "rounds": 1} for name, r in over.items()}
        return {"seconds": {"median": seconds}, "share_of_product_limit": 0.25,
                "speedup_over": {name.replace("_", " "): value for name, value in spread.items()}}  # fmt: skip

    sides = {
        "fastdl fp32": side(1.0, torch_fp32=3.0, onnxruntime_fp32=2.0),
        "torch fp32": side(3.0),
        "onnxruntime fp32": side(2.0),
    }
    record = {"kind": "inference", "shape": [50, 1, 128], "dtype": "fp32", "sides": sides}
    goal = goals.RECURRENT["lstm", "inference", (50, 1, 128), "fp32"]
    text = "2.00 × (2.00 to 2.00) onnxruntime fp32, 25% of the product limit: must met"
    assert cell(record, goal, "") == text
    del sides["onnxruntime fp32"]
    assert "3.00 × (3.00 to 3.00) torch fp32 (without onnxruntime fp32)" in cell(record, goal, "")
    assert cell({**record, "dtype": "bf16"}, goal, "") == report.NOT_MEASURED


def test_table_says_what_is_not_measured():
    table = report.recurrent_table({})
    options = sum(kind.startswith("options") for _, kind, *_ in goals.RECURRENT)
    assert table.count(report.NOT_MEASURED) == len(goals.RECURRENT) + options + 2


def test_a_wrong_side_is_not_timed(recorder):
    sides, exact, _ = recurrent.inference_sides("gru", SHAPE, "fp32", 1)
    right = sides["fastdl fp32"]
    sides["fastdl fp32"] = lambda: [t * 1.001 for t in right()]
    with pytest.raises(accuracy.IncorrectResult, match=r"fastdl fp32: relative error .* not timed"):
        recurrent.measure(sides, dict.fromkeys(sides, exact), False, 1)


def test_inference_runs_with_prepared_weights():
    """Modules are made outside inference mode, else fastdl would pack its weights at every call."""
    from fastdl.nn import _recurrent_inference

    sides, exact, _ = recurrent.inference_sides("lstm", SHAPE, "bf16", 1)
    ours = {"fastdl bf16": sides["fastdl bf16"]}
    before = set(_recurrent_inference._kept)
    recurrent.measure(ours, {"fastdl bf16": exact}, False, 1, types.SimpleNamespace(pedantic=lambda *a, **k: None))
    assert len(set(_recurrent_inference._kept) - before) == 1


@pytest.mark.parametrize("side", ["fastdl", "torch"])
def test_memory_of_a_training_step(side):
    """At least what the gates of all steps and the weights take."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not reset a process's peak")
    steps, batch, hidden = 40, 32, 128
    found = recurrent_memory.peak(side, "lstm", (steps, batch, hidden), 1)
    assert found > 4 * (4 * steps * batch * hidden + 2 * 8 * hidden * hidden)
    assert found < 1e9
