"""The recurrent rooms' part of the report: rows of must, aim and measured, and lines of their records.

Test: tests/test_bench_recurrent.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench import goals, hardware
from bench.cells import LEVEL_NAMES, NOT_MEASURED, pick, rows, times
from bench.goals import Goal

ROOMS = ("lstm", "gru", "rnn")
OPTION_NAMES = {"layer_norm": "with layer norm", "zoneout": "with zoneout"}
MODES = {"options_inference": "inference", "options_training": "training step"}
DTYPE_NAMES = {"fp32": "fp32", "bf16": "bf16 weights"}
GPU_KINDS = {"forward": "forward", "forward_backward": "forward and backward"}
SCAN_KIND_NAMES = {"forward": "forward", "gradients": "forward and gradients"}
SCAN_CHANNELS = {"linear_scan": "channels", "selective_scan": "channels of 16 states"}
SCAN_PEER_NAMES = {("loop",): "a Python loop", ("chunked", "associative_scan"): "the best torch formulation"}
GPU_CASES = "batch 1 to 64, hidden 256 to 1024, T 100 to 512"


def case_name(shape: tuple[int, ...]) -> str:
    """'T 50, batch 16, hidden 256'"""
    return f"T {shape[0]}, batch {shape[1]}, hidden {shape[2]}"


def bounds(goal: Goal | None) -> tuple[str, str]:
    """The cells of must and aim."""
    if goal is None:
        return "", ""
    sign = "≤ " if goal.at_most else ""
    return f"{sign}{goal.must} ×", "" if goal.aim is None else f"{sign}{goal.aim} ×"


def verdict(goal: Goal | None, value: float) -> str:
    return "" if goal is None else f": {goal.verdict(value)}"


def recurrent_table(found: dict[str, list[dict]]) -> str:
    """One row a promise of goals.RECURRENT (two for those of options) and of goals.SCANS, and the GPU's."""
    made = ["| recurrent layers | must | aim | measured | on |", "| --- | --- | --- | --- | --- |"]
    for (room, kind, shape, dtype), goal in goals.RECURRENT.items():
        if kind.startswith("options"):
            for option, name in OPTION_NAMES.items():
                what = f"{room.upper()} {name}, {MODES[kind]}, {case_name(shape)}, time over plain fastdl"
                made += level_rows(what, found, room, (kind, shape, dtype), goal, option)
            continue
        if kind == "memory":
            what = f"{room.upper()} training step, {case_name(shape)}, memory over torch"
        elif kind == "training":
            what = f"{room.upper()} training step, {case_name(shape)}, {DTYPE_NAMES[dtype]}, over torch"
        else:
            peers = goals.recurrent_peers(kind, shape, dtype)
            over = f"the best of {' and '.join(peers)}" if len(peers) > 1 else peers[0]
            what = f"{room.upper()} inference, {case_name(shape)}, {DTYPE_NAMES[dtype]}, over {over}"
        made += level_rows(what, found, room, (kind, shape, dtype), goal)
    return "\n".join(made + scan_rows(found) + gpu_recurrent_rows(found))


def level_rows(
    what: str, found: dict[str, list[dict]], room: str, case: tuple, goal: Goal | None, option: str = ""
) -> list[str]:
    """One row for every level and machine that has measured it."""
    kind, shape, dtype = case
    contents = [content for content in found.get(room, []) if not content["hardware"].get("gpu")]

    def cells_at(level: str) -> list[tuple[str, dict]]:
        records = pick(contents, f"{level}/{kind}/{'x'.join(map(str, shape))}/{dtype}")
        return [(cell(record, goal, option), machine) for record, machine in records]

    return rows_of_levels(what, goal, cells_at)


def rows_of_levels(what: str, goal: Goal | None, cells_at: Callable[[str], list[tuple[str, dict]]]) -> list[str]:
    """The rows of the cells that every level has; one that says so when none has any."""
    made = []
    for level in (*hardware.LEVELS, "scalar"):
        if cells := cells_at(level):
            made += rows(f"{what}, {LEVEL_NAMES[level]}", *bounds(goal), cells)
    return made or rows(what, *bounds(goal), [])


def cell(record: dict, goal: Goal | None, option: str) -> str:
    """'1.52 × (1.43 to 1.60) onnxruntime fp32: must met'"""
    kind, shape, dtype = record["kind"], record["shape"], record["dtype"]
    if option or kind == "memory":
        ratio = record["time_over_plain"][option] if option else record["over_torch"]
        return times(ratio) + verdict(goal, ratio["median"])
    wanted = goals.recurrent_peers(kind, tuple(shape), dtype)
    present = [peer for peer in wanted if peer in record["sides"]]
    if not present:
        return NOT_MEASURED
    best = min(present, key=lambda peer: record["sides"][peer]["seconds"]["median"])
    ours = record["sides"][f"fastdl {dtype}"]
    ratio = ours["speedup_over"][best]
    without = [peer for peer in wanted if peer not in present]
    text = f"{times(ratio)}" + (f" {best}" if len(wanted) > 1 else "")
    text += f" (without {', '.join(without)})" if without else ""
    return f"{text}, {share(ours)}" + verdict(goal, ratio["median"])


def share(side: dict) -> str:
    """Of the limit that binds it more."""
    if side.get("share_of_read_limit", 0) > side["share_of_product_limit"]:
        return f"{side['share_of_read_limit']:.0%} of the cache's read limit"
    return f"{side['share_of_product_limit']:.0%} of the product limit"


def scan_rows(found: dict[str, list[dict]]) -> list[str]:
    """One row a case of goals.SCANS, level and machine."""
    made = []
    for case, goal in goals.SCANS.items():
        room, kind, (batch, time, channels), dtype, peers = case
        size = f"T {time}, " + (f"batch {batch}, " if batch > 1 else "") + f"{channels} {SCAN_CHANNELS[room]}"
        what = f"{room} {SCAN_KIND_NAMES[kind]}, {size}, {dtype}, over {SCAN_PEER_NAMES[peers]}"
        made += rows_of_levels(what, goal, partial(scan_cells, found, case, goal))
    return made


def scan_cells(found: dict[str, list[dict]], case: tuple, goal: Goal | None, level: str) -> list[tuple[str, dict]]:
    """The cells of every machine that has measured one of the peers at that level."""
    room, kind, shape, dtype, peers = case
    cells = []
    for content in found.get(room, []):
        records = {}
        for peer in peers:
            key = f"{level}/{goals.scan_kind(room, kind, peer)}/{'x'.join(map(str, shape))}/{dtype}"
            records[peer] = content["records"].get(key)
        if any(records.values()):
            cells.append((scan_cell(records, goal), content))
    return cells


def scan_cell(records: dict[str, dict | None], goal: Goal | None) -> str:
    """'4.10 × (4.00 to 4.20) chunked, 31% of the read limit: must met'; the smallest of the ratios counts.

    records: one for every peer, timed each with fastdl in turn; None where a peer was not measured
    """
    present = {peer: record for peer, record in records.items() if record}
    best, record = min(present.items(), key=lambda item: item[1]["ratio"]["median"])
    without = [peer for peer in records if peer not in present]
    text = times(record["ratio"]) + (f" {best}" if len(records) > 1 else "")
    text += f" (without {', '.join(without)})" if without else ""
    read = record["sides"]["fastdl"]["share_of_read_limit"]
    return f"{text}, {read:.0%} of the read limit" + verdict(goal, record["ratio"]["median"])


def gpu_recurrent_rows(found: dict[str, list[dict]]) -> list[str]:
    """The better of the back ends over cuDNN, one row a case."""
    goal, made = goals.RECURRENT_GPU, []
    for content in (content for content in found.get("lstm", []) if content["hardware"].get("gpu")):
        for _, record in sorted(content["records"].items()):
            ours = {name: side for name, side in record["sides"].items() if name.startswith("fastdl")}
            name, best = min(ours.items(), key=lambda item: item[1]["seconds"]["median"])
            what = f"on a GPU: LSTM {GPU_KINDS[record['kind']]}, {case_name(record['shape'])}, bf16, over cuDNN"
            text = NOT_MEASURED
            if ratio := best["speedup_over"].get("cuDNN"):
                text = f"{times(ratio)} ({name.removeprefix('fastdl ')})" + verdict(goal, ratio["median"])
            made += rows(what, *bounds(goal), [(text, content)])
    if made:
        return made
    return [row for name in GPU_KINDS.values()
            for row in rows(f"on a GPU: LSTM {name}, {GPU_CASES}, bf16, over cuDNN", *bounds(goal), [])]  # fmt: skip


def recurrent_lines(key: str, record: dict) -> list[str]:
    """Every side of a record of the CPU."""
    if record["kind"] == "memory":
        amounts = ", ".join(f"{name} {value['median'] / 1e6:.1f} MB" for name, value in record["bytes"].items())
        return [f"- {key}: {times(record['over_torch'])} torch's memory; {amounts}"]
    made = []
    for name, side in record["sides"].items():
        over = "; ".join(f"{times(ratio)} {peer}" for peer, ratio in side["speedup_over"].items())
        read = ""
        if "weight_gb_per_s" in side:
            read = f"weights {side['weight_gb_per_s']} GB/s, "
            if "share_of_read_limit" in side:
                read = f"weights {side['weight_gb_per_s']} GB/s = {side['share_of_read_limit']:.0%} of the limit, "
        made.append(
            f"- {key}: {name}: {side['seconds']['median'] * 1e3:.3f} ms, {read}{side['gflop_per_s']:,.0f} GFLOP/s = "
            f"{side['share_of_product_limit']:.0%} of the product limit, relative error {side['relative_error']:.1e}"
            + (f"; {over}" if over else "")
        )
    for option, ratio in record.get("time_over_plain", {}).items():
        made.append(f"- {key}: {OPTION_NAMES[option]}: {times(ratio)} the time of the plain layer")
    return made + [f"- {key}: missing: {text}" for text in record["missing"]]
