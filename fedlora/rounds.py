"""The server's loop: ask the sites, add up what is valid, save, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Update
from fedlora.aggregate import Aggregator, Sums
from fedlora.config import Plan
from fedlora.errors import ConfigError, FedLoRAError, QuorumNotReached, RemoteError
from fedlora.messages import Kind, Reply, Request, Task
from fedlora.protect import WORK_PHASES, Protection
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
        QuorumNotReached: a round stayed below ``min_sites`` in every attempt, or as many rounds on end were void. The run can
            be resumed.
    """
    void = 0
    check_fit(aggregator, protection, name=plan.aggregate.name, mode=plan.protect.mode)
    at = store.resume(lambda file: report("damaged", {"file": file.name}))
    report("start", {"run": store.run, "round": at.round, "rounds": plan.federation.num_rounds})
    while at.round < plan.federation.num_rounds:
        task = _task(plan, store, at, "train")
        tally, record = _attempts(task, plan, protection, transport, enrolled, report, partial(_start, aggregator, at))
        void = 0 if tally.voided is None else void + 1
        at = _next(aggregator, at, tally, record, scale=plan.lora.scale)
        store.save(at)
        report("round" if tally.voided is None else "round-void", record)
        if void >= plan.federation.round_attempts and tally.voided is not None:
            hint = "look at the sites, then resume the run"
            raise QuorumNotReached(f"{void} rounds on end were void: {tally.voided}", hint=hint)
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
    if tally.voided is not None:  # the sites have trained and go on; the adapter stays as it was
        return Checkpoint(at.round + 1, at.adapter, record | {"weight": 0, "adapter": at.adapter.digest()})
    if tally.sums is None:
        raise ValueError("a round of training needs sums")
    result = aggregator.finish(tally.sums, at.adapter, scale=scale)
    record |= {**result.record, "weight": tally.weight, "adapter": result.adapter.digest()}
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
        drive(protection.collect(task, sites, tally), meter, deadline_s=partial(_deadline_s, plan, deadline))
        record = {
            "round": task.round,
            "attempt": attempt,
            "asked": sites,
            "sites": tally.accepted,
            "rejected": tally.missing(sites, enrolled),
            **({"together": tally.together} if tally.together else {}),
            **({"void": tally.voided.code} if tally.voided is not None else {}),
            "partial": len(tally.accepted) < len({*sites, *enrolled}),
            "bytes/down": meter.down,
            "bytes/up": meter.up,
            "seconds/round": time.monotonic() - began,
        }
        if len(tally.accepted) >= need or tally.voided is not None:
            return tally, record
        report("void", record)
    raise QuorumNotReached(
        f"round {task.round}: {len(tally.accepted)} of {need} sites delivered in {plan.federation.round_attempts} attempts",
        hint="nothing is lost; bring the sites back and resume the run",
    )


def _deadline_s(plan: Plan, deadline: float, requests: Sequence[Request]) -> float:
    """The round's own for work, seconds for the talk that a protection may need after it."""
    work = any(r.phase in WORK_PHASES for r in requests)
    return _left(deadline) if work else plan.protect.phase_deadline


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
    """Tally of one attempt: adds up what is accepted, keeps the names.

    Attributes:
        together: numbers of all sites together, where single ones are not known.
        voided: why no attempt of this round can succeed any more.
    """

    sums: Sums | None
    report: Report
    share: frozenset[str]
    accepted: dict[str, dict[str, float]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    together: dict[str, float] = field(default_factory=dict)
    voided: FedLoRAError | None = None

    @property
    def weight(self) -> int:
        """What the sites' updates were weighed by, all together."""
        return int(self.together.get("weight", self.sums.weight if self.sums else 0))

    def accept(self, site: str, update: Update) -> None:
        if self.sums is not None:
            self.sums.add(site, update)
        listed = {k: v for k, v in update.metrics.items() if k in self.share}  # a site may send more than it was asked for
        self.accepted[site] = {"weight": update.weight, **listed}
        self.report("update", {"site": site, **self.accepted[site]})

    def accept_sum(self, sites: Sequence[str], update: Update, *, squares: NDArray[np.float64], counted: int) -> None:
        if self.sums is not None:
            self.sums.add("*", update, squares=squares)
        listed = {k: v for k, v in update.metrics.items() if k in self.share or k.startswith("secagg/")}
        self.accepted = {site: {} for site in sites}
        self.together = {"weight": counted, **listed}
        self.report("sum", {"sites": list(sites), **self.together})

    def void(self, error: FedLoRAError) -> None:
        self.voided = error

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
