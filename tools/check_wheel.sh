#!/usr/bin/env bash
# Installs a wheel into a fresh environment, away from the source tree, and multiplies by a quantized matrix.
#   tools/check_wheel.sh dist/fastdl_kernels-*.whl
# PYTHON makes the environment, TORCH is what is installed as torch there.
set -euo pipefail
wheel=$(realpath "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3}" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "${TORCH:-torch==2.13.0}"
"${pip[@]}" "$wheel"
cd "$scratch"
env -u PYTHONPATH -u FASTDL_LIBRARY -u FASTDL_BACKEND -u FASTDL_ISA venv/bin/python - <<'PY'
import importlib.metadata
import sys
from pathlib import Path

import torch

import fastdl
import fastdl.kernels

site = Path(sys.prefix).resolve()
for module in (fastdl, fastdl.kernels):
    if site not in Path(module.__file__).resolve().parents:
        sys.exit(f"{module.__name__} was imported from {module.__file__}, not from the wheel")
if not fastdl.backend.native_loaded():
    sys.exit(f"the compiled library does not load: {fastdl.backend.native_error()}")
tops = {file.parts[0] for file in importlib.metadata.files("fastdl-kernels")} - {"..", "fastdl"}
strays = [top for top in tops if not top.endswith(".dist-info")]
if strays:
    sys.exit(f"the wheel holds more than the package: {strays}")

torch.manual_seed(0)
weight, x = torch.randn(48, 64), torch.randn(3, 64)
packed = fastdl.ops.quantize(weight, "q4_1")
exact = x @ packed.dequantize().T
got = fastdl.ops.quant_matmul(x, packed, activation="fp32", backend="cpu")
error = (got - exact).abs().max().item()
if not error < 1e-4:
    sys.exit(f"quant_matmul is off by {error}")
print(f"wheel ok: Python {sys.version.split()[0]}, torch {torch.__version__}, level {fastdl.backend.cpu_level()}, error {error:.1e}")
PY
