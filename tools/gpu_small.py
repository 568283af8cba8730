"""Every op of every room on small shapes with backend="cuda", forward and backward: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python tools/gpu_small.py [--room norm]
    python tools/gpu_small.py --emulated        the same kernels on CPU tensors, without a GPU

Small, because a sanitized kernel runs hundreds of times slower. Results are compared with the torch back end, so that a
kernel that never ran is seen. A new room adds a function to CASES. Test: pytest tests/test_gpu_script.py
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from fastdl import ops
from fastdl.reference import attention_decode as decode
from fastdl.testing import emulated

Result = tuple[Tensor, ...]


def compare(name: str, run: Callable[[str], Result], tolerance: float) -> None:
    """run(backend) by the kernels and by torch: the same, to the tolerance of the dtype."""
    results = []
    for backend in ("cuda", "torch"):
        torch.manual_seed(0)
        results.append(run(backend))
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}")


# Each kernel's range of widths: one warp, a block, a stream; odd ones, one element, no rows.
NORM = ((0, 8), (1, 1), (5, 7), (3, 64), (9, 130), (3, 520), (2, 1000), (2, 2048), (2, 5003), (1, 17408))


def norm(device: str, shapes: Sequence[tuple[int, int]] = NORM) -> int:
    """Both ops, with all options and without any."""
    number = 0
    for shape, kind, extras in itertools.product(shapes, ("layer_norm", "rms_norm"), (False, True)):
        for dtype in (torch.float32, torch.bfloat16):

            def run(backend, shape=shape, kind=kind, extras=extras, dtype=dtype):
                x, residual, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
                weight, bias = (torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))
                leaves = [t.requires_grad_() for t in ((x, weight, residual) if extras else (x, weight))]
                arguments = (x, weight, bias) if kind == "layer_norm" else (x, weight)
                options = {"residual": residual, "dropout_p": 0.3, "return_sum": True} if extras else {}
                found = getattr(ops, kind)(*arguments, backend=backend, **options)
                outputs = found if extras else (found,)
                return *outputs, *torch.autograd.grad(outputs, leaves, [grad] * len(outputs))

            compare(f"{kind} {shape} {dtype}", run, 1e-4 if dtype == torch.float32 else 5e-2)
            number += 1
    return number


def gradients(outputs: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> Result:
    return outputs, *torch.autograd.grad(outputs, leaves, grad)


def group_norm(device: str) -> int:
    """Small and large groups, with and without the scale and shift of AdaGN."""
    number = 0
    shapes = ((0, 4, 3), (1, 6, 5), (3, 6, 7), (2, 8, 4, 4), (2, 4, 64, 48), (1, 32, 5000))
    for shape, extras, dtype in itertools.product(shapes, (False, True), (torch.float32, torch.bfloat16)):

        def run(backend, shape=shape, extras=extras, dtype=dtype):
            x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            weight, bias = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))
            scale, shift = (torch.randn(shape[:2], device=device).to(dtype) for _ in range(2))
            leaves = [t.requires_grad_() for t in ((x, weight, bias, scale, shift) if extras else (x,))]
            options = {"weight": weight, "bias": bias, "scale": scale, "shift": shift} if extras else {}
            return gradients(ops.group_norm(x, 2, **options, backend=backend), leaves, grad)

        compare(f"group_norm {shape} {dtype}", run, 1e-4 if dtype == torch.float32 else 5e-2)
        number += 1
    return number


def batch_norm(device: str) -> int:
    """Training and evaluation, contiguous and channels last, with and without residual and ReLU."""
    number = 0
    shapes = ((5, 7), (3, 5, 7), (2, 6, 4, 4), (2, 2, 130, 129), (700, 40))
    for shape, extras, training in itertools.product(shapes, (False, True), (False, True)):
        for dtype in (torch.float32, torch.bfloat16):

            def run(backend, shape=shape, extras=extras, training=training, dtype=dtype):
                x, residual, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
                if extras and len(shape) == 4:
                    x = x.to(memory_format=torch.channels_last)
                weight, bias, mean = (torch.randn(shape[1], device=device) for _ in range(3))
                leaves = [t.requires_grad_() for t in ((x, weight, bias, residual) if extras else (x, weight, bias))]
                options = {"residual": residual, "relu": True} if extras else {}
                options |= {"training": training, "backend": backend}
                return gradients(ops.batch_norm(x, mean, mean.abs() + 1, weight, bias, **options), leaves, grad)

            # A ReLU decides by the sign: results near 0 may fall on either side.
            compare(f"batch_norm {shape} {dtype}", run, 1e-4 if dtype == torch.float32 else 5e-2)
            number += 1
    return number


def activation(device: str) -> int:
    """Every kind, by column and by row, with bias, dropout and residual; gated products of halves."""
    number = 0
    kinds = ("relu", "leaky_relu", "gelu", "gelu_tanh", "swish", "tanh", "sigmoid", "identity")
    layouts = (((3, 7), -1), ((70, 40), -1), ((2, 1100), -1), ((2, 3, 5, 4), 1), ((1, 2, 300), 1))
    for kind, (shape, dim), dtype in itertools.product(kinds, layouts, (torch.float32, torch.bfloat16)):

        def run(backend, kind=kind, shape=shape, dim=dim, dtype=dtype):
            x, residual, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
            bias = torch.randn(shape[dim], device=device).to(dtype)
            beta = torch.ones(1, device=device)
            leaves = [
                t.requires_grad_() for t in ((x, residual, bias, beta) if kind == "swish" else (x, residual, bias))
            ]
            options = {"beta": beta} if kind == "swish" else {}
            options |= {"residual": residual, "dropout_p": 0.3, "channel_dim": dim, "channel_dropout": len(shape) == 4}
            return gradients(ops.activation(x, kind, bias, **options, backend=backend), leaves, grad)

        compare(f"activation {kind} {shape} {dtype}", run, 1e-3 if dtype == torch.float32 else 5e-2)
        number += 1
    for function, shape in itertools.product((ops.swiglu, ops.geglu), ((3, 14), (5, 128), (2, 2200))):

        def run(backend, function=function, shape=shape):
            product = torch.randn(shape, device=device).requires_grad_()
            y = function(*product.chunk(2, -1), backend=backend)
            return gradients(y, [product], torch.ones_like(y))

        compare(f"{function.__name__} {shape}", run, 1e-4)
        number += 1
    return number


def rope(device: str) -> int:
    """q and k in both pairings, contiguous and strided, by vectors and by elements, every kind of positions."""
    number = 0
    shapes = ((0, 2, 3, 8), (1, 1, 1, 2), (2, 3, 5, 33), (2, 9, 70, 64), (1, 4, 3, 128), (1, 2, 3, 1040))
    dtypes = (torch.float32, torch.bfloat16)
    for shape, pairs, kind, dtype in itertools.product(shapes, ("interleaved", "half"), range(3), dtypes):

        def run(backend, shape=shape, pairs=pairs, kind=kind, dtype=dtype):
            batch, heads, n, head_dim = shape
            q = torch.randn(batch, n, heads, head_dim, device=device).to(dtype).transpose(1, 2)
            k = torch.randn(batch, 2, n, head_dim, device=device).to(dtype)
            table = ops.rope_table(head_dim // 4 * 2 or 2, 10000.0, n + 4).to(device)
            positions = (2, *(torch.randint(n + 4, size, device=device) for size in ((n,), (batch, n))))[kind]
            leaves = [t.requires_grad_() for t in (q, k)]
            found = ops.rope_qk(q, k, table, pairs=pairs, positions=positions, backend=backend)
            return *found, *torch.autograd.grad(found, leaves, [torch.ones_like(t) for t in found])

        compare(f"rope {shape} {pairs} {dtype}", run, 1e-4 if dtype == torch.float32 else 5e-2)
        number += 1
    return number


def position(device: str) -> int:
    """Every kind of positions, with and without dropout; narrow and wide rows, many tokens at a position."""
    number = 0
    shapes = ((0, 3, 8), (1, 1, 1), (3, 7, 33), (70, 2, 16), (2, 5, 1100))
    dtypes = (torch.float32, torch.bfloat16)
    for shape, kind, extras, dtype in itertools.product(shapes, range(3), (False, True), dtypes):

        def run(backend, shape=shape, kind=kind, extras=extras, dtype=dtype):
            x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            table = torch.randn(9, shape[-1], device=device)
            positions = (1, *(torch.randint(9, size, device=device) for size in (shape[1:2], shape[:2])))[kind]
            leaves = [t.requires_grad_() for t in ((x, table) if extras else (x,))]
            options = {"dropout_p": 0.3} if extras else {}
            y = ops.add_positions(x, table, scale=2.0, positions=positions, backend=backend, **options)
            return gradients(y, leaves, grad)

        compare(f"add_positions {shape} {dtype}", run, 1e-4 if dtype == torch.float32 else 5e-2)
        number += 1
    return number


def recurrent(room: str, device: str) -> int:
    """The step loop with and without layer norm, and the kernel that stays for the whole sequence; both directions."""
    number, gates = 0, {"lstm": 4, "gru": 3, "rnn": 1}[room]
    shapes = ((3, 1, 5, 7), (2, 9, 6, 40), (2, 0, 3, 4))  # steps, batch, inputs, hidden units
    ways = (("loop", False), ("loop", True), ("persistent", False))
    for shape, (way, norms), dtype in itertools.product(shapes, ways, (torch.float32, torch.bfloat16)):

        def run(backend, shape=shape, norms=norms, dtype=dtype):
            steps, batch, inputs, hidden = shape

            def numbers(*shape):
                return torch.randn(shape, device=device)

            x = numbers(steps, batch, inputs).to(dtype)
            w_ih, w_hh = ((numbers(2, gates * hidden, n) / n**0.5).to(dtype) for n in (inputs, hidden))
            leaves, options = [x, w_ih, w_hh], {"lengths": torch.arange(batch, device=device) % (steps + 1)}
            if room == "lstm":
                options |= {"peephole": numbers(2, 3, hidden), "zoneout_h": 0.2, "zoneout_c": 0.1}
                leaves.append(options["peephole"])
            else:
                options["zoneout"] = 0.2
            if norms:
                sizes = (gates * hidden, gates * hidden, hidden, hidden)[: 4 if room == "lstm" else 2]
                options["layer_norm"] = [numbers(2, size) for size in sizes]
                leaves += options["layer_norm"]
            leaves = [t.requires_grad_() for t in leaves]
            y, _ = getattr(ops, room)(x, w_ih, w_hh, **options, training=True, backend=backend)
            return gradients(y, leaves, torch.ones_like(y))

        with mock.patch.dict(os.environ, FASTDL_RECURRENT=way):
            compare(f"{room} {shape} {way} {dtype}", run, 1e-3 if dtype == torch.float32 else 1e-1)
        number += 1
    return number


def linear_scan(device: str) -> int:
    """Forward and reverse, real and complex, with and without h0; one chunk and several, one channel and many."""
    number = 0
    shapes = ((1, 1, 1), (0, 3, 4), (2, 70, 40), (3, 5, 130), (1, 1100, 33), (1, 2500, 5))
    dtypes = (torch.float32, torch.bfloat16, torch.complex64)
    for shape, dtype, reverse in itertools.product(shapes, dtypes, (False, True)):

        def run(backend, shape=shape, dtype=dtype, reverse=reverse):
            wide = torch.promote_types(dtype, torch.float32)
            a, b, grad = (torch.randn(shape, device=device, dtype=wide) for _ in range(3))
            h0 = torch.randn(shape[0], shape[2], device=device, dtype=wide)
            a = a.tanh() if not dtype.is_complex else a / (a.abs() + 1)
            leaves = [t.to(dtype).requires_grad_() for t in (a, b)] + ([h0.requires_grad_()] if reverse else [])
            h = ops.linear_scan(*leaves, reverse=reverse, backend=backend)
            return tuple(torch.view_as_real(t) if t.is_complex() else t for t in gradients(h, leaves, grad.to(dtype)))

        compare(f"linear_scan {shape} {dtype}", run, 5e-2 if dtype == torch.bfloat16 else 1e-4)
        number += 1
    return number


def selective_scan(device: str) -> int:
    """With every option and with none; few and many channels and states, one segment of time and several."""
    number = 0
    shapes = ((1, 1, 1, 1), (0, 3, 4, 2), (2, 37, 70, 16), (3, 18, 5, 40), (1, 20, 9, 100), (1, 200, 6, 3))
    for shape, extras, dtype in itertools.product(shapes, (False, True), (torch.float32, torch.bfloat16)):

        def run(backend, shape=shape, extras=extras, dtype=dtype):
            batch, length, dim, state = shape
            x, z, grad = (torch.randn(batch, length, dim, device=device).to(dtype) for _ in range(3))
            delta = torch.rand(batch, length, dim, device=device).to(dtype)
            B, C = (torch.randn(batch, length, state, device=device).to(dtype) for _ in range(2))
            A, D, bias = -torch.rand(dim, state, device=device), *torch.randn(2, dim, device=device).unbind()
            h0 = torch.randn(batch, dim, state, device=device)
            leaves = [
                t.requires_grad_() for t in ((x, delta, A, B, C, D, z, bias, h0) if extras else (x, delta, A, B, C))
            ]
            options = {"D": D, "z": z, "delta_bias": bias, "h0": h0, "delta_softplus": True} if extras else {}
            y, last = ops.selective_scan(x, delta, A, B, C, **options, return_state=True, backend=backend)
            return y, last, *torch.autograd.grad((y, last), leaves, (grad, torch.ones_like(last)))

        compare(f"selective_scan {shape} {dtype}", run, 5e-2 if dtype == torch.bfloat16 else 1e-4)
        number += 1
    return number


def attention(device: str) -> int:
    """Plain, with every option, and packed; each width of kernel, aligned rows and odd ones, no queries, no keys."""
    number = 0
    shapes = (  # batch, heads, kv_heads, n_q, n_k, head_dim, d_v
        (2, 2, 1, 0, 3, 16, 16), (1, 2, 2, 3, 0, 16, 16), (1, 1, 1, 1, 2, 1, 1), (2, 4, 2, 35, 70, 32, 24),
        (1, 2, 1, 70, 40, 64, 64), (1, 2, 1, 33, 66, 80, 127), (1, 1, 1, 20, 37, 256, 256),
    )  # fmt: skip
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for shape, way, dtype in itertools.product(shapes, ("plain", "options", "packed"), dtypes):
        if way == "packed" and (shape[0] > 1 or 0 in shape):
            continue

        def run(backend, shape=shape, way=way, dtype=dtype):
            batch, heads, kv_heads, n_q, n_k, head_dim, d_v = shape

            def rows(heads, length, width):  # heads inside the length, as a projection leaves them
                return torch.randn(batch, length, heads, width, device=device).to(dtype).transpose(1, 2)

            leaves = [rows(heads, n_q, head_dim), rows(kv_heads, n_k, head_dim), rows(kv_heads, n_k, d_v)]
            leaves = [t.detach().requires_grad_() for t in leaves]
            options = {"causal": way == "plain"}
            if way == "options":
                leaves.append(torch.randn(1, heads, n_q, n_k, device=device).to(dtype).requires_grad_())
                options = {
                    "bias": leaves[3], "mask": torch.rand(batch, 1, 1, n_k, device=device) > 0.2, "softcap": 5.0,
                    "valid_lens": torch.randint(0, n_k + 1, (batch, n_q), device=device), "window": (40, 3),
                    "alibi_slopes": torch.rand(heads, device=device), "dropout_p": 0.2,
                }  # fmt: skip
            if way == "packed":
                for name, total in (("cu_seqlens_q", n_q), ("cu_seqlens_k", n_k)):
                    options[name] = torch.tensor([0, total // 3, total // 3, total], device=device)
            y, lse = ops.attention(*leaves[:3], **options, return_lse=True, backend=backend)
            return lse, *gradients(y, leaves, rows(heads, n_q, d_v))

        compare(f"attention {shape} {way} {dtype}", run, 1e-3 if dtype == torch.float32 else 5e-2)
        number += 1
    return number


def attention_decode(device: str) -> int:
    """Caches of every type, contiguous and paged, several lengths and parts, aligned rows and odd ones; plain, and with
    turned queries and every option. What the call wrote to the caches is compared too."""
    number = 0
    shapes = (  # heads, kv_heads, n_new, capacity, head_dim, d_v
        (2, 1, 0, 0, 16, 16), (4, 2, 1, 600, 32, 64), (9, 3, 2, 40, 64, 32), (3, 1, 30, 48, 31, 127),
        (1, 1, 1, 16, 256, 256),
    )  # fmt: skip
    caches, dtypes = ("float32", "float16", "bfloat16", "q8_0"), (torch.float32, torch.bfloat16)
    for shape, options, cache, dtype in itertools.product(shapes, (False, True), caches, dtypes):
        if (cache == "q8_0" and (shape[4] % 32 or shape[5] % 32)) or (options and not shape[3]):
            continue

        def run(backend, shape=shape, options=options, cache=cache, dtype=dtype):
            heads, kv_heads, n_new, capacity, head_dim, d_v = shape
            held, given = [], {"backend": backend, "return_lse": True}
            blocks, size = (3 * capacity // 8, 8) if options else (3, capacity)
            for width in (head_dim, d_v):
                values = torch.randn(blocks, kv_heads, size, width, device=device)
                held.append(decode.to_q8_0(values) if cache == "q8_0" else values.to(getattr(torch, cache)))
                new = torch.randn(3, kv_heads, n_new, width, device=device).to(dtype)
                given |= {"v_new" if len(held) == 2 else "k_new": new} if n_new else {}
            if options:
                given |= {
                    "block_table": torch.randperm(blocks, device=device).view(3, -1), "window": (50, 1),
                    "cos_sin": ops.rope_table(head_dim // 2 * 2, 100.0, capacity).to(device), "softcap": 5.0,
                    "alibi_slopes": torch.rand(heads, device=device),
                }  # fmt: skip
            q = torch.randn(3, heads, max(n_new, 1), head_dim, device=device).to(dtype)
            lens = torch.tensor([0, capacity - n_new, (capacity - n_new) // 3], device=device)
            y, lse = ops.attention_decode(q, *held, lens, **given)
            held = [decode.from_q8_0(t) if cache == "q8_0" else t.float() for t in held]
            return y, torch.where(lse == -torch.inf, 0.0, lse), *held

        tolerance = 1e-3 if dtype == torch.float32 and cache == "float32" else 5e-2
        compare(f"attention_decode {shape} {options} {cache} {dtype}", run, tolerance)
        number += 1
    return number


def additive_attention(device: str) -> int:
    """Attention and pointer, with masks, lengths and chosen keys; one chunk of keys and several, every way of tanh."""
    number = 0
    shapes = (  # batch, queries, keys, hidden, d_v
        (0, 2, 3, 4, 5), (2, 3, 0, 4, 5), (1, 1, 1, 1, 1), (2, 17, 33, 40, 18), (1, 3, 300, 70, 130),
        (2, 20, 65, 9, 40),
    )  # fmt: skip
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for shape, pointer, extras, dtype in itertools.product(shapes, (False, True), (False, True), dtypes):

        def run(backend, shape=shape, pointer=pointer, extras=extras, dtype=dtype):
            batch, queries, keys, hidden, d_v = shape
            scale = 0.2 if keys == 33 else 1.0
            q, k = (scale * torch.randn(batch, rows, hidden, device=device) for rows in (queries, keys))
            q[:, :1] *= 100.0 if extras else 1.0
            v, w = torch.randn(batch, keys, d_v, device=device), torch.randn(hidden, device=device) / hidden**0.5
            leaves = [t.to(dtype).requires_grad_() for t in ((q, k, w) if pointer else (q, k, v, w))]
            options = {"return_pointer": pointer, "backend": backend}
            if extras:
                options |= {
                    "mask": torch.rand(batch, queries, keys, device=device) > 0.2,
                    "valid_lens": torch.randint(0, keys + 1, (batch,), device=device),
                    "chosen": torch.rand(batch, keys, device=device) > 0.7,
                }
            given = (*leaves[:2], None, leaves[2]) if pointer else leaves
            y = ops.additive_attention(*given, **options)
            y = torch.where(y == -torch.inf, 0.0, y)
            return gradients(y, leaves, torch.randn_like(y))

        compare(f"additive_attention {shape} {pointer} {dtype}", run, 1e-3 if dtype == torch.float32 else 5e-2)
        number += 1
    return number


CASES: dict[str, Callable[[str], int]] = {  # room -> function(device), returns how many cases it ran
    "norm": norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "activation": activation,
    "rope": rope,
    "position": position,
    "lstm": functools.partial(recurrent, "lstm"),
    "gru": functools.partial(recurrent, "gru"),
    "rnn": functools.partial(recurrent, "rnn"),
    "linear_scan": linear_scan,
    "selective_scan": selective_scan,
    "attention": attention,
    "attention_decode": attention_decode,
    "additive_attention": additive_attention,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", choices=sorted(CASES), nargs="+", default=sorted(CASES))
    parser.add_argument("--emulated", action="store_true", help="the CUDA sources under the emulator, on the CPU")
    options = parser.parse_args()
    with emulated() if options.emulated else contextlib.nullcontext():
        for room in options.room:
            number = CASES[room]("cpu" if options.emulated else "cuda")
            if not options.emulated:
                torch.cuda.synchronize()
            print(f"{room}: {number} cases, forward and backward, agree with the torch back end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
