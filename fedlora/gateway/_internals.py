"""Every non-public part of uvicorn that FedLoRA uses, with what h11 says of a connection: they move with each minor release.

``tests/flower/test_gateway_contract.py`` checks that each still is what it is taken for, and ``pyproject.toml`` has an upper
bound. Written against uvicorn 0.49.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any, Protocol

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class HttpConnection(H11Protocol):
    """uvicorn's connection, which parses calls and hands them on. Asyncio tells it of its begin, its bytes and its end."""

    @property
    def peer(self) -> tuple[str, int] | None:
        """Address and port of the other end."""
        return self.client

    def abort(self) -> None:
        """Closes it now, with nothing more said."""
        self.transport.abort()

    def has_call(self) -> bool:
        """Whether a call came whole up to the end of its head, and is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def is_idle(self) -> bool:
        """Whether no byte of a next call has come, nor the rest of a body that was answered early."""
        return self.conn.their_state is h11.IDLE

    def later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        """Calls back from this connection's event loop."""
        return self.loop.call_later(seconds, call)


class Listener(Protocol):
    """What uvicorn does with an open port when it ends."""

    def close(self) -> None: ...
    async def wait_closed(self) -> None: ...


class Server(uvicorn.Server):
    """uvicorn's server, without a port of its own.

    Args:
        listen: opens the port. It is told how a connection is made, and the TLS settings.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listen: Callable[[uvicorn.Config, Callable[[], asyncio.Protocol], ssl.SSLContext], Listener],
    ) -> None:
        super().__init__(config)
        self._listen = listen

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the port; uvicorn itself is given none.

        Raises:
            ValueError: there is no certificate.
        """
        await super().startup(sockets=[])
        config, context = self.config, self.config.ssl
        if context is None:
            raise ValueError("the public port speaks TLS only")

        def make() -> asyncio.Protocol:
            kind: Any = config.http_protocol_class
            made: asyncio.Protocol = kind(config=config, server_state=self.server_state, app_state=self.lifespan.state)
            return made

        self.servers.append(self._listen(config, make, context))  # type: ignore[arg-type]
