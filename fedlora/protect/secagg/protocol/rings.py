"""Updates as integers modulo a power of two: profiles, rounding, packing.

A masked value is uniform over its ring, so that it cannot be compressed: its cost is its width. The ring must hold the sum of
all sites: ``2 * levels * sites < 2^bits``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedlora.core.adapter import F32, Layout
from fedlora.core.errors import UpdateRejected

Words: TypeAlias = NDArray[Any]
"""Ring elements in machine words: uint16 for rings of up to 16 bits, uint32 above."""

_CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Profile:
    """How a change becomes an integer.

    Attributes:
        levels: a site's value lies within -levels .. levels.
        bits: width of the ring.
    """

    levels: int
    bits: int

    @property
    def word(self) -> type[np.uint16 | np.uint32]:
        return np.uint16 if self.bits <= 16 else np.uint32


PROFILES: Final[dict[str, Profile]] = {
    "int4": Profile(7, 12),
    "int8": Profile(127, 16),
    "int12": Profile((1 << 11) - 1, 20),
    "int16": Profile((1 << 15) - 1, 24),
    "int24": Profile((1 << 23) - 1, 32),
}
"""Names that a plan may use; each holds 256 sites. int24 is for audits: as exact as float32."""


def scales_for(layout: Layout, profile: Profile, *, reach: float) -> F32:
    """Value of one level, per tensor, (tensors,) float32: :func:`scale_for` for each."""
    return np.full(len(layout.entries), scale_for(profile, reach=reach), np.float32)


def scale_for(profile: Profile, *, reach: float) -> np.float32:
    """Value of one level. It depends only on the plan and the round, not on any update.

    Eleven significant bits, half to even, so that the order of a sum of binary64 numbers does not show.

    Args:
        reach: largest change of a value that the levels can represent, but for that rounding.
    """
    mantissa, exponent = np.frexp(np.float64(reach / profile.levels))
    return np.float32(np.ldexp(np.rint(mantissa * 2048.0) / 2048.0, exponent))


def most_levels(profile: Profile, *, weight_fraction: float) -> int:
    """Largest level of a site with this fraction of the largest weight: the same fraction of the levels, at least one."""
    return math.ceil(profile.levels * weight_fraction)


@cache
def most_rounded_up(profile: Profile, weight: int, sites: int, units: int) -> int:
    """Most parts of a level, in ``units`` of one, that so many sites can round up in all.

    A site of ``w`` units has ``ceil(levels * w / units)`` levels (:func:`most_levels`).

    Args:
        weight: of all sites together, in units; each has from 1 to ``units``.
    """
    best = np.full(weight + 1, -1, np.int64)  # by the weight of the sites so far; -1: not possible
    best[0] = 0
    for _ in range(sites):
        longer = np.full_like(best, -1)
        for w in range(1, min(units, weight) + 1):
            there = best[: weight + 1 - w]
            np.maximum(longer[w:], np.where(there < 0, -1, there + -profile.levels * w % units), out=longer[w:])
        best = longer
    return max(int(best[weight]), 0)


def tensor_slices(layout: Layout) -> list[slice]:
    """The slice of the vector that holds each tensor, in the layout's order."""
    return [at for _, at, _ in layout.slices()]


def encode(
    delta: F32, layout: Layout, profile: Profile, scales: F32, *, weight_fraction: float, key: bytes
) -> tuple[Words, NDArray[np.int64]]:
    """A change as integer levels, with stochastic rounding, so that the expected value is exact.

    Args:
        delta: the change, (n,) float32, finite.
        scales: value of one level, per tensor, (tensors,) float32.
        weight_fraction: this site's weight over the largest weight, in (0, 1]. Values beyond that fraction of the levels are
            clipped. What rounding and clipping leave out is not made up for in a later round: training continues from the
            adapter that lacks it, and a remainder would tell one round's update in another round's sum.
        key: 32 bytes, secret: knowing the rounding direction reveals which site changed a sum. The same key gives the same
            levels.

    Returns:
        Levels as ring elements, (n,) words; number of clipped values per tensor.
    """
    levels, cut = np.empty(delta.size, profile.word), np.zeros(len(layout.entries), np.int64)
    signed = levels.view(np.int16 if profile.word is np.uint16 else np.int32)
    wide = np.float32 if profile.levels < 1 << 12 else np.float64
    noise, most = _Noise(key), wide(most_levels(profile, weight_fraction=weight_fraction))
    scratch: NDArray[Any] = np.empty(_CHUNK, wide)
    for i, tensor in enumerate(tensor_slices(layout)):
        unit = wide(np.float64(scales[i]) / weight_fraction)
        for part in _chunks(tensor):
            values = delta[part]
            scaled = scratch[: values.size]
            np.divide(values, unit, out=scaled)
            scaled += noise.take(values.size)
            np.floor(scaled, out=scaled)
            if scaled.max() > most or scaled.min() < -most:
                cut[i] += int(np.count_nonzero(np.abs(scaled) > most))
                np.clip(scaled, -most, most, out=scaled)
            signed[part] = scaled
    return levels, cut


def _chunks(tensor: slice) -> Iterator[slice]:
    for at in range(tensor.start, tensor.stop, _CHUNK):
        yield slice(at, min(at + _CHUNK, tensor.stop))


class _Noise:
    """Multiples of 2^-16 in [0, 1), from AES-256-CTR."""

    def __init__(self, key: bytes) -> None:
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        self._zeros = bytes(2 * _CHUNK)

    def take(self, n: int) -> F32:
        words = np.frombuffer(self._stream.update(self._zeros[: 2 * n]), "<u2")
        out: F32 = np.multiply(words, np.float32(2.0**-16), dtype=np.float32)
        return out


def sum_to_mean(total: Words, layout: Layout, profile: Profile, scales: F32, *, weight: float, most: int) -> F32:
    """The mean change from the unmasked sum, (n,) float32.

    Args:
        total: sum of all sites' levels, modulo ``2^bits``.
        weight: sum of the sites' weights over the largest weight.
        most: largest possible sum of one value if every site keeps to its range; see
            :meth:`fedlora.protect.secagg.terms.Terms.most`.

    Raises:
        UpdateRejected: a value is beyond it. A site can move a sum only within the range of all sites together.
    """
    out = np.empty(total.size, np.float32)
    shift = np.int64(64 - profile.bits)
    for i, tensor in enumerate(tensor_slices(layout)):
        unit = np.float64(scales[i]) / weight
        for part in _chunks(tensor):
            words = total[part].astype(np.uint64) << np.uint64(shift)  # the ring's sign bit to the word's
            signed = words.view(np.int64) >> shift
            if max(int(signed.max()), -int(signed.min())) > most:
                raise UpdateRejected(
                    "the sum has a value beyond the range of its sites", hint="a site has sent more than its range"
                )
            out[part] = signed * unit
    return out


# --- packing ------------------------------------------------------------------------------------------------------


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of n ring elements on the wire."""
    return -(-n * bits // 8)


def room(out: memoryview, n: int, bits: int) -> Words:
    """Words for n ring elements that :func:`pack_into` will pack into ``out``; a view of ``out`` if the widths are equal."""
    if bits in (16, 32):
        return np.frombuffer(out, f"<u{bits // 8}")
    return np.empty(n, np.uint16 if bits <= 16 else np.uint32)


def pack_into(out: memoryview, words: Words, bits: int) -> None:
    """Little-endian, the first value in the lowest bits; what is above ``bits`` in a word is dropped, padding is zero.

    Args:
        out: :func:`packed_bytes`, writable.
        words: from :func:`room`, or anywhere.
    """
    target = np.frombuffer(out, np.uint8)
    if bits in (16, 32):
        target.view(f"<u{bits // 8}")[:] = words
        return
    mask = np.uint64((1 << bits) - 1)
    for at in range(0, words.size, _CHUNK):
        part = words[at : at + _CHUNK]
        both = part[0::2] & mask
        both[: part.size // 2] |= (part[1::2] & mask) << np.uint64(bits)
        raw = both.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, : bits // 4].ravel()
        here = target[at * bits // 8 :][: raw.size]  # less of the last one, if their number is odd
        here[:] = raw[: here.size]


def pack(words: Words, bits: int) -> bytes:
    """As :func:`pack_into`, to new bytes."""
    out = bytearray(packed_bytes(words.size, bits))
    pack_into(memoryview(out), words, bits)
    return bytes(out)


def unpack(blob: bytes | memoryview, n: int, bits: int) -> Words | None:
    """Inverse of :func:`pack` into words of the ring's width; None if the length or the padding bits are not right."""
    raw = np.frombuffer(blob, np.uint8)
    if raw.size != packed_bytes(n, bits):
        return None
    if bits in (16, 32):
        return raw.view(f"<u{bits // 8}").astype(np.uint16 if bits == 16 else np.uint32)
    each, mask = bits // 4, np.uint64((1 << bits) - 1)
    out = np.empty(n + n % 2, np.uint16 if bits <= 16 else np.uint32)
    for at in range(0, n, _CHUNK):
        part = raw[at * bits // 8 : (at + _CHUNK) * bits // 8]
        both = np.zeros((-(-part.size // each), 8), np.uint8)
        whole = part.size // each
        both[:whole, :each] = part[: whole * each].reshape(-1, each)
        both[whole:, : part.size - whole * each] = part[whole * each :]
        pairs = both.view("<u8")[:, 0]
        out[at : at + 2 * pairs.size : 2] = pairs & mask
        out[at + 1 : at + 2 * pairs.size : 2] = pairs >> np.uint64(bits)
    padding = raw[-1] >> 4 if n * bits % 8 else 0
    return None if padding else out[:n]
