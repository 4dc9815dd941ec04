"""Flower's SuperNode as a site runs it: it asks more often, signs its calls whole and with the server's time, says how it fares.

Flower's own loop asks for messages every three seconds: secure aggregation has five short steps a round, and waiting three
seconds for each would be most of what it costs. Flower signs this machine's time and no more of a call than that (see
:mod:`fedlora.gateway.calls`), and ends itself without a reason when the time is refused. Of a connection that fails its log says
neither address nor cause. And it is killed by a second SIGTERM before it has said good-bye: then the server takes it for alive
for a minute, and refuses its successor for so long.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import httpx

from fedlora.gateway.clock import Clock
from fedlora.gateway.doors import PROCESS_HEADER, WHY_HEADER

SAYS = "fedlora: "
"""How a line of the log begins that is ours: ``accepted``, ``lost CAUSE``, ``back``, ``refused WHY`` or ``clock SECONDS``."""

_TALK_S = 60.0
_STEP_S = 0.25
_WHY = re.compile(r"[a-z-]{1,20}( [-+]?[0-9]{1,12}(\.[0-9]{1,3})?)?")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_AMISS_S = 3.0  # a clock that is so far off is worth a line


class PollInterval:
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


class CallSigner:
    """Stands around every call to the server: signs with the server's time, and says what becomes of the calls, each change once.

    Args:
        say: takes a line of the log.
        process: a random name of this process, sent along, by which the server tells two with the same node key apart.
    """

    def __init__(self, say: Callable[[str], None], *, process: str, clock: Clock | None = None) -> None:
        self._say, self._process = say, process
        self.clock = clock or Clock()
        self._lock = threading.Lock()  # the heartbeat has a thread of its own
        self._lost = False
        self._refused: str | None = None
        self._accepted = False
        self._said_ahead_s = 0.0

    def correction_s(self) -> float:
        """What is added to this machine's time in a signature, seconds."""
        return self.clock.correction_s()

    def intercept(self, sign_and_send: Callable[[httpx.Request], httpx.Response], request: httpx.Request) -> httpx.Response:
        """One call. A stamp that the server refuses is signed again, once, if its answer shows that the clock was wrong.

        Args:
            sign_and_send: adds the signed headers to the request, sends it and returns the answer.
        """
        request.headers[PROCESS_HEADER] = self._process
        signed_with, sent, names = self.clock.correction_s(), self.clock.local(), set(request.headers)
        response = self._send(sign_and_send, request)
        refused = response.status_code == httpx.codes.UNAUTHORIZED
        self.clock.note(response.headers, sent=sent, late=refused)
        if refused and abs(self.clock.correction_s() - signed_with) > 1:
            for name in set(request.headers) - names:
                del request.headers[name]
            response = self._send(sign_and_send, request)
        self._note(response, first=request.url.path.endswith("/activate-node"))
        return response

    def _send(self, send: Callable[[httpx.Request], httpx.Response], request: httpx.Request) -> httpx.Response:
        try:
            return send(request)
        except httpx.TransportError as e:
            with self._lock:
                if not self._lost:
                    self._say(f"lost {type(e).__name__}: {' '.join(str(e).split())[:300]}")
                self._lost = True
            raise

    def _note(self, response: httpx.Response, *, first: bool) -> None:
        status, why = response.status_code, response.headers.get(WHY_HEADER, "")
        with self._lock:
            if self._lost:
                self._lost = False
                self._say("back")
            ahead = self.clock.ahead_s or 0.0
            if (
                abs(ahead - self._said_ahead_s) > max(1.0, abs(ahead) / 10)
                and max(abs(ahead), abs(self._said_ahead_s)) > _AMISS_S
            ):
                self._said_ahead_s = ahead
                self._say(f"clock {ahead:+.1f}")
            if status in (401, 403, 412) or (why and status == 200):
                said = why if _WHY.fullmatch(why) else str(status)
                told = self._refused is not None and (said == str(status) or said.split()[0] == self._refused.split()[0])
                if status != 403 and not told:  # 403: a run that has ended
                    self._refused = said
                    self._say(f"refused {said}")
            elif status == 200 and (self._refused is not None or (first and not self._accepted)):
                self._refused, self._accepted = None, True
                self._say("accepted")


def main() -> None:
    """The command ``flower-supernode``, with all that."""
    leaving = _until_flower_listens()
    from fedlora.flower._internals import supernode  # takes a second or two: a signal is heard in the meantime

    supernode.run(PollInterval(), CallSigner(_say, process=os.urandom(8).hex()), listening=leaving.set)


def _until_flower_listens() -> threading.Event:
    """A signal ends this process at once until the event is set. From then on further signals cannot disturb the good-bye.

    The kernel sends the death signal once for each thread of a parent that was killed (``processes.die_with_parent``).
    """
    leaving = threading.Event()

    def handler(signum: int, frame: FrameType | None) -> None:
        if not leaving.is_set():
            os._exit(0)

    for signum in _SIGNALS:
        signal.signal(signum, handler)
    return leaving


def _say(line: str) -> None:
    sys.stderr.write(f"{SAYS}{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
