"""The server's loop: ask the sites, add up what is valid, save, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fedlora.adapter import Update
from fedlora.aggregate import Aggregator, Sums
from fedlora.config import Plan
from fedlora.errors import ConfigError, FedLoRAError, QuorumNotReached, RemoteError
from fedlora.messages import Kind, Reply, Request, Task
from fedlora.protect import Protection
from fedlora.store import Checkpoint, RunStore
from fedlora.transport import Transport, drive

__all__ = ["Report", "check_fit", "run"]

Report = Callable[[str, Mapping[str, Any]], None]
"""Told ``(event, facts)``: what happened, in words and numbers that may be shown to the coordinator."""


def check_fit(aggregator: Aggregator, protection: Protection, *, name: str, mode: str) -> None:
    """Refuses a rule that needs single updates under a protection that shows only their sum.

    Raises:
        ConfigError: before anything is sent.
    """
    if aggregator.needs == "each" and protection.reveals == "sum":
        raise ConfigError(
            f"aggregate.name = {name!r} needs every single update, protect.mode = {mode!r} shows only their sum",
            hint='choose aggregate.name = "fedavg", or protect.mode = "sealed"',
        )


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
        QuorumNotReached: a round stayed below ``min_sites`` in every attempt. The run can be resumed.
    """
    check_fit(aggregator, protection, name=plan.aggregate.name, mode=plan.protect.mode)
    at = store.resume(lambda file: report("damaged", {"file": file.name}))
    report("start", {"run": store.run, "round": at.round, "rounds": plan.federation.num_rounds})
    while at.round < plan.federation.num_rounds:
        task = _task(plan, store, at, "train")
        tally, record = _attempts(task, plan, protection, transport, enrolled, report, partial(_start, aggregator, at))
        at = _next(aggregator, at, tally, record, scale=plan.lora.scale)
        store.save(at)
        report("round", record)
    if store.final() is None:
        task = _task(plan, store, at, "evaluate")
        _, record = _attempts(task, plan, protection, transport, enrolled, report, lambda cohort: None)
        store.finish(record)
        report("final", record)
    return at


def _start(aggregator: Aggregator, at: Checkpoint, cohort: int) -> Sums:
    return aggregator.start(at.adapter, cohort=cohort)


def _next(aggregator: Aggregator, at: Checkpoint, tally: _Round, record: dict[str, Any], *, scale: float) -> Checkpoint:
    began = time.monotonic()
    if tally.sums is None:
        raise ValueError("a round of training needs sums")
    result = aggregator.finish(tally.sums, at.adapter, scale=scale)
    record |= {**result.record, "weight": tally.sums.weight, "adapter": result.adapter.digest()}
    record["seconds/aggregate"] = time.monotonic() - began
    return Checkpoint(at.round + 1, result.adapter, record)


def _task(plan: Plan, store: RunStore, at: Checkpoint, kind: Kind) -> Task:
    return Task(store.run, plan.canonical(), plan.model.digest, kind, at.round + 1, 0, at.adapter)


def _attempts(
    task: Task,
    plan: Plan,
    protection: Protection,
    transport: Transport,
    enrolled: Collection[str],
    report: Report,
    start: Callable[[int], Sums | None],
) -> tuple[_Round, dict[str, Any]]:
    """Asks for a round until enough sites delivered. A site that did answers again from its journal."""
    need, meter = plan.federation.min_sites, _Meter(transport)
    for attempt in range(plan.federation.round_attempts):
        task = replace(task, attempt=attempt)
        sites = _await_sites(transport, need, time.monotonic() + plan.federation.round_deadline, report)
        tally = _Round(start(max(len(sites), 1)), report, frozenset(plan.evaluation.share))
        report("ask", {"round": task.round, "attempt": attempt, "kind": task.kind, "sites": sites})
        began = time.monotonic()
        deadline = began + plan.federation.round_deadline  # waiting for the sites to come does not count
        drive(protection.collect(task, sites, tally), meter, deadline_s=partial(_left, deadline))
        record = {
            "round": task.round,
            "attempt": attempt,
            "asked": sites,
            "sites": tally.accepted,
            "rejected": tally.missing(sites, enrolled),
            "partial": len(tally.accepted) < len({*sites, *enrolled}),
            "bytes/down": meter.down,
            "bytes/up": meter.up,
            "seconds/round": time.monotonic() - began,
        }
        if len(tally.accepted) >= need:
            return tally, record
        report("void", record)
    raise QuorumNotReached(
        f"round {task.round}: {len(tally.accepted)} of {need} sites delivered in {plan.federation.round_attempts} attempts",
        hint="nothing is lost; bring the sites back and resume the run",
    )


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)


def _await_sites(transport: Transport, need: int, deadline: float, report: Report) -> list[str]:
    """The sites that can be asked now, once there are enough of them or time is up."""
    waiting = False
    while len(sites := list(transport.sites())) < need and time.monotonic() < deadline:
        if not waiting:
            report("waiting", {"sites": sites, "need": need})
            waiting = True
        time.sleep(min(1.0, _left(deadline)))
    return sites


@dataclass(slots=True)
class _Round:
    """Tally of one attempt: adds up what is accepted, keeps the names."""

    sums: Sums | None
    report: Report
    share: frozenset[str]
    accepted: dict[str, dict[str, float]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def accept(self, site: str, update: Update) -> None:
        if self.sums is not None:
            self.sums.add(site, update)
        listed = {k: v for k, v in update.metrics.items() if k in self.share}  # a site may send more than it was asked for
        self.accepted[site] = {"weight": update.weight, **listed}
        self.report("update", {"site": site, **self.accepted[site]})

    def reject(self, site: str, error: FedLoRAError) -> None:
        code = error.remote_code if isinstance(error, RemoteError) else error.code
        self.rejected[site] = code
        self.report("rejected", {"site": site, "code": code})

    def missing(self, asked: Sequence[str], enrolled: Collection[str]) -> dict[str, str]:
        """Why each site that belongs to the federation does not count: a code, ``late``, or ``offline`` (not asked)."""
        late = {s: "late" for s in asked}
        why = {s: "offline" for s in sorted(enrolled)} | late | self.rejected
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
