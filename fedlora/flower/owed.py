"""What a site still owes the server: no pause begins while an answer is in the making, on its way, or about to be asked for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Final

from fedlora.core.messages import Reply, Request
from fedlora.flower.runner import Handle
from fedlora.flower.supernode import ANSWERED, ARRIVED, SAYS

_OURS: Final = re.compile(rf"{re.escape(SAYS)}({ARRIVED}|{ANSWERED})")
_DELIVERY_S: Final = 900.0
_PULLED_S: Final = 10.0
"""How long an answer may lie at the relay before the run takes it, seconds: Flower drops what comes from a node that has gone."""


class Owed:
    """Follows what the SuperNode says of its messages. It has one at a time, from its arrival until its reply was sent.

    Args:
        until: until when, by ``clock``, the server will ask for more in an exchange that has begun here.
        delivered: called when a reply was sent, in the thread that reads the SuperNode's lines.
        clock: seconds, rising.
    """

    def __init__(
        self,
        *,
        until: Callable[[], float],
        delivered: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._until, self._delivered, self._clock = until, delivered, clock
        self._there = self._works = False
        self._limit = self._answered = float("-inf")

    def read_line(self, line: str) -> None:
        """Takes a line of the SuperNode's log."""
        if match := _OURS.fullmatch(line):
            self._there = match[1] == ARRIVED
            self._limit = self._clock() + _DELIVERY_S
            if not self._there:
                self._answered = self._clock()
                self._delivered()

    def forget(self) -> None:
        """Takes that another SuperNode begins: what the last one had is gone."""
        self._there, self._answered = False, float("-inf")
        self._delivered()

    def more(self) -> bool:
        """Whether the server will ask for more in an exchange that has begun here."""
        return self._clock() < self._until()

    def handling(self, handle: Handle) -> Handle:
        """``handle``, whose answers are owed from the moment at which it is called.

        The SuperNode says that a message has arrived only once the server has confirmed that, which may take longer than the
        work; and work may begin and end between two looks at :meth:`owes`.
        """

        def handled(request: Request) -> Reply:
            self._there = self._works = True
            try:
                return handle(request)
            finally:
                self._limit = self._clock() + _DELIVERY_S
                self._works = False

        return handled

    def owes(self) -> bool:
        """Whether something is owed. A reply that is not sent a quarter of an hour after its work has ended is given up: the
        server is away, and the journal has it.
        """
        now = self._clock()
        return self._works or self.more() or (now < self._limit if self._there else now < self._answered + _PULLED_S)
