"""Which roster one end of a federation trusts: what its operator approved, and from there each next epoch. FORMAT.md, 9.3."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora.core.deployment.digests import apart
from fedlora.core.errors import BadSignature, EnvelopeError, RosterInvalid, RosterRollback, WireError
from fedlora.formats.envelope import SUITE
from fedlora.formats.keys import PublicIdentity
from fedlora.formats.roster import Roster
from fedlora.formats.signed_roster import NEWEST, SignedRoster, load_roster
from fedlora.formats.state.memory import Memory


def accept(new: SignedRoster, *, current: SignedRoster | None, pinned: str, now: int) -> SignedRoster:
    """The roster that is in force once ``new`` has arrived. Keep what it returns as the next ``current``, durably, first.

    Args:
        new: from anywhere.
        current: what was accepted last; None if nothing ever was.
        pinned: digest that the operator approved, hex.
        now: seconds since 1970.

    Returns:
        ``current`` if ``new`` is the same, else ``new``; every signature in it has been checked.

    Raises:
        RosterInvalid: not approved, of another federation, an epoch was left out, or signatures are missing or not valid.
        RosterRollback: older than ``current``, or another one of its epoch.
        RosterExpired: all is well but the time.
    """
    if current is None:
        accepted = _approved(new, pinned)
    elif new.roster.digest() == current.roster.digest():
        accepted = current
    else:
        accepted = _follows(new, current, pinned)
    accepted.roster.check_time(now)
    return accepted


def _approved(new: SignedRoster, pinned: str) -> SignedRoster:
    digest, own = new.roster.digest(), new.roster.coordinators
    if digest != pinned:
        raise RosterInvalid(
            f"the roster {digest[:16]} is not the one that was approved here "
            f"({apart(digest, pinned) if pinned else 'none: `roster` in site.toml is empty'})",
            hint="compare the digest that `fedlora roster show` prints with the coordinators over the telephone, then correct "
            "`roster` in the site file: a `site up` that runs reads it again at the next task",
        )
    # The epoch before may have had other coordinators, whose keys are not known here: what they signed says nothing.
    names = {c.name for c in own}
    checked = replace(new, signatures={n: s for n, s in new.signatures.items() if n in names})
    checked.verify(own, new.roster.needed)
    return checked


def _follows(new: SignedRoster, current: SignedRoster, pinned: str) -> SignedRoster:
    old, at = current.roster, new.roster
    if at.fed != old.fed:
        raise RosterInvalid("the roster of another federation")
    if at.epoch <= old.epoch:
        what = "another roster" if at.epoch == old.epoch else "a roster"
        raise RosterRollback(f"{what} of epoch {at.epoch}; epoch {old.epoch} is in force", hint="ask for the newest roster")
    if at.digest() == pinned:  # approved by hand: the way over a gap, and out of the loss of the coordinators' keys
        return _approved(new, pinned)
    if at.epoch != old.epoch + 1:
        raise RosterInvalid(
            f"a roster of epoch {at.epoch}; epoch {old.epoch} is in force and the epochs between are missing",
            hint="supply them one by one, or approve this one by hand: compare its digest, then pin it",
        )
    if at.previous != old.digest():
        raise RosterInvalid(f"epoch {at.epoch} does not follow the roster that is in force here")
    keys = {m.identity.name: m.identity for m in at.sites}
    if other := sorted(m.identity.name for m in old.sites if keys.get(m.identity.name) != m.identity):
        raise RosterInvalid(
            f"{', '.join(other)} would be gone from the roster or have other keys",
            hint="revoke a site instead of removing it; give a site that comes back a new name",
        )
    new.verify(old.coordinators, old.needed, others=at.coordinators)
    new.verify(at.coordinators, at.needed, others=old.coordinators)
    return new


@dataclass(slots=True, eq=False)
class RosterKeeper:
    """What one end of a federation has accepted, durably. Law: an epoch never falls.

    Args:
        memory: durable.
        server: the aggregator's keys, pinned; a roster with others is not this federation's.
        pinned: gives the digest that the operator approved, hex; asked at every task, as it may have been corrected since.
        clock: seconds since 1970.
        version: of this release.
    """

    memory: Memory
    server: PublicIdentity
    pinned: Callable[[], str]
    clock: Callable[[], int]
    version: str
    _current: SignedRoster | None = field(default=None, init=False)

    @classmethod
    def here(cls, memory: Memory, server: PublicIdentity, pinned: Callable[[], str]) -> RosterKeeper:
        """With this machine's clock, for this release."""
        return cls(memory, server, pinned, lambda: int(time.time()), importlib.metadata.version("fedlora"))

    @property
    def current(self) -> Roster:
        """The roster in force here.

        Raises:
            RosterInvalid: none has been accepted yet.
        """
        if self._current is None:
            blob = self.memory.get("roster")
            if not blob:
                raise RosterInvalid("no roster has been accepted here", hint="it comes with the first task of a run")
            self._current = SignedRoster.parse(blob)
        return self._current.roster

    def check_time(self) -> None:
        """Refuses whatever is done under a roster that has ended, also in what was begun before.

        Raises:
            RosterInvalid, RosterExpired.
        """
        self.current.check_time(self.clock())

    def take(self, blob: bytes) -> SignedRoster:
        """Accepts what has arrived, or says why not; what is accepted is on the disk before this returns.

        Raises:
            RosterInvalid, RosterRollback, RosterExpired: see :func:`accept`.
            WireError (version-unsupported): the roster asks for a newer release.
            EnvelopeError (suite-downgrade): or for other suites than this one has.
        """
        known = self.memory.get("roster")
        new, current = SignedRoster.parse(blob), SignedRoster.parse(known) if known else None
        accepted = accept(new, current=current, pinned=self.pinned(), now=self.clock())
        roster = accepted.roster
        if (roster.server.signing, roster.server.kem) != (self.server.signing, self.server.kem):
            raise RosterInvalid("the roster names another server than the one that is pinned here")
        if _release(self.version) < _release(roster.min_version):
            raise WireError(
                f"this is FedLoRA {self.version}, the roster asks for {roster.min_version}",
                hint="update FedLoRA",
                code="version-unsupported",
            )
        if SUITE not in roster.suites:
            raise EnvelopeError(
                f"the roster allows suites {list(roster.suites)}, this release has {SUITE}", code="suite-downgrade"
            )
        if accepted is not current:
            self.memory.put("roster", accepted.dump())
        self._current = accepted
        return accepted


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", version)[:3])


def rosters_in(file: Path, memory: Memory, server: PublicIdentity) -> Callable[[], SignedRoster]:
    """Gives the roster of now, from a file of the server's own that may be replaced by its next epoch at any time.

    Raises:
        StoreError, RosterInvalid: no roster there. What is given raises what :meth:`RosterKeeper.take` does, naming the file.
    """
    first = load_roster(file).roster.digest()
    keeper = RosterKeeper.here(memory, server, lambda: first)

    def newest() -> SignedRoster:
        try:
            return keeper.take(load_roster(file).dump())
        except (BadSignature, RosterInvalid, RosterRollback) as e:
            what = str(e).removeprefix(f"{file}: ")
            raise type(e)(f"{file}: {what}", hint=f"{NEWEST}; {e.hint.removeprefix(NEWEST)}".rstrip("; ")) from None

    return newest
