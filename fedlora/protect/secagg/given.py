"""With which other sites a site's updates were added up so far, over all runs.

Under ``lone_change = "refuse"`` a sum is over whole groups of the signed roster, and a site gives on one base model only together
with one group. So any two groups that ever stood in a sum on that base are the same or share no honest site, whoever asked for
what, in how many runs, and whoever knows of which sums. Whatever can be computed from all sums together is a function of the
groups' sums, and each group has ``max_colluding + 2`` sites at the least, of which two are honest.

Source: So, Ali, Guler, Jiao, Avestimehr, Securing Secure Aggregation: Mitigating Multi-Round Privacy Leakage in Federated
Learning, 2023, where sites are divided into batches that take part as a whole.

Sites train anew for each sum, on rows that may have changed; that is not looked at. The law is as strict as if they had not,
because a server can publish one adapter twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from fedlora.core.errors import LoneChange, StoreError
from fedlora.formats.keys import Identity
from fedlora.formats.memory import Memory
from fedlora.protect.secagg.hidden import Hidden
from fedlora.protect.secagg.masks import derive

Groups: TypeAlias = tuple[frozenset[str], ...]
"""Names of sites; none empty, each once, in order of their names."""

_KEY: Final = "secagg/given"


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a site has given, over all runs.

    Attributes:
        groups: base model's digest -> its own groups in the sessions that it has given to. One, unless a person has agreed to
            more.
        alone: base models for which it has given to sums that may differ by single sites.
    """

    groups: Mapping[str, Groups] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()

    def check_alike(self, base: str, *, alone: bool) -> None:
        """All plans on one base let sums differ by single sites, or none does.

        Raises:
            LoneChange.
        """
        if base in self.alone if not alone else base in self.groups:
            words = {True: "allow", False: "refuse"}
            raise LoneChange(
                f"this site's sums on this base model are of plans with lone_change = '{words[not alone]}', "
                f"and this plan says '{words[alone]}': together they could show single updates",
                hint=f"agree on a plan with lone_change = '{words[not alone]}', or on another base model",
            )

    def shown(self, base: str, group: Collection[str]) -> frozenset[str]:
        """The sites that could be uncovered if this site gave together with ``group``; none if it always did.

        All of both groups: which of them depends on sums that this site is not in.
        """
        now, before = frozenset(group), self.groups.get(base, ())
        return now.union(*before) if any(one != now for one in before) else frozenset()

    def check(self, base: str, group: Collection[str], *, uncovers: Collection[str]) -> None:
        """Agrees to give together with these, or says whose update that could show.

        Args:
            base: content digest of the base model.
            group: this site and the others of its group.
            uncovers: sites that a person has named for this plan: it may show them.

        Raises:
            LoneChange.
        """
        self.check_alike(base, alone=False)
        if lone := self.shown(base, group) - frozenset(uncovers):
            before = "; ".join(_names(one, "and") for one in self.groups[base])
            raise LoneChange(
                f"this site's group on the roster is {_names(group, 'and')}; on this base model it has given together with "
                f"{before}. Sums over both could show the update of {_names(lone, 'or')}",
                hint="run with the roster's old groups, or on another base model; or, if that may be: "
                "`fedlora site approve PLAN.toml` with " + " ".join(f"--uncovers {n}" for n in sorted(lone)),
            )

    def after(self, base: str, group: Collection[str] | None) -> Ledger:
        """With one more masked update that may have left this site; ``group`` is None where sums may differ by single sites."""
        if group is None:
            return replace(self, alone=self.alone | {base})
        groups = {*self.groups.get(base, ()), frozenset(group)}
        return replace(self, groups={**self.groups, base: tuple(sorted(groups, key=sorted))})


def _names(sites: Iterable[str], word: str) -> str:
    names = sorted(sites)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


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
            StoreError: damaged. This site then gives to no sum: it cannot know what it has given.
        """
        try:
            facts = self._hidden().get(_KEY, _KEY)
        except ValueError:
            where = self.memory.where(_KEY)
            raise StoreError(
                f"{where}, the record of the sums that this site has given to, is damaged or of another key",
                hint="without it no sum can be compared with earlier ones. Put the file back as it was last; or, if you accept "
                "that a new sum beside an old one on the same base model may show this site's update or another's, delete it",
            ) from None
        if facts is None:
            return Ledger()
        return Ledger({base: tuple(frozenset(one) for one in of) for base, of in facts["groups"]}, frozenset(facts["alone"]))

    def save(self, ledger: Ledger) -> None:
        """Returns after it is on the disk."""
        facts = {
            "groups": [[base, [sorted(one) for one in of]] for base, of in sorted(ledger.groups.items())],
            "alone": sorted(ledger.alone),
        }
        self._hidden().put(_KEY, _KEY, facts)

    def _hidden(self) -> Hidden:
        return Hidden(self.memory, derive(self.identity.signing.private_bytes_raw(), "site-given"), self.entropy)
