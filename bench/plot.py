"""Plots of the results files, drawn with matplotlib: bars are medians over rounds, whiskers minimum and maximum.

Test: tests/test_bench.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench import hardware

COLORS = {
    "fastdl": "#1b6ca8", "llama.cpp": "#b5b5b5", "ik_llama.cpp": "#7d7d7d",
    "torch bf16": "#b5b5b5", "torch fp32": "#d9d9d9", "torchao int4": "#7d7d7d",
    "onnxruntime fp32": "#8fb08c", "OpenVINO fp32": "#c9b27c", "OpenVINO bf16": "#b58e3d",
}  # fmt: skip


def draw_all(found: dict[str, list[dict]], folder: Path) -> list[Path]:
    """A PNG for every results file that has something to draw."""
    drawn = []
    for bench, contents in found.items():
        for content in contents:
            panels = PANELS[bench](content["records"]) if bench in PANELS else []  # others: their table says all
            if panels:
                drawn.append(draw(panels, f"{bench}: {content['name']}", folder / f"{content['name']}-{bench}.png"))
    return drawn


def llm_panels(records: dict[str, dict]) -> list[dict]:
    """Tokens per second of fastdl and its peers: a panel each for prefill and decode, a group of bars a level."""
    panels = []
    for metric in ("prefill", "decode"):
        groups = {}
        for level in hardware.LEVELS:
            record = records.get(f"{level}/{metric}")
            if record is not None:
                peers = {name: peer["tokens_per_s"] for name, peer in record["peers"].items()}
                groups[level] = {"fastdl": record["tokens_per_s"], **peers}
        if groups:
            panels.append({"title": metric, "unit": "tokens/s", "groups": groups})
    return panels


def ratio_panels(records: dict[str, dict]) -> list[dict]:
    """Times as fast as each peer: a panel for each level and number of rows, a group of bars for each shape."""
    by_panel: dict[str, dict] = {}
    for key, record in sorted(records.items(), key=lambda item: (item[1]["level"], item[1]["rows"], item[0])):
        ours = next((s for name, s in record["sides"].items() if name.startswith("fastdl") and s["speedup_over"]), None)
        if ours is None:
            continue
        title = f"{record['level']}, {record['rows']} rows"
        shape = "x".join(map(str, record["shape"])) if "shape" in record else key
        by_panel.setdefault(title, {})[shape] = ours["speedup_over"]
    return [{"title": t, "unit": "times as fast as", "groups": groups} for t, groups in by_panel.items()]


def recurrent_panels(records: dict[str, dict]) -> list[dict]:
    """Times as fast as each peer: a panel for each level, kind and dtype, a group of bars for each time x batch x
    hidden; what options cost and the GPU are in the table."""
    by_panel: dict[str, dict] = {}
    for record in sorted(records.values(), key=lambda r: (r["level"], r["kind"], r["dtype"], r["shape"])):
        ours = record.get("sides", {}).get(f"fastdl {record['dtype']}")
        if ours is not None:
            title = f"{record['level']}, {record['kind']}, {record['dtype']}"
            by_panel.setdefault(title, {})["x".join(map(str, record["shape"]))] = ours["speedup_over"]
    return [{"title": t, "unit": "times as fast as", "groups": groups} for t, groups in by_panel.items()]


PANELS = {
    "llm": llm_panels, "quant_matmul": ratio_panels, "decoder_block": ratio_panels,
    **dict.fromkeys(("lstm", "gru", "rnn"), recurrent_panels),
}  # fmt: skip


def draw(panels: list[dict], title: str, path: Path) -> Path:
    """Grouped bars, one panel beside the other."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        names = list(dict.fromkeys(name for bars in panel["groups"].values() for name in bars))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = [g + i * width for g, bars in enumerate(panel["groups"].values()) if name in bars]
            values = [bars[name] for bars in panel["groups"].values() if name in bars]
            medians = [v["median"] for v in values]
            whiskers = [[v["median"] - v["min"] for v in values], [v["max"] - v["median"] for v in values]]
            bars = axis.bar(at, medians, width, yerr=whiskers, capsize=2, label=name, color=COLORS.get(name))
            axis.bar_label(bars, fmt=lambda v: f"{v:,.0f}" if v >= 20 else f"{v:.1f}", fontsize=7, padding=1)
        axis.set_xticks([g + 0.4 - width / 2 for g in range(len(panel["groups"]))], list(panel["groups"]), fontsize=8)
        if panel["unit"].startswith("times"):
            axis.axhline(1.0, color="black", linewidth=0.8)
        axis.margins(y=0.2)
        axis.set_title(panel["title"], fontsize=9)
        axis.set_ylabel(panel["unit"], fontsize=8)
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
