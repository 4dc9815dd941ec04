"""The server's loop over rounds: ask the sites, aggregate valid updates, save a checkpoint."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import Adapter, Update
from fedlora.core.errors import (
    DealerLied,
    FedLoRAError,
    RemoteError,
    RunFailed,
    UpdateRejected,
)
from fedlora.core.events import Event, Report
from fedlora.core.facts import Ask, Majority, Recorded, Rejected, SiteUpdate, Start, Sum, Waiting
from fedlora.core.messages import Kind, Reply, Request, Task
from fedlora.core.metrics import finish, pool
from fedlora.core.plan import Plan
from fedlora.core.records import Bytes, Numbers, Outcome, RoundRecord, Seconds
from fedlora.core.sites.facts import Blocked
from fedlora.core.tables.audit import shared_metrics
from fedlora.core.tables.privacy import sends_gradients
from fedlora.formats.plans import plan_of
from fedlora.privacy.claims import spent_after
from fedlora.protect import Protection
from fedlora.protect.modes import brings_work, mode_of
from fedlora.rounds.best import keep_best
from fedlora.rounds.checkpoint import Checkpoint
from fedlora.rounds.failure import too_few
from fedlora.rounds.patience import Patience, Wait, blockers, in_words
from fedlora.rounds.store import RunStore
from fedlora.rounds.transport import Transport, drive
from fedlora.rules import Accumulator, Aggregator, State, add, max_site_weight, optimizer_of, rounded
from fedlora.rules.own import finished, replied, started
from fedlora.rules.rounding import is_finite


def run(
    plan: Plan | str | os.PathLike[str],
    *,
    store: RunStore,
    aggregator: Aggregator,
    protection: Protection,
    transport: Transport,
    enrolled: Collection[str],
    report: Report,
    between: Callable[[int, int], None] = lambda done, rounds: None,
    wait: Wait | None = None,
) -> Checkpoint:
    """Runs the remaining rounds, then one last evaluation; returns the last checkpoint.

    Args:
        plan: or its file.
        enrolled: the sites of the federation. The record of a round without one of them says ``partial``.
        between: called before each round and the last evaluation, with the rounds that are done and those of the plan; it may
            wait, or raise to end the run there.
        wait: waits so many seconds for people at the sites, at most ``round_deadline`` in a round, if a round has too few sites
            without those that only they can bring back; None: there are none, and such a round is tried as often as any.

    Raises:
        RunFailed (quorum): a round stayed below ``min_sites`` in every attempt, or people were waited for in vain, or as many
            rounds as a round has attempts were void in a row, not counted those that showed a new liar. The run can be resumed.
    """
    plan = plan_of(plan)
    parts = _Parts(plan, protection, transport, enrolled, report, wait)
    void, liars, named, rounds = 0, set[str](), set[str](), plan.federation.num_rounds
    checkpoint = store.at_rest(store.resume(report))
    report(Event.START, Start(run=store.run, round=checkpoint.round, rounds=rounds))
    while checkpoint.round < rounds:
        between(checkpoint.round, rounds)
        task = task_of("train", checkpoint, plan=plan, run=store.run, aggregator=aggregator)
        tally, asked = _ask(task, parts, partial(_start, aggregator, checkpoint))
        void = 0 if tally.voided is None else void + bool(tally.liars <= liars)  # a new liar is left out from now on
        liars |= tally.liars
        checkpoint, record = _aggregate(checkpoint, tally, asked, aggregator=aggregator, plan=plan)
        keep_best(store, before=checkpoint.round)
        store.save(checkpoint)
        checkpoint = store.at_rest(checkpoint)
        report(Event.ROUND if tally.voided is None else Event.ROUND_VOID, Recorded(record=record))
        for site, fraction in tally.majority().items() if len(tally.accepted) > 2 else ():  # of two, one nearly always has it
            if site not in named:
                report(Event.MAJORITY, Majority(site=site, percent=100 * fraction))
            named.add(site)
        if void >= plan.federation.round_attempts and tally.voided is not None:
            hint = "look at the sites, then resume the run"
            raise RunFailed(f"{void} rounds in a row were void: {tally.voided}", hint=hint, code="quorum")
    if store.final() is None:
        between(checkpoint.round, rounds)
        task = task_of("evaluate", checkpoint, plan=plan, run=store.run, aggregator=aggregator)
        _, record = _ask(task, parts, lambda cohort: None)
        store.finish(record)
        report(Event.FINAL, Recorded(record=record))
    return store.load()


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """The parts of a run that every round uses; see :func:`run`."""

    plan: Plan
    protection: Protection
    transport: Transport
    enrolled: Collection[str]
    report: Report
    wait: Wait | None


def _start(aggregator: Aggregator, checkpoint: Checkpoint, cohort: int) -> Accumulator:
    return started(aggregator.start(checkpoint.adapter, cohort=cohort, round=checkpoint.round + 1), aggregator)


def _aggregate(
    checkpoint: Checkpoint, tally: _Tally, record: RoundRecord, *, aggregator: Aggregator, plan: Plan
) -> tuple[Checkpoint, RoundRecord]:
    """The checkpoint after the round, and the round's record with its outcome."""
    began, round = time.monotonic(), checkpoint.round + 1
    if tally.voided is not None:  # the sites have trained and go on; the adapter stays as it was
        rule = spent_after(plan, rounds=round)  # the sites were charged
        record = record.model_copy(update={"outcome": Outcome(weight=0, adapter=checkpoint.adapter.digest(), rule=rule)})
        return Checkpoint(round, checkpoint.adapter, record, checkpoint.state), record
    weight = tally.weight
    after, state, rule = _finish(checkpoint, tally, aggregator=aggregator, plan=plan)
    if not is_finite(after.vector):
        optimizer = plan.server_optimizer.name
        whose = f"rule {plan.aggregate.name!r}" + f" and optimizer {optimizer!r}" * (optimizer != "none")
        hint = "every site's update was finite: look at the rule's finish if it is your own, else a smaller learning rate"
        raise RunFailed(f"the adapter that {whose} made in round {round} holds NaN or infinity", hint=hint)
    outcome = Outcome(weight=weight, adapter=after.digest(), rule=rule | spent_after(plan, rounds=round))
    seconds = Seconds(round=record.seconds.round, aggregate=time.monotonic() - began)
    record = record.model_copy(update={"outcome": outcome, "seconds": seconds})
    return Checkpoint(round, after, record, state), record


def _finish(
    checkpoint: Checkpoint, tally: _Tally, *, aggregator: Aggregator, plan: Plan
) -> tuple[Adapter, State, dict[str, float]]:
    """The next adapter, with the state and the numbers of the rule. The sums go as soon as they are used.

    At most four vectors of the adapter's size at a time, beside an optimizer's moments: the sums are two.
    """
    if tally.sums is None:
        raise ValueError("a round of training needs sums")
    adapter, round = Adapter(checkpoint.adapter.vector, checkpoint.adapter.layout), checkpoint.round + 1
    result = aggregator.finish(tally.sums, adapter, scale=plan.lora.scale, round=round, state=checkpoint.state)
    tally.sums = None
    result = finished(result, aggregator, adapter)
    state: State = {**checkpoint.state, **result.state}
    rule = {} if sends_gradients(plan) else dict(result.record)  # its numbers compare updates of several steps
    if result.delta is None:
        return cast("Adapter", result.adapter), state, rule
    moved, state = optimizer_of(plan, round=round).step(result.delta, state)
    after = add(adapter, moved)
    del adapter, moved, result
    after, state = rounded(after, state, sent=after.layout.only(aggregator.down()), dtype=mode_of(plan).down(plan))
    return after, state, rule


def task_of(kind: Kind, checkpoint: Checkpoint, *, plan: Plan, run: str, aggregator: Aggregator) -> Task:
    """The task of the next round: the tensors that the rule sends to sites, and those that it wants back."""
    adapter = checkpoint.adapter
    sent = adapter.part(adapter.layout.only(aggregator.down()))
    task = Task(run, plan.canonical(), plan.model.digest, kind, checkpoint.round + 1, 0, sent)
    if kind == "evaluate":
        return task
    reply = replied(aggregator.reply(adapter.layout, checkpoint.round + 1), aggregator)
    return replace(task, sends=None if reply == sent.layout else reply)


def _ask(task: Task, parts: _Parts, start: Callable[[int], Accumulator | None]) -> tuple[_Tally, RoundRecord]:
    """Repeats a round until enough sites have delivered. A site that has delivered before answers from its journal.

    Args:
        start: makes the sums for this many sites; None for an evaluation.

    Raises:
        RunFailed (quorum): too few sites delivered in every attempt, or people were waited for in vain.
    """
    federation, meter = parts.plan.federation, _Meter(parts.transport)
    attempt, allowed, liars = 0, federation.round_attempts, set[str]()
    patience = Patience(federation.round_deadline, parts.wait)
    while True:
        tally, record = _attempt(replace(task, attempt=attempt), parts, meter=meter, start=start)
        if len(tally.accepted) >= federation.min_sites or tally.voided is not None:
            return tally, record
        missing = partial(parts.protection.missing, task)
        if parts.wait is not None and (sites := blockers(record, tally.answered, need=federation.min_sites, missing=missing)):
            said = in_words(sites, limit_s=patience.limit_s)
            parts.report(Event.BLOCKED, Blocked(record=record, sites=sites, waits_s=patience.limit_s, said=said))
            if not patience.once_more():
                raise too_few(task, record, federation, waited_s=patience.waited_s, people=sites)
            attempt, allowed = attempt + 1, allowed + 1
            continue
        parts.report(Event.VOID, Recorded(record=record))
        if new := tally.liars - liars:  # left out from now on: each of them grants one more attempt, once
            liars |= new
            allowed += 1
        attempt += 1
        if attempt >= allowed:
            raise too_few(task, record, federation)


def _attempt(
    task: Task, parts: _Parts, *, meter: _Meter, start: Callable[[int], Accumulator | None]
) -> tuple[_Tally, RoundRecord]:
    """One attempt at a round."""
    plan, report = parts.plan, parts.report
    at_hand = _await_sites(task, parts, time.monotonic() + plan.federation.round_deadline)
    sites = _drawn(at_hand, plan, task) if task.kind == "train" else at_hand
    tally = _Tally(start(max(len(sites), 1)), report, shared_metrics(plan, last=task.kind == "evaluate"))
    tally.max_weight = max_site_weight(plan) if task.kind == "train" else 0
    report(Event.ASK, Ask(round=task.round, attempt=task.attempt, kind=task.kind, sites=sites, need=plan.federation.min_sites))
    began = time.monotonic()
    deadline = began + plan.federation.round_deadline  # waiting for the sites to come does not count
    drive(parts.protection.collect(task, sites, tally), meter, deadline_s=partial(_deadline_s, plan, deadline))
    record = RoundRecord(
        kind=task.kind,
        round=task.round,
        attempt=task.attempt,
        asked=tuple(sites),
        sites=tally.accepted,
        missing=tally.missing(sites, at_hand, parts.enrolled),
        together=tally.together,
        majority=tally.majority(),
        partial=len(tally.accepted) < len({*sites, *parts.enrolled} - ({*at_hand} - {*sites})),
        void=tally.voided.code if tally.voided is not None else None,
        bytes=Bytes(down=meter.down, up=meter.up),
        seconds=Seconds(round=time.monotonic() - began, aggregate=0.0),
        outcome=None,
    )
    return tally, record


def _drawn(at_hand: list[str], plan: Plan, task: Task) -> list[str]:
    """The sites that train: a fraction of those connected, ``min_sites`` at least. It depends only on the plan and the round.

    All attempts of a round draw alike, so that sites that have trained are asked again.
    """
    f = plan.federation
    count = max(math.ceil(f.fraction_train * len(at_hand)), min(f.min_sites, len(at_hand)))
    if count == len(at_hand):
        return at_hand

    def lot(site: str) -> bytes:
        return hashlib.sha256(f"fedlora sampling\0{plan.run.seed}\0{task.round - 1}\0{site}".encode()).digest()

    return sorted(sorted(at_hand, key=lot)[:count])


def _deadline_s(plan: Plan, deadline: float, requests: Sequence[Request]) -> float:
    """Seconds for these requests: what is left of the round for work, the protection's own limit for its further steps."""
    work = any(brings_work(r.phase) for r in requests)
    return _left(deadline) if work else mode_of(plan).step_timeout_s(plan)


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)


def _await_sites(task: Task, parts: _Parts, deadline: float) -> list[str]:
    """The sites that can be asked now, once there are enough of them and none is missing, or time is up."""
    need, said = parts.plan.federation.min_sites, None
    while True:
        sites = list(parts.transport.sites())
        missing = parts.protection.missing(task, sites)
        if (len(sites) >= need and not missing) or time.monotonic() >= deadline:
            return sites
        if said != sites:
            event = Event.WAITING if len(sites) < need else Event.WAITING_FOR
            away = missing if event == Event.WAITING_FOR else sorted({*parts.enrolled} - {*sites})
            parts.report(event, Waiting(sites=sites, need=need, missing=away))
            said = sites
        time.sleep(min(1.0, _left(deadline)))


@dataclass(slots=True)
class _Tally:
    """Tally of one attempt: adds up accepted updates, keeps the names of the sites.

    Attributes:
        metrics_to_share: names of the metrics that the plan lists.
        max_weight: largest weight of one site; 0 in an evaluation.
        summed: the sum of all sites' numbers, where single ones are not known.
        rejected: site that does not count -> the code of the reason; answered: the same, where the site has said so itself.
        counters: of each site that counts, where they are known.
        voided: why no further attempt of this round can succeed.
    """

    sums: Accumulator | None
    report: Report
    metrics_to_share: frozenset[str]
    max_weight: int = 0
    accepted: dict[str, Numbers] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)
    summed: Numbers | None = None
    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    voided: FedLoRAError | None = None

    @property
    def liars(self) -> set[str]:
        """Sites that were caught lying, or did not answer a complaint."""
        return {site for site, code in self.rejected.items() if code in (DealerLied.code, "complaint-unanswered")}

    @property
    def weight(self) -> int:
        """Sum of the weights of the sites' updates."""
        if self.summed is not None and self.summed.weight is not None:
            return self.summed.weight
        return self.sums.weight if self.sums else 0

    @property
    def together(self) -> Numbers | None:
        """Of the rows of all sites that count, as if they were one's; None if none does."""
        if self.summed is not None or not self.accepted:
            return self.summed
        return Numbers(weight=self.weight, metrics=pool(self.metrics_to_share, self.counters.values()))

    def accept(self, site: str, update: Update) -> None:
        if update.weight > self.max_weight:
            raise UpdateRejected.too_heavy(site, update.weight, self.max_weight)
        if self.sums is not None:
            self.sums.add(site, update)
        self.counters[site] = dict(update.counters)
        metrics = finish(self.metrics_to_share, update.counters)  # a site may send more than it was asked for
        self.accepted[site] = Numbers(weight=update.weight, metrics=metrics)
        self.report(Event.UPDATE, SiteUpdate(site=site, weight=update.weight, metrics=metrics))

    def majority(self) -> dict[str, float]:
        """The site with more than half of the weight -> its fraction; empty if there is none or single weights are not known."""
        weights = {site: numbers.weight or 0 for site, numbers in self.accepted.items()}
        whole = sum(weights.values())
        return {site: weight / whole for site, weight in weights.items() if 2 * weight > whole}

    def accept_sum(self, sites: Sequence[str], update: Update, *, squares: NDArray[np.float64], counted: int) -> None:
        if counted > len(sites) * self.max_weight:
            raise UpdateRejected.too_heavy(f"{len(sites)} sites together", counted, len(sites) * self.max_weight)
        if self.sums is not None:
            self.sums.add("*", replace(update, counters={}), squares=squares)  # a sum of counters is larger than one may be
        metrics = finish({*self.metrics_to_share, "secagg/cut"}, update.counters)
        self.accepted = {site: Numbers(weight=None, metrics={}) for site in sites}
        self.summed = Numbers(weight=counted, metrics=metrics)
        self.report(Event.SUM, Sum(sites=list(sites), weight=counted, metrics=metrics))

    def void(self, error: FedLoRAError) -> None:
        self.voided = error

    def reject(self, site: str, error: FedLoRAError) -> None:
        code = error.remote_code if isinstance(error, RemoteError) else error.code
        self.rejected[site] = code
        if isinstance(error, RemoteError):
            self.answered[site] = code
        self.report(Event.REJECTED, Rejected(site=site, code=code))

    def missing(self, asked: Sequence[str], at_hand: Sequence[str], enrolled: Collection[str]) -> dict[str, str]:
        """For each site of the federation that does not count, why: a code, ``late``, ``not-drawn`` or ``offline``."""
        late = {s: "late" for s in asked}
        why = {s: "offline" for s in sorted(enrolled)} | {s: "not-drawn" for s in at_hand} | late | self.rejected
        return {s: code for s, code in why.items() if s not in self.accepted}


@dataclass(slots=True)
class _Meter:
    """A transport that counts the bytes to and from each site."""

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
