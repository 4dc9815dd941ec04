"""Keeps a few processes running: starts them in order, restarts what dies, stops them in reverse, leaves no orphans."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType

from fedlora.core.errors import ConnectionFailed
from fedlora.core.events import Event, Report
from fedlora.core.facts import Process
from fedlora.processes.causes import telling
from fedlora.processes.parent import die_with_parent

log = logging.getLogger(__name__)

_LOG_BYTES = 8 << 20
_LOG_FILES = 4
_POLL_S = 0.1
_STEADY_S = 60.0  # one that ran for so long begins with the shortest pause again
_LONGEST_PAUSE_S = 60.0
_LAST_LINES = 40


@dataclass(frozen=True, slots=True)
class Service:
    """One process to keep running.

    Attributes:
        name: for events and for the log file.
        argv: command line.
        env: whole environment.
        ready: True once it does its work; called every tenth of a second.
        ready_s: how long it may take to get there, seconds; 0: nobody waits for it, and nothing is said of it.
        after_exit_s: pause before a restart when it ended with status 0, seconds; doubled each time it ends soon, up to a minute.
        after_crash_s: pause before a restart when it did not, seconds; the same.
        death_signal: what it is sent when this process dies without a chance to stop it.
        before: called before each start, in the thread that starts it.
        on_line: gets each line that it prints, in a thread of its own.
        explain: says, from its status and its last lines, why it ended, and the pause before a restart, seconds.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    ready: Callable[[], bool]
    ready_s: float = 30.0
    after_exit_s: float = 1.0
    after_crash_s: float = 2.0
    death_signal: int = signal.SIGKILL
    before: Callable[[], None] = lambda: None
    on_line: Callable[[str], None] = lambda line: None
    explain: Callable[[int, list[str]], tuple[str, float]] | None = None


@dataclass(slots=True)
class _Running:
    service: Service
    process: subprocess.Popen[bytes] | None = None
    pump: threading.Thread | None = None
    restart_at: float | None = None
    seen_ready: bool = field(default=False)
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    began: float = 0.0
    early_ends: int = 0
    said_end: str = ""


class Supervisor:
    """Runs services. Not thread-safe; start() must be called from a thread that lives as long as the processes.

    Args:
        services: in the order in which they need each other.
        log_directory: gets one rotating ``NAME.log`` each, 0600.
        report: told ``("process", {"name", "state"})`` at each change, in the thread that calls start, watch or stop.
        stop_s: how long a process may take to end before it is killed, seconds.
    """

    def __init__(self, services: Sequence[Service], *, log_directory: Path, report: Report, stop_s: float = 10.0) -> None:
        self._running = [_Running(s) for s in services]
        self._log_directory = log_directory
        self._report = report
        self._stop_s = stop_s

    def start(self) -> None:
        """Starts all, each when the one before it is ready.

        Raises:
            ConnectionFailed: one ended or was not ready in time; the others are stopped again.
        """
        for running in self._running:
            try:
                self._spawn(running, time.monotonic())
                if running.service.ready_s:
                    self._wait_ready(running)
            except BaseException:
                self.stop()
                raise

    def watch(self, stop: threading.Event) -> None:
        """Restarts what dies until ``stop`` is set. Never gives up: what is wrong may be mended from outside."""
        while not stop.wait(_POLL_S):
            self.check(time.monotonic())

    def check(self, now: float) -> None:
        """One look at every process. ``now`` is the monotonic clock, seconds."""
        for running in self._running:
            if running.process is None:
                if running.restart_at is not None and now >= running.restart_at:
                    self._spawn(running, now)
            elif (status := running.process.poll()) is not None:
                self._bury(running)
                self._plan_restart(running, status, now)
            elif not running.seen_ready and running.service.ready():
                self._see_ready(running)

    def restart(self, name: str) -> None:
        """Stops a process in order and starts it again at the next check."""
        for running in self._running:
            if running.service.name == name and running.process is not None:
                self._end(running)
                running.restart_at = float("-inf")

    def rest(self, name: str) -> None:
        """Stops a process in order; it stays away until :meth:`wake`."""
        for running in self._running:
            if running.service.name == name:
                self._end(running)
                running.restart_at, running.said_end = None, ""

    def wake(self, name: str) -> None:
        """One that rests is started at the next check."""
        for running in self._running:
            if running.service.name == name and running.process is None:
                running.restart_at = float("-inf")

    def hurry(self, name: str) -> None:
        """One that waits for its restart is started at the next check."""
        for running in self._running:
            if running.service.name == name and running.restart_at is not None:
                running.restart_at = float("-inf")

    def _plan_restart(self, running: _Running, status: int, now: float) -> None:
        """Says why it ended, once for each reason in a row, and when it starts again."""
        service, lines = running.service, list(running.lines)
        running.early_ends = 0 if now - running.began > _STEADY_S else running.early_ends
        if service.explain is not None:
            why, pause = service.explain(status, lines)
        else:
            shortest = service.after_crash_s if status else service.after_exit_s
            why = telling(lines, errors_only=not running.early_ends)
            pause = max(shortest, min(shortest * 2.0**running.early_ends, _LONGEST_PAUSE_S))
        running.early_ends += 1
        running.restart_at = now + pause
        if not running.said_end or running.said_end != why:
            because = f" ({why})" if why else ""
            self._say(service.name, f"ended with status {status}{because}, starts again in {pause:g} s")
        running.said_end = why

    def _see_ready(self, running: _Running) -> None:
        running.seen_ready = True
        if running.service.ready_s:
            self._say(running.service.name, "ready")

    def stop(self) -> None:
        """Ends all in reverse order: asks, waits, kills; whole process groups, so that no grandchild stays."""
        for running in reversed(self._running):
            process = running.process
            running.restart_at = None
            if process is None:
                continue
            self._say(running.service.name, "stopping")
            self._end(running)
            self._say(running.service.name, "stopped")

    def _end(self, running: _Running) -> None:
        if (process := running.process) is None:
            return
        end_with(process, signal.SIGTERM)
        try:
            process.wait(self._stop_s)
        except subprocess.TimeoutExpired:
            self._say(running.service.name, f"killed: did not stop within {self._stop_s:g} s")
        self._bury(running)

    def pids(self) -> dict[str, int]:
        """Process ids of what runs now, by name."""
        return {r.service.name: r.process.pid for r in self._running if r.process is not None}

    def _say(self, name: str, state: str) -> None:
        self._report(Event.PROCESS, Process(name=name, state=state))

    def _spawn(self, running: _Running, now: float) -> None:
        service = running.service
        service.before()
        if not running.said_end:
            self._say(service.name, "starting")
        running.lines.clear()
        running.began = now
        parent = os.getpid()
        running.process = subprocess.Popen(  # noqa: S603  argv is ours, without a shell
            list(service.argv),
            env=dict(service.env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal reaches us only; we stop the others in order
            preexec_fn=lambda: die_with_parent(service.death_signal, parent=parent),
        )
        log, lines = self._log_directory / f"{service.name}.log", running.lines

        def on_line(line: str) -> None:
            lines.append(line)
            service.on_line(line)

        running.pump = threading.Thread(target=_pump, args=(running.process, log, on_line), daemon=True)
        running.pump.start()
        running.restart_at = None
        running.seen_ready = False

    def _wait_ready(self, running: _Running) -> None:
        service, process = running.service, running.process
        end = time.monotonic() + service.ready_s
        log = self._log_directory / f"{service.name}.log"
        while process is not None:
            if process.poll() is not None:
                self._bury(running)  # its last lines are here then
                why = telling(list(running.lines))
                raise ConnectionFailed(
                    f"{service.name} ended with status {process.returncode} while starting" + (f": {why}" if why else ""),
                    hint=f"see {log}",
                )
            if service.ready():
                self._see_ready(running)
                return
            if time.monotonic() >= end:
                raise ConnectionFailed(f"{service.name} was not ready within {service.ready_s:g} s", hint=f"see {log}")
            time.sleep(_POLL_S)

    def _bury(self, running: _Running) -> None:
        if running.process is not None:
            end_with(running.process, signal.SIGKILL)
            running.process.wait()
        if running.pump is not None:
            running.pump.join(timeout=2)
        running.process = running.pump = None


def end_with(process: subprocess.Popen[bytes], signum: int) -> None:
    """Signals a process's whole group, whatever is left of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)


class _Private(RotatingFileHandler):
    """Every file that it opens, the ones after a rotation too, is readable by its owner only."""

    def _open(self) -> TextIOWrapper:
        file = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(file, 0o600)  # one that was there before, too
        return open(file, self.mode, encoding=self.encoding, errors=self.errors)  # type: ignore[return-value]

    def handleError(self, record: logging.LogRecord) -> None:
        """A line that cannot be written, on a full disk, is dropped without a traceback on the operator's screen."""


def rotating_log(path: Path) -> RotatingFileHandler:
    """A log file of at most 8 MiB and three old ones, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = _Private(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES - 1, encoding="utf-8", errors="replace")
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


def _pump(process: subprocess.Popen[bytes], path: Path, on_line: Callable[[str], None]) -> None:
    handler = rotating_log(path)
    try:
        while process.stdout is not None and (line := process.stdout.readline(4096)):
            text = line.decode(errors="replace").rstrip()
            handler.emit(logging.LogRecord(path.stem, logging.INFO, "", 0, text, None, None))
            try:
                on_line(text)
            except Exception:  # a pipe that nobody reads would stop the process at the other end
                log.exception("a line of %s", path.name)
    finally:
        handler.close()


@contextlib.contextmanager
def signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """Calls ``on_signal`` on SIGTERM and SIGINT while inside. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        on_signal()

    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
