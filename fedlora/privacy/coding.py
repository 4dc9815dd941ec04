"""A clipped sum as integers of a ring: noise first, rounding last. FORMAT.md, 15.4, has the proof.

The values are those that exact arithmetic would give: where a float64 lies so near the middle between two levels that its error
could decide, the value is computed again to 50 digits. So the textbook's Gaussian is the one that is released, and the usual
objections to noise in floating point (Mironov, On Significance of the Least Significant Bits for Differential Privacy, 2012) find
nothing: there are no lower bits, and no value has another probability than its integral. For the same reason the levels of one
secret are the same on every machine, however its logarithm and cosine round.
"""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import F32
from fedlora.privacy.draws import F64, digits, normals
from fedlora.privacy.terms import NOISE_LEVELS, PrivacyTerms

ROOM: Final = 11 * NOISE_LEVELS
"""Levels that are kept free for the noise: eleven standard deviations."""
_TAIL: Final = 3.9e-28
"""Probability that one site's noise of a value is beyond them."""
_COMPUTED: Final = 2.0**-150
"""Distance of a computed value's distribution from the ideal one's, read at levels: 192 bits of chance, 50 digits."""
_MARGIN: Final = 2.0**-20
"""In levels; eight times the largest error of a float64 (:func:`fedlora.privacy.draws.normals`)."""


def encode(total: F32 | F64, terms: PrivacyTerms, *, levels: int, secret: bytes, step: int) -> NDArray[np.int32]:
    """The clipped sum of a step, with this site's noise, in levels.

    A value that is not finite counts as 0: to stop would tell something about the rows.

    Args:
        total: sum of the clipped gradients of the drawn units, (n,) float32 or float64.
        levels: most that a value may have in the ring (:class:`fedlora.protect.secagg.protocol.rings.Profile`). The sum is cut to
            ``levels - 88`` before the noise is added, which no unit's norm outgrows.
        secret: 32 bytes, of one charge; each step of it has noise of its own.

    Returns:
        ``rint(total / gamma + 8 N(0, 1))``, within -levels .. levels, (n,) int32.

    Raises:
        ValueError: the ring is too narrow for the noise.
    """
    if levels <= ROOM:
        raise ValueError(f"{levels} levels are too few: the noise alone needs {ROOM}")
    out = np.empty(total.size, np.int32)
    most = float(levels - ROOM)
    for at, noise, rare in normals(secret, total.size, step=step):
        exact = np.asarray(total[at : at + noise.size], np.float64) / terms.level
        np.clip(np.where(np.isfinite(exact), exact, 0.0), -most, most, out=exact)
        noisy = NOISE_LEVELS * noise
        noisy += exact
        near = at + np.flatnonzero(np.abs(noisy - np.floor(noisy) - 0.5) < _MARGIN)
        out[at : at + noise.size] = np.clip(np.rint(noisy), -levels, levels)
        for number in {*near.tolist(), *rare.tolist()}:
            out[number] = max(-levels, min(_exactly(float(exact[number - at]), secret, number, step=step), levels))
    return out


def _exactly(value: float, secret: bytes, number: int, *, step: int) -> int:
    with localcontext(prec=60):
        noisy = Decimal(value) + NOISE_LEVELS * digits(secret, number, step=step)
        return int(noisy.to_integral_value(ROUND_HALF_EVEN))


def aliasing(sites: int, *, std: float) -> float:
    """Bound of how far the sum of rounded Gaussians is from a rounded sum of Gaussians, total variation of one value.

    Args:
        sites: honest sites that add up.
        std: of one site's noise, in levels, at least 2.
    """
    return min((sites - 1) * (36.0 * std**2 * math.sqrt(sites) + 10.0) * math.exp(-((math.pi * std) ** 2)), 1.0)


def failure(values: int, *, sites: int, epsilon: float) -> float:
    """What one release takes of delta because it is computed: ``(1 + e^epsilon)`` for each of the values, and not 1, as either of
    two neighboring data sets has its own distance from the ideal.

    Args:
        values: that are released, of one adapter.
        sites: most that add up. Each computes noise of its own and may cut it; with one, its cut value is computed from itself.
        epsilon: of the whole claim.
    """
    cut = _TAIL if sites > 1 else 0.0  # the clamp of a single site's noisy value is computed from that value alone
    each = aliasing(sites, std=NOISE_LEVELS) + sites * (cut + _COMPUTED)
    return min((1.0 + math.exp(min(epsilon, 700.0))) * values * each, 1.0)
