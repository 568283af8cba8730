"""How the Triton kernels are launched: a static table per architecture, so that a choice depends on no timing.

    config("norm_forward", 90, 4096)      Config(rows=1, num_warps=8, num_stages=1, programs=0)

The figures follow from registers as `make triton-compile` prints them, not from timings: 8 to 32 elements of a row a
thread, no spills, and as many programs as a multiprocessor's 65,536 registers hold at once. A tile has at least 1024
elements, so that narrow rows share a program. What was timed on a GPU stands in tuned.py and goes before this table; it
is written by tools/triton_tune.py, which nobody but you runs. Triton is not imported here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from .tuned import TUNED

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities that tools/triton_compile.py compiles for


class Config(NamedTuple):
    """rows: of the tile [rows, block]; programs: per multiprocessor, for kernels whose grid is the GPU's size; keys: of
    the tile of scores [rows, keys], where block is the head's width."""

    rows: int
    num_warps: int
    num_stages: int = 1
    programs: int = 0
    keys: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's launch options. Fused multiply-add is named, because versions of Triton differ in the default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


RECURRENT = ("lstm", "gru", "rnn")


def _each(name: str, table: dict[int, Config], kinds: tuple[str, ...] = RECURRENT) -> dict[str, dict[int, Config]]:
    """The same table for several kernels."""
    return {name.format(kind): dict(table) for kind in kinds}


# Attention: block is the wider of head_dim and d_v, a tile of scores is [rows, keys]. Accumulators, [rows, block] or in
# the backward for keys and values twice [keys, block], are what fills the registers.
_ATTENTION: dict[str, dict[int, Config]] = {
    "attention_forward": {
        32: Config(128, 4, 3, keys=64),
        64: Config(128, 4, 3, keys=64),
        128: Config(128, 8, 3, keys=64),
        256: Config(64, 8, 2, keys=32),
    },
    "attention_backward_keys": {
        32: Config(64, 4, 2, keys=64),
        64: Config(32, 8, 2, keys=64),
        128: Config(32, 8, 2, keys=64),
        256: Config(32, 8, 2, keys=32),
    },
    "attention_backward_queries": {
        32: Config(64, 4, 2, keys=64),
        64: Config(128, 8, 3, keys=64),
        128: Config(128, 8, 2, keys=64),
        256: Config(32, 8, 2, keys=32),
    },
    # bias, mask, softcap, ALiBi and dropout take registers for every score
    **_each(
        "attention_{}",
        {
            32: Config(32, 4, keys=32),
            64: Config(32, 4, keys=32),
            128: Config(32, 8, keys=32),
            256: Config(32, 8, keys=32),
        },
        ("forward_options", "backward_keys_options", "backward_queries_options", "dbias"),
    ),
    # both operands of a product lie in registers, a row of them whole
    "attention_forward_float32": {
        32: Config(32, 4, keys=32),
        64: Config(32, 4, keys=32),
        128: Config(32, 8, keys=32),
        256: Config(16, 8, keys=32),
    },
    **_each(
        "attention_{}_float32",
        {
            32: Config(32, 4, keys=32),
            64: Config(32, 8, keys=32),
            128: Config(16, 8, keys=16),
            256: Config(16, 8, keys=16),
        },
        ("backward_keys", "backward_queries", "dbias"),
    ),
    **_each(
        "attention_{}",
        {32: Config(128, 4), 64: Config(64, 4), 128: Config(32, 4), 256: Config(16, 4)},
        ("delta", "delta_float32"),
    ),
}

# Decoding: a tile of scores is [rows, keys]; of the merge, rows parts are added at once.
_DECODE: dict[str, dict[int, Config]] = {
    "attention_decode_split": {
        32: Config(16, 4, 3, keys=64),
        64: Config(16, 4, 2, keys=128),
        128: Config(16, 4, 3, keys=64),
        256: Config(16, 8, 2, keys=64),
    },
    # float32 and Q8_0: both operands of a product lie in registers, a row of them whole
    "attention_decode_split_float32": {
        32: Config(16, 4, keys=32),
        64: Config(16, 4, keys=32),
        128: Config(16, 8, keys=32),
        256: Config(16, 8, keys=16),
    },
    "attention_decode_append": {32: Config(1, 1), 64: Config(1, 1), 128: Config(1, 1), 256: Config(1, 1)},
    "attention_decode_merge": {32: Config(16, 1), 64: Config(16, 1), 128: Config(16, 4), 256: Config(16, 4)},
}


_TABLE: dict[str, dict[int, Config]] = {
    # kernel: block -> configuration. The largest block is the widest row that is held in registers.
    "norm_forward": {
        64: Config(16, 4),
        128: Config(8, 4),
        256: Config(4, 4),
        512: Config(2, 4),
        1024: Config(1, 4),
        2048: Config(1, 4),
        4096: Config(1, 8),
        8192: Config(1, 16),
        16384: Config(1, 16),
    },
    "norm_forward_stream": {4096: Config(1, 8)},
    "norm_backward": {
        64: Config(16, 4, programs=5),
        128: Config(8, 4, programs=4),
        256: Config(4, 4, programs=4),
        512: Config(2, 4, programs=4),
        1024: Config(1, 4, programs=6),
        2048: Config(1, 8, programs=3),
        4096: Config(1, 16, programs=1),
    },
    "norm_backward_stream": {2048: Config(1, 8)},
    "norm_columns": {128: Config(32, 4)},
    "norm_partials": {128: Config(32, 4)},
    # 8 elements of 16 bits a thread: one instruction of 16 bytes
    "activation_forward": {128: Config(8, 4, programs=16), 1024: Config(1, 4, programs=16)},
    "activation_backward": {128: Config(8, 4, programs=8), 1024: Config(1, 4, programs=8)},
    "activation_glu": {128: Config(8, 4, programs=16), 1024: Config(1, 4, programs=16)},
    "activation_sums": {128: Config(32, 4)},
    # rows: positions; the width is pairs of a head, 8 of them a thread
    "rope_turn": {
        16: Config(64, 4, programs=8),
        32: Config(32, 4, programs=8),
        64: Config(16, 4, programs=8),
        128: Config(8, 4, programs=8),
    },
    "position_forward": {128: Config(8, 4, programs=8), 1024: Config(1, 4, programs=8)},
    "position_backward": {128: Config(8, 4), 512: Config(4, 4)},  # rows: tokens that are added at once
    "group_norm_moments": {256: Config(1, 1), 1024: Config(1, 4), 4096: Config(1, 8)},
    "group_norm_apply": {256: Config(1, 1), 1024: Config(1, 4), 4096: Config(1, 8)},
    "group_norm_sums": {64: Config(16, 4), 256: Config(4, 4), 1024: Config(1, 4)},
    "group_norm_dx": {256: Config(1, 1), 1024: Config(1, 4), 2048: Config(1, 8)},
    "group_norm_parameters": {64: Config(16, 4)},
    "batch_norm_moments_planes": {256: Config(1, 1), 1024: Config(1, 4), 4096: Config(1, 8)},
    "batch_norm_moments_columns": {32: Config(32, 4), 128: Config(16, 4)},
    "batch_norm_statistics": {32: Config(32, 4)},
    "batch_norm_apply": {1024: Config(1, 4)},
    "batch_norm_products_planes": {256: Config(1, 1), 1024: Config(1, 4), 2048: Config(1, 8)},
    "batch_norm_products_columns": {32: Config(32, 4), 128: Config(16, 4)},
    "batch_norm_sums": {32: Config(32, 4)},
    "batch_norm_dx": {1024: Config(1, 4)},
    # A step of a recurrent layer has few rows: one warp where programs share a row, more of them on whole rows.
    **_each("{}_step", {64: Config(4, 1), 256: Config(1, 1), 1024: Config(1, 4)}),
    **_each("{}_step_backward", {64: Config(4, 1), 256: Config(1, 1), 1024: Config(1, 4)}),
    "lstm_project": {64: Config(4, 1), 256: Config(1, 1)},
    "lstm_arrive_backward": {64: Config(4, 1), 256: Config(1, 1)},
    # Whole sequences: the tile holds all hidden units. float32: the weights of all gates are in registers.
    **_each("{}_sequence", {16: Config(16, 2), 32: Config(16, 4), 64: Config(16, 8), 128: Config(16, 8)}),
    **_each("{}_sequence_backward", {16: Config(16, 2), 32: Config(16, 4), 64: Config(16, 8), 128: Config(16, 8)}),
    **_each("{}_sequence_float32", {16: Config(1, 1), 32: Config(1, 4), 64: Config(1, 8)}),
    **_each("{}_sequence_backward_float32", {16: Config(1, 1), 32: Config(1, 4), 64: Config(1, 8)}),
    "linear_scan_run": {8: Config(32, 1), 32: Config(64, 4)},  # rows: steps of a tile
    "linear_scan_complex": {8: Config(32, 1), 32: Config(32, 4)},  # the same kernel on complex numbers
    "selective_scan_forward": {32: Config(16, 1)},  # rows: states, for which the warps are; more states, more warps
    "selective_scan_backward": {32: Config(16, 1)},
    "linear_scan_carry": {256: Config(1, 1)},
    **_ATTENTION,
    **_DECODE,
    "additive_attention_forward": {32: Config(16, 4)},  # block: keys of a tile, rows: hidden units
    "additive_attention_backward": {32: Config(16, 4)},
    "additive_attention_merge": {128: Config(1, 1)},
    "additive_attention_finish": {256: Config(1, 1)},
}

# Where a class of architectures departs from the table. Interpreted: tiles so small that tests have several of them.
_CLASSES = {75: "turing", 80: "ampere", 89: "ada", 90: "hopper", 100: "blackwell", 120: "blackwell"}  # from cc on
_DEPARTURES: dict[str, dict[tuple[str, int], Config]] = {
    "interpreted": {
        **{(name, block): Config(32, 1, keys=16) for name, table in _ATTENTION.items() for block in table},
        **{(name, block): Config(16, 1, keys=32) for name, table in _DECODE.items() for block in table},
        **{("attention_decode_merge", block): Config(1, 1) for block in _DECODE["attention_decode_merge"]},
    },
    # 12 registers a thread more than the others; attention's products of 16 bits are sums in registers, as of float32
    "turing": {
        **{
            (name.replace("_float32", kind), block): found
            for name, table in _ATTENTION.items()
            for block, found in table.items()
            for kind in ("", "_options", "_float32")
            if name.endswith("_float32") and name.replace("_float32", kind) in _ATTENTION
        },
        **{(f"attention_backward_keys{k}", 256): Config(16, 8, keys=8) for k in ("", "_options", "_float32")},
        ("norm_backward", 1024): Config(1, 4, programs=5),
        ("norm_backward", 2048): Config(1, 8, programs=2),
    },
}


_overrides: dict[tuple[str, int], Config] = {}


def architecture(cc: int | None) -> str | None:
    """The class of a compute capability (90 for 9.0), e.g. "hopper"; an unknown one counts as the last before it."""
    known = [name for first, name in _CLASSES.items() if cc is not None and first <= cc]
    return known[-1] if known else None


def config(kernel: str, cc: int | None, block: int) -> Config:
    """The configuration of a kernel for tiles ``block`` wide. cc: compute capability; None when interpreted."""
    key, name = (kernel, block), architecture(cc)
    if key in _overrides:
        return _overrides[key]
    if name is not None and key in TUNED.get(name, {}):
        return Config(*TUNED[name][key])
    return _DEPARTURES.get(name or "interpreted", {}).get(key) or _TABLE[kernel][block]


@contextlib.contextmanager
def override(kernel: str, block: int, chosen: Config) -> Iterator[None]:
    """Inside, ``config`` gives ``chosen`` for a kernel and tile: how tools/triton_tune.py tries one."""
    before = _overrides.get((kernel, block))
    _overrides[kernel, block] = chosen
    try:
        yield
    finally:
        del _overrides[kernel, block]
        if before is not None:
            _overrides[kernel, block] = before


def kernels() -> tuple[str, ...]:
    """Every kernel of the table."""
    return tuple(_TABLE)


def blocks(kernel: str) -> tuple[int, ...]:
    """Every width of tile that a kernel is launched with, ascending."""
    return tuple(sorted(_TABLE[kernel]))


def block_for(kernel: str, cols: int) -> int | None:
    """The narrowest tile that holds ``cols`` columns; None where the widest does not."""
    return next((block for block in blocks(kernel) if block >= cols), None)
