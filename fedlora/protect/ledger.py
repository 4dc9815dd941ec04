"""What a site has contributed on each base model, over all runs, and which further contributions are allowed.

Under ``lone_change = "refuse"`` a sum covers whole groups of the signed roster. On one base model a site contributes only
together with one group (the same sites with the same keys), and only for one plan, in any number of runs. So any two groups in
sums on that base are equal or share no honest site, in however many runs and no matter who knows which sums; and all sums of a
group are of one training. Another plan, even if it differs only a little, could train one site differently and all others to the
same bits (with a batch that holds all rows of every site but one): the difference of two sums would be that site's. Everything
that can be computed from all sums together is a function of the groups' sums, and each group has at least ``max_colluding + 2``
sites, of which at least two are honest.

A single update that a site of a group has sent in sealed mode is known to the server, as if that site colluded; and an error code
may follow from its rows where there is no update. Therefore a site does not both work in sealed mode and contribute to sums on
one base model.

Source: So, Ali, Guler, Jiao, Avestimehr, Securing Secure Aggregation: Mitigating Multi-Round Privacy Leakage in Federated
Learning, 2023, where sites are divided into batches that take part as a whole.

What sites contribute may change from sum to sum, with the adapter, the round and their rows. The difference of two sums is then
the change at the sites that changed, which may be a single one (server/SECURITY.md says when, and what follows).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fedlora.core.canonical import canonical
from fedlora.core.errors import LoneChange, StoreError
from fedlora.core.plan import Plan
from fedlora.formats.derive import derive
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.state.encrypted import EncryptedMemory
from fedlora.formats.state.memory import Memory

_MOST = 12  # keys of a plan that a sentence names
KEY: Final = "secagg/given"
"""Key of the ledger in a site's memory."""
HAS_GIVEN: Final = "secagg/has-given"
"""Key of the note that there is a ledger."""
USED: Final = "secagg/used"
"""Key of the record of the last masked update of a run, behind the run's name."""


@dataclass(frozen=True, slots=True, order=True)
class Base:
    """A base model in a ledger. Two are the same base if their names or their digests are equal.

    One model with another data type or quantization has another digest, but sites learn nearly the same on it.

    Attributes:
        model: the name that plans use, and which the site's own file maps to a directory.
        digest: content digest, type and quantization included.
    """

    model: str
    digest: str

    @classmethod
    def of(cls, plan: Plan) -> Base:
        return cls(plan.model.model_name_or_path, plan.model.digest)

    def meets(self, other: Base) -> bool:
        return self.model == other.model or self.digest == other.digest


@dataclass(frozen=True, slots=True)
class Contribution:
    """A site's part in a sum.

    Attributes:
        members: name -> its keys' fingerprint: this site and the others of its group.
        measure: keys of the plan -> values as text: everything that decides what is added up. See
            :class:`fedlora.protect.mode.SumExposure`.
    """

    members: tuple[tuple[str, str], ...]
    measure: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, members: Iterable[PublicIdentity], measure: Mapping[str, str]) -> Contribution:
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
            return f"when this site contributed on this base model, {_names(new, 'and')} had other keys"
        was, now = dict(before.measure), dict(self.measure)
        keys = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
        changed = [f"{key} = {now.get(key, 'not said')} (was {was.get(key, 'not said')})"[:200] for key in keys]
        changed[_MOST:] = [f"and {len(changed) - _MOST} more"] if len(changed) > _MOST else []
        return f"this plan is not the one of earlier sums on this base model: {', '.join(changed)}" if changed else ""


@dataclass(frozen=True, slots=True)
class Ledger:
    """A site's contributions over all runs, by base model.

    Attributes:
        contributions: its parts in sums over whole groups; more than one only if a person has agreed.
        alone: base models with contributions to sums that may differ by single sites.
        sealed: base models with work for updates that the server could read.
    """

    contributions: Mapping[Base, tuple[Contribution, ...]] = field(default_factory=dict)
    alone: frozenset[Base] = frozenset()
    sealed: frozenset[Base] = frozenset()

    def before(self, base: Base) -> tuple[Contribution, ...]:
        """Its parts in sums on this base model, under any of its names and digests."""
        return tuple(one for known, parts in self.contributions.items() if base.meets(known) for one in parts)

    def read(self, base: Base) -> bool:
        """Whether the server could read an update of this site on this base model."""
        return any(map(base.meets, self.sealed))

    def check_alike(self, base: Base, *, alone: bool) -> None:
        """Checks that a base model does not get both kinds of sums: those that may differ by single sites and those that may not.

        Raises:
            LoneChange.
        """
        if any(map(base.meets, self.contributions if alone else self.alone)):
            words = {True: "allow", False: "refuse"}
            raise LoneChange(
                f"this site's sums on this base model are of plans with lone_change = '{words[not alone]}', "
                f"and this plan says '{words[alone]}': together they could reveal single updates",
                hint=f"agree on a plan with lone_change = '{words[not alone]}', or on another base model",
            )

    def shown(self, base: Base, contribution: Contribution | None) -> frozenset[str]:
        """The sites whose update could be revealed by this contribution; none if all earlier ones were equal to it.

        All sites of all groups concerned: which of them it is depends on sums that this site is not part of.

        Args:
            contribution: None: an update of its own, which the server reads.
        """
        before = self.before(base)
        if contribution is None:
            return frozenset().union(*(one.names for one in before))
        if not self.read(base) and all(one == contribution for one in before):
            return frozenset()
        return contribution.names.union(*(one.names for one in before))

    def check(self, base: Base, contribution: Contribution | None, *, uncovers: Collection[str]) -> None:
        """Accepts a contribution, or refuses it and names the sites whose update it could reveal.

        Args:
            contribution: None: an update of its own, which the server reads.
            uncovers: sites whose update this plan may reveal, as a person at this site has agreed.

        Raises:
            LoneChange.
        """
        if contribution is not None:
            self.check_alike(base, alone=False)
        if lone := self.shown(base, contribution) - frozenset(uncovers):
            raise LoneChange(
                f"{'; '.join(self.unlike(base, contribution))}. Together they could reveal the update of {_names(lone, 'or')}",
                hint="run the earlier plan again, or agree on another base model; or, if this is acceptable: "
                "`fedlora site approve PLAN.toml` with " + " ".join(f"--uncovers {n}" for n in sorted(lone)),
            )

    def unlike(self, base: Base, contribution: Contribution | None) -> list[str]:
        """How a contribution differs from earlier ones, in sentences."""
        if contribution is None:
            return ["this plan has the server read this site's update, and on this base model it has given to sums"]
        read = (
            "this site has worked for updates that the server reads on this base model, and this plan adds them up with others'"
        )
        return [
            *([read] if self.read(base) else []),
            *(s for one in self.before(base) if (s := contribution.unlike(one))),
        ]

    def after(self, base: Base, contribution: Contribution | None) -> Ledger:
        """The ledger after one more masked update; ``contribution`` is None where sums may differ by single sites."""
        if contribution is None:
            return replace(self, alone=self.alone | {base})
        contributions = {*self.contributions.get(base, ()), contribution}
        return replace(
            self, contributions={**self.contributions, base: tuple(sorted(contributions, key=lambda one: canonical(one.facts())))}
        )

    def after_sealed(self, base: Base) -> Ledger:
        """The ledger after an update that the server can read."""
        return replace(self, sealed=self.sealed | {base})


def _names(sites: Iterable[str], word: str) -> str:
    names = [name[:60] for name in sorted(sites)]
    if len(names) > _MOST:
        return f"{', '.join(names[:_MOST])} {word} {len(names) - _MOST} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


@dataclass(frozen=True, slots=True)
class ContributionStore:
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
        """Whether a ledger exists."""
        return memory.get(KEY) is not None

    def load(self) -> Ledger:
        """Reads the ledger; an empty one if this site has never contributed.

        Raises:
            StoreError: it is damaged, or missing although this site has contributed. The site then contributes to no sum.
        """
        try:
            facts = self._hidden().get(KEY, KEY)
        except ValueError:
            raise self._unknown("damaged or of another key") from None
        if facts is not None:
            contributions = {
                Base(*one["base"]): tuple(Contribution.parse(part) for part in one["parts"]) for one in facts["contributions"]
            }
            alone, sealed = (frozenset(Base(*one) for one in facts[key]) for key in ("alone", "sealed"))
            return Ledger(contributions, alone, sealed)
        if self._noted() is not False or any(key.endswith(f"/{USED}") for key in self.memory.keys()):  # noqa: SIM118  # a memory is no dict
            raise self._unknown("gone")
        return Ledger()

    def compare(
        self,
        contribution: Contribution | None,
        base: Base,
        *,
        known: Callable[[str], PublicIdentity],
        uncovers: Collection[str],
    ) -> frozenset[str]:
        """Agrees to a contribution beside earlier ones, and says whose updates that may show: sites of ``uncovers``.

        Args:
            contribution: None where sums may differ by single sites.
            known: the roster's present keys of a site.

        Raises:
            LoneChange: it could show another one's, or a site of the group has other keys than when the session began.
            StoreError: see :meth:`load`.
        """
        ledger = self.load()
        if contribution is None:
            ledger.check_alike(base, alone=True)
            return frozenset()
        if contribution.members != Contribution.of(map(known, contribution.names), {}).members:
            raise LoneChange("a site of this site's group has other keys than when the session began")
        ledger.check(base, contribution, uncovers=uncovers)
        return ledger.shown(base, contribution)

    def _unknown(self, what: str) -> StoreError:
        return StoreError(
            f"{self.memory.where(KEY)}, the record of the sums that this site has contributed to, is {what}",
            hint="restore the newest copy of the file: without it no sum can be compared with earlier ones. Or, if you accept "
            "that a new sum, compared with an old one on the same base model, may reveal an update of this site or of another: "
            "run `fedlora site repair site.toml --forget-sums`",
        )

    def save(self, ledger: Ledger) -> None:
        """Writes the ledger; it is on the disk when this returns."""
        facts = {
            "contributions": [
                {"base": [base.model, base.digest], "parts": [one.facts() for one in of]}
                for base, of in sorted(ledger.contributions.items(), key=lambda item: item[0])
            ],
            "alone": [[base.model, base.digest] for base in sorted(ledger.alone)],
            "sealed": [[base.model, base.digest] for base in sorted(ledger.sealed)],
        }
        self._hidden().put(KEY, KEY, facts)
        if self._noted() is not True:  # after it: a ledger that was never written is not missed
            self.memory.put(HAS_GIVEN, b"1")  # of all runs, and never taken back: a ledger that is gone is then missed

    def _noted(self) -> bool | None:
        """Whether a note says that a ledger exists; None if the note is damaged, so that there was one."""
        try:
            return self.memory.get(HAS_GIVEN) is not None
        except StoreError:
            return None

    def _hidden(self) -> EncryptedMemory:
        return EncryptedMemory(self.memory, derive(self.identity.signing.private_bytes_raw(), "site-given"), self.entropy)
