"""Metrics as counters: what a site counts is a whole number, and only the server divides.

Law: the figure of several sites' counters added up is the figure of their rows pooled, bit for bit. A mean of means is not: it
weighs a site of 5 rows like one of 5,000.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fedlora.core.errors import NonFiniteUpdate

MAX_COUNTER: Final = (1 << 53) - 1
"""Largest counter of one site: exact in every JSON parser, and 256 of them stay below 2^63."""
NATS: Final = 1 << 16
"""Units of a counter of nats in one nat."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure as a sum of counters over another one.

    Attributes:
        over: the counter above the line; alone if there is none below it.
        under: the counter below the line; empty for a plain count.
        unit: of ``over`` in one.
        listed: whether a plan may list it; the server makes the others by itself.
    """

    over: str
    under: str = ""
    unit: int = 1
    listed: bool = True

    @property
    def counters(self) -> tuple[str, ...]:
        """What it is made of."""
        return (self.over, self.under) if self.under else (self.over,)

    def finish(self, counters: Mapping[str, int]) -> float | None:
        """The figure, correctly rounded once; None if a counter is missing or there is nothing below the line."""
        if any(name not in counters for name in self.counters):
            return None
        if not self.under:
            return float(counters[self.over])
        below = counters[self.under] * self.unit
        return counters[self.over] / below if below else None


METRICS: Final[Mapping[str, Metric]] = {
    "train/loss": Metric("train/nats", "train/tokens", NATS),
    "eval/nll": Metric("eval/nats", "eval/tokens", NATS),
    "eval/exact_match": Metric("eval/exact", "eval/examples"),
    "eval/coarse_match": Metric("eval/coarse", "eval/examples"),
    "eval/tokens": Metric("eval/tokens"),
    "eval/examples": Metric("eval/examples"),
    "secagg/cut": Metric("secagg/cut", "secagg/values", listed=False),
}
"""All that is ever reported about a run, by name: ``train/`` of local training, ``eval/`` on held-out rows."""

LISTED: Final = tuple(name for name, metric in METRICS.items() if metric.listed)
"""Those that a plan may list."""


def to_nats(value: float) -> int:
    """Nats as a counter, in units of 2^-16, rounded half to even.

    Raises:
        NonFiniteUpdate: NaN or infinity.
    """
    if not math.isfinite(value):
        raise NonFiniteUpdate("a loss is not finite", hint="lower learning_rate, or look at the site's rows")
    return min(max(round(value * NATS), 0), MAX_COUNTER)


def _metric(name: str) -> Metric:
    """One of METRICS, or a plain count of a leakage audit, see :mod:`fedlora.core.tables.audit`."""
    return Metric(name) if name.startswith("audit/") else METRICS[name]


def counters_of(names: Iterable[str]) -> tuple[str, ...]:
    """The counters that these metrics are made of, sorted, each once."""
    return tuple(sorted({counter for name in names for counter in _metric(name).counters}))


def finish(names: Iterable[str], counters: Mapping[str, int]) -> dict[str, float]:
    """These metrics of one site, or of sites whose counters were added up.

    Returns:
        Without those of which a counter is missing or that would divide by zero.
    """
    found = {name: _metric(name).finish(counters) for name in sorted(names)}
    return {name: value for name, value in found.items() if value is not None}


def pool(names: Iterable[str], sites: Collection[Mapping[str, int]]) -> dict[str, float]:
    """These metrics over the rows of all sites together. A site counts in those metrics of which it has sent every counter."""
    found: dict[str, float] = {}
    for name in sorted(names):
        needed = _metric(name).counters
        whole = [site for site in sites if all(counter in site for counter in needed)]
        if whole:
            found |= finish([name], {counter: sum(site[counter] for site in whole) for counter in needed})
    return found


ROWS: Final = "eval/rows"
"""Rows of the file behind an evaluation: one long row may give many examples."""


def is_small(counters: Mapping[str, int], *, min_cell: int) -> bool:
    """Whether an evaluation is over fewer than ``min_cell`` rows: its figures could tell about single ones.

    Args:
        counters: with ``eval/rows``, which never leaves; where a learner does not say it, each example is a row.
    """
    return counters.get(ROWS, counters.get("eval/examples", 0)) < min_cell


def without_evaluation(counters: Mapping[str, int]) -> dict[str, int]:
    """The same with every counter of the evaluation at zero: it adds nothing to a sum, and says nothing of its rows."""
    return {name: 0 if name.startswith("eval/") else value for name, value in counters.items()}


def is_measured(counters: Mapping[str, int]) -> bool:
    """Whether there is an evaluation in these counters."""
    return any(value for name, value in counters.items() if name.startswith("eval/"))


def bad_counters(counters: Mapping[str, int]) -> list[str]:
    """Names of those that are no integer from 0 to MAX_COUNTER, sorted."""
    return sorted(name for name, value in counters.items() if type(value) is not int or not 0 <= value <= MAX_COUNTER)
