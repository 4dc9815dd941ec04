"""Means that do not hide what is missing, and their spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlora.core.words import finite

FEWEST = 3
"""Seeds of a usable 95 % interval: with two, Student's t is 12.7."""
# Two-sided 95 % points of Student's t for 2 to 9 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods,
# table 1.3.6.7.2, column 0.975.
_T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean(values: Sequence[Any]) -> float | None:
    """The mean, or None unless there are values and all are finite numbers."""
    numbers = [finite(v) for v in values]
    known = [v for v in numbers if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(numbers) else None


def minus(a: Any, b: Any) -> float | None:
    x, y = finite(a), finite(b)
    return None if x is None or y is None else x - y


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    center = mean(values)
    if center is None or len(values) < 2:
        return {"mean": center, "sd": None}
    return {"mean": center, "sd": float(np.std(np.array(values, np.float64), ddof=1))}


def interval(values: Sequence[float | None]) -> dict[str, float | None]:
    """95 % t-interval of the mean; none of fewer than :data:`FEWEST`.

    Beyond ten seeds the factor for ten is kept, which makes it a little too wide.
    """
    s = spread(values)
    if s["mean"] is None or s["sd"] is None or len(values) < FEWEST:
        return {"low": None, "high": None}
    half = _T95[min(len(values) - FEWEST, len(_T95) - 1)] * s["sd"] / math.sqrt(len(values))
    return {"low": s["mean"] - half, "high": s["mean"] + half}
