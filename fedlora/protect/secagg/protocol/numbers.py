"""Numbers that are masked and summed together with the vector: weights, counters. Single sites' numbers stay secret.

They are integers modulo 2^64 with a mask of their own. The server reads only their sum over the sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import SessionError
from fedlora.core.metrics import MAX_COUNTER

_MOST_COUNT: Final = 1 << 26
_SQUARE: Final = 2.0**30
_MOST_SQUARE: Final = 2.0**20

# Widest sum: 53 bits of a counter and 8 of 256 sites, or 20 + 30 of a square, 4 of a weight and 8: below 63.


@dataclass(frozen=True, slots=True)
class Totals:
    """The sum of all sites' numbers, decoded.

    Attributes:
        weight: sum of the weights in the mean.
        sites: number of sites in the sum: each site adds one.
        counted: sum of the tokens or examples that the plan weighs by, before conversion to weights.
        counters: sums of the sites' counters; one that no such sum can be is left out: a site has lied.
        squares: weighted mean of the squared norm of each tensor, (tensors,); for the gap certificate.
        cut: values beyond the range, per tensor.
    """

    weight: int
    sites: int
    counted: int
    counters: Mapping[str, int]
    squares: NDArray[np.float64]
    cut: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Order of the numbers: weight, sites, counted | squares | cut | counters.

    A counter is sent as it was counted. A rounded mean times the site's count would reveal that count, which is the same in all
    rounds, as a common factor of the site's numbers.

    Args:
        tensors: tensors of the vector.
        counters: names, in order.
    """

    tensors: int
    counters: tuple[str, ...]

    @property
    def size(self) -> int:
        return 3 + 2 * self.tensors + len(self.counters)

    def pack(
        self, *, weight: int, counted: int, squares: NDArray[np.float64], cut: NDArray[np.int64], counters: Mapping[str, int]
    ) -> NDArray[np.uint64]:
        """One site's numbers, (size,) uint64. Values out of range are clipped.

        Args:
            counters: one that is not here is zero.
        """
        listed = [min(max(counters.get(name, 0), 0), MAX_COUNTER) for name in self.counters]
        squared = np.rint(np.minimum(squares, _MOST_SQUARE) * weight * _SQUARE).astype(np.int64)
        first = np.array([weight, 1, min(counted, _MOST_COUNT)], np.int64)
        return np.concatenate([first, squared, cut, np.array(listed, np.int64)]).view(np.uint64)

    @property
    def evaluation(self) -> list[int]:
        """Where the counters of an evaluation stand."""
        return [at for at, name in enumerate(self.counters, 3 + 2 * self.tensors) if name.startswith("eval/")]

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
        counters = {n: int(v) for n, v in zip(self.counters, listed, strict=True) if 0 <= v <= sites * MAX_COUNTER}
        return Totals(weight, count, counted, counters, squares / _SQUARE / max(weight, 1), cut)
