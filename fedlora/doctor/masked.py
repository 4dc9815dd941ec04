"""What would leave under secure aggregation: a whole session in this process, with a server and other sites that are played.

All code is the live one, and only this site trains. Keys and roster of the others are made for this and thrown away; the site's
own ledger, sessions and roster are neither read nor written, so that a refusal because of what it gave before does not show.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import Adapter, Factors, Layout
from fedlora.core.errors import ConfigError, FedLoRAError
from fedlora.core.events import Event
from fedlora.core.messages import Reply, Request, Task
from fedlora.core.metrics import ROWS, counters_of
from fedlora.core.plan import Plan
from fedlora.core.sites.facts import Leaving
from fedlora.core.tables.audit import audited
from fedlora.formats.envelope import open_envelope, parse
from fedlora.formats.epochs import first_epoch
from fedlora.formats.files import write_atomic
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import FileMemory
from fedlora.formats.trust import rosters_in
from fedlora.protect import Tally
from fedlora.protect.link import ServerLink, pinned
from fedlora.protect.mode import ServerParts
from fedlora.protect.modes import mode_of
from fedlora.protect.secagg.protocol.rings import PROFILES, packed_bytes
from fedlora.protect.secagg.settings import settings_of
from fedlora.rounds.transport import LocalTransport, drive
from fedlora.site.site_file import SiteFile
from fedlora.site.work import Learner, Site, Trained

MakeSite: TypeAlias = Callable[[Identity, SiteFile, Callable[[Plan], Learner], Path], Site]
"""Keys, settings, maker of learners, directory of its state."""
_ROWS = 1000
"""Held-out rows of a site that is played: enough that this site's evaluation is among those of others, as it would be."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """A site that is played: it trains nothing, so that its update is zero."""

    base: str
    layout: Layout
    steps: int

    def evaluate(self, adapter: Adapter) -> Mapping[str, int]:
        return {"eval/nats": _ROWS, "eval/tokens": _ROWS, "eval/exact": 0, "eval/examples": _ROWS, ROWS: _ROWS}

    def train(self, adapter: Adapter, *, round: int, state: bytes, factors: Factors = "AB") -> Trained:
        counters = {"train/nats": 0, "train/tokens": 1}
        return Trained(adapter, 1, 1, counters, steps=self.steps, seconds=0.0, state=b"")

    def train_private(self, adapter: Adapter, *, round: int, state: bytes, secret: bytes, factors: Factors = "AB") -> Trained:
        return Trained(adapter, 0, 0, {}, steps=self.steps, seconds=0.0, state=b"")

    def noisy_sum(self, adapter: Adapter, *, round: int, secret: bytes, factors: Factors = "AB") -> NDArray[np.int32]:
        return np.zeros(self.layout.only(factors).size, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """What this site said in a session.

    Attributes:
        messages: step -> the message that would leave.
        payloads: step -> the same before encryption.
        others: how many sites were played.
    """

    messages: Mapping[str, bytes]
    payloads: Mapping[str, bytes]
    others: int


def play(
    identity: Identity,
    file: SiteFile,
    plan: Plan,
    learner: Learner,
    task: Task,
    *,
    server: Identity,
    reply: Identity,
    state: Path,
    tally: Tally,
    make_site: MakeSite,
    clock: Callable[[], float],
) -> Session:
    """A session of the fewest sites that the plan allows, of which this is one.

    Raises:
        FedLoRAError: this site refused a step.
        ConfigError: the session did not come to a masked update.
    """
    least = settings_of(plan).max_colluding
    count = max(plan.federation.min_sites, 3 * least, 3)
    names = [name for name in (f"played-{n}" for n in range(1, count + 1)) if name != identity.name][: count - 1]
    played = {name: Identity.generate(name) for name in names}
    publics = {identity.name: identity.public, **{name: one.public for name, one in played.items()}}
    roster = state / "roster.json"
    digest = _roster(roster, server.public, publics, max_colluding=least, now=int(clock()))
    here = file.model_copy(update={"roster": digest, "policy": file.agreed})  # the policy of the file's own roster
    own = make_site(identity, here, lambda plan: learner, state / "site")
    messages: dict[str, bytes] = {}
    errors: list[FedLoRAError] = []
    answers = {identity.name: _answering(own, messages, errors)}
    stand_in = StandIn(learner.base, learner.layout, learner.steps)
    for name, one in played.items():
        alone = {"name": name, "privacy": here.privacy.model_copy(update={"canaries": False})}  # it trains nothing
        site = make_site(one, here.model_copy(update=alone), lambda plan: stand_in, state / name)
        answers[name] = _answering(site, {}, [])
    memory = FileMemory(state / "server")
    link = ServerLink(
        server, reply, publics, pinned(server.public), memory, lambda: int(clock()), os.urandom, audited(plan) is not None
    )
    parts = ServerParts(plan, link, memory, lambda: rosters_in(roster, memory, server.public), _silent)
    drive(mode_of(plan).server(parts).collect(task, sorted(publics), tally), LocalTransport(answers), deadline_s=lambda _: 3600.0)
    if errors:
        raise errors[0]
    if "mask" not in messages:
        raise ConfigError("the played session did not come to a masked update", hint="this is a bug: please report it")
    opened = {step: bytes(open_envelope(parse(m, max_bytes=len(m)), reply)) for step, m in messages.items()}
    return Session(messages, opened, len(played))


def masked_parts(plan: Plan, layout: Layout) -> list[Leaving]:
    """Every field of a masked update with its bytes, in their order (FORMAT.md, 10.6). Law: together they are its payload."""
    counters, bits = counters_of(plan.evaluation.share), PROFILES[settings_of(plan).profile].bits
    tensors = [name for name, _, _ in layout.slices()]
    numbers = ["weight", "sites", "counted", *(f"squared norm of {n}" for n in tensors), *(f"values cut of {n}" for n in tensors)]
    parts = [Leaving(name="session", what="", size_bytes=32), Leaving(name="signature of the update", what="", size_bytes=64)]
    parts += [Leaving(name=name, what="a masked number", size_bytes=8) for name in [*numbers, *counters]]
    for name, at, shape in layout.slices():
        size_bytes = packed_bytes(at.stop, bits) - packed_bytes(at.start, bits)
        parts.append(Leaving(name=name, what=f"{' x '.join(map(str, shape))} masked values", size_bytes=size_bytes))
    return parts


def _answering(site: Site, messages: dict[str, bytes], errors: list[FedLoRAError]) -> Callable[[Request], Reply]:
    """As :meth:`Site.handle`, but an error is kept instead of logged; so is each message, by its step."""

    def answer(request: Request) -> Reply:
        try:
            messages[request.phase] = bytes(site.protection.answer(request, site.work))
        except FedLoRAError as e:
            errors.append(e)
            return Reply(site.name, error=e.code)
        return Reply(site.name, messages[request.phase])

    return answer


def _roster(file: Path, server: PublicIdentity, publics: Mapping[str, PublicIdentity], *, max_colluding: int, now: int) -> str:
    """A roster of this session alone; its digest."""
    coordinator = Identity.generate("coordinator")
    roster = first_epoch(server, list(publics.values()), [coordinator.public], max_colluding=max_colluding, now=now)
    write_atomic(file, SignedRoster(roster).sign(coordinator).dump())
    return roster.digest()


def _silent(event: Event, facts: object) -> None:
    """Of the played server nothing is told."""
