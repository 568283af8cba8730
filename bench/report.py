"""Tables and plots from the results files.

    python -m bench.report               the table of must, aim and measured, as markdown
    python -m bench.report --readme README.md      ... and the README's tables, between its markers
    python -m bench.report --details     every record of every results file, as markdown
    python -m bench.report --plots       also draw bench/results/<hardware>-<bench>.png (needs matplotlib)
    python -m bench.report --tables      also write bench/results/<hardware>-<bench>.md for every GPU

Test: tests/test_bench.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import goals, hardware, results
from bench.attention_report import additive_table, attention_lines, attention_table, gpu_attention_rows
from bench.cells import LEVEL_NAMES, NOT_MEASURED, machine_name, number, pick, rows, times
from bench.recurrent_report import ROOMS, gpu_recurrent_rows, recurrent_lines, recurrent_table

NORM_KINDS = {
    "add_norm": "residual add + layer_norm",
    "add_norm_sum": "residual add + layer_norm, the sum returned too",
    "norm": "layer_norm forward",
    "norm_gradients": "layer_norm and its gradients",
}
GPU_NORM_KINDS = {"norm": "{} forward", "norm_backward": "{} backward", "add_norm": "residual add + {}"}
METRIC_NAMES = {"prefill": "prefill, 512 tokens", "decode": "decode, batch 1, 128 tokens"}


def goal_table(found: dict[str, list[dict]]) -> str:
    """Must, aim and measured, one row a promise; a machine that has not measured it yet leaves 'not yet measured'."""
    llm = found.get("llm", [])
    lines = ["| fastdl against | must | aim | measured | on |", "| --- | --- | --- | --- | --- |"]
    for level in hardware.LEVELS:
        for metric in ("decode", "prefill"):
            goal = goals.SPEED[level, metric]
            aim = f"{goal.aim} ×" + (", or 80 % of the bandwidth limit" if metric == "decode" else "")
            name = f"{METRIC_NAMES[metric]}, {LEVEL_NAMES[level]}"
            cells = [(speed_cell(r, "llama.cpp", goal), m) for r, m in pick(llm, f"{level}/{metric}")]
            lines += rows(f"llama.cpp: {name}", f"{goal.must} ×", aim, cells)
        cells = [(ahead_cell(level, machine), machine) for _, machine in pick(llm, f"{level}/prefill")]
        if level != "amx":
            lines += rows(f"ik_llama.cpp: prefill and decode, {LEVEL_NAMES[level]}", "", "ahead", cells)
    memory = [(memory_cell(r), m) for level in hardware.LEVELS for r, m in pick(llm, f"{level}/memory")]
    lines += rows(
        "file size: peak of `generate` (512 + 128 tokens) less peak of `import torch`", "≤ 1.5 ×", "≤ 1.2 ×", memory
    )
    for activation, must in (("int8", "≤ 1.2 × llama.cpp's"), ("bf16", "≤ 2e-4"), ("fp32", "≤ 1e-6")):
        for level in hardware.LEVELS:
            cells = [(kl_cell(r, activation), m) for r, m in pick(llm, f"{level}/accuracy")]
            if cells:
                lines += rows(f"exact fp32: mean KL, {activation} activations, {LEVEL_NAMES[level]}", must, "", cells)
    return "\n".join(lines)


def speed_cell(record: dict, peer: str, goal: goals.Goal) -> str:
    if peer not in record["peers"]:
        return NOT_MEASURED
    ratio, share = record["peers"][peer]["ratio"], record["share_of_limit"]
    verdict = goal.verdict(ratio["median"], share if record["metric"] == "decode" else None)
    return f"{times(ratio)}, {share:.0%} of the limit: {verdict}"


def ahead_cell(level: str, content: dict) -> str:
    cells = []
    for metric in ("prefill", "decode"):
        record = content["records"].get(f"{level}/{metric}")
        if record is None or "ik_llama.cpp" not in record["peers"]:
            return NOT_MEASURED
        cells.append(f"{metric} {times(record['peers']['ik_llama.cpp']['ratio'])}")
    return ", ".join(cells)


def memory_cell(record: dict) -> str:
    value = record["over_file_size"]
    tokens = f"{record['prompt_tokens']} + {record['decode_tokens']} tokens"
    return f"{value:.2f} × ({tokens}): {goals.MEMORY.verdict(value)}"


def kl_cell(record: dict, activation: str) -> str:
    value = record["fastdl"][activation]["mean_kl"]
    if activation != "int8":
        return f"{value:.2g}: {goals.KL[activation].verdict(value)}"
    ratio = record.get("int8_over_llama.cpp")
    if ratio is None:
        return f"{value:.2g}; llama.cpp's {NOT_MEASURED}"
    return f"{value:.2g} = {ratio:.2f} × llama.cpp's: {goals.KL_OVER_LLAMA.verdict(ratio)}"


def lines(bench: str, records: dict[str, dict]) -> list[str]:
    """Plain lines of a bench's records, for the terminal and for --details."""
    made = []
    for key, record in sorted(records.items()):
        made += LINES[bench](key, record)
    return made


def llm_lines(key: str, record: dict) -> list[str]:
    if "metric" not in record:
        plain = {k: v for k, v in record.items() if k not in ("level", "run", "missing")}
        return [f"- {key}: {plain}"] + [f"- {key}: missing: {text}" for text in record.get("missing", [])]
    made = [
        f"- {key}: fastdl {number(record['tokens_per_s'])} tokens/s, {record['share_of_limit']:.0%} of the limit, "
        f"mean KL {record['mean_kl']:.2g} from {record['reference']}"
    ]
    for name, peer in record["peers"].items():
        made.append(
            f"- {key}: {times(peer['ratio'])} {name} ({peer['setting']}), {number(peer['tokens_per_s'])} tokens/s"
        )
    return made + [f"- {key}: missing: {text}" for text in record["missing"]]


def sides_lines(key: str, record: dict) -> list[str]:
    made = []
    for name, side in record["sides"].items():
        over = "; ".join(f"{times(ratio)} {peer}" for peer, ratio in side["speedup_over"].items())
        made.append(
            f"- {key}: {name} ({side['activation']}): {side['seconds']['median'] * 1e3:.3f} ms, "
            f"{side['weight_gb_per_s']} GB/s = {side['share_of_read_limit']:.0%} of the read limit, "
            f"{side['gflop_per_s']:,.0f} GFLOP/s = {side['share_of_product_limit']:.0%} of the product limit, "
            f"relative error {side['relative_error']:.1e}" + (f"; {over}" if over and name.startswith("fastdl") else "")
        )
    return made + [f"- {key}: missing: {text}" for text in record.get("missing", [])]


def products_table(found: dict[str, list[dict]]) -> str:
    """Q4_1 products with activation="auto" against the peers of bench_quant_matmul: median ratios, one row a shape."""
    peers = ("torch bf16", "torch fp32", "torchao int4")
    made = [f"| Q4_1 product, rows x weight | {' | '.join(peers)} | share of the limit | on |", "| --- " * 6 + "|"]
    for content in found.get("quant_matmul", []):
        for _, record in sorted(content["records"].items(), key=lambda item: (item[1]["shape"], item[1]["rows"])):
            side = record["sides"].get("fastdl q4_1 auto")
            if side is None:
                continue
            ratios = [side["speedup_over"].get(peer) for peer in peers]
            cells = [f"{ratio['median']:.2f} ×" if ratio else NOT_MEASURED for ratio in ratios]
            bound = "read" if side["share_of_read_limit"] >= side["share_of_product_limit"] else "product"
            share = f"{side[f'share_of_{bound}_limit']:.0%} ({bound})"
            name = f"{record['rows']} x {record['shape'][0]} x {record['shape'][1]} ({LEVEL_NAMES[record['level']]})"
            made.append(f"| {name} | {' | '.join(cells)} | {share} | {machine_name(content)} |")
    return "\n".join(made)


def norm_table(found: dict[str, list[dict]]) -> str:
    """layer_norm against torch's own ops, one row a kind of work, shape and dtype; the GPU's rows wait for one."""
    made = ["| layer_norm over torch's ops | must | aim | measured | on |", "| --- | --- | --- | --- | --- |"]
    measured = False
    cpus = [content for content in found.get("norm", []) if not content["hardware"].get("gpu")]
    for content in cpus:
        for _, record in sorted(content["records"].items()):
            rows, cols = record["shape"]
            goal = goals.NORM[record["kind"]]
            name = f"{NORM_KINDS[record['kind']]}, {rows} x {cols} {record['dtype']}, {LEVEL_NAMES[record['level']]}"
            cell = f"{times(record['ratio'])}: {goal.verdict(record['ratio']['median'])}"
            made.append(f"| {name} | {goal.must} × | {goal.aim} × | {cell} | {machine_name(content)} |")
            measured = True
    if not measured:
        made += [f"| {name} | {goals.NORM[kind].must} × | {goals.NORM[kind].aim} × | {NOT_MEASURED} | |"
                 for kind, name in NORM_KINDS.items()]  # fmt: skip
    return "\n".join(made + gpu_norm_rows(found))


def gpu_norm_rows(found: dict[str, list[dict]]) -> list[str]:
    """Rows of norm_table for GPUs: the better of the two back ends as a share of the copy bandwidth, and the peers."""
    gpus = [content for content in found.get("norm", []) if content["hardware"].get("gpu")]
    made = []
    for content in gpus:
        for _, record in sorted(content["records"].items()):
            goal, (rows, cols) = goals.GPU_NORM[record["kind"]], record["shape"]
            ours = {name: side for name, side in record["sides"].items() if name.startswith("fastdl")}
            name, best = max(ours.items(), key=lambda item: item[1]["share_of_copy"])
            over = "; ".join(f"{ratio['median']:.2f} × {peer}" for peer, ratio in best["speedup_over"].items())
            cell = f"{best['share_of_copy']:.0%} ({name.removeprefix('fastdl ')}): "
            cell += goal.verdict(best["share_of_copy"]) + (f"; {over}" if over else "")
            what = f"{GPU_NORM_KINDS[record['kind']].format(record['op'])}, {rows} x {cols} {record['dtype']}"
            made.append(f"| {what}, share of the copy bandwidth | {goal.must:.0%} | {goal.aim:.0%} | {cell} | "
                        f"{machine_name(content)} |")  # fmt: skip
    return made or [
        f"| on a GPU: forward, 8192 x 4096 and 32768 x 1024 bf16, share of the copy bandwidth | 85 % | 92 % | "
        f"{NOT_MEASURED} | |",
        f"| on a GPU: backward, and add + norm, share of the copy bandwidth | 70 % | 85 % | {NOT_MEASURED} | |",
    ]


def write_readme(path: Path, found: dict[str, list[dict]]) -> None:
    """Replace what stands between the markers of the README by the tables."""
    begin, end = "<!-- measured:begin -->", "<!-- measured:end -->"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    tables = f"{begin}\n{goal_table(found)}\n\n{products_table(found)}\n\n{norm_table(found)}\n\n"
    tables += f"{recurrent_table(found)}\n\n{attention_table(found)}\n\n{additive_table(found)}\n{end}"
    path.write_text(before + tables + rest.split(end)[1], encoding="utf-8")


def norm_lines(key: str, record: dict) -> list[str]:
    if record["level"] == "gpu":
        return gpu_lines(key, record)
    ours, theirs = record["sides"]["fastdl"], record["sides"]["torch"]
    return [
        f"- {key}: {times(record['ratio'])} torch, {ours['seconds']['median'] * 1e6:.1f} us and "
        f"{theirs['seconds']['median'] * 1e6:.1f} us, {ours['gb_per_s']} GB/s = {ours['share_of_read_limit']:.0%} of "
        f"the read limit, relative error {ours['relative_error']:.1e}"
    ]


def gpu_lines(key: str, record: dict) -> list[str]:
    made = []
    for name, side in record["sides"].items():
        over = "; ".join(f"{times(ratio)} {peer}" for peer, ratio in side["speedup_over"].items())
        made.append(
            f"- {key}: {name}: {side['seconds']['median'] * 1e6:.1f} us, {side['gb_per_s']:,.0f} GB/s = "
            f"{side['share_of_copy']:.0%} of the copy bandwidth, relative error {side['relative_error']:.1e}"
            + (f"; {over}" if over else "")
        )
    return made + [f"- {key}: missing: {text}" for text in record["missing"]]


LINES = {"llm": llm_lines, "quant_matmul": sides_lines, "decoder_block": sides_lines, "norm": norm_lines}
LINES |= dict.fromkeys(
    ("group_norm", "batch_norm", "activation", "rope", "position", "linear_scan", "selective_scan"), norm_lines
)
LINES |= dict.fromkeys(("attention", "attention_decode", "additive_attention"), lambda key, record:
                       (gpu_lines if record.get("level") == "gpu" else attention_lines)(key, record))  # fmt: skip
LINES |= dict.fromkeys(ROOMS, lambda key, record: gpu_lines(key, record) if record["level"] == "gpu" else
                       recurrent_lines(key, record))  # fmt: skip


def write_tables(folder: Path, found: dict[str, list[dict]]) -> list[Path]:
    """A GPU's own table and details, <gpu>-<bench>.md beside its results file."""
    written = []
    for bench, contents in found.items():
        for content in (content for content in contents if content["hardware"].get("gpu")):
            parts = [f"# {bench} on {machine_name(content)}"]
            table = {  # the rooms with goals
                "norm": gpu_norm_rows, "lstm": gpu_recurrent_rows, "attention": gpu_attention_rows,
                "attention_decode": gpu_attention_rows,
            }.get(bench)  # fmt: skip
            if table is not None:
                head = ["| what | must | aim | measured | on |", "| --- " * 5 + "|"]
                made = [row for row in table({bench: [content]}) if f"| {NOT_MEASURED} |" not in row]
                parts.append("\n".join([*head, *made]))
            path = folder / f"{content['name']}-{bench}.md"
            path.write_text("\n\n".join([*parts, details({bench: [content]})]) + "\n")
            written.append(path)
    return written


def details(found: dict[str, list[dict]]) -> str:
    """Every results file: the machine, the limits of each run, every record."""
    made = []
    for bench, contents in found.items():
        for content in contents:
            made += [f"### {bench}: {machine_name(content)}", ""]
            for run_id, run in content["runs"].items():
                made += [
                    f"Run {run_id}, commit {run['commit']}, {run['threads']} threads, {run['versions']}, {run['peers']}"
                ]
                for count, values in (run["limits"] or {}).items():
                    made += [f"- limits, {count if count == 'gpu' else f'{count} threads'}: {values}"]
            made += ["", *lines(bench, content["records"]), ""]
    return "\n".join(made)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the results files")
    parser.add_argument("--details", action="store_true", help="print every record too")
    parser.add_argument("--readme", type=Path, help="README whose tables to replace by these")
    parser.add_argument("--plots", action="store_true", help="draw a PNG beside each results file")
    parser.add_argument("--tables", action="store_true", help="write a table beside each results file of a GPU")
    options = parser.parse_args(arguments)
    found = results.load_all(options.results)
    print(goal_table(found))
    if options.readme:
        write_readme(options.readme, found)
    if options.details:
        print("\n" + details(found))
    if options.tables:
        for path in write_tables(options.results, found):
            print(f"written: {path}")
    if options.plots:
        from bench import plot

        for path in plot.draw_all(found, options.results):
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
