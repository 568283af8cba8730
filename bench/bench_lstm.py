"""Room lstm: torch's, onnxruntime's and OpenVINO's LSTM in inference, torch's in training; what options cost; memory.

    pytest bench/bench_lstm.py -k "not gpu"                     best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_lstm.py -k "not gpu"     a lower one
    pytest bench/bench_lstm.py -k gpu                           the GPU: bench/recurrent_gpu.py has its sides

Cases are (time, batch, hidden), listed with what is promised in bench/goals.py; bench/recurrent.py makes the sides.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench import goals, recurrent, recurrent_gpu, recurrent_memory
from bench.timing import paired_ratio, spread, take_turns

TIMED = goals.recurrent_cases("lstm", "inference", "training", "options_inference", "options_training")


@pytest.mark.parametrize(("kind", "shape", "dtype"), TIMED, ids=recurrent.case_id)
def test_lstm(benchmark, recorder, rounds, kind, shape, dtype):
    recurrent.compare(benchmark, recorder, rounds, "lstm", kind, shape, dtype)


@pytest.mark.parametrize(("kind", "shape", "dtype"), goals.recurrent_cases("lstm", "memory"), ids=recurrent.case_id)
def test_lstm_memory(recorder, rounds, threads, kind, shape, dtype):
    """Peak of a training step, each side in processes of its own."""
    level = recurrent.cpu_level()
    names = ("fastdl", "torch")
    turns = {name: functools.partial(recurrent_memory.peak, name, "lstm", shape, threads) for name in names}
    found = take_turns(turns, rounds)
    record = {"level": level, "kind": kind, "dtype": dtype, "shape": list(shape), "missing": []}
    record["bytes"] = {name: spread(values) for name, values in found.items()}
    record["over_torch"] = paired_ratio(found["fastdl"], found["torch"])
    recorder.add("lstm", f"{level}/{kind}/{'x'.join(map(str, shape))}/{dtype}", record)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", recurrent_gpu.SHAPES, ids=recurrent.case_id)
@pytest.mark.parametrize("kind", recurrent_gpu.KINDS)
def test_lstm_on_gpu(benchmark, recorder, rounds, kind, shape):
    record = recurrent_gpu.measure(kind, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("lstm", f"gpu/{kind}/{'x'.join(map(str, shape))}/bf16", record)
