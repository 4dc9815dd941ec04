"""The server's only public port: passes a SuperNode's calls to the SuperLink on loopback, and nothing else.

The SuperLink's one port also carries the Control API, which asks nobody for a password, and the Runtime API. Here a
request gets through only if its raw path is, byte for byte, one of a SuperNode's calls; there is nothing to normalise.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import h11
import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedlora.flower.doors import Doors
from fedlora.flower.launch import LOOPBACK, split_address

__all__ = ["FLEET_CALLS", "Gateway", "end_to_end", "main", "upstream_client"]

log = logging.getLogger("fedlora.gateway")

FLEET_CALLS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
"""What a SuperNode with a registered key calls. register-node and unregister-node are for keyless nodes and stay closed."""

_ROUTES = frozenset({("GET", b"/health"), *(("POST", path.encode()) for path in FLEET_CALLS)})
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade".split()
)
_NOT_FORWARDED = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"forwarded", b"date", b"server"}

_HEAD_S = 20.0  # from a connection's opening, or a call's first byte, to the end of its head

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]


class _TooLarge(Exception):
    pass


class _Gone(Exception):
    pass


class Gateway:
    """An ASGI app.

    Args:
        upstream: client whose base URL is the SuperLink.
        body_limit_bytes: a request with more gets 413 before any more of it is read.
        timeout_s: for one whole call, seconds; then 504.
    """

    def __init__(self, upstream: httpx.AsyncClient, *, body_limit_bytes: int, timeout_s: float) -> None:
        self._upstream = upstream
        self._body_limit_bytes = body_limit_bytes
        self._timeout_s = timeout_s
        self._doors = Doors(_say)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if (scope["method"], raw) not in _ROUTES or scope.get("query_string"):
            log.warning("refused %s %r from %s", scope["method"][:16], raw[:120], (scope.get("client") or ("?",))[0])
            await _answer(send, 404)
            return
        headers: list[Header] = list(scope["headers"])
        stated = dict(headers).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self._body_limit_bytes:
            log.warning("refused a body of %s bytes for %s", stated[:20].decode("latin-1"), raw.decode())
            await _answer(send, 413)
            return
        started = [False]

        async def send_noting(message: MutableMapping[str, Any]) -> None:
            started[0] = True
            await send(message)

        status = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._forward(scope, headers, receive, send_noting)
        except _TooLarge:
            log.warning("refused a body of more than %d bytes for %s", self._body_limit_bytes, raw.decode())
            status = 413
        except TimeoutError:
            status = 504
        except httpx.HTTPError as e:
            log.warning("SuperLink: %s", type(e).__name__)
            status = 503  # a SuperNode tries again
        except _Gone:
            return
        # Once the answer's head is out, only cutting the connection can say that it is incomplete.
        if status and not started[0]:
            await _answer(send, status, self._doors.answer(raw.decode(), (), status, peer="-"))
        elif status:
            raise ConnectionAbortedError

    async def _forward(self, scope: Scope, headers: list[Header], receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["raw_path"].decode()
        content = self._body(receive) if method == "POST" else None
        async with self._upstream.stream(method, path, headers=end_to_end(headers), content=content) as answer:
            head = end_to_end(answer.headers.raw)
            head += self._doors.answer(path, headers, answer.status_code, peer=(scope.get("client") or ("-",))[0])
            if "content-length" in answer.headers:
                head.append((b"content-length", answer.headers["content-length"].encode()))
            await send({"type": "http.response.start", "status": answer.status_code, "headers": head})
            async for chunk in answer.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > self._body_limit_bytes:
                raise _TooLarge
            more = message.get("more_body", False)
            if chunk:
                yield chunk


class _Impatient(H11Protocol):
    """Cuts whoever opens a connection, or begins a call, and then says nothing: each would keep a place from a site.

    And no address gets more than half of all places. An attacker with many addresses needs a firewall, not us.
    """

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        host = self.client and self.client[0]
        same = sum(isinstance(c, _Impatient) and c.client is not None and c.client[0] == host for c in self.connections)
        if self.limit_concurrency is not None and same > max(self.limit_concurrency // 2, 1):
            log.warning("cut a connection from %s, which has %d", host or "?", same - 1)
            transport.abort()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._called():
            self._rest()
        elif self.conn.their_state is h11.IDLE:  # not the rest of a body that was answered early
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _called(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(_HEAD_S, self._cut)

    def _rest(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _cut(self) -> None:
        if not self._called():
            log.warning("cut a silent connection from %s", (self.client or ("?",))[0])
            self.transport.abort()


def end_to_end(headers: Iterable[Header]) -> list[Header]:
    """Headers that may pass: not hop by hop, not named by ``Connection`` (RFC 9110, 7.6.1), none that frames a message."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {token.strip().lower() for name, value in pairs if name == b"connection" for token in value.split(b",")}
    return [
        (name, value)
        for name, value in pairs
        if name not in _NOT_FORWARDED and name not in named and not name.startswith((b"x-forwarded-", b"sec-"))
    ]


def _say(line: str) -> None:
    """A line for `server up`, which reads what this process prints."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


async def _answer(send: Send, status: int, added: Iterable[Header] = ()) -> None:
    headers = [(b"content-length", b"0"), (b"connection", b"close"), *added]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def upstream_client(port: int, *, ca: Path, timeout_s: float, connections: int) -> httpx.AsyncClient:
    """A client for the SuperLink on loopback that believes our authority only, and no proxy setting."""
    return httpx.AsyncClient(
        base_url=f"https://{LOOPBACK}:{port}",
        verify=ssl.create_default_context(cafile=str(ca)),
        timeout=timeout_s,
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        trust_env=False,
        follow_redirects=False,
    )


def main(argv: list[str] | None = None) -> None:
    """Serves until signalled. All arguments are paths and numbers."""
    parser = argparse.ArgumentParser(prog="fedlora-gateway")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--superlink-port", type=int, required=True)
    parser.add_argument("--tls", type=Path, required=True)
    parser.add_argument("--body-limit-bytes", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--connections", type=int, required=True)
    args = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    host, port = split_address(args.listen)
    upstream = upstream_client(
        args.superlink_port, ca=args.tls / "ca.crt", timeout_s=args.timeout_s, connections=args.connections
    )
    config = uvicorn.Config(
        Gateway(upstream, body_limit_bytes=args.body_limit_bytes, timeout_s=args.timeout_s),
        host=host,
        port=port,
        http=_Impatient,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=args.connections,
        timeout_keep_alive=75,
        ssl_certfile=str(args.tls / "server.crt"),
        ssl_keyfile=str(args.tls / "server.key"),
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
