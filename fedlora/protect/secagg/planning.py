"""What a federation under secure aggregation survives, said before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedlora.protect.secagg.cohort import Rules
from fedlora.protect.secagg.given import overlapping

__all__ = ["Survival", "survival", "survival_table"]


@dataclass(frozen=True, slots=True)
class Survival:
    """Of ``sites`` sites whose first sum was over all of them; ``away`` and ``lost`` are of the first round that lacks some.

    Attributes:
        stay: of those that begin a round, so many have to stay to its end.
        away: so many at most may be away from a later round.
        lost: so many at most may drop out of a later round after they have trained.
        left_out: so many healthy ones a single absence costs that round, for the difference from the first sum to be wide enough.
    """

    sites: int
    stay: int
    away: int
    lost: int
    left_out: int


def survival(sites: int, rules: Rules, *, lone_change: Literal["refuse", "allow"]) -> Survival:
    """What ``sites`` sites survive.

    Raises:
        ValueError: fewer than ``rules.smallest``.
    """
    if sites < rules.smallest:
        raise ValueError(f"{sites} sites, a session needs {rules.smallest}")
    if lone_change == "refuse":
        least = max(rules.min_cohort, overlapping(sites, colluding=rules.max_colluding))
        rules = replace(rules, min_cohort=least)
    fewest, apart = rules.fewest_inputs(sites), rules.max_colluding + 2
    away, lost = sites - rules.smallest, sites - fewest
    if lone_change == "refuse":  # a sum that differs does so by c + 2 sites or more, healthy ones left out if need be
        away = away if sites - apart >= rules.smallest else 0
        lost = lost if sites - apart >= fewest else 0
    left_out = apart - 1 if lone_change == "refuse" and away else 0
    return Survival(sites, rules.threshold(sites), away, lost, left_out)


def survival_table(sites: Sequence[int], *, colluding: int) -> list[str]:
    """Rows of Markdown for these numbers of sites, of which ``colluding`` may work together with the server."""
    rules = Rules(colluding, 3)
    refuse = [survival(n, rules, lone_change="refuse") for n in sites]
    allow = [survival(n, rules, lone_change="allow") for n in sites]
    rows: dict[str, list[object]] = {
        "n": [s.sites for s in refuse],
        "t: must stay to the end": [s.stay for s in refuse],
        "`refuse`: may be away from a round": [s.away for s in refuse],
        "`refuse`: may drop out during it": [s.lost for s in refuse],
        "`refuse`: healthy sites that one absence costs the round": [s.left_out if s.away else "-" for s in refuse],
        "`allow`: may be away from a round": [s.away for s in allow],
        "`allow`: may drop out during it": [s.lost for s in allow],
    }
    lines = [f"| {name} | {' | '.join(str(x) for x in row)} |" for name, row in rows.items()]
    return [lines[0], "|---" * (len(sites) + 1) + "|", *lines[1:]]
