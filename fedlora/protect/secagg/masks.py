"""Masks: a key becomes as many uniform ring elements as there are values, added or subtracted in place.

AES-256 in counter mode with a zero start, each key used once; words are little-endian, so that the stream does not depend on
how it is cut (NIST SP 800-38A, 6.5).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

_CHUNK: Final = 1 << 18  # bytes at a time
_ZEROS: Final = memoryview(bytes(_CHUNK))


def derive(key: bytes, label: str, *, salt: bytes = b"", context: bytes = b"", length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869) under one of our labels."""
    info = b"fedlora/v1/sa/" + label.encode() + b"\0" + context
    return HKDF(hashes.SHA256(), length, salt=salt or None, info=info).derive(key)


def add_masks(vector: NDArray[Any], masks: Iterable[tuple[bytes, Literal[1, -1]]]) -> None:
    """Adds or subtracts the masks of some keys, modulo the width of the words, in place.

    Args:
        vector: (n,) contiguous little-endian unsigned words.
        masks: key of 32 bytes, for this mask only, and sign.
    """
    streams = [
        (Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor(), np.add if sign > 0 else np.subtract)
        for key, sign in masks
    ]
    step = _CHUNK // vector.itemsize
    buffer = np.empty(step, vector.dtype)
    raw = buffer.view(np.uint8).data
    for at in range(0, vector.size, step):
        part = vector[at : at + step]  # stays in the cache while all masks pass over it
        for stream, combine in streams:
            stream.update_into(_ZEROS[: part.nbytes], raw[: part.nbytes])
            combine(part, buffer[: part.size], out=part)


class Stream:
    """Random bytes from a key, in order: the ``entropy`` of what must come out the same when it is asked again."""

    def __init__(self, key: bytes) -> None:
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def __call__(self, n: int) -> bytes:
        return self._stream.update(bytes(n))
