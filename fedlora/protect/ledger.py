"""What a site has contributed on each base model, over all runs, and which further contributions are allowed.

Under ``lone_change = "refuse"`` a sum is over whole groups of the signed roster, and a site gives on one base model only together
with one group, of the same sites by the same keys, and only to sums that add up the same of each of them. So any two groups that
ever stood in a sum on that base are the same or share no honest site, whoever asked for what, in how many runs, and whoever knows
of which sums; and over one group there is one sum of all that a site could have sent, not several with other weights. Whatever
can be computed from all sums together is a function of the groups' sums, and each group has ``max_colluding + 2`` sites at the
least, of which two are honest.

A single update that one of a group has sent in sealed mode counts as if that site colluded: so sealed updates and sums do
not stand side by side on one base model either.

Source: So, Ali, Guler, Jiao, Avestimehr, Securing Secure Aggregation: Mitigating Multi-Round Privacy Leakage in Federated
Learning, 2023, where sites are divided into batches that take part as a whole.

Sites train anew for each sum, on rows that may have changed. That is not looked at: the law is as strict as if they had not,
because a server can publish one adapter twice; but where one site's rows alone have changed, the difference of two sums of its
group is the change of its update (server/SECURITY.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fedlora.core.canonical import canonical
from fedlora.core.errors import LoneChange, StoreError
from fedlora.formats.derive import derive
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.memory import Memory
from fedlora.protect.encrypted import EncryptedMemory

KEY: Final = "secagg/given"
"""Where a site's memory keeps it."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """A site's part in a sum.

    Attributes:
        members: name -> its keys' fingerprint: this site and the others of its group.
        measure: keys of the plan -> values: how an update becomes what is added up. See :func:`fedlora.protect.mode.SumExposure`.
    """

    members: tuple[tuple[str, str], ...]
    measure: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, members: Iterable[PublicIdentity], measure: Mapping[str, Any]) -> Contribution:
        return cls(tuple(sorted((m.name, m.fingerprint()) for m in members)), tuple(sorted(measure.items())))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.members)

    def facts(self) -> dict[str, Any]:
        return {"members": dict(self.members), "measure": dict(self.measure)}

    @classmethod
    def parse(cls, facts: Mapping[str, Any]) -> Contribution:
        """Inverse of :meth:`facts`."""
        return cls(tuple(sorted(facts["members"].items())), tuple(sorted(facts["measure"].items())))

    def unlike(self, before: Contribution) -> str:
        """What differs, in a sentence; empty if nothing does."""
        if self.names != before.names:
            return (
                f"this site's group on the roster is {_names(self.names, 'and')}, and on this base model it has contributed "
                f"together with {_names(before.names, 'and')}"
            )
        if new := sorted(name for name, _ in set(self.members) - set(before.members)):
            return f"{_names(new, 'and')} had other keys when this site contributed together with them on this base model"
        was = dict(before.measure)
        changed = [f"{key} = {value!r} (was {was.get(key)!r})" for key, value in self.measure if was.get(key) != value]
        return (
            f"this plan's sums are of another kind than earlier ones on this base model: {', '.join(changed)}" if changed else ""
        )


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a site has given, over all runs. Everything by the base model's digest.

    Attributes:
        contributions: its parts in sums over whole groups. One, unless a person has agreed to more.
        alone: base models for which it has given to sums that may differ by single sites.
        sealed: base models for which it has sent updates that the server reads.
    """

    contributions: Mapping[str, tuple[Contribution, ...]] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()
    sealed: frozenset[str] = frozenset()

    def check_alike(self, base: str, *, alone: bool) -> None:
        """All plans on one base let sums differ by single sites, or none does.

        Raises:
            LoneChange.
        """
        if base in self.alone if not alone else base in self.contributions:
            words = {True: "allow", False: "refuse"}
            raise LoneChange(
                f"this site's sums on this base model are of plans with lone_change = '{words[not alone]}', "
                f"and this plan says '{words[alone]}': together they could reveal single updates",
                hint=f"agree on a plan with lone_change = '{words[not alone]}', or on another base model",
            )

    def shown(self, base: str, contribution: Contribution | None) -> frozenset[str]:
        """The sites that could be uncovered if this site gave this; none if it always did, and nothing else.

        All of all groups: which of them depends on sums that this site is not in.

        Args:
            contribution: None: an update of its own, which the server reads.
        """
        before = self.contributions.get(base, ())
        if contribution is None:
            return frozenset().union(*(one.names for one in before))
        if base not in self.sealed and all(one == contribution for one in before):
            return frozenset()
        return contribution.names.union(*(one.names for one in before))

    def check(self, base: str, contribution: Contribution | None, *, uncovers: Collection[str]) -> None:
        """Agrees to give this, or says whose update that could show.

        Args:
            base: content digest of the base model.
            contribution: None: an update of its own, which the server reads.
            uncovers: sites that a person has named for this plan: it may show them.

        Raises:
            LoneChange.
        """
        if contribution is not None:
            self.check_alike(base, alone=False)
        if lone := self.shown(base, contribution) - frozenset(uncovers):
            raise LoneChange(
                f"{'; '.join(self.unlike(base, contribution))}. Together they could reveal the update of {_names(lone, 'or')}",
                hint="agree on a plan that does not differ in this, or on another base model; or, if this is acceptable: "
                "`fedlora site approve PLAN.toml` with " + " ".join(f"--uncovers {n}" for n in sorted(lone)),
            )

    def unlike(self, base: str, contribution: Contribution | None) -> list[str]:
        """How this differs from what was given before, in sentences."""
        if contribution is None:
            return ["this plan has the server read this site's update, and on this base model it has given to sums"]
        read = "the server has read an update of this site on this base model, and this plan adds it up with others'"
        return [
            *([read] if base in self.sealed else []),
            *(s for one in self.contributions.get(base, ()) if (s := contribution.unlike(one))),
        ]

    def after(self, base: str, contribution: Contribution | None) -> Ledger:
        """With one more masked update that may have left this site; None where sums may differ by single sites."""
        if contribution is None:
            return replace(self, alone=self.alone | {base})
        contributions = {*self.contributions.get(base, ()), contribution}
        return replace(
            self, contributions={**self.contributions, base: tuple(sorted(contributions, key=lambda one: canonical(one.facts())))}
        )

    def after_sealed(self, base: str) -> Ledger:
        """With an update of its own that the server reads."""
        return replace(self, sealed=self.sealed | {base})


def _names(sites: Iterable[str], word: str) -> str:
    names = sorted(sites)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


@dataclass(frozen=True, slots=True)
class ContributionStore:
    """The ledger on the disk, encrypted under the site's key. Law: what was put is found after a restart.

    Args:
        memory: durable.
        identity: the key is derived from its signing key.
        entropy: n random bytes.
        has_given: whether something else on this disk says that this site has given to a sum.
    """

    memory: Memory
    identity: Identity
    entropy: Callable[[int], bytes]
    has_given: Callable[[], bool] = lambda: False

    @staticmethod
    def begun(memory: Memory) -> bool:
        """Whether there is a ledger at all."""
        return memory.get(KEY) is not None

    def load(self) -> Ledger:
        """
        Raises:
            StoreError: damaged, or gone though this site has given. It then gives to no sum: it cannot know what it has given.
        """
        try:
            facts = self._hidden().get(KEY, KEY)
        except ValueError:
            raise self._unknown("damaged or of another key") from None
        if facts is not None:
            contributions = {base: tuple(Contribution.parse(one) for one in of) for base, of in facts["contributions"].items()}
            return Ledger(contributions, frozenset(facts["alone"]), frozenset(facts["sealed"]))
        if self.has_given():
            raise self._unknown("gone")
        return Ledger()

    def _unknown(self, what: str) -> StoreError:
        return StoreError(
            f"{self.memory.where(KEY)}, the record of the sums that this site has contributed to, is {what}",
            hint="restore the newest copy of the file: without it no sum can be compared with earlier ones. Or, if you accept "
            "that a new sum, compared with an old one on the same base model, may reveal an update of this site or of another: "
            "run `fedlora site repair site.toml --forget-sums`",
        )

    def save(self, ledger: Ledger) -> None:
        """Returns after it is on the disk."""
        facts = {
            "contributions": {base: [one.facts() for one in of] for base, of in ledger.contributions.items()},
            "alone": sorted(ledger.alone),
            "sealed": sorted(ledger.sealed),
        }
        self._hidden().put(KEY, KEY, facts)

    def _hidden(self) -> EncryptedMemory:
        return EncryptedMemory(self.memory, derive(self.identity.signing.private_bytes_raw(), "site-given"), self.entropy)
