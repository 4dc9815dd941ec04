"""Runs that go on or wait at a server, and what can be asked of them."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from fedlora.core.deployment.digests import apart
from fedlora.core.deployment.status import Asked, RunNews
from fedlora.core.errors import ConfigError, ConnectionFailed, RunFailed, StoreError
from fedlora.core.events import Event, Report
from fedlora.core.plan import Plan
from fedlora.flower._internals import Control
from fedlora.flower.coordinator.progress import Progress
from fedlora.flower.jobs import (
    Job,
    Outcome,
    going_on,
    jobs,
    load_run_id,
    load_wish,
    over,
    read_events,
    save_outcome,
    save_wish,
)
from fedlora.flower.records import safe_code
from fedlora.formats.files import Damaged
from fedlora.formats.state.audit import note
from fedlora.rounds.store import RunStore

_NEW_S = 60.0
"""A job that is younger may not be known to Flower yet."""
_STOPS_S = 30.0
_LOOK_S = 0.2


def live(home: Path) -> dict[str, Job]:
    """The jobs that go on or wait, in the order in which they are carried out.

    Right while `fedlora server up` runs, which settles those that have died.
    """
    runs = going_on(home)
    found = {name: job for name, job in jobs(home).items() if not over(home, name)}
    return dict(sorted(found.items(), key=lambda pair: pair[0] != runs))


def settle(home: Path, control: Control, *, now: float) -> None:
    """Writes an outcome for each job that Flower no longer carries out and that has left none: its process died, or it was
    stopped while it waited.

    Raises:
        ConnectionFailed: Flower does not answer.
    """
    known = None
    for name, job in live(home).items():
        if going_on(home) == name:
            continue
        run_id = load_run_id(home, name)
        if run_id is None and now - job.made < _NEW_S:
            continue
        known = control.runs() if known is None else known
        state = known.get(run_id) if run_id is not None else None
        if state is not None and state.status != "finished":
            continue
        hint = f"continue with `fedlora server start {home} {job.plan} --resume`; nothing is lost"
        if state is not None and state.outcome == "stopped":
            ended = Outcome("stopped", "the run was stopped", hint)
        else:
            why = f"as {state.outcome}: {safe_code(state.error)}" if state is not None else "and nothing says how"
            ended = Outcome("run-failed", f"the run ended {why}", f"see flower/log/executor.log; {hint}")
        if not over(home, name):
            save_outcome(home, name, ended)


def bury(home: Path) -> dict[str, Job]:
    """Writes an outcome for each run that an earlier server has begun and left behind when it was killed; returns those.

    To be called when `server up` begins: a minute later Flower would notice it, and until then the run would look as if it
    went on.
    """
    found = {name: job for name, job in live(home).items() if name != going_on(home) and read_events(home, name, offset=0)[0]}
    for name, job in found.items():
        hint = f"continue with `fedlora server start {home} {job.plan} --resume`; nothing is lost"
        save_outcome(home, name, Outcome("run-failed", "the server was killed, or died, while the run went on", hint))
    return found


@contextmanager
def one_start(home: Path) -> Iterator[None]:
    """One `server start` at a time looks for what runs and adds to it."""
    with (home / "flower" / "start.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def running(home: Path, control: Control, plan: Plan, *, resume: bool) -> str:
    """The job that carries out this plan now, or will; empty if there is none.

    Raises:
        ConfigError: a run of this name goes on with another plan.
        StoreError: its directory holds a run, of another plan or not to be resumed.
    """
    known, now = control.runs(), going_on(home)
    for name, job in live(home).items():
        state = known.get(load_run_id(home, name) or -1)
        if name != now and (state is None or state.status != "pending"):
            continue  # its process died with an earlier server, which Flower learns a minute later
        if job.name == plan.run.name and job.digest == plan.digest():
            return name
        if job.name == plan.run.name:
            raise ConfigError(
                f"run {job.name} goes on with another plan ({apart(job.digest, plan.digest())})",
                hint=f"give the new plan another run.name, or end that run: `fedlora server stop {home} {job.name}`",
            )
    directory = home / "runs" / plan.run.name
    if not RunStore.holds(directory):
        return ""
    done = False
    with suppress(Damaged):  # the run's own process repairs it
        if (store := RunStore.open(directory)).plan.digest() != plan.digest():
            RunStore.open(directory, plan)  # says what is wrong, and changes nothing
        done = store.complete
    if not resume:
        raise StoreError(
            f"{directory} holds a run {'that is done' if done else 'already'}",
            hint="choose another run.name" if done else "continue it with --resume, or choose another run.name",
        )
    return ""


def find(home: Path, name: str = "") -> tuple[str, Job]:
    """The job of the live run of this name; without a name that of the one that goes on, or is the next.

    Raises:
        ConfigError: there is none.
    """
    there = live(home)
    for job_name, job in there.items():
        if name in ("", job.name):
            return job_name, job
    others = ", ".join(job.name for job in there.values())
    raise ConfigError(
        f"no run {name} goes on in {home}" if name else f"no run goes on in {home}",
        hint=f"there is: {others}" if others else "`fedlora server start` starts one; `fedlora server status` lists those before",
    )


def stop(home: Path, control: Control, *, name: str, after_round: bool) -> Asked:
    """Ends a run, at once or after its present round. It can be resumed.

    Raises:
        ConfigError: no such run goes on.
        ConnectionFailed: Flower does not answer, or the run does not end.
    """
    job_name, job = find(home, name)
    at = progress(home, job_name)
    resume = f"continue with `fedlora server start {home} {job.plan} --resume`"
    if after_round and at.rounds:
        save_wish(home, job_name, replace(load_wish(home, job_name), stop=True))
        note(home, "stop", run=job.name, after_round=True)
        said = f"run {job.name} stops when its present round is done ({at.said()}); {resume}"
        return Asked(name=job.name, state=at.state, round=at.round, said=said)
    run_id = load_run_id(home, job_name)
    if run_id is None or not control.stop_run(run_id):
        raise ConnectionFailed(f"run {job.name} could not be stopped", hint="look at `fedlora server status`, then try again")
    note(home, "stop", run=job.name, after_round=False)
    end = time.monotonic() + _STOPS_S
    while not over(home, job_name):
        settle(home, control, now=time.time())
        if time.monotonic() > end:
            raise ConnectionFailed(f"run {job.name} does not end", hint="stop `fedlora server up` and start it again")
        time.sleep(_LOOK_S)
    at = progress(home, job_name)
    done = f"{at.round} of {at.rounds} rounds are done" if at.rounds else "it had not begun"
    return Asked(name=job.name, state="stopped", round=at.round, said=f"run {job.name} is stopped, {done}; {resume}")


def pause(home: Path, *, name: str, on: bool) -> Asked:
    """Has a run wait after its present round, or go on.

    Raises:
        ConfigError: no such run goes on.
    """
    job_name, job = find(home, name)
    at, wish = progress(home, job_name), load_wish(home, job_name)
    save_wish(home, job_name, replace(wish, pause=on))
    note(home, "pause" if on else "resume", run=job.name)
    if on:
        said = f"run {job.name} pauses when its present round is done ({at.said()}); `fedlora server resume {home} {job.name}`"
    else:
        said = f"run {job.name} goes on" if wish.pause else f"run {job.name} was not paused"
    return Asked(name=job.name, state=at.state, round=at.round, said=said)


def progress(home: Path, job_name: str) -> Progress:
    """How far a job is, by all of its events."""
    found = Progress()
    for at, event, facts in read_events(home, job_name, offset=0)[0]:
        found.take(at, event, facts)
    return found


def between_rounds(
    home: Path, job_name: str, report: Report, *, sleep: Callable[[float], None] = time.sleep
) -> Callable[[int, int], None]:
    """What the run's own process calls before each round, with the rounds that are done and those of the plan: waits while a
    coordinator wants it paused.

    Raises:
        RunFailed (stopped): from what is returned, if a coordinator wants the run to end here.
    """

    def between(done: int, rounds: int) -> None:
        paused = False
        while (wish := load_wish(home, job_name)).pause or wish.stop:
            name = load_name(home, job_name)
            if wish.stop:
                hint = f"continue with `fedlora server start {home} PLAN --resume`; nothing is lost"
                raise RunFailed(f"the run was stopped after round {done} of {rounds}, as asked", hint=hint, code="stopped")
            if not paused:
                said = f"paused after round {done} of {rounds}; `fedlora server resume {home} {name}` goes on"
                report(Event.RUN, RunNews(name=name, state="paused", code="", why="", cure="", sites={}, said=said))
            paused = True
            sleep(1.0)
        if paused:
            said = f"goes on after round {done} of {rounds}"
            name = load_name(home, job_name)
            report(Event.RUN, RunNews(name=name, state="running", code="", why="", cure="", sites={}, said=said))

    return between


def load_name(home: Path, job_name: str) -> str:
    """The name of a job's run; empty if its file is gone."""
    found = jobs(home).get(job_name)
    return found.name if found is not None else ""
