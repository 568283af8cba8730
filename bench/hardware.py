"""What machine is this, and which versions ran: every results file begins with it.

Test: tests/test_bench.py
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

# The flags that decide which kernels run, under the names of /proc/cpuinfo.
KERNEL_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "torchao",
    "llama-cpp-python",
    "liger-kernel",
    "onnxruntime",
    "onnx",
    "openvino",
    "pytest-benchmark",
)
LEVELS = ("amx", "avx512", "avx2")  # best first; "scalar" is no speed claim


def parse_cpuinfo(text: str) -> dict:
    """First processor's entry of /proc/cpuinfo -> model, vendor, family/model/stepping, kernel flags."""
    fields = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "model": fields.get("model name", platform.processor() or platform.machine()),
        "vendor": fields.get("vendor_id", ""),
        "family_model_stepping": "/".join(fields.get(k, "?") for k in ("cpu family", "model", "stepping")),
        "flags": [f for f in KERNEL_FLAGS if f in flags],
    }


def best_level(flags: list[str]) -> str:
    """The best instruction level that the flags allow, as fastdl counts levels."""
    if {"amx_tile", "amx_int8", "amx_bf16"} <= set(flags):
        return "amx"
    if {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"} <= set(flags):
        return "avx512"
    return "avx2" if {"avx2", "fma", "f16c"} <= set(flags) else "scalar"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes(level: int = 3) -> int:
    """Size of the first core's cache of that level in bytes, 0 if the system does not say."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((index / "level").read_text()) == level and (index / "type").read_text().strip() != "Instruction":
                return parse_size((index / "size").read_text().strip())
        except (OSError, ValueError):
            continue
    return 0


def parse_size(text: str) -> int:
    """'32768K' -> 33554432."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None:
        raise ValueError(f"expected a size such as 32768K, got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def memory_bytes(field: str = "MemTotal") -> int:
    """A field of /proc/meminfo in bytes, 0 if there is none."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def versions() -> dict[str, str]:
    """Installed versions of the libraries that take part; what is missing is left out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        found["fastdl"] = metadata.version("fastdl-kernels")
    except metadata.PackageNotFoundError:
        found["fastdl"] = "source tree"
    return found


def describe() -> dict:
    """The hardware entry of a results file."""
    try:
        cpu = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:
        cpu = parse_cpuinfo("")
    cpu["best_level"] = best_level(cpu["flags"])
    cpu["cores"] = cores()
    cpu["l2_bytes"], cpu["l3_bytes"] = cache_bytes(2), cache_bytes(3)
    cpu["memory_bytes"] = memory_bytes()
    cpu["system"] = f"{platform.system()} {platform.machine()}"
    return cpu


def describe_gpu(device: int = 0) -> dict:
    """The hardware entry of a results file whose figures are those of a GPU; ``host`` is the machine around it."""
    import torch

    found = torch.cuda.get_device_properties(device)
    return {
        "model": found.name, "gpu": True, "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count, "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size, "cuda": torch.version.cuda, "host": describe(),
    }  # fmt: skip


def slug(hardware: dict) -> str:
    """Name of the hardware for file names: 'amd-epyc-avx512-2c', 'nvidia-h100-80gb-hbm3'."""
    name = re.sub(r"\(r\)|\(tm\)|\bcpu\b|\bprocessor\b|@.*$", " ", hardware["model"].lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "cpu"
    return name if hardware.get("gpu") else f"{name}-{hardware['best_level']}-{hardware['cores']}c"
