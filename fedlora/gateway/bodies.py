"""Bodies of calls on their way through the gateway, and the headers that go with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from hashlib import sha256
from typing import Any

from fedlora.gateway.calls import CALL

_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade".split()
)
_NOT_FORWARDED = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"forwarded", b"date", b"server", CALL.encode()}

_PATIENCE_S = 10.0  # a body may pause so long at its beginning,
_SLOWEST = 4096  # and then has to bring so many bytes a second
_PIECE_BYTES = 1 << 20  # of a body, that go on at once

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Header = tuple[bytes, bytes]


class Stop(Exception):
    """The call ends with this status."""

    def __init__(self, status: int, why: str = "") -> None:
        super().__init__(why)
        self.status = status


class Gone(Exception):
    """The client has hung up."""


async def verified(receive: Receive, digest: str, size: int) -> AsyncIterator[bytes]:
    """A body as it comes, but for its last piece, which is passed on only if the whole is what was signed and stated.

    So the SuperLink never has a body whole that is not. Only the time that the client takes is counted. What comes in many small
    pieces goes on in large ones: each costs the SuperLink's layers as much as a large one.
    """
    seen, held, waited = sha256(), bytearray(), 0.0
    got, more, clock = 0, True, asyncio.get_running_loop().time
    while more:
        left_s, began = _PATIENCE_S + got / _SLOWEST - waited, clock()
        try:
            async with asyncio.timeout(left_s):
                message = await receive()
        except TimeoutError:
            raise Stop(408, f"a body that stopped after {got} bytes") from None
        waited += clock() - began
        if message["type"] == "http.disconnect":
            raise Gone
        chunk, more = message.get("body", b""), message.get("more_body", False)
        got += len(chunk)
        if got > size:
            raise Stop(413, f"a body of more than the {size} bytes that it states")
        seen.update(chunk)
        if held and len(held) + len(chunk) > _PIECE_BYTES:
            yield bytes(held)
            held.clear()
        held += chunk
    if seen.hexdigest() != digest:
        raise Stop(401, "another body than the one that was signed")
    yield bytes(held)


def stated(headers: Iterable[Header], most: int) -> int:
    """A body's length, as stated; none without, or with another framing beside it, which HTTP would follow instead.

    Args:
        headers: names in lower case.
        most: bytes that are taken.

    Raises:
        Stop: 411 or 413.
    """
    framing = [(name, value) for name, value in headers if name in (b"content-length", b"transfer-encoding")]
    if len(framing) != 1 or framing[0][0] != b"content-length" or not framing[0][1].isdigit() or len(framing[0][1]) > 12:
        raise Stop(411, "a body without one stated length")
    if int(framing[0][1]) > most:
        raise Stop(413, f"a body of {int(framing[0][1])} bytes, at most {most} are taken")
    return int(framing[0][1])


async def small(receive: Receive, size: int) -> bytes:
    """The body of a call that nobody has signed: as long as it states, in ten seconds."""
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > size:
                    raise Stop(413, f"a body of more than the {size} bytes that it states")
    except TimeoutError:
        raise Stop(408, f"a body that stopped after {len(body)} bytes") from None
    return bytes(body)


async def timed(body: AsyncIterator[bytes], limit: asyncio.Timeout, timeout_s: float) -> AsyncIterator[bytes]:
    """The same; the call's time begins anew with each piece, because a body has its own limit."""
    async for part in body:
        limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
        yield part


def end_to_end(headers: Iterable[Header]) -> list[Header]:
    """Headers that may pass: not hop by hop, not named by ``Connection`` (RFC 9110, 7.6.1), none that frames a message."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {token.strip().lower() for name, value in pairs if name == b"connection" for token in value.split(b",")}
    return [
        (name, value)
        for name, value in pairs
        if name not in _NOT_FORWARDED and name not in named and not name.startswith((b"x-forwarded-", b"sec-"))
    ]
