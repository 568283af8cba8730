"""Times configurations of the Triton kernels on this machine's GPU and writes the faster ones to kernels/tuned.py.

    python tools/triton_tune.py --room norm            prints what it would change
    python tools/triton_tune.py --room norm --write    and writes it

Opt-in: nothing in fastdl times kernels by itself. For every kernel and tile that a room's work (WORK) launches, the
neighbours of its configuration are tried: tiles of half and twice the rows or keys, 1 to 32 warps, half to four
times the programs. A candidate is timed only if its results agree with the torch back end, and taken when it is at
least 3 % faster. Test: pytest tests/test_triton_tune.py
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from fastdl import ops
from fastdl.kernels import configs
from fastdl.kernels.configs import Config

TARGET = Path(__file__).resolve().parent.parent / "kernels/tuned.py"
GAIN = 0.97  # of the seconds that the present configuration takes
Work = Callable[[str], Sequence[Tensor]]  # backend -> results
Timer = Callable[[Callable[[], object]], float]


def with_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> Work:
    """function(*tensors, backend=...) and the gradients of all its tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.randn_like(tensors[0])

    def run(backend: str) -> Sequence[Tensor]:
        y = function(*leaves, backend=backend)
        return y, *torch.autograd.grad(y, leaves, grad)

    return run


def norm_work(device: str, rows: int, widths: Sequence[int]) -> Iterator[tuple[str, Work]]:
    for cols in widths:
        x, weight, bias = (torch.randn(n, device=device).to(torch.bfloat16) for n in ((rows, cols), cols, cols))
        yield f"layer_norm {rows} x {cols}", with_gradients(ops.layer_norm, x, weight, bias)


def activation_work(device: str, rows: int, widths: Sequence[int]) -> Iterator[tuple[str, Work]]:
    for cols in widths:
        x, up = (torch.randn(rows, cols, device=device).to(torch.bfloat16) for _ in range(2))
        bias = torch.randn(cols, device=device).to(torch.bfloat16)
        gelu = lambda x, bias, backend: ops.activation(x, "gelu", bias, backend=backend)  # noqa: E731
        yield f"bias + gelu {rows} x {cols}", with_gradients(gelu, x, bias)
        yield f"swiglu {rows} x {cols}", with_gradients(ops.swiglu, x, up)


def image_work(function: str, device: str, shapes: Sequence[Sequence[int]]) -> Iterator[tuple[str, Work]]:
    for shape in shapes:
        x = torch.randn(*shape, device=device).to(torch.bfloat16)
        weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))

        def group(x, weight, bias, backend):
            return ops.group_norm(x, 32, weight, bias, backend=backend)

        def batch(x, weight, bias, backend):
            return ops.batch_norm(x, None, None, weight, bias, training=True, backend=backend)

        yield f"{function} {list(shape)}", with_gradients(group if function == "group_norm" else batch, x, weight, bias)


def attention_work(device: str, shapes: Sequence[Sequence[int]]) -> Iterator[tuple[str, Work]]:
    """Shapes: batch, heads, kv_heads, length, head_dim. Alone and with a bias: other kernels of the table."""
    for shape in shapes:
        batch, heads, groups, length, d = shape
        sizes = ((batch, n, length, d) for n in (heads, groups, groups))
        q, k, v = (torch.randn(size, device=device).to(torch.bfloat16) for size in sizes)
        bias = torch.randn(1, heads, length, length, device=device).to(torch.bfloat16)

        def causal(q, k, v, bias=None, *, backend):
            return ops.attention(q, k, v, causal=True, bias=bias, backend=backend)

        yield f"attention {list(shape)}", with_gradients(causal, q, k, v)
        yield f"attention with a bias {list(shape)}", with_gradients(causal, q, k, v, bias)


def decode_work(device: str, shapes: Sequence[Sequence[int]]) -> Iterator[tuple[str, Work]]:
    for shape in shapes:
        batch, heads, groups, held, d = shape
        q, new = (torch.randn(batch, n, 1, d, device=device).to(torch.bfloat16) for n in (heads, groups))
        cache = torch.randn(batch, groups, held + 1, d, device=device)
        lens = torch.full((batch,), held, dtype=torch.int32, device=device)
        for kind, one in (("bfloat16", cache.to(torch.bfloat16)), ("float32", cache)):
            caches = one, one.clone()

            def run(backend: str, q=q, caches=caches, lens=lens, new=new) -> Sequence[Tensor]:
                return (ops.attention_decode(q, *caches, lens, k_new=new, v_new=new, backend=backend),)

            yield f"decode {list(shape)}, cache {kind}", run


WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
IMAGES = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
WORK: dict[str, Callable[[str], Iterator[tuple[str, Work]]]] = {
    "norm": lambda device: norm_work(device, 8192, WIDTHS),
    "activation": lambda device: activation_work(device, 8192, (128, 4096)),
    "group_norm": lambda device: image_work("group_norm", device, IMAGES),
    "attention": lambda device: attention_work(device, [(2, 16, 8, 2048, d) for d in (32, 64, 128, 256)]),
    "attention_decode": lambda device: decode_work(device, [(8, 32, 8, 8192, d) for d in (32, 64, 128, 256)]),
    "batch_norm": lambda device: image_work("batch_norm", device, IMAGES),
}


@contextlib.contextmanager
def recorded() -> Iterator[dict[tuple[str, int], Config]]:
    """Inside, collects the configurations that are asked for."""
    found: dict[tuple[str, int], Config] = {}
    modules = [m for name, m in sys.modules.items() if name.startswith("fastdl.kernels.") and hasattr(m, "config")]
    original = configs.config

    def config(kernel: str, cc: int | None, block: int) -> Config:
        found[kernel, block] = original(kernel, cc, block)
        return found[kernel, block]

    for module in modules:
        module.config = config
    try:
        yield found
    finally:
        for module in modules:
            module.config = original


def candidates(present: Config) -> list[Config]:
    """Neighbours of a configuration; what is 1 or 0 because the kernel has no such choice stays."""
    rows = {present.rows} if present.rows == 1 else {present.rows // 2, present.rows, present.rows * 2}
    programs = {present.programs} | {present.programs * k // 2 for k in (1, 4, 8) if present.programs}
    keys = {present.keys // 2, present.keys, present.keys * 2}
    found = itertools.product(sorted(rows), (1, 2, 4, 8, 16, 32), sorted(programs - {0} or {0}), sorted(keys))
    return [c for r, w, p, k in found if (c := Config(r, w, present.num_stages, p, k)) != present]


def agrees(work: Work, exact: Sequence[Tensor]) -> bool:
    """Results of the Triton back end against torch's, as bfloat16 allows."""
    for ours, theirs in zip(work("triton"), exact, strict=True):
        limit = 0.02 * float(theirs.abs().max())
        if not torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=limit):
            return False
    return True


def tune(work: Work, timer: Timer) -> Iterator[tuple[str, int, Config, Config, float]]:
    """(kernel, block, before, after, ratio of seconds) for every configuration that gains."""
    work("triton")  # imports and compiles
    with recorded() as touched:
        work("triton")
    exact = work("torch")
    for (kernel, block), present in touched.items():
        start = timer(lambda: work("triton"))
        best, seconds = present, start
        for candidate in candidates(present):
            with configs.override(kernel, block, candidate):
                try:
                    if not agrees(work, exact):
                        continue
                except Exception as error:  # of the compiler or the launch: too many registers, too much memory
                    print(f"  {kernel}[{block}] {tuple(candidate)}: {type(error).__name__}", file=sys.stderr)
                    continue
                took = timer(lambda: work("triton"))
            if took < seconds:
                best, seconds = candidate, took
        if best != present and seconds < GAIN * start:
            yield kernel, block, present, best, seconds / start


def write(path: Path, architecture: str, found: dict[tuple[str, int], Config], device: str) -> None:
    """Merge what was found into the file."""
    namespace: dict = {}
    exec(path.read_text(encoding="utf-8"), namespace)
    table = namespace["TUNED"]
    table.setdefault(architecture, {}).update({key: tuple(value) for key, value in found.items()})
    head, _ = path.read_text(encoding="utf-8").split("TUNED: dict")
    head = head.replace("Nothing has been tuned yet.\n", "")
    line = f"    {architecture}: {device}\n"
    head = head if line in head else head.replace('"""\n\nfrom', f'{line}"""\n\nfrom')
    lines = ["TUNED: dict[str, dict[tuple[str, int], tuple[int, int, int, int, int]]] = {"]
    for name, entries in sorted(table.items()):
        lines += [f'    "{name}": {{']
        lines += [f'        ("{kernel}", {block}): {value},' for (kernel, block), value in sorted(entries.items())]
        lines += ["    },"]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(head + "\n".join([*lines, "}"]) + "\n", encoding="utf-8")
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", choices=sorted(WORK), nargs="+", default=sorted(WORK))
    parser.add_argument("--write", action="store_true", help="write kernels/tuned.py")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tuning needs an NVIDIA GPU and a CUDA build of torch; neither of them changes the static table")
    from bench import gpu

    device = torch.cuda.get_device_name()
    name = configs.architecture(torch.cuda.get_device_capability()[0] * 10 + torch.cuda.get_device_capability()[1])
    if name is None:
        parser.error(f"{device}: expected compute capability 7.5 or later")
    found: dict[tuple[str, int], Config] = {}
    for room in options.room:
        for label, work in WORK[room]("cuda"):
            for kernel, block, before, after, ratio in tune(work, lambda f: gpu.seconds_per_call(f, 20)):
                print(f"{label}: {kernel}[{block}] {tuple(before)} -> {tuple(after)}, {ratio:.2f} of the seconds")
                found[kernel, block] = after
                if options.write:  # at once: a run that is stopped loses nothing
                    write(TARGET, name, found, device)
    print(f"{len(found)} configurations gain" + ("" if options.write else "; --write writes them"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
