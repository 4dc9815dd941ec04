"""What a site has done and does, round by round: its status file, a line for each answer, the outbox and its history.

It listens to the events of the site's work and of its connection, and passes them on.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from pydantic import ValidationError

from fedlora.core.errors import FedLoRAError
from fedlora.core.events import Event, Report
from fedlora.core.messages import Reply, Request
from fedlora.core.sites.facts import NotDone, Sent, SiteState
from fedlora.core.sites.standing import STANDINGS, Doing, standing_of
from fedlora.core.words import duration, size
from fedlora.formats.files import Damaged, load_record, save_record
from fedlora.formats.state.history import NAME as HISTORY
from fedlora.formats.state.history import Answered, note
from fedlora.formats.state.lock import holder
from fedlora.formats.state.outbox import Left, Outbox
from fedlora.protect.modes import brings_work, carries_update
from fedlora.site.pause import has_left

log = logging.getLogger(__name__)

FILE: Final = "status.json"
_EVERY_S = 1.0

Handle = Callable[[Request], Reply]


@dataclass(slots=True)
class _Round:
    """The task in progress."""

    began: float
    kind: str = ""
    round: int = 0
    step: int = 0
    steps: int = 0
    before: float | None = None
    loss: float | None = None
    held_out: dict[str, float] = field(default_factory=dict)

    @property
    def nll(self) -> float | None:
        return self.held_out.get("eval/nll")


@dataclass(slots=True, eq=False)
class Progress:
    """Keeps ``state/status.json`` while `site up` runs, and reports :attr:`Event.SENT`. Thread-safe.

    Args:
        state: the site's state directory.
        report: gets every event that this one is told, and its own.
        outbox: gets every message before it leaves; None: nothing is written down.
        clock: seconds since 1970.
        monotonic: seconds, rising.
    """

    site: str
    server: str
    state: Path
    report: Report
    outbox: Outbox | None = None
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    _paused: bool = field(default=False, init=False)
    _known: bool = field(default=False, init=False)
    _link: str = field(default="connecting", init=False)
    _facts: SiteState = field(init=False)
    _doing: Doing = field(default="ready", init=False)
    _cause: str = field(default="", init=False)
    _now: _Round = field(init=False)
    _nll_first: float | None = field(default=None, init=False)
    _took_s: list[float] = field(default_factory=list, init=False)
    _answered: float | None = field(default=None, init=False)
    _written: float = field(default=float("-inf"), init=False)
    _refused: NotDone | None = field(default=None, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False)

    def __post_init__(self) -> None:
        now = int(self.clock())
        self._now = _Round(self.monotonic())
        self._facts = SiteState(
            site=self.site, server=self.server, standing="invited", why="", cure="", since=now, updated=now, running=True,
            round=0, rounds=0, step=0, steps=0, loss=None, eta_s=None, messages=0, sent_bytes=0, last=None,
            codes={}, refused=None,
        )  # fmt: skip
        with suppress(FedLoRAError):
            if (before := load_state(self.state)) is not None:
                counted = {"messages": before["messages"], "sent_bytes": before["sent_bytes"], "codes": before["codes"]}
                self._facts |= cast("SiteState", counted)
        self._write()

    def __call__(self, event: Event, facts: Mapping[str, Any]) -> None:
        """Takes an event, and passes it on."""
        with self._lock:
            self._take(event, facts)
        report = self.report
        report(event, facts)

    def _take(self, event: Event, facts: Mapping[str, Any]) -> None:
        now = self._now
        if event == Event.SITE:
            self._link, self._cause = facts["state"], facts["cause"]
            self._known = self._known or facts["standing"] not in ("invited", "pending")
            self._facts |= {"why": facts["why"], "cure": facts["cure"]}
        elif event == Event.PAUSED:
            self._paused = facts["paused"]
            self._facts |= {"why": facts["said"].removeprefix("paused: ") if self._paused else "", "cure": ""}
        elif event == Event.FAILED:
            self._refused = NotDone(code=facts["code"], why=facts["why"], cure=facts["cure"], at=int(self.clock()))
        elif event == Event.TRAIN:
            now.kind, now.round = "train", facts["round"]
            self._facts |= {"round": facts["round"], "rounds": facts["rounds"], "step": 0, "loss": None}
        elif event == Event.EVALUATE:
            now.kind, now.round = now.kind or "evaluate", facts["round"]
        elif event == Event.EVALUATED:
            now.held_out = {name: value for name, value in facts["metrics"].items() if _finite(value) is not None}
            if facts["round"] == 1 or self._nll_first is None:
                self._nll_first = now.nll
        elif event == Event.FROM_JOURNAL:
            now.kind, now.round = "journal", facts["round"]
        elif event == Event.STEP:
            now.before = facts["loss"] if now.before is None else now.before
            now.loss, now.step, now.steps = facts["loss"], facts["step"], facts["steps"]
            self._facts |= {"step": now.step, "steps": now.steps, "loss": _finite(now.loss)}
            if self.monotonic() - self._written < _EVERY_S:
                return
        self._change()

    def waits(self) -> None:
        """Takes that what this site has answered was sent, or will not be any more."""
        with self._lock:
            if self._doing == "uploading":
                self._doing = "idle"
                self._change()

    def handling(self, handle: Handle) -> Handle:
        """``handle``, whose answers are written into the outbox before they leave, and told."""

        def handled(request: Request) -> Reply:
            with self._lock:
                if brings_work(request.phase):
                    self._now = _Round(self.monotonic())
                    self._doing = "training"
                    self._change()
            reply = handle(request)
            with self._lock:
                return self._leaving(request, reply)

        return handled

    def _leaving(self, request: Request, reply: Reply) -> Reply:
        left = None
        try:
            if self.outbox is not None and not reply.error:
                left = self.outbox.note(reply.body, phase=request.phase, at=int(self.clock()))
        except FedLoRAError as e:  # what cannot be written down does not leave
            log.error("%s: the outbox: %s (%s)", e.code, e, e.hint)
            self._refused = NotDone(code=e.code, why=str(e), cure=e.hint, at=int(self.clock()))
            reply = Reply(reply.site, error=e.code)
        if self.outbox is not None and reply.error:
            codes = self.outbox.count(reply.error, at=int(self.clock()))
            self._facts["codes"] = {code: count for code, (count, _) in codes.items()}
        body = b"" if reply.error else reply.body
        self._facts |= {
            "messages": self._facts["messages"] + (not reply.error),
            "sent_bytes": self._facts["sent_bytes"] + len(body),
        }
        self._facts["refused"] = self._refused if reply.error else None
        self._doing = "uploading"
        if body and carries_update(request.phase) and self._now.kind:
            sent = _worded(self._sent(body))
            self._facts |= {"last": sent, "eta_s": sent["eta_s"], "round": sent["round"]}
            self.report(Event.SENT, sent)
            if left is not None and left.run:
                self._keep(sent, left)
        self._change()
        return reply

    def _sent(self, body: bytes) -> Sent:
        now, rounds, end = self._now, self._facts["rounds"], self.monotonic()
        seconds = end - now.began
        if now.kind == "train":
            self._took_s.append(end - self._answered if self._answered is not None else seconds)
        self._answered = end
        eta_s = None
        if rounds and self._took_s:
            eta_s = max(rounds - now.round, 0) * sum(self._took_s) / len(self._took_s)
        sent = Sent(
            round=now.round, rounds=rounds, kind=now.kind, steps=now.steps, before=_finite(now.before), after=_finite(now.loss),
            nll=_finite(now.nll), nll_first=_finite(self._nll_first), size_bytes=len(body), seconds=seconds, eta_s=eta_s,
            sha256=hashlib.sha256(body).hexdigest(), said="",
        )  # fmt: skip
        return sent

    def _keep(self, sent: Sent, left: Left) -> None:
        names = ("round", "rounds", "kind", "steps", "before", "after", "size_bytes", "sha256", "seconds")
        facts = {name: value for name, value in sent.items() if name in names}
        try:
            record = Answered.model_validate({**facts, "at": left.at, "run": left.run, "held_out": self._now.held_out})
            note(self.state / HISTORY, record)
        except (FedLoRAError, ValidationError) as e:  # the work is more important than the news of it
            log.warning("the history: %s", e)

    def _change(self) -> None:
        word = standing_of(
            self._link, cause=self._cause, known=self._known, doing=self._doing, paused=self._paused,
            failed=self._facts["refused"] is not None,
        )  # fmt: skip
        if word != self._facts["standing"]:
            self._facts |= {"standing": word, "since": int(self.clock())}
        self._write()

    def _write(self) -> None:
        self._written = self.monotonic()
        self._facts["updated"] = int(self.clock())
        try:
            save_record(self.state / FILE, "status", self._facts)
        except FedLoRAError as e:  # the work is more important than the news of it
            log.warning("the status file: %s", e)


def _worded(sent: Sent) -> Sent:
    return sent | {"said": in_words(sent)}


def in_words(sent: Sent) -> str:
    """A round's line for the screen."""
    left = f"{size(sent['size_bytes'])} left, SHA-256 {sent['sha256'][:16]}"
    if sent["kind"] == "evaluate":
        first = f", {sent['nll_first']:.3f} in the first round" if sent["nll_first"] is not None else ""
        own = "" if sent["nll"] is None else f"own held-out loss {sent['nll']:.3f}{first}; "
        return f"last evaluation: {own}{left}; the run is done at this site"
    name = f"round {sent['round']}" + (f" of {sent['rounds']}" if sent["rounds"] else "")
    if sent["kind"] == "journal":
        return f"{name}: {left}; from the journal, not trained again"
    loss = "" if sent["before"] is None or sent["after"] is None else f", loss {sent['before']:.3f} to {sent['after']:.3f}"
    loss += "" if sent["nll"] is None else f", held-out loss before it {sent['nll']:.3f}"
    steps = f"{sent['steps']} step{'s' * (sent['steps'] != 1)} in {duration(sent['seconds'])}{loss}"
    more = f"; about {duration(sent['eta_s'])} to the last round" if sent["eta_s"] else ""
    return f"{name}: {steps}; {left}{more}"


def load_state(state: Path) -> SiteState | None:
    """How a site stands, by its status file; None: no `site up` has run here.

    Raises:
        Damaged: the file is not what was written.
    """
    found = load_record(state / FILE, "status", hint="a `site up` that runs writes it anew")
    if found is None:
        return None
    if set(found) != set(SiteState.__annotations__):
        raise Damaged(f"{state / FILE} is of another version", hint="a `site up` that runs writes it anew")
    known = cast("SiteState", found)
    by = holder(state)
    if has_left(state):
        known |= {"standing": "left", "why": STANDINGS["left"]}
    return known | {"running": by is not None and by.what == "fedlora site up"}


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < 1e100 else None
