"""Secret chance: which units a step draws, and its noise, from 32 secret bytes. AES-256 in counter mode (NIST SP 800-38A).

The same secret gives the same draws, so that a step that was interrupted is repeated and not sampled twice. Nothing here may
follow from a plan: what others can compute hides nobody. The generators of numpy and torch are not made to keep secrets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Final, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

F64: TypeAlias = NDArray[np.float64]

SECRET_BYTES: Final = 32
_UNITS, _NOISE, _DIGITS = 0, 1, 2
_BLOCK: Final = 16
_PAIRS: Final = 1 << 14
_DIGITS_PRECISION: Final = 90
_RARE: Final = 1 << 32
_PI: Final = Decimal("3.1415926535897932384626433832795028841971693993751058209749445923078164062862089986280348253421170679")


@dataclass(frozen=True, slots=True)
class Stream:
    """Pseudo-random bytes of one use: block i is AES-256 of ``u64 number || u64 i``, big-endian.

    Args:
        secret: the AES key, 32 bytes.
        number: names the use; each use of a secret has another.
    """

    secret: bytes
    number: int

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise ValueError("a secret has 32 bytes")

    def blocks(self, count: int, *, at: int = 0) -> bytes:
        """``16 * count`` bytes, from block ``at``."""
        start = self.number.to_bytes(8, "big") + at.to_bytes(8, "big")
        return Cipher(algorithms.AES256(self.secret), modes.CTR(start)).encryptor().update(bytes(_BLOCK * count))

    def words(self, count: int, *, at: int = 0) -> NDArray[np.uint64]:
        """Two words a block, little-endian, (2 * count,) uint64, from block ``at``."""
        return np.frombuffer(self.blocks(count, at=at), "<u8")

    def __repr__(self) -> str:
        return f"Stream(number={self.number})"


def poisson(secret: bytes, units: int, rate: float, *, step: int) -> NDArray[np.int64]:
    """Draws each unit independently with one probability (Poisson sampling).

    Args:
        secret: 32 bytes, of one charge.
        units: how many there are.
        rate: q, in (0, 1]. What is drawn has probability ``floor(q 2^64) / 2^64``.
        step: number of the step within the charge: each has draws of its own.

    Returns:
        Numbers of the drawn units, rising, (drawn,) int64; it may be empty.
    """
    if not 0 < rate <= 1:
        raise ValueError("a rate lies in (0, 1]")
    words = _stream(secret, step, _UNITS).words(-(-units // 2))[:units]
    most = int(rate * 2.0**64) - 1  # of 64 bits although rate may be 1
    return np.flatnonzero(words <= np.uint64(most)) if most >= 0 else np.empty(0, np.int64)


def gaussian(secret: bytes, n: int, *, step: int) -> F64:
    """Standard normal values (Box and Muller, A Note on the Generation of Random Normal Deviates, 1958), (n,) float64.

    Each pair takes one block: 64 bits for the radius, 64 for the angle.
    """
    out = np.empty(n)
    for at, values, _ in normals(secret, n, step=step):
        out[at : at + values.size] = values
    return out


def normals(secret: bytes, n: int, *, step: int) -> Iterator[tuple[int, F64, NDArray[np.int64]]]:
    """The values of :func:`gaussian` in parts: position, values, and the numbers of those that are not exact to 2^-26.

    Most of that error is near a radius of 0, as ``sqrt(-2 log U)`` is steep for U near 1; elsewhere it is far smaller. The
    rare values that are not so exact have a radius beyond 6.6, whose bits a word of 64 does not hold.
    """
    stream = _stream(secret, step, _NOISE)
    for at in range(0, -(-n // 2), _PAIRS):
        pairs = min(_PAIRS, -(-n // 2) - at)
        words = stream.words(pairs, at=at)
        radius = np.sqrt(np.abs(-2.0 * np.log((words[0::2] + 0.5) * 2.0**-64)))
        angle = words[1::2] * (2.0 * math.pi * 2.0**-64)
        values = np.empty(2 * pairs)
        np.multiply(radius, np.cos(angle), out=values[0::2])
        np.multiply(radius, np.sin(angle), out=values[1::2])
        rare = np.flatnonzero(np.repeat(words[0::2] < _RARE, 2))
        left = min(2 * pairs, n - 2 * at)
        yield 2 * at, values[:left], 2 * at + rare[rare < left]


def digits(secret: bytes, number: int, *, step: int) -> Decimal:
    """One value of :func:`gaussian` to 50 digits: 128 more bits behind each of its two words, and no float64."""
    pair = number // 2
    words = _stream(secret, step, _NOISE).words(1, at=pair)
    more = _stream(secret, step, _DIGITS).blocks(2, at=2 * pair)
    with localcontext(prec=_DIGITS_PRECISION):
        uniform, turn = (
            (Decimal((int(word) << 128) + int.from_bytes(more[16 * i : 16 * i + 16], "little")) + Decimal("0.5"))
            / Decimal(2) ** 192
            for i, word in enumerate(words)
        )
        angle = 2 * _PI * turn - (_PI / 2 if number % 2 else 0)  # sin x = cos (x - pi / 2)
        return (-2 * uniform.ln()).sqrt() * _cosine(angle)


def _cosine(angle: Decimal) -> Decimal:
    """The power series, for -pi / 2 <= angle < 2 pi."""
    term = total = Decimal(1)
    k = 0
    while abs(term) > Decimal(10) ** -(_DIGITS_PRECISION - 5):
        k += 2
        term *= -angle * angle / (k * (k - 1))
        total += term
    return total


def _stream(secret: bytes, step: int, use: int) -> Stream:
    return Stream(secret, step << 8 | use)
