"""The table ``[audit]`` of a plan: canaries that sites mix into their rows, and what stops an adapter from being published."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from fedlora.core.section import Section

Score = Literal["loss", "ratio"]
"""By what a row looks as if it had been trained on."""
MOST_CANARIES: Final = 4096
MOST_STRATA: Final = 4
"""Different numbers of repeats: each is a test of its own and makes the others' bounds weaker."""
SMALL_SHARE: Final = 0.02
"""Of a site's rows, expected number of canary rows: with more, the model is trained on canaries."""
WITHOUT_DP_DELTA: Final = 1e-5
"""At which the bound is stated where the plan claims no delta."""


def _rising(repeats: tuple[int, ...]) -> tuple[int, ...]:
    if not repeats or list(repeats) != sorted(set(repeats)) or len(repeats) > MOST_STRATA:
        said = f"repeats are 1 to {MOST_STRATA} different numbers, the smallest first"
        raise PydanticCustomError("repeats", "{text}", {"text": said})
    return repeats


class Audit(Section):
    """Leakage audit: synthetic canary rows, each trained on or not by a secret coin; afterwards each site guesses which.

    It finds leakage where there is much of it. It is no evidence of safety where it finds nothing.
    """

    canaries_per_site: Annotated[int, Field(ge=0, le=MOST_CANARIES)] = 0
    """canaries of a site, half of which are trained on; more: smaller leaks are seen, and more foreign rows. 0: none"""
    repeats: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], AfterValidator(_rising)] = (1, 4)
    """rows of one canary; canaries are dealt to these numbers alike, each reported apart. 1: as a single row; 16: a detector"""
    score: Score = "loss"
    """guesses go by; loss: the loss under the adapter; ratio: the base's loss minus that. Declared before the run"""
    max_rows_share: Annotated[float, Field(gt=0, le=100)] = SMALL_SHARE
    """canary rows expected at a site over its own rows, at most; a site with fewer rows takes no part. Higher: a worse model"""
    required: bool = False
    """publish nothing without an audit that could have found something and found nothing that stops it"""
    max_tpr: Annotated[float, Field(gt=0, le=1)] = 0.1
    """without [privacy]: most trained rows told apart with 1 % false alarms, as a share; in a simulation of 200 canaries"""

    @property
    def per_stratum(self) -> int:
        """Canaries of a site with one number of repeats."""
        return self.canaries_per_site // len(self.repeats)

    @property
    def expected_rows(self) -> float:
        """Canary rows that a site trains on, on average over the coins."""
        return self.per_stratum * sum(self.repeats) / 2


def audited(plan: Any) -> Audit | None:
    """The plan's [audit] if it plants canaries; None otherwise."""
    return plan.audit if plan.audit is not None and plan.audit.canaries_per_site else None


def counter_names(audit: Audit) -> tuple[str, ...]:
    """Counters in which an audit's guesses travel: for each number of repeats how many were right, and how many were made."""
    return tuple(f"audit/{what}/{repeat}" for repeat in audit.repeats for what in ("right", "guesses"))


def audit_counters(plan: Any) -> tuple[str, ...]:
    """Those of a plan; empty without an audit."""
    audit = audited(plan)
    return counter_names(audit) if audit is not None else ()


def shared_metrics(plan: Any, *, last: bool) -> frozenset[str]:
    """Names of the metrics that come with a reply.

    Args:
        last: of the last evaluation, with which alone the guesses of an audit come.
    """
    return frozenset(plan.evaluation.share) | frozenset(audit_counters(plan) if last else ())


def fewest_guesses(strata: int, *, epsilon: float = 1.0, alpha: float = 0.05) -> int:
    """Guesses of a stratum without which no bound can reach ``epsilon``, all of them right: q^r = alpha / strata."""
    return math.ceil(math.log(alpha / strata) / -math.log1p(math.exp(-epsilon)))


def shows(guesses: int, *, canaries: int, strata: int, delta: float, epsilon: float = 1.0, alpha: float = 0.05) -> bool:
    """Whether the bound of a stratum is above ``epsilon`` if all its guesses are right.

    The p-value of :func:`fedlora.privacy.audit.one_run_p_value` for that one case: a delta can make it too large, however many
    guesses there are.

    Args:
        guesses, canaries: of the stratum, at all sites; at least 1.
    """
    wrong = np.arange(1, guesses + 1)  # 1 .. r of them
    ratios = np.log((guesses - wrong + 1) / wrong) - epsilon
    logs = -guesses * math.log1p(math.exp(-epsilon)) + np.concatenate([[0.0], np.cumsum(ratios)])
    below = np.cumsum(np.exp(logs[1:]))  # P[r - i <= X < r]
    return float(np.exp(logs[0]) + 2 * canaries * delta * (below / wrong).max()) < alpha / strata


def audit_misfits(plan: Any) -> Iterator[str]:
    """What in a plan does not go with its [audit], each in a sentence that says what to do; nothing without that table."""
    audit, f, p = plan.audit, plan.federation, plan.privacy
    if audit is None:
        return
    if not audit.canaries_per_site:
        if audit.required:
            yield "[audit] required = true with canaries_per_site = 0: nothing could be found: set canaries_per_site"
        return
    strata = len(audit.repeats)
    if audit.canaries_per_site % strata or audit.per_stratum < 8:
        yield (
            f"[audit] canaries_per_site = {audit.canaries_per_site} for {strata} repeats: an eighth of those with one number of "
            f"repeats is guessed on each side: set a multiple of {strata}, {8 * strata} or more"
        )
    guesses, need = 2 * (audit.per_stratum // 8) * f.min_sites, fewest_guesses(strata)
    delta = p.delta if p is not None else WITHOUT_DP_DELTA
    if audit.required and not (guesses and shows(guesses, canaries=audit.per_stratum * f.min_sites, strata=strata, delta=delta)):
        few, way = f"{need} are needed", "more canaries_per_site"
        if guesses >= need:
            few, way = f"{need} would do without delta = {delta:g}", "a smaller privacy.delta" if p is not None else way
        yield (
            f"[audit] required = true, and {f.min_sites} sites make {guesses} guesses for each number of repeats, with which no "
            f"bound above 1 can be shown: {few}: {way}, or fewer repeats, or required = false"
        )
    if getattr(plan.aggregate.settings, "share", "AB") != "AB":
        yield "[audit] needs one adapter for all: leave aggregate.fedavg.share out, or leave [audit] out"
    if p is None:
        return
    if audit.repeats[-1] > p.max_rows_per_unit:
        yield (
            f"[audit] repeats up to {audit.repeats[-1]}, and a canary is one unit, of which [privacy] max_rows_per_unit = "
            f"{p.max_rows_per_unit} rows are used: fewer repeats, or more rows per unit"
        )
    if audit.canaries_per_site / 2 > audit.max_rows_share * p.units_per_site:
        yield (
            f"[audit] canaries_per_site = {audit.canaries_per_site}, of which half are in, are more than "
            f"{audit.max_rows_share:.0%} of privacy.units_per_site = {p.units_per_site}: fewer canaries; this plan is "
            f"not auditable at this size with more than {max(0, int(2 * audit.max_rows_share * p.units_per_site))}"
        )
