"""``fedlora site up``: the SuperNode as a child, the runner in this process, so that the base model is loaded once."""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.core.errors import FedLoRAError, PlanRefused
from fedlora.core.events import Event, Report
from fedlora.core.facts import Died, Process
from fedlora.core.messages import Reply, Request
from fedlora.core.sites.facts import Paused
from fedlora.doctor import files
from fedlora.doctor.examine import at_home, settle
from fedlora.doctor.findings import Found
from fedlora.doctor.port import await_port
from fedlora.flower import launch
from fedlora.flower.environment import join_flower
from fedlora.flower.owed import Owed
from fedlora.flower.runner import Handle, Runner
from fedlora.flower.status import StatusTracker
from fedlora.flower.supernode import GOING, say_goodbye
from fedlora.formats.files import write_atomic
from fedlora.formats.state.lock import hold
from fedlora.formats.state.memory import FileMemory
from fedlora.formats.state.outbox import NAME, Outbox
from fedlora.gateway.addresses import split_address
from fedlora.gateway.certificates import node_key_public
from fedlora.gateway.entry.stage import ACCEPTED, accepted_mark, asked_words, note_stage, was_accepted
from fedlora.gateway.probe import probe
from fedlora.processes.causes import CAUSES
from fedlora.processes.death import Cause, Working
from fedlora.processes.monitor import monitored
from fedlora.processes.supervisor import Service, Supervisor, rotating_log, signals
from fedlora.site.health import SiteHealth
from fedlora.site.parts import load_site_key
from fedlora.site.pause import COMES_BACK, Away, away, has_left
from fedlora.site.progress import Progress
from fedlora.site.site_file import SiteFile, load_site_file
from fedlora.site.work import Site

_FAREWELL_S = 2.0
_LOOK_S = 0.1
_CHECK_S = 30.0
_LONGEST_PROBE_S = 60.0
_CLOCK_S = 600.0
_NEW_SECRET_S = 10.0
_STATE_S = 5.0
_PAUSE_S = 1.0


def up(
    site_file: Path,
    *,
    report: Report,
    handle: Handle | None = None,
    stop: threading.Event | None = None,
    probe_s: float = 5.0,
    monitor: int | None = None,
) -> None:
    """Runs a site until SIGTERM or SIGINT, or until ``stop`` is set. Prints nothing.

    A signal during training ends it at once: the server gets the code ``site-stopped``, the journal keeps finished updates. What
    only somebody here can mend ends it with an error, before anything is connected: see :mod:`fedlora.doctor`. Problems that may
    go away (the server is down, a disk with data is not mounted yet) are reported once and checked again.

    Args:
        site_file: the site's own file; paths in it are relative to it.
        report: gets ``(event, facts)``; for the event ``site`` see :class:`fedlora.flower.status.StatusTracker`.
        handle: answers requests; None: that of :func:`fedlora.assemble.site`, which is made before anything is connected. Only
            then the site is looked at as by the doctor; with another handle, only the keys of the connection.
        stop: set it to stop from another thread.
        monitor: loopback port for ``/healthz``, ``/readyz`` and ``/metrics``; None: none; 0: any free one.
        probe_s: shortest time between two probes of an unreachable server, and the time limit of each step of a probe, seconds.

    Raises:
        ConfigError: the file is wrong.
        Held: another process uses the state directory; nothing was written there.
        ConfigError (local-port): the loopback port is taken.
        StoreError: the state directory cannot be written.
        FedLoRAError: a finding is wrong; of its code. Or the server is not the one that is pinned (connection).
    """
    file = load_site_file(site_file)
    root = site_file.resolve().parent
    with hold(root / file.state, what="fedlora site up"):
        if has_left(root / file.state):
            raise PlanRefused(
                f"{file.name} has left this federation: `fedlora site leave` was run here",
                hint=COMES_BACK,
                code="sits-out",
            )
        checks: dict[str, Callable[[SiteFile, Path], None]] = {}
        site: Site | None = None
        settle(files.connection_keys(file, root) if handle is not None else at_home(site_file), report)
        pem = node_key_public(root / file.node_key)
        progress = Progress(file.name, file.server, root / file.state, report, _outbox(file, root, handle))
        if handle is None:
            from fedlora import assemble

            checks = {"base": files.check_bases, "data": files.check_data}
            site = assemble.site(site_file, report=progress)
            handle = site.handle
        working = Working(root / file.state / "working")
        if death := working.former():
            report(Event.DIED, Died(doing=death.doing, cause=death.cause, why=_DEATHS[death.cause]))
        port = await_port(file.local_port, secret=root / file.state / "flower" / "superexec.secret")
        file = file.model_copy(update={"local_port": port})
        handle = _noted(progress.handling(handle), working)
        owed = Owed(until=lambda: site.owes_until if site is not None else float("-inf"), delivered=progress.waits)
        health = SiteHealth(file.name, root / file.state)
        with monitored(health.answer, monitor, report):
            _Up(file, root, handle, progress, stop or threading.Event(), checks, pem, probe_s, owed, health).run()


def _outbox(file: SiteFile, root: Path, handle: Handle | None) -> Outbox | None:
    """Of a site whose keys are here; a handle of somebody else's has none."""
    if handle is not None:
        return None
    state = root / file.state
    return Outbox(state / NAME, FileMemory(state / "memory"), load_site_key(file, root))


_DEATHS: Mapping[Cause, str] = {
    "memory": "the kernel has killed a process for lack of memory since then. `fedlora check PLAN.toml --site SITE.toml` says "
    "how much a round takes here",
    "restart": "this machine was restarted. Nothing is lost",
    "killed": "it was killed. Nothing is lost",
}


def _noted(handle: Handle, working: Working) -> Handle:
    def noted(request: Request) -> Reply:
        with working.on(request.phase):
            return handle(request)

    return noted


@dataclass(slots=True)
class _Up:
    """One `site up`: the state that its parts share."""

    file: SiteFile
    root: Path
    handle: Handle
    report: Progress
    stop: threading.Event
    checks: dict[str, Callable[[SiteFile, Path], None]]
    pem: bytes
    probe_s: float
    owed: Owed
    health: SiteHealth
    status: StatusTracker = field(init=False)
    supervisor: Supervisor = field(init=False)
    look_now: threading.Event = field(default_factory=threading.Event)
    found: threading.Event = field(default_factory=threading.Event)
    refused: threading.Event = field(default_factory=threading.Event)
    away: Away | None = None
    owing: bool = False
    """A pause begins once what is owed was delivered."""
    going: str = ""
    """With which word the SuperNode is to sign off; with one it asks for no more messages."""
    password: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    """Shared secret of the SuperNode and the runner; it is in the SuperNode's secret file."""

    def run(self) -> None:
        flower = self.root / self.file.state / "flower"
        secret, log = flower / "superexec.secret", flower / "log"
        self.status = self._status_tracker(flower, secret, log)
        self.supervisor = Supervisor([self._service(flower, secret)], log_directory=log, report=self.report)
        runner = Runner(
            self.file.local_port,
            site=self.file.name,
            secret_file=secret,
            handle=self.owed.handling(self.handle),
            max_bytes=self.file.policy.max_request_bytes,
            on_state=self._on_worker,
        )
        with _log_file(log / "runner.log"):
            self._serve(runner)

    def _status_tracker(self, flower: Path, secret: Path, log: Path) -> StatusTracker:
        host, _ = split_address(self.file.server)
        ca = self.root / self.file.ca
        mark, mine = self.root / self.file.state / ACCEPTED, accepted_mark(self.pem, ca)
        known = was_accepted(self.file, self.root)

        def remember() -> None:
            if not (mark.is_file() and mark.read_text(errors="replace") == mine):
                write_atomic(mark, mine.encode())
                note_stage((self.root / self.file.key).parent, "")

        facts = {"server": self.file.server, "host": host, "port": str(self.file.local_port), "ca": str(ca)}
        facts |= {"site": self.file.name, "words": " ".join(asked_words(self.file, self.root))}
        return StatusTracker(
            self.file.name,
            facts=facts | {"log": str(log / "supernode.log"), "secret": str(secret)},
            report=self.report,
            known=known,
            on_accepted=remember,
            on_lost=self.look_now.set,
        )

    def _service(self, flower: Path, secret: Path) -> Service:
        file, root = self.file, self.root
        return Service(
            name="supernode",
            argv=launch.supernode(
                file.server, port=file.local_port, ca=root / file.ca, node_key=root / file.node_key, secret=secret
            ),
            env=join_flower(flower / "home") | {GOING: str(flower / "going")},
            ready=lambda: False,
            ready_s=0,  # it is ready when the standing says so
            death_signal=signal.SIGTERM,  # it says good-bye, so that the next one is let in at once
            before=lambda: self._before(flower, secret),
            on_line=self._read_line,
            explain=self.status.ended,
        )

    def _before(self, flower: Path, secret: Path) -> None:
        write_atomic(secret, self.password)  # whatever has replaced it
        say_goodbye(flower / "going", "")
        self.going = ""
        self.owed.forget()

    def _read_line(self, line: str) -> None:
        self.status.read_line(line)
        self.owed.read_line(line)

    def _on_worker(self, state: str) -> None:
        if state == "wrong-secret" and not self.supervisor.pids():
            state = "away"  # another program answers on that port: our SuperNode ended, and its log says why
        self.status.worker(state)  # type: ignore[arg-type]
        if state == "wrong-secret":
            self.refused.set()

    def _serve(self, runner: Runner) -> None:
        def on_signal() -> None:
            self.stop.set()
            if runner.working:
                raise KeyboardInterrupt

        self.status.begin()
        self._check()
        self._look_first()
        self._pause()
        if self.away is None:
            self.supervisor.start()
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        threading.Thread(target=self._probe, daemon=True).start()
        with signals(on_signal):
            try:
                runner.run(self.stop)
            except KeyboardInterrupt:
                self.report(Event.PROCESS, Process(name="runner", state="interrupted; the work in progress was given up"))
                self.stop.set()
                threading.Event().wait(_FAREWELL_S)  # the SuperNode passes the last reply on
            self.status.stop()
            watcher.join()
            self._go(self.going or "stopped")
            self.supervisor.stop()

    def _watch(self) -> None:
        """Restarts what ends, and looks for bases and data twice a minute."""
        check_at, secret_at, pause_at = time.monotonic() + _CHECK_S, float("-inf"), 0.0
        while not self.stop.wait(_LOOK_S):
            now = time.monotonic()
            try:
                self.supervisor.check(now)
            except (FedLoRAError, OSError) as e:
                self.status.miss("process", "no-state", detail=str(e))
                self.stop.wait(_STATE_S)
            self.status.tick()
            self.health.note()
            if self.found.is_set():
                self.found.clear()
                self.supervisor.hurry("supernode")
            if self.refused.is_set() and now - secret_at > _NEW_SECRET_S:
                self.refused.clear()
                secret_at, self.password = now, secrets.token_bytes(32)
                self._go("stopped")
                self.supervisor.restart("supernode")
            if now >= check_at:
                check_at = now + _CHECK_S
                self._check()
            if now >= pause_at:
                self._pause()
                pause_at = now + (_LOOK_S if self.owing else _PAUSE_S)

    def _pause(self) -> None:
        """Leaves the server, or comes back, as people here and the hours of the policy say; what is owed is delivered first."""
        state = self.root / self.file.state
        try:
            if has_left(state):
                self._go("left")
                self.stop.set()
                return
            why = away(state, self.file.policy.hours, now=time.time())
        except FedLoRAError as e:  # what people here have said is lost: no task is taken until they say it again
            why = Away(0, f"{e}; {e.hint}")
        self.owing = why is not None and self.away is None and self.owed.owes()
        self._go("" if why is None or (self.owing and self.owed.more()) else "paused")  # then no message is asked for any more
        if why == self.away or self.owing:
            return
        before, self.away = self.away, why
        said = f"paused: {why.why}" if why is not None else "not paused any more"
        self.report(Event.PAUSED, Paused(paused=why is not None, until=why.until if why else 0, said=said))
        self.status.rest(why is not None)
        if why is not None and before is None:
            self.supervisor.rest("supernode")
        elif why is None:
            self.supervisor.wake("supernode")

    def _go(self, word: str) -> None:
        if word != self.going:
            say_goodbye(self.root / self.file.state / "flower" / "going", word)
        self.going = word

    def _check(self) -> None:
        for part, check in self.checks.items():
            try:
                check(self.file, self.root)
            except FedLoRAError as e:
                self.status.miss(part, f"no-{part}", detail=str(e))  # type: ignore[arg-type]
            else:
                self.status.has(part)  # type: ignore[arg-type]

    def _look_first(self) -> None:
        """Looks for the server before anything is started.

        Raises:
            FedLoRAError: it is not reached, for a reason that stays until somebody acts.
        """
        finding = probe(self.file.server, ca=self.root / self.file.ca, timeout_s=self.probe_s)
        if finding.cause and CAUSES[finding.cause].lasts:
            raise Found.caused(finding.cause, finding.facts).error()
        self.status.probed(finding)

    def _probe(self) -> None:
        """Looks for the server at the start and while it is away, and for its clock now and then."""
        ca, wait_s, before = self.root / self.file.ca, 0.0, ""
        while not self.stop.is_set():
            self.look_now.wait(wait_s)
            lost = self.look_now.is_set()
            self.look_now.clear()
            if self.stop.is_set():
                return
            finding = probe(self.file.server, ca=ca, timeout_s=self.probe_s)
            self.status.probed(finding)
            if not finding.cause:
                wait_s = _CLOCK_S if self.status.state in ("ready", "connected") else _LONGEST_PROBE_S
                if before:
                    self.found.set()  # whatever waits for its restart need not
            elif finding.cause != before or lost:
                wait_s = self.probe_s
            else:
                wait_s = min(2 * wait_s, _LONGEST_PROBE_S)
            before = finding.cause


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """What our own code logs, in a file of its own, while inside."""
    handler = rotating_log(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    log = logging.getLogger("fedlora")
    log.addHandler(handler)
    log.setLevel(min(log.level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
