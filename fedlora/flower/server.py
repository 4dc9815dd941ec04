"""``fedlora server up`` and ``start``: the processes of the server, the check of its public port, and runs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

from fedlora.core.errors import ConfigError, ConnectionFailed, FedLoRAError, KeyFileError, RunFailed
from fedlora.core.events import Event, Report
from fedlora.core.facts import AnotherRun, Listening, Process, SiteName, SiteRefused
from fedlora.flower import launch
from fedlora.flower._internals import Control, RunState
from fedlora.flower.control import register_sites, start_job
from fedlora.flower.database import shrink
from fedlora.flower.environment import join_flower
from fedlora.flower.jobs import (
    Address,
    Job,
    full,
    going_on,
    load_address,
    load_job,
    load_outcome,
    new_job,
    pass_on,
    save_address,
)
from fedlora.flower.records import safe_code
from fedlora.formats.plans import load_plan
from fedlora.formats.state.lock import hold
from fedlora.gateway.addresses import LOOPBACK, split_address
from fedlora.gateway.certificates import certificate_hosts, check_tls, load_node_keys
from fedlora.gateway.doors import Refusal, key_name, parse_refusal
from fedlora.gateway.exposure import check_loopback, check_public, dialled, free_port, healthy
from fedlora.processes.supervisor import Service, Supervisor, signals

_PATIENCE_S = 10.0
_LOOK_S = 1.0
_SECRET_BYTES = 64  # hex digits of 32 random bytes
_OVER_S = 10.0
"""How long Flower may take to learn that a run has ended, seconds."""
_SETTLED_S = 5.0  # a site that corrects its clock is on line long before
_SAID_AGAIN_S = 600.0


def up(
    home: Path,
    *,
    listen: str,
    body_limit_bytes: int,
    report: Report,
    hosts: Sequence[str] = (),
    stop: threading.Event | None = None,
    timeout_s: float = 120.0,
    connections: int = 512,
    executor: Sequence[str] = (),
) -> None:
    """Runs the server until SIGTERM or SIGINT, or until ``stop`` is set. Prints nothing.

    ``report`` gets ``("listening", {"address"})`` only after the public port was probed from outside in: the
    Control and Runtime APIs must answer 404 there.

    Args:
        home: the server's directory, as `fedlora keygen server` made it.
        listen: public host:port of the gateway.
        body_limit_bytes: largest single HTTP body; Flower cuts blobs into chunks of 5 MiB.
        report: gets ``process``, ``listening``, ``site-online`` and ``site-offline``.
        hosts: names and addresses that sites dial; the certificate must cover them.
        stop: set it to stop from another thread.
        timeout_s: for one HTTP call, seconds.
        connections: most connections at a time.
        executor: command line in place of :mod:`fedlora.flower.executor`, given home and port as that one is.

    Raises:
        Held: another server runs in this home; the error says which process.
        ConfigError: a port is taken, or the certificate does not cover a host.
        KeyFileError: a key file is missing or malformed.
        ConnectionFailed: a process does not start, or the server would be open (``exposed``).
    """
    _check_free(listen)
    home = home.resolve()
    load_node_keys(home / "sites")  # a bad file is found before anything starts
    _check_files(home, hosts)
    stop = stop or threading.Event()
    with hold(home / "flower", what="fedlora server up"), signals(stop.set):
        port, heard = free_port(), SimpleQueue[Refusal]()
        gateway = launch.gateway(
            listen,
            superlink_port=port,
            home=home,
            body_limit_bytes=body_limit_bytes,
            timeout_s=timeout_s,
            connections=connections,
        )
        services = _services(home, port, gateway=gateway, public=listen, executor=executor, heard=heard)
        _serve(home, Address(listen, port), services, stop=stop, report=report, heard=heard)


def _serve(
    home: Path,
    address: Address,
    services: list[Service],
    *,
    stop: threading.Event,
    report: Report,
    heard: SimpleQueue[Refusal],
) -> None:
    """Starts the processes, checks that only the gateway is reachable, and watches them until ``stop``; always ends them."""
    shrink(home / "flower" / "state.db", now=time.time)  # an earlier run has ended with its server
    supervisor = Supervisor(services, log_directory=home / "flower" / "log", report=report)
    supervisor.start()
    try:
        check_loopback(address.superlink_port)
        check_public(address.listen, ca=home / "tls" / "ca.crt")
        save_address(home, address)
        sync_sites(home, report=report)
        report(Event.LISTENING, Listening(address=address.listen))
        _watch(home, supervisor, stop=stop, report=report, heard=heard)
    finally:
        (home / "flower" / "server.json").unlink(missing_ok=True)
        supervisor.stop()


def _watch(home: Path, supervisor: Supervisor, *, stop: threading.Event, report: Report, heard: SimpleQueue[Refusal]) -> None:
    """Keeps processes running, and the SuperLink's list of nodes equal to ``home/sites``."""
    online: set[str] = set()
    refused: set[str] = set()
    refusals = Refusals(report)

    def refuse(site: str, error: FedLoRAError) -> None:
        if site not in refused:
            report(Event.SITE_REFUSED, _removed(site, error))
        refused.add(site)

    while not stop.wait(_LOOK_S):
        supervisor.check(time.monotonic())
        with suppress(FedLoRAError), _control(home, patience_s=0.0) as control:
            keys = load_node_keys(home / "sites")
            ids = register_sites(control, keys, refused=refuse)
            status = {n.id: n.status for n in control.nodes()}
            now = {site for site, node_id in ids.items() if status.get(node_id) == "online"}
            for site in sorted(now - online):
                report(Event.SITE_ONLINE, SiteName(site=site))
            for site in sorted(online - now):
                report(Event.SITE_OFFLINE, SiteName(site=site))
            online = now
            while not heard.empty():
                refusals.add(heard.get(), {key_name(pem): site for site, pem in keys.items()}, time.monotonic())
            refusals.say(online, time.monotonic())


class Refusals:
    """Reports enrolled sites that the gateway refuses, with the reason: each once, and again after ten minutes.

    Args:
        report: gets the event ``site-refused`` with ``site``, ``why`` and ``cause``.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._open: dict[tuple[str, str], tuple[float, Refusal]] = {}
        self._said: dict[tuple[str, str], float] = {}

    def add(self, refusal: Refusal, names: Mapping[str, str], now: float) -> None:
        """Takes a line of the gateway. ``names``: site by :func:`fedlora.gateway.doors.key_name`; strangers are left out."""
        if (site := names.get(refusal.key)) is not None and refusal.why in ("clock", "in-use"):
            self._open.setdefault((site, refusal.why), (now, refusal))

    def say(self, online: Collection[str], now: float) -> None:
        for (site, cause), (since, refusal) in list(self._open.items()):
            if cause == "clock" and site in online:
                del self._open[site, cause]  # it has corrected its stamps
            elif cause != "clock" or now - since > _SETTLED_S:
                del self._open[site, cause]
                if now - self._said.get((site, cause), float("-inf")) > _SAID_AGAIN_S:
                    self._said[site, cause] = now
                    self._report(Event.SITE_REFUSED, SiteRefused(site=site, cause=cause, why=_why(site, refusal)))


def _removed(site: str, error: FedLoRAError) -> SiteRefused:
    why = f"{error}; a key that was removed once needs a new one (`fedlora keygen site`)"
    return SiteRefused(site=site, cause="removed", why=why)


def _why(site: str, refusal: Refusal) -> str:
    if refusal.why == "in-use":
        return (
            f"two machines use the key of {site} (one of them calls from {refusal.peer}), or its process was killed less than "
            "65 s ago; if it goes on, ask the site: every machine needs a key of its own"
        )
    way = "ahead of" if refusal.ahead_s > 0 else "behind"
    return (
        f"its clock is {abs(refusal.ahead_s):.0f} s {way} this server's; the site sets its clock (NTP), or this server's is wrong"
    )


def _services(
    home: Path,
    port: int,
    *,
    gateway: list[str],
    public: str,
    executor: Sequence[str],
    heard: SimpleQueue[Refusal],
) -> list[Service]:
    def on_line(line: str) -> None:
        if refusal := parse_refusal(line):
            heard.put(refusal)

    tls, env = home / "tls", join_flower(home / "flower" / "home")
    relay = launch.superlink(port, tls=tls, database=home / "flower" / "state.db", secret=home / "superexec.secret")
    claims = launch.executor(home, superlink_port=port, command=executor)
    return [
        Service("superlink", relay, env, ready=lambda: healthy((LOOPBACK, port), ca=tls / "ca.crt")),
        Service("executor", claims, env, ready=lambda: True),
        Service("gateway", gateway, env, ready=lambda: healthy(dialled(public), ca=tls / "ca.crt"), on_line=on_line),
    ]


def _check_files(home: Path, hosts: Sequence[str]) -> None:
    for name in ("superexec.secret", "tls/ca.crt", "tls/server.crt", "tls/server.key"):
        if not (home / name).is_file():
            raise KeyFileError(f"{home / name} is missing", hint="create it with `fedlora keygen server`")
    check_tls(home / "tls")
    if len((home / "superexec.secret").read_bytes()) < _SECRET_BYTES:
        hint = "restore it from a backup, or replace it by 32 random bytes: this file never leaves this host"
        raise KeyFileError(f"{home / 'superexec.secret'} is damaged: it is too short", hint=hint)
    missing = sorted(set(hosts) - certificate_hosts(home / "tls" / "server.crt"))
    if missing:
        raise ConfigError(
            f"the server's certificate does not cover {', '.join(missing)}",
            hint="make it again with these hosts (`fedlora keygen server`); the authority stays, so nothing changes at the sites",
        )


def _check_free(listen: str) -> None:
    host, port = split_address(listen)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise ConfigError(f"cannot listen on {listen}: {e.strerror}") from None


@contextmanager
def _control(home: Path, *, patience_s: float = _PATIENCE_S) -> Iterator[Control]:
    join_flower(home / "flower" / "home")
    control = Control(load_address(home).superlink_port, ca=home / "tls" / "ca.crt", patience_s=patience_s)
    try:
        yield control
    finally:
        control.close()


def sync_sites(home: Path, *, report: Report) -> dict[str, str]:
    """Tells a running server about sites that were enrolled or removed since it started.

    A site whose key is refused, because it was removed once, is reported and left out.

    Returns:
        Each enrolled site and ``registered`` (never seen), ``online`` or ``offline``; a dead one shows online for a minute.

    Raises:
        ConnectionFailed: no server runs in this home.
    """
    keys = load_node_keys(home / "sites")
    with _control(home) as control:
        ids = register_sites(control, keys, refused=lambda site, error: report(Event.SITE_REFUSED, _removed(site, error)))
        status = {n.id: n.status for n in control.nodes()}
    return {site: status[node_id] for site, node_id in ids.items()}


def start(home: Path, plan: Path, *, resume: bool, report: Report, poll_s: float = 0.5) -> Path:
    """Starts a run on a running server and waits for its end. An interrupt does not stop the run.

    Args:
        home: the server's directory.
        plan: the plan's file.
        resume: continue from the run's last checkpoint.
        report: gets the run's events, and ``("process", {"name": "run ID", "state"})`` for Flower's view of it.
        poll_s: between two looks, seconds.

    Returns:
        The directory of the completed run.

    Raises:
        ConfigError: the plan cannot be read.
        ConnectionFailed: no server runs in this home.
        FedLoRAError: the run failed; code, text, hint and exit status are those of the error that ended it.
    """
    directory = home / "runs" / load_plan(plan).run.name
    sync_sites(home, report=report)
    job = new_job(home, Job(str(plan.resolve()), resume))
    goes_on = f"continue with `fedlora server start {home} {plan} --resume`; nothing is lost"
    try:
        with _control(home) as control:
            state = _followed(control, start_job(control, job), home=home, job=job, report=report, poll_s=poll_s)
    except ConnectionFailed as e:
        outcome = load_outcome(home, job)
        if outcome is None:
            raise full(home) or _gone(home, e, goes_on) from None
        state = None
    else:
        outcome = load_outcome(home, job)
    if outcome is not None and outcome.code:
        raise outcome.error()
    if outcome is None and state is not None and state.outcome == "stopped":
        raise RunFailed("the run was stopped", hint=goes_on, code="stopped")
    if outcome is None and state is not None and state.outcome != "completed":
        hint = f"see flower/log/executor.log; {goes_on}"
        raise full(home) or RunFailed(f"the run ended as {state.outcome}: {safe_code(state.error)}", hint=hint)
    return directory


def _followed(control: Control, run_id: int, *, home: Path, job: str, report: Report, poll_s: float) -> RunState | None:
    """Passes on a run's events until it has ended; None if its outcome is recorded but Flower does not know it."""
    said, offset, waits, over_s = "", 0, False, 0.0
    while True:
        state = control.run_state(run_id)
        offset = pass_on(home, job, report, offset=offset)
        if state.status != said:
            said = state.status
            report(Event.PROCESS, Process(name=f"run {run_id}", state=said))
        if said == "finished":
            return state
        if not waits and (other := going_on(home)) not in ("", job):
            waits = True
            report(Event.ANOTHER_RUN, AnotherRun(name=_name_of(home, other)))
        if load_outcome(home, job) is not None:
            over_s += poll_s
            if over_s > _OVER_S:
                return None
        time.sleep(poll_s)


def _name_of(home: Path, job: str) -> str:
    with suppress(FedLoRAError):
        return load_plan(Path(load_job(home, job).plan)).run.name
    return "its name is not known"


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
