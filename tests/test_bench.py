"""The benchmark harness's own logic: turns, ratios, files, peers, tables. Nothing depends on how fast anything is."""

from __future__ import annotations

import json
import math
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # bench/ is not installed

from bench import accuracy, goals, hardware, limits, peers, report, results, timing  # noqa: E402

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
stepping\t: 8
flags\t\t: fpu avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16

processor\t: 1
flags\t\t: fpu
"""
FLAGS = {
    "amx": hardware.parse_cpuinfo(CPUINFO)["flags"],
    "avx512": ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"],
    "avx2": ["avx2", "fma", "f16c"],
    "scalar": [],
}


def machine(level: str = "avx512", model: str = "Some CPU 7") -> dict:
    return {"model": model, "best_level": level, "cores": 2, "flags": FLAGS[level]}


def speed(level: str, metric: str, ratio: float, share: float = 0.5) -> dict:
    spread = {"median": ratio, "min": ratio, "max": ratio, "rounds": 1}
    peer = {"setting": "fa=1", "tokens_per_s": spread, "ratio": spread}
    return {
        "level": level, "metric": metric, "activation": "auto", "mean_kl": 3e-3, "same_top": 0.97, "reference": "x",
        "tokens_per_s": spread, "share_of_limit": share, "missing": [], "peers": {"llama.cpp": peer},
    }  # fmt: skip


def test_cpuinfo_names_model_flags_and_level():
    found = hardware.parse_cpuinfo(CPUINFO)
    assert found["model"].startswith("Intel(R) Xeon") and found["family_model_stepping"] == "6/143/8"
    assert {"avx2", "amx_bf16"} <= set(found["flags"]) and "fpu" not in found["flags"]
    assert hardware.slug({**found, "best_level": "amx", "cores": 2}) == "intel-xeon-platinum-8481c-amx-2c"


@pytest.mark.parametrize("best", FLAGS)
def test_best_level_of_flags(best):
    assert hardware.best_level(FLAGS[best]) == best


def test_hardware_of_this_machine_can_be_stored():
    found = hardware.describe()
    assert found["cores"] >= 1 and found["best_level"] in (*hardware.LEVELS, "scalar")
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("text", "size"), [("32768K", 32 << 20), ("1M", 1 << 20), ("64", 64)])
def test_parse_size(text, size):
    assert hardware.parse_size(text) == size


def test_parse_size_refuses_other_text():
    with pytest.raises(ValueError, match="expected a size"):
        hardware.parse_size("many")


def test_sides_take_turns():
    order = []
    sides = {name: lambda name=name: order.append(name) or name * 2 for name in "AB"}
    assert timing.take_turns(sides, 3) == {"A": ["AA"] * 3, "B": ["BB"] * 3}
    assert order == list("ABABAB")


def test_pytest_benchmark_drives_the_rounds():
    class Fixture:
        def pedantic(self, fn, rounds, iterations, warmup_rounds):
            assert (iterations, warmup_rounds) == (1, 0)
            for _ in range(rounds):
                fn()

    assert timing.take_turns({"A": lambda: 1}, 4, Fixture()) == {"A": [1] * 4}


def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        timing.take_turns({}, 0)


def test_ratio_is_taken_within_each_round():
    drifting = timing.paired_ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])  # the machine slowed down, the ratio did not
    assert drifting == {"median": 2.0, "min": 2.0, "max": 2.0, "rounds": 3}
    with pytest.raises(ValueError, match="got 1 and 2"):
        timing.paired_ratio([1.0], [1.0, 2.0])


def test_calls_for_stays_in_bounds():
    assert timing.calls_for(lambda: None, target_s=1e-4, limit=16) in range(1, 17)


def test_a_new_run_replaces_its_records_and_drops_runs_without_any():
    first = results.merge(None, machine(), "r1", {"limits": 1}, {"a": {"x": 1}, "b": {"x": 2}})
    second = results.merge(first, machine(), "r2", {"limits": 2}, {"a": {"x": 3}})
    assert second["records"] == {"a": {"x": 3, "run": "r2"}, "b": {"x": 2, "run": "r1"}} and len(second["runs"]) == 2
    third = results.merge(second, machine(), "r3", {"limits": 3}, {"b": {"x": 4}})
    assert set(third["runs"]) == {"r2", "r3"}


def test_save_and_load_by_hardware(tmp_path):
    for level in ("avx2", "amx"):
        path = results.path_for(tmp_path, machine(level), "llm")
        results.save(path, machine(level), "r1", {"limits": {}}, {f"{level}/decode": speed(level, "decode", 2.0)})
        results.save(path, machine(level), "r2", {"limits": {}}, {f"{level}/prefill": speed(level, "prefill", 2.0)})
    found = results.load_all(tmp_path)
    assert [content["hardware"]["best_level"] for content in found["llm"]] == ["amx", "avx2"]
    assert [len(content["records"]) for content in found["llm"]] == [2, 2]
    assert not list(tmp_path.glob("*.part"))


def test_load_refuses_a_file_under_another_machine_s_name(tmp_path):
    (tmp_path / "other-llm.json").write_text(json.dumps({"hardware": machine(), "runs": {}, "records": {}}))
    with pytest.raises(ValueError, match="expected a name that starts with some-7-avx512-2c"):
        results.load_all(tmp_path)


def test_results_in_the_repository_can_be_read_and_reported():
    report.details(results.load_all())


@pytest.mark.parametrize(
    ("value", "share", "verdict"),
    [
        (1.0, None, "MISSED"),
        (1.4, None, "must met"),
        (1.9, None, "aim met"),
        (1.4, 0.85, "aim met"),
        (1.0, 0.9, "MISSED"),
    ],
)
def test_verdict_of_decode(value, share, verdict):
    assert goals.SPEED["avx2", "decode"].verdict(value, share) == verdict


@pytest.mark.parametrize(("value", "verdict"), [(1.6, "MISSED"), (1.4, "must met"), (1.1, "aim met")])
def test_verdict_of_memory(value, verdict):
    assert goals.MEMORY.verdict(value) == verdict


def test_nan_meets_no_goal():
    assert goals.MEMORY.verdict(math.nan) == "MISSED" and goals.SPEED["amx", "decode"].verdict(math.nan) == "MISSED"


def test_readme_tables_are_the_results(tmp_path):
    """The README's figures are those of bench/results, as --readme writes them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(readme, encoding="utf-8")
    report.main(["--readme", str(copy)])
    assert copy.read_text(encoding="utf-8") == readme, "run: python -m bench.report --readme README.md"


def test_goal_table_says_what_is_not_measured(tmp_path):
    assert report.goal_table({}).count(report.NOT_MEASURED) == 3 * 2 + 2 + 1
    path = results.path_for(tmp_path, machine(), "llm")
    results.save(path, machine(), "r1", {"limits": {}}, {"avx512/decode": speed("avx512", "decode", 1.5)})
    rows = report.goal_table(results.load_all(tmp_path)).splitlines()
    row = next(line for line in rows if "decode, batch 1, 128 tokens, AVX-512" in line)
    assert "1.50 × (1.50 to 1.50)" in row and "must met" in row and "Some CPU 7, 2 cores" in row
    assert any("AMX" in line and report.NOT_MEASURED in line for line in rows)


def test_every_kind_of_record_has_lines_and_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    one = {"median": 1.0, "min": 1.0, "max": 1.0, "rounds": 1}
    side = {
        "seconds": one, "relative_error": 1e-3, "activation": "int8", "weight_gb_per_s": 1.0,
        "share_of_read_limit": 0.5, "gflop_per_s": 1.0, "share_of_product_limit": 0.5,
        "speedup_over": {"torch bf16": one},
    }  # fmt: skip
    product = {"level": "avx512", "rows": 1, "shape": [48, 64], "missing": [], "sides": {"fastdl q4_1 auto": side}}
    run = {"when": "now", "commit": "c", "threads": 2, "versions": {}, "peers": {}, "limits": {"2": {}}}
    llm = {
        "avx512/decode": speed("avx512", "decode", 1.5), "avx512/prefill": speed("avx512", "prefill", 1.5),
        "avx512/accuracy": {"level": "avx512", "fastdl": {a: {"mean_kl": 1e-7} for a in ("int8", "bf16", "fp32")}},
        "avx512/memory": {"level": "avx512", "over_file_size": 1.1, "prompt_tokens": 512, "decode_tokens": 128},
    }  # fmt: skip
    for bench, records in (("llm", llm), ("quant_matmul", {"avx512/48x64/1": product})):
        results.save(results.path_for(tmp_path, machine(), bench), machine(), "r1", run, records)
    report.main(["--results", str(tmp_path), "--details", "--plots"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"} and len(list(tmp_path.iterdir())) == 4


def test_divergence_of_known_distributions():
    exact = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32))
    tested = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], dtype=np.float32)) + 7  # a shift of all logits means nothing
    found = accuracy.divergence(exact, tested)
    assert found["mean_kl"] == pytest.approx(0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)), rel=1e-3)
    assert accuracy.divergence(exact, exact) == {"mean_kl": 0.0, "same_top": 1.0}
    assert math.isnan(accuracy.divergence(exact, np.full_like(exact, math.nan))["mean_kl"])
    with pytest.raises(ValueError, match="one shape"):
        accuracy.divergence(exact, exact[:1])


def test_english_is_long_enough():
    assert len(accuracy.english()) > 20_000


def fake_llama_bench(folder: Path, name: str = "llama-bench") -> str:
    """A llama-bench that answers at once: 400 prompt tokens a second, 100 new ones."""
    rows = [
        {"n_prompt": 512, "n_gen": 0, "avg_ts": 400.0, "build_commit": "abc", "build_number": 7},
        {"n_prompt": 0, "n_gen": 128, "avg_ts": 100.0, "build_commit": "abc", "build_number": 7},
    ]
    path = folder / name
    path.write_text(f"#!/bin/sh\necho 'some warning'\necho '{json.dumps(rows)}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def no_peers(monkeypatch):
    for name in peers.VARIABLES.values():
        for suffix in ("", "_AMX", "_AVX512", "_AVX2"):
            monkeypatch.delenv(name + suffix, raising=False)
    monkeypatch.delenv("FASTDL_LLAMA_PYTHON", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")


def test_llama_bench_output_is_read(tmp_path):
    peer = peers.LlamaBench("llama.cpp", fake_llama_bench(tmp_path))
    assert peer.run("m.gguf", prompt=512, new=128, threads=2) == {"prefill": 400.0, "decode": 100.0}
    assert peer.version("m.gguf") == "llama.cpp abc (build 7)"


def test_a_failing_peer_says_what_was_run(tmp_path):
    path = tmp_path / "llama-bench"
    path.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    path.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended with 1: no such flag"):
        peers.LlamaBench("llama.cpp", str(path)).run("m.gguf", prompt=1, new=0, threads=1)


def test_peer_for_each_level(tmp_path, monkeypatch, no_peers):
    best, narrow = fake_llama_bench(tmp_path, "best"), fake_llama_bench(tmp_path, "narrow")
    monkeypatch.setenv("FASTDL_LLAMA_BENCH", f"{best}:{narrow}")
    monkeypatch.setenv("FASTDL_LLAMA_BENCH_AVX2", narrow)
    assert [peer.binary for peer in peers.llama_bench("llama.cpp", "avx512", FLAGS["avx512"])] == [best, narrow]
    assert [peer.binary for peer in peers.llama_bench("llama.cpp", "avx2", FLAGS["avx512"])] == [narrow]
    with pytest.raises(peers.MissingPeer, match="level avx512: set FASTDL_LLAMA_BENCH_AVX512"):
        peers.llama_bench("llama.cpp", "avx512", FLAGS["amx"])  # the best build would use AMX


def test_a_missing_peer_is_named(monkeypatch, no_peers):
    with pytest.raises(peers.MissingPeer, match=r"ik_llama\.cpp for level avx2: set FASTDL_IK_LLAMA_BENCH"):
        peers.llama_bench("ik_llama.cpp", "avx2", FLAGS["avx2"])
    monkeypatch.setenv("FASTDL_LLAMA_BENCH", "/nonexistent/llama-bench")
    with pytest.raises(peers.MissingPeer, match="cannot be run"):
        peers.llama_bench("llama.cpp", "avx2", FLAGS["avx2"])


@pytest.mark.parametrize("seen", [{"read_100MB": 50.0, "read_2000MB": 30.0}, {"torch_sum_100MB": 20.0}])
def test_read_limit_fits_the_working_set(seen):
    small = limits.read_limit(seen, 10**8)
    assert small == seen.get("read_100MB", 20.0) and limits.read_limit(seen, 10**9) <= small


def test_product_limit_is_that_of_the_level_s_instruction():
    seen = {"fma": 1.0, "fma_avx2": 2.0, "int8": 3.0, "int8_avx2": 4.0, "bf16": 5.0, "amx_bf16": 6.0}
    wanted = {("amx", "bf16"): 6.0, ("avx512", "int8"): 3.0, ("avx512", "bf16"): 5.0, ("avx512", "fp32"): 1.0,
              ("avx2", "int8"): 4.0, ("avx2", "bf16"): 2.0, ("avx2", "fp32"): 2.0}  # fmt: skip
    assert {key: limits.product_limit(seen, *key) for key in wanted} == wanted
    assert limits.product_limit({"torch_matmul_fp32": 9.0}, "avx512", "int8") == 9.0
    with pytest.raises(KeyError):
        limits.product_limit({}, "avx2", "int8")


def test_limits_probe_compiles_and_reads_where_there_is_a_compiler(tmp_path):
    probe = limits.compile_probe(tmp_path)
    if probe is None:
        pytest.skip("no C compiler, or not an x86-64 machine")
    assert limits.reading(probe, "read", 1_000_000, 1) > 0
    assert limits.reading(probe, "no_such_rate", 1) is None


def test_quant_matmul_sides_are_checked_before_they_are_timed():
    pytest.importorskip("pytest_benchmark")
    torch = pytest.importorskip("torch")
    from bench import bench_quant_matmul as room

    x, first = torch.ones(2, 64), torch.ones(3, 64)
    exact = torch.full((2, 3), 64.0, dtype=torch.float64)
    side = room.Side([first, first], lambda w: x @ w.T, exact, 1e-5, first.nbytes, "fp32")
    assert side.check() == 0.0
    side.product = lambda w: x @ w.T * torch.nan
    with pytest.raises(accuracy.IncorrectResult, match="not timed"):
        side.check()
    assert room.copies(10**12) == 2 and room.copies(10**6) >= 128
