"""How far this machine's clock is from the server's, measured by the server's answers, and the correction of what is signed.

Flower believes a node's signed time stamp if it is at most 5 s ahead of the server's clock and 305 s behind it. The server's
time is taken from answers over the pinned TLS connection only, so that nobody but the server can move what is signed; and by
at most a day, so that not even the server can have stamps signed for next year.
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Callable, Mapping

TIME_HEADER = "x-fedlora-time"
"""On every answer of the gateway: its clock, seconds since 1970, as a decimal number."""

ACCEPTED_AHEAD_S, ACCEPTED_BEHIND_S = 5.0, 305.0
MAX_CORRECTION_S = 86_400.0
_QUICK_S = 5.0  # an answer that took longer says too little


def server_time(headers: Mapping[str, str]) -> float | None:
    """The server's clock as its answer states it, seconds since 1970; None if it does not. Without our gateway: HTTP's Date."""
    try:
        stated = float(headers[TIME_HEADER])
        if math.isfinite(stated):
            return stated
    except (KeyError, ValueError):
        pass
    try:
        return email.utils.parsedate_to_datetime(headers["date"]).timestamp() + 0.5
    except (KeyError, ValueError, TypeError):
        return None


class Clock:
    """Knows the server's time once an answer has come.

    Args:
        clock: this machine's, seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.ahead_s: float | None = None
        """This machine's clock minus the server's, seconds; None: not measured yet."""

    def local(self) -> float:
        return self._clock()

    def note(self, headers: Mapping[str, str], *, sent: float, late: bool = False) -> None:
        """Takes an answer that has just come to a question of the local time ``sent``.

        Args:
            late: believe an answer that took long, too: nothing better is known, as after a refusal.
        """
        stated, received = server_time(headers), self._clock()
        if stated is None or received < sent:  # or this clock was set back meanwhile
            return
        if received - sent <= _QUICK_S:
            self.ahead_s = (sent + received) / 2 - stated
        elif late:
            self.ahead_s = received - stated  # the stamp is then behind by the time that the answer took: the safe side

    def correction_s(self) -> float:
        """What to add to this machine's clock in what is signed, seconds; 0 if it is not known, or more than a day."""
        ahead = self.ahead_s or 0.0
        return -ahead if abs(ahead) <= MAX_CORRECTION_S else 0.0
