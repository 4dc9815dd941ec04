"""What coordinators do: the first roster of a federation, the next epoch of one, and who is a group."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from fedlora.core.errors import RosterInvalid
from fedlora.formats.envelope import NONE, SUITE
from fedlora.formats.keys import PublicIdentity
from fedlora.formats.roster import Member, Roster, federation

_DAY_S: Final = 86_400
VALID_DAYS: Final = 30
"""How long a roster holds unless somebody says otherwise: a server can keep a revocation from sites for no longer."""


def first_epoch(
    server: PublicIdentity,
    sites: Sequence[PublicIdentity],
    coordinators: Sequence[PublicIdentity],
    *,
    needed: int = 1,
    days: int = VALID_DAYS,
    max_colluding: int = 1,
    min_cohort: int = 3,
    min_version: str = "0.1.0",
    group_size: int | None = None,
    now: int,
) -> Roster:
    """The first roster of a federation, in force from ``now`` (seconds since 1970).

    Args:
        group_size: fewest sites of a group; None: ``max_colluding + 2``, the least.

    Raises:
        RosterInvalid: see :class:`Roster`.
    """
    if group_size and group_size > len(sites):
        raise RosterInvalid(f"a group of {group_size} sites is larger than the number of sites")
    return Roster(
        fed=federation(server),
        epoch=1,
        previous=NONE,
        not_before=now,
        not_after=now + days * _DAY_S,
        min_version=min_version,
        suites=(SUITE,),
        max_colluding=max_colluding,
        min_cohort=min_cohort,
        server=server,
        coordinators=tuple(sorted(coordinators, key=lambda c: c.name)),
        needed=needed,
        sites=_in_groups(
            [Member(s, "active") for s in sorted(sites, key=lambda s: s.name)], size=_size(max_colluding, group_size), first=1
        ),
    )


def next_epoch(
    roster: Roster,
    *,
    add: Sequence[PublicIdentity] = (),
    revoke: Collection[str] = (),
    days: int | None = None,
    regroup: bool = False,
    group_size: int | None = None,
    now: int,
) -> Roster:
    """The roster after this one.

    Groups stay as they are. A group with a revoked member is no longer complete; new sites wait until there are enough for a new
    group.

    Args:
        add: new sites; names and keys that were never on the roster.
        revoke: names of sites that no longer take part.
        days: valid for this many days from ``now``; None keeps the end.
        regroup: put all active sites into new groups. On a base model with earlier contributions, a site refuses to be in
            another group, unless a person there accepts by name whose update that may reveal.
        group_size: fewest sites of a new group; None: ``max_colluding + 2``, the least.
        now: seconds since 1970, when it begins.

    Raises:
        RosterInvalid: a name or key that is or was on the roster, too many sites, an end that has passed.
        EnvelopeError (unknown-site), RevokedSite: a site to revoke that is not there, or no longer.
    """
    known = {m.identity.name for m in roster.sites}
    for name in (p.name for p in add if p.name in known):
        raise RosterInvalid(f"{name} is or was on the roster", hint="give a site that comes back new keys and a new name")
    for name in revoke:
        roster.site(name)
    stay = [replace(m, status="revoked") if m.identity.name in revoke else m for m in roster.sites]
    everybody = sorted([*stay, *(Member(p, "active") for p in add)], key=lambda m: m.identity.name)
    if not roster.grouped and len(roster.active()) >= roster.max_colluding + 2:  # all of them were one group
        everybody = [replace(m, group=int(m.identity.name in roster.active())) for m in everybody]
    if regroup:
        everybody = [replace(m, group=0) for m in everybody]
    size, first = _size(roster.max_colluding, group_size), 1 + max(m.group for m in everybody)
    if regroup and group_size and sum(m.status == "active" for m in everybody) < size:
        raise RosterInvalid(f"a group of {size} sites is larger than the number of active sites")
    return replace(
        roster,
        epoch=roster.epoch + 1,
        previous=roster.digest(),
        not_before=now,
        not_after=roster.not_after if days is None else now + days * _DAY_S,
        sites=_in_groups(everybody, size=size, first=first),
    )


def _size(colluding: int, wanted: int | None) -> int:
    least = colluding + 2
    if wanted is not None and wanted < least:
        raise RosterInvalid(f"a group of {wanted} sites is too small: with max_colluding = {colluding} it has at least {least}")
    return wanted or least


def _in_groups(members: Sequence[Member], *, size: int, first: int) -> tuple[Member, ...]:
    """Puts active members that are in no group into as many groups of ``size`` or more as they make, numbered from ``first``."""
    free = [m.identity.name for m in members if m.status == "active" and not m.group]
    count = len(free) // size
    group = {name: first + at % count for at, name in enumerate(free)} if count else {}
    return tuple(replace(m, group=group.get(m.identity.name, m.group)) for m in members)
