"""Runs of a sweep in processes of their own, a few at a time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import Thread
from typing import Any, Final, Protocol, TypeAlias

from fedlora.core.errors import FedLoRAError, ResourceError
from fedlora.core.events import Event, Report
from fedlora.core.plan import Plan
from fedlora.core.tables.lab import SweepRun
from fedlora.core.tables.simulation import is_toy, made_beside
from fedlora.lab.claims import Options
from fedlora.lab.own_rules import own_errors, use_rules
from fedlora.lab.progress.pulse import Pulse
from fedlora.lab.simulate import simulate
from fedlora.processes.parent import die_with_parent

Unit: TypeAlias = tuple[str, Plan, Path, int]
"""Name, plan, directory, seed."""


class Told(Protocol):
    """A queue between processes: name, seed, what goes on; None ends it."""

    def put(self, said: tuple[str, int, str] | None, /) -> None: ...
    def get(self) -> tuple[str, int, str] | None: ...


@dataclass(frozen=True, slots=True)
class Jobs:
    """How many runs go on at once.

    Attributes:
        count: processes; 1: this one.
        rules: rules of the researcher's own that each process has to know.
    """

    count: int = 1
    rules: tuple[str, ...] = ()

    def run(self, units: Sequence[Unit], options: Options) -> dict[str, str]:
        """Runs all; returns why those that failed did, by name.

        Raises:
            ResourceError: a process was killed.
        """
        _make_toys(units)
        report, quiet = options.report, replace(options, report=_silent, resume=True)
        threads, failed = max(1, (os.cpu_count() or 1) // self.count), {}
        context = get_context("spawn")  # a fork of a process that has loaded torch may hang
        told: Told = context.SimpleQueue()
        listener = Thread(target=_listen, args=(told, report, units), daemon=True)
        listener.start()
        others = set(active_children())  # of the notebook or script that calls this
        start = (os.getpid(), threads, self.rules, told)
        with ProcessPoolExecutor(self.count, mp_context=context, initializer=_begin, initargs=start) as pool:
            going: dict[Future[tuple[str, float]], Unit] = {}
            try:
                with _deaf():  # the children for good: their parent ends them
                    going = {pool.submit(_one, unit, quiet): unit for unit in units}
                for done in as_completed(going):
                    name, _, _, seed = unit = going[done]
                    why, seconds = done.result()
                    if why:
                        failed[name] = why
                    state = f"seed {seed} {'failed' if why else 'done'} after {seconds:.0f} s"
                    report(Event.SWEEP_RUN, SweepRun(run=name, number=units.index(unit) + 1, of=len(units), state=state))
            except BrokenProcessPool:
                raise ResourceError(
                    f"one of {self.count} processes was killed", hint="each holds a base in memory: fewer --jobs, then --resume"
                ) from None
            except BaseException:
                for child in set(active_children()) - others:
                    child.kill()  # at once: the round that it is in would take its time, and the next run would begin
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        told.put(None)  # not after a kill: a dead process may hold the queue's lock
        listener.join()
        return failed


@contextmanager
def _deaf() -> Iterator[None]:
    """A Ctrl-C waits until the end of this; processes that begin in it never have one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _silent(event: Event, facts: object) -> None:
    """Nobody listens here: what matters goes to the process that waits."""


def _listen(told: Told, report: Report, units: Sequence[Unit]) -> None:
    """Tells the rounds of all processes, until one says None."""
    numbers = {(name, seed): number for number, (name, _, _, seed) in enumerate(units, 1)}
    while (said := told.get()) is not None:
        name, seed, state = said
        number = numbers[name, seed]
        report(Event.SWEEP_RUN, SweepRun(run=name, number=number, of=len(units), state=f"seed {seed} {state}"))


def _make_toys(units: Sequence[Unit]) -> None:
    """The generated base, before several processes would make it at once."""
    from fedlora.learn.toy import toy_base

    for directory in {made_beside(out) for _, plan, out, _ in units if is_toy(plan.simulation)}:
        toy_base(directory / "base")


_TOLD: Final = frozenset([Event.ARM, Event.READING, Event.ROUND, Event.LOAD, Event.FINAL])
"""Events of a run that the process that waits is told."""
_told: list[Told] = []
"""In a process of a pool: where it tells its rounds."""


def _begin(parent: int, threads: int, rules: tuple[str, ...], told: Told) -> None:
    die_with_parent(signal.SIGKILL, parent=parent)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torch reads it as it is loaded, which comes later
    use_rules(rules)
    _told.append(told)


def _one(unit: Unit, options: Options) -> tuple[str, float]:
    """Runs a unit; returns why it failed, or nothing, and how many seconds it took without the wait for a process."""
    from fedlora.learn.simulated.rows import CUT

    began, (name, plan, out, seed) = time.monotonic(), unit

    def say(text: str) -> None:
        _told[0].put((name, seed, text))

    def listen(event: Event, facts: Mapping[str, Any]) -> None:
        pulse.heard(event, facts, shown=event in _TOLD)
        if event == Event.ARM:
            say(f"arm {facts['name']}")
        elif event == Event.READING:
            say(f"reading the rows of {facts['what']}")
        elif event == Event.DATA and facts["file"] == CUT:
            say(f"max_length: {', '.join(facts['lines'])}")
        elif event == Event.ROUND and facts["record"].kind == "train":
            say(f"round {facts['record'].round} of {plan.federation.num_rounds}")
        elif event in (Event.LOAD, Event.FINAL):
            say(f"loading {facts['model']}" if event == Event.LOAD else "last evaluation done")

    say("begins")
    pulse = Pulse(say)
    try:
        with own_errors():
            simulate(plan, out=out, seeds=[seed], **replace(options, report=listen).keywords())
    except FedLoRAError as e:
        return f"{e}" + f" ({e.hint})" * bool(e.hint), time.monotonic() - began
    finally:
        pulse.close()
    return "", time.monotonic() - began
