"""The benchmarks of rooms lstm, gru, rnn and the scans: peers, checks, records, tables. None depends on speed."""

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
    limits = {"1": {"fma": 100.0, "bf16": 200.0, "torch_matmul_fp32": 90.0, "read_100MB": 50.0}}  # noqa: RUF012

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
    monkeypatch.setattr(goals, "SCANS", {})
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
    assert table.count(report.NOT_MEASURED) == len(goals.RECURRENT) + options + len(goals.SCANS) + 2


RUN = {"when": "now", "commit": "c", "threads": 1, "versions": {}, "peers": {}, "limits": {}}
SCAN_GOALS = [
    ("linear_scan", kind, (1, 4096, 512), "fp32", peers)
    for peers in (("loop",), ("chunked", "associative_scan"))
    for kind in ("forward", "gradients")
]


@pytest.mark.parametrize(
    ("value", "verdict"), [(2.9, "MISSED"), (3.0, "must met"), (7.9, "must met"), (8.0, "aim met")]
)
@pytest.mark.parametrize("case", SCAN_GOALS)
def test_linear_scan_is_promised_over_both_peers_forward_and_with_gradients(case, value, verdict):
    assert goals.SCANS[case].verdict(value) == verdict


def scan_record(ratio: float, share: float = 0.5) -> dict:
    one = {"median": ratio, "min": ratio, "max": ratio, "rounds": 1}
    return {"level": "avx2", "ratio": one, "sides": {"fastdl": {"share_of_read_limit": share}}}


def scan_table(folder: Path, records: dict[str, dict], room: str = "linear_scan") -> list[str]:
    """The rows of linear_scan and selective_scan, with these records on file."""
    results.save(results.path_for(folder, MACHINE, room), MACHINE, "r1", RUN, records)
    table = report.recurrent_table(results.load_all(folder)).splitlines()
    return [row for row in table if row.startswith(("| linear_scan", "| selective_scan"))]


def test_the_best_torch_formulation_is_the_one_that_fastdl_beats_by_least(tmp_path):
    records = {
        "avx2/forward_over_loop/1x4096x512/fp32": scan_record(9.0),
        "avx2/forward_over_chunked/1x4096x512/fp32": scan_record(4.0, 0.25),
        "avx2/forward_over_associative_scan/1x4096x512/fp32": scan_record(5.0),
        "avx2/gradients_over_chunked/1x4096x512/fp32": scan_record(3.5),
        "avx2/gradients_over_associative_scan/1x4096x512/fp32": scan_record(2.5),
        "avx2/gradients_over_loop/16x1024x1024/fp32": scan_record(9.0),  # not the goal's shape and dtype
        "avx2/gradients_over_loop/1x4096x512/bf16": scan_record(9.0),
    }
    best, machine = "over the best torch formulation, AVX2", "Some CPU 7, 2 cores, AVX-512 |"
    case = "T 4096, 512 channels, fp32"
    assert scan_table(tmp_path, records)[:4] == [
        f"| linear_scan forward, {case}, over a Python loop, AVX2 | 3.0 × | 8.0 × | "
        f"9.00 × (9.00 to 9.00), 50% of the read limit: aim met | {machine}",
        f"| linear_scan forward and gradients, {case}, over a Python loop | 3.0 × | 8.0 × | {report.NOT_MEASURED} | |",
        f"| linear_scan forward, {case}, {best} | 3.0 × | 8.0 × | "
        f"4.00 × (4.00 to 4.00) chunked, 25% of the read limit: must met | {machine}",
        f"| linear_scan forward and gradients, {case}, {best} | 3.0 × | 8.0 × | "
        f"2.50 × (2.50 to 2.50) associative_scan, 50% of the read limit: MISSED | {machine}",
    ]


def test_a_torch_formulation_that_was_not_measured_is_named(tmp_path):
    rows = scan_table(tmp_path, {"avx512/forward_over_associative_scan/1x4096x512/fp32": scan_record(5.0)})
    (row,) = (row for row in rows if report.NOT_MEASURED not in row)
    assert "5.00 × (5.00 to 5.00) associative_scan (without chunked), 50% of the read limit: must met" in row


@pytest.mark.parametrize("kind", goals.SCAN_KINDS)
def test_what_the_scans_record_fills_their_rows(kind, recorder, tmp_path, monkeypatch):
    """Every row that a benchmark's records fill, and no other, at a shape that takes no time."""
    from bench import against_torch, bench_linear_scan, bench_selective_scan

    monkeypatch.setattr(against_torch.fastdl.backend, "cpu_level", lambda: "avx512")
    benches = {"linear_scan": bench_linear_scan, "selective_scan": bench_selective_scan}
    small = {"linear_scan": (1, 128, 8), "selective_scan": (1, 6, 8)}
    for room, bench in benches.items():
        assert {shape for name, _, shape, *_ in goals.SCANS if name == room} <= set(bench.SHAPES)
    assert {p for name, *_, peers in goals.SCANS if name == "linear_scan" for p in peers} == set(
        bench_linear_scan.PEERS
    )
    cases = {(r, k, small[r], dtype, peers): goal for (r, k, _, dtype, peers), goal in goals.SCANS.items()}
    monkeypatch.setattr(goals, "SCANS", cases)
    gradients, given = kind == "gradients", (small["linear_scan"], "fp32")
    for peer in bench_linear_scan.PEERS:
        bench_linear_scan.test_linear_scan(None, recorder, 1, 1, peer, gradients, *given)
    assert len(recorder.records) == len(bench_linear_scan.PEERS)  # none overwrites another
    scan_table(tmp_path, recorder.records)
    recorder.records.clear()
    bench_selective_scan.test_selective_scan(None, recorder, 1, 1, gradients, small["selective_scan"], "fp32")
    rows = scan_table(tmp_path, recorder.records, "selective_scan")
    filled = [row for row in rows if report.NOT_MEASURED not in row]
    name = {"forward": "forward, T", "gradients": "forward and gradients, T"}[kind]
    assert len(rows) == len(cases) and len(filled) == 3 and all(name in row and "without" not in row for row in filled)
    assert ": " in filled[0] and ": " in filled[1] and ": " not in filled[2]  # selective_scan has no goal
    assert "linear_scan" in (text := report.details(results.load_all(tmp_path))) and "selective_scan" in text


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
