"""What the server's processes tell each other through files under HOME/flower: where it listens, what to run, how it ended."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import ConnectionFailed, FedLoRAError, RunFailed, StoreError
from fedlora.rounds import Report
from fedlora.store import write_atomic

__all__ = [
    "Address",
    "Events",
    "Job",
    "Outcome",
    "load_address",
    "load_job",
    "load_outcome",
    "new_job",
    "pass_on",
    "save_address",
    "save_outcome",
]

_JOB = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a running server is: its public address and the SuperLink's loopback port."""

    listen: str
    superlink_port: int


@dataclass(frozen=True, slots=True)
class Job:
    """A run to be done: absolute path of the plan, and whether to go on from the last checkpoint."""

    plan: str
    resume: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. An empty code is success. The text stays on this host."""

    code: str
    message: str
    hint: str
    exit_status: int

    @classmethod
    def of(cls, error: FedLoRAError) -> Outcome:
        return cls(error.code, str(error), error.hint, error.exit_status)

    def error(self) -> FedLoRAError:
        """The error again, for whoever waits in another process: same code, text, hint and exit status."""
        error = RunFailed(self.message, hint=self.hint)
        error.code, error.exit_status = self.code, self.exit_status
        return error


def _save(path: Path, value: Address | Job | Outcome) -> None:
    write_atomic(path, json.dumps(asdict(value)).encode())


def save_address(home: Path, address: Address) -> None:
    """Writes where the server listens."""
    _save(home / "flower" / "server.json", address)


def load_address(home: Path) -> Address:
    """Where the server listens.

    Raises:
        ConnectionFailed: none was ever started in this home.
    """
    try:
        return Address(**json.loads((home / "flower" / "server.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        raise ConnectionFailed(f"no server runs in {home}", hint="`fedlora server up` starts one") from None


def new_job(home: Path, job: Job) -> str:
    """Writes a job and returns its name: 32 random hex digits, so that nobody else on this host can start it."""
    name = secrets.token_hex(16)
    _save(_path(home, name, "job"), job)
    return name


def load_job(home: Path, name: object) -> Job:
    """Reads a job.

    Raises:
        StoreError: no such job was written by :func:`new_job`.
    """
    try:
        if not isinstance(name, str) or not _JOB.fullmatch(name):
            raise ValueError
        return Job(**json.loads(_path(home, name, "job").read_bytes()))
    except (OSError, ValueError, TypeError):
        raise StoreError("the run names no job of this server", hint="runs are started with `fedlora server start`") from None


def save_outcome(home: Path, name: str, outcome: Outcome) -> None:
    """Writes how a job ended."""
    _save(_path(home, name, "outcome"), outcome)


def load_outcome(home: Path, name: str) -> Outcome | None:
    """How a job ended; None if it did not get to say so."""
    try:
        return Outcome(**json.loads(_path(home, name, "outcome").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


class Events:
    """Appends a job's events as lines of JSON, for whoever follows it from another process."""

    def __init__(self, home: Path, name: str) -> None:
        self._path = _path(home, name, "events")

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        line = json.dumps({"event": event, "facts": facts}, default=str) + "\n"
        with open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
            file.write(line)


def pass_on(home: Path, name: str, report: Report, *, offset: int) -> int:
    """Reports a job's events from byte ``offset`` of their file on; returns the offset behind the last whole line."""
    try:
        with _path(home, name, "events").open("rb") as file:
            file.seek(offset)
            lines = file.read()
    except FileNotFoundError:
        return offset
    whole = lines[: lines.rfind(b"\n") + 1]
    for line in whole.splitlines():
        entry = json.loads(line)
        report(entry["event"], entry["facts"])
    return offset + len(whole)


def _path(home: Path, name: str, kind: str) -> Path:
    if not _JOB.fullmatch(name):
        raise StoreError("not the name of a job", hint="runs are started with `fedlora server start`")
    return home / "flower" / "jobs" / f"{name}.{kind}.json"
