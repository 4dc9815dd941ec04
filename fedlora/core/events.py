"""Events during work, and the facts of each. FORMAT.md, section 11.5.

A call of ``report`` builds the facts with the event's own type, ``report(Event.LOAD, Load(model=name))``, which the type checker
checks; a test walks all calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json

from fedlora.core.deployment.status import RunNews, SiteStanding
from fedlora.core.facts import (
    AnotherRun,
    Arm,
    Ask,
    Away,
    Base,
    Clock,
    Complaint,
    Data,
    Died,
    Evaluate,
    Failed,
    FromJournal,
    Listening,
    Load,
    LoneChange,
    Majority,
    Masked,
    MicroBatches,
    Other,
    OutOfMemory,
    Own,
    Process,
    Recorded,
    RecordsGone,
    Rejected,
    Session,
    Silent,
    SiteName,
    SiteRefused,
    SiteStatus,
    SiteUpdate,
    Start,
    StateFile,
    Step,
    Sum,
    Train,
    Trained,
    Waiting,
)
from fedlora.core.sites.facts import Blocked, Evaluated, Joining, Paused, Sent, SiteAsks, SiteFinding
from fedlora.core.tables.lab import Reading, Sweep, SweepRun


class Event(StrEnum):
    """What may be reported; :data:`FACTS` says with which facts."""

    # A run, at the server
    START = "start"
    WAITING = "waiting"
    WAITING_FOR = "waiting-for"
    ASK = "ask"
    UPDATE = "update"
    SUM = "sum"
    REJECTED = "rejected"
    ERRED = "erred"
    AWAY = "away"
    VOID = "void"
    BLOCKED = "blocked"
    ROUND = "round"
    ROUND_VOID = "round-void"
    MAJORITY = "majority"
    FINAL = "final"
    # Secure aggregation, at the server
    SESSION = "session"
    MASKED = "masked"
    COMPLAINT = "complaint"
    LONE_CHANGE = "lone-change"
    UNHEARD = "unheard"
    # Files of state
    DIED = "died"
    MENDED = "mended"
    DAMAGED = "damaged"
    EVALUATION_AGAIN = "evaluation-again"
    RECORDS_GONE = "records-gone"
    # Training and evaluation, at a site
    LOAD = "load"
    BASE = "base"
    READING = "reading"
    DATA = "data"
    MICRO_BATCHES = "micro-batches"
    OUT_OF_MEMORY = "out-of-memory"
    EVALUATE = "evaluate"
    EVALUATED = "evaluated"
    TRAIN = "train"
    STEP = "step"
    TRAINED = "trained"
    FROM_JOURNAL = "from-journal"
    FAILED = "failed"
    SENT = "sent"
    OWN = "own"
    # A simulation
    ARM = "arm"
    ARM_DONE = "arm-done"
    SWEEP = "sweep"
    SWEEP_RUN = "sweep-run"
    # Processes and connections
    PROCESS = "process"
    LISTENING = "listening"
    RUN = "run"
    SITE_ONLINE = "site-online"
    SITE_OFFLINE = "site-offline"
    SITE_SILENT = "site-silent"
    SITE_REFUSED = "site-refused"
    ANOTHER_RUN = "another-run"
    SITE = "site"
    SITE_STANDING = "site-standing"
    SITE_ASKS = "site-asks"
    JOINING = "joining"
    CLOCK = "clock"
    FINDING = "finding"
    PAUSED = "paused"
    OTHER = "other"


Report = Callable[[Event, Mapping[str, Any]], None]
"""Told an event and its facts: what happened, in words and numbers that may be shown to the operator of this end."""


FACTS: Mapping[Event, type[Any]] = {
    Event.START: Start,
    Event.WAITING: Waiting,
    Event.WAITING_FOR: Waiting,
    Event.ASK: Ask,
    Event.UPDATE: SiteUpdate,
    Event.SUM: Sum,
    Event.REJECTED: Rejected,
    Event.ERRED: Rejected,
    Event.AWAY: Away,
    Event.VOID: Recorded,
    Event.BLOCKED: Blocked,
    Event.ROUND: Recorded,
    Event.ROUND_VOID: Recorded,
    Event.MAJORITY: Majority,
    Event.FINAL: Recorded,
    Event.SESSION: Session,
    Event.MASKED: Masked,
    Event.COMPLAINT: Complaint,
    Event.LONE_CHANGE: LoneChange,
    Event.UNHEARD: Rejected,
    Event.DIED: Died,
    Event.MENDED: StateFile,
    Event.DAMAGED: StateFile,
    Event.EVALUATION_AGAIN: StateFile,
    Event.RECORDS_GONE: RecordsGone,
    Event.LOAD: Load,
    Event.BASE: Base,
    Event.READING: Reading,
    Event.DATA: Data,
    Event.MICRO_BATCHES: MicroBatches,
    Event.OUT_OF_MEMORY: OutOfMemory,
    Event.EVALUATE: Evaluate,
    Event.EVALUATED: Evaluated,
    Event.TRAIN: Train,
    Event.STEP: Step,
    Event.TRAINED: Trained,
    Event.FROM_JOURNAL: FromJournal,
    Event.FAILED: Failed,
    Event.SENT: Sent,
    Event.OWN: Own,
    Event.ARM: Arm,
    Event.ARM_DONE: Arm,
    Event.SWEEP: Sweep,
    Event.SWEEP_RUN: SweepRun,
    Event.PROCESS: Process,
    Event.LISTENING: Listening,
    Event.RUN: RunNews,
    Event.SITE_ONLINE: SiteName,
    Event.SITE_OFFLINE: SiteName,
    Event.SITE_SILENT: Silent,
    Event.SITE_REFUSED: SiteRefused,
    Event.ANOTHER_RUN: AnotherRun,
    Event.SITE: SiteStatus,
    Event.SITE_STANDING: SiteStanding,
    Event.SITE_ASKS: SiteAsks,
    Event.JOINING: Joining,
    Event.CLOCK: Clock,
    Event.FINDING: SiteFinding,
    Event.PAUSED: Paused,
    Event.OTHER: Other,
}


@cache
def facts_of(event: Event) -> TypeAdapter[Any]:
    """Reads and writes an event's facts."""
    return TypeAdapter(FACTS[event])


def dump_facts_of(event: Event, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON values; a number that is not finite becomes null: what is for a screen ends no run."""
    found: dict[str, Any] = from_json(facts_of(event).dump_json(facts, warnings=False))
    return found


def parse_event(name: str, facts: bytes | str) -> tuple[Event, Mapping[str, Any]]:
    """An event as another process has written it; one that is not known here, or that has other facts, is
    :attr:`Event.OTHER`, never nothing.

    Args:
        facts: a JSON object.

    Raises:
        ValueError: not JSON.
    """
    try:
        event = Event(name)
        found: Mapping[str, Any] = facts_of(event).validate_json(facts)
    except ValueError:
        return Event.OTHER, Other(name=name, facts=from_json(facts))
    return event, found
