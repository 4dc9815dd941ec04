"""Command lines of the processes, as pure functions. None has a secret or ``--insecure`` in it; a test checks that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlora.gateway.addresses import LOOPBACK


def _module(name: str, package: str = "flower") -> list[str]:
    # -P: do not import from the working directory.
    return [sys.executable, "-P", "-m", f"fedlora.{package}.{name}"]


def superlink(port: int, *, tls: Path, database: Path, secret: Path) -> list[str]:
    """Flower's relay, on loopback: its one port also carries the Control API, which needs no password."""
    return [
        *_module("superlink"),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--ssl-ca-certfile", str(tls / "ca.crt"), "--ssl-certfile", str(tls / "server.crt")),
        *("--ssl-keyfile", str(tls / "server.key"), "--enable-supernode-auth", "--database", str(database)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret), "--disable-runtime-dependency-installation"),
    ]


def executor(home: Path, *, superlink_port: int, command: Sequence[str] = ()) -> list[str]:
    """The process that claims runs: :mod:`fedlora.flower.executor`, or a ``command`` with the same arguments."""
    return [*(command or _module("executor")), "--home", str(home), "--superlink-port", str(superlink_port)]


def gateway(
    listen: str, *, superlink_port: int, home: Path, body_limit_bytes: int, timeout_s: float, strangers: int
) -> list[str]:
    """The public port. It reads ``tls``, ``sites`` and ``flower/due.json`` in ``home``, and writes ``flower/refused.json``."""
    return [
        *_module("app", "gateway"),
        *("--listen", listen, "--superlink-port", str(superlink_port), "--home", str(home)),
        *("--body-limit-bytes", str(body_limit_bytes), "--timeout-s", str(timeout_s), "--strangers", str(strangers)),
    ]


def supernode(server: str, *, port: int, ca: Path, node_key: Path, secret: Path) -> list[str]:
    """A site's connection to the server. ``port`` is its loopback port towards our runner."""
    return [
        *_module("supernode"),
        *("--superlink", server, "--root-certificates", str(ca), "--auth-supernode-private-key", str(node_key)),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
    ]
