"""What `server up` notices of runs and sites: it says so, and keeps it where other processes can look."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.core.deployment.status import RunNews, RunState
from fedlora.core.errors import FedLoRAError, StoreError
from fedlora.core.events import Event, Report
from fedlora.flower._internals import Control
from fedlora.flower.coordinator.progress import Progress
from fedlora.flower.coordinator.runs import bury, live, progress, settle
from fedlora.flower.jobs import Job, Outcome, jobs, load_outcome, over, read_events
from fedlora.formats.files import load_record, save_record
from fedlora.formats.state.audit import note, read
from fedlora.gateway.doors import GOODBYES, SENDING
from fedlora.rounds.audit import NO_FACTS, run_facts

_PASSED_ON = (
    Event.START, Event.WAITING, Event.WAITING_FOR, Event.REJECTED, Event.ERRED, Event.AWAY, Event.VOID, Event.BLOCKED,
    Event.ROUND, Event.ROUND_VOID, Event.FINAL, Event.RUN,
)  # fmt: skip
"""Of a run's events, what the coordinator sees at `server up` too."""


_TIMES = ("since", "sending", "silent")  # a record holds no floats


@dataclass(frozen=True, slots=True)
class Seen:
    """How `server up` has seen a site last.

    Attributes:
        online: whether it calls now.
        since: since when, seconds since 1970; 0: it has never called.
        cause: why it is not let in: ``removed``, ``clock``, ``in-use``; empty: it is.
        why: the same in a sentence.
        gone: if it has signed off: one of ``gateway.doors.GOODBYES``.
        sending: when it has sent a part of an answer, seconds since 1970; 0: never.
        silent: when it gave its last sign of life, seconds since 1970, if it is connected and another one is overdue; else 0.
    """

    online: bool = False
    since: float = 0.0
    cause: str = ""
    why: str = ""
    gone: str = ""
    sending: float = 0.0
    silent: float = 0.0


def _file(home: Path) -> Path:
    return home / "flower" / "sites.json"


def last_look(home: Path) -> float:
    """When `server up` has looked at its sites last, seconds since 1970; 0: never."""
    try:
        return _file(home).stat().st_mtime
    except OSError:
        return 0.0


def load_seen(home: Path) -> dict[str, Seen]:
    """How sites were seen last; empty before that, or if the file is damaged."""
    with suppress(StoreError, TypeError, KeyError):
        found = load_record(_file(home), "sites")
        return {site: Seen(**facts | {k: float(facts.get(k, 0)) for k in _TIMES}) for site, facts in (found or {}).items()}
    return {}


class Sightings:
    """Keeps how each site was seen last, in ``flower/sites.json``. Takes the events of `server up`.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, home: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._home, self._clock = home, clock
        ended = last_look(home)  # of a server that was killed: who was there then was seen until then
        self._seen = {
            site: replace(seen, online=False, since=ended) if seen.online else seen for site, seen in load_seen(home).items()
        }
        self._save()

    def tick(self) -> None:
        """Notes that all sites were looked at now."""
        with suppress(OSError):
            os.utime(_file(self._home), (self._clock(), self._clock()))

    def through(self, report: Report) -> Report:
        """Reports there, and keeps what concerns a site."""

        def listening(event: Event, facts: Mapping[str, Any]) -> None:
            report(event, facts)
            self._take(event, facts)

        return listening

    def note(self, site: str, word: str) -> None:
        """Takes a notice of the gateway about a site, after the events that the same moment has brought: they forget it."""
        seen = self._seen.get(site)
        if seen is None or (word not in GOODBYES and word != SENDING):
            return
        self._seen[site] = replace(seen, sending=self._clock()) if word == SENDING else replace(seen, gone=word)
        self._save()

    def _take(self, event: Event, facts: Mapping[str, Any]) -> None:
        if event == Event.SITE_ONLINE:
            self._seen[facts["site"]] = Seen(True, self._clock())
        elif event == Event.SITE_OFFLINE:
            before = self._seen.get(facts["site"], Seen())
            if before.since and not before.online:  # it was away before this server began, and is since then
                self._seen[facts["site"]] = replace(before, cause="", why="")
            else:
                self._seen[facts["site"]] = Seen(False, self._clock())
        elif event == Event.SITE_SILENT:
            self._seen[facts["site"]] = replace(self._seen.get(facts["site"], Seen(True)), silent=float(facts["since"]))
        elif event == Event.SITE_REFUSED:
            seen = self._seen.get(facts["site"], Seen())
            self._seen[facts["site"]] = replace(seen, cause=facts["cause"], why=facts["why"])
        else:
            return
        self._save()

    def _save(self) -> None:
        with suppress(FedLoRAError):  # a full disk: it is seen again
            facts = {s: asdict(seen) | {k: repr(getattr(seen, k)) for k in _TIMES} for s, seen in self._seen.items()}
            save_record(_file(self._home), "sites", facts)
        self.tick()


@dataclass(slots=True)
class _Watched:
    job: Job
    offset: int = 0
    progress: Progress = field(default_factory=Progress)


class Runs:
    """Reports what becomes of each run: that it begins, its rounds, what it waits for, and how it ends and why.

    Args:
        on_round: called with a run's name whenever its page would change: it begins, a round or the run has ended.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        home: Path,
        *,
        report: Report,
        on_round: Callable[[str], None] = lambda name: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home, self._report, self._on_round, self._clock = home, report, on_round, clock
        for name, job in bury(home).items():
            report(Event.RUN, ended(job.name, progress(home, name), load_outcome(home, name)))
        self._known = {name for name in jobs(home) if over(home, name)}
        self._watched: dict[str, _Watched] = {}
        self.note_ends(late=True)

    def look(self, control: Control) -> None:
        """One look at all of them.

        Raises:
            ConnectionFailed: Flower does not answer.
        """
        for name, job in jobs(self._home).items():
            if name not in self._known:
                self._known.add(name)
                self._watched[name] = _Watched(job)
                self._begin(name, job)
        for name, watched in list(self._watched.items()):
            at_its_end = over(self._home, name)  # asked before its last events are read
            self._pass_on(name, watched)
            if at_its_end:
                del self._watched[name]
                self._end(name, watched)
        settle(self._home, control, now=self._clock())

    def _begin(self, name: str, job: Job) -> None:
        jobs_now = [*live(self._home)]
        place = jobs_now.index(name) + 1 if name in jobs_now else 1  # else it has ended already
        said = (
            f"begins, plan {job.digest[:12]}"
            if place == 1
            else f"waits, number {place}: it begins when those before it have ended"
        )
        state: RunState = "starting" if place == 1 else "queued"
        self._report(Event.RUN, RunNews(name=job.name, state=state, code="", why="", cure="", sites={}, said=said))

    def _pass_on(self, name: str, watched: _Watched) -> None:
        report = self._report
        entries, watched.offset = read_events(self._home, name, offset=watched.offset)
        for at, event, facts in entries:
            watched.progress.take(at, event, facts)
            if event in _PASSED_ON:
                report(event, facts)
            if event in (Event.START, Event.ROUND, Event.ROUND_VOID, Event.FINAL):
                self._on_round(watched.job.name)

    def _end(self, name: str, watched: _Watched) -> None:
        self._report(Event.RUN, ended(watched.job.name, watched.progress, load_outcome(self._home, name)))
        self.note_ends()
        self._on_round(watched.job.name)

    def note_ends(self, *, late: bool = False) -> None:
        """Writes down how each run ended whose end is not in the server's log yet.

        Args:
            late: it was not seen when it ended.
        """
        try:
            written = {line.facts["job"] for line in read(self._home)[0] if line.what == "ended"}
        except FedLoRAError:
            return  # whoever starts the server says what is wrong with its key
        there = jobs(self._home)
        last = {job.name: name for name, job in there.items()}
        for name, job in there.items():
            if job.name and name not in written and over(self._home, name):
                news = ended(job.name, Progress(), load_outcome(self._home, name))
                facts = run_facts(self._home / "runs" / job.name) if last[job.name] == name else NO_FACTS
                note(self._home, "ended", run=job.name, job=name, state=news["state"], code=news["code"], late=late, **facts)


def ended(name: str, at: Progress, outcome: Outcome | None) -> RunNews:
    """How a run ended, and why; the sites that its last attempt lacked by name, each with its code."""
    done = f"{at.round} of {at.rounds} rounds are done" if at.rounds else "no round was begun"
    if outcome is not None and not outcome.code:
        said = f"ended: done, {at.rounds} rounds"
        return RunNews(name=name, state="done", code="", why="", cure="", sites={}, said=said)
    code, why, cure = (
        (outcome.code, outcome.message, outcome.hint) if outcome is not None else ("error", "its record is damaged", "")
    )
    state: RunState = "stopped" if code == "stopped" else "failed"
    sites = dict(at.record.missing) if at.record is not None else {}
    sites |= {s: c for s, c in at.answers.items() if c} if at.now else {}
    who = f" ({', '.join(f'{site}: {c}' for site, c in sites.items())})" if sites and state == "failed" and "(" not in why else ""
    said = f"ended: {state}, {code}: {why}{who}; {done}{f'; {cure}' if cure else ''}"
    return RunNews(name=name, state=state, code=code, why=why, cure=cure, sites=sites, said=said)
