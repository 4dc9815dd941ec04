"""What the gateway lets through, without a socket: the app itself, in front of a relay that notes what reaches it."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from flower.signed import Node

from fedlora.gateway.allowance import Allowance, Quota
from fedlora.gateway.app import FLEET_CALLS, Gateway
from fedlora.gateway.calls import Callers
from fedlora.gateway.connections import ConnectionSlots
from fedlora.gateway.exposure import FORBIDDEN

PUSH = "/v1/fleet/push-object"
PULL = "/v1/fleet/pull-messages"
LIMIT = 300_000


class Relay:
    """Answers 200 and notes (method, path, body)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.seen.append((scope["method"], scope["raw_path"].decode(), body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"relay"})


class Place:
    """A gateway with one enrolled site, ``alpha``, which may push."""

    def __init__(self, home: Path) -> None:
        for part in ("sites", "flower"):
            (home / part).mkdir()
        self.home, self.relay = home, Relay()
        self.node = Node(home, "alpha", home=home)
        Allowance(home / "flower").grant({"alpha": 1 << 20})

    def call(self, method: str, path: str, *, query: bytes = b"", headers: dict[str, str] | None = None,
             body: bytes = b"", stated: int | str | None = None, times: int = 1) -> int:  # fmt: skip
        """The status, of all that are made at once; ``headers`` None: as the site signs them."""
        return asyncio.run(self._call(method, path, query, headers, body, len(body) if stated is None else stated, times))

    async def _call(self, method: str, path: str, query: bytes, headers: Any, body: bytes, stated: Any, times: int) -> int:
        signed = self.node.headers(path, body, method=method) if headers is None else headers
        pairs = [(k.lower().encode(), v.encode()) for k, v in signed.items()]
        if stated != "":
            pairs.append((b"content-length", str(stated).encode()))
        scope = {"type": "http", "method": method, "raw_path": path.encode(), "query_string": query, "headers": pairs,
                 "client": ("192.0.2.7", 1)}  # fmt: skip
        statuses: list[int] = []
        read = itertools.repeat({"type": "http.request", "body": body, "more_body": False})

        async def receive() -> Any:
            return next(read)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        transport = httpx.ASGITransport(app=self.relay)
        async with httpx.AsyncClient(transport=transport, base_url="https://relay") as upstream:
            gateway = Gateway(
                upstream,
                callers=Callers(self.home / "sites", time.time, 0.0),
                quota=Quota(self.home / "flower", time.monotonic),
                guests=ConnectionSlots(8),
                body_limit_bytes=LIMIT,
                timeout_s=20.0,
            )
            await asyncio.gather(*(gateway(scope, receive, send) for _ in range(times)))
        (status,) = set(statuses)
        return status


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_calls_of_a_supernode_reach_the_relay_as_they_were_sent(place):
    for path in sorted(FLEET_CALLS):
        assert place.call("POST", path, body=b"x") == 200
    assert place.call("GET", "/health", headers={}) == 200
    assert place.relay.seen == [*(("POST", p, b"x") for p in sorted(FLEET_CALLS)), ("GET", "/health", b"")]


@pytest.mark.attack(
    "B12",
    "a flood of questions for its health, which need no signature",
    stops="the gateway asks the SuperLink once a second and answers the others itself",
)
def test_the_relay_is_asked_for_its_health_once_a_second(place):
    assert place.call("GET", "/health", headers={}, times=50) == 200
    assert len(place.relay.seen) == 1


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        *(("POST", path, b"") for path in FORBIDDEN),
        ("POST", "/v1/fleet/register-node", b""),
        ("POST", "/v1/fleet/../control/stop-run", b""),
        ("POST", PULL + "/", b""),
        ("POST", PULL, b"x=1"),
        ("GET", "/health", b"x=1"),
        ("GET", PULL, b""),
        ("PUT", PUSH, b""),
        ("POST", "/health", b""),
    ],
)
def test_no_path_but_the_listed_ones_reaches_the_relay(place, method, path, query):
    """Not even with an enrolled site's own signature under it."""
    assert place.call(method, path, query=query) == 404
    assert place.relay.seen == []


@pytest.mark.parametrize(
    ("path", "stated", "status"),
    [
        (PUSH, LIMIT + 1, 413),
        (PULL, LIMIT + 1, 413),
        (PUSH, "", 411),
        (PUSH, "+1", 411),
        (PUSH, "0x10", 411),
        (PUSH, "9" * 13, 411),
    ],
)
def test_a_body_over_its_limit_or_without_a_length_is_refused_unread(place, path, stated, status):
    assert place.call("POST", path, stated=stated) == status
    assert place.relay.seen == []


@pytest.mark.parametrize("size", [1, 1 << 16, (1 << 16) + 1, 200_000])
def test_another_body_than_the_signed_one_is_not_passed_on(place, size):
    signed = place.node.headers(PUSH, b"a" * size)
    assert place.call("POST", PUSH, headers=signed, body=b"b" * size) == 401
    assert not any(len(body) == size for *_, body in place.relay.seen)


def test_a_call_that_nobody_signed_does_not_reach_the_relay(place, tmp_path):
    assert place.call("POST", PULL, headers={}) == 401
    (tmp_path / "other").mkdir()
    stranger = Node(tmp_path / "other", "mallory", home=None)
    assert place.call("POST", PULL, headers=stranger.headers(PULL)) == 401
    assert place.call("POST", "/v1/fleet/activate-node", headers=stranger.headers("/v1/fleet/activate-node")) == 412
    assert place.relay.seen == []
