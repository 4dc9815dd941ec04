"""How much privacy a list of releases costs: epsilon at one delta, adding or removing one unit.

With the extra ``dp`` by privacy loss distributions, rounded to the safe side (Koskela et al., Computing Tight Differential
Privacy Guarantees Using FFT, 2020; Doroshenko et al., Connect the Dots, 2022). Without it by the exact curve of Gaussian
mechanisms, as if every unit were drawn in every step: always an upper bound, and a large one where few units are drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, reduce
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from fedlora.core.tables.privacy import MOST_SHARED_EPSILON
from fedlora.formats.state.budget import Event

_LEAST_MULTIPLIER: Final = 0.2
"""Below it the distributions are long, and epsilon is beyond any use."""
_GRID: Final = 1e-4
"""Distance of two privacy losses that are told apart."""
_DIGITS: Final = 4
"""Significant digits of a calibrated noise multiplier."""


def accountant() -> str:
    """By what :func:`epsilon` counts here, with its version, for reports."""
    try:
        return f"PLD (dp-accounting {version('dp-accounting')})"
    except PackageNotFoundError:
        return "closed form for Gaussian mechanisms, without amplification by sampling"


def merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same releases with equal ones counted together, in a fixed order."""
    counts: Counter[Event] = Counter()
    for event in events:
        counts[event.model_copy(update={"count": 1})] += event.count
    return tuple(
        kind.model_copy(update={"count": count})
        for kind, count in sorted(counts.items(), key=lambda item: item[0].model_dump_json())
    )


def epsilon(events: Iterable[Event], *, delta: float, honest_others: bool = True) -> float:
    """The least epsilon that can be shown for all of these releases together, at this delta.

    Law: it falls as a noise multiplier grows, and grows with each release and each sampling rate.

    Args:
        delta: from which first goes what the releases take (:attr:`fedlora.formats.state.budget.Event.failure`).
        honest_others: False counts on this site's own noise alone.

    Returns:
        Epsilon; 0 without releases; infinite if the releases take all of delta, or if it is above 12 and counts on shared noise,
        of which what a ring cuts off is counted up to there.
    """
    kinds: Counter[tuple[float, float]] = Counter()
    left, shared = delta, False
    for event in merged(events):
        shared |= event.honest_sites > 1
        alone = 1.0 if honest_others else math.sqrt(event.honest_sites)
        kinds[event.noise_multiplier / alone, event.sampling_rate] += event.count
        left -= event.failure * event.count
    if not kinds:
        return 0.0
    found = _epsilon(tuple(sorted((*kind, count) for kind, count in kinds.items())), left) if left > 0 else math.inf
    return math.inf if honest_others and shared and found > MOST_SHARED_EPSILON else found


@lru_cache(maxsize=256)
def _epsilon(kinds: tuple[tuple[float, float, int], ...], delta: float) -> float:
    bound = gaussian_epsilon(math.sqrt(sum(count / z**2 for z, _, count in kinds)), delta)
    if min(z for z, _, _ in kinds) < _LEAST_MULTIPLIER or all(rate == 1 for _, rate, _ in kinds):
        return bound
    try:
        losses = [_losses(z, rate).self_compose(count) for z, rate, count in kinds]
    except ImportError:
        return bound
    composed = reduce(lambda one, other: one.compose(other), losses)
    return min(float(composed.get_epsilon_for_delta(delta)), bound)


@lru_cache(maxsize=64)
def _losses(z: float, rate: float) -> Any:
    """The privacy losses of one release: most of the time of an answer, and the same for any number of releases."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(z, sampling_prob=rate, value_discretization_interval=_GRID)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon at delta of a Gaussian mechanism of sensitivity ``mu`` and standard deviation 1.

    Any list of Gaussian mechanisms is one, with the root of the sum of their ``mu^2``. Source: Balle, Wang, Improving the
    Gaussian Mechanism for Differential Privacy, 2018, theorem 8; Dong, Roth, Su, Gaussian Differential Privacy, 2022.

    Returns:
        Not below the true value, and at most 1e-9 of it above.
    """
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The curve of that mechanism: ``Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)``."""
    first, second = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    return math.erfc(first / math.sqrt(2)) / 2 - math.exp(epsilon + _log_tail(second))


def _log_tail(x: float) -> float:
    """Logarithm of the normal probability beyond x > 0; a lower bound where erfc is too small."""
    if x < 30:
        return math.log(math.erfc(x / math.sqrt(2)) / 2)
    return -x * x / 2 - math.log(math.sqrt(2 * math.pi)) + math.log(x / (1 + x * x))


def calibrate(make: Callable[[float], Sequence[Event]], *, epsilon_most: float, delta: float) -> float:
    """The least noise multiplier, to four digits, with which releases stay within an epsilon.

    Args:
        make: the releases with a noise multiplier, of a whole plan; of other plans too, if they count.
        epsilon_most: that may be reached, > 0.

    Raises:
        ValueError: no noise is enough: the releases take all of delta, or the others alone are more.
    """

    def excess(z: float) -> float:
        return math.log(max(epsilon(make(z), delta=delta), 1e-12) / epsilon_most)

    low = high = 1.0
    above = below = excess(high)
    while below > 0:
        low, above, high = high, below, 2 * high
        if high > 1e6:
            raise ValueError("no noise multiplier is enough for this epsilon and delta")
        below = excess(high)
    while above <= 0:
        high, below, low = low, above, low / 2
        above = excess(low)
    stayed = 0
    while high - low > 1.5 * _unit(
        high
    ):  # false position in logarithms, on numbers of four digits; at the end a neighbor is tried
        guess = low * (high / low) ** (above / (above - below)) if math.isfinite(above) else math.sqrt(low * high)
        middle = min(max(_rounded_up(guess), low + _unit(low)), high - _unit(high))
        if (now := excess(middle)) <= 0:
            high, below, above, stayed = middle, now, above / 2 if stayed < 0 else above, -1
        else:
            low, above, below, stayed = middle, now, below / 2 if stayed > 0 else below, 1
    return _rounded_up(high)


def _unit(x: float) -> float:
    """Of the last of the digits that count."""
    return float(10.0 ** (math.floor(math.log10(x)) + 1 - _DIGITS))


def _rounded_up(x: float) -> float:
    return round(math.ceil(x / _unit(x) - 1e-9) * _unit(x), 12)
