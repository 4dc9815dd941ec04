"""The learning-rate schedule over a run: for local training, and for how far a value can move in a round."""

from __future__ import annotations

import math

_POINTS = 16


def learning_rate(name: str, progress: float, *, peak: float, warmup_ratio: float) -> float:
    """The learning rate at ``progress`` in [0, 1] through the whole run: linear warmup, then the named schedule to zero.

    Args:
        name: transformers' name: ``cosine``, ``linear`` or ``constant``.
    """
    if progress < warmup_ratio:
        return peak * progress / warmup_ratio
    left = (1 - progress) / (1 - warmup_ratio) if warmup_ratio < 1 else 1.0
    return peak * {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[name]


def mean_factor(name: str, round: int, *, rounds: int, warmup_ratio: float) -> float:
    """Mean of the learning rate over its peak in one round, at the middles of 16 equal parts of it; no unit.

    Args:
        round: from 1.
    """
    middles = [(round - 1 + (i + 0.5) / _POINTS) / rounds for i in range(_POINTS)]
    return sum(learning_rate(name, at, peak=1.0, warmup_ratio=warmup_ratio) for at in middles) / _POINTS
