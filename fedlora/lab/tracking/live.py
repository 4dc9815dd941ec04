"""Writes for a tracker what a run's records hold, as they come. Events say when to look; values are read from the records."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedlora.core.errors import FedLoRAError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Process
from fedlora.core.records import ArmRecord, Record, RoundRecord
from fedlora.formats.files import read_file
from fedlora.formats.records import parse_text
from fedlora.lab.tracking.trackers import TRACKERS, Tracker
from fedlora.rounds.store import RunStore

log = logging.getLogger(__name__)

_WHEN: Final = (Event.ROUND, Event.ROUND_VOID, Event.FINAL, Event.ARM, Event.ARM_DONE)
_NOT_MEASURED: Final = ("format", "round", "attempt")


@contextmanager
def tracked(name: str, directory: Path, run: Path, report: Report) -> Iterator[Report]:
    """Has a tracker follow a run for as long as this lasts; what is given must get the run's events.

    ``directory/tracking/NAME`` is made anew, with everything that the records hold so far. An error of the tracker ends the
    tracker, and is told; it never ends the run.

    Args:
        name: a key of TRACKERS; empty: no tracker, and ``report`` as it is.
        directory: of a simulation's seed, or of a server's run; need not exist.
        run: where the rounds are recorded; need not exist.
    """
    if not name:
        yield report
        return
    shadow = _Shadow(name, directory, run, report)
    try:
        shadow.update()
        yield shadow.listen
        shadow.update()
    finally:
        shadow.close()


def points_of(record: Record) -> dict[str, float]:
    """Every number of a record by its place in it, such as ``together/metrics/eval/nll``; yes is 1, and no 0."""
    found: dict[str, float] = {}
    _walk(record.model_dump(exclude={*_NOT_MEASURED}), "", found)
    return found


def _walk(value: Any, at: str, found: dict[str, float]) -> None:
    if isinstance(value, Mapping):
        for key, below in value.items():
            _walk(below, f"{at}/{key}" if at else str(key), found)
    elif isinstance(value, bool | int | float):
        found[at] = float(value)


@dataclass(slots=True, eq=False)
class _Shadow:
    name: str
    directory: Path
    run: Path
    report: Report
    _tracker: Tracker | None = field(default=None, init=False)
    _done: set[tuple[str, int]] = field(default_factory=set, init=False)
    _failed: bool = field(default=False, init=False)

    def listen(self, event: Event, facts: Mapping[str, Any]) -> None:
        report = self.report
        report(event, facts)
        if event in _WHEN:
            self.update()

    def update(self) -> None:
        """Writes what the records hold and this tracker does not."""

        def write() -> None:
            for key, step, record in _recorded(self.directory, self.run):
                if (key, step) not in self._done:
                    self._done.add((key, step))
                    prefix = f"{key}/" if key else ""
                    self._opened().write(step, {prefix + tag: value for tag, value in points_of(record).items()})

        self._guarded(write)

    def close(self) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._guarded(tracker.close)

    def _opened(self) -> Tracker:
        if self._tracker is None:
            where = self.directory / "tracking" / self.name
            shutil.rmtree(where, ignore_errors=True)
            where.mkdir(parents=True)
            os.chmod(where, 0o700)
            self._tracker = TRACKERS[self.name][1](where, self.directory.name)
        return self._tracker

    def _guarded(self, do: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            do()
        except Exception as e:  # whatever a library of curves makes of a full disk: the run is worth more
            self._failed = True
            log.warning("%s: %s", self.name, e)
            said = f"stopped ({type(e).__name__}); the run goes on, and its records are whole"
            self.report(Event.PROCESS, Process(name=f"tracker {self.name}", state=said))


def _recorded(directory: Path, run: Path) -> Iterator[tuple[str, int, Record]]:
    """Arms of a simulation, then rounds, in their order: (what its tags begin with, step, record)."""
    for file in sorted((directory / "arms").glob("*.json"), key=lambda p: p.stat().st_mtime):
        if (blob := read_file(file)) is not None:
            yield f"arms/{file.stem}", 0, parse_text(ArmRecord, blob, where=str(file), hint="delete it")
    if not RunStore.holds(run):
        return
    with suppress(FedLoRAError):  # a run that is about to begin
        store = RunStore.open(run)
        rounds: list[RoundRecord] = [r for r in store.records() if r.outcome is not None]
        final = store.final()
        yield from (("", r.round, r) for r in (*rounds, *([final] if final is not None else [])))
