"""How many absences and dropouts a round of secure aggregation survives, computed before a run begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedlora.protect.secagg.protocol.cohort import SessionRequirements


@dataclass(frozen=True, slots=True)
class Survival:
    """For a federation of ``sites`` sites. ``away`` and ``lost`` hold for any choice of the missing sites.

    Attributes:
        stay: this many of the sites that begin a round must stay until its end.
        away: at most this many may be absent from a round.
        lost: at most this many may drop out of a round after they have trained.
        left_out: at most this many present sites are excluded by one absent site: the others of its group.
    """

    sites: int
    stay: int
    away: int
    lost: int
    left_out: int


def survival(
    sites: int, requirements: SessionRequirements, *, lone_change: Literal["refuse", "allow"], group_size: int = 0
) -> Survival:
    """How many absences and dropouts ``sites`` sites survive, in the groups of a new roster.

    Args:
        group_size: fewest sites of a group; 0: the minimum, ``max_colluding + 2``.

    Raises:
        ValueError: fewer than ``requirements.smallest`` sites.
    """
    if sites < requirements.smallest:
        raise ValueError(f"{sites} sites, a session needs {requirements.smallest}")
    fewest = requirements.fewest_inputs(sites)
    if lone_change == "allow":
        return Survival(sites, requirements.threshold(sites), sites - requirements.smallest, sites - fewest, 0)
    count = max(sites // (group_size or requirements.max_colluding + 2), 1)
    sizes = sorted((sites // count + (k < sites % count) for k in range(count)), reverse=True)
    # In the worst case each missing site is of a different group, and these are the largest groups.
    left = [sites - sum(sizes[:gone]) for gone in range(count + 1)]
    away = max(gone for gone in range(count + 1) if left[gone] >= requirements.smallest)
    lost = max(gone for gone in range(count + 1) if left[gone] >= fewest)
    return Survival(sites, requirements.threshold(sites), away, lost, sizes[0] - 1 if away else 0)
