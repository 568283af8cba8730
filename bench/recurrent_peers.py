"""torch's recurrent layers as ONNX graphs, run by onnxruntime and by OpenVINO: peers of rooms lstm, gru and rnn.

One layer, one direction. ONNX orders gates i o f c (torch i f g o) and z r h (torch r z n); linear_before_reset=1 is
torch's GRU. Both peers keep their own packed weights, read the input where it lies and write into tensors made once.

Test: tests/test_bench_recurrent.py
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from bench.against_torch import Side
from bench.peers import MissingPeer

ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # torch's gate at each of ONNX's places
OPSET, IR_VERSION = 17, 8  # old enough for every onnxruntime and OpenVINO of today
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def imported(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPeer(f"{what}: {error} (pip install --no-deps {name})") from error


def onnx_model(layer: nn.RNNBase, steps: int, batch: int) -> bytes:
    """The layer for x [steps, batch, input_size] as a serialized graph: x -> y [T, B, H], h_n [1, B, H] (and c_n)."""
    if layer.num_layers != 1 or layer.bidirectional or layer.proj_size or not layer.bias or layer.batch_first:
        raise ValueError(f"layer: expected one layer and direction with bias, time first, no projection; got {layer}")
    onnx = imported("onnx", "ONNX graphs")
    helper, numpy_helper, floats = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    op = "RNN" if layer.mode.startswith("RNN") else layer.mode
    attributes = {"GRU": {"linear_before_reset": 1}, "RNN": {"activations": [layer.mode[4:].capitalize()]}}.get(op, {})

    def reordered(t: Tensor) -> np.ndarray:  # [G * H, ...], gates in ONNX's order
        return torch.cat([t.detach().chunk(len(ORDER[op]))[gate] for gate in ORDER[op]]).float().numpy()

    weights = {
        "w": reordered(layer.weight_ih_l0)[None],
        "r": reordered(layer.weight_hh_l0)[None],
        "b": np.concatenate([reordered(layer.bias_ih_l0), reordered(layer.bias_hh_l0)])[None],
        "axis": np.array([1], dtype=np.int64),
    }
    states = ["h_n", "c_n"][: 2 if op == "LSTM" else 1]
    nodes = [
        helper.make_node(op, ["x", "w", "r", "b"], ["directed", *states], hidden_size=layer.hidden_size, **attributes),
        helper.make_node("Squeeze", ["directed", "axis"], ["y"]),  # [T, 1, B, H] -> [T, B, H]
    ]
    shapes = {"y": [steps, batch, layer.hidden_size]} | {name: [1, batch, layer.hidden_size] for name in states}
    graph = helper.make_graph(
        nodes,
        op.lower(),
        [helper.make_tensor_value_info("x", floats, [steps, batch, layer.input_size])],
        [helper.make_tensor_value_info(name, floats, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def outputs_of(layer: nn.RNNBase, steps: int, batch: int) -> list[Tensor]:
    """Where a peer writes y and its states."""
    states = 2 if layer.mode == "LSTM" else 1
    return [torch.zeros(count, batch, layer.hidden_size) for count in (steps, *[1] * states)]


def onnxruntime_side(layer: nn.RNNBase, x: Tensor, threads: int) -> Side:
    """The layer by onnxruntime, float32; x [steps, batch, input_size]."""
    runtime = imported("onnxruntime", "onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Its threads spin for work inside a call, as by default, but not after it, in the time of the other sides.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = runtime.InferenceSession(onnx_model(layer, *x.shape[:2]), options, ["CPUExecutionProvider"])
    except RuntimeError as error:
        raise MissingPeer(f"onnxruntime: {str(error)[:200]}") from error
    given, found = x.float().contiguous(), outputs_of(layer, *x.shape[:2])
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, tuple(given.shape), given.data_ptr())
    for output, tensor in zip(session.get_outputs(), found, strict=True):
        binding.bind_output(output.name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())

    def call() -> list[Tensor]:
        session.run_with_iobinding(binding)
        return found

    call.keep = given  # the binding holds its address only
    return call


def openvino_side(layer: nn.RNNBase, x: Tensor, threads: int, dtype: str = "fp32") -> Side:
    """The layer by OpenVINO's CPU plugin, tuned for latency; dtype of the products: "fp32" or "bf16"."""
    openvino = imported("openvino", "OpenVINO")
    core = openvino.Core()
    wanted = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
    }  # fmt: skip
    try:
        model = core.read_model(onnx_model(layer, *x.shape[:2]))
        compiled = core.compile_model(model, "CPU", wanted)
        chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    except RuntimeError as error:
        raise MissingPeer(f"OpenVINO: {str(error)[:200]}") from error
    if chosen != PRECISIONS[dtype]:
        raise MissingPeer(f"OpenVINO: this machine has no {dtype} for it (it would run {chosen})")
    request = compiled.create_infer_request()
    given, found = x.float().contiguous(), outputs_of(layer, *x.shape[:2])
    request.set_input_tensor(openvino.Tensor(given.numpy(), shared_memory=True))
    for index, tensor in enumerate(found):
        request.set_output_tensor(index, openvino.Tensor(tensor.numpy(), shared_memory=True))

    def call() -> list[Tensor]:
        request.infer()
        return found

    call.keep = given, compiled
    return call
