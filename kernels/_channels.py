"""What the Triton kernels of group_norm and batch_norm share: moments that do not cancel, cut into parts and merged."""

from __future__ import annotations

from typing import NamedTuple

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


def check_group(size: int) -> None:
    """The kernels of group_norm count a group's elements in 32 bits, and a step past its end."""
    if size > 2**31 - 2**14:
        raise RuntimeError("fastdl: x: more than 2^31 elements in a group; use more groups")


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


class Cut(NamedTuple):
    """How a batch [N, C, spatial] is cut. Long channels are planes, a unit each; short ones, and channels last (where
    spatial is 1), are columns of [N, C * spatial]. A unit's run of elements has ``parts`` of ``length``."""

    columns: bool
    units: int
    run: int
    parts: int
    length: int


def cut(n: int, channels: int, spatial: int) -> Cut:
    """A function of the shape alone."""
    columns = spatial < 32
    units, run = (channels * spatial, n) if columns else (channels, n * spatial)
    parts = part_count(triton.cdiv(units, 128), run, 128) if columns else part_count(units, run)
    length = part_length(run, parts)
    return Cut(columns, units, run, triton.cdiv(run, length), length)


@triton.jit
def plane_offset(begin, lane, channel, channels, spatial):
    """Where elements begin + lane of a channel's run over [N, spatial] lie. begin: int64; lane: int32 [BLOCK]."""
    at = (begin % spatial).to(tl.int32) + lane
    image = begin // spatial + at // spatial
    return (image * channels + channel) * spatial + at % spatial


@triton.jit
def channel_of(begin, lane, channels, spatial):
    """The channels of elements begin + lane of [N, C, spatial]. begin: int64; lane: int32 [BLOCK]."""
    at = (begin % spatial).to(tl.int32) + lane
    return ((begin // spatial % channels).to(tl.int32) + at // spatial) % channels
