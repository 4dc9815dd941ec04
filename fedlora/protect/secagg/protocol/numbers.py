"""Numbers that are masked and summed together with the vector: weights, counts, metrics. Single sites' numbers stay secret.

They are integers modulo 2^64 with a mask of their own. The server reads only their sum over the sites.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import SessionError

_PART: Final = 2.0**10  # of a nat
_MOST_METRIC: Final = 2.0**12
_MOST_COUNT: Final = 1 << 26
_SQUARE: Final = 2.0**30
_MOST_SQUARE: Final = 2.0**20
_TOTALS: Final = frozenset({"eval/tokens", "eval/examples"})  # added up; every other metric is a mean
_PER: Final = {"eval/nll": "eval/tokens", "eval/exact_match": "eval/examples", "eval/coarse_match": "eval/examples"}
"""Metric that is a mean -> the count that it is a mean over; for metrics not listed here, what the plan weighs by."""

# Widest sum: 12 + 10 + 26 bits of a metric and 8 of 256 sites, or 20 + 30 of a square, 4 of a weight and 8: below 63.


@dataclass(frozen=True, slots=True)
class Totals:
    """The sum of all sites' numbers, decoded.

    Attributes:
        weight: sum of the weights in the mean.
        sites: number of sites in the sum: each site adds one.
        counted: sum of the tokens or examples that the plan weighs by, before conversion to weights.
        metrics: means over the sites' tokens or examples evaluated, or over what they were trained on.
        squares: weighted mean of the squared norm of each tensor, (tensors,); for the gap certificate.
        cut: values beyond the range, per tensor.
    """

    weight: int
    sites: int
    counted: int
    metrics: Mapping[str, float]
    squares: NDArray[np.float64]
    cut: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Order of the numbers: weight, sites, counted | squares | cut | per metric: sum of totals, sum of counts.

    A mean is sent as its total (nats, or correct examples), which is rounded. Rounding the mean first and then multiplying by the
    site's count would reveal that count, which is the same in all rounds, as a common factor of the site's numbers.

    Args:
        tensors: tensors of the vector.
        metrics: names, in order.
    """

    tensors: int
    metrics: tuple[str, ...]

    @property
    def size(self) -> int:
        return 3 + 2 * self.tensors + 2 * len(self.metrics)

    def pack(
        self, *, weight: int, counted: int, squares: NDArray[np.float64], cut: NDArray[np.int64], metrics: Mapping[str, float]
    ) -> NDArray[np.uint64]:
        """One site's numbers, (size,) uint64. Values out of range are clipped."""
        counted = min(counted, _MOST_COUNT)
        listed: list[int] = []
        for name in self.metrics:
            if name not in metrics:
                listed += [0, 0]
            elif name in _TOTALS:
                listed += [min(int(metrics[name]), _MOST_COUNT), 1]
            else:
                count = max(min(int(metrics[_PER[name]]), _MOST_COUNT) if name in _PER else counted, 1)
                value = min(max(metrics[name], -_MOST_METRIC), _MOST_METRIC)
                listed += [round(value * count * _unit(name)), count]
        squared = np.rint(np.minimum(squares, _MOST_SQUARE) * weight * _SQUARE).astype(np.int64)
        whole = np.concatenate([np.array([weight, 1, counted], np.int64), squared, cut, np.array(listed, np.int64)])
        return whole.view(np.uint64)

    def unpack(self, total: NDArray[np.uint64], *, sites: int) -> Totals:
        """Reads the sum of ``sites`` sites' numbers.

        Raises:
            SessionError: the number of sites is wrong, or there is no weight: the masks were not removed.
        """
        whole = total.view(np.int64)
        weight, count, counted = (int(x) for x in whole[:3])
        if count != sites or weight < 0 or counted < 0:
            raise SessionError("the sum does not open to what the sites sent", hint="a site or the relay has changed something")
        squares, cut, listed = np.split(whole[3:], np.cumsum([self.tensors, self.tensors]))
        metrics = {}
        for i, name in enumerate(self.metrics):
            value, by = int(listed[2 * i]), int(listed[2 * i + 1])
            if by > 0:
                metrics[name] = float(value) if name in _TOTALS else value / _unit(name) / by
        mean = squares / _SQUARE / max(weight, 1)
        return Totals(weight, count, counted, metrics, mean, cut)


def _unit(name: str) -> float:
    """Resolution of a metric's total, parts of one: examples are counted whole."""
    return 1.0 if _PER.get(name) == "eval/examples" else _PART


def with_counts(names: Collection[str]) -> frozenset[str]:
    """These metrics, and the counts that they are means over: both are in the sum."""
    return frozenset(names) | {_PER[name] for name in names if name in _PER}
