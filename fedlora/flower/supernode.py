"""Flower's SuperNode, with two changes: it asks for messages more often while a round is talking, and signs its calls whole.

Secure aggregation has five short steps a round; waiting three seconds for each would be most of what it costs. And Flower signs
no more of a call than its time stamp; see :mod:`fedlora.flower.calls`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from fedlora.flower.calls import CALL, TIME, sign_call

__all__ = ["Pace", "main", "signing"]

_TALK_S = 60.0
_STEP_S = 0.25


class Pace:
    """Stands in for the module ``time`` in the SuperNode's loop.

    For a minute after each message the next one is asked for every quarter of a second, after that every three as Flower does.

    Args:
        clock: seconds, rising.
        sleep: waits that many seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._clock, self._sleep, self._last = clock, sleep, float("-inf")

    def note(self) -> None:
        """A message was here just now."""
        self._last = self._clock()

    def sleep(self, seconds: float) -> None:
        self._sleep(min(seconds, _STEP_S) if self._clock() - self._last < _TALK_S else seconds)


def signing(inner: Any) -> Any:
    """Flower's class that signs the time stamp of each call, made to sign the call as well."""

    class Signing(inner):  # type: ignore[misc]  # flwr is untyped here
        def __init__(self, private_key: Any, public_key: Any) -> None:
            super().__init__(private_key, public_key)
            self._key = private_key

        def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
            def signed(context: Any) -> Any:
                r = context.request
                path = r.url.raw_path.decode("ascii")
                r.headers[CALL] = sign_call(
                    self._key, r.method, path, body=r.content, stamp=r.headers[TIME], nonce=os.urandom(16)
                )
                return call_next(context)

            return super().intercept(context, signed)

    return Signing


def main() -> None:
    """The command ``flower-supernode``, in that pace and with signed calls."""
    from flwr.supernode import fleet_http_connection as connection
    from flwr.supernode import start_client_internal as loop
    from flwr.supernode.cli.flower_supernode import flower_supernode

    pace, push = Pace(), loop._push_messages

    def push_messages(*args: Any, **kwargs: Any) -> None:
        pace.note()
        push(*args, **kwargs)
        pace.note()

    loop.time, loop._push_messages = pace, push_messages
    connection.NodeAuthHttpInterceptor = signing(connection.NodeAuthHttpInterceptor)
    flower_supernode()


if __name__ == "__main__":
    main()
