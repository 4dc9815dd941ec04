"""A federation of sites that do no learning, for tests of sessions: real keys, real roster, real halves, memory in dicts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from fedlora.core.adapter import Adapter, Update
from fedlora.core.errors import FedLoRAError
from fedlora.core.messages import Kind, Reply, Request, Task
from fedlora.core.plan import Aggregate, Evaluation, Plan, Protect, Training
from fedlora.formats.derive import derive
from fedlora.formats.epochs import first_epoch
from fedlora.formats.keys import Identity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import DictMemory
from fedlora.formats.trust import RosterKeeper
from fedlora.lab.testing import toy_layout, toy_plan
from fedlora.protect.link import ServerLink, SiteLink
from fedlora.protect.secagg import SecAggServer, SecAggSite
from fedlora.protect.secagg.protocol.rings import encode, sum_to_mean
from fedlora.protect.secagg.sessions import SessionStore
from fedlora.protect.secagg.terms import Terms
from fedlora.rules.sums import squares_of
from fedlora.site.work import safely

NOW = 1_800_000_000


@cache
def identity(name: str) -> Identity:
    return Identity.derived(name, b"tests")  # the same in every process


def names(n: int) -> list[str]:
    return [f"site-{i}" for i in range(1, n + 1)]


@cache
def signed_roster(n: int, max_colluding: int = 1, min_cohort: int = 3) -> SignedRoster:
    publics = [identity(s).public for s in names(n)]
    roster = first_epoch(
        identity("server").public,
        publics,
        [identity("coordinator").public],
        max_colluding=max_colluding,
        min_cohort=min_cohort,
        now=NOW,
    )
    return SignedRoster(roster).sign(identity("coordinator"))


def secagg_plan(
    *, profile: str = "int8", weight_unit: int = 0, min_sites: int = 3, rounds: int = 3, first_range: float = 1.0, **protect: Any
) -> Plan:
    weighting = "tokens" if weight_unit else "uniform"
    return toy_plan(
        rounds=rounds,
        min_sites=min_sites,
        training=Training(lr_scheduler_type="constant", warmup_ratio=0.0),
        evaluation=Evaluation(share=("train/loss", "eval/nll", "eval/tokens")),
        protect=Protect(
            mode="secagg", secagg={"profile": profile, "weight_unit": weight_unit, "first_range": first_range, **protect}
        ),
        aggregate=Aggregate(weighting=weighting),
    )


@dataclass
class Heard:
    """A tally that keeps what it is told."""

    sums: list[tuple[tuple[str, ...], Update, np.ndarray, int]] = field(default_factory=list)
    rejected: dict[str, FedLoRAError] = field(default_factory=dict)
    voids: list[FedLoRAError] = field(default_factory=list)

    def accept(self, site: str, update: Update) -> None:
        raise AssertionError("a single update came through")

    def accept_sum(self, sites: Sequence[str], update: Update, *, squares: np.ndarray, counted: int) -> None:
        self.sums.append((tuple(sites), update, squares, counted))

    def reject(self, site: str, error: FedLoRAError) -> None:
        assert site not in self.rejected, "a site is named once"
        self.rejected[site] = error

    def void(self, error: FedLoRAError) -> None:
        self.voids.append(error)

    def codes(self) -> dict[str, str]:
        return {s: getattr(e, "remote_code", e.code) for s, e in self.rejected.items()}


@dataclass
class World:
    """``n`` sites and their server. ``updates`` is what each site has learned, whatever it is asked."""

    n: int = 5
    plan: Plan = field(default_factory=secagg_plan)
    signed: SignedRoster | None = None
    updates: dict[str, Update] = field(default_factory=dict)
    memory: dict[str, DictMemory] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    globals: dict[int, Adapter] = field(default_factory=dict)  # round -> the adapter with which it begins

    def __post_init__(self) -> None:
        self.signed = self.signed or signed_roster(self.n)
        layout = toy_layout()
        self.globals.setdefault(1, Adapter(np.zeros(layout.size, np.float32), layout))
        for i, name in enumerate(names(self.n)):
            rng = np.random.default_rng(i)
            delta = rng.normal(0, 0.3, layout.size).astype(np.float32)
            counters = {"train/nats": 1000 * i, "train/tokens": 100 + i, "eval/nats": 655_360 * (1 + i), "eval/tokens": 10}
            self.updates.setdefault(name, Update(delta, 100 + i, counters))
            self.memory.setdefault(name, DictMemory())
        self.memory.setdefault("server", DictMemory())
        self.restart()

    def restart(self, *who: str) -> None:
        """New objects on the old memory, for everybody or for these."""
        for name in who or names(self.n):
            if name != "server":
                self.__dict__.setdefault("sites", {})[name] = self.site(name)

    def site(self, name: str) -> SecAggSite:
        import os

        server, memory = identity("server").public, self.memory[name]
        keeper = RosterKeeper(memory, server, lambda: signed_digest(self.signed), lambda: NOW, "0.1.0")
        return SecAggSite(SiteLink(identity(name), server, memory, 1 << 24, lambda: NOW, os.urandom), keeper, os.urandom)

    def link(self) -> ServerLink:
        import os

        roster = self.signed.roster
        return ServerLink(
            identity("server"), identity("run"), roster.active(), roster.digest(), self.memory["server"], lambda: NOW, os.urandom
        )

    def server(self) -> SecAggServer:
        def report(event: str, facts: Mapping[str, Any]) -> None:
            self.events.append((event, facts))

        return SecAggServer(self.link(), lambda: self.signed, self.plan, SessionStore(self.memory["server"]), report)

    def task(self, *, round: int = 1, attempt: int = 0, kind: Kind = "train") -> Task:
        return Task("ab" * 32, self.plan.canonical(), self.plan.model.digest, kind, round, attempt, self.globals[round])

    def answer(self, request: Request) -> Reply:
        site = self.__dict__["sites"][request.site]
        return safely(request.site, lambda: site.answer(request, lambda task: self.work(request.site, task)))

    def work(self, site: str, task: Task) -> Update:
        update = self.updates[site]
        return update if task.kind == "train" else Update(np.zeros(1, np.float32), 0, update.counters)

    def collect(self, task: Task, *, lost: Callable[[Request], bool] = lambda request: False, sites: Sequence[str] = ()) -> Heard:
        """One attempt. ``lost`` says which requests never arrive; a site that missed one hears nothing more of this attempt."""
        heard, gone = Heard(), set()

        def replies(requests: Sequence[Request]):
            for request in requests:
                self.asked.append(request)
                if request.site in gone or lost(request):
                    gone.add(request.site)
                else:
                    yield self.answer(request)

        talk = self.server().collect(task, list(sites) or names(self.n), heard)
        try:
            requests = next(talk)
            while True:
                requests = talk.send(replies(requests))
        except StopIteration:
            return heard

    def expected(self, sites: Sequence[str], *, round: int = 1) -> np.ndarray:
        """The mean over these sites from their whole numbers, added in the open."""
        terms = Terms.of(self.plan, self.signed.roster)
        task = self.task(round=round)
        layout, profile, scales = task.adapter.layout, terms.profile, terms.scales(task)
        total, weight = np.zeros(layout.size, np.int64), 0
        for name in sites:
            w = terms.weight(self.updates[name].weight)
            delta = self.updates[name].delta.copy()
            levels, _ = encode(
                delta, layout, profile, scales, weight_fraction=terms.weight_fraction(w), key=rounding_key(name, task, scales)
            )
            signed = levels.view(np.int16 if levels.dtype == np.uint16 else np.int32)
            total, weight = total + signed, weight + w
        words = (total % (1 << profile.bits)).astype(profile.word)
        most = terms.most(weight=weight, sites=len(sites))
        return sum_to_mean(words, layout, profile, scales, weight=weight / terms.max_weight, most=most)

    def squares(self, sites: Sequence[str]) -> np.ndarray:
        return np.mean([squares_of(self.updates[s].delta, toy_layout()) for s in sites], axis=0)

    def next_round(self, mean: np.ndarray, *, round: int = 1) -> None:
        at = self.globals[round]
        self.globals[round + 1] = Adapter(at.vector + mean, at.layout)


def rounding_key(site: str, task: Task, scales: np.ndarray) -> bytes:
    """As the site itself makes it from its signing key; nobody else can."""
    work = hashlib.sha256(
        f"{task.kind}/{task.round}/{task.plan_digest}/{task.adapter.digest()}/".encode() + scales.tobytes()
    ).hexdigest()
    secret = identity(site).signing.private_bytes_raw()
    return derive(secret, "rounding", context=f"{task.run}/{task.round}/{work}".encode())


def signed_digest(signed: SignedRoster) -> str:
    return signed.roster.digest()


def at_phase(**phases: str) -> Callable[[Request], bool]:
    """Loses the request of a phase for each site: ``at_phase(**{"site-1": "mask"})``."""
    return lambda request: phases.get(request.site) == request.phase
