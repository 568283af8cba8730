"""Room gru: torch's, onnxruntime's and OpenVINO's GRU in inference, torch's in training.

    pytest bench/bench_gru.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_gru.py    a lower one

Cases are (time, batch, hidden), listed in bench/goals.py; bench/recurrent.py makes the sides.
"""

from __future__ import annotations

import pytest

from bench import goals, recurrent


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"), goals.recurrent_cases("gru", "inference", "training"), ids=recurrent.case_id
)
def test_gru(benchmark, recorder, rounds, kind, shape, dtype):
    recurrent.compare(benchmark, recorder, rounds, "gru", kind, shape, dtype)
