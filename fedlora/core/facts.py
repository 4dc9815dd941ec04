"""What is told with each event, by :class:`fedlora.core.events.Event`: mappings whose fields a type checker knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from fedlora.core.messages import Kind
from fedlora.core.records import RoundRecord

_exact = with_config(ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False))


@_exact
class Start(TypedDict):
    """A run begins or continues."""

    run: str
    """run id"""
    round: int
    """rounds that are done"""
    rounds: int


@_exact
class Waiting(TypedDict):
    """Too few sites are connected, or (``waiting-for``) sites are absent without which a sum would reveal single updates."""

    sites: list[str]
    """those that are there"""
    need: int
    missing: list[str]
    """who is not; if too few are there, all enrolled sites that are not"""


@_exact
class Away(TypedDict):
    """A site has gone away while it was asked."""

    site: str
    waits_s: float
    """longest wait for it, seconds; 0: it has left for good"""
    said: str


@_exact
class Ask(TypedDict):
    """An attempt of a round begins."""

    round: int
    attempt: int
    kind: Kind
    sites: list[str]
    need: int
    """so many of their answers have to count"""


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
    """A site does not count, or (``unheard``) it was counted but did not answer afterwards."""

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


@_exact
class Session(TypedDict):
    """Sites have opened a session."""

    round: int
    sites: list[str]
    threshold: int
    """sites of these that must stay until its end"""


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
    """Too few of these sites are in complete groups."""

    sites: list[str]
    missing: list[str]


@_exact
class StateFile(TypedDict):
    """A file was damaged or missing and is written anew (``mended``), or was damaged and is set aside (``damaged``,
    ``evaluation-again``)."""

    file: str
    """its name, without the directory"""


@_exact
class Died(TypedDict):
    """The last process of this site died in the middle of the step ``doing``; ``why`` says the cause in words."""

    doing: str
    cause: str
    """``memory``: the kernel has killed a process for lack of memory since; ``restart``: the machine was; else ``killed``"""
    why: str


@_exact
class RecordsGone(TypedDict):
    """The records of these rounds are lost."""

    rounds: list[int]


@_exact
class Load(TypedDict):
    """The base model is loaded."""

    model: str
    """its public id, or ``the toy base``"""


@_exact
class Base(TypedDict):
    """Something works in another way on this base than the plan says."""

    lines: list[str]
    """what, and why, in sentences"""


@_exact
class Data(TypedDict):
    """A file was read, or its rows were made into tokens."""

    file: str
    lines: list[str]
    """what was used and what was not, in sentences without any row's contents"""


@_exact
class MicroBatches(TypedDict):
    """Size of the micro-batches and activation checkpointing, as measured."""

    checkpointing: str
    """what activation checkpointing recomputes"""
    tokens: int
    gib: float
    """GPU memory, GiB"""
    tokens_per_s: float
    seconds: float
    """what measuring took"""


@_exact
class OutOfMemory(TypedDict):
    """Work continues with smaller micro-batches or more checkpointing."""

    tokens: int
    checkpointing: str


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
    why: str
    """for this site's own eyes; empty: it is not known here"""
    cure: str
    site: NotRequired[str]
    """in a simulation: which site"""


@_exact
class Own(TypedDict):
    """A site has the adapter that a run has come to; of some rules, one of its own."""

    file: str
    """path"""
    site: NotRequired[str]
    """in a simulation: which site"""


@_exact
class Arm(TypedDict):
    """An arm of a simulation begins, or, as ``arm-done``, ends."""

    name: str
    seed: int


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
class Silent(TypedDict):
    """A site that is connected has given no sign of life for longer than it can by itself."""

    site: str
    since: int
    """its last sign, seconds since 1970"""
    said: str


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
    place: int
    """2: behind one run; 3: behind two"""


@_exact
class SiteStatus(TypedDict):
    """How a site stands with its server."""

    site: str
    state: str
    """of its connection: ``connecting``, ``connected``, ``ready``, ``refused``, ``lost`` or ``stopped``"""
    standing: str
    """of the site: :data:`fedlora.core.sites.standing.STANDINGS`"""
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
