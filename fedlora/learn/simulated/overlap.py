"""What sites of a simulation share: groups that are trained on at one site and scored at another, and labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedlora.data import Conversation

Rows: TypeAlias = Mapping[str, Mapping[str, Sequence[Conversation]]]
"""Site -> split -> rows."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Groups that are at more than one site.

    Attributes:
        groups: how many.
        elsewhere: site -> its scored rows of groups that another site trains on.
        scored: scored rows of all sites.
    """

    groups: int
    elsewhere: Mapping[str, int]
    scored: int


def shared(rows: Rows, *, split: str) -> Shared:
    """Of rows with a group; whether two sites hold the same person can be said of no others.

    Args:
        split: the rows that are scored.
    """
    at: dict[str, set[str]] = defaultdict(set)
    trained: dict[str, set[str]] = defaultdict(set)
    for site, parts in rows.items():
        for part, of in parts.items():
            for row in of:
                at[row.group].add(site)
                if part == "train":
                    trained[row.group].add(site)
    elsewhere = {
        site: sum(bool(row.group and trained.get(row.group, set()) - {site}) for row in parts[split])
        for site, parts in rows.items()
    }
    several = sum(len(sites) > 1 for group, sites in at.items() if group)
    return Shared(several, elsewhere, sum(len(parts[split]) for parts in rows.values()))


def shared_line(found: Shared, *, group_key: str, split: str) -> str:
    """What follows from it for the scores; empty where no group is at two sites."""
    if not found.groups:
        return ""
    total = sum(found.elsewhere.values())
    sites = ", ".join(f"{site} {count:,}" for site, count in found.elsewhere.items() if count)
    at_two = f"{found.groups:,} groups of {group_key} have rows at more than one site"
    if not total:
        return f"{at_two}; none of the {found.scored:,} {split} rows is of a group that another site trains on"
    return (
        f"{at_two}: rows of one patient or customer may be trained on at one site and scored at another; "
        f"{total:,} of {found.scored:,} {split} rows are of groups that another site trains on ({sites}), "
        "so scores of arms with rows of several sites are not of new people alone"
    )


def label_counts(rows: Rows) -> dict[str, list[int]]:
    """Site -> its rows of each label, by the order of the labels' names, which are not told."""
    of = {site: Counter(row.label for part in parts.values() for row in part) for site, parts in rows.items()}
    labels = sorted(set().union(*of.values()))
    return {site: [count[label] for label in labels] for site, count in of.items()}
