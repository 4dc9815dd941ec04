"""``fedlora server start`` and ``attach``: begins a run, or finds the one that goes on, and follows it to its end."""

from __future__ import annotations

import time
from pathlib import Path

from fedlora.core.deployment.status import RunNews
from fedlora.core.errors import ConnectionFailed, FedLoRAError, RunFailed
from fedlora.core.events import Event, Report
from fedlora.core.facts import AnotherRun, Process
from fedlora.flower._internals import Control, RunState
from fedlora.flower.control import opened, start_job
from fedlora.flower.coordinator.presence import Silences
from fedlora.flower.coordinator.runs import find, live, one_start, progress, running, settle
from fedlora.flower.jobs import Job, full, load_job, load_outcome, load_run_id, new_job, pass_on, read_events, save_run_id
from fedlora.flower.records import safe_code
from fedlora.flower.server import sync_sites
from fedlora.formats.plans import load_plan
from fedlora.formats.state.audit import note, note_changes

_OVER_S = 10.0
"""How long Flower may take to learn that a run has ended, seconds."""


def start(home: Path, plan: Path, *, resume: bool, report: Report, poll_s: float = 0.5) -> Path:
    """Starts a run on a running server and waits for its end. An interrupt does not stop the run.

    If the run goes on already, or waits for another one, it is followed instead.

    Args:
        home: the server's directory.
        plan: the plan's file.
        resume: continue from the run's last checkpoint.
        report: gets the run's events, and ``("process", {"name": "run ID", "state"})`` for Flower's view of it.
        poll_s: between two looks, seconds.

    Returns:
        The directory of the completed run.

    Raises:
        ConfigError: the plan cannot be read, or a run of its name goes on with another plan.
        StoreError: the run's directory holds one already.
        ConnectionFailed: no server runs in this home.
        FedLoRAError: the run failed; code, text, hint and exit status are those of the error that ended it.
    """
    found = load_plan(plan)
    sync_sites(home, report=report)
    with one_start(home), opened(home) as control:
        settle(home, control, now=time.time())
        job, todo = running(home, control, found, resume=resume), None
        if not job:
            todo = Job(str(plan.resolve()), resume, name=found.run.name, digest=found.digest(), made=time.time())
            job = new_job(home, todo)
            save_run_id(home, job, start_job(control, job))
            note_changes(home)
            note(home, "start", run=todo.name, plan=todo.digest, resume=resume, job=job)
    if todo is not None:
        return _to_the_end(home, job, todo, offset=0, report=report, poll_s=poll_s)
    return _joined(home, job, report=report, poll_s=poll_s)


def attach(home: Path, name: str, *, report: Report, poll_s: float = 0.5) -> Path:
    """Follows a run that goes on or waits to its end. An interrupt does not stop it.

    Args:
        name: of the run; empty: the one that goes on, or is the next.

    Raises:
        ConfigError: there is none.
        ConnectionFailed: no server runs in this home.
        FedLoRAError: the run failed, as in :func:`start`.
    """
    with opened(home) as control, one_start(home):  # a start that is under way has not written Flower's number of its run yet
        settle(home, control, now=time.time())
        job, _ = find(home, name)
    return _joined(home, job, report=report, poll_s=poll_s)


def _joined(home: Path, job: str, *, report: Report, poll_s: float) -> Path:
    """Follows a run that somebody else has started, from its present round on."""
    todo, at = load_job(home, job), progress(home, job)
    said = f"it goes on already ({at.said()}); this command follows it"
    report(Event.RUN, RunNews(name=todo.name, state=at.state, code="", why="", cure="", sites={}, said=said))
    return _to_the_end(home, job, todo, offset=read_events(home, job, offset=0)[1], report=report, poll_s=poll_s)


def _to_the_end(home: Path, job: str, todo: Job, *, offset: int, report: Report, poll_s: float) -> Path:
    goes_on = f"continue with `fedlora server start {home} {todo.plan} --resume`; nothing is lost"
    state = None
    try:
        with opened(home) as control:
            state = _followed(control, home=home, job=job, report=report, offset=offset, poll_s=poll_s)
    except ConnectionFailed as e:
        outcome = load_outcome(home, job)
        if outcome is None:
            raise full(home) or _gone(home, e, goes_on) from None
    else:
        outcome = load_outcome(home, job)
    if outcome is not None and outcome.code:
        raise outcome.error()
    if outcome is None and state is not None and state.outcome == "stopped":
        raise RunFailed("the run was stopped", hint=goes_on, code="stopped")
    if outcome is None and state is not None and state.outcome != "completed":
        hint = f"see flower/log/executor.log; {goes_on}"
        raise full(home) or RunFailed(f"the run ended as {state.outcome}: {safe_code(state.error)}", hint=hint)
    return home / "runs" / todo.name


def _followed(control: Control, *, home: Path, job: str, report: Report, offset: int, poll_s: float) -> RunState | None:
    """Passes on a run's events until it has ended; None if its outcome is recorded but Flower does not know it."""
    said, place, over_s, run_id = "", 0, 0.0, load_run_id(home, job)
    silences = Silences(home, report, clock=time.time)
    if run_id is None:
        raise ConnectionFailed("Flower's number of this run is not known")
    while True:
        state = control.run_state(run_id)
        offset = pass_on(home, job, report, offset=offset)
        if state.status != said:
            said = state.status
            report(Event.PROCESS, Process(name=f"run {run_id}", state=said))
        if said == "finished":
            return state
        place = _say_place(home, job, place, report)
        silences.look()
        if load_outcome(home, job) is not None:
            over_s += poll_s
            if over_s > _OVER_S:
                return None
        time.sleep(poll_s)


def _say_place(home: Path, job: str, before: int, report: Report) -> int:
    """Reports which run goes on while this one waits, and its place, whenever that has changed; returns the place."""
    jobs = live(home)
    place = [*jobs].index(job) + 1 if job in jobs else 0
    if place > 1 and place != before:
        name = next(iter(jobs.values())).name or "its name is not known"
        report(Event.ANOTHER_RUN, AnotherRun(name=name, place=place))
    return place


def _gone(home: Path, error: ConnectionFailed, goes_on: str) -> FedLoRAError:
    """The error to report when Flower no longer answers."""
    if not (home / "flower" / "server.json").exists():
        return RunFailed(
            "the server was stopped during the run",
            hint=f"start it again with `fedlora server up`; then {goes_on}",
            code="stopped",
        )
    return ConnectionFailed(
        f"the server died or was restarted during the run ({error})", hint=f"when `fedlora server up` runs again, {goes_on}"
    )
