"""uvicorn's non-public parts are what ``gateway/_internals.py`` takes them for. If one of these fails, that file needs work."""

from __future__ import annotations

import asyncio
import inspect
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedlora.gateway._internals import HttpConnection, Server
from fedlora.gateway.certificates import make_tls


def test_nothing_of_ours_hides_something_of_uvicorns():
    ours = {n for n in vars(HttpConnection) if not n.startswith("__")}
    assert not ours & (names(inspect.getsource(H11Protocol)) | set(dir(H11Protocol)))
    assert "_listen" not in names(inspect.getsource(uvicorn.Server)) | set(dir(uvicorn.Server))


def names(source: str) -> set[str]:
    """All that a class calls its own."""
    return set(re.findall(r"\bself\.(\w+)", source))


class Noted(HttpConnection):
    """Keeps itself where a test can find it."""

    made: list[Noted] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        Noted.made.append(self)


class Open:
    """A port on loopback that a test talks to in plain text."""

    def __init__(self, make: Callable[[], asyncio.Protocol]) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        loop = asyncio.get_running_loop()
        self.task = loop.create_task(loop.create_server(make, sock=self.socket))
        self.closed = False

    def close(self) -> None:
        self.closed = True
        if self.task.done():
            self.task.result().close()

    async def wait_closed(self) -> None:
        self.closed = True


def config(tmp_path: Path, app: Any) -> uvicorn.Config:
    make_tls(tmp_path, [])
    return uvicorn.Config(
        app, http=Noted, ws="none", lifespan="off", log_level="warning",
        ssl_certfile=str(tmp_path / "server.crt"), ssl_keyfile=str(tmp_path / "server.key"),
    )  # fmt: skip


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_connection_tells_what_it_is_doing_and_the_server_runs_without_a_port_of_its_own(tmp_path: Path):
    Noted.made.clear()
    answer, opened = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def listen(config: uvicorn.Config, make: Callable[[], asyncio.Protocol], context: ssl.SSLContext) -> Open:
        assert isinstance(context, ssl.SSLContext)
        opened.append(Open(make))
        return opened[-1]

    async def talk() -> None:
        server = Server(config(tmp_path, app), listen)
        serving = asyncio.create_task(server.serve())
        await settled(lambda: server.started and bool(opened) and opened[0].task.done())
        reader, writer = await asyncio.open_connection(*opened[0].socket.getsockname())
        await settled(lambda: bool(Noted.made))
        (one,) = Noted.made
        assert one.peer == writer.get_extra_info("sockname")
        assert (one.has_call(), one.is_idle()) == (False, True)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await settled(one.has_call)
        answer.set()
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        await settled(lambda: not one.has_call())
        assert one.is_idle()
        called = asyncio.Event()
        one.later(0.0, called.set)
        await asyncio.wait_for(called.wait(), 30)
        one.abort()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        server.should_exit = True
        await asyncio.wait_for(serving, 30)
        assert opened[0].closed

    asyncio.run(talk())


def test_a_body_that_was_not_read_yet_is_not_idle(tmp_path: Path):
    """An early answer: the rest of the body still has to come, and is no new call."""
    loop = asyncio.new_event_loop()
    try:
        settings = config(tmp_path, None)
        settings.load()
        settings.loaded_app = None
        server = Server(settings, lambda *_: Open(lambda: asyncio.Protocol()))
        one = Noted(settings, server.server_state, {}, loop)
        assert one.is_idle()
        one.conn.receive_data(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf")
        assert isinstance(one.conn.next_event(), h11.Request)
        assert not one.is_idle()
    finally:
        loop.close()


def test_a_port_without_tls_is_never_opened():
    async def start() -> None:
        settings = uvicorn.Config(lambda: None, lifespan="off", log_level="warning")
        settings.load()
        server = Server(settings, lambda *_: pytest.fail("opened"))
        server.lifespan = settings.lifespan_class(settings)
        with pytest.raises(ValueError, match="TLS only"):
            await server.startup()

    asyncio.run(start())
