"""Builds a site from its parts, for a deployment or a simulation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from fedlora.core.errors import KeyFileError
from fedlora.core.events import Report
from fedlora.core.messages import check_site_name
from fedlora.core.plan import Plan
from fedlora.formats.derive import derive
from fedlora.formats.envelope import Header
from fedlora.formats.keys import Identity, PublicIdentity, load_identity
from fedlora.formats.state.journal import REPAIR, Journal
from fedlora.formats.state.memory import FileMemory
from fedlora.formats.trust import RosterKeeper
from fedlora.privacy.ledger import PrivacyLedger
from fedlora.protect.link import SiteLink
from fedlora.protect.mode import SiteParts
from fedlora.protect.modes import SiteModes
from fedlora.site.admission import Approvals, Begun, Runs, admit
from fedlora.site.auditing import AuditRuns
from fedlora.site.first import Firsts
from fedlora.site.private import LEDGERS, PrivateRuns, WatchedLedger
from fedlora.site.site_file import SiteFile
from fedlora.site.work import Learner, Site


def site_of(
    identity: Identity,
    server: PublicIdentity,
    file: SiteFile,
    *,
    make_learner: Callable[[Plan], Learner],
    state: Path,
    report: Report,
    approvals: Callable[[], Approvals] | None = None,
    clock: Callable[[], float] = time.time,
    entropy: Callable[[int], bytes] = os.urandom,
    firsts: Firsts | None = None,
) -> Site:
    """A site with these keys and its file's policy, which keeps its state in ``state``.

    Args:
        firsts: where it has the adapters of earlier runs; None: in ``state``.
        approvals: gives the current approvals; None: those of ``file``.
        clock: seconds since 1970.
        entropy: n random bytes.
    """
    approved = approvals or (lambda: Approvals.of(file))
    memory = FileMemory(state / "memory", REPAIR)

    def expects(header: Header) -> bool:
        begun, one = Runs(memory).load(), Begun(header.run, header.plan)
        admit(begun, one, plans=None if file.agreed.approve == "any-within-policy" else approved().plans)
        return one in begun

    link = SiteLink(
        identity=identity,
        server=server,
        memory=memory,
        max_request_bytes=file.policy.max_request_bytes,
        clock=lambda: int(clock()),
        entropy=entropy,
        expects=expects,
    )
    watched = ledger_of(file, identity, state, entropy=entropy, clock=clock)
    roster = RosterKeeper.here(memory, server, lambda: approved().roster)
    return Site(
        name=identity.name,
        protection=SiteModes.of(SiteParts(link, roster, entropy, lambda plan: approved().uncovers.get(plan, ()))),
        learner=make_learner,
        policy=file.agreed,
        models=frozenset(file.models),
        journal=Journal(state / "journal", memory),
        private=PrivateRuns(file.privacy, file.data, watched),
        audits=AuditRuns(memory, derive(identity.signing.private_bytes_raw(), "site-audits"), file.privacy.canaries),
        report=report,
        approvals=approved,
        firsts=firsts or Firsts(state, file.agreed.init),
    )


def ledger_of(
    file: SiteFile,
    identity: Identity,
    state: Path,
    *,
    entropy: Callable[[int], bytes] = os.urandom,
    clock: Callable[[], float] = time.time,
) -> WatchedLedger | None:
    """The privacy ledger of the population that a site file names; None if it names none."""
    name = file.privacy.population
    if not name:
        return None
    ledger = PrivacyLedger(state / LEDGERS / name, name, identity, entropy, clock, f"site {file.name}")
    return WatchedLedger(ledger, FileMemory(state / "memory", REPAIR))


def load_site_key(file: SiteFile, root: Path) -> Identity:
    """The private key that a site file names.

    Args:
        root: directory of the site file.

    Raises:
        KeyFileError: missing, malformed, or another site's.
        ConfigError: the site file's name is none.
    """
    identity = load_identity(root / file.key)
    if identity.name != check_site_name(file.name):
        hint = "restore it from a backup, or correct name or key in the site file"
        raise KeyFileError(f"{root / file.key} is the key of {identity.name!r}, the site file says {file.name!r}", hint=hint)
    return identity
