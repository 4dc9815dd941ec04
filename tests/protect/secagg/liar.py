"""A server that may do anything with real sites: each as it runs at a hospital, with its files, its policy and its gate.

What is here is moves: an offer of any plan, round and adapter to any sites, any cohort, any relay, a vote on any set, a kill in
the middle of a step. What the moves have given is in :mod:`protect.secagg.loot`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
from protect.secagg.loot import Session, Talk
from protect.secagg.world import identity, names, secagg_plan

from fedlora.core.adapter import Adapter, Factors, Layout, Update
from fedlora.core.errors import FedLoRAError
from fedlora.core.messages import Kind, Reply, Request, Task
from fedlora.core.plan import Plan, Run
from fedlora.core.reader import Reader
from fedlora.formats import update as wire
from fedlora.formats.envelope import open_envelope, parse
from fedlora.formats.epochs import first_epoch
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import DictMemory, FileMemory
from fedlora.lab.testing import TOY_BASE, toy_layout
from fedlora.protect.link import Context, ServerLink, pinned
from fedlora.protect.sealed import PHASES
from fedlora.protect.secagg.protocol.cohort import Advert, Cohort, SessionRequirements
from fedlora.protect.secagg.protocol.complaints import Complaint, dump_complaints, dump_opened
from fedlora.protect.secagg.protocol.dealing import Secrets, advertise, deal
from fedlora.protect.secagg.protocol.opening import Deal, relay
from fedlora.protect.secagg.protocol.votes import ABORT, COMMIT, Delivered, certificate, sign_vote, vote_text
from fedlora.protect.secagg.terms import Offer, Terms, codec
from fedlora.rules.first import first_adapter
from fedlora.site import parts
from fedlora.site.parts import site_of
from fedlora.site.policy import Policy
from fedlora.site.site_file import SiteFile
from fedlora.site.work import Site, Trained

MODEL = secagg_plan().model.model_name_or_path
ALL = ("train/loss", "eval/nll", "eval/tokens")
LAX = SessionRequirements(0, 1)
SHM = Path("/dev/shm")


def room() -> Path:
    """A directory for a federation's files, in memory where that can be: what is tested is order, not the disk."""
    return Path(tempfile.mkdtemp(prefix="fedlora-liar-", dir=SHM if SHM.is_dir() else None))


@cache
def roster_of(n: int, max_colluding: int) -> SignedRoster:
    publics, coordinator = [identity(s).public for s in names(n)], identity("coordinator")
    terms = {"max_colluding": max_colluding, "min_cohort": max(3, 3 * max_colluding)}
    return SignedRoster(
        first_epoch(identity("server").public, publics, [coordinator.public], now=int(time.time()), **terms)
    ).sign(coordinator)


def start(layout: Layout, seed: int = 0) -> Adapter:
    """The first adapter, which follows from the plan's seed."""
    return first_adapter(layout, seed=seed)


def a_plan(layout: Layout | None = None, *, seed: int = 0, **options: object) -> Plan:
    """A plan of secure aggregation for these learners."""
    plan = secagg_plan(**options).model_copy(update={"run": Run(name="toy", seed=seed)})  # type: ignore[arg-type]
    return plan.pinned(base=TOY_BASE, init=start(layout or toy_layout(), seed).digest())


@dataclass
class Pupil:
    """A learner whose update is always the same: the most that a server can hope for."""

    delta: np.ndarray
    layout: Layout
    counters: Mapping[str, int]
    base: str = TOY_BASE
    steps: int = 1

    def evaluate(self, adapter: Adapter) -> Mapping[str, int]:
        return {k: v for k, v in self.counters.items() if k.startswith("eval/")}

    def train(self, adapter: Adapter, *, round: int, state: bytes, factors: Factors = "AB") -> Trained:
        moved = Adapter(adapter.vector + self.delta, adapter.layout)
        counters = {k: v for k, v in self.counters.items() if k.startswith("train/")}
        return Trained(moved, 100, 10, counters, steps=1, seconds=0.0, state=state)


class Killed(BaseException):
    """kill -9, as the code that it hits sees it."""


class Mortal(FileMemory):
    """A site's memory whose process dies when so many more things have been written."""

    left = -1

    def put(self, key: str, *parts: bytes) -> None:
        if Mortal.left == 0:
            Mortal.left = -1
            raise Killed
        Mortal.left -= Mortal.left > 0
        super().put(key, *parts)


@dataclass
class Hospital:
    """One site's machine.

    Args:
        approved: plans that a person there has agreed to; one entry for each run.
    """

    name: str
    roster: SignedRoster
    pupil: Pupil
    directory: Path
    policy: Policy
    approved: Sequence[Plan]
    site: Site = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    @property
    def file(self) -> SiteFile:
        plans = tuple(plan.digest() for plan in self.approved)
        given = {"plans": plans} if "plans" in SiteFile.model_fields else {}
        return SiteFile(name=self.name, models={MODEL: "x"}, policy=self.policy, roster=self.roster.roster.digest(), **given)

    def restart(self) -> None:
        """New objects on the old files."""
        with patch.object(parts, "FileMemory", Mortal):
            self.site = site_of(
                identity(self.name),
                identity("server").public,
                self.file,
                make_learner=lambda plan: self.pupil,
                state=self.directory,
                report=lambda event, facts: None,
            )

    def handle(self, request: Request, *, dies: int = -1) -> Reply | None:
        """None: it was killed, and has been started again."""
        Mortal.left = dies
        try:
            return self.site.handle(request)
        except Killed:
            self.restart()
            return None
        finally:
            Mortal.left = -1


@dataclass(eq=False)
class Liar:
    """The server, its sites and those of them that are in league with it, whose keys it has.

    Args:
        deltas: what each site learns; site-k's is drawn with seed k if it is not given.
        held_out: rows that each site evaluates on; 40 if it is not given.
        policies: what each site's operator has written; the defaults of a site file otherwise.
        approved: plans that all of them have agreed to, an entry for each run; None: eight runs of the plan.
    """

    n: int = 5
    colluders: Sequence[str] = ()
    plan: Plan = field(default_factory=a_plan)
    max_colluding: int = 1
    layout: Layout = field(default_factory=toy_layout)
    deltas: Mapping[str, np.ndarray] = field(default_factory=dict)
    held_out: Mapping[str, int] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    approved: Sequence[Plan] | None = None
    talks: list[Talk] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    single: list[tuple[str, Task, Update]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory, self.signed = room(), roster_of(self.n, self.max_colluding)
        self.first = start(self.layout, self.plan.run.seed)
        self.keys = [identity("run"), identity("other-run")]
        self.memory = DictMemory()
        self.hospitals = {}
        approved = (self.plan,) * 8 if self.approved is None else self.approved
        for i, name in enumerate(self.honest, 1):
            delta = self.deltas.get(name)
            if delta is None:
                delta = np.random.default_rng(i).normal(0, 0.2, self.layout.size).astype(np.float32)
            # A bit for each site, so that a sum of them says whose evaluations are in it: see loot.evaluated.
            evaluation = {
                "eval/nats": 1000 + i,
                "eval/tokens": 1 << int(name.removeprefix("site-")),
                "eval/examples": self.held_out.get(name, 40),
            }
            pupil = Pupil(delta, self.layout, {"train/nats": 1000 * i, "train/tokens": 100, **evaluation})
            policy = self.policies.get(name, Policy())
            self.hospitals[name] = Hospital(name, self.signed, pupil, self.directory / name, policy, approved)

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def honest(self) -> list[str]:
        return [s for s in names(self.n) if s not in self.colluders]

    # --- saying and hearing -------------------------------------------------------------------------------------

    def say(self, site: str, phase: str, payload: bytes, task: Task, *, sealed: bool = False, dies: int = -1) -> bytes | str:
        """One genuine message to one site. What it answers; or its code, or nothing if it was killed."""
        roster = self.signed.roster
        digest = pinned(identity("server").public) if sealed else roster.digest()
        link = ServerLink(
            identity("server"), self.keys[0], roster.active(), digest, self.memory, lambda: int(time.time()), os.urandom
        )
        body = link.seal(Context.of(task), payload, phase=phase, codec="task/1" if sealed else codec(phase), to=[site])
        self.asked.append(Request(site, phase, body))
        return self.receive(self.asked[-1], dies=dies)

    def receive(self, request: Request, *, dies: int = -1) -> bytes | str:
        reply = self.hospitals[request.site].handle(request, dies=dies)
        if reply is None or reply.error:
            return reply.error if reply is not None else ""
        envelope = parse(reply.body, max_bytes=1 << 26)
        for key in self.keys:
            with suppress(FedLoRAError):
                return open_envelope(envelope, key)
        raise AssertionError("a reply that the server cannot open")

    def replay(self, index: int) -> None:
        """An old message once more. What it brings is what it brought, or nothing."""
        if self.asked:
            self.receive(self.asked[index % len(self.asked)])

    # --- moves --------------------------------------------------------------------------------------------------

    def task(self, *, run: int = 0, plan: Plan | None = None, round: int = 1, attempt: int = 0, kind: Kind = "train",
             adapter: Adapter | None = None) -> Task:  # fmt: skip
        plan = plan or self.plan
        return Task(
            f"{run:02x}" * 32,
            plan.canonical(),
            plan.model.digest,
            kind,
            round,
            attempt,
            adapter or start(self.layout, plan.run.seed),
        )

    def offer(
        self,
        task: Task,
        sites: Iterable[str],
        *,
        plan: Plan | None = None,
        keys: Callable[[str], int] = lambda site: 0,
        dies: int = -1,
    ) -> Talk:
        """Offers work to sites and hears what they advertise; colluders come in by themselves.

        Args:
            keys: which of its reply keys each site is told.
        """
        plan = plan or self.plan
        secret = plan if plan.protect.mode == "secagg" else self.plan  # it may offer a sealed plan; terms are of a secret one
        talk = Talk(task, plan, Terms.of(secret, self.signed.roster))
        for site in sites:
            if site in self.colluders:
                talk.roots[site] = os.urandom(32)
                continue
            inner = wire.dump_task(task, reply_key=self.keys[keys(site)].public.kem)
            payload = Offer(self.signed.dump(), inner).dump()
            answer = self.say(site, "advertise", payload, task, dies=dies)
            if isinstance(answer, bytes):
                talk.adverts[site] = Advert.read(Reader(answer, "advertisement"))
        for site in talk.roots:
            self.impersonate(talk, site)
        self.talks.append(talk)
        return talk

    def impersonate(self, talk: Talk, site: str) -> None:
        """An advertisement with keys of the adversary's own: signed by a colluder's key, or by the server's in a site's name."""
        if talk.adverts:
            root = talk.roots.setdefault(site, os.urandom(32))
            signer = identity(site if site in self.colluders else "server").signing
            talk.adverts[site] = advertise(
                site, next(iter(talk.adverts.values())).context, Secrets(root), key=signer, measured=True
            )

    def cohort(self, talk: Talk, sites: Iterable[str] = ()) -> Session | None:
        """A session of those of the sites that have advertised; None if there are none."""
        adverts = [talk.adverts[s] for s in (sites or talk.adverts) if s in talk.adverts]
        try:
            session = Session(talk, Cohort.of(adverts, replace_rules(talk.terms.requirements)))
        except FedLoRAError:
            return None
        for one in self.sessions:
            if one.cohort.t1 == session.cohort.t1:
                return one
        for site in session.cohort.names:
            if site in talk.roots:
                session.hear_deal(session.cohort.number(site), self.deal_of(session, site))
        self.sessions.append(session)
        return session

    def deal_of(self, session: Session, site: str) -> bytes:
        key = identity(site if site in self.colluders else "server").signing
        return deal(session.cohort, session.cohort.number(site), Secrets(session.talk.roots[site]), key=key)

    def share(self, session: Session, sites: Iterable[str] = (), *, dies: int = -1) -> None:
        for site in self._real(session, sites):
            answer = self.say(site, "share", session.cohort.dump(), session.talk.task, dies=dies)
            if isinstance(answer, bytes):
                session.hear_deal(session.cohort.number(site), answer)

    def mask(
        self, session: Session, sites: Iterable[str] = (), *, deals: Mapping[int, Deal] | None = None, dies: int = -1
    ) -> dict[str, str]:
        """Asks for masked updates on these deals, or on all that there are. The codes of those that have given none."""
        shown, codes = session.deals if deals is None else deals, {}
        ended = [(s.cohort.t1, self._certificate(s, vote_text(s.cohort.t1, ABORT))) for s in self.sessions if s is not session]
        head = bytes([min(len(ended), 255)]) + b"".join(t1 + votes for t1, votes in ended[-255:])
        head += dump_opened(session.cohort, {})
        for site in self._real(session, sites):
            number = session.cohort.number(site)
            answer = self.say(site, "mask", head + relay(session.cohort, shown, number), session.talk.task, dies=dies)
            if isinstance(answer, bytes):
                session.hear_body(number, answer, shown)
            else:
                codes[site] = answer
        for site in session.cohort.names:
            if site in self.colluders:  # what it has delivered is whatever it says
                number = session.cohort.number(site)
                session.delivered[number] = Delivered.make(session.cohort, number, bytes(32), key=identity(site).signing)
        return codes

    def complain(self, session: Session, dealers: Iterable[str], holders: Iterable[str]) -> None:
        """Asks dealers to show what they have dealt to these holders, of whom colluders sign, the server for all others."""
        for site in self._real(session, dealers):
            dealer, complaints = session.cohort.number(site), []
            for holder in holders:
                if dealer in session.deals and holder != site and holder in session.cohort.names:
                    number = session.cohort.number(holder)
                    said = {dealer: session.deals[dealer].dealt[number].statement}
                    signer = identity(holder if holder in self.colluders else "server").signing
                    complaints.append(Complaint.make(session.cohort, number, said, key=signer))
            answer = self.say(site, "open", dump_complaints(session.cohort, complaints), session.talk.task)
            if isinstance(answer, bytes):
                session.hear_opened(dealer, answer)

    def listed(self, session: Session, sites: Iterable[str] = ()) -> list[Delivered]:
        """The deliveries of these sites, or all."""
        wanted = {session.cohort.number(s) for s in (sites or session.cohort.names) if s in session.cohort.names}
        return [d for n, d in sorted(session.delivered.items()) if n in wanted]

    def commit(self, session: Session, sites: Iterable[str] = (), listed: Sequence[Delivered] | None = None) -> dict[str, str]:
        listed = self.listed(session) if listed is None else listed
        payload = session.cohort.t1 + bytes([COMMIT]) + Delivered.dump_all(listed)
        return self._vote(session, sites, payload, vote_text(session.cohort.t1, COMMIT, Delivered.digest_of(listed)))

    def abort(self, session: Session, sites: Iterable[str] = ()) -> dict[str, str]:
        t1 = session.cohort.t1
        return self._vote(session, sites, t1 + bytes([ABORT]), vote_text(t1, ABORT))

    def _vote(self, session: Session, sites: Iterable[str], payload: bytes, text: bytes) -> dict[str, str]:
        codes = {}
        for site in self._real(session, sites):
            answer = self.say(site, "vote", payload, session.talk.task)
            if isinstance(answer, bytes):
                session.votes.setdefault(text, {})[session.cohort.number(site)] = answer[33:]
            else:
                codes[site] = answer
        return codes

    def _certificate(self, session: Session, text: bytes) -> bytes:
        """The votes on this that there are, and those of colluders, who sign anything."""
        forged = {
            session.cohort.number(s): sign_vote(text, key=identity(s).signing)
            for s in session.cohort.names
            if s in self.colluders
        }
        return certificate({**session.votes.get(text, {}), **forged})

    def unmask(
        self, session: Session, sites: Iterable[str] = (), listed: Sequence[Delivered] | None = None, *, dies: int = -1
    ) -> dict[str, str]:
        listed, codes = self.listed(session) if listed is None else listed, {}
        text = vote_text(session.cohort.t1, COMMIT, Delivered.digest_of(listed))
        payload = session.cohort.t1 + self._certificate(session, text)
        for site in self._real(session, sites):
            answer = self.say(site, "unmask", payload, session.talk.task, dies=dies)
            if isinstance(answer, bytes):
                session.hear_reveal(session.cohort.number(site), answer)
            else:
                codes[site] = answer
        return codes

    def finish(self, session: Session, sites: Iterable[str] = ()) -> Session:
        """The rest of an honest session, among these sites from the masked updates on."""
        self.share(session)
        self.mask(session, sites)
        listed = self.listed(session)
        self.commit(session, sites, listed)
        self.unmask(session, sites, listed)
        return session

    def whole(self, task: Task, sites: Iterable[str], *, present: Iterable[str] = (), **offer: object) -> Session | None:
        """An honest session from its offer to the sum."""
        session = self.cohort(self.offer(task, sites, **offer))  # type: ignore[arg-type]
        return None if session is None else self.finish(session, present)

    def sealed(self, task: Task, sites: Iterable[str]) -> None:
        """Asks for single updates."""
        payload = wire.dump_task(task, reply_key=self.keys[0].public.kem)
        for site in sites:
            if site in self.hospitals:
                answer = self.say(site, PHASES[task.kind], payload, task, sealed=True)
                if isinstance(answer, bytes):
                    self.single.append((site, task, wire.parse_update(answer, task.reply_layout)))

    def _real(self, session: Session, sites: Iterable[str]) -> list[str]:
        chosen = set(sites) or set(session.cohort.names)
        return [s for s in session.cohort.names if s in chosen and s in self.hospitals]


def replace_rules(rules: SessionRequirements) -> SessionRequirements:
    """What the liar forms cohorts with: its own bounds are none, the threshold is what sites compute."""
    return replace(rules, max_colluding=0, min_cohort=1)
