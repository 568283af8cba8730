"""What the Triton kernels of group_norm and batch_norm share: moments that do not cancel, cut into parts and merged."""

from __future__ import annotations

import triton
import triton.language as tl

PARTS = 64  # the most parts that one run is cut into
_LEAST = 16 * 1024  # elements of a part, at least
_PROGRAMS = 1024  # that fill a GPU


def part_count(runs: int, size: int, least: int = _LEAST) -> int:
    """Parts that each of ``runs`` runs of ``size`` elements is cut into: a function of the shape alone."""
    return max(1, min(triton.cdiv(_PROGRAMS, runs), PARTS, size // least))


def part_length(size: int, parts: int) -> int:
    """A multiple of 16, so that vectors stay aligned."""
    return triton.cdiv(triton.cdiv(size, parts), 16) * 16


@triton.jit
def finite_or_zero(k):
    """An origin that keeps sums small; an infinite one would hide the other values."""
    return tl.where(k - k == 0.0, k, 0.0)


@triton.jit
def merged(partial, parts, length, size):
    """partial [parts, 2]: mean and squares of parts of ``length`` elements, the last one shorter -> those of all."""
    lane = tl.arange(0, 64)  # PARTS
    count = tl.where(lane < parts, tl.minimum(size - lane * length, length), 0).to(tl.float32)
    mean = tl.load(partial + lane * 2, mask=lane < parts, other=0.0)
    squares = tl.load(partial + lane * 2 + 1, mask=lane < parts, other=0.0)
    origin = finite_or_zero(tl.load(partial))
    center = origin + tl.sum(tl.where(lane < parts, count * (mean - origin), 0.0), 0) / size
    apart = mean - center
    return center, tl.sum(tl.where(lane < parts, squares + count * apart * apart, 0.0), 0)
