"""Whether a site would answer ``lone-change`` to a plan, by what it has given: known before anybody asks it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fedlora.core.errors import LoneChange
from fedlora.core.plan import Plan
from fedlora.formats.keys import load_identity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import FileMemory
from fedlora.protect.ledger import Base, Contribution, ContributionStore, Ledger
from fedlora.protect.mode import SumExposure
from fedlora.protect.modes import mode_of
from fedlora.site.site_file import SiteFile


def ledger_of(file: SiteFile, root: Path) -> Ledger:
    """What this site has given, over all runs; only read here.

    Raises:
        StoreError, KeyFileError: it cannot be read.
    """
    memory = FileMemory(root / file.state / "memory")
    if not ContributionStore.begun(memory):
        return Ledger()
    return ContributionStore(memory, load_identity(root / file.key), lambda n: bytes(n)).load()


def contribution_of(told: SumExposure, file: SiteFile, root: Path) -> Contribution | None:
    """This site's part in the sums of a plan under the roster that is in force here; None: no roster has come yet.

    Raises:
        StoreError, WireError: the roster cannot be read.
    """
    if (blob := FileMemory(root / file.state / "memory").get("roster")) is None:
        return None
    roster = SignedRoster.parse(blob).roster
    group = next((group for group in roster.groups() if file.name in group), frozenset[str]())
    return Contribution.of(map(roster.site, group), told.measure)


def foreseen(plan: Plan, file: SiteFile, root: Path, *, uncovers: Collection[str] = ()) -> LoneChange | None:
    """The refusal that a task of this plan would get now, with the way out; None: none for this reason.

    Args:
        root: directory of the site file.
        uncovers: sites whose update the plan may reveal, beside those that the site file names for it.

    Raises:
        StoreError, KeyFileError, WireError: what this site remembers cannot be read.
    """
    base, told, ledger = Base.of(plan), mode_of(plan).told(plan), ledger_of(file, root)
    agreed = {*file.uncovers.get(plan.digest(), ()), *uncovers}
    try:
        if told is None:
            ledger.check(base, None, uncovers=agreed)
        elif told.alone:
            ledger.check_alike(base, alone=True)
        elif (contribution := contribution_of(told, file, root)) is not None:
            ledger.check(base, contribution, uncovers=agreed)
        else:
            _check_without_roster(ledger, base, told)
    except LoneChange as e:
        return e
    return None


def _check_without_roster(ledger: Ledger, base: Base, told: SumExposure) -> None:
    """What is certain whatever this site's group will be.

    Raises:
        LoneChange.
    """
    ledger.check_alike(base, alone=False)
    for before in ledger.before(base):
        if said := Contribution.of((), told.measure).unlike(Contribution((), before.measure)):
            raise LoneChange(said, hint=_LATER)
    if ledger.read(base):
        raise LoneChange("this site has worked for updates that the server reads on this base model", hint=_LATER)


_LATER = (
    "agree on another base model, or run the earlier plan again; which names `fedlora site approve --uncovers` takes is "
    "known once the roster has come with the first task"
)
