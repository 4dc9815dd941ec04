"""Shamir's secret sharing over the prime field of 2^256 + 297 (Shamir, How to Share a Secret, 1979).

Not constant in time: it runs on the secret owner's host, or on shares that are being revealed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

PRIME = 2**256 + 297
"""The smallest prime above 2^256: any 32 bytes are an element, and a sum of shares never needs a second limb."""
SHARE_BYTES = 33
"""A share on the wire: one element, big-endian."""

_DRAW = 48  # bytes for one coefficient: 128 bits more than the field, so that the remainder is uniform to 2^-128


def split(secret: bytes, *, shares: int, threshold: int, entropy: Callable[[int], bytes]) -> list[bytes]:
    """Shares 1 .. ``shares`` of which any ``threshold`` give the secret back and fewer say nothing about it.

    Args:
        secret: 32 bytes.
        entropy: n random bytes; drawn once, 48 for each coefficient.

    Raises:
        ValueError: a length or a number out of range.
    """
    if len(secret) != 32 or not 1 <= threshold <= shares:
        raise ValueError(f"{len(secret)} bytes, threshold {threshold} of {shares}")
    drawn = entropy(_DRAW * (threshold - 1))
    coefficients = [int.from_bytes(drawn[i : i + _DRAW], "big") % PRIME for i in range(0, len(drawn), _DRAW)]
    constant = int.from_bytes(secret, "big")
    return [_evaluate(constant, coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, shares + 1)]


def _evaluate(constant: int, coefficients: Sequence[int], x: int) -> int:
    y = 0
    for a in reversed(coefficients):
        y = (y + a) * x % PRIME
    return (y + constant) % PRIME


def weights(xs: Sequence[int]) -> dict[int, int]:
    """Lagrange weights at zero for shares at ``xs``: the same for every secret that those sites hold shares of.

    Raises:
        ValueError: a number that is repeated or not positive.
    """
    if len(set(xs)) != len(xs) or any(not 0 < x < PRIME for x in xs):
        raise ValueError("share numbers are distinct and positive")
    out = {}
    for x in xs:
        above = below = 1
        for other in xs:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        out[x] = above * pow(below, -1, PRIME) % PRIME
    return out


def join(shares: Mapping[int, bytes], lagrange: Mapping[int, int]) -> bytes:
    """The secret from exactly the shares that ``lagrange`` is for; 32 bytes.

    Wrong shares give a wrong secret, which the caller must check against what its owner promised; a value that is no secret
    at all gives zeros.

    Raises:
        ValueError: other share numbers than the weights', or a share that is not 33 bytes.
    """
    if shares.keys() != lagrange.keys() or any(len(s) != SHARE_BYTES for s in shares.values()):
        raise ValueError("shares and weights do not belong together")
    value = sum(lagrange[x] * int.from_bytes(s, "big") for x, s in shares.items()) % PRIME
    return value.to_bytes(SHARE_BYTES, "big")[1:] if value < 1 << 256 else bytes(32)
