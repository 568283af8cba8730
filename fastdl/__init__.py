"""Fused deep-learning kernels for PyTorch, and 4-bit language models on the CPU.

``fastdl.ops`` has the functions (its source is the table of ops), ``fastdl.nn`` the modules, ``fastdl.quantize`` swaps
a model's layers for quantized ones, ``fastdl.llm`` has the language models. Without a compiled library everything runs
on the readable torch back end.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastdl import backend, nn, ops, quant
from fastdl.backend import BackendError, explain
from fastdl.quant.model import quantize
from fastdl.swap import accelerate, accelerated, restore

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "__version__",
    "accelerate",
    "accelerated",
    "backend",
    "explain",
    "nn",
    "ops",
    "quant",
    "quantize",
    "restore",
]

# Every schema under fastdl/ops is defined before the compiled library is checked against them: tools/schema_hash.py
# hashes that whole folder at build time.
for _module in pkgutil.iter_modules(ops.__path__):
    importlib.import_module(f"fastdl.ops.{_module.name}")
backend._load()
