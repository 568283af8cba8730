"""The attention rooms' part of the report: rows of must, aim and measured, and lines of their records.

Test: tests/test_bench_attention.py
"""

from __future__ import annotations

from bench import goals, hardware
from bench.cells import LEVEL_NAMES, NOT_MEASURED, pick, rows, times

OPTIONS = {
    "full": "",
    "causal": ", causal",
    "bias": ", with bias",
    "mask": ", with mask",
    "valid_lens": ", with valid_lens",
}
KINDS = {"forward": "forward", "gradients": "forward and gradients"}


def case_key(level: str, kind: str, option: str, shape: tuple[int, ...], dtype: str) -> str:
    return f"{level}/{kind}/{option}/{'x'.join(map(str, shape))}/{dtype}"


def decode_key(level: str, shape: tuple[int, ...], dtype: str, cache: str) -> str:
    return f"{level}/decode/{'x'.join(map(str, shape))}/{dtype}/{cache}"


def additive_key(level: str, kind: str, shape: tuple[int, ...], dtype: str, peer: str) -> str:
    return f"{level}/{kind}/{'x'.join(map(str, shape))}/{dtype}/{peer}"


def bounds(goal: goals.Goal | None) -> tuple[str, str]:
    return ("", "") if goal is None else (f"{goal.must} ×", f"{goal.aim} ×")


def verdict(goal: goals.Goal | None, ratio: dict) -> str:
    return "" if goal is None else f": {goal.verdict(ratio['median'])}"


def attention_table(found: dict[str, list[dict]]) -> str:
    """One row a promise of goals.ATTENTION and goals.DECODE and a level that measured it, and the GPU's."""
    made = ["| attention over torch's SDPA | must | aim | measured | on |", "| --- | --- | --- | --- | --- |"]
    for (kind, option, shape, dtype), goal in goals.ATTENTION.items():
        what = f"{KINDS[kind]}{OPTIONS[option]}, {' x '.join(map(str, shape))}, {dtype}"
        keys = [(level, case_key(level, kind, option, shape, dtype)) for level in hardware.LEVELS]
        made += level_rows(what, found.get("attention", []), keys, goal, "share_of_product_limit", "of the peak")
    for (shape, dtype, cache), goal in goals.DECODE.items():
        heads, kv_heads, held = shape[1:4]
        what = f"decode, 1 query, {held} keys, {heads} query and {kv_heads} key heads, {dtype}"
        what += "" if cache == dtype else f", cache {cache}"
        keys = [(level, decode_key(level, shape, dtype, cache)) for level in hardware.LEVELS]
        made += level_rows(
            what, found.get("attention_decode", []), keys, goal, "share_of_read_limit", "of the read limit"
        )
    return "\n".join(made + gpu_attention_rows(found))


def gpu_attention_rows(found: dict[str, list[dict]]) -> list[str]:
    """Rows of attention_table for GPUs: the faster of the two back ends over the best of torch's."""
    made = []
    for room, (what, goal) in zip(("attention", "attention_decode"), goals.ATTENTION_GPU.items(), strict=True):
        must, aim = bounds(goal)
        rows_of_room = []
        for content in found.get(room, []):
            for _, record in sorted(content["records"].items()):
                peer = record.get("best_peer")
                if record.get("level") != "gpu" or peer is None:
                    continue
                ours = {name: side for name, side in record["sides"].items() if name.startswith("fastdl")}
                name, best = max(ours.items(), key=lambda item: item[1]["speedup_over"][peer]["median"])
                ratio, share = best["speedup_over"][peer], None
                cell = f"{times(ratio)} {peer} ({name.removeprefix('fastdl ')})"
                if room == "attention_decode":
                    share = best["share_of_copy"]
                    cell += f", {share:.0%} of the copy bandwidth"
                cell += f": {goal.verdict(ratio['median'], share)}"
                rows_of_room += rows(f"on a GPU: {gpu_case(record)}", must, aim, [(cell, content)])
        made += rows_of_room or [f"| on a GPU: {what} | {must} | {aim} | {NOT_MEASURED} | |"]
    return made


def gpu_case(record: dict) -> str:
    shape = record["shape"]
    if record["op"] == "attention":
        return f"{record['kind']}, causal, {' x '.join(map(str, shape))}, {record['dtype']}"
    what = f"decode, batch {shape[0]}, {shape[3]} keys, {shape[1]} query and {shape[2]} key heads of {shape[4]}, bf16"
    return what if record["cache"] == "bf16" else f"{what}, cache {record['cache']}"


ADDITIVE_KINDS = {**KINDS, "step": "forward, one query"}
ADDITIVE_PEERS = {"eager": "eager torch", "compile": "torch.compile"}


def additive_table(found: dict[str, list[dict]]) -> str:
    """One row a promise of goals.ADDITIVE and a level that measured it, and the memory's."""
    made = ["| additive attention | must | aim | measured | on |", "| --- | --- | --- | --- | --- |"]
    contents = found.get("additive_attention", [])
    for (kind, shape, dtype, peer), goal in goals.ADDITIVE.items():
        what = f"{ADDITIVE_KINDS[kind]}, {' x '.join(map(str, shape))}, {dtype}, over {ADDITIVE_PEERS[peer]}"
        keys = [(level, additive_key(level, kind, shape, dtype, peer)) for level in hardware.LEVELS]
        made += level_rows(what, contents, keys, goal, "share_of_product_limit", "of the peak")
    goal, cells = goals.ADDITIVE_MEMORY, []
    for level in hardware.LEVELS:
        key = additive_key(level, "memory", goals.ADDITIVE_SHAPE, "fp32", "eager")
        for record, machine in pick(contents, key):
            ratio = record["over_eager"]
            cells.append((f"{ratio['median']:.3f} ×: {goal.verdict(ratio['median'])}", machine))
    what = f"forward and gradients, {' x '.join(map(str, goals.ADDITIVE_SHAPE))}, fp32, peak memory over eager torch"
    return "\n".join(made + rows(what, f"≤ {goal.must} ×", "", cells))


def level_rows(
    what: str, contents: list[dict], keys: list[tuple[str, str]], goal: goals.Goal | None, share: str, of: str
) -> list[str]:
    cells = []
    for level, key in keys:
        for record, machine in pick(contents, key):
            value = record["sides"]["fastdl"][share]
            text = f"{times(record['ratio'])}" + (f", {value:.0%} {of}" if value else "")
            cells.append((level, text + verdict(goal, record["ratio"]), machine))
    must, aim = bounds(goal)
    made = [row for level, text, machine in cells
            for row in rows(f"{what}, {LEVEL_NAMES[level]}", must, aim, [(text, machine)])]  # fmt: skip
    return made or rows(what, must, aim, [])


def attention_lines(key: str, record: dict) -> list[str]:
    """One line a side of a record of these rooms."""
    if record.get("kind") == "memory":
        amounts = ", ".join(f"{name} {value['median'] / 1e6:.1f} MB" for name, value in record["bytes"].items())
        return [f"- {key}: {record['over_eager']['median']:.3f} × eager torch's memory; {amounts}"]
    if "ratio" not in record:
        return [f"- {key}: missing: {text}" for text in record["missing"]]
    made = []
    for name, side in record["sides"].items():
        share = side.get("share_of_product_limit", side.get("share_of_read_limit"))
        rate = f"{side['gflop_per_s']} GFLOP/s" if "gflop_per_s" in side else f"{side['gb_per_s']} GB/s"
        ratio = f"{times(record['ratio'])} {record.get('best', 'torch')}, " if name == "fastdl" else ""
        made.append(
            f"- {key}: {name}: {ratio}{side['seconds']['median'] * 1e6:.1f} us, {rate}"
            + (f" = {share:.0%} of the limit" if share else "")
            + f", relative error {side['relative_error']:.1e}"
        )
    return made
