"""Float32 vectors as little-endian bytes: exact, bfloat16, or int8 with one scale a row. FORMAT.md, section 2.

Everything goes through in blocks of 1 MiB that stay in the second-level cache; nothing of the vector's size is allocated.
NaN and infinity are refused in both directions.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import F32, Layout
from fedlora.core.errors import WireError
from fedlora.core.grids import CHUNK, MAX_SCALE, TINY, bfloat16_chunks, chunks, largest, pieces, refuse_non_finite, scales_of

Bytes: TypeAlias = NDArray[np.uint8]


def fill(size: int, write: Callable[[Bytes], None]) -> bytes:
    """``size`` bytes, written in place by ``write``: a bytes object without the copy that ``bytes(bytearray)`` makes."""
    if not size:
        write(np.empty(0, np.uint8))
        return b""
    out = io.BytesIO(bytes(size))
    write(np.frombuffer(out.getbuffer(), np.uint8))
    return out.getvalue()


def _scaled(part: slice, width: int) -> slice:
    return slice(part.start * width, part.stop * width)


def check_finite(vector: F32, what: str) -> None:
    """Checks that a vector has neither NaN nor infinity.

    Raises:
        NonFiniteUpdate: it has; the text names ``what``.
    """
    for part in chunks(vector.size):
        refuse_non_finite(vector[part], what)


def dump_float32(vector: F32, out: Bytes) -> None:
    for part in chunks(vector.size):
        refuse_non_finite(vector[part], "the vector")
        out[_scaled(part, 4)] = np.ascontiguousarray(vector[part], "<f4").view(np.uint8)


def parse_float32(raw: Bytes, out: F32, what: str) -> None:
    for part in chunks(out.size):
        out.view(np.uint8)[_scaled(part, 4)] = raw[_scaled(part, 4)]
        if not np.little_endian:
            out[part].byteswap(inplace=True)
        refuse_non_finite(out[part], what)


def dump_bfloat16(vector: F32, out: Bytes) -> None:
    for part, rounded in bfloat16_chunks(vector):
        out[_scaled(part, 2)] = rounded.astype("<u2").view(np.uint8)


def parse_bfloat16(raw: Bytes, out: F32, what: str) -> None:
    for part in chunks(out.size):
        bits = out[part].view(np.uint32)
        bits[:] = raw[_scaled(part, 2)].view("<u2")
        np.left_shift(bits, 16, out=bits)
        refuse_non_finite(out[part], what)


def dump_int8(vector: F32, layout: Layout, scales_out: Bytes, out: NDArray[np.int8]) -> None:
    scratch = np.empty(min(CHUNK, vector.size), np.float32)
    for values, rows, shape in pieces(layout):
        block = vector[values].reshape(shape)
        peaks = largest(block, scratch)
        refuse_non_finite(peaks, "the vector")
        scales = scales_of(peaks)
        scales_out[_scaled(rows, 4)] = scales.astype("<f4").view(np.uint8)
        divisor = np.where(scales > 0, scales, np.float32(1))  # of a row that becomes zero, all values round to zero
        for part in chunks(block.size) if shape[0] == 1 else (slice(0, block.size),):
            width = (1, -1) if shape[0] == 1 else shape
            ratio = scratch[: part.stop - part.start].reshape(width)
            np.divide(vector[values][part].reshape(width), divisor[:, None], out=ratio)
            np.rint(ratio, out=ratio)
            np.copyto(out[values][part].reshape(width), ratio, casting="unsafe")


def parse_int8(raw_scales: Bytes, raw: NDArray[np.int8], layout: Layout, out: F32) -> None:
    for values, rows, shape in pieces(layout):
        scales = raw_scales[_scaled(rows, 4)].view("<f4").astype(np.float32)
        if not (((scales >= TINY) & (scales <= MAX_SCALE)) | (scales.view(np.uint32) == 0)).all():
            raise WireError("a scale is +0, or finite and at least 2^-126")
        for part in chunks(raw[values].size):
            if (raw[values][part] == -128).any():
                raise WireError("-128 is not a value of symmetric int8")
        block = out[values].reshape(shape)
        block[...] = raw[values].reshape(shape)
        np.multiply(block, scales[:, None], out=block)
