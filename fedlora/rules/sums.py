"""A weighted sum of updates that is the same, bit for bit, in whatever order they arrive.

Floating-point addition is not associative, integer addition is: each ``weight * delta`` is put on a grid of powers of two
and added as int64. The grid is as fine as the cohort allows without overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import F32, Adapter, Layout, Update
from fedlora.core.errors import UpdateRejected
from fedlora.core.limits import MAX_SITES
from fedlora.rules.factored import product_norm

MAX_DELTA = 64.0
"""Largest change of one value that is believed. LoRA factors move by less than 1."""
MAX_WEIGHT = 1 << 26
"""Largest weight: 67 million supervised tokens in a round."""
MOST_TOGETHER = 16 * MAX_SITES
"""Largest weight of one update that stands for the sum of all sites: 16 for each."""
MAX_COHORT = 1024
"""Most sites in one sum: the grid leaves room for as many without overflow."""

_CHUNK = 1 << 16  # values at a time: the temporaries stay in the cache


class Accumulator(Protocol):
    """Where the updates of one round go.

    Attributes:
        layout: of an update's delta.
        weights: of the updates so far, by site.
    """

    layout: Layout
    weights: dict[str, int]

    @property
    def weight(self) -> int:
        """Sum of the weights."""
        ...

    def add(self, site: str, update: Update, *, squares: NDArray[np.float64] | None = None) -> None:
        """Adds one update, or nothing of it.

        Args:
            site: its name; ``*`` for the mean of several, with the sum of their weights.
            squares: weighted mean of what :func:`squares_of` gives for each of them; None: of the update itself.

        Raises:
            WrongContext (wrong-layout), NonFiniteUpdate: see :meth:`Update.check`.
            UpdateRejected (weight-too-large): more than one site may weigh.
            UpdateRejected: no weight, a value out of range, or the site has been added already.
        """
        ...


def check(site: str, update: Update, *, layout: Layout, max_weight: int) -> None:
    """Refuses an update that no rule may see.

    Raises:
        WrongContext (wrong-layout), NonFiniteUpdate, UpdateRejected: see :meth:`Accumulator.add`.
    """
    update.check(layout.size)
    if update.weight < 1:  # zero would count as a site for the quorum and bring nothing
        raise UpdateRejected(f"weight {update.weight} is below 1")
    if update.weight > max_weight:
        raise UpdateRejected.too_heavy(site, update.weight, max_weight)
    if max(-float(update.delta.min()), float(update.delta.max())) > MAX_DELTA:
        raise UpdateRejected(f"a value changed by more than {MAX_DELTA:g}", hint="training diverged at that site")


@dataclass(slots=True, eq=False)
class Sums:
    """Accumulator of ``sum_i w_i * delta_i``.

    Error: each update is rounded to a multiple of ``2**-exponent``; the mean is within ``N * 2**-(exponent + 1) / sum(w)`` of
    the exact one. For 8 sites of 1,000 tokens that is 2e-12.

    Args:
        layout: of the deltas.
        exponent: see :meth:`start`.
        cohort: most updates that will come.
        max_weight: largest weight of one of them.
    """

    layout: Layout
    exponent: int
    cohort: int
    max_weight: int
    total: NDArray[np.int64]
    weights: dict[str, int] = field(default_factory=dict)
    squares: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def start(cls, layout: Layout, *, cohort: int, max_weight: int) -> Sums:
        """An empty sum. 8 bytes a value.

        Raises:
            ValueError: cohort or max_weight out of range.
        """
        if not 1 <= cohort <= MAX_COHORT or not 1 <= max_weight <= MAX_WEIGHT:
            raise ValueError(f"cohort {cohort}, max_weight {max_weight}")
        bits = math.ceil(math.log2(MAX_DELTA)) + (max_weight - 1).bit_length() + (cohort - 1).bit_length()
        return cls(layout, 62 - bits, cohort, max_weight, np.zeros(layout.size, np.int64))

    @property
    def weight(self) -> int:
        """Sum of the weights."""
        return sum(self.weights.values())

    def add(self, site: str, update: Update, *, squares: NDArray[np.float64] | None = None) -> None:
        """As :meth:`Accumulator.add`."""
        if site in self.weights or len(self.weights) >= self.cohort:
            raise UpdateRejected(f"{site} is in the sum already, or more than {self.cohort} updates came")
        check(site, update, layout=self.layout, max_weight=self.max_weight)
        # A float32 times an integer below 2^27 is exact in float64, and so is the power of two: one rounding in all.
        factor = math.ldexp(float(update.weight), self.exponent)
        buffer = np.empty(_CHUNK, np.float64)
        for at in range(0, self.layout.size, _CHUNK):
            part = update.delta[at : at + _CHUNK]
            scaled = np.multiply(part, factor, out=buffer[: part.size], dtype=np.float64)
            self.total[at : at + _CHUNK] += np.rint(scaled, out=scaled).astype(np.int64)
        self.weights[site] = update.weight
        self.squares[site] = squares_of(update.delta, self.layout) if squares is None else squares

    def mean(self) -> F32:
        """``sum_i w_i delta_i / sum_i w_i``, (n,) float32.

        Raises:
            UpdateRejected: the weights sum to zero.
        """
        if self.weight == 0:
            raise UpdateRejected("no site used a single token; there is nothing to average")
        out = np.empty(self.layout.size, np.float32)
        unit = math.ldexp(1.0, -self.exponent)
        for at in range(0, out.size, _CHUNK):
            out[at : at + _CHUNK] = self.total[at : at + _CHUNK] * unit / self.weight
        return out


@dataclass(slots=True, eq=False)
class Each:
    """Keeps every update, for rules that must see single ones: 4 bytes a value and site."""

    layout: Layout
    cohort: int
    max_weight: int
    weights: dict[str, int] = field(default_factory=dict)
    deltas: dict[str, F32] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """Sum of the weights."""
        return sum(self.weights.values())

    def add(self, site: str, update: Update, *, squares: NDArray[np.float64] | None = None) -> None:
        """As :meth:`Accumulator.add`; the mean of several sites is refused."""
        if site in self.weights or site == "*" or len(self.weights) >= self.cohort:
            raise UpdateRejected(f"{site} is here already, is the mean of several, or more than {self.cohort} updates came")
        check(site, update, layout=self.layout, max_weight=self.max_weight)
        self.weights[site], self.deltas[site] = update.weight, update.delta

    def sites(self) -> list[str]:
        """Sorted, so that no result depends on the order of arrival."""
        return sorted(self.deltas)


def squares_of(delta: F32, layout: Layout) -> NDArray[np.float64]:
    """Squared Euclidean norm of each tensor, (tensors,), in the layout's order."""

    def square(part: F32) -> float:
        total = 0.0
        for at in range(0, part.size, _CHUNK):
            wide = part[at : at + _CHUNK].astype(np.float64)
            total += float(np.einsum("i,i->", wide, wide))  # no BLAS: its threads wait on each other for a vector this short
        return total

    return np.array([square(delta[at]) for _, at, _ in layout.slices()])


def gap(sums: Sums, mean: F32, before: Adapter, *, scale: float) -> dict[str, float]:
    """How far averaging A and B apart can be from averaging their products.

    The error of the factor-wise mean is a covariance, ``G = s * sum_i p_i (B_i - Bbar)(A_i - Abar)``, so
    ``|G| <= s * sqrt(V_A V_B)`` with the variances of the displacements; they need one scalar per tensor and site, which a
    secure sum can carry too. It is zero where all sites hold one of the factors alike. ``ratio`` relates the bound to the
    change of the product itself.

    Args:
        mean: the mean displacement, ``sums.mean()``; not a difference of adapters, which their own size has rounded.
        before: the adapter, with both factors of every pair.

    Returns:
        ``gap/bound``: Frobenius norm over all pairs. ``gap/update``: norm of the mean change of ``s * B @ A``. ``gap/ratio``.
        ``drift``: weighted mean of squared displacements over the squared mean displacement; 1 if all sites agree.
    """
    weights = np.array([sums.weights[s] for s in sorted(sums.weights)], np.float64)
    squares = np.stack([sums.squares[s] for s in sorted(sums.squares)])  # sorted: the same bits in any order of arrival
    raw = np.tensordot(weights / weights.sum(), squares, axes=1)
    middle = squares_of(mean, sums.layout)
    where = {name: (at, shape) for name, at, shape in sums.layout.slices()}
    variance = dict(zip(where, np.maximum(raw - middle, 0.0), strict=True))

    def change(name: str, like: NDArray[np.float64]) -> NDArray[np.float64]:
        if name not in where:
            return np.zeros_like(like)
        at, shape = where[name]
        return mean[at].astype(np.float64).reshape(shape)

    bounds, moved, vector = [], [], before.vector
    for pair in before.layout.pairs():
        a, b = (f"{pair.module}.lora_{f}.weight" for f in "AB")
        bounds.append(float(variance.get(a, 0.0) * variance.get(b, 0.0)))
        a0, b0 = (vector[p].astype(np.float64) for p in (pair.a, pair.b))
        a0, b0 = a0.reshape(pair.rank, pair.d_in), b0.reshape(pair.d_out, pair.rank)
        da, db = change(a, a0), change(b, b0)
        moved.append(product_norm(np.concatenate([db, b0], axis=1), np.concatenate([a0 + da, da], axis=0)))
    bound, update = scale * math.sqrt(math.fsum(bounds)), scale * math.sqrt(math.fsum(m * m for m in moved))
    length = float(middle.sum())
    return {
        "gap/bound": bound,
        "gap/update": update,
        "gap/ratio": bound / update if update > 0 else 0.0,
        "drift": float(raw.sum()) / length if length > 0 else 1.0,
    }
