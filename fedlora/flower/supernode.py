"""Flower's SuperNode with changes of ours: polls more often, signs whole calls with the server's time, logs its connection state.

Flower's own loop asks for messages every three seconds. Secure aggregation has five short steps a round: waiting three seconds
for each would be most of its cost. Flower signs only this machine's time, not the rest of a call (see
:mod:`fedlora.gateway.calls`), and exits without a reason when the time is refused. Its log names neither address nor cause of a
failed connection. A second SIGTERM kills it before it has signed off; then the server takes it for alive for a minute and refuses
its successor.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import httpx

from fedlora.core.errors import FedLoRAError
from fedlora.formats.files import write_atomic
from fedlora.gateway.certificates import authority_digest
from fedlora.gateway.clock import TIME_HEADER, Clock
from fedlora.gateway.doors import GOODBYE_HEADER, GOODBYES, PROCESS_HEADER, WHY_HEADER

SAYS = "fedlora: "
"""Prefix of our own lines in the log; after it ``accepted``, ``lost CAUSE``, ``back``, ``refused WHY``, ``clock SECONDS``, or one
of the two words below."""

ARRIVED, ANSWERED = "arrived", "answered"
"""A message has arrived; its reply was sent, or given up by Flower. There is one message at a time."""

GOING = "FEDLORA_GOING"
"""Environment variable: path of the file in which `site up` leaves the word of :func:`say_goodbye`."""

_STEP_S = 0.25
_SHARE = 20
_WHY = re.compile(r"[a-z-]{1,20}( [-+]?[0-9]{1,12}(\.[0-9]{1,3})?)?")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_AMISS_S = 3.0  # a larger clock offset is logged


class PollInterval:
    """Replaces the module ``time`` in the SuperNode's loop.

    It waits a twentieth of the time since the last message, at least a quarter of a second and at most three seconds, as Flower
    does: what comes after a long wait comes at most 5 % later, and sites that wait for each other do not keep the server busy (a
    poll costs it about 11 ms of processor time).

    Args:
        clock: seconds, rising.
        sleep: waits that many seconds.
        say: logs a line.
        pausing: whether no more messages are to be asked for: a pause begins once the last answer is safe.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        say: Callable[[str], None] = lambda line: None,
        pausing: Callable[[], bool] = lambda: False,
    ) -> None:
        self._clock, self._sleep, self._say, self._pausing, self._last = clock, sleep, say, pausing, float("-inf")

    def arrived(self) -> None:
        """Called when a message has arrived."""
        self._last = self._clock()
        self._say(ARRIVED)

    def answered(self) -> None:
        """Called when its reply was sent, or could not be. Returns when the next message may be asked for."""
        self._say(ANSWERED)
        while self._pausing():
            self._sleep(_STEP_S)
        self._last = self._clock()

    def sleep(self, seconds: float) -> None:
        self._sleep(min(seconds, max(_STEP_S, (self._clock() - self._last) / _SHARE)))


class CallSigner:
    """Intercepts every call: signs it with the server's time, and logs each change of the connection's state.

    Args:
        say: logs a line.
        process: a random name of this process, sent with each call: two processes may use the same node key.
        goodbye: why this process signs off, one of ``gateway.doors.GOODBYES``; asked when it does.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        process: str,
        clock: Clock | None = None,
        goodbye: Callable[[], str] = lambda: "stopped",
    ) -> None:
        self._say, self._process, self._goodbye = say, process, goodbye
        self.clock = clock or Clock()
        self._lock = threading.Lock()  # the heartbeat has a thread of its own
        self._lost = False
        self._refused: str | None = None
        self._accepted = False
        self._said_ahead_s = 0.0

    def correction_s(self) -> float:
        """Seconds that are added to this machine's time in a signature."""
        return self.clock.correction_s()

    def intercept(self, sign_and_send: Callable[[httpx.Request], httpx.Response], request: httpx.Request) -> httpx.Response:
        """Makes one call. If the server refuses the time stamp and its answer corrects the clock, signs and sends it once more.

        Args:
            sign_and_send: adds the signed headers to the request, sends it and returns the answer.
        """
        request.headers[PROCESS_HEADER] = self._process
        if request.url.path.endswith("/deactivate-node"):
            request.headers[GOODBYE_HEADER] = self._goodbye()
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
            elif (
                status == 200
                and TIME_HEADER in response.headers  # any web server may answer 200
                and (self._refused is not None or (first and not self._accepted))
            ):
                self._refused, self._accepted = None, True
                self._say("accepted")


def main() -> None:
    """Runs the command ``flower-supernode`` with these changes."""
    leaving = _until_flower_listens()
    from fedlora.flower._internals import supernode  # takes a second or two; signals work in the meantime

    authority = authority_digest(Path(sys.argv[sys.argv.index("--root-certificates") + 1]))
    going = Path(os.environ.get(GOING, ""))
    signer = CallSigner(_say, process=os.urandom(8).hex(), goodbye=lambda: said_goodbye(going))
    rest = PollInterval(say=_say, pausing=lambda: said_goodbye(going) in ("paused", "left"))
    supernode.run(rest, signer, authority=authority, listening=leaving.set)


def say_goodbye(going: Path, word: str) -> None:
    """Leaves the word with which the SuperNode signs off; empty: none. On a full disk it stays what it was: no reason to stay."""
    with suppress(FedLoRAError):
        write_atomic(going, word.encode())


def said_goodbye(going: Path) -> str:
    """That word; ``orphaned`` where none was left: nobody has asked for it."""
    try:
        word = going.read_text("ascii")
    except (OSError, ValueError):
        return "orphaned"
    return word if word in GOODBYES else "orphaned"


def _until_flower_listens() -> threading.Event:
    """Until the event is set, a signal ends this process at once; after that, signals are ignored so that signing off can finish.

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
