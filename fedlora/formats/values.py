"""Float32 vectors as little-endian bytes: exact, bfloat16, or int8 with one scale a row. FORMAT.md, section 2.

Everything goes through in blocks of 1 MiB that stay in the second-level cache; nothing of the vector's size is allocated.
NaN and infinity are refused in both directions.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import F32, Layout
from fedlora.core.errors import NonFiniteUpdate, WireError

Bytes: TypeAlias = NDArray[np.uint8]

_CHUNK: Final = 1 << 18  # values; 1 MiB of float32 stays in the second-level cache
_TINY: Final = np.float32(2.0**-126)  # smallest normal float32
_MAX_SCALE: Final = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 * it is finite


def fill(size: int, write: Callable[[Bytes], None]) -> bytes:
    """``size`` bytes, written in place by ``write``: a bytes object without the copy that ``bytes(bytearray)`` makes."""
    if not size:
        write(np.empty(0, np.uint8))
        return b""
    out = io.BytesIO(bytes(size))
    write(np.frombuffer(out.getbuffer(), np.uint8))
    return out.getvalue()


def _chunks(n: int) -> Iterator[slice]:
    return (slice(at, min(at + _CHUNK, n)) for at in range(0, n, _CHUNK))


def _scaled(part: slice, width: int) -> slice:
    return slice(part.start * width, part.stop * width)


def _refuse_non_finite(piece: F32, what: str) -> None:
    if not np.isfinite(piece).all():
        raise NonFiniteUpdate(f"{what} holds NaN or infinity", hint="lower learning_rate, or look at the site's rows")


def check_finite(vector: F32, what: str) -> None:
    """Checks that a vector has neither NaN nor infinity.

    Raises:
        NonFiniteUpdate: it has; the text names ``what``.
    """
    for part in _chunks(vector.size):
        _refuse_non_finite(vector[part], what)


def dump_float32(vector: F32, out: Bytes) -> None:
    for part in _chunks(vector.size):
        _refuse_non_finite(vector[part], "the vector")
        out[_scaled(part, 4)] = np.ascontiguousarray(vector[part], "<f4").view(np.uint8)


def parse_float32(raw: Bytes, out: F32, what: str) -> None:
    for part in _chunks(out.size):
        out.view(np.uint8)[_scaled(part, 4)] = raw[_scaled(part, 4)]
        if not np.little_endian:
            out[part].byteswap(inplace=True)
        _refuse_non_finite(out[part], what)


def dump_bfloat16(vector: F32, out: Bytes) -> None:
    """Round to nearest, ties to even: add half a unit, less one if the last kept bit is zero, then cut 16 bits."""
    scratch = np.empty(min(_CHUNK, vector.size), np.uint32)
    for part in _chunks(vector.size):
        piece = np.ascontiguousarray(vector[part])
        _refuse_non_finite(piece, "the vector")
        bits, rounded = piece.view(np.uint32), scratch[: piece.size]
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        half = rounded.astype("<u2")
        if ((half & 0x7F80) == 0x7F80).any():
            raise NonFiniteUpdate("a value is beyond what bfloat16 can hold", hint="lower learning_rate")
        out[_scaled(part, 2)] = half.view(np.uint8)


def parse_bfloat16(raw: Bytes, out: F32) -> None:
    for part in _chunks(out.size):
        bits = out[part].view(np.uint32)
        bits[:] = raw[_scaled(part, 2)].view("<u2")
        np.left_shift(bits, 16, out=bits)
        _refuse_non_finite(out[part], "the update")


def _pieces(layout: Layout) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """(values, rows, shape) of blocks of whole rows, each at most _CHUNK values unless one row is longer."""
    at = row = 0
    for _, shape in layout.entries:
        columns = shape[-1]
        left = math.prod(shape[:-1])
        while left:
            rows = min(left, max(1, _CHUNK // columns))
            yield slice(at, at + rows * columns), slice(row, row + rows), (rows, columns)
            at, row, left = at + rows * columns, row + rows, left - rows


def _peaks(block: F32, scratch: F32) -> F32:
    """max|row| of (rows, columns), float32; NaN where a row holds one. A long row goes through ``scratch`` in parts."""
    rows, columns = block.shape
    if rows * columns > scratch.size:
        return np.asarray(np.max([_peaks(block[:, part], scratch) for part in _chunks(columns)], axis=0))
    size = np.abs(block, out=scratch[: block.size].reshape(rows, columns))
    if columns > 32:
        return np.asarray(size.max(axis=1))
    peaks = size[:, 0].copy()  # numpy reduces short rows slowly: six times as fast column by column
    for column in range(1, columns):
        np.maximum(peaks, size[:, column], out=peaks)
    return peaks


def dump_int8(vector: F32, layout: Layout, scales_out: Bytes, out: NDArray[np.int8]) -> None:
    scratch = np.empty(min(_CHUNK, vector.size), np.float32)
    for values, rows, shape in _pieces(layout):
        block = vector[values].reshape(shape)
        peaks = _peaks(block, scratch)
        _refuse_non_finite(peaks, "the vector")
        scales = np.minimum(peaks / np.float32(127), _MAX_SCALE)
        scales[scales < _TINY] = 0
        scales_out[_scaled(rows, 4)] = scales.astype("<f4").view(np.uint8)
        divisor = np.where(scales > 0, scales, np.float32(1))  # of a row that becomes zero, all values round to zero
        for part in _chunks(block.size) if shape[0] == 1 else (slice(0, block.size),):
            width = (1, -1) if shape[0] == 1 else shape
            ratio = scratch[: part.stop - part.start].reshape(width)
            np.divide(vector[values][part].reshape(width), divisor[:, None], out=ratio)
            np.rint(ratio, out=ratio)
            np.copyto(out[values][part].reshape(width), ratio, casting="unsafe")


def parse_int8(raw_scales: Bytes, raw: NDArray[np.int8], layout: Layout, out: F32) -> None:
    for values, rows, shape in _pieces(layout):
        scales = raw_scales[_scaled(rows, 4)].view("<f4").astype(np.float32)
        if not (((scales >= _TINY) & (scales <= _MAX_SCALE)) | (scales.view(np.uint32) == 0)).all():
            raise WireError("a scale is +0, or finite and at least 2^-126")
        for part in _chunks(raw[values].size):
            if (raw[values][part] == -128).any():
                raise WireError("-128 is not a value of symmetric int8")
        block = out[values].reshape(shape)
        block[...] = raw[values].reshape(shape)
        np.multiply(block, scales[:, None], out=block)
