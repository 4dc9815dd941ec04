"""Is the server closed? Probed from the public port, and looked up in the kernel's table of listening sockets."""

from __future__ import annotations

import http.client
import socket
import ssl
from pathlib import Path

from fedlora.core.errors import ConnectionFailed
from fedlora.gateway.addresses import LOOPBACK, split_address

FORBIDDEN = (
    "/v1/control/list-nodes",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/runtime/pull-messages",
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1/fleet/..%2fcontrol/list-nodes",
    "/v1/fleet//../control/list-nodes",
    "//v1/control/list-nodes",
    "/v1/fleet/register-node",
    "/docs",
    "/openapi.json",
)
"""Raw paths that must answer 404 on the public port."""

_TIMEOUT_S = 5.0
_LISTEN = "0A"
_LOCAL = {"0100007F", "00000000000000000000000001000000"}


def dialled(listen: str) -> tuple[str, int]:
    """Where to reach our own listening address: a wildcard is dialled on loopback."""
    host, port = split_address(listen)
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host), port  # noqa: S104  compared, not bound


def _context(ca: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = False  # we dial our own socket by number; the chain is still checked
    return context


def public_status(method: str, path: str, *, address: tuple[str, int], ca: Path) -> int:
    """HTTP status of one request whose path goes out raw, as no well-behaved client would send it.

    Raises:
        OSError, http.client.HTTPException: no answer.
    """
    connection = http.client.HTTPSConnection(*address, context=_context(ca), timeout=_TIMEOUT_S)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def healthy(address: tuple[str, int], *, ca: Path) -> bool:
    """Whether ``GET /health`` answers 200."""
    try:
        return public_status("GET", "/health", address=address, ca=ca) == 200
    except (OSError, http.client.HTTPException):
        return False


def check_public(listen: str, *, ca: Path) -> None:
    """Probes every path of :data:`FORBIDDEN` through the public port, an unsigned call, and that the SuperLink is behind it.

    Raises:
        ConnectionFailed (exposed): a path answers something else than 404, or the call something else than 401.
        ConnectionFailed: the port does not answer, or passes nothing on.
    """
    address = dialled(listen)
    try:
        for path in FORBIDDEN:
            status = public_status("POST", path, address=address, ca=ca)
            if status != 404:
                raise ConnectionFailed(
                    f"{path} answers {status} on the public port {listen}",
                    hint="nothing but the gateway may listen there; look for another process or proxy",
                    code="exposed",
                )
        status = public_status("POST", "/v1/fleet/pull-messages", address=address, ca=ca)
        if status != 401:
            raise ConnectionFailed(
                f"an unsigned call is answered {status} on the public port {listen}",
                hint="nothing but the gateway may listen there; look for another process or proxy",
                code="exposed",
            )
        if not healthy(address, ca=ca):
            raise ConnectionFailed(f"the gateway on {listen} does not reach the SuperLink", hint="see flower/log/gateway.log")
    except (OSError, http.client.HTTPException) as e:
        raise ConnectionFailed(f"the public port {listen} does not answer: {type(e).__name__}") from None


def check_loopback(port: int, *, tables: tuple[Path, ...] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))) -> None:
    """Asks the kernel whether anything listens on ``port`` beyond loopback. Passes where there is no such table.

    Raises:
        ConnectionFailed (exposed): something does.
    """
    for table in tables:
        if not table.exists():
            continue
        for line in table.read_text().splitlines()[1:]:
            columns = line.split()
            address, _, number = columns[1].partition(":")
            if columns[3] == _LISTEN and int(number, 16) == port and address not in _LOCAL:
                raise ConnectionFailed(
                    f"the SuperLink's port {port} is open beyond loopback",
                    hint="start it with `fedlora server up`",
                    code="exposed",
                )


def free_port() -> int:
    """A loopback port that nobody uses just now."""
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])
