"""How a server, its runs and its sites stand, read from its directory. It changes nothing and asks nobody.

What a server can know of a site is less than the site knows itself: whether it calls, whether it is let in, and what it answered
in the run that goes on. That is said here in the same words as there.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlora.core.deployment.status import RunNews, RunState, RunStatus, ServerStatus, SiteStanding
from fedlora.core.errors import FedLoRAError, StoreError
from fedlora.core.events import Event, Report
from fedlora.core.records import RoundRecord
from fedlora.core.sites.cures import CURES
from fedlora.core.sites.standing import Standing
from fedlora.flower.coordinator.presence import silent_for
from fedlora.flower.coordinator.progress import Progress, step, told
from fedlora.flower.coordinator.runs import live, progress
from fedlora.flower.coordinator.watch import Seen, last_look, load_seen
from fedlora.flower.jobs import Job, Outcome, jobs, load_address, load_outcome, over
from fedlora.formats.signed_roster import load_roster
from fedlora.formats.state.lock import holder
from fedlora.rounds.store import RunStore


def look(home: Path, *, now: float | None = None) -> ServerStatus:
    """All of it.

    Args:
        home: the server's directory.
        now: seconds since 1970; None: the clock's.

    Raises:
        StoreError: this is no server's directory.
    """
    now = time.time() if now is None else now
    if not (home / "sites").is_dir():
        raise StoreError(f"{home} is not the directory of a server", hint="name the one that `fedlora server init` has made")
    up, address, process, said = _server(home)
    open_jobs = live(home) if up else {}
    runs = [_live_run(home, name, job, place, now) for place, (name, job) in enumerate(open_jobs.items(), 1)]
    last = next(iter(open_jobs or reversed(list(jobs(home)))), None)
    at = _progress(home, last, now) if last is not None else Progress()
    runs += _past_runs(home, {run["name"] for run in runs})
    seen, looked = load_seen(home), last_look(home)
    sites = [
        _site(site, seen.get(site, Seen()), at, up=up, live=bool(open_jobs), looked=looked, now=now) for site in enrolled(home)
    ]
    return ServerStatus(up=up, address=address, process=process, said=said, runs=runs, sites=_on_roster(home, sites))


def enrolled(home: Path) -> list[str]:
    """Names of the sites whose .pub files lie in ``HOME/sites``, sorted."""
    return sorted(path.stem for path in (home / "sites").glob("*.pub"))


def _server(home: Path) -> tuple[bool, str, int, str]:
    by = holder(home / "flower")
    if by is None:
        return False, "", 0, f"no server runs in {home}; `fedlora server up {home}` starts it"
    try:
        address = load_address(home).listen
    except FedLoRAError:
        return False, "", by.pid, f"the server is starting or stopping: {by}"
    return True, address, by.pid, f"up, sites are let in at {address}: {by}"


def _progress(home: Path, job: str, now: float) -> Progress:
    at = progress(home, job)
    if at.held(now):
        at.now = 0  # it has just asked again, and waits on a moment later
    return at


# --- runs ---------------------------------------------------------------------------------------------------------------


def _live_run(home: Path, job_name: str, job: Job, place: int, now: float) -> RunStatus:
    at = _progress(home, job_name, now)
    last = at.record or _records(home, job.name)[1]
    state: RunState = at.state if place == 1 or at.rounds else "queued"
    eta = at.eta_s(now)
    said = at.said() if state != "queued" else f"queued: number {place}, it begins when those before it have ended"
    if eta is not None and state == "running":
        said += f"; ready in about {duration(eta)}"
    asked = at.answers if at.now else {}
    missing = at.missing if at.waiting else [*at.blocked] if state == "waiting" else []
    return RunStatus(
        name=job.name, state=state, plan=job.digest, round=at.round, rounds=at.rounds, place=place,
        asked=[*asked], answered=[s for s, code in asked.items() if code is not None],
        missing=missing, need=at.need if at.waiting else 0, last=_facts(last), eta_s=eta,
        code="", why="", cure="", said=said,
    )  # fmt: skip


def _past_runs(home: Path, going_on: set[str]) -> list[RunStatus]:
    """Runs that nobody carries out now, the newest first."""
    outcomes: dict[str, Outcome | None] = {}
    jobs_of = {job.name: name for name, job in jobs(home).items()}  # the last of each name
    for run, name in jobs_of.items():
        outcomes[run] = load_outcome(home, name) if over(home, name) else None
    directories = [d for d in (home / "runs").glob("*") if RunStore.holds(d) and d.name not in going_on]
    began = {run for run in outcomes if run and run not in going_on and not RunStore.holds(home / "runs" / run)}
    found = [_past_run(home, d.name, outcomes.get(d.name)) for d in sorted(directories, key=_changed, reverse=True)]
    return found + [_past_run(home, run, outcomes[run]) for run in sorted(began)]


def _changed(directory: Path) -> float:
    return max((path.stat().st_mtime for path in directory.glob("*.json*")), default=0.0)


def _past_run(home: Path, name: str, outcome: Outcome | None) -> RunStatus:
    directory, digest, rounds, done, complete = home / "runs" / name, "", 0, 0, False
    with suppress(FedLoRAError):
        store = RunStore.open(directory)
        digest, rounds, complete = store.plan.digest(), store.plan.federation.num_rounds, store.complete
    records, last = _records(home, name)
    done = max((r.round for r in records if r.kind == "train"), default=0)
    code, why, cure = (outcome.code, outcome.message, outcome.hint) if outcome is not None and not complete else ("", "", "")
    state: RunState = "done" if complete else "stopped" if code == "stopped" else "failed" if code else "interrupted"
    said = {
        "done": f"done, {rounds} rounds",
        "interrupted": f"interrupted after round {done} of {rounds}; continue it with `fedlora server start ... --resume`",
    }.get(state, f"{state} after round {done} of {rounds}: {code}: {why}{f'; {cure}' if cure else ''}")
    return RunStatus(
        name=name, state=state, plan=digest, round=done, rounds=rounds, place=0, asked=[], answered=[], missing=[], need=0,
        last=_facts(last), eta_s=None, code=code, why=why, cure=cure, said=said,
    )  # fmt: skip


def _records(home: Path, name: str) -> tuple[list[RoundRecord], RoundRecord | None]:
    """The records of rounds that were done, and the last of all; what is damaged is left out."""
    records, final = [], None
    with suppress(FedLoRAError):
        store = RunStore.open(home / "runs" / name)
        records = store.records()
        final = store.final()
    return records, final or (records[-1] if records else None)


def _facts(record: RoundRecord | None) -> dict[str, Any] | None:
    return record.model_dump(mode="json") if record is not None else None


def last_line(run: RunStatus) -> str:
    """The last record of a run in a sentence; empty without one."""
    return told(RoundRecord.model_validate_json(json.dumps(run["last"])), run["rounds"]) if run["last"] is not None else ""


# --- sites ----------------------------------------------------------------------------------------------------------------


def _site(site: str, seen: Seen, at: Progress, *, up: bool, live: bool, looked: float, now: float) -> SiteStanding:
    """How a site stands, as far as this server knows it.

    Args:
        looked: when a server has looked at the sites last, seconds since 1970.
    """
    ago = duration(max(now - (looked if seen.online and not up else seen.since), 0.0))
    if seen.gone == "left" and not seen.online:
        cure = "delete its .pub file, and revoke it where there is a roster"
        return _standing(site, "left", part="server", why=f"it has said good-bye for good, {ago} ago", cure=cure)
    if not up:
        why = f"last seen {ago} ago" if seen.since else "it has never called"
        return _standing(site, "enrolled", part="server", why=f"no server runs here; {why}", cure="start it: `fedlora server up`")
    if seen.cause:
        return _standing(site, "refused", part="accepted", cause=seen.cause, why=seen.why)
    if not seen.since:
        cure = "ask it to run `fedlora site up`"
        return _standing(site, "enrolled", part="server", why="it has never called since this server knows it", cure=cure)
    if seen.gone == "paused" and not seen.online:
        why = f"it has said so, {ago} ago: `fedlora site pause`, or the hours of its policy"
        return _standing(site, "paused", part="server", why=why, cure="it comes back by itself, or when somebody there says so")
    if seen.gone in _ENDED and not seen.online:
        why, cure = f"its `fedlora site up` {_ENDED[seen.gone]}, {ago} ago", "ask when it is started again"
        return _standing(site, "lost", part="server", cause=seen.gone, why=why, cure=cure)
    if not seen.online:
        why, cure = f"no call for {ago}", "ask whether `fedlora site up` runs there and what it says"
        return _standing(site, "lost", part="server", cause="lost", why=why, cure=cure)
    if seen.silent:
        why, cure = silent_for(now - seen.silent), "nothing if it is back within ten minutes; else ask there"
        return _standing(site, "lost", part="server", cause="silent", why=why, cure=cure)
    return _online(site, seen, at, now=now) if live else _between_runs(site, at)


def _online(site: str, seen: Seen, at: Progress, *, now: float) -> SiteStanding:
    """A site that calls, while a run goes on."""
    record = at.record
    if at.now and site in at.answers:
        answer, where = at.answers[site], step(at.now, at.rounds)
        if answer is None and now - seen.sending < _SENDING_S and seen.sending > at.since:
            return _standing(site, "uploading", said=f"uploading: {where}, its answer is on the way")
        if answer is None:
            doing = "training" if at.kind == "train" else "evaluating"
            return _standing(site, "training", said=f"training: {where}, {doing} for {duration(max(now - at.since, 0.0))}")
        if not answer:
            return _standing(site, "idle", said=f"idle: it has answered in {where}")
        return _degraded(site, answer, where)
    if record is not None and at.blocked and not at.now and site in record.asked and site not in at.blocked:
        return _standing(site, "idle", said=f"idle: {step(record.round, at.rounds)} waits for {', '.join(at.blocked)}")
    if record is not None and (code := record.missing.get(site, "")) not in _NOT_ASKED:
        return _degraded(site, code, step(record.round, at.rounds))
    if record is not None and site in record.sites:
        return _standing(site, "ready", said="ready: it counted in the last round")
    if record is not None and site not in {*record.asked, *record.missing, *at.answers, *at.there, *at.missing}:
        return _standing(site, "connected", said=f"connected; {_CAME_LATER}")
    return _standing(site, "connected", said="connected; whether it is ready shows in the first round")


def _between_runs(site: str, at: Progress) -> SiteStanding:
    """A site that calls, while no run goes on: what the last run showed may have been mended since."""
    record = at.record
    if record is not None and (code := record.missing.get(site, "")) not in _NOT_ASKED:
        found = _degraded(site, code, f"{step(record.round, at.rounds)} of the last run")
        return {**found, "standing": "connected", "said": f"connected; {found['why']}; {found['cure']}"}
    if record is not None and site in record.sites:
        return _standing(site, "connected", said="connected; it counted when it was asked last")
    return _standing(site, "connected", said="connected; whether it is ready shows in the first round")


_CAME_LATER = (
    "it was enrolled after this run had begun, and is asked once the run is started again: `fedlora server stop --after-round`, "
    "then `fedlora server start ... --resume`"
)
_ENDED = {"stopped": "was ended there, in order", "orphaned": "has ended there without saying so, as when it is killed"}
"""How a site's `site up` has ended, by the word with which its SuperNode has signed off."""
_SENDING_S = 15.0
"""So long after its last part a site still sends; the gateway says so every five seconds."""

_NOT_ASKED = ("", "not-drawn", "offline")


def _degraded(site: str, code: str, where: str) -> SiteStanding:
    why, cure = CURES.get(code, (f"it answered {code}", "server/README.md says what that means; its own log says why"))
    return _standing(site, "degraded", part="run", cause=code, why=f"{where} was without it: {why} ({code})", cure=cure)


def _standing(
    site: str, standing: Standing, *, part: str = "", cause: str = "", why: str = "", cure: str = "", said: str = ""
) -> SiteStanding:
    said = said or f"{standing}: {why}{f'; {cure}' if cure else ''}"
    return SiteStanding(site=site, standing=standing, part=part, cause=cause, why=why, cure=cure, said=said)


def _on_roster(home: Path, sites: list[SiteStanding]) -> list[SiteStanding]:
    """The same, with what the roster says of them, if there is one."""
    try:
        roster = load_roster(home / "roster.json").roster
    except FedLoRAError:
        return sites
    known, active = {m.identity.name for m in roster.sites}, roster.active()
    return [s if s["site"] in active else _off_roster(s, revoked=s["site"] in known) for s in sites]


def _off_roster(site: SiteStanding, *, revoked: bool) -> SiteStanding:
    if revoked:
        return _standing(site["site"], "revoked", part="roster", why="the roster has revoked it", cure="delete its .pub file")
    lacks = "it is not on the roster and takes no part under secure aggregation: `fedlora roster add`, then sign"
    return {**site, "said": f"{site['said']}; {lacks}"}


def duration(seconds: float) -> str:
    """In the largest unit that says enough: ``41 s``, ``12 min``, ``3 h``, ``4 days``."""
    for unit, size in (("days", 172_800), ("h", 7200), ("min", 120)):
        if seconds >= size:
            return f"{seconds / (86_400 if unit == 'days' else 3600 if unit == 'h' else 60):.0f} {unit}"
    return f"{seconds:.0f} s"


def say_changes(before: ServerStatus, now: ServerStatus, report: Report) -> None:
    """Reports the runs and the sites that stand otherwise than before."""
    runs, sites = {run["name"]: run for run in before["runs"]}, {site["site"]: site for site in before["sites"]}
    for run in now["runs"]:
        if run["name"] not in runs or _mark(run) != _mark(runs[run["name"]]):
            report(Event.RUN, _news_of(run))
    for site in now["sites"]:
        if site["site"] not in sites or site["standing"] != sites[site["site"]]["standing"]:
            report(Event.SITE_STANDING, SiteStanding(**site))


def _mark(run: RunStatus) -> tuple[Any, ...]:
    """What makes it worth a line; the seconds until its end do not."""
    return run["state"], run["round"], run["place"], run["asked"], run["answered"], run["missing"], run["code"]


def _news_of(run: RunStatus) -> RunNews:
    sites = dict(run["last"]["missing"]) if run["last"] is not None else {}
    return RunNews(
        name=run["name"], state=run["state"], code=run["code"], why=run["why"], cure=run["cure"], sites=sites, said=run["said"]
    )
