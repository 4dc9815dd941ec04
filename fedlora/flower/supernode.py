"""Flower's SuperNode, which asks for messages every three seconds, made to ask more often while a round is talking.

Secure aggregation has five short steps a round; waiting three seconds for each would be most of what it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["Pace", "main"]

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


def main() -> None:
    """The command ``flower-supernode``, in that pace."""
    from flwr.supernode import start_client_internal as loop
    from flwr.supernode.cli.flower_supernode import flower_supernode

    pace, push = Pace(), loop._push_messages

    def push_messages(*args: Any, **kwargs: Any) -> None:
        pace.note()
        push(*args, **kwargs)
        pace.note()

    loop.time, loop._push_messages = pace, push_messages
    flower_supernode()


if __name__ == "__main__":
    main()
