"""The best guess at one site's update from a sum of whole levels, by a server that believes it knows each site's rounding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_ERF = np.vectorize(math.erf)


def public_noise(seed: str, n: int) -> np.ndarray:
    """Rounding noise in [0, 1) as it was while its seed was public: anybody can make it."""
    key = hashlib.sha256(b"fedlora/v1/sa/rounding\0" + seed.encode()).digest()
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(2 * n)), "<u2") * 2.0**-16


def _distribution(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + _ERF(x / math.sqrt(2.0)))


def _density(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _add(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distribution of a sum of whole numbers, value by value: (n, j) and (n, k) to (n, j + k - 1)."""
    out = np.zeros((one.shape[0], one.shape[1] + other.shape[1] - 1))
    for at in range(other.shape[1]):
        out[:, at : at + one.shape[1]] += one * other[:, at : at + 1]
    return out


def guesses(total: np.ndarray, noises: Sequence[np.ndarray], *, spread: float) -> np.ndarray:
    """Mean of what each site has put in, given the sum and everybody's noise, (sites, n), in levels.

    Args:
        total: signed sum of the levels, (n,); a level is ``floor(value + noise)``.
        spread: standard deviation of a value, in levels; the guess takes values for normal.
    """
    reach = math.ceil(4.0 * spread) + 1
    levels = np.arange(-reach, reach + 1)
    chance, weighted = [], []
    for noise in noises:
        low, high = (levels - noise[:, None]) / spread, (levels + 1 - noise[:, None]) / spread
        chance.append(_distribution(high) - _distribution(low))
        weighted.append(spread * (_density(low) - _density(high)))
    out = np.zeros((len(noises), total.size))
    most = reach * (len(noises) - 1)
    for i in range(len(noises)):
        rest = np.ones((total.size, 1))
        for j, other in enumerate(chance):
            rest = rest if j == i else _add(rest, other)
        above = below = np.zeros(total.size)
        for k, level in enumerate(levels):
            at = total - level + most
            inside = (at >= 0) & (at < rest.shape[1])
            others = np.where(inside, rest[np.arange(total.size), np.clip(at, 0, rest.shape[1] - 1)], 0.0)
            above, below = above + weighted[i][:, k] * others, below + chance[i][:, k] * others
        out[i] = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return out


def advantage(total: np.ndarray, noises: Sequence[np.ndarray], truth: np.ndarray, *, spread: float) -> np.ndarray:
    """Cosine of the guess with what sets each site apart from the mean, (sites,). The mean itself is no secret.

    Args:
        truth: what the sites have put in, (sites, n), in any unit.
    """
    guess = guesses(total, noises, spread=spread)
    guess, apart = guess - guess.mean(axis=0), truth - truth.mean(axis=0)
    norms = np.linalg.norm(guess, axis=1) * np.linalg.norm(apart, axis=1)
    return np.sum(guess * apart, axis=1) / np.maximum(norms, 1e-300)
