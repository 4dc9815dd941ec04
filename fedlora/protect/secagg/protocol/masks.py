"""Masks: expands a key to one uniform ring element for each value, and adds or subtracts them in place.

AES-256 in counter mode with a zero start, each key used once; words are little-endian, so that the stream does not depend on
how it is divided (NIST SP 800-38A, 6.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from fedlora.processes.threads import in_threads

_CHUNK: Final = 1 << 18  # bytes at a time
_CHUNKS: Final = 4  # of a piece that one thread takes: its streams are set up once
_ZEROS: Final = memoryview(bytes(_CHUNK))


def add_masks(
    vector: NDArray[Any], masks: Sequence[tuple[bytes, Literal[1, -1]]], *, done: Callable[[slice], object] | None = None
) -> None:
    """Adds or subtracts the masks of some keys, modulo the width of the words, in place; on several cores.

    Args:
        vector: (n,) contiguous little-endian unsigned words.
        masks: key (32 bytes, used for one mask only) and sign.
        done: called with each finished part of the vector, in order and without gaps. All parts but the last have an even number
            of words.
    """

    def add(piece: slice) -> slice:
        whole = vector[piece]
        streams = [(_keystream(key, piece.start * vector.itemsize), np.add if sign > 0 else np.subtract) for key, sign in masks]
        buffer = np.empty(min(step, whole.size), vector.dtype)
        raw = buffer.view(np.uint8).data
        for at in range(0, whole.size, step):
            part = whole[at : at + step]  # stays in the cache while all masks pass over it
            for stream, combine in streams:
                stream.update_into(_ZEROS[: part.nbytes], raw[: part.nbytes])
                combine(part, buffer[: part.size], out=part)
        return piece

    step = _CHUNK // vector.itemsize
    starts = range(0, vector.size, _CHUNKS * step)
    for piece in in_threads(add, [slice(at, min(at + _CHUNKS * step, vector.size)) for at in starts]):
        if done is not None:
            done(piece)


def _keystream(key: bytes, at: int) -> CipherContext:
    """The AES-256-CTR stream of a key from byte ``at`` on, a whole number of blocks."""
    return Cipher(algorithms.AES256(key), modes.CTR((at // 16).to_bytes(16, "big"))).encryptor()


class Stream:
    """Random bytes from a key, in order: an ``entropy`` that gives the same bytes again after a restart."""

    def __init__(self, key: bytes) -> None:
        self._stream = _keystream(key, 0)

    def __call__(self, n: int) -> bytes:
        return self._stream.update(bytes(n))
