"""``fedlora site up``: the SuperNode as a child, the runner in this process, so that the base model is loaded once."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from pathlib import Path

from fedlora.config import load_site_file
from fedlora.errors import ConfigError, KeyFileError
from fedlora.flower import launch
from fedlora.flower.enrol import make_secret
from fedlora.flower.environment import join_flower
from fedlora.flower.runner import Handle, Runner
from fedlora.flower.supervisor import Service, Supervisor, rotating_log, signals
from fedlora.rounds import Report

__all__ = ["up"]

_RESTART_S = 65.0
"""A SuperNode that died is online for Flower for 60 s more, and a second one is refused so long (exit code 305)."""
_FAREWELL_S = 2.0


def up(
    site_file: Path,
    *,
    report: Report,
    handle: Handle | None = None,
    stop: threading.Event | None = None,
    restart_s: float = _RESTART_S,
) -> None:
    """Runs a site until SIGTERM or SIGINT, or until ``stop`` is set. Prints nothing.

    A signal during training ends it at once: the server is told ``site-stopped``, the journal keeps what was finished.

    Args:
        site_file: the site's own file; paths in it are relative to it.
        report: told ``(event, facts)``.
        handle: answers requests; that of ``build.open_site`` by default, called before anything is connected.
        stop: set it to stop from another thread.
        restart_s: pause before a SuperNode that died is started again, seconds.

    Raises:
        ConfigError: the file is wrong, or the loopback port is taken.
        KeyFileError: a key or the authority's certificate is missing.
        ConnectionFailed: the SuperNode does not start. A server that is away is waited for instead.
    """
    file = load_site_file(site_file)
    root = site_file.resolve().parent
    state, ca, node_key = root / file.state, root / file.ca, root / file.node_key
    for path in (ca, node_key):
        if not path.is_file():
            raise KeyFileError(
                f"{path} is missing",
                hint="`fedlora keygen site` makes keys; the coordinator sends ca.crt and server.pub: put both beside them",
            )
    if handle is None:
        from fedlora.build import open_site

        handle = open_site(site_file, report=report).handle
    stop = stop or threading.Event()
    flower = state / "flower"
    environment = join_flower(flower / "home")
    secret = _fresh_secret(flower / "superexec.secret")
    port = file.local_port
    _check_free(port)
    service = Service(
        name="supernode",
        argv=launch.supernode(file.server, port=port, ca=ca, node_key=node_key, secret=flower / "superexec.secret"),
        env=environment,
        ready=lambda: _listens(port),
        after_crash_s=restart_s,
        death_signal=signal.SIGTERM,  # it says good-bye, so that the next one is let in at once
    )
    runner = Runner(port, site=file.name, secret=secret, handle=handle, max_bytes=file.policy.max_request_bytes)
    _serve(Supervisor([service], log_directory=flower / "log", report=report), runner, stop, report, flower / "log")


def _serve(supervisor: Supervisor, runner: Runner, stop: threading.Event, report: Report, log_directory: Path) -> None:
    def on_signal() -> None:
        stop.set()
        if runner.working:
            raise KeyboardInterrupt

    handler = rotating_log(log_directory / "runner.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    log = logging.getLogger("fedlora")
    log.addHandler(handler)
    log.setLevel(min(log.level or logging.INFO, logging.INFO))
    try:
        supervisor.start()
        watcher = threading.Thread(target=supervisor.watch, args=(stop,), daemon=True)
        watcher.start()
        with signals(on_signal):
            try:
                runner.run(stop)
            except KeyboardInterrupt:
                report("process", {"name": "runner", "state": "interrupted; the work in progress was given up"})
                stop.set()
                threading.Event().wait(_FAREWELL_S)  # the SuperNode passes the last reply on
            watcher.join()
            supervisor.stop()
    finally:
        log.removeHandler(handler)
        handler.close()


def _fresh_secret(path: Path) -> bytes:
    path.unlink(missing_ok=True)
    make_secret(path)
    return path.read_bytes()


def _listens(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(0.2)
        return s.connect_ex((launch.LOOPBACK, port)) == 0


def _check_free(port: int) -> None:
    if _listens(port):
        raise ConfigError(f"port {port} on loopback is taken", hint="choose another local_port, or stop the other `site up`")
