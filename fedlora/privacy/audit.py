"""Statistics of a leakage audit: what guesses about planted canaries say of epsilon, and how well an attack tells rows apart.

All of it is evidence of leakage where it is high, and no evidence of safety where it is low. Canaries here are synthetic rows
that are trained on or not by a fair coin; they are no part of the egress scan of :mod:`fedlora.doctor.canaries`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

F64: TypeAlias = NDArray[np.float64]

CONFIDENCE: Final = 0.95
"""Of every bound: one audit in twenty of a mechanism with exactly the claimed epsilon may say more than that, at most."""
LEAST_POWER: Final = 1.0
"""Epsilon below which an audit that could show no more says nothing: it is called not auditable at this size."""
_STEPS: Final = 60
_MOST_EPSILON: Final = 64.0


def guesses_each_side(canaries: int) -> int:
    """How many of so many canaries are guessed to be in, and again to be out. Fixed before the run: an eighth."""
    return canaries // 8


def one_run_p_value(*, canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Probability, at most, that an (epsilon, delta) mechanism lets so many guesses be right, or more; 0 to 1.

    Law: it does not fall with ``epsilon``, and is 1 without a right guess.

    Source: Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, 2023, theorem 5.2.

    Args:
        canaries: m, each of which was in by a fair coin of its own.
        guesses: r, how many of them were guessed; chosen before the coins are seen, by whatever was published.
        right: v of these.
        epsilon: at least 0.
        delta: 0 to 1.

    Raises:
        ValueError: not 0 <= right <= guesses <= canaries, or epsilon or delta out of range.
    """
    if not (0 <= right <= guesses <= canaries and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"{right} right of {guesses} guesses on {canaries} canaries, epsilon {epsilon}, delta {delta}")
    tail = _binomial(guesses, epsilon)
    beta = float(tail[right:].sum())
    below = np.cumsum(tail[:right][::-1])  # P[right - i <= X < right], i = 1 .. right
    alpha = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, beta + 2 * canaries * delta * alpha)


def _binomial(n: int, epsilon: float) -> F64:
    """Probability of 0 .. n right guesses, where each is right with e^epsilon / (1 + e^epsilon), (n + 1,)."""
    log_right, log_wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    ways = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    k = np.arange(n + 1)
    logs: F64 = np.array(ways) + k * log_right + (n - k) * log_wrong
    return np.exp(logs)


def epsilon_bound(*, canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """Lower bound of epsilon that these guesses show: mechanisms of less have a p-value below 1 - confidence.

    Returns:
        0 where nothing is shown. Rounded down to 2^-54 of 64.

    Raises:
        ValueError: as :func:`one_run_p_value`; confidence not within (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence}")

    def refuted(epsilon: float) -> bool:
        p = one_run_p_value(canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta)
        return p < 1 - confidence

    low, high = 0.0, _MOST_EPSILON
    if not refuted(low):
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def largest_bound(*, canaries: int, guesses: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The bound if every guess were right: no audit with so many guesses can show more."""
    return epsilon_bound(canaries=canaries, guesses=guesses, right=guesses, delta=delta, confidence=confidence)


def guess(scores: F64, *, each_side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The canaries that are guessed to be in and to be out: the highest and the lowest scores. Ties go to the lower number.

    Args:
        scores: (m,), higher where a row looks more as if it had been trained on.

    Returns:
        Numbers of the two, each (each_side,).

    Raises:
        ValueError: more guesses than canaries, or a score that is not finite.
    """
    if 2 * each_side > len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{2 * each_side} guesses about {len(scores)} finite scores")
    order = np.argsort(-scores, kind="stable")
    return order[:each_side], order[len(order) - each_side :]


def count_right(scores: F64, inside: NDArray[np.bool_], *, each_side: int) -> int:
    """Right ones among ``2 * each_side`` guesses, see :func:`guess`.

    Args:
        scores, inside: (m,); whether each canary was trained on.
    """
    said_in, said_out = guess(scores, each_side=each_side)
    return int(inside[said_in].sum()) + int((~inside[said_out]).sum())


def exposure(secret: float, others: Sequence[float] | F64) -> float:
    """log2 R - log2 rank of a secret among R candidates of one template, bits; ties count half a rank each.

    Source: Carlini, Liu, Erlingsson, Kos, Song, The Secret Sharer, 2019. Of a secret that was not learned the mean over ranks is
    :func:`chance_exposure`, not 0.

    Args:
        secret: its loss.
        others: losses of the R - 1 other candidates.
    """
    rest = np.asarray(others, np.float64)
    rank = 1.0 + int((rest < secret).sum()) + int((rest == secret).sum()) / 2
    return math.log2(len(rest) + 1) - math.log2(rank)


def chance_exposure(candidates: int) -> float:
    """Mean exposure of a secret that nobody has learned, bits: every rank is as likely. 1.44 for many candidates."""
    return math.log2(candidates) - math.lgamma(candidates + 1) / math.log(2) / candidates


@dataclass(frozen=True, slots=True)
class Membership:
    """How well scores tell members from others.

    Attributes:
        auc: area under the ROC curve: probability that a member's score is above another's, ties half. 0.5: this attack failed.
        tpr_1: members found at a threshold with at most 1 % false alarms, as a share.
        tpr_01: the same at 0.1 %.
        members, others: rows.
    """

    auc: float
    tpr_1: float
    tpr_01: float
    members: int
    others: int


def membership(members: Sequence[float] | F64, others: Sequence[float] | F64) -> Membership:
    """Area under the curve and low-false-alarm rates of an attack by threshold.

    Args:
        members, others: scores, higher where a row looks more as if it had been trained on.

    Raises:
        ValueError: one of the two is empty, or a score is not finite.
    """
    a, b = np.asarray(members, np.float64), np.sort(np.asarray(others, np.float64))
    if not (a.size and b.size and np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{a.size} scores of members and {b.size} of others, all finite")
    below, not_above = np.searchsorted(b, a, "left"), np.searchsorted(b, a, "right")
    auc = float((below + not_above).sum()) / (2 * a.size * b.size)
    return Membership(auc, _tpr(a, b, rate=0.01), _tpr(a, b, rate=0.001), a.size, b.size)


def _tpr(members: F64, others: F64, *, rate: float) -> float:
    """Share of members above the lowest threshold that at most ``rate`` of the others exceed; ``others`` sorted."""
    allowed = math.floor(rate * others.size + 1e-9)
    threshold = others[others.size - allowed - 1]
    return float((members > threshold).mean())
