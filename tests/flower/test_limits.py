"""The gateway's limits with a loop of our own: an address's turns before TLS, a site's rate and calls at a time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from pathlib import Path

import httpx
import pytest

from fedlora.gateway import app as gate
from fedlora.gateway import connections
from fedlora.gateway.allowance import Quota
from fedlora.gateway.calls import Callers
from fedlora.gateway.certificates import make_tls
from fedlora.gateway.invitations import Invitations
from fedlora.gateway.limits import Buckets

pytestmark = pytest.mark.slow  # to import flwr, that is


class Quiet(asyncio.Protocol):
    """A connection whose TLS is done."""

    made = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        Quiet.made += 1


def test_an_address_that_opens_many_connections_waits_before_tls_and_is_then_turned_away(tmp_path, monkeypatch):
    make_tls(tmp_path, [])
    for name, value in (("_OPEN_RATE", 10.0), ("_OPEN_BURST", 5.0), ("_OPEN_WAIT_S", 1.0)):
        monkeypatch.setattr(connections, name, value)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    server.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    Quiet.made = 0

    async def flood() -> tuple[int, int, float, float]:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        porch = connections._Porch(listening, Quiet, guests=connections.ConnectionSlots(100), context=server)

        async def one() -> bool:
            with contextlib.suppress(OSError):
                await asyncio.open_connection(*listening.getsockname(), ssl=client, server_hostname="localhost")
                return True
            return False

        began = time.monotonic()
        tasks = [asyncio.create_task(one()) for _ in range(40)]
        await asyncio.sleep(0.3)
        early, soon = Quiet.made, time.monotonic() - began
        done = await asyncio.gather(*tasks)
        late = time.monotonic() - began
        porch.close()
        await porch.wait_closed()
        return early, sum(done), soon, late

    early, done, soon, late = asyncio.run(flood())
    assert early <= 5 + 10 * soon + 1
    assert done <= 5 + 10 * late + 1  # those of the burst, and those whose turn came within a second of their coming
    assert 10 <= done < 40


def app(tmp_path: Path) -> gate.Gateway:
    return gate.Gateway(
        httpx.AsyncClient(),
        callers=Callers(tmp_path, time.time, 0.0, ""),
        quota=Quota(tmp_path, time.monotonic),
        guests=connections.ConnectionSlots(1),
        invitations=Invitations(tmp_path, time.time),
        body_limit_bytes=1,
        timeout_s=1.0,
    )


def test_a_site_that_calls_too_often_waits_and_is_then_told_to_try_again(tmp_path, monkeypatch):
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def call_often() -> int:
        one = app(tmp_path)
        one._sites = Buckets(gate._SITE_RATE, gate._SITE_BURST, 2 * gate._SITE_WAIT_S, lambda: 0.0)  # no time passes
        for count in range(2000):
            try:
                await one._admit("alpha")
            except gate.Stop as e:
                return count if (e.status, one._calls) == (503, {}) else -1
            one._leave("alpha")
        return 2000

    monkeypatch.setattr(gate.asyncio, "sleep", sleep)
    assert asyncio.run(call_often()) == 500 + 50 * 10
    assert slept[:500] == [0.0] * 500
    assert slept[-1] == pytest.approx(10.0)


def test_a_site_makes_so_many_calls_at_a_time_and_no_other_site_is_told_of_it(tmp_path):
    """Also where the connections of the first ones were cut since."""

    async def call() -> tuple[int, int]:
        one = app(tmp_path)
        for _ in range(connections.SITE_CONNECTIONS):
            await one._admit("alpha")
        with pytest.raises(gate.Stop) as refused:
            await one._admit("alpha")
        await one._admit("beta")
        one._leave("alpha")
        await one._admit("alpha")
        return refused.value.status, one._calls["beta"]

    assert asyncio.run(call()) == (503, 1)


def test_no_more_wait_for_their_turn_than_strangers_have_places(tmp_path, monkeypatch):
    make_tls(tmp_path, [])
    for name, value in (("_OPEN_RATE", 0.01), ("_OPEN_BURST", 1.0), ("_OPEN_WAIT_S", 9999.0)):
        monkeypatch.setattr(connections, name, value)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    async def ended(reader: asyncio.StreamReader) -> bool:
        try:
            return await asyncio.wait_for(reader.read(), 1.0) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    async def flood() -> list[bool]:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        porch = connections._Porch(listening, Quiet, guests=connections.ConnectionSlots(5), context=server)
        streams = [await asyncio.open_connection(*listening.getsockname()) for _ in range(20)]
        found = await asyncio.gather(*(ended(reader) for reader, _ in streams[1:]))  # the first one has its turn
        porch.close()
        await porch.wait_closed()
        return found

    assert asyncio.run(flood()) == [True] * 14 + [False] * 5
