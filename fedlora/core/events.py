"""What is told while work goes on: the events, and the facts that each brings. FORMAT.md, section 11.5.

Whoever reports builds the facts with the event's own type, ``report(Event.LOAD, Load(model=name))``, so that the type checker
holds them to it; a test walks all calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict

from fedlora.core.messages import Kind
from fedlora.core.records import RoundRecord


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
    VOID = "void"
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
    MENDED = "mended"
    DAMAGED = "damaged"
    EVALUATION_AGAIN = "evaluation-again"
    RECORDS_GONE = "records-gone"
    # Training and evaluation, at a site
    LOAD = "load"
    DATA = "data"
    PACE = "pace"
    OUT_OF_MEMORY = "out-of-memory"
    EVALUATE = "evaluate"
    TRAIN = "train"
    STEP = "step"
    TRAINED = "trained"
    FROM_JOURNAL = "from-journal"
    FAILED = "failed"
    OWN = "own"
    # A simulation
    ARM = "arm"
    ARM_DONE = "arm-done"
    # Processes and connections
    PROCESS = "process"
    LISTENING = "listening"
    SITE_ONLINE = "site-online"
    SITE_OFFLINE = "site-offline"
    SITE_REFUSED = "site-refused"
    ANOTHER_RUN = "another-run"
    SITE = "site"
    CLOCK = "clock"
    OTHER = "other"


Report = Callable[[Event, Mapping[str, Any]], None]
"""Told an event and its facts: what happened, in words and numbers that may be shown to whoever runs this end."""

_exact = with_config(ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False))


# --- a run, at the server -------------------------------------------------------------------------------------------


@_exact
class Start(TypedDict):
    """A run begins, or goes on."""

    run: str
    """run id"""
    round: int
    """rounds that are done"""
    rounds: int


@_exact
class Waiting(TypedDict):
    """Too few sites are there, or, as ``waiting-for``, some without which a sum would show single updates."""

    sites: list[str]
    """those that are there"""
    need: int
    missing: list[str]


@_exact
class Ask(TypedDict):
    """An attempt of a round begins."""

    round: int
    attempt: int
    kind: Kind
    sites: list[str]


@_exact
class SiteUpdate(TypedDict):
    """A site's update counts."""

    site: str
    weight: int
    metrics: Mapping[str, float]
    """the numbers that the plan shares, by name"""


@_exact
class Sum(TypedDict):
    """The sum over these sites counts."""

    sites: list[str]
    weight: int
    metrics: Mapping[str, float]


@_exact
class Rejected(TypedDict):
    """A site does not count, or, as ``unheard``, did and then gave no answer."""

    site: str
    code: str
    """error code"""


@_exact
class Recorded(TypedDict):
    """A round is done (``round``), void (``round-void``) or the last evaluation is done (``final``); or an attempt had too few
    sites (``void``)."""

    record: RoundRecord


@_exact
class Majority(TypedDict):
    """One site has more than half of a round's weight."""

    site: str
    percent: float


# --- secure aggregation -----------------------------------------------------------------------------------------------


@_exact
class Session(TypedDict):
    """Sites have opened a session."""

    round: int
    sites: list[str]
    threshold: int
    """so many of them have to stay to its end"""


@_exact
class Masked(TypedDict):
    """Masked updates have come from these sites."""

    round: int
    sites: list[str]


@_exact
class Complaint(TypedDict):
    """Sites cannot open what one of them has dealt."""

    about: str
    sites: list[str]


@_exact
class LoneChange(TypedDict):
    """Of these sites too few are in whole groups."""

    sites: list[str]
    missing: list[str]


# --- files of state ---------------------------------------------------------------------------------------------------


@_exact
class StateFile(TypedDict):
    """A file was damaged or missing and is written anew (``mended``), or was damaged and is set aside (``damaged``,
    ``evaluation-again``)."""

    file: str
    """its name, without the directory"""


@_exact
class RecordsGone(TypedDict):
    """Records of these rounds are in no file any more."""

    rounds: list[int]


# --- training and evaluation, at a site ---------------------------------------------------------------------------------


@_exact
class Load(TypedDict):
    """The base model is loaded."""

    model: str
    """its public id"""


@_exact
class Data(TypedDict):
    """A file was read, or its rows were made into tokens."""

    file: str
    lines: list[str]
    """what was used and what was not, in sentences without any row's contents"""


@_exact
class Pace(TypedDict):
    """How much is computed at once, by measurement."""

    dial: str
    """what activation checkpointing computes again"""
    tokens: int
    gib: float
    """GPU memory, GiB"""
    tokens_per_s: float
    seconds: float
    """what measuring took"""


@_exact
class OutOfMemory(TypedDict):
    """Work goes on with less at once."""

    tokens: int
    dial: str


@_exact
class Evaluate(TypedDict):
    """An evaluation begins."""

    round: int
    site: NotRequired[str]
    """in a simulation: which site"""


@_exact
class Train(TypedDict):
    """Training begins."""

    round: int
    rounds: int
    site: NotRequired[str]
    """in a simulation: which site"""


@_exact
class Step(TypedDict):
    """An optimizer step is done."""

    site: str
    """a site, or an arm of a simulation"""
    step: int
    """1 .. steps"""
    steps: int
    loss: float
    """nats per supervised token"""


@_exact
class Trained(TypedDict):
    """A round's training is done."""

    round: int
    metrics: Mapping[str, float]
    """all numbers of the round, whether they are shared or not"""
    site: NotRequired[str]
    """in a simulation: which site"""


@_exact
class FromJournal(TypedDict):
    """A finished update is sent again."""

    round: int
    site: NotRequired[str]
    """in a simulation: which site"""


@_exact
class Failed(TypedDict):
    """A task was not done."""

    code: str
    """error code, which is all that left"""
    site: NotRequired[str]
    """in a simulation: which site"""


@_exact
class Own(TypedDict):
    """A site has an adapter of its own."""

    file: str
    """path"""
    site: NotRequired[str]
    """in a simulation: which site"""


@_exact
class Arm(TypedDict):
    """An arm of a simulation begins, or, as ``arm-done``, ends."""

    name: str


# --- processes and connections ------------------------------------------------------------------------------------------


@_exact
class Process(TypedDict):
    """A process that this one started, or a run of Flower's, is in another state."""

    name: str
    state: str
    """a sentence for people"""


@_exact
class Listening(TypedDict):
    """The server is open to sites, and its public port has been probed."""

    address: str
    """host:port"""


@_exact
class SiteName(TypedDict):
    """A site is there, or is gone."""

    site: str


@_exact
class SiteRefused(TypedDict):
    """An enrolled site is not let in."""

    site: str
    cause: str
    """``removed``, ``clock`` or ``in-use``"""
    why: str
    """a sentence for people"""


@_exact
class AnotherRun(TypedDict):
    """This run waits for the end of another one."""

    name: str


@_exact
class Standing(TypedDict):
    """How a site stands with its server."""

    site: str
    state: str
    """``connecting``, ``connected``, ``ready``, ``refused``, ``lost`` or ``stopped``"""
    part: str
    """what is missing; empty: nothing"""
    cause: str
    """a name of the table of causes; empty: none"""
    why: str
    cure: str
    next_s: float
    """until the next try, seconds"""
    said: str
    """all of it in a sentence"""


@_exact
class Clock(TypedDict):
    """This machine's clock differs from the server's; what is signed is corrected."""

    site: str
    ahead_s: float
    """its time minus the server's, seconds"""
    seconds: int
    """the same without sign, rounded"""
    way: str
    """``ahead`` or ``behind``"""


@_exact
class Other(TypedDict):
    """Another version of FedLoRA reports what this one does not know."""

    name: str
    """the event's name"""
    facts: Any
    """what it brought, any JSON value"""


FACTS: Mapping[Event, type[Any]] = {
    Event.START: Start,
    Event.WAITING: Waiting,
    Event.WAITING_FOR: Waiting,
    Event.ASK: Ask,
    Event.UPDATE: SiteUpdate,
    Event.SUM: Sum,
    Event.REJECTED: Rejected,
    Event.VOID: Recorded,
    Event.ROUND: Recorded,
    Event.ROUND_VOID: Recorded,
    Event.MAJORITY: Majority,
    Event.FINAL: Recorded,
    Event.SESSION: Session,
    Event.MASKED: Masked,
    Event.COMPLAINT: Complaint,
    Event.LONE_CHANGE: LoneChange,
    Event.UNHEARD: Rejected,
    Event.MENDED: StateFile,
    Event.DAMAGED: StateFile,
    Event.EVALUATION_AGAIN: StateFile,
    Event.RECORDS_GONE: RecordsGone,
    Event.LOAD: Load,
    Event.DATA: Data,
    Event.PACE: Pace,
    Event.OUT_OF_MEMORY: OutOfMemory,
    Event.EVALUATE: Evaluate,
    Event.TRAIN: Train,
    Event.STEP: Step,
    Event.TRAINED: Trained,
    Event.FROM_JOURNAL: FromJournal,
    Event.FAILED: Failed,
    Event.OWN: Own,
    Event.ARM: Arm,
    Event.ARM_DONE: Arm,
    Event.PROCESS: Process,
    Event.LISTENING: Listening,
    Event.SITE_ONLINE: SiteName,
    Event.SITE_OFFLINE: SiteName,
    Event.SITE_REFUSED: SiteRefused,
    Event.ANOTHER_RUN: AnotherRun,
    Event.SITE: Standing,
    Event.CLOCK: Clock,
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
