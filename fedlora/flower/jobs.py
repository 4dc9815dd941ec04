"""What the server's processes tell each other through files under HOME/flower: where it listens, what to run, how it ended."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.core.codes import is_code
from fedlora.core.errors import ConnectionFailed, FedLoRAError, ResourceError, RunFailed, StoreError
from fedlora.core.events import Event, Report, dump_facts_of, parse_event
from fedlora.formats.files import dump_record, load_record, parse_record, read_file, save_record, write_atomic

_JOB = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a running server is: its public address and the SuperLink's loopback port."""

    listen: str
    superlink_port: int


@dataclass(frozen=True, slots=True)
class Job:
    """A run to start: absolute path of the plan, and whether to continue from the last checkpoint.

    Attributes:
        name: the plan's ``run.name``; empty in the file of an earlier version.
        digest: plan digest when the job was made; the file may have been changed since.
        made: seconds since 1970.
    """

    plan: str
    resume: bool
    name: str = ""
    digest: str = ""
    made: float = 0.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What a coordinator has asked of a run that goes on: it is granted between two rounds."""

    pause: bool = False
    stop: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. An empty code is success. The text stays on this host."""

    code: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: FedLoRAError) -> Outcome:
        return cls(error.code, str(error), error.hint)

    def error(self) -> FedLoRAError:
        """The error, rebuilt in the process that waits for the job: same code, text, hint and exit status."""
        return RunFailed(self.message, hint=self.hint, code=self.code if is_code(self.code) else "error")


_RESERVED_BYTES = 4096
_FULL_BYTES = 1 << 20


def full(home: Path) -> ResourceError | None:
    """The error to report if the disk of ``HOME/flower`` is full; Flower itself then answers with status 500 or not at all."""
    disk = os.statvfs(home / "flower")
    if disk.f_bavail * disk.f_frsize >= _FULL_BYTES:
        return None
    hint = "free some disk space, then continue with `fedlora server start HOME PLAN --resume`; nothing is lost"
    return ResourceError(f"no space left for {home / 'flower'}, the relay's database and logs", hint=hint)


def save_address(home: Path, address: Address) -> None:
    """Writes the address of the running server."""
    save_record(home / "flower" / "server.json", "server", asdict(address))


def load_address(home: Path) -> Address:
    """Reads the address of the running server.

    Raises:
        ConnectionFailed: none runs in this home.
        StoreError: its file is damaged.
    """
    path, hint = home / "flower" / "server.json", "stop `fedlora server up` and start it again: it writes a new file"
    found = load_record(path, "server", hint=hint)
    if found is None:
        raise ConnectionFailed(f"no server runs in {home}", hint="start it with `fedlora server up`")
    return Address(**found)


def new_job(home: Path, job: Job) -> str:
    """Writes a job and returns its name: 32 random hex digits, so that nobody else on this host can start it.

    Room for its outcome is reserved now, so that it can be written even if the disk is full by then.
    """
    name = secrets.token_hex(16)
    save_record(_path(home, name, "job"), "job", asdict(job))
    write_atomic(_path(home, name, "outcome"), b" " * _RESERVED_BYTES)
    return name


def load_job(home: Path, name: object) -> Job:
    """Reads a job.

    Raises:
        StoreError: no such job was written by :func:`new_job`, or its file is damaged.
    """
    hint = "start the run again with `fedlora server start`: it writes a new job"
    path = _path(home, name, "job") if isinstance(name, str) and _JOB.fullmatch(name) else None
    found = load_record(path, "job", hint=hint) if path is not None else None
    if found is None:
        raise StoreError("the run names no job of this server", hint="start runs with `fedlora server start`")
    return Job(**found)


def save_outcome(home: Path, name: str, outcome: Outcome) -> None:
    """Writes how a job ended; on a full disk, into the reserved room."""
    path = _path(home, name, "outcome")
    try:
        save_record(path, "outcome", asdict(outcome))
    except ResourceError:
        short = replace(outcome, message=outcome.message[:1000], hint=outcome.hint[:1000])
        blob = dump_record("outcome", asdict(short))
        if len(blob) > _RESERVED_BYTES or not path.is_file():
            raise
        with path.open("r+b") as file:
            file.write(blob.ljust(_RESERVED_BYTES))
            file.flush()
            os.fsync(file.fileno())


def load_outcome(home: Path, name: str) -> Outcome | None:
    """How a job ended; None if that was not recorded, or the record is damaged."""
    path = _path(home, name, "outcome")
    with suppress(StoreError):
        blob = (read_file(path) or b"").strip()
        return Outcome(**parse_record(blob, "outcome", path)) if blob else None
    return None


def over(home: Path, name: str) -> bool:
    """Whether something was written about how a job ended, even if it is damaged."""
    with suppress(StoreError):
        return bool((read_file(_path(home, name, "outcome")) or b"").strip())
    return True


def jobs(home: Path) -> dict[str, Job]:
    """All jobs whose files are whole, the oldest first."""
    found = {}
    for path in (home / "flower" / "jobs").glob("*.job.json"):
        name = path.name.partition(".")[0]
        with suppress(FedLoRAError, TypeError):  # one of another version
            found[name] = load_job(home, name)
    return dict(sorted(found.items(), key=lambda pair: pair[1].made))


def save_run_id(home: Path, name: str, run_id: int) -> None:
    """Writes as which run Flower knows a job."""
    save_record(_path(home, name, "run"), "run-id", {"run_id": str(run_id)})


def load_run_id(home: Path, name: str) -> int | None:
    """As which run Flower knows a job; None before that is known, or if the file is damaged."""
    with suppress(StoreError, ValueError, KeyError):
        found = load_record(_path(home, name, "run"), "run-id")
        return int(found["run_id"]) if found is not None else None
    return None


def save_wish(home: Path, name: str, wish: Wish) -> None:
    """Writes what is asked of a job."""
    save_record(_path(home, name, "wish"), "wish", asdict(wish))


def load_wish(home: Path, name: str) -> Wish:
    """What is asked of a job; nothing if the file is damaged."""
    with suppress(StoreError, TypeError):
        return Wish(**(load_record(_path(home, name, "wish"), "wish") or {}))
    return Wish()


class Events:
    """Appends a job's events as lines of JSON, each with its time (seconds since 1970), for processes that follow the job.

    An event that cannot be written is dropped: events are only displayed, and a run must not fail for them.
    """

    def __init__(self, home: Path, name: str) -> None:
        self._path = _path(home, name, "events")
        self._torn = False

    def __call__(self, event: Event, facts: Mapping[str, Any]) -> None:
        entry = {"event": event, "facts": dump_facts_of(event, facts), "at": time.time()}
        line = ("\n" if self._torn else "") + json.dumps(entry) + "\n"
        try:
            with open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
                file.write(line)
            self._torn = False
        except OSError:
            self._torn = True


def pass_on(home: Path, name: str, report: Report, *, offset: int) -> int:
    """Reports a job's events from byte ``offset`` of their file on; returns the offset after the last complete line."""
    entries, offset = read_events(home, name, offset=offset)
    for _, event, facts in entries:
        report(event, facts)
    return offset


def read_events(home: Path, name: str, *, offset: int) -> tuple[list[tuple[float, Event, Mapping[str, Any]]], int]:
    """A job's events from byte ``offset`` of their file on, each with its time (seconds since 1970; 0: not known), and the offset
    after the last complete line."""
    try:
        with _path(home, name, "events").open("rb") as file:
            file.seek(offset)
            lines = file.read()
    except OSError:
        return [], offset
    whole = lines[: lines.rfind(b"\n") + 1]
    entries = []
    for line in whole.splitlines():
        with suppress(ValueError, KeyError, TypeError):  # torn or damaged: one line less on the screen
            entry = json.loads(line)
            entries.append((float(entry.get("at", 0.0)), *parse_event(entry["event"], json.dumps(entry["facts"]))))
    return entries, offset + len(whole)


@contextmanager
def only_run(home: Path, job: str) -> Iterator[None]:
    """Marks this job as the running one, for :func:`going_on`; the mark is a lock, which is released if the process dies."""
    with (home / "flower" / "run.lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(OSError):  # a full disk: then the name is not known
            file.truncate(0)
            file.write(job)
            file.flush()
        yield


def going_on(home: Path) -> str:
    """The job that runs now; empty if there is none, ``?`` if its name is not known."""
    try:
        with (home / "flower" / "run.lock").open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "?"
    except OSError:
        return ""
    return ""


def _path(home: Path, name: str, kind: str) -> Path:
    if not _JOB.fullmatch(name):
        raise StoreError("not the name of a job", hint="start runs with `fedlora server start`")
    return home / "flower" / "jobs" / f"{name}.{kind}.json"
