"""Command lines of the processes: pure functions. No secret and no ``--insecure`` in any of them; a test looks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlora.core.errors import ConfigError
from fedlora.gateway.addresses import LOOPBACK


def executable(name: str) -> str:
    """Path of a console script of this very environment, never one that PATH happens to find.

    Raises:
        ConfigError: it is not there.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise ConfigError(f"{path} is missing", hint="install FedLoRA with pip into one environment: pip install fedlora")
    return str(path)


def _module(name: str, package: str = "flower") -> list[str]:
    # -P: the working directory is no place to import from.
    return [sys.executable, "-P", "-m", f"fedlora.{package}.{name}"]


def superlink(port: int, *, tls: Path, database: Path, secret: Path) -> list[str]:
    """Flower's relay, on loopback: its one port also carries the Control API, which asks nobody for a password."""
    return [
        executable("flower-superlink"),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--ssl-ca-certfile", str(tls / "ca.crt"), "--ssl-certfile", str(tls / "server.crt")),
        *("--ssl-keyfile", str(tls / "server.key"), "--enable-supernode-auth", "--database", str(database)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret), "--disable-runtime-dependency-installation"),
    ]


def executor(home: Path, *, superlink_port: int, command: Sequence[str] = ()) -> list[str]:
    """What claims runs from the SuperLink: :mod:`fedlora.flower.executor`, or a ``command`` that takes the same arguments."""
    return [*(command or _module("executor")), "--home", str(home), "--superlink-port", str(superlink_port)]


def gateway(
    listen: str, *, superlink_port: int, home: Path, body_limit_bytes: int, timeout_s: float, connections: int
) -> list[str]:
    """The public side. Of ``home`` it reads ``tls``, ``sites`` and ``flower/due.json``, and writes ``flower/refused.json``."""
    return [
        *_module("app", "gateway"),
        *("--listen", listen, "--superlink-port", str(superlink_port), "--home", str(home)),
        *("--body-limit-bytes", str(body_limit_bytes), "--timeout-s", str(timeout_s), "--connections", str(connections)),
    ]


def supernode(server: str, *, port: int, ca: Path, node_key: Path, secret: Path) -> list[str]:
    """A site's connection to the server. ``port`` is its loopback port towards our runner."""
    return [
        *_module("supernode"),
        *("--superlink", server, "--root-certificates", str(ca), "--auth-supernode-private-key", str(node_key)),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
    ]
