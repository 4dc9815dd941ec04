"""The server's only public port: passes a SuperNode's calls to the SuperLink on loopback, and nothing else.

The SuperLink's one port also carries the Control API, which asks nobody for a password, and the Runtime API. Here a request
gets through only if its raw path is, byte for byte, one of a SuperNode's calls, with nothing to normalize, and only if its head
is signed by an enrolled site for this very call (:mod:`fedlora.gateway.calls`). Any other caller is answered here, from the head
alone but for a small request to join, the later the more often it calls, and costs the SuperLink nothing. A site's bodies are
counted by their stated length against what its reply may have (:mod:`fedlora.gateway.allowance`), and have to keep coming.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from fedlora.core.errors import WireError
from fedlora.gateway._internals import Server
from fedlora.gateway.addresses import LOOPBACK, split_address
from fedlora.gateway.allowance import Quota
from fedlora.gateway.bodies import Gone, Header, Receive, Stop, end_to_end, small, stated, timed, verified
from fedlora.gateway.calls import Caller, Callers, Refused
from fedlora.gateway.certificates import authority_digest
from fedlora.gateway.connections import SITE_CONNECTIONS, Client, ConnectionSlots, listen, protocol
from fedlora.gateway.doors import NodeWatch
from fedlora.gateway.invitations import JOIN, Invitations, answer_join
from fedlora.gateway.limits import Buckets
from fedlora.gateway.replies import check_announcement

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

_JOIN = JOIN.encode()
_ROUTES = frozenset(
    {("GET", b"/health"), ("GET", _JOIN), ("POST", _JOIN), *(("POST", path.encode()) for path in FLEET_CALLS)},
)
_PART, _ANNOUNCEMENT = "/v1/fleet/push-object", "/v1/fleet/push-messages"  # what the relay stores
_PULL = "/v1/fleet/pull-messages"
_PULLED_BYTES = 1 << 20  # of an answer to it: 72 for each 5 MiB of a request
_SMALL_BYTES = 1 << 12  # bodies of all other calls
_ANNOUNCEMENT_BYTES = 1 << 19
_WHOLE_BYTES = 1 << 16  # up to this a body is read and compared before the SuperLink hears of it

_STRANGER_RATE, _STRANGER_BURST, _LONGEST_S = 20.0, 60.0, 15.0  # answers a second to an address's unsigned calls; longest wait
_SITE_RATE, _SITE_BURST, _SITE_WAIT_S = 50.0, 500.0, 10.0  # a site makes four calls a second, and one for each chunk
_SITE_CALLS = SITE_CONNECTIONS  # of one site at a time: those of connections that were cut may go on at the SuperLink
_HEALTH_S = 1.0

NOT_ENROLLED = b'{"code": 2004, "public_message": "Failed to activate SuperNode.", "public_details": null}'
"""Flower's own answer to a key that it does not know."""

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gateway:
    """An ASGI app.

    Args:
        upstream: client whose base URL is the SuperLink.
        callers: knows the sites.
        quota: what each may push.
        guests: told which connections are a site's.
        invitations: who may ask to join.
        body_limit_bytes: a request with more gets 413 before any of it is read.
        timeout_s: from the end of a call's body to that of its answer, seconds; then 504.
    """

    def __init__(
        self,
        upstream: httpx.AsyncClient,
        *,
        callers: Callers,
        quota: Quota,
        guests: ConnectionSlots,
        invitations: Invitations,
        body_limit_bytes: int,
        timeout_s: float,
    ) -> None:
        self._upstream = upstream
        self._callers = callers
        self._quota = quota
        self._guests = guests
        self._invitations = invitations
        self._body_limit_bytes = body_limit_bytes
        self._timeout_s = timeout_s
        self._strangers = Buckets(_STRANGER_RATE, _STRANGER_BURST, _LONGEST_S, time.monotonic)
        self._sites = Buckets(_SITE_RATE, _SITE_BURST, 2 * _SITE_WAIT_S, time.monotonic)
        self._calls: dict[str, int] = {}
        self._asking, self._asked, self._healthy = asyncio.Lock(), float("-inf"), 503
        self._doors = NodeWatch(_say)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw: bytes = scope.get("raw_path") or b""
        client: Client = scope.get("client") or ("?", 0)
        headers: list[Header] = list(scope["headers"])
        if (scope["method"], raw) not in _ROUTES or scope.get("query_string"):
            await self._refuse(client, send, 404, f"{scope['method'][:16]} {raw[:120]!r}")
            return
        if raw == _JOIN:
            await self._hold(client)
            await self._join(scope["method"], headers, receive, send)
            return
        if scope["method"] == "GET":
            await self._hold(client)
            status = await self._health()
            await _answer(send, status, added=self._doors.answer("/health", (), status, peer="-"))  # with this server's time
            return
        try:
            caller = self._callers.check("POST", raw.decode(), headers)
        except Refused as e:
            added = self._doors.answer(raw.decode(), headers, e.status, peer=client[0], enrolled=e.status != 412)
            await self._refuse(client, send, e.status, f"{raw.decode()}: {e}", added)
            return
        self._guests.known(client, caller.site)
        try:
            call = _Call("POST", raw.decode(), headers, stated(headers, self._most(raw.decode())), caller, client[0])
            await self._admit(caller.site)
        except Stop as e:
            log.warning("refused %s of %s: %s", raw.decode(), caller.site, e)
            await _answer(send, e.status, added=self._doors.answer(raw.decode(), (), e.status, peer="-"))
            return
        try:
            await self._count(call, receive, send)
        finally:
            self._leave(caller.site)

    async def _join(self, method: str, headers: list[Header], receive: Receive, send: Send) -> None:
        """What anybody may read before joining, or a request to join."""
        try:
            size = stated(headers, _SMALL_BYTES) if method == "POST" else 0
            status, body = answer_join(self._invitations, await small(receive, size) if size else b"", method)
        except Stop as e:
            status, body = e.status, b""
        except Gone:
            return
        await _answer(send, status, body, self._doors.answer(JOIN, (), status, peer="-"))

    async def _health(self) -> int:
        """The status of the SuperLink's health, asked at most once a second, however many ask here."""
        async with self._asking:
            if time.monotonic() - self._asked > _HEALTH_S:
                try:
                    answer = await self._upstream.get("/health", timeout=self._timeout_s)
                    self._healthy = answer.status_code
                except httpx.HTTPError:
                    self._healthy = 503
                self._asked = time.monotonic()
            return self._healthy

    def _most(self, path: str) -> int:
        """Most bytes of a site's body."""
        return min(
            {_PART: self._body_limit_bytes, _ANNOUNCEMENT: _ANNOUNCEMENT_BYTES}.get(path, _SMALL_BYTES), self._body_limit_bytes
        )

    async def _admit(self, site: str) -> None:
        """Limits the rate of a site's calls, and their number at a time."""
        if self._calls.get(site, 0) >= _SITE_CALLS:
            raise Stop(503, f"more than {_SITE_CALLS} calls at a time")
        self._calls[site] = self._calls.get(site, 0) + 1
        wait_s = self._sites.of(site).wait_s()
        if wait_s > _SITE_WAIT_S:
            self._sites.of(site).put_back()
            self._leave(site)
            raise Stop(503, f"more than {_SITE_RATE:g} calls a second")
        try:
            await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            self._leave(site)
            raise

    def _leave(self, site: str) -> None:
        self._calls[site] -= 1
        if not self._calls[site]:
            del self._calls[site]

    async def _count(self, call: _Call, receive: Receive, send: Send) -> None:
        """Passes a site's call on, if the relay may store its body."""
        if call.caller is None or call.path not in (_PART, _ANNOUNCEMENT):
            await self._pass(call, receive, send)
            return
        taken = self._quota.take(call.caller.site, call.size, announces=call.path == _ANNOUNCEMENT)
        if taken is None:
            await _answer(send, 413)
            return
        status = await self._pass(replace(call, most_parts=taken.most_parts), receive, send)
        if call.path == _PART and not 200 <= status < 300:  # of an announcement Flower keeps a row even if it fails
            self._quota.give_back(taken)
        if status == 413 or (call.path == _ANNOUNCEMENT and status == 400):
            self._quota.refuse(taken.site)

    async def _refuse(self, client: Client, send: Send, status: int, why: str, added: Iterable[Header] = ()) -> None:
        log.warning("refused %s from %s", why, client[0])
        await self._hold(client)
        await _answer(send, status, NOT_ENROLLED if status == 412 else b"", added)

    async def _hold(self, client: Client) -> None:
        """The more often an address calls unsigned, the later it is answered: its connections wait instead of asking again."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._strangers.of(client[0]).wait_s()
        while (left_s := until - clock()) > 0 and self._guests.here(client):
            await asyncio.sleep(min(left_s, 1.0))

    async def _pass(self, call: _Call, receive: Receive, send: Send) -> int:
        """Passes a call on; returns the answer's status, 0 for a client that has gone."""
        started = [0]

        async def send_noting(message: MutableMapping[str, Any]) -> None:
            started[0] = started[0] or message["status"]
            await send(message)

        status = 0
        try:
            await self._forward(call, receive, send_noting)
            return started[0]
        except Stop as e:
            log.warning("refused %s of %s: %s", call.path, call.caller.site if call.caller else "?", e)
            status = e.status
        except TimeoutError:
            status = 504
        except httpx.HTTPError as e:
            log.warning("SuperLink: %s", type(e).__name__)
            status = 503  # a SuperNode tries again
        except Gone:
            return 0
        # Once the answer's head is out, only cutting the connection can say that it is incomplete.
        if started[0]:
            raise ConnectionAbortedError
        await _answer(send, status, added=self._doors.answer(call.path, (), status, peer="-"))
        return status

    async def _forward(self, call: _Call, receive: Receive, send: Send) -> None:
        headers = end_to_end(call.headers)
        content: Any = None  # bytes, or what yields them
        async with asyncio.timeout(None) as limit:
            if call.caller is not None:
                body = verified(receive, call.caller.body, call.size)
                if call.path != _PART or call.size <= _WHOLE_BYTES:
                    content = b"".join([part async for part in body])
                else:
                    content = timed(body, limit, self._timeout_s)
                if call.path == _ANNOUNCEMENT:
                    check_announcement(content, most_parts=call.most_parts, sent=self._quota.sent)
                headers.append((b"content-length", str(call.size).encode()))
            limit.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
            async with self._upstream.stream(call.method, call.path, headers=headers, content=content) as answer:
                pulled = await self._noted(answer, call) if call.path == _PULL and answer.is_success else b""
                head = end_to_end(answer.headers.raw)
                status = 503 if answer.status_code == 500 else answer.status_code  # a SuperNode gives up at 500
                head += self._doors.answer(call.path, call.headers, status, peer=call.peer)
                if "content-length" in answer.headers:
                    head.append((b"content-length", answer.headers["content-length"].encode()))
                await send({"type": "http.response.start", "status": status, "headers": head})
                if not answer.is_stream_consumed:
                    async for chunk in answer.aiter_raw():
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": pulled})

    async def _noted(self, answer: httpx.Response, call: _Call) -> bytes:
        """An answer to a pull, once it is noted what was pulled; what cannot be read reaches nobody."""
        body = bytearray()
        async for chunk in answer.aiter_raw():
            body += chunk
            if len(body) > _PULLED_BYTES:
                raise Stop(503, f"the SuperLink's answer has more than {_PULLED_BYTES} bytes")
        try:
            self._quota.note_pulled(call.caller.site if call.caller else "", bytes(body))
        except WireError as e:
            raise Stop(503, f"the SuperLink's answer: {e}") from None
        return bytes(body)


@dataclass(frozen=True, slots=True)
class _Call:
    method: str
    path: str
    headers: list[Header]
    size: int
    caller: Caller | None
    peer: str
    most_parts: int = 0


def _say(line: str) -> None:
    """A line for `server up`, which reads what this process prints."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


async def _answer(send: Send, status: int, body: bytes = b"", added: Iterable[Header] = ()) -> None:
    headers = [(b"content-length", str(len(body)).encode()), (b"connection", b"close"), *added]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def upstream_client(port: int, *, ca: Path, timeout_s: float) -> httpx.AsyncClient:
    """A client for the SuperLink on loopback that believes our authority only, and no proxy setting. It has no limit of its own:
    one over all sites would let some of them take others' calls."""
    return httpx.AsyncClient(
        base_url=f"https://{LOOPBACK}:{port}",
        verify=ssl.create_default_context(cafile=str(ca)),
        timeout=timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
        follow_redirects=False,
    )


def main(argv: list[str] | None = None) -> None:
    """Serves until signaled. All arguments are paths and numbers."""
    parser = argparse.ArgumentParser(prog="fedlora-gateway")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--superlink-port", type=int, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--body-limit-bytes", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--strangers", type=int, required=True)
    args = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    host, port = split_address(args.listen)
    upstream = upstream_client(args.superlink_port, ca=args.home / "tls" / "ca.crt", timeout_s=args.timeout_s)
    guests = ConnectionSlots(args.strangers)
    app = Gateway(
        upstream,
        callers=Callers(args.home / "sites", time.time, time.time(), authority_digest(args.home / "tls" / "ca.crt")),
        quota=Quota(args.home / "flower", time.monotonic),
        guests=guests,
        invitations=Invitations(args.home, time.time),
        body_limit_bytes=args.body_limit_bytes,
        timeout_s=args.timeout_s,
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol(guests),
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=None,  # one over all would let strangers take sites' places: guests has the limits
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        ssl_certfile=str(args.home / "tls" / "server.crt"),
        ssl_keyfile=str(args.home / "tls" / "server.key"),
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    Server(config, partial(listen, guests=guests)).run()


if __name__ == "__main__":
    main()
