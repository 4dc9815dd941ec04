"""What a site's doctor, screen and status file say: facts of events (FORMAT.md, 11.5) and answers of commands (11.6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from fedlora.core.records import RoundRecord

_exact = with_config(ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False))


@_exact
class SiteFinding(TypedDict):
    """Something that was looked at at a site, and what to do about it."""

    part: str
    """a name of the table of parts: ``keys``, ``server``, ``data`` ..."""
    name: str
    """of the fault; empty: none"""
    verdict: str
    """``right``; ``note``: works, and somebody should know; ``later``: may go away by itself; ``wrong``: somebody has to act"""
    why: str
    """what was found"""
    fix: str
    """what to do; empty unless there is something"""
    said: str
    """both in a sentence"""
    status: int
    """the exit status that it would end a command with; 0 unless it is ``later`` or ``wrong``"""
    numbers: Mapping[str, float]
    """counts, by name"""


@_exact
class Blocked(TypedDict):
    """A round has too few sites without those that only people there can bring back; it is asked again and again."""

    record: RoundRecord
    """of the attempt"""
    sites: Mapping[str, str]
    """those sites, each with the code that it has answered"""
    waits_s: float
    """longest wait for them, seconds"""
    said: str
    """what is missing, at whom, and what is done about it there"""


@_exact
class SiteAsks(TypedDict):
    """A site asks to join; a person compares the words with it."""

    site: str
    words: list[str]
    said: str


@_exact
class Joining(TypedDict):
    """A step of `site join` is done."""

    step: str
    """``aside``: what an unanswered attempt has left made room; ``server``: it is the invitation's; ``keys``: were made;
    ``words``: it has asked, and people compare these"""
    said: str


@_exact
class Evaluated(TypedDict):
    """An evaluation of the adapter that came is done, over this site's own rows."""

    round: int
    metrics: Mapping[str, float]
    """all numbers of it, whether they are shared or not"""
    site: NotRequired[str]
    """in a simulation: which site"""


@_exact
class Sent(TypedDict):
    """The answer to a round is about to leave; what left stands in the outbox, too."""

    round: int
    """1 .. rounds; one more for the last evaluation"""
    rounds: int
    """of training in the run; 0: not known, the answer came from the journal"""
    kind: str
    """``train``, ``evaluate``: the last evaluation, or ``journal``: sent again, not computed again"""
    steps: int
    before: float | None
    """this site's own loss in the round's first step, nats per supervised token; null: none was trained"""
    after: float | None
    """the same in its last step"""
    nll: float | None
    """own held-out loss of the adapter that came, nats per token; null: not evaluated in this round, or no rows are held out"""
    nll_first: float | None
    """the same of the first one that was evaluated in this run since `site up` began: in round 1 it is the base's"""
    size_bytes: int
    sha256: str
    """of the bytes that leave, hex"""
    seconds: float
    """from the task to its answer"""
    eta_s: float | None
    """until the last round is over here, by the rounds so far; null: not known"""
    said: str
    """all of it in a sentence"""


@_exact
class Paused(TypedDict):
    """A site takes no tasks, or takes them again."""

    paused: bool
    until: int
    """seconds since 1970; 0: until somebody says so, or it is not paused"""
    said: str
    """why, in a sentence"""


@_exact
class Gone(TypedDict):
    """A site has left."""

    site: str
    erased: list[str]
    """paths of what was deleted here"""


@_exact
class Tried(TypedDict):
    """What a base answers with an adapter on it."""

    prompt: str
    """as it was given to the model, with the chat template around it"""
    text: str
    tokens: int
    """of the answer"""
    seconds: float


@_exact
class Unit(TypedDict):
    """A service of the user."""

    path: str
    text: str
    """of the unit"""


@_exact
class NotDone(TypedDict):
    """Why a task was not done; only the code has left."""

    code: str
    why: str
    cure: str
    at: int
    """seconds since 1970"""


@_exact
class SiteState(TypedDict):
    """How a site stands, as `site up` writes it down while it runs; also its status file."""

    site: str
    server: str
    standing: str
    """a word of the table of standings"""
    why: str
    """what is amiss; empty: nothing"""
    cure: str
    since: int
    """in this standing since, seconds since 1970"""
    updated: int
    """seconds since 1970"""
    running: bool
    """false: no `site up` runs, and this is what the last one wrote"""
    round: int
    rounds: int
    step: int
    steps: int
    loss: float | None
    """of the last step, nats per supervised token"""
    eta_s: float | None
    messages: int
    """that have left"""
    sent_bytes: int
    last: Sent | None
    """the last answer to a round"""
    codes: Mapping[str, int]
    """error code -> how often it left instead of a message"""
    refused: NotDone | None
    """why the last task was not done; null: it was"""


@_exact
class Doctored(TypedDict):
    """All that `fedlora site doctor` has looked at."""

    site: str
    status: int
    """exit status: of the first finding that is wrong, else of the first that may go away"""
    findings: list[SiteFinding]


@_exact
class Message(TypedDict):
    """A message that has left, or was about to when the power went: a line of the outbox."""

    number: int
    at: int
    """seconds since 1970"""
    phase: str
    """the step of the protection that it answers"""
    run: str
    """run id"""
    round: int
    size_bytes: int
    sha256: str
    code: str
    """error code that left instead of a body; empty: none"""


@_exact
class OutboxRead(TypedDict):
    """The outbox, whose signatures, order and end are as they were written."""

    file: str
    messages: list[Message]
    """all of them, also with --verify"""
    size_bytes: int
    """of all messages together"""
    codes: Mapping[str, int]
    """error code -> how often it left instead of a message"""


@_exact
class Leaving(TypedDict):
    """A part of a message, with the bytes that it takes."""

    name: str
    what: str
    size_bytes: int


@_exact
class DryRun(TypedDict):
    """What would leave in the first round of a plan; nothing was sent."""

    site: str
    plan: str
    """plan digest"""
    size_bytes: int
    sha256: str
    parts: list[Leaving]
    """every field and tensor, and what encryption adds; together ``size_bytes``"""
    others: list[Leaving]
    """messages of the same round that would leave beside it; under secure aggregation one for each further step"""
    played: str
    """who was played here, in words"""
    rows: int
    """texts that were looked for in all of them"""
    found: list[str]
    """kinds of what was found in it and must not be: ``row``, ``host name``, ``user name``, ``path``; empty: nothing"""
    not_searched: list[str]
    """what was not looked for, or not everywhere, and why, in words"""
    saved: str
    """path of the message, if it was asked for"""


ANSWERS: Final[Mapping[str, type[Any]]] = {
    "site doctor": Doctored,
    "site status": SiteState,
    "site watch": SiteState,
    "site outbox": OutboxRead,
    "site pause": Paused,
    "site resume": Paused,
    "site leave": Gone,
    "site install-service": Unit,
    "try": Tried,
    "site dry-run": DryRun,
}
"""Command -> the type of ``data``, beside :data:`fedlora.answers.ANSWERS`."""
