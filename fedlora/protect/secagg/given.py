"""What a site has given away so far: which sums its update was in, over all runs, and what the next one would show beside them.

Sites that were always counted together, or not at all, form a *group*. Whatever can be computed from sums of the same updates
is a function of the groups' sums: no combination of sums, of two or of any number, tells two sites of one group apart. So the
law is kept on groups: a sum may split one, or add new sites, only into parts of ``max_colluding + 2`` sites or more, of which
two at least are honest. Hence any two accepted sums have the same sites, or differ by more than ``max_colluding + 1``.

Sites train anew for each sum, on rows that may have changed; that is not looked at. The comparison is as strict as if they had
not, because a server can publish one adapter twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedlora.core.errors import LoneChange, StoreError
from fedlora.core.plan import canonical
from fedlora.formats.files import Memory
from fedlora.formats.keys import Identity
from fedlora.protect.secagg.masks import derive

__all__ = ["Given", "Groups", "Ledger", "Sum", "choose", "overlapping", "refine", "small_parts"]

Groups: TypeAlias = tuple[frozenset[str], ...]
"""Names of sites; disjoint, none empty, in order of each group's first name."""

_KEY: Final = "secagg/given"


# --- groups --------------------------------------------------------------------------------------------------------


def refine(groups: Groups, counted: Collection[str]) -> Groups:
    """The groups after one more sum, over the sites ``counted``."""
    now = frozenset(counted)
    parts = [part for group in groups for part in (group & now, group - now)]
    return tuple(sorted((p for p in (*parts, now.difference(*groups)) if p), key=min))


def small_parts(groups: Groups, counted: Collection[str], *, colluding: int) -> frozenset[str]:
    """The sites that a sum over ``counted`` would leave in a group of at most ``colluding + 1``, unless the group is one already
    and gives nothing to this sum.

    Empty: the sum keeps the law. Else these could be uncovered: their group's sum can be computed, and colluders in it know
    their own part.
    """
    now = frozenset(counted)
    small = [part for part in refine(groups, now) if len(part) < colluding + 2 and (part not in groups or part <= now)]
    return frozenset().union(*small)


def choose(present: Collection[str], groups: Groups, *, colluding: int, keep: str = "") -> frozenset[str]:
    """The most sites of ``present`` whose sum keeps the law: see :func:`small_parts`. May be empty.

    Exact, as what is taken of one group does not touch another: all of a group that is there whole; else as many as leave
    ``colluding + 2`` behind, if they are as many themselves, or none.

    Args:
        keep: a site that is taken before others of its group.
    """
    here, least = frozenset(present), colluding + 2
    chosen: set[str] = set()
    for group in (*groups, here.difference(*groups)):
        there = sorted(group & here, key=lambda name: (name != keep, name))
        room = len(group) if group <= here else len(group) - least
        taken = min(len(there), room)
        if taken >= least:
            chosen.update(there[:taken])
    return frozenset(chosen)


def overlapping(sites: int, *, colluding: int) -> int:
    """Fewest sites of a sum for any two of a federation's to have an honest one in common, who then knows of both.

    Sums that share only colluders, such as over {a b c} and {e f g}, and then one over {a .. g}, show d, and no site knows.
    """
    return (sites + colluding + 1) // 2


# --- what a site remembers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sum:
    """One session's sum: agreed to, or still to come.

    Attributes:
        base: content digest of the base model.
        plan: the plan's digest.
        t1: the session's name, hex.
        sites: whose updates are in it; before the vote, whose may be.
        alone: whether the plan lets its sums differ by single sites.
    """

    base: str
    plan: str
    t1: str
    sites: frozenset[str]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Ledger:
    """A site's sums, over all runs.

    Attributes:
        agreed: base and plan -> groups after all sums that this site has voted for.
        pending: session -> a sum that this site has given its masked update to without having heard which sites it was over;
            taken for one over all that might be.
        alone: base and plan of those whose sums may differ by single sites.
    """

    agreed: Mapping[tuple[str, str], Groups] = field(default_factory=dict)
    pending: Mapping[str, Sum] = field(default_factory=dict)
    alone: frozenset[tuple[str, str]] = frozenset()

    def groups(self, base: str, *, plan: str = "", other_than: str = "", pending: bool = False, but: str = "") -> Groups:
        """Groups after all sums on a base; with ``plan`` of that plan alone, or of all but ``other_than``.

        Args:
            pending: whether those count whose sites are not known.
            but: a session among these that does not.
        """
        of = {found for on, found in self.agreed if on == base} | {s.plan for s in self.pending.values() if s.base == base}
        wanted = {plan} if plan else of - {other_than}
        sums = [group for found in sorted(wanted) for group in self.agreed.get((base, found), ())]
        if pending:
            sums += [s.sites for t1, s in self.pending.items() if s.base == base and s.plan in wanted and t1 != but]
        return reduce(refine, sums, ())

    def shown(self, sum: Sum, *, colluding: int, plan: str = "", other_than: str = "") -> frozenset[str]:
        """The sites that a sum could uncover beside earlier ones, those of ``plan`` or those of all but ``other_than``.

        Looked at without the pending sums and with them: these can make a group smaller, and excuse none for being small.
        """
        found: frozenset[str] = frozenset()
        for pending in (False, True):
            groups = self.groups(sum.base, plan=plan, other_than=other_than, pending=pending, but=sum.t1)
            found |= small_parts(groups, sum.sites, colluding=colluding)
        return found

    def check_alike(self, base: str, *, alone: bool) -> None:
        """All plans on one base let sums differ by single sites, or none does.

        Else sums that differ could be taken from one over sites that had no part in them, and know of none.

        Raises:
            LoneChange.
        """
        earlier = {key in self.alone for key in self.agreed if key[0] == base}
        earlier |= {one.alone for one in self.pending.values() if one.base == base}
        if (not alone) in earlier:
            words = {True: "allow", False: "refuse"}
            raise LoneChange(
                f"this site's sums on this base model are of plans with lone_change = '{words[not alone]}', "
                f"and this plan says '{words[alone]}': together they could show the update of a site that knows of one alone",
                hint=f"agree on a plan with lone_change = '{words[not alone]}', or on another base model",
            )

    def check(self, sum: Sum, *, colluding: int, uncovers: Collection[str]) -> None:
        """Agrees to a sum, or says whose update it could show.

        Args:
            colluding: sites that may work together with the server.
            uncovers: sites that a person has named for this plan: beside other plans' sums it may show them.

        Raises:
            LoneChange.
        """
        self.check_alike(sum.base, alone=sum.alone)
        over = ", ".join(sorted(sum.sites))
        if not sum.alone and (lone := self.shown(sum, colluding=colluding, plan=sum.plan)):
            raise LoneChange(
                f"beside earlier sums of this plan, one over {over} could show the update of {_names(lone)}",
                hint="bring back the sites of the earlier sums, or agree on a plan and policies with lone_change = 'allow'",
            )
        shown = self.shown(sum, colluding=colluding, other_than=sum.plan if sum.alone else "")
        if lone := shown - frozenset(uncovers):
            raise LoneChange(
                f"beside earlier plans' sums on this base, one over {over} could show the update of {_names(lone)}",
                hint="if that may be: `fedlora site approve PLAN.toml` with " + " ".join(f"--uncovers {n}" for n in sorted(lone)),
            )

    def check_hope(self, sum: Sum, own: str, *, colluding: int, fewest: int, uncovers: Collection[str]) -> None:
        """Refuses to give a masked update to a session of which no sum could be agreed to: others might agree to it.

        Args:
            sum: over all sites that may be counted.
            own: this site.
            fewest: sites in a sum.

        Raises:
            LoneChange.
        """
        self.check_alike(sum.base, alone=sum.alone)
        for pending in (False, True):
            of = self.groups(sum.base, plan=sum.plan, pending=pending, but=sum.t1)
            others = self.groups(sum.base, other_than=sum.plan, pending=pending, but=sum.t1)
            for groups in (*([] if sum.alone else [of]), *([] if uncovers else [others])):
                most = choose(sum.sites, groups, colluding=colluding, keep=own)
                if own not in most or len(most) < fewest:
                    self.check(sum, colluding=colluding, uncovers=uncovers)

    def masked(self, sum: Sum) -> Ledger:
        """After this site's masked update of a session may have left it."""
        return replace(self, pending={**self.pending, sum.t1: sum})

    def ended(self, t1: str) -> Ledger:
        """After proof that a session never had a sum."""
        return replace(self, pending={k: v for k, v in self.pending.items() if k != t1})

    def voted(self, sum: Sum) -> Ledger:
        """After this site has agreed to a sum. What is pending and says no more than that goes."""
        key = sum.base, sum.plan
        groups = refine(self.agreed.get(key, ()), sum.sites)
        pending = {
            t1: one
            for t1, one in self.pending.items()
            if t1 != sum.t1 and not ((one.base, one.plan) == key and refine(groups, one.sites) == groups)
        }
        return Ledger({**self.agreed, key: groups}, pending, self.alone | {key} if sum.alone else self.alone)


def _names(sites: Iterable[str]) -> str:
    names = sorted(sites)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


@dataclass(frozen=True, slots=True)
class Given:
    """The ledger on the disk, encrypted under the site's key. Law: what was put is found after a restart.

    Args:
        memory: durable.
        identity: the key is derived from its signing key.
        entropy: n random bytes.
    """

    memory: Memory
    identity: Identity
    entropy: Callable[[int], bytes]

    @staticmethod
    def begun(memory: Memory) -> bool:
        """Whether there is a ledger at all."""
        return memory.get(_KEY) is not None

    def load(self) -> Ledger:
        """
        Raises:
            StoreError: damaged. This site then agrees to no sum: it cannot know what it has given.
        """
        blob = self.memory.get(_KEY)
        if blob is None:
            return Ledger()
        try:
            facts = json.loads(self._cipher().decrypt(blob[:12], blob[12:], _KEY.encode()))
            agreed = {(base, plan): tuple(frozenset(g) for g in groups) for base, plan, groups in facts["agreed"]}
            pending = {t1: Sum(base, plan, t1, frozenset(sites), alone) for base, plan, t1, sites, alone in facts["pending"]}
            lone = frozenset((base, plan) for base, plan in facts["alone"])
        except (InvalidTag, ValueError, KeyError, TypeError):
            where = self.memory.where(_KEY)
            raise StoreError(
                f"{where}, the record of the sums that this site has given to, is damaged or of another key",
                hint="without it no sum can be compared with earlier ones. Put the file back as it was last; or, if you accept "
                "that a new sum beside an old one on the same base model may show this site's update, delete it",
            ) from None
        return Ledger(agreed, pending, lone)

    def save(self, ledger: Ledger) -> None:
        """Returns after it is on the disk."""
        facts = {
            "agreed": [[*key, [sorted(g) for g in groups]] for key, groups in sorted(ledger.agreed.items())],
            "pending": [[s.base, s.plan, s.t1, sorted(s.sites), s.alone] for s in ledger.pending.values()],
            "alone": sorted(ledger.alone),
        }
        nonce = self.entropy(12)
        self.memory.put(_KEY, nonce + self._cipher().encrypt(nonce, canonical(facts), _KEY.encode()))

    def _cipher(self) -> AESGCM:
        return AESGCM(derive(self.identity.signing.private_bytes_raw(), "site-given"))
