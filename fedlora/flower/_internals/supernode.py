"""Flower's command ``flower-supernode`` with some parts replaced by ours: :func:`run` lists them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import httpx

from fedlora.gateway.calls import CALL, TIME, sign_call
from fedlora.processes.imports import without_collecting

with without_collecting():
    from flwr.supercore import heartbeat
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection as connection
    from flwr.supernode import node_auth_http_interceptor as auth
    from flwr.supernode import start_client_internal as loop
    from flwr.supernode.cli.flower_supernode import flower_supernode

_LONGEST_RETRY_S = 5  # Flower's 20 s keep a site out of a round that a server which is back has begun

_SIGN_S = 15
"""Flower sends a sign of life each 0.7 to 0.9 times this less five seconds: here every 7 to 9 s, where its own 30 s give 20. How
long it waits for one (60 s, which its server is told with each) stays."""


class Rest(Protocol):
    """The pause between two polls for messages; replaces the module ``time`` in the SuperNode's loop."""

    def sleep(self, seconds: float) -> None: ...
    def arrived(self) -> None:
        """Called when a message has arrived."""

    def answered(self) -> None:
        """Called when its reply was sent, or could not be."""


class Calls(Protocol):
    """Intercepts every call to the server."""

    def intercept(self, sign_and_send: Callable[[httpx.Request], httpx.Response], request: httpx.Request) -> httpx.Response: ...
    def correction_s(self) -> float:
        """Seconds that are added to this machine's time in a signature."""


def signing(inner: Any, *, authority: str) -> Any:
    """A subclass of Flower's class that signs the time stamp of each call; it also signs the call, to this authority's server."""

    class Signing(inner):  # type: ignore[misc]  # flwr is untyped here
        def __init__(self, private_key: Any, public_key: Any) -> None:
            super().__init__(private_key, public_key)
            self._key = private_key

        def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
            def signed(context: Any) -> Any:
                r = context.request
                path = r.url.raw_path.decode("ascii")
                r.headers[CALL] = sign_call(
                    self._key,
                    r.method,
                    path,
                    authority=authority,
                    body=r.content,
                    stamp=r.headers[TIME],
                    nonce=os.urandom(16),
                )
                return call_next(context)

            return super().intercept(context, signed)

    return Signing


def run(rest: Rest, calls: Calls, *, authority: str, listening: Callable[[], None]) -> None:
    """The command ``flower-supernode``, with the arguments of this process, until it ends.

    Args:
        authority: of the federation, which each call is signed for.
        listening: called once Flower has installed its own signal handlers.
    """
    push, register = loop._push_messages, loop.register_signal_handlers
    intercept, now = auth.NodeAuthHttpInterceptor.intercept, auth.now

    def push_messages(*args: Any, **kwargs: Any) -> None:
        rest.arrived()
        push(*args, **kwargs)
        rest.answered()

    def register_signal_handlers(*args: Any, **kwargs: Any) -> None:
        register(*args, **kwargs)  # its handler puts ours back at the first signal
        listening()

    def corrected(self: Any, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        return calls.intercept(lambda request: intercept(self, context, call_next), context.request)

    http_retry.MAX_RETRY_DELAY = _LONGEST_RETRY_S
    heartbeat.HEARTBEAT_DEFAULT_INTERVAL = _SIGN_S
    loop.time, loop._push_messages = rest, push_messages
    loop.register_signal_handlers = register_signal_handlers
    auth.now = lambda: now() + timedelta(seconds=calls.correction_s())
    auth.NodeAuthHttpInterceptor.intercept = corrected
    connection.NodeAuthHttpInterceptor = signing(connection.NodeAuthHttpInterceptor, authority=authority)
    flower_supernode()
