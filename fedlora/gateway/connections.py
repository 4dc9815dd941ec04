"""Limits on the gateway's connections: who may open one, how long it may be idle, which one is cut when places run out.

There is no limit over all of them: each enrolled site has its own places and all strangers together have theirs, so that nobody's
connections take anything from a site's. What that comes to is :func:`open_files`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import uvicorn

from fedlora.gateway._internals import HttpConnection
from fedlora.gateway.limits import Buckets

log = logging.getLogger("fedlora.gateway")

_HEAD_S = 20.0  # from a connection's opening, or a call's first byte, to the end of its head; and for TLS before it
_OPEN_RATE, _OPEN_BURST, _OPEN_WAIT_S = 100.0, 400.0, 2.0  # connections that one address opens; the TLS of one takes 1 to 2 ms
_BACKLOG = 2048
_OWN_FILES = 128  # of the process itself: logs, files that are read, the listening socket

SITE_CONNECTIONS = 8
"""Connections of one site at a time. A SuperNode has one while it waits and three at most in a round (two bodies, and its
heartbeat); after a restart or a change of the network those of before may look open for a minute."""

Client = tuple[str, int]


def open_files(sites: int, *, strangers: int) -> int:
    """Most files that the gateway has open at a time: each connection of a site may have one to the SuperLink, and as many
    strangers as have a place may wait for TLS."""
    return _OWN_FILES + 2 * strangers + 2 * SITE_CONNECTIONS * sites


class _Connection(Protocol):
    def cut(self) -> None: ...


@dataclass(slots=True, eq=False)
class ConnectionSlots:
    """The open connections: a connection is a stranger's until its first signed call, then a site's.

    When the strangers' places are full, the oldest connection of the address with the most is cut. A site makes a call right
    after its handshake, so that sites get in beside a flood from their own address. Only a firewall helps against an attacker
    with many addresses. Of a site that has more connections than it may, the one whose last call began longest ago is cut.

    Law: whatever comes from strangers and from other sites, no connection of a site is cut that has at most ``SITE_CONNECTIONS``.

    Args:
        places: for all strangers together.
    """

    places: int
    _strangers: dict[str, dict[_Connection, None]] = field(default_factory=dict)
    _sites: dict[str, dict[_Connection, None]] = field(default_factory=dict)
    _of: dict[Client, _Connection] = field(default_factory=dict)

    def come(self, one: _Connection, client: Client) -> None:
        """Adds a connection, or replaces it by its next stage (TLS, then HTTP)."""
        self.go(client)
        self._of[client] = one
        self._strangers.setdefault(client[0], {})[one] = None
        if sum(map(len, self._strangers.values())) > self.places:
            address, most = max(self._strangers.items(), key=lambda item: len(item[1]))
            log.warning("cut a connection from %s, which has %d that have signed nothing", address, len(most))
            oldest = next(iter(most))
            self._forget(self._strangers, address, oldest)
            oldest.cut()

    def here(self, client: Client) -> bool:
        """Whether this connection is still open."""
        return client in self._of

    def known(self, client: Client, site: str) -> None:
        """Marks the connection as a site's, with a call that begins now."""
        one = self._of.get(client)
        if one is None:
            return
        self._forget(self._strangers, client[0], one)
        own = self._sites.setdefault(site, {})
        own.pop(one, None)
        own[one] = None
        if len(own) > SITE_CONNECTIONS:
            oldest = next(iter(own))
            del own[oldest]
            oldest.cut()

    def go(self, client: Client) -> None:
        """Removes a closed connection."""
        one = self._of.pop(client, None)
        if one is not None:
            self._forget(self._strangers, client[0], one)
            for site in [s for s, own in self._sites.items() if one in own]:
                self._forget(self._sites, site, one)

    @staticmethod
    def _forget(groups: dict[str, dict[_Connection, None]], name: str, one: _Connection) -> None:
        group = groups.get(name, {})
        group.pop(one, None)
        if not group:
            groups.pop(name, None)


class _Impatient(HttpConnection):
    """Cuts connections that send nothing after opening or in the middle of a call: they would take places from sites."""

    guests: ConnectionSlots
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if self.peer is not None:
            self.guests.come(self, self.peer)

    def cut(self) -> None:
        """Closes the connection at once."""
        self.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.has_call():
            self._rest()
        elif self.is_idle():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        if self.peer is not None:
            self.guests.go(self.peer)
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.later(_HEAD_S, self._cut)

    def _rest(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _cut(self) -> None:
        if not self.has_call():
            log.warning("cut a silent connection from %s", (self.peer or ("?",))[0])
            self.cut()


def protocol(guests: ConnectionSlots) -> type[_Impatient]:
    """The class of a connection; uvicorn makes the objects."""
    return type("_Connection", (_Impatient,), {"guests": guests})


@dataclass(slots=True, eq=False)
class _Waiting:
    """A socket that waits for its turn before TLS."""

    accepted: socket.socket
    turn: asyncio.TimerHandle | None = None

    def cut(self) -> None:
        """Resets it: nothing stays behind."""
        if self.turn is not None:
            self.turn.cancel()
        self.accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.accepted.close()


@dataclass(slots=True, eq=False)
class _Handshake:
    task: asyncio.Task[None]

    def cut(self) -> None:
        self.task.cancel()


class _Porch:
    """Listens. An address that opens many connections waits for its turn before TLS, which is what costs, or is turned away."""

    def __init__(
        self, listening: socket.socket, make: Callable[[], asyncio.Protocol], *, guests: ConnectionSlots, context: ssl.SSLContext
    ) -> None:
        self._listening, self._make, self._guests, self._context = listening, make, guests, context
        self._queue = ConnectionSlots(guests.places)
        self._turns = Buckets(_OPEN_RATE, _OPEN_BURST, 2 * _OPEN_WAIT_S, time.monotonic)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        while True:
            try:
                one, client = await self._loop.sock_accept(self._listening)
            except OSError:  # no descriptor left: some will come back
                await asyncio.sleep(0.1)
                continue
            turn, waiting = self._turns.of(client[0]), _Waiting(one)
            wait_s = turn.wait_s()
            if wait_s > _OPEN_WAIT_S:
                turn.put_back()
                waiting.cut()
            else:
                waiting.turn = self._loop.call_later(wait_s, self._let_in, one, (client[0], client[1]))
                self._queue.come(waiting, (client[0], client[1]))

    def _let_in(self, one: socket.socket, client: Client) -> None:
        self._queue.go(client)
        task = self._loop.create_task(self._shake(one, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._guests.come(_Handshake(task), client)

    async def _shake(self, one: socket.socket, client: Client) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._make, one, ssl=self._context, ssl_handshake_timeout=_HEAD_S, ssl_shutdown_timeout=_HEAD_S
            )
        except BaseException as e:
            self._guests.go(client)
            if not isinstance(e, (OSError, asyncio.CancelledError)):
                raise

    def close(self) -> None:
        self._task.cancel()
        for task in list(self._tasks):
            task.cancel()
        self._listening.close()

    async def wait_closed(self) -> None:
        with suppress(asyncio.CancelledError):
            await self._task


def listen(
    config: uvicorn.Config, make: Callable[[], asyncio.Protocol], context: ssl.SSLContext, *, guests: ConnectionSlots
) -> _Porch:
    """Opens the public port of a :class:`fedlora.gateway._internals.Server`, with the porch before it."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    listening.setblocking(False)
    return _Porch(listening, make, guests=guests, context=context)
