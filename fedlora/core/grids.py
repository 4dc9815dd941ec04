"""Vectors on the grids of bfloat16 and int8, a piece at a time: rounded to them, and asked whether they are on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import F32, Layout
from fedlora.core.errors import NonFiniteUpdate

LARGEST: Final = float(np.uint32(0x7F7F0000).view(np.float32))
"""Largest number that bfloat16 holds."""
CHUNK: Final = 1 << 18  # values; 1 MiB of float32 stays in the second-level cache
TINY: Final = np.float32(2.0**-126)  # smallest normal float32
MAX_SCALE: Final = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 * it is finite


def chunks(n: int) -> Iterator[slice]:
    return (slice(at, min(at + CHUNK, n)) for at in range(0, n, CHUNK))


def refuse_non_finite(piece: F32, what: str) -> None:
    if not np.isfinite(piece).all():
        raise NonFiniteUpdate(f"{what} holds NaN or infinity", hint="lower learning_rate, or look at the site's rows")


def to_bfloat16(vector: F32) -> F32:
    """The values rounded as :func:`fedlora.formats.values.dump_bfloat16` rounds them, (n,) float32.

    Raises:
        NonFiniteUpdate: NaN, infinity, or a value beyond what bfloat16 can hold.
    """
    out = np.empty(vector.size, np.float32)
    for part, rounded in bfloat16_chunks(vector):
        np.left_shift(rounded, 16, out=out[part].view(np.uint32))
    return out


def is_bfloat16(vector: F32) -> bool:
    """Whether bfloat16 holds every value exactly."""
    return all(not (np.ascontiguousarray(vector[part]).view(np.uint32) & 0xFFFF).any() for part in chunks(vector.size))


def to_int8(vector: F32, layout: Layout) -> F32:
    """What a reader makes of :func:`fedlora.formats.values.dump_int8`, (n,) float32. Rounded again it stays as it is: for every
    float32 x, with s = x / 127, 127 * s / 127 is s.

    Raises:
        NonFiniteUpdate: NaN or infinity.
    """
    out = np.empty(vector.size, np.float32)
    for values, block, scales in _rows(vector, layout):
        refuse_non_finite(scales, "the vector")
        out[values] = _on_grid(block, scales).reshape(-1)
    return out


def is_int8(vector: F32, layout: Layout) -> bool:
    """Whether every row holds only whole multiples, -127 .. 127, of its largest size through 127, bit for bit."""
    return all(
        np.array_equal(_on_grid(block, scales).view(np.uint32), block.view(np.uint32))
        for _, block, scales in _rows(vector, layout)
    )


def scales_of(peaks: F32) -> F32:
    """The scale of each row from max|row|; zero for a row that becomes zero."""
    scales: F32 = np.minimum(peaks / np.float32(127), MAX_SCALE)
    scales[scales < TINY] = 0
    return scales


def _rows(vector: F32, layout: Layout) -> Iterator[tuple[slice, F32, F32]]:
    """(values, block of whole rows, their scales). A scale is NaN where a row holds NaN."""
    scratch = np.empty(min(CHUNK, vector.size), np.float32)
    for values, _, shape in pieces(layout):
        block = vector[values].reshape(shape)
        yield values, block, scales_of(largest(block, scratch))


def _on_grid(block: F32, scales: F32) -> F32:
    """The nearest whole multiples of each row's scale, (rows, columns); zero where the scale is. A zero is +0."""
    divisor = np.where(scales > 0, scales, np.float32(1))
    found: F32 = np.rint(block / divisor[:, None]) * scales[:, None] + np.float32(0)
    return found


def bfloat16_chunks(vector: F32) -> Iterator[tuple[slice, NDArray[np.uint32]]]:
    """Bits of the rounded values, the upper 16 of each, in memory that the next chunk uses again.

    Round to nearest, ties to even: add half a unit, less one if the last kept bit is zero, then cut 16 bits.
    """
    scratch = np.empty(min(CHUNK, vector.size), np.uint32)
    for part in chunks(vector.size):
        piece = np.ascontiguousarray(vector[part])
        refuse_non_finite(piece, "the vector")
        bits, rounded = piece.view(np.uint32), scratch[: piece.size]
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        if ((rounded & 0x7F80) == 0x7F80).any():
            raise NonFiniteUpdate("a value is beyond what bfloat16 can hold", hint="lower learning_rate")
        yield part, rounded


def pieces(layout: Layout) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """(values, rows, shape) of blocks of whole rows, each at most CHUNK values unless one row is longer."""
    at = row = 0
    for _, shape in layout.entries:
        columns = shape[-1]
        left = math.prod(shape[:-1])
        while left:
            rows = min(left, max(1, CHUNK // columns))
            yield slice(at, at + rows * columns), slice(row, row + rows), (rows, columns)
            at, row, left = at + rows * columns, row + rows, left - rows


def largest(block: F32, scratch: F32) -> F32:
    """max|row| of (rows, columns), float32; NaN where a row holds one. A long row goes through ``scratch`` in parts."""
    rows, columns = block.shape
    if rows * columns > scratch.size:
        return np.asarray(np.max([largest(block[:, part], scratch) for part in chunks(columns)], axis=0))
    size = np.abs(block, out=scratch[: block.size].reshape(rows, columns))
    if columns > 32:
        return np.asarray(size.max(axis=1))
    peaks = size[:, 0].copy()  # numpy reduces short rows slowly: six times as fast column by column
    for column in range(1, columns):
        np.maximum(peaks, size[:, column], out=peaks)
    return peaks
