"""Room rnn: torch's, onnxruntime's and OpenVINO's RNN in inference, torch's in training.

    pytest bench/bench_rnn.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_rnn.py    a lower one

Cases are (time, batch, hidden), listed in bench/goals.py; bench/recurrent.py makes the sides.
"""

from __future__ import annotations

import pytest

from bench import goals, recurrent


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"), goals.recurrent_cases("rnn", "inference", "training"), ids=recurrent.case_id
)
def test_rnn(benchmark, recorder, rounds, kind, shape, dtype):
    recurrent.compare(benchmark, recorder, rounds, "rnn", kind, shape, dtype)
