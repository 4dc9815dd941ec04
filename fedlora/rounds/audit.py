"""Holds a server's log against what lies in its directory: keys, each run's records, and the adapter that each ended with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedlora.core.errors import FedLoRAError
from fedlora.formats.state.audit import Line, log_file, read
from fedlora.formats.state.damage import Finding
from fedlora.formats.state.lock import holder
from fedlora.rounds.repair import ServerRepair
from fedlora.rounds.store import RunStore

NO_FACTS: Final[Mapping[str, object]] = {"id": "", "plan": "", "rounds": 0, "adapter": ""}
"""What :func:`run_facts` says of a run of which nothing can be read."""
_KEEP: Final = "treat this as an incident: keep the files, and ask who has worked at this host"


def run_facts(directory: Path) -> Mapping[str, object]:
    """What is written down of a run at its end: run id, plan digest, rounds that are done, digest of the last adapter.

    What cannot be read is an empty text.
    """
    try:
        store = RunStore.open(directory)
    except (FedLoRAError, OSError):
        return NO_FACTS
    facts: dict[str, object] = {"id": store.run, "plan": store.plan.digest()}
    try:
        last = store.load()
    except (FedLoRAError, OSError):
        return {**NO_FACTS, **facts}
    return {**facts, "rounds": last.round, "adapter": last.adapter.digest()}


def verify(home: Path) -> tuple[Sequence[Line], list[Finding]]:
    """The lines of the log, and what is wrong with it, or with the runs and keys that it tells of. Changes nothing.

    Raises:
        KeyFileError: ``server.pub`` is missing or damaged.
    """
    lines, wrong = read(home)
    found = [Finding(str(log_file(home)), what, [_KEEP]) for what in wrong]
    found += ServerRepair(home).look()
    there = sorted(p.name for p in (home / "runs").glob("*") if p.is_dir())
    last, up = _last(lines), holder(home / "flower") is not None
    for name in there:
        if up and name in last and last[name].what == "start":
            said = f"run {name} goes on: its records were not looked at"
            found.append(Finding(str(home / "runs" / name), said, wrong=False))
        else:
            found += ServerRepair(home, name).of_run()
    return lines, [*found, *_compared(home, last, there)]


def _last(lines: Sequence[Line]) -> dict[str, Line]:
    """Name of a run -> the last line that says what became of it."""
    last: dict[str, Line] = {}
    for line in lines:
        if line.what in ("start", "ended", "restore", "repair"):
            names = line.facts["open"] if line.what == "restore" else [line.facts["run"]]
            last |= {str(name): line for name in names}
    return last


def _compared(home: Path, last: Mapping[str, Line], there: Sequence[str]) -> Iterator[Finding]:
    """Runs that are not as the log has them."""
    for name in there:
        file = str(home / "runs" / name)
        if name not in last:
            yield Finding(file, f"{file} is not in the log: nobody has started a run {name} here", [_KEEP])
            continue
        line = last[name]
        if line.what == "ended" and line.facts["adapter"]:
            now = run_facts(home / "runs" / name)
            if (now["id"], now["rounds"], now["adapter"]) != tuple(line.facts[k] for k in ("id", "rounds", "adapter")):
                what = f"{file} does not hold the adapter that its run ended with, after {line.facts['rounds']} rounds (line "
                yield Finding(file, f"{what}{line.number})", [_KEEP])
    for name in sorted(last.keys() - set(there)):
        if last[name].what == "ended" and last[name].facts["adapter"]:
            file = str(home / "runs" / name)
            yield Finding(file, f"the directory of run {name} is gone; it ended in line {last[name].number}", wrong=False)
