"""Result files: bench/results/<hardware>-<bench>.json; figures of a GPU are named by the GPU.

    {"hardware": {...}, "runs": {id: {"when", "versions", "limits", "peers"}}, "records": {key: {..., "run": id}}}

A new run replaces the records it made again and keeps the others; a run that no record points to is dropped. So
every figure stands beside the limits, versions and peers of the run it came from.

Test: tests/test_bench.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from bench import hardware

RESULTS = Path(__file__).resolve().parent / "results"


def path_for(directory: Path, machine: dict, bench: str) -> Path:
    """bench/results/amd-epyc-avx512-2c-llm.json"""
    return directory / f"{hardware.slug(machine)}-{bench}.json"


def merge(old: dict | None, machine: dict, run_id: str, run: dict, records: dict[str, dict]) -> dict:
    """The file's new content: `records` (key -> figures) of this run laid over the old ones."""
    kept = dict(old["records"]) if old else {}
    runs = dict(old["runs"]) if old else {}
    kept.update({key: {**record, "run": run_id} for key, record in records.items()})
    runs[run_id] = run
    used = {record["run"] for record in kept.values()}
    return {
        "hardware": machine,
        "runs": {k: v for k, v in sorted(runs.items()) if k in used},
        "records": dict(sorted(kept.items())),
    }


def save(path: Path, machine: dict, run_id: str, run: dict, records: dict[str, dict]) -> None:
    """Merge into the file at `path`; the old file stays whole until the new one is complete."""
    old = json.loads(path.read_text()) if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(merge(old, machine, run_id, run, records), indent=1) + "\n")
    os.replace(part, path)


def load_all(directory: Path = RESULTS) -> dict[str, list[dict]]:
    """bench name -> contents of every results file of that bench, best hardware level first."""
    found: dict[str, list[dict]] = {}
    for path in sorted(directory.glob("*.json")):
        content = json.loads(path.read_text())
        prefix = hardware.slug(content["hardware"]) + "-"
        if not path.stem.startswith(prefix):
            raise ValueError(f"{path.name}: expected a name that starts with {prefix}")
        content["name"] = prefix[:-1]
        found.setdefault(path.stem[len(prefix) :], []).append(content)
    order = {level: i for i, level in enumerate((*hardware.LEVELS, "scalar", "gpu"))}
    for contents in found.values():
        contents.sort(key=lambda c: (order[c["hardware"].get("best_level", "gpu")], c["name"]))
    return found
