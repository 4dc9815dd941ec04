"""``fedlora server up``: the processes of the server, the check of its public port, and what it says of sites and runs."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue

from fedlora.core.errors import ConfigError, ConnectionFailed, FedLoRAError, KeyFileError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Listening, Process, SiteRefused
from fedlora.core.limits import MAX_SITES
from fedlora.core.sites.facts import SiteAsks
from fedlora.flower import launch
from fedlora.flower._internals import Control
from fedlora.flower.control import opened, register_sites
from fedlora.flower.coordinator.health import Health
from fedlora.flower.coordinator.pages import Pages
from fedlora.flower.coordinator.presence import Presence
from fedlora.flower.coordinator.watch import Runs, Sightings
from fedlora.flower.database import shrink
from fedlora.flower.environment import join_flower
from fedlora.flower.jobs import Address, save_address
from fedlora.formats.state.audit import note, note_changes
from fedlora.formats.state.lock import hold
from fedlora.gateway.addresses import LOOPBACK, split_address
from fedlora.gateway.certificates import certificate_hosts, check_tls, load_node_keys
from fedlora.gateway.connections import open_files
from fedlora.gateway.doors import Notice, key_name, parse_notice
from fedlora.gateway.exposure import check_loopback, check_public, dialled, free_port, healthy
from fedlora.gateway.invitations import Invitations, waiting
from fedlora.processes.files import allow_open_files
from fedlora.processes.monitor import monitored
from fedlora.processes.supervisor import Service, Supervisor, signals
from fedlora.rounds.server import delete_old_keys

_LOOK_S = 1.0
_SECRET_BYTES = 64  # hex digits of 32 random bytes
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
    strangers: int = 256,
    executor: Sequence[str] = (),
    page: bool = False,
    monitor: int | None = None,
) -> None:
    """Runs the server until SIGTERM or SIGINT, or until ``stop`` is set. Prints nothing.

    ``report`` gets ``("listening", {"address"})`` only after the public port was probed from outside in: the
    Control and Runtime APIs must answer 404 there.

    Args:
        home: the server's directory, as `fedlora server init` made it.
        listen: public host:port of the gateway.
        body_limit_bytes: largest single HTTP body; Flower cuts blobs into chunks of 5 MiB.
        report: gets ``process``, ``listening``, ``site-online``, ``site-silent`` and ``site-offline``.
        hosts: names and addresses that sites dial; the certificate must cover them.
        stop: set it to stop from another thread.
        timeout_s: for one HTTP call, seconds.
        strangers: most connections at a time of all callers that are not enrolled; each enrolled site has its own.
        executor: command line in place of :mod:`fedlora.flower.executor`, given home and port as that one is.
        page: write ``runs/NAME/report.html`` again whenever a round is done.
        monitor: loopback port for ``/healthz``, ``/readyz``, ``/metrics`` and the page; None: none; 0: any free one.

    Raises:
        Held: another server runs in this home; the error says which process.
        ConfigError: a port is taken, or the certificate does not cover a host.
        KeyFileError: a key file is missing or malformed.
        ConnectionFailed: a process does not start, or the server would be open (``exposed``).
        NotInstalled: ``page`` needs ``fedlora[report]``.
        ResourceError: this system allows fewer open files than so many sites need.
    """
    _check_free(listen)
    home = home.resolve()
    enrolled = len(load_node_keys(home / "sites"))  # a bad file is found before anything starts
    _check_files(home, hosts)
    _allow_files(enrolled, strangers=strangers)
    stop = stop or threading.Event()
    with hold(home / "flower", what="fedlora server up"), signals(stop.set):
        port, heard = free_port(), SimpleQueue[Notice]()
        gateway = launch.gateway(
            listen, superlink_port=port, home=home, body_limit_bytes=body_limit_bytes, timeout_s=timeout_s, strangers=strangers
        )
        services = _services(home, port, gateway=gateway, public=listen, executor=executor, heard=heard)
        pages = Pages(home, report) if page else None
        health = Health(home, gateway=lambda: healthy(dialled(listen), ca=home / "tls" / "ca.crt"))
        with _logged(home, listen), monitored(health.answer, monitor, report):
            watch = Watch(home, report=report, health=health, pages=pages, heard=heard)
            _serve(home, Address(listen, port), services, stop=stop, report=report, watch=watch)


def _allow_files(enrolled: int, *, strangers: int) -> None:
    """Raises the number of files that may be open to what the most sites need: they are enrolled while the server is up."""
    most = open_files(MAX_SITES, strangers=strangers)
    allow_open_files(open_files(enrolled, strangers=strangers), at_most=most, whose=f"a server of {enrolled} sites")


@contextmanager
def _logged(home: Path, listen: str) -> Iterator[None]:
    """In the server's log: that it is up, what was changed by hand before, and that it is down."""
    note(home, "up", listen=listen, version=version("fedlora"))
    note_changes(home)
    try:
        yield
    finally:
        note(home, "down")


def _serve(
    home: Path,
    address: Address,
    services: list[Service],
    *,
    stop: threading.Event,
    report: Report,
    watch: Watch,
) -> None:
    """Starts the processes, checks that only the gateway is reachable, and watches them until ``stop``; always ends them."""
    delete_old_keys(home / "runs")
    shrink(home / "flower" / "state.db")  # of a server that was killed; if it fails, the executor tries again
    supervisor = Supervisor(services, log_directory=home / "flower" / "log", report=report)
    supervisor.start()
    try:
        check_loopback(address.superlink_port)
        check_public(address.listen, ca=home / "tls" / "ca.crt")
        save_address(home, address)
        sync_sites(home, report=report)
        report(Event.LISTENING, Listening(address=address.listen))
        watch.until(stop, supervisor)
    finally:
        watch.end()
        (home / "flower" / "server.json").unlink(missing_ok=True)
        supervisor.stop()
        watch.note_ends()
        shrink(home / "flower" / "state.db")  # the run that was stopped with the server begins its round anew


class Watch:
    """Keeps processes running, and the SuperLink's list of nodes equal to ``home/sites``; says what becomes of sites and runs.

    Args:
        health: told that somebody looks.
        pages: told which pages are old; None: none is written.
        heard: notices of the gateway.
    """

    def __init__(self, home: Path, *, report: Report, health: Health, pages: Pages | None, heard: SimpleQueue[Notice]) -> None:
        self._home, self._health, self._pages, self._heard = home, health, pages, heard
        self._sightings = Sightings(home)
        self._report = self._sightings.through(report)
        self._runs = Runs(home, report=report, on_round=pages.want if pages is not None else lambda name: None)
        self.note_ends = self._runs.note_ends
        self._presence = Presence(self._report)
        self._refused: set[str] = set()
        self._asking: set[str] = set()
        self._refusals = Refusals(self._report)
        self._keys: dict[str, bytes] = {}
        self._wrong = ""

    def until(self, stop: threading.Event, supervisor: Supervisor) -> None:
        """Looks once a second."""
        while not stop.wait(_LOOK_S):
            supervisor.check(time.monotonic())
            relay, wrong = False, self._read_keys()
            try:
                with opened(self._home, patience_s=0.0) as control:
                    self._look(control, whole=not wrong)
                relay = True
            except ConnectionFailed:
                pass
            except FedLoRAError as e:
                wrong = wrong or str(e)
            self._say(wrong)
            self._health.note(relay=relay, wrong=wrong)
            self._say_who_asks()
            if self._pages is not None:
                self._pages.look()

    def end(self) -> None:
        """Ends what was started here."""
        if self._pages is not None:
            self._pages.stop()

    def _read_keys(self) -> str:
        """Takes the keys of the enrolled sites, of one whose file is damaged that of before; what is wrong, in a sentence."""
        wrong: dict[str, FedLoRAError] = {}
        keys = load_node_keys(self._home / "sites", left_out=wrong.__setitem__)
        self._keys = {site: pem for site, pem in self._keys.items() if site in wrong and pem not in keys.values()} | keys
        return "; ".join(f"{e} ({e.hint})" if e.hint else str(e) for e in wrong.values())

    def _say(self, wrong: str) -> None:
        """Says once what is wrong with the server's own files, and once that it no longer is."""
        if wrong != self._wrong:
            self._report(Event.PROCESS, Process(name="files", state=wrong or "whole again"))
        self._wrong = wrong

    def _refuse(self, site: str, error: FedLoRAError) -> None:
        if site not in self._refused:
            self._report(Event.SITE_REFUSED, _removed(site, error))
        self._refused.add(site)

    def _say_who_asks(self) -> None:
        """Says once of each site that it asks to join."""
        names = waiting(self._home)
        if names - self._asking:
            for one in Invitations(self._home, time.time).asking():
                if one.site in names - self._asking and one.words:
                    said = (
                        f"{one.site} asks to join; words: {' '.join(one.words)}; `fedlora server approve {self._home} {one.site}`"
                    )
                    self._report(Event.SITE_ASKS, SiteAsks(site=one.site, words=list(one.words), said=said))
        self._asking = names

    def _look(self, control: Control, *, whole: bool) -> None:
        keys = self._keys
        notices = [self._heard.get() for _ in range(self._heard.qsize())]  # before it is asked who is there
        ids = register_sites(control, keys, refused=self._refuse, whole=whole)
        nodes = {n.id: n for n in control.nodes()}
        heard = {site: nodes[i].heard for site, i in ids.items() if i in nodes and nodes[i].status == "online"}
        self._presence.note(heard, now=time.time())
        names = {key_name(pem): site for site, pem in keys.items()}
        for notice in notices:
            self._refusals.add(notice, names, time.monotonic())
            self._sightings.note(names.get(notice.key, ""), notice.why)
        self._refusals.say(self._presence.online, time.monotonic())
        self._sightings.tick()
        self._runs.look(control)


class Refusals:
    """Reports enrolled sites that the gateway refuses, with the reason: each once, and again after ten minutes.

    Args:
        report: gets the event ``site-refused`` with ``site``, ``why`` and ``cause``.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._open: dict[tuple[str, str], tuple[float, Notice]] = {}
        self._said: dict[tuple[str, str], float] = {}

    def add(self, refusal: Notice, names: Mapping[str, str], now: float) -> None:
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


def _why(site: str, refusal: Notice) -> str:
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
    heard: SimpleQueue[Notice],
) -> list[Service]:
    def on_line(line: str) -> None:
        if refusal := parse_notice(line):
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
            raise KeyFileError(f"{home / name} is missing", hint="create it with `fedlora server init`")
    check_tls(home / "tls")
    if len((home / "superexec.secret").read_bytes()) < _SECRET_BYTES:
        hint = "restore it from a backup, or replace it by 32 random bytes: this file never leaves this host"
        raise KeyFileError(f"{home / 'superexec.secret'} is damaged: it is too short", hint=hint)
    missing = sorted({*hosts} - {*certificate_hosts(home / "tls" / "server.crt")})
    if missing:
        raise ConfigError(
            f"the server's certificate does not cover {', '.join(missing)}",
            hint="make it again with these hosts (`fedlora server renew`); the authority stays, so nothing changes at the sites",
        )


def _check_free(listen: str) -> None:
    host, port = split_address(listen)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            taken = "another program, or another `fedlora server up`, listens there: stop it, or name another port by --listen"
            hint = taken if e.errno == errno.EADDRINUSE else "name an address of this host, and a port that this user may open"
            raise ConfigError(f"cannot listen on {listen}: {e.strerror}", hint=hint) from None


def sync_sites(home: Path, *, report: Report) -> dict[str, str]:
    """Tells a running server about sites that were enrolled or removed since it started.

    A site whose key is refused, because it was removed once, is reported and left out.

    Returns:
        Each enrolled site and ``registered`` (never seen), ``online`` or ``offline``; a dead one shows online for a minute.

    Raises:
        ConnectionFailed: no server runs in this home.
    """
    keys = load_node_keys(home / "sites")
    with opened(home) as control:
        ids = register_sites(control, keys, refused=lambda site, error: report(Event.SITE_REFUSED, _removed(site, error)))
        status = {n.id: n.status for n in control.nodes()}
    return {site: status[node_id] for site, node_id in ids.items()}
