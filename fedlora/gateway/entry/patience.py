"""Waiting for a server that does not answer yet, and for the coordinator's approval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from fedlora.core.errors import ConnectionFailed
from fedlora.gateway.joining import State
from fedlora.gateway.probe import Away

_AGAIN_S: Final = 3.0
T = TypeVar("T")


@dataclass(slots=True)
class Patience:
    """Waits that share one limit. Each reason to wait is said once."""

    wait_s: float
    pause: Callable[[float], None]
    say: Callable[[str, str], None]
    waited_s: float = 0.0
    said: bool = False

    def _once_more(self) -> bool:
        if self.waited_s >= self.wait_s:
            return False
        self.pause(_AGAIN_S)
        self.waited_s += _AGAIN_S
        return True

    def through(self, call: Callable[[], T]) -> T:
        """What the call gives; while nothing answers there, it is made again."""
        while True:
            try:
                return call()
            except Away as e:
                if not self.said and self.wait_s:
                    self.say("away", f"{e}; {e.hint}. It is asked again for up to {self.wait_s:.0f} s")
                    self.said = True
                if not self._once_more():
                    raise

    def decided(self, send: Callable[[], State]) -> State:
        """Asks again until the coordinator has decided or the time is over; a line that is away for a while is no decision."""
        state: State = "waiting"
        if self.wait_s:
            self.say(
                "waiting", f"waiting for the coordinator's approval, up to {self.wait_s:.0f} s; this command may be repeated"
            )
        while state == "waiting" and self._once_more():
            try:
                state = send()
            except ConnectionFailed as e:
                if e.code != "connection":
                    raise
        return state
