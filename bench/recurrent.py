"""Rooms lstm, gru and rnn on the CPU against torch's layers, onnxruntime and OpenVINO: sides, checks and records.

bench_lstm.py, bench_gru.py and bench_rnn.py say what is measured. Cases are (time, batch, hidden); the input is as wide
as the hidden state. Every side has the same weights and is checked against torch's layer in float64 before it is timed.

inference  y and the last states, under torch.inference_mode. bf16: fastdl with weight_dtype=torch.bfloat16, float32
           inputs and outputs, as OpenVINO; torch bf16: its layer and the input in bfloat16
training   forward and backward: y and the gradients of the input and of all weights
options    layer norm and zoneout against the plain fastdl layer; exact: fastdl's reference in float64

Shares of the machine's limits: two operations for every weight and step (training: three times as many) over the rate
of the level's multiply-adds or bf16 dot products. With one sequence w_hh is read again at every step: bytes of weights
a second over the rate at which that many bytes are read from the cache that holds them.

Test: tests/test_bench_recurrent.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

import fastdl
from bench import limits, recurrent_peers
from bench.against_torch import ALLOWED, PEER_ALLOWED, Side, check, play
from bench.peers import MissingPeer
from bench.timing import paired_ratio, spread

LAYERS = {"lstm": (nn.LSTM, fastdl.nn.LSTM), "gru": (nn.GRU, fastdl.nn.GRU), "rnn": (nn.RNN, fastdl.nn.RNN)}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
OPTIONS = {"layer_norm": {"layer_norm": True}, "zoneout": {"zoneout_h": 0.05, "zoneout_c": 0.5}}  # Krueger et al. 2017
# A recurrence that is normalized at every step amplifies rounding errors from step to step, in any implementation: with
# layer norm fastdl may be off by twice as much as its reference in float32.
OVER_REFERENCE = 2
Shape = tuple[int, int, int]  # time, batch, hidden


def case_id(value: object) -> str:
    """'35x20x650' for a shape."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make(room: str, shape: Shape) -> tuple[nn.RNNBase, Tensor, Tensor]:
    """torch's layer, x and the gradient of y, both [T, B, H]."""
    torch.manual_seed(0)
    return LAYERS[room][0](shape[2], shape[2]), torch.randn(shape), torch.randn(shape)


def fastdl_layer(room: str, layer: nn.RNNBase, **options) -> nn.Module:
    """fastdl's with the same weights, in training or evaluation as it is; weights of layer norm are random."""
    found = LAYERS[room][1](layer.input_size, layer.hidden_size, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "_ln_" in name:
                parameter.add_(torch.randn_like(parameter) / 5)
    found.load_state_dict(layer.state_dict(), strict=False)
    return found.train(layer.training)


def listed(found: tuple) -> list[Tensor]:
    """What a layer returns as a flat list: y, h_n (and c_n)."""
    y, states = found
    return [y, *states] if isinstance(states, tuple) else [y, states]


def inference(layer: nn.Module, x: Tensor) -> Side:
    return lambda: listed(layer(x))


def training(layer: nn.Module, x: Tensor, grad: Tensor) -> Side:
    """y and the gradients of x and of all weights."""
    leaves = [x.detach().requires_grad_(), *layer.parameters()]

    def call() -> Sequence[Tensor]:
        y, _ = layer(leaves[0])
        return y, *torch.autograd.grad(y, leaves, grad)

    return call


def double(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).double()


def inference_sides(room: str, shape: Shape, dtype: str, threads: int) -> tuple[dict[str, Side], Side, list[str]]:
    """The sides, the exact answer and why some are missing. To be made outside torch.inference_mode: tensors of that
    mode do not count their changes, and fastdl keeps no prepared weights of such."""
    layer, x, _ = make(room, shape)
    layer.eval()
    narrow = torch.bfloat16 if dtype == "bf16" else None
    sides = {f"fastdl {dtype}": inference(fastdl_layer(room, layer, weight_dtype=narrow), x)}
    sides["torch fp32"] = inference(layer, x)
    peers: dict[str, Callable[[], Side]] = {}
    if dtype == "bf16":
        sides["torch bf16"] = inference(copy.deepcopy(layer).bfloat16(), x.bfloat16())
    else:
        peers["onnxruntime fp32"] = lambda: recurrent_peers.onnxruntime_side(layer, x, threads)
    peers[f"OpenVINO {dtype}"] = lambda: recurrent_peers.openvino_side(layer, x, threads, dtype)
    missing = []
    for name, maker in peers.items():
        try:
            sides[name] = maker()
        except MissingPeer as error:
            missing.append(str(error))
    return sides, inference(double(layer), x.double()), missing


def training_sides(room: str, shape: Shape) -> tuple[dict[str, Side], Side]:
    layer, x, grad = make(room, shape)
    sides = {
        "fastdl fp32": training(fastdl_layer(room, layer), x, grad),
        "torch fp32": training(layer, x, grad),
    }
    return sides, training(double(layer), x.double(), grad.double())


def option_sides(room: str, shape: Shape, train: bool) -> tuple[dict[str, Side], dict[str, Side], dict[str, Side]]:
    """Sides "fastdl", "fastdl layer_norm", "fastdl zoneout", the exact answer of each, and with layer norm the
    reference in float32."""
    layer, x, grad = make(room, shape)
    layer.train(train)
    sides, exact, references = {}, {}, {}
    for option, settings in {"": {}, **OPTIONS}.items():
        name = f"fastdl {option}".strip()
        ours = fastdl_layer(room, layer, **settings)
        reference = fastdl_layer(room, layer, **settings, backend="torch")
        wide = double(reference)
        if train:
            sides[name], exact[name] = training(ours, x, grad), training(wide, x.double(), grad.double())
        else:
            sides[name], exact[name] = inference(ours, x), inference(wide, x.double())
        if option == "layer_norm":
            references[name] = training(reference, x, grad) if train else inference(reference, x)
    return sides, exact, references


def cpu_level() -> str:
    """Skips where fastdl has no compiled library: the torch back end is a reference, not a claim of speed."""
    level = fastdl.backend.cpu_level()
    if level == "none":
        pytest.skip("fastdl's compiled library is not loaded: make build")
    return level


def measure(
    sides: Mapping[str, Side],
    exact: Mapping[str, Side],
    train: bool,
    rounds: int,
    benchmark=None,
    references: Mapping[str, Side] | None = None,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds, relative errors) of every side, checked before it is timed. references: of some sides, in float32."""
    with torch.inference_mode(not train):
        answers = {}
        for name in sides:
            torch.manual_seed(0)  # as check does: zoneout then keeps the same elements
            answers[name] = exact[name]()
        bounds = {name: allowed(name) for name in sides}
        for name, error in check(references or {}, answers, dict.fromkeys(references or {}, float("inf"))).items():
            bounds[name] = max(bounds[name], OVER_REFERENCE * error)
        errors = check(sides, answers, bounds)
        del answers
        return play(sides, rounds, benchmark), errors


def allowed(side: str) -> float:
    """Relative error, norm over norm."""
    return PEER_ALLOWED if side == "torch bf16" else ALLOWED[dtype_of(side)]


def dtype_of(side: str) -> str:
    return "bf16" if side.endswith("bf16") else "fp32"


def side_records(
    room: str, shape: Shape, train: bool, seconds: dict, errors: dict, level: str, threads: int, limit: Mapping
) -> dict[str, dict]:
    """Of every side: seconds, error, shares of the limits, and fastdl's ratios to the others."""
    steps, batch, hidden = shape
    matrix, records = GATES[room] * hidden * hidden, {}  # elements of w_hh, and of w_ih
    for name, values in seconds.items():
        typical, dtype = spread(values), dtype_of(name)
        rate = 2 * steps * batch * 2 * matrix * (3 if train else 1) / typical["median"] / 1e9
        records[name] = {
            "seconds": typical,
            "relative_error": float(f"{errors[name]:.3g}"),
            "gflop_per_s": round(rate, 1),
            "share_of_product_limit": round(rate / limits.product_limit(limit, level, dtype), 3),
            "speedup_over": {
                peer: paired_ratio(seconds[peer], values) for peer in seconds if not peer.startswith("fastdl")
            } if name.startswith("fastdl") else {},
        }  # fmt: skip
        if batch == 1 and not train:
            width = 2 if dtype == "bf16" else 4
            read = (steps + 1) * matrix * width / typical["median"] / 1e9
            records[name]["weight_gb_per_s"] = round(read, 1)
            if fastest := limits.read_rate(matrix * width, threads):
                records[name]["share_of_read_limit"] = round(read / fastest, 3)
    return records


def compare(benchmark, recorder, rounds: int, room: str, kind: str, shape: Shape, dtype: str) -> None:
    """Check, time and record one case of goals.RECURRENT but those of memory."""
    level, threads = cpu_level(), recorder.threads
    torch.set_num_threads(threads)
    missing, options, train = [], kind.startswith("options"), kind.endswith("training")
    references: dict[str, Side] = {}
    if options:
        sides, exact, references = option_sides(room, shape, train)
    elif train:
        sides, answer = training_sides(room, shape)
    else:
        sides, answer, missing = inference_sides(room, shape, dtype, threads)
    exact = exact if options else dict.fromkeys(sides, answer)
    seconds, errors = measure(sides, exact, train, rounds, benchmark, references)
    record = {"level": level, "kind": kind, "dtype": dtype, "shape": list(shape), "missing": missing}
    record["sides"] = side_records(room, shape, train, seconds, errors, level, threads, recorder.limits[str(threads)])
    if options:
        record["time_over_plain"] = {o: paired_ratio(seconds[f"fastdl {o}"], seconds["fastdl"]) for o in OPTIONS}
    recorder.add(room, f"{level}/{kind}/{'x'.join(map(str, shape))}/{dtype}", record)
