"""Room batch_norm against torch's own ops, in training and evaluation: batch norm, and the end of a ResNet block
(batch norm, residual add, ReLU), forward and with their gradients.

    pytest bench/bench_batch_norm.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_batch_norm.py    a lower one

Shapes are those of a ResNet-50 with a batch of 8, contiguous and channels last. The share of the limit counts the bytes
that the op must move: x, residual, y, and for the gradients grad, x, y, dx and dresidual.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import rooms_gpu
from bench.against_torch import DTYPES, compare, sides_of
from fastdl import ops

SHAPES = ((8, 64, 56, 56), (8, 512, 7, 7))
# kind: training, with residual and ReLU, gradients, tensors of the size of x that are read and written
KINDS = {
    "training": (True, False, False, 2),
    "training_gradients": (True, False, True, 5),
    "evaluation": (False, False, False, 2),
    "evaluation_add_relu": (False, True, False, 3),
    "training_add_relu_gradients": (True, True, True, 8),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm(benchmark, recorder, threads, rounds, kind, shape, layout, dtype):
    torch.set_num_threads(threads)
    training, block, gradients, moved = KINDS[kind]
    generator, c = torch.Generator().manual_seed(0), shape[1]
    x, residual, grad = (
        torch.randn(shape, generator=generator).to(DTYPES[dtype]).contiguous(memory_format=FORMATS[layout])
        for _ in range(3)
    )
    weight, bias, mean = (torch.randn(c, generator=generator) for _ in range(3))
    var = torch.rand(c, generator=generator) + 0.5
    tensors = [x, weight, bias, *([residual] if block else [])]

    def statistics(like):  # a copy each call would be timed too: training leaves the running statistics alone here
        return (None, None) if training else (mean.to(like.dtype), var.to(like.dtype))

    def ours(x, weight, bias, residual=None):
        return ops.batch_norm(
            x, *statistics(weight), weight, bias, training=training, residual=residual, relu=residual is not None
        )

    def theirs(x, weight, bias, residual=None):
        y = F.batch_norm(x, *statistics(weight), weight, bias, training)
        return y if residual is None else (y + residual).relu()

    sides, exact = sides_of(ours, theirs, tensors, grad if gradients else None)
    facts = {"kind": f"{kind}_{layout}", "dtype": dtype, "shape": list(shape)}
    with torch.set_grad_enabled(gradients):
        compare(
            benchmark, recorder, rounds, "batch_norm", facts, sides, exact, moved * x.numel() * DTYPES[dtype].itemsize
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("kind", "shape"), rooms_gpu.cases("batch_norm"))
def test_batch_norm_on_gpu(benchmark, recorder, rounds, kind, shape):
    record = rooms_gpu.measure("batch_norm", kind, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("batch_norm", f"gpu/{kind}/{'x'.join(map(str, shape))}/bf16", record)
