"""Formats, QuantTensor and the panel16 layout: bytes and values against the package gguf, round trips, bad input."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_gguf

from fastdl import backend, ops
from fastdl.quant import FORMATS, QuantTensor, panel16
from fastdl.quant.formats import encode_rows, encode_rows_torch

gguf = pytest.importorskip("gguf")

WRITABLE = [name for name, fmt in FORMATS.items() if fmt.encode]
BLOCKS = ["q4_1", "q8_0"]


def oracle_encode(w: torch.Tensor, name: str) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[name.upper()]
    return np.ascontiguousarray(gguf.quants.quantize(w.float().numpy(), kind)).view(np.uint8).reshape(w.shape[0], -1)


def oracle_decode(data: torch.Tensor, name: str) -> np.ndarray:
    return gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name.upper()])


@st.composite
def matrices(draw, largest=60000.0):
    """float32 [rows, multiple of 32] with repeated values, zeros of both signs, and magnitudes far apart."""
    rows, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    values = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-8, -3e-39, largest, -largest]),
        st.floats(-largest, largest, width=32),
        st.floats(-1, 1, width=32),
    )
    pool = draw(st.lists(values, min_size=1, max_size=40))
    picks = draw(st.integers(0, 2**32 - 1))
    chosen = np.random.default_rng(picks).integers(0, len(pool), (rows, blocks * 32))
    return torch.from_numpy(np.asarray(pool, dtype=np.float32)[chosen])


@pytest.mark.parametrize("name", FORMATS)
def test_table_is_ggml(name):
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert (FORMATS[name].block, FORMATS[name].block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert FORMATS[name].ggml_id == int(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", WRITABLE)
def test_bytes_are_ggmls(name, dtype):
    w = torch.randn(37, 96).to(dtype)
    for coded in (
        ops.quantize(w, name).to_gguf(),
        encode_rows_torch(w, FORMATS[name]),
        ops.quantize(w.T.contiguous().T, name).to_gguf(),
    ):
        np.testing.assert_array_equal(coded.numpy(), oracle_encode(w, name))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy: division by zero and invalid casts in the oracle
@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=150, deadline=None)
@given(w=matrices())
def test_bytes_are_ggmls_hypothesis(name, w):
    fmt = FORMATS[name]
    coded = encode_rows_torch(w, fmt)
    assert torch.equal(encode_rows(w, fmt), coded)  # native code, where it is built
    blocks, theirs = coded.view(-1, fmt.block_bytes), torch.from_numpy(oracle_encode(w, name)).view(-1, fmt.block_bytes)
    # A scale below 2.9e-39 has no inverse in float32: ggml's codes are then what a conversion of NaN or infinity gives,
    # ours are 0. Both decode alike, because that scale is 0 in fp16.
    values = w.view(-1, 32)
    spread = values.amax(1) - values.amin(1) if name == "q4_1" else values.abs().amax(1)
    defined = (spread == 0) | (spread > 5e-37)
    equal = (values == values.amin(1, keepdim=True)).numpy()
    first = torch.from_numpy(equal.argmax(1, keepdims=True))  # numpy's argmax is the first
    if name == "q4_1":  # numpy's minimum of 0.0 and -0.0 is either; ggml's, and ours, the first
        theirs[:, 2:4] = values.gather(1, first).half().view(torch.uint8)
    assert torch.equal(blocks[defined], theirs[defined])
    scales = 2 if name == "q8_0" else 4
    assert torch.equal(blocks[:, :scales], theirs[:, :scales])


def test_blocks_of_zeros_of_both_signs():
    """ggml keeps the first of the equal minima, sign and all, and its d is +0.0."""
    signs = torch.randint(0, 2, (64, 96), generator=torch.Generator().manual_seed(0)).bool()
    w = torch.zeros(64, 96).copysign(signs.float() - 0.5)
    for coded in (encode_rows(w, FORMATS["q4_1"]), encode_rows_torch(w, FORMATS["q4_1"])):
        blocks = coded.view(-1, 20)
        assert torch.equal(blocks[:, 3] == 0x80, w.view(-1, 32)[:, 0].signbit())
        blocks[:, 3] = 0
        assert not blocks.any()


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_ggmls(name):
    data = random_gguf(name, 21, 512)
    for w in (QuantTensor.from_gguf(data, name), QuantTensor.from_gguf(data, name).pack_()):
        np.testing.assert_array_equal(w.dequantize().numpy(), oracle_decode(data, name))
        exact = w.dequantize(torch.float64)
        torch.testing.assert_close(exact, w.dequantize().double(), rtol=1e-7, atol=1e-7)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(w.dequantize(dtype), w.dequantize().to(dtype))
        ids = torch.tensor([20, 0, 0, 16, 15])
        assert torch.equal(w.rows_at(ids), w.dequantize()[ids])


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=100, deadline=None)
@given(w=matrices(largest=1000.0))
def test_round_trip(name, w):
    """The error of a weight is at most half a step, plus what storing the scales in fp16 costs."""
    back = ops.quantize(w, name).dequantize()
    blocks = w.reshape(-1, 32)
    span = (blocks.amax(1) - blocks.amin(1)) / 15 if name == "q4_1" else blocks.abs().amax(1) / 127
    steps = 15 if name == "q4_1" else 127
    largest = blocks.abs().amax(1)
    allowed = span / 2 + span * steps * 2**-11 + largest * 2**-11 + 1e-6 * (1 + steps)
    assert ((back - w).reshape(-1, 32).abs().amax(1) <= allowed * 1.0001).all()
    again = ops.quantize(back, name).dequantize()
    assert ((again - back).reshape(-1, 32).abs().amax(1) <= allowed * 1.0001).all()


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=64, max_size=512), name=st.sampled_from(["f16", "bf16", "f32"]))
def test_plain_formats_keep_their_bytes(data, name):
    raw = torch.frombuffer(bytearray(data[: len(data) // 4 * 4]), dtype=torch.uint8)[None]
    w = QuantTensor.from_gguf(raw, name)
    values = w.dequantize(torch.float32)
    finite = values[torch.isfinite(values)][None]
    if finite.numel():
        assert torch.equal(ops.quantize(finite, name).dequantize(), finite)
    assert torch.equal(panel16.unpack(panel16.pack(raw, w.fmt, w.shape[1]), w.fmt, *w.shape), raw)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 48])
@pytest.mark.parametrize("name", FORMATS)
def test_panel16(name, rows):
    fmt = FORMATS[name]
    for cols in (256, 768) if name == "q6_k" else (fmt.block, 96, 33 * fmt.block):
        data = torch.randint(0, 256, (rows, fmt.row_bytes(cols)), dtype=torch.uint8)
        packed = panel16.pack(data, fmt, cols)
        assert packed.shape == (panel16.panels(rows) * panel16.panel_bytes(fmt, cols),)
        assert torch.equal(panel16.unpack(packed, fmt, rows, cols), data)
        if backend.native_loaded():
            assert torch.equal(torch.ops.fastdl.quant_pack(data, fmt.ggml_id, cols), packed)
            assert torch.equal(torch.ops.fastdl.quant_unpack(packed, fmt.ggml_id, rows, cols), data)


def test_constructor():
    data = ops.quantize(torch.randn(4, 64), "q4_1").to_gguf()
    w = QuantTensor.from_gguf(data.numpy(), "q4_1", cols=64)
    assert (w.format, w.shape, w.layout, w.nbytes, w.device.type) == ("q4_1", (4, 64), "gguf", 160, "cpu")
    assert torch.equal(w.to_gguf(), data)
    assert repr(w) == "QuantTensor(q4_1, 4 x 64, 160 bytes as GGUF)"
    read_only = data.numpy().copy()
    read_only.flags.writeable = False
    assert torch.equal(QuantTensor.from_gguf(read_only, "q4_1").dequantize(), w.dequantize())


def test_copies_carry_gguf_bytes():
    for w in (ops.quantize(torch.randn(20, 64), "q4_1"), ops.quantize(torch.randn(20, 64), "q4_1").pack_()):
        file = io.BytesIO()
        torch.save({"w": w}, file)
        file.seek(0)
        for other in (
            pickle.loads(pickle.dumps(w)),
            copy.deepcopy(w),
            torch.load(file, weights_only=False)["w"],
        ):
            assert torch.equal(other.to_gguf(), w.to_gguf()) and other.layout == w.layout
            assert other.data.data_ptr() != w.data.data_ptr()
        assert w.to_gguf() is w.to_gguf() if w.layout == "gguf" else True
    pair = copy.deepcopy([w, w])
    assert pair[0] is pair[1]


def test_weights_made_in_inference_mode_can_be_trained_through():
    with torch.inference_mode():
        w = ops.quantize(torch.randn(20, 64), "q4_1")
        ops.quant_matmul(torch.randn(2, 64), w)
        other = QuantTensor.from_gguf(torch.zeros(3, 40, dtype=torch.uint8), "q4_1")
    for weight in (w, other, w.unpack_()):
        x = torch.randn(2, 64, requires_grad=True)
        ops.quant_matmul(x, weight).sum().backward()
        torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def _with(value: float, cols: int = 64) -> torch.Tensor:
    w = torch.randn(3, cols)
    w[1, 5] = value
    return w


U8 = torch.zeros(2, 40, dtype=torch.uint8)
BAD = {
    "list": (lambda: ops.quantize([[1.0]], "q4_1"), TypeError, "w: expected a tensor, got list"),
    "integers": (lambda: ops.quantize(torch.ones(2, 32, dtype=torch.int32)), TypeError, "w: expected a floating"),
    "vector": (lambda: ops.quantize(torch.ones(32)), ValueError, r"w: expected a matrix .* got shape \(32,\)"),
    "width": (lambda: ops.quantize(torch.ones(2, 33)), ValueError, "w: q4_1 needs .* multiple of 32 .* got 33"),
    "no width": (lambda: ops.quantize(torch.ones(2, 0)), ValueError, "w: expected at least one column"),
    "format": (lambda: ops.quantize(torch.ones(2, 32), "q5"), ValueError, "format: unknown format 'q5'; known: q4_1"),
    "format type": (lambda: ops.quantize(torch.ones(2, 32), 3), TypeError, "format: expected a format name"),
    "q6_k": (lambda: ops.quantize(torch.ones(2, 256), "q6_k"), ValueError, "format: q6_k can be read but not written"),
    "meta": (lambda: ops.quantize(torch.ones(2, 32, device="meta")), ValueError, "w: is on the meta device"),
    "nan": (
        lambda: ops.quantize(_with(float("nan"))),
        ValueError,
        "w: expected finite weights, got 1 NaN or inf.* of 192",
    ),
    "inf": (lambda: ops.quantize(_with(-float("inf")), "f32"), ValueError, "w: expected finite weights, got 1"),
    "q4_1 range": (
        lambda: ops.quantize(_with(-7e4)),
        ValueError,
        "w: weights up to 70000 are out of the range of q4_1",
    ),
    "q4_1 spread": (lambda: ops.quantize(_with(1e6)), ValueError, "w: weights up to 1e[+]06 are out of the range"),
    "q8_0 range": (
        lambda: ops.quantize(_with(9e6), "q8_0"),
        ValueError,
        "w: weights up to 9e[+]06 are out of the range",
    ),
    "f16 range": (
        lambda: ops.quantize(_with(7e4), "f16"),
        ValueError,
        "w: weights up to 70000 are out of the range of f16",
    ),
    "bytes type": (
        lambda: QuantTensor.from_gguf(torch.ones(2, 40), "q4_1"),
        TypeError,
        "data: expected a uint8 tensor",
    ),
    "bytes shape": (lambda: QuantTensor.from_gguf(U8[0], "q4_1"), ValueError, "data: expected 2 dimensions"),
    "bytes width": (lambda: QuantTensor.from_gguf(U8, "q8_0"), ValueError, "multiple of 34 bytes, got 40"),
    "cols": (lambda: QuantTensor.from_gguf(U8, "q4_1", cols=96), ValueError, "cols: 40 bytes a row of q4_1 hold 64"),
    "load type": (
        lambda: QuantTensor.from_gguf(U8, "q4_1").load_(torch.ones(2, 40)),
        TypeError,
        "gguf: expected uint8",
    ),
    "load shape": (lambda: QuantTensor.from_gguf(U8, "q4_1").load_(U8[:1]), ValueError, r"gguf: expected \(2, 40\)"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_large_but_possible_values():
    for value, name in (
        (60000.0, "q4_1"),
        (1e5, "q4_1"),
        (8e6, "q8_0"),
        (65504.0, "f16"),
        (3e38, "bf16"),
        (3e38, "f32"),
    ):
        assert torch.isfinite(ops.quantize(_with(value), name).dequantize()).all()
