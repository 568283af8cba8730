"""The recurrent rooms' part of the report: rows of must, aim and measured, and lines of their records.

Test: tests/test_bench_recurrent.py
"""

from __future__ import annotations

from bench import goals, hardware
from bench.cells import LEVEL_NAMES, NOT_MEASURED, pick, rows, times
from bench.goals import Goal

ROOMS = ("lstm", "gru", "rnn")
OPTION_NAMES = {"layer_norm": "with layer norm", "zoneout": "with zoneout"}
MODES = {"options_inference": "inference", "options_training": "training step"}
DTYPE_NAMES = {"fp32": "fp32", "bf16": "bf16 weights"}
GPU_KINDS = {"forward": "forward", "forward_backward": "forward and backward"}
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
    """One row a promise of goals.RECURRENT (two for those of options), and the GPU's."""
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
    return "\n".join(made + gpu_recurrent_rows(found))


def level_rows(
    what: str, found: dict[str, list[dict]], room: str, case: tuple, goal: Goal | None, option: str = ""
) -> list[str]:
    """One row for every level and machine that has measured it."""
    kind, shape, dtype = case
    contents = [content for content in found.get(room, []) if not content["hardware"].get("gpu")]
    made = []
    for level in (*hardware.LEVELS, "scalar"):
        records = pick(contents, f"{level}/{kind}/{'x'.join(map(str, shape))}/{dtype}")
        cells = [(cell(record, goal, option), machine) for record, machine in records]
        if cells:
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
