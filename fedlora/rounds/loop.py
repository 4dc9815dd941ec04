"""The server's loop: ask the sites, add up what is valid, save, go on."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import Update
from fedlora.core.errors import (
    DealerLied,
    FedLoRAError,
    RemoteError,
    RunFailed,
    StateLost,
    UpdateRejected,
)
from fedlora.core.events import Event, Report
from fedlora.core.facts import Ask, Majority, Recorded, Rejected, SiteUpdate, Start, Sum, Waiting
from fedlora.core.messages import Kind, Reply, Request, Task
from fedlora.core.metrics import finish, pool
from fedlora.core.plan import Plan
from fedlora.core.records import Bytes, Numbers, Outcome, RoundRecord, Seconds
from fedlora.protect import Protection
from fedlora.protect.modes import brings_work, mode_of
from fedlora.rounds.store import Checkpoint, RunStore
from fedlora.rounds.transport import Transport, drive
from fedlora.rules import Accumulator, Aggregator, ServerOptimizer, State, add, max_site_weight, optimizer_of


def run(
    plan: Plan,
    *,
    store: RunStore,
    aggregator: Aggregator,
    protection: Protection,
    transport: Transport,
    enrolled: Collection[str],
    report: Report,
) -> Checkpoint:
    """Runs the rounds that are still to do, then one last evaluation; returns the last checkpoint.

    Args:
        enrolled: the sites that belong to the federation: a round without one of them is partial, and says so.

    Raises:
        RunFailed (quorum): a round stayed below ``min_sites`` in every attempt, or as many rounds on end were void. The run can
            be resumed.
    """
    void, rounds = 0, plan.federation.num_rounds
    at = store.resume(report)
    report(Event.START, Start(run=store.run, round=at.round, rounds=rounds))
    while at.round < rounds:
        task = _task(plan, store, at, "train", aggregator)
        tally, asked = _attempts(task, plan, protection, transport, enrolled, report, partial(_start, aggregator, at))
        void = 0 if tally.voided is None else void + 1
        at, record = _next(aggregator, optimizer_of(plan), at, tally, asked, scale=plan.lora.scale)
        store.save(at)
        report(Event.ROUND if tally.voided is None else Event.ROUND_VOID, Recorded(record=record))
        for site, share in tally.majority().items():
            report(Event.MAJORITY, Majority(site=site, percent=100 * share))
        if void >= plan.federation.round_attempts and tally.voided is not None:
            hint = "look at the sites, then resume the run"
            raise RunFailed(f"{void} rounds in a row were void: {tally.voided}", hint=hint, code="quorum")
    if store.final() is None:
        task = _task(plan, store, at, "evaluate", aggregator)
        _, record = _attempts(task, plan, protection, transport, enrolled, report, lambda cohort: None)
        store.finish(record)
        report(Event.FINAL, Recorded(record=record))
    return at


def _start(aggregator: Aggregator, at: Checkpoint, cohort: int) -> Accumulator:
    return aggregator.start(at.adapter, cohort=cohort, round=at.round + 1)


def _next(
    aggregator: Aggregator,
    optimizer: ServerOptimizer,
    at: Checkpoint,
    tally: _Round,
    record: RoundRecord,
    *,
    scale: float,
) -> tuple[Checkpoint, RoundRecord]:
    """The state after the round, and the round's record with what came of it."""
    began, round = time.monotonic(), at.round + 1
    if tally.voided is not None:  # the sites have trained and go on; the adapter stays as it was
        record = record.model_copy(update={"outcome": Outcome(weight=0, adapter=at.adapter.digest(), rule={})})
        return Checkpoint(round, at.adapter, record, at.state), record
    if tally.sums is None:
        raise ValueError("a round of training needs sums")
    result = aggregator.finish(tally.sums, at.adapter, scale=scale, round=round, state=at.state)
    state: State = {**at.state, **result.state}
    if result.delta is not None:
        moved, state = optimizer.step(result.delta, state)
        after = add(at.adapter, moved)
    elif result.adapter is not None:
        after = result.adapter
    else:
        raise ValueError("a rule returns a server update or an adapter")
    if not np.isfinite(after.vector).all():
        raise RunFailed("the next adapter is not finite", hint="a smaller server_optimizer.learning_rate, or look at the sites")
    outcome = Outcome(weight=tally.weight, adapter=after.digest(), rule=dict(result.record))
    seconds = Seconds(round=record.seconds.round, aggregate=time.monotonic() - began)
    record = record.model_copy(update={"outcome": outcome, "seconds": seconds})
    return Checkpoint(round, after, record, state), record


def _task(plan: Plan, store: RunStore, at: Checkpoint, kind: Kind, aggregator: Aggregator) -> Task:
    """What is sent of the adapter, and what is asked for."""
    sent = at.adapter.part(at.adapter.layout.only(aggregator.down()))
    task = Task(store.run, plan.canonical(), plan.model.digest, kind, at.round + 1, 0, sent)
    if kind == "evaluate":
        return task
    reply = aggregator.reply(at.adapter.layout, at.round + 1)
    return replace(task, sends=None if reply == sent.layout else reply)


def _attempts(
    task: Task,
    plan: Plan,
    protection: Protection,
    transport: Transport,
    enrolled: Collection[str],
    report: Report,
    start: Callable[[int], Accumulator | None],
) -> tuple[_Round, RoundRecord]:
    """Asks for a round until enough sites delivered. A site that did answers again from its journal."""
    need, meter = plan.federation.min_sites, _Meter(transport)
    attempt, left, liars = -1, plan.federation.round_attempts, set[str]()
    while left:
        attempt, left = attempt + 1, left - 1
        task = replace(task, attempt=attempt)
        missing = partial(protection.missing, task)
        at_hand = _await_sites(transport, need, missing, time.monotonic() + plan.federation.round_deadline, report)
        sites = _drawn(at_hand, plan, task) if task.kind == "train" else at_hand
        tally = _Round(start(max(len(sites), 1)), report, frozenset(plan.evaluation.share))
        tally.max_weight = max_site_weight(plan) if task.kind == "train" else 0
        report(Event.ASK, Ask(round=task.round, attempt=attempt, kind=task.kind, sites=sites))
        began = time.monotonic()
        deadline = began + plan.federation.round_deadline  # waiting for the sites to come does not count
        drive(protection.collect(task, sites, tally), meter, deadline_s=partial(_deadline_s, plan, deadline))
        record = RoundRecord(
            kind=task.kind,
            round=task.round,
            attempt=attempt,
            asked=tuple(sites),
            sites=tally.accepted,
            missing=tally.missing(sites, at_hand, enrolled),
            together=tally.together,
            majority=tally.majority(),
            partial=len(tally.accepted) < len({*sites, *enrolled} - ({*at_hand} - {*sites})),
            void=tally.voided.code if tally.voided is not None else None,
            bytes=Bytes(down=meter.down, up=meter.up),
            seconds=Seconds(round=time.monotonic() - began, aggregate=0.0),
            outcome=None,
        )
        if len(tally.accepted) >= need or tally.voided is not None:
            return tally, record
        report(Event.VOID, Recorded(record=record))
        named = {site for site, code in tally.rejected.items() if code in (DealerLied.code, "complaint-unanswered")}
        left += bool(named - liars)  # left out from now on, so that this ends
        liars |= named
    said = {tally.rejected.get(s, "late") for s in sites}
    means, hint = next(((m, h) for codes, m, h in _ALL_SAY if said and said <= codes), ("", _BRING_BACK))
    raise RunFailed(
        f"round {task.round}: {len(tally.accepted)} of {need} sites delivered in {plan.federation.round_attempts} attempts"
        + means,
        hint=hint,
        code="quorum",
    )


_BRING_BACK = "nothing is lost; bring the sites back and resume the run"
_ALL_SAY = (
    (
        {"replayed", "equivocation"},
        "; every site that was asked has seen later messages of this server: the server's numbers are those of an old backup",
        "stop the server, run `fedlora server repair HOME RUN --raise-numbers`, then resume the run",
    ),
    (
        {StateLost.code, "wrong-round"},
        "; every site that was asked has done later rounds of this run: the checkpoints here are those of an old backup",
        "restore newer checkpoints of the run and resume it; without them, export this run or start again under another name",
    ),
)
"""What it means if every site answers with one of these codes, and the way on."""


def _drawn(at_hand: list[str], plan: Plan, task: Task) -> list[str]:
    """The sites that train: a share of those at hand, ``min_sites`` at least, the same draw wherever the run is done.

    All attempts of a round draw alike: who has trained is asked again.
    """
    f = plan.federation
    count = max(math.ceil(f.fraction_train * len(at_hand)), min(f.min_sites, len(at_hand)))
    if count == len(at_hand):
        return at_hand

    def lot(site: str) -> bytes:
        return hashlib.sha256(f"fedlora sampling\0{plan.run.seed}\0{task.round - 1}\0{site}".encode()).digest()

    return sorted(sorted(at_hand, key=lot)[:count])


def _deadline_s(plan: Plan, deadline: float, requests: Sequence[Request]) -> float:
    """The round's own for work, seconds for the talk that a protection may need after it."""
    work = any(brings_work(r.phase) for r in requests)
    return _left(deadline) if work else mode_of(plan).step_timeout_s(plan)


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)


def _await_sites(
    transport: Transport, need: int, missing: Callable[[Sequence[str]], list[str]], deadline: float, report: Report
) -> list[str]:
    """The sites that can be asked now, once there are enough of them and none is missing, or time is up."""
    waiting = False
    while (len(sites := list(transport.sites())) < need or missing(sites)) and time.monotonic() < deadline:
        if not waiting:
            event = Event.WAITING if len(sites) < need else Event.WAITING_FOR
            report(event, Waiting(sites=sites, need=need, missing=missing(sites)))
            waiting = True
        time.sleep(min(1.0, _left(deadline)))
    return sites


@dataclass(slots=True)
class _Round:
    """Tally of one attempt: adds up what is accepted, keeps the names.

    Attributes:
        max_weight: largest weight of one site; 0 in an evaluation.
        summed: numbers of all sites together, where single ones are not known.
        counters: of each site that counts, where they are known.
        voided: why no attempt of this round can succeed any more.
    """

    sums: Accumulator | None
    report: Report
    share: frozenset[str]
    max_weight: int = 0
    accepted: dict[str, Numbers] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    summed: Numbers | None = None
    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    voided: FedLoRAError | None = None

    @property
    def weight(self) -> int:
        """What the sites' updates were weighed by, all together."""
        if self.summed is not None and self.summed.weight is not None:
            return self.summed.weight
        return self.sums.weight if self.sums else 0

    @property
    def together(self) -> Numbers | None:
        """Of the rows of all sites that count, as if they were one's; None if none does."""
        if self.summed is not None or not self.accepted:
            return self.summed
        return Numbers(weight=self.weight, metrics=pool(self.share, self.counters.values()))

    def accept(self, site: str, update: Update) -> None:
        if update.weight > self.max_weight:
            raise UpdateRejected.too_heavy(site, update.weight, self.max_weight)
        if self.sums is not None:
            self.sums.add(site, update)
        self.counters[site] = dict(update.counters)
        metrics = finish(self.share, update.counters)  # a site may send more than it was asked for
        self.accepted[site] = Numbers(weight=update.weight, metrics=metrics)
        self.report(Event.UPDATE, SiteUpdate(site=site, weight=update.weight, metrics=metrics))

    def majority(self) -> dict[str, float]:
        """The site that has more than half of the weight, and its share; empty if none has or single weights are not known."""
        weights = {site: numbers.weight or 0 for site, numbers in self.accepted.items()}
        whole = sum(weights.values())
        return {site: weight / whole for site, weight in weights.items() if 2 * weight > whole}

    def accept_sum(self, sites: Sequence[str], update: Update, *, squares: NDArray[np.float64], counted: int) -> None:
        if counted > len(sites) * self.max_weight:
            raise UpdateRejected.too_heavy(f"{len(sites)} sites together", counted, len(sites) * self.max_weight)
        if self.sums is not None:
            self.sums.add("*", replace(update, counters={}), squares=squares)  # a sum of counters is larger than one may be
        metrics = finish({*self.share, "secagg/cut"}, update.counters)
        self.accepted = {site: Numbers(weight=None, metrics={}) for site in sites}
        self.summed = Numbers(weight=counted, metrics=metrics)
        self.report(Event.SUM, Sum(sites=list(sites), weight=counted, metrics=metrics))

    def void(self, error: FedLoRAError) -> None:
        self.voided = error

    def reject(self, site: str, error: FedLoRAError) -> None:
        code = error.remote_code if isinstance(error, RemoteError) else error.code
        self.rejected[site] = code
        self.report(Event.REJECTED, Rejected(site=site, code=code))

    def missing(self, asked: Sequence[str], at_hand: Sequence[str], enrolled: Collection[str]) -> dict[str, str]:
        """Why each site that belongs to the federation does not count: a code, ``late``, ``not-drawn`` or ``offline``."""
        late = {s: "late" for s in asked}
        why = {s: "offline" for s in sorted(enrolled)} | {s: "not-drawn" for s in at_hand} | late | self.rejected
        return {s: code for s, code in why.items() if s not in self.accepted}


@dataclass(slots=True)
class _Meter:
    """A transport that counts the bytes which pass, per site."""

    inner: Transport
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)

    def sites(self) -> Sequence[str]:
        return self.inner.sites()

    def exchange(self, requests: Sequence[Request], *, deadline_s: float) -> Iterator[Reply]:
        for request in requests:
            self.down[request.site] = self.down.get(request.site, 0) + len(request.body)
        for reply in self.inner.exchange(requests, deadline_s=deadline_s):
            self.up[reply.site] = self.up.get(reply.site, 0) + len(reply.body)
            yield reply
