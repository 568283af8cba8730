"""Cells and rows that the tables of bench/report.py and bench/recurrent_report.py share."""

from __future__ import annotations

NOT_MEASURED = "not yet measured"
LEVEL_NAMES = {"amx": "AMX", "avx512": "AVX-512", "avx2": "AVX2", "scalar": "scalar"}


def times(value: dict) -> str:
    """'2.31 × (2.25 to 2.40)'"""
    return f"{value['median']:.2f} × ({value['min']:.2f} to {value['max']:.2f})"


def number(value: dict, digits: int = 0) -> str:
    """'412 (405 to 420)'"""
    return f"{value['median']:,.{digits}f} ({value['min']:,.{digits}f} to {value['max']:,.{digits}f})"


def rows(name: str, must: str, aim: str, cells: list[tuple[str, dict]]) -> list[str]:
    """One row a machine; one row that says so when none has measured it."""
    if not cells:
        return [f"| {name} | {must} | {aim} | {NOT_MEASURED} | |"]
    return [f"| {name} | {must} | {aim} | {cell} | {machine_name(machine)} |" for cell, machine in cells]


def pick(contents: list[dict], key: str) -> list[tuple[dict, dict]]:
    """(record, file) of every machine that has a record under that key."""
    return [(content["records"][key], content) for content in contents if key in content["records"]]


def machine_name(content: dict) -> str:
    machine = content["hardware"]
    if machine.get("gpu"):
        return machine["model"]
    return f"{machine['model']}, {machine['cores']} cores, {LEVEL_NAMES[machine['best_level']]}"
